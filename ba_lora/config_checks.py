"""Which values a resolved configuration may have, alone and together; each complaint is one line with the mend.

Sections that are also made by hand, without a file (`BALoRAConfig`, `LossConfig`), check themselves in config.py.
"""

import dataclasses
import re
from typing import Any

from ba_lora.config import (
    ATTENTION,
    DATASETS,
    DTYPES,
    NLG_TASKS,
    RUN_MEASURES,
    TUNERS,
    RunConfig,
    check_choice,
    nearest,
)
from ba_lora.config_heldout import check_heldout
from ba_lora.config_nlu import check_nlu
from ba_lora.errors import UserError

# TrainingArguments under which the method or a resumed run would silently be another one; the value that is safe, why.
_UNSAFE_ARGUMENTS = {
    "auto_find_batch_size": (False, "the micro-batch is part of the method: set trainer.per_device_train_batch_size"),
    "average_tokens_across_devices": (True, "the terms are means over the positions of all processes"),
    "label_smoothing_factor": (0, "the loss has no label smoothing"),
    "save_only_model": (False, "a killed run could not go on with its optimizer's state"),
    "ignore_data_skip": (False, "a resumed run would see other rows"),
    "fsdp": ("", "FSDP is not supported: use DDP or DeepSpeed"),
}
# TrainingArguments that the run itself sets.
_RESERVED_ARGUMENTS = {
    "output_dir": "output_dir",
    "seed": "seed",
    "data_seed": "seed",
    "push_to_hub": "hub.push",
    "hub_model_id": "hub.repo_id",
    "resume_from_checkpoint": "(resuming is automatic)",
    "prediction_loss_only": "(held-out rows have no predictions, only a loss)",
    "label_names": "(the rows are made by the run)",
    "remove_unused_columns": "(the rows are made by the run)",
}


def check(config: RunConfig) -> None:
    """Raise UserError for the first value that is unknown, out of range or does not fit another one."""
    if not config.model.name:
        raise UserError("model.name is missing: name a hub id or a folder")
    check_choice("model.dtype", config.model.dtype, DTYPES)
    check_choice("model.attention", config.model.attention, ATTENTION)
    check_choice("model.quantization", config.model.quantization, ("none", "nf4"))
    check_choice("adapter.tuner", config.adapter.tuner, TUNERS)
    check_choice("adapter.dtype", config.adapter.dtype, ("float32", "base"))
    if not re.fullmatch(r"lora|pissa|pissa_niter_[1-9]\d*|corda", config.adapter.init):
        raise UserError(f"adapter.init={config.adapter.init} is unknown: choose lora, pissa, pissa_niter_N or corda")
    if config.adapter.rank < 1:
        raise UserError(f"adapter.rank is {config.adapter.rank}: it must be at least 1")
    if config.adapter.alpha is not None and config.adapter.alpha <= 0:
        raise UserError(f"adapter.alpha is {config.adapter.alpha}: it must be above 0")
    if config.adapter.svd_rank is not None and config.adapter.svd_rank < config.adapter.rank:
        raise UserError(
            f"adapter.svd_rank is {config.adapter.svd_rank}: it must be at least adapter.rank={config.adapter.rank}"
        )
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed is {config.seed}: it must lie between 0 and 2^32 - 1")
    if not 0 <= config.adapter.dropout < 1:
        raise UserError(f"adapter.dropout is {config.adapter.dropout}: it must lie in [0, 1)")
    if config.adapter.init != "lora" and (config.adapter.tuner != "lora" or config.adapter.dora):
        raise UserError(f"adapter.init={config.adapter.init} needs adapter.tuner=lora and adapter.dora=false")
    if config.model.quantization == "nf4" and config.adapter.tuner != "lora":
        raise UserError("model.quantization=nf4 needs adapter.tuner=lora: quantised weights cannot be trained")
    if config.adapter.init == "corda" and (config.kind != "nlg" or config.model.quantization != "none"):
        raise UserError("adapter.init=corda runs training rows through a language model: not for NLU, nor for nf4")
    for name in ("svd_rank", "factors_cache"):
        if config.adapter.init == "corda" and getattr(config.adapter, name) is not None:
            raise UserError(f"adapter.{name} is PiSSA's, CorDA's factors depend on the rows: leave it out (null)")
    if config.reference.top_k < 1:
        raise UserError(f"reference.top_k is {config.reference.top_k}: it must be at least 1")
    check_choice("reference.dtype", config.reference.dtype, ("float16", "float32"))
    if config.data.num_rows is not None and config.data.num_rows < 1:
        raise UserError(f"data.num_rows is {config.data.num_rows}: it must be at least 1, or null for all")
    if config.kind == "nlu":
        check_nlu(config)
    else:
        check_choice("data.name", config.data.name, DATASETS)
        if config.data.num_rows is None and config.data.name == "toy" and config.data.source is None:
            raise UserError("data.num_rows=null means all rows of a set, the toy's are made on demand: give a number")
        for task in (*config.eval.tasks, *config.eval.data):
            check_choice("eval.tasks", task, (*NLG_TASKS, *RUN_MEASURES))
    if config.data.max_length < 2:
        raise UserError(f"data.max_length is {config.data.max_length}: it must be at least 2")
    check_choice("eval.engine", config.eval.engine, ("auto", "vllm", "hf"))
    if config.hub.push and not config.hub.repo_id:
        raise UserError("hub.push=true needs hub.repo_id=<user>/<name>")
    _check_trainer(config.trainer)
    check_heldout(config)


def _check_trainer(arguments: dict[str, Any]) -> None:
    from transformers import TrainingArguments

    defaults = {entry.name: entry.default for entry in dataclasses.fields(TrainingArguments) if entry.init}
    for name in arguments:
        if name in _RESERVED_ARGUMENTS:
            raise UserError(f"trainer.{name} is set by the run itself: use {_RESERVED_ARGUMENTS[name]}")
        if name not in defaults:
            near = nearest(name, list(defaults))
            raise UserError(f"unknown key trainer.{name}{near} (a transformers.TrainingArguments name)")
        if name == "accelerator_config" and dict(arguments[name] or {}).get("split_batches"):
            raise UserError("trainer.accelerator_config.split_batches=true is refused: the batch sizes are per process")
        if name in _UNSAFE_ARGUMENTS and arguments[name] not in (_UNSAFE_ARGUMENTS[name][0], defaults[name]):
            raise UserError(f"trainer.{name}={arguments[name]} is refused: {_UNSAFE_ARGUMENTS[name][1]}")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if name in arguments and (not isinstance(arguments[name], int) or arguments[name] < 1):
            raise UserError(f"trainer.{name}={arguments[name]} must be a whole number of at least 1")
    if arguments.get("save_total_limit") == 1:
        raise UserError(
            "trainer.save_total_limit=1 leaves nothing to fall back to if the last checkpoint is damaged: use 2"
        )
