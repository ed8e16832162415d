"""What warm.py's fork server imports before its first fork: all that a training or an evaluation by transformers
imports sooner or later, some of it only in its first step."""

import importlib
import importlib.util

from ba_lora.config.trainer import argument_types
from ba_lora.runs.environment import code_state

LIBRARIES = ("transformers.trainer", "peft.tuners.lora", "torch.profiler", "deepspeed", "evaluate")
SCRIPTS = ("train_nlg", "train_nlu", "eval.engines.hf", "eval.tasks", "eval.scoring", "eval.run_models")
for name in (*SCRIPTS, *LIBRARIES):
    if importlib.util.find_spec(name) is not None:
        importlib.import_module(name)
argument_types()  # read from a long source text, once
code_state()  # the results name the code that has been imported here
