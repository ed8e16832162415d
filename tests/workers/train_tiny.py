"""Train the tiny model for 6 steps under python or torchrun and save log and weights.

train_tiny.py REGULARIZERS ACCUMULATION OUT [packed] [zero2 | zero3] [CACHE]     CACHE: folder of the reference on disk
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

from ba_lora import BALoRAConfig, BALoRATrainer
from ba_lora.errors import end_process
from ba_lora.models.layers import gathered
from ba_lora.training.packing import PackingCollator, prepare_packing
from tests.support.tiny import adapter_weights, arguments, collate, tiny_cache, tiny_peft, tiny_rows

regularizers, accumulation, output = BALoRAConfig(**json.loads(sys.argv[1])), int(sys.argv[2]), Path(sys.argv[3])
words = sys.argv[4:]
packed, stage = "packed" in words, next((word for word in words if word.startswith("zero")), None)
folders = [Path(word) for word in words if word not in ("packed", stage)]
torch.set_num_threads(1)
settings = {"max_steps": 6, "learning_rate": 1e-2, "gradient_accumulation_steps": accumulation, "warmup_steps": 0}
settings["per_device_eval_batch_size"] = 2
if stage:
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    settings["deepspeed"] = str(Path("configs") / "deepspeed" / f"{stage}.json")
training_arguments = arguments(Path(tempfile.mkdtemp()), **settings)  # before the model: DeepSpeed splits it by them
rows = tiny_rows(16)  # whole effective batches: accelerate would fill a short one with rows of its own
cache = tiny_cache(folders[0], rows, temperature=regularizers.temperature) if folders else None
model = tiny_peft("pissa")
if packed:
    prepare_packing(model, tiny_rows(2)["input_ids"])
trainer = BALoRATrainer(
    model,
    training_arguments,
    regularizers=regularizers,
    reference=cache,
    train_dataset=rows,
    data_collator=PackingCollator() if packed else collate,
)
trainer.train()
throughput = trainer.throughput()
heldout = None if stage or cache else trainer.evaluate(tiny_rows(21).select(range(16, 21)))
with gathered(list(model.parameters()), modify=False):
    weights = adapter_weights(model)
if trainer.is_world_process_zero():
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    torch.save(
        {
            "processes": trainer.accelerator.num_processes,
            "logs": {name: [entry[name] for entry in history] for name in history[0]},
            "weights": weights,
            "loss_report": trainer.objective.report(),
            "throughput": throughput,
            "heldout": heldout,
        },
        output,
    )
end_process()
