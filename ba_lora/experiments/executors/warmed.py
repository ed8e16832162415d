"""What warm.py's fork server imports before its first fork: all that a training imports sooner or later, some of it
only in its first step."""

import importlib
import importlib.util

from ba_lora.config.trainer import argument_types

for name in ("train_nlg", "train_nlu", "transformers.trainer", "peft.tuners.lora", "torch.profiler", "deepspeed"):
    if importlib.util.find_spec(name) is not None:
        importlib.import_module(name)
argument_types()  # read from a long source text, once
