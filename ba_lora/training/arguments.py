"""transformers' TrainingArguments from a configuration, and what follows from them: autocast, number of steps."""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ba_lora.config.schema import RunConfig
from ba_lora.config.schema_nlg import NLGConfig
from ba_lora.config.trainer import PROJECT
from ba_lora.errors import UserError
from ba_lora.paths import resolve_path
from ba_lora.words import check_choice

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainingArguments

# Optimizers that look for their layers in the model itself, which is not there yet.
OPTIMIZERS_OF_A_MODEL = (
    "galore_adamw", "galore_adafactor", "galore_adamw_layerwise", "galore_adafactor_layerwise", "apollo_adamw",
    "apollo_adamw_layerwise", "lomo", "adalomo",
)  # fmt: skip


def build_arguments(config: RunConfig, run_path: Path) -> "TrainingArguments":
    """Return the arguments: `config.trainer` by name, and what the run itself decides.

    Make them before the model: DeepSpeed ZeRO-3 splits the model while it is loaded only if it knows by then.
    Optimizer and schedule are made once on one number, so that values which they refuse are told here.
    Raises UserError for arguments that Trainer refuses or this machine cannot run, and for an NLU run under ZeRO-3,
    whether the config or `accelerate launch` asks for it.
    """
    import torch
    from transformers import TrainingArguments
    from transformers.integrations import is_deepspeed_zero3_enabled

    chosen = {"logging_steps": 10, "save_strategy": "steps", "save_total_limit": 2, "project": PROJECT} | config.trainer
    if chosen.get("fp16") and not torch.cuda.is_available():
        raise UserError("trainer.fp16=true needs a GPU, and none was found: use bf16=true or float32")
    if chosen.get("tf32") and not torch.cuda.is_available():
        raise UserError("trainer.tf32=true needs an NVIDIA GPU, and none was found: leave it out")
    chosen.setdefault("ddp_find_unused_parameters", False)  # every trainable weight gets a gradient in every step
    if not torch.cuda.is_available():
        chosen.setdefault("dataloader_pin_memory", False)
    if not torch.accelerator.is_available():
        chosen.setdefault("use_cpu", True)  # else, under DeepSpeed, each process would take itself for the only one
    stops_early = isinstance(config, NLGConfig) and config.early_stopping.patience is not None
    if stops_early:
        chosen.setdefault("restore_callback_states_from_checkpoint", True)  # a resumed run goes on counting
    if chosen.get("load_best_model_at_end"):  # each evaluation has its checkpoint
        chosen.setdefault("save_steps", chosen.get("eval_steps") or chosen["logging_steps"])
    best_is_asked_for = chosen.get("load_best_model_at_end") or chosen["save_strategy"] == "best"
    if stops_early or best_is_asked_for:
        chosen.setdefault("metric_for_best_model", "loss")
        chosen.setdefault("greater_is_better", False)  # of eval_loss and eval_task
    if chosen.get("gradient_checkpointing"):
        chosen.setdefault("gradient_checkpointing_kwargs", {"use_reentrant": False})
    if isinstance(chosen.get("deepspeed"), str):
        chosen["deepspeed"] = str(resolve_path(chosen["deepspeed"]))
    if chosen.get("deepspeed") and "RANK" not in os.environ:
        raise UserError(
            "trainer.deepspeed needs a launcher: set ACCELERATE_CONFIG=configs/accelerate/zero2.yaml (or zero3.yaml) "
            "instead, or start the training script with torchrun"
        )
    if chosen.get("deepspeed") and not torch.cuda.is_available():
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    if chosen.get("torch_compile_backend"):
        from accelerate.utils import DynamoBackend

        known = [backend.value.lower() for backend in DynamoBackend]
        check_choice("trainer.torch_compile_backend", chosen["torch_compile_backend"], known)
    try:
        arguments = TrainingArguments(
            output_dir=str(run_path / "checkpoints"),
            seed=config.seed,
            data_seed=config.seed,
            run_name=config.result_path.stem,
            label_names=["labels"],
            prediction_loss_only=True,
            **chosen,
        )
        _try_optimizer(arguments)
    except Exception as error:  # of any class, by what the library happens to do with the value
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise UserError(f"trainer: {kind}{' '.join(str(error).split())}") from error
    half = "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else None
    if half and arguments.deepspeed_plugin is not None and config.model.dtype == "float32":
        raise UserError(
            f"model.dtype=float32: DeepSpeed would train it in {half}, and export another model than was trained: set "
            f"model.dtype={half}, or trainer.bf16 and trainer.fp16 to false"
        )
    if config.kind == "nlu" and is_deepspeed_zero3_enabled():
        raise UserError("NLU runs do not support ZeRO-3: use DDP or configs/deepspeed/zero2.json")
    return arguments


def early_stopping(config: NLGConfig) -> "list[TrainerCallback]":
    """Return the callback that stops a run after `early_stopping.patience` evaluations without a better one, if any."""
    from transformers import EarlyStoppingCallback

    settings = config.early_stopping
    return [] if settings.patience is None else [EarlyStoppingCallback(settings.patience, settings.threshold)]


def _try_optimizer(arguments: "TrainingArguments") -> None:
    """Make the optimizer and its schedule on a single number, with the values that training would use."""
    import torch
    from transformers import Trainer, get_scheduler

    if arguments.optim in OPTIMIZERS_OF_A_MODEL:
        return
    optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(1))], **settings)
    get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        num_warmup_steps=1,
        num_training_steps=4,
        scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs or {}),
    )


def autocast_precision(arguments: "TrainingArguments") -> str:
    """Return the precision of the autocast that forward passes run under: bf16, fp16, or no.

    Under DeepSpeed there is none: it casts the weights themselves.
    """
    return "no" if arguments.deepspeed_plugin is not None else arguments.mixed_precision


def count_steps(arguments: "TrainingArguments", num_rows: int) -> int:
    """Return how many optimizer steps `num_rows` rows give, as Trainer counts them."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    batches = num_rows / (arguments.per_device_train_batch_size * arguments.world_size)
    batches = max(math.floor(batches), 1) if arguments.dataloader_drop_last else math.ceil(batches)
    per_epoch = math.ceil(batches / arguments.gradient_accumulation_steps)
    return math.ceil(per_epoch * arguments.num_train_epochs)
