"""The range of every number in a configuration. A value outside it, NaN, infinite or of another type is one line."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from ba_lora.errors import UserError

# "[" and "]" take the bound in, "(" and ")" leave it out.
LAMBDA = "[0, 1000000]"
RANGES = {
    "seed": "[0, 4294967295]",
    "adapter.rank": "[1, 1000000]",
    "adapter.alpha": "(0, 1000000]",
    "adapter.dropout": "[0, 1)",
    "adapter.svd_rank": "[1, 1000000]",
    **{f"regularizers.lambda_{term}": LAMBDA for term in ("consistency", "diversity", "svd")},  # as any further term's
    "regularizers.temperature": "(0, 1000000]",
    "regularizers.gradient_every": "[1, 1000000000]",
    "regularizers.kl_target": "(0, 1000]",
    "regularizers.kl_gain": "(0, 5)",
    "regularizers.diversity_top_k": "[1, 1000000000]",
    "regularizers.svd_top_k": "[1, 1000000000]",
    "loss.chunk_memory_mb": "(0, 1000000000]",
    "reference.top_k": "[1, 1000000000]",
    "data.num_rows": "[1, 1000000000]",
    "data.sample_seed": "[0, 4294967295]",
    "data.max_length": "[2, 10000000]",
    "data.exchanges": "[1, 1000000]",
    "data.dev_share": "(0, 1)",
    "data.heldout_share": "(0, 1)",
    "data.split_seed": "[0, 4294967295]",
    "data.toy.label_noise": "[0, 1]",
    "data.toy.imbalance": "[0, 1)",
    "data.toy.dev_rows": "[1, 10000000]",
    "data.toy.seed": "[0, 4294967295]",
    "early_stopping.patience": "[1, 1000000]",
    "early_stopping.threshold": "[0, 1000000]",
    "export.tolerance": "[0, 1000000]",
    "eval.limit": "[1, 1000000000]",
    "eval.harness.batch_size": "[1, 1000000]",
    "nlu.heldout_share": "(0, 1)",
    "features.num_rows": "[1, 1000000000]",
}
# TrainingArguments of a limited range; those that are not here may be any number of their type.
TRAINER_RANGES = {
    "per_device_train_batch_size": "[1, 10000000]",
    "per_device_eval_batch_size": "[1, 10000000]",
    "gradient_accumulation_steps": "[1, 10000000]",
    "num_train_epochs": "(0, 1000000]",
    "max_steps": "[1, 10000000000]",  # -1, transformers' word for "not set", is taken as well
    "learning_rate": "[0, 1000000]",
    "warmup_steps": "[0, 10000000000]",
    "weight_decay": "[0, 1000000]",
    "adam_beta1": "[0, 1)",
    "adam_beta2": "[0, 1)",
    "adam_epsilon": "[0, 1]",
    "max_grad_norm": "[0, 1e30]",
    "neftune_noise_alpha": "[0, 1000000]",
    "torch_empty_cache_steps": "[1, 10000000000]",
    "logging_steps": "(0, 10000000000]",
    "save_steps": "(0, 10000000000]",
    "eval_steps": "(0, 10000000000]",
    "eval_delay": "[0, 10000000000]",
    "save_total_limit": "[1, 1000000]",
    "dataloader_num_workers": "[0, 1024]",
    "dataloader_prefetch_factor": "[1, 1000000]",
    "ddp_bucket_cap_mb": "[1, 1000000]",
    "ddp_timeout": "[1, 100000000]",
}


def check_range(key: str, value: object, limits: str) -> None:
    """Raise UserError unless `value` is a finite number within `limits`, such as `(0, 1]`."""
    left, low, high, right = re.fullmatch(r"([\[(])(\S+), (\S+)([\])])", limits).groups()
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if (
        is_number
        and (value >= float(low) if left == "[" else value > float(low))
        and (value <= float(high) if right == "]" else value < float(high))
    ):
        return
    least = f"of at least {low}" if left == "[" else f"above {low}"
    most = f"at most {high}" if right == "]" else f"below {high}"
    raise UserError(f"{key} is {value}: it must be a number {least} and {most}")


def check_numbers(section: Any, prefix: str = "") -> None:
    """Raise UserError for the first number of a dataclass, or of the sections in it, that is out of its range.

    None, where a setting may be left out, is no number. `trainer` and `options`, of others' names, are left to others.
    """
    for entry in dataclasses.fields(section):
        key, value = prefix + entry.name, getattr(section, entry.name)
        if dataclasses.is_dataclass(value):
            check_numbers(value, f"{key}.")
        elif value is not None and not isinstance(value, str):
            if limits := RANGES.get(key) or (LAMBDA if ".lambda_" in key else None):
                check_range(key, value, limits)


def check_trainer_numbers(arguments: Mapping[str, Any]) -> None:
    """Raise UserError for the first of the TrainingArguments that is out of its range."""
    for name, limits in TRAINER_RANGES.items():
        value = arguments.get(name)
        if value is None or (name == "max_steps" and value == -1):
            continue
        check_range(f"trainer.{name}", value, limits)
