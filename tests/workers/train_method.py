"""Train methods on the tiny model for 4 steps under python or torchrun, under BA-LoRA's terms; save the weights, first
and last.

train_method.py BASE RUN ACCUMULATION OUT METHOD [METHOD …]

RUN: folder of the runs' first factors. For the methods that are for classifiers BASE is an encoder.
"""

import sys
import tempfile
from pathlib import Path

import torch
from accelerate import PartialState

from ba_lora import BALoRAConfig, BALoRATrainer
from ba_lora.errors import end_process
from ba_lora.methods.build import build_model
from tests.support.methods import (
    CASES,
    CLASSIFIERS,
    IN_LAYERS,
    OFF,
    config_of,
    fixed_draws,
    nlu_trainer_of,
    sized_steps,
)
from tests.support.tiny import adapter_weights, arguments, collate, tiny_rows
from tests.support.tiny_nlu import nlu_config

base, run, accumulation, output = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
torch.set_num_threads(1)
PartialState(cpu=True)
start, found = {}, {}
for method in sys.argv[5:]:
    torch.manual_seed(1)
    if method in CLASSIFIERS:
        settings = sized_steps(nlu_config(base, method=method)) | {"learning_rate": 0.05}
        trainer = nlu_trainer_of(method, base, run / method, gradient_accumulation_steps=accumulation, **settings)
        start[method] = adapter_weights(trainer.model)
        trainer.train()
        found[method] = adapter_weights(trainer.model)
        continue
    steps = CASES[method].steps
    with fixed_draws():
        config = config_of(method, base)
        model, _ = build_model(config, run_path=run / method, num_steps=steps, rows=tiny_rows(24))
        trainer = BALoRATrainer(
            model,
            arguments(
                Path(tempfile.mkdtemp()),
                max_steps=steps,
                gradient_accumulation_steps=accumulation,
                max_grad_norm=0,
                **sized_steps(config),
            ),
            regularizers=BALoRAConfig(0.5, 0.3, 0.0) if method in IN_LAYERS else OFF,
            train_dataset=tiny_rows(48),
            data_collator=collate,
        )
        start[method] = adapter_weights(model)
        trainer.train()
    found[method] = adapter_weights(model)
if PartialState().is_main_process:
    torch.save({"processes": PartialState().num_processes, "start": start, "weights": found}, output)
end_process()
