"""Build a PiSSA or CorDA model under torchrun; each process prints the hash of its weights: MODEL INIT RUN [zero3]."""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from peft.tuners.lora import corda as peft_corda

from ba_lora.config.schema import AdapterConfig, ModelConfig
from ba_lora.config.schema_nlg import NLGConfig
from ba_lora.errors import end_process
from ba_lora.methods import pissa
from ba_lora.methods.build import build_model
from tests.support.pissa_helpers import weights_sha256
from tests.support.tiny import arguments, tiny_rows

name, init, run, *stage = sys.argv[1:]
torch.set_num_threads(1)
if stage == ["zero3"]:
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    alive = arguments(Path(run), deepspeed="configs/deepspeed/zero3.json")  # while it is, models are split on loading
process = PartialState(cpu=True)
torch.manual_seed(process.process_index)  # the processes' random states may differ
svds = 0


def counting(function):
    def counted(*arguments, **settings):
        global svds
        svds += 1
        return function(*arguments, **settings)

    return counted


pissa.leading_components = counting(pissa.leading_components)
peft_corda.collect_eigens_for_layer = counting(peft_corda.collect_eigens_for_layer)
config = NLGConfig(model=ModelConfig(name=name, dtype="float32"), adapter=AdapterConfig(init=init, rank=4))
model, _ = build_model(config, run_path=Path(run), num_steps=1, rows=tiny_rows(8))
split = sum(hasattr(parameter, "ds_id") for parameter in model.parameters())
facts = {"rank": process.process_index, "svds": svds, "split": split, "weights": weights_sha256(model)}
for rank in range(process.num_processes):
    if rank == process.process_index:
        print("facts", json.dumps(facts), flush=True)
    process.wait_for_everyone()
end_process()
