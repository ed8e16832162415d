"""transformers' TrainingArguments from a configuration, and what follows from them: autocast, number of steps."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ba_lora.config import RunConfig
from ba_lora.errors import UserError

if TYPE_CHECKING:
    from transformers import TrainingArguments


def build_arguments(config: RunConfig, run_path: Path) -> "TrainingArguments":
    """Return the arguments: `config.trainer` by name, and what the run itself decides.

    Make them before the model: DeepSpeed ZeRO-3 splits the model while it is loaded only if it knows by then.
    Raises UserError for arguments that Trainer refuses or this machine cannot run, and for an NLU run under ZeRO-3,
    whether the config or `accelerate launch` asks for it.
    """
    import torch
    from transformers import TrainingArguments
    from transformers.integrations import is_deepspeed_zero3_enabled

    chosen = {"logging_steps": 10, "save_strategy": "steps", "save_total_limit": 2} | config.trainer
    if chosen.get("fp16") and not torch.cuda.is_available():
        raise UserError("trainer.fp16=true needs a GPU, and none was found: use bf16=true or float32")
    if chosen.get("tf32") and not torch.cuda.is_available():
        raise UserError("trainer.tf32=true needs an NVIDIA GPU, and none was found: leave it out")
    chosen.setdefault("ddp_find_unused_parameters", False)  # every trainable weight gets a gradient in every step
    if not torch.cuda.is_available():
        chosen.setdefault("dataloader_pin_memory", False)
    if not torch.accelerator.is_available():
        chosen.setdefault("use_cpu", True)  # else, under DeepSpeed, each process would take itself for the only one
    if config.early_stopping.patience is not None:
        chosen.setdefault("restore_callback_states_from_checkpoint", True)  # a resumed run goes on counting
    if config.early_stopping.patience is not None or chosen.get("load_best_model_at_end"):
        chosen.setdefault("metric_for_best_model", "loss")
        chosen.setdefault("greater_is_better", False)  # of eval_loss and eval_task
    if chosen.get("gradient_checkpointing"):
        chosen.setdefault("gradient_checkpointing_kwargs", {"use_reentrant": False})
    if chosen.get("deepspeed") and not torch.cuda.is_available():
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    try:
        arguments = TrainingArguments(
            output_dir=str(run_path / "checkpoints"),
            seed=config.seed,
            data_seed=config.seed,
            label_names=["labels"],
            prediction_loss_only=True,
            **chosen,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
    if config.kind == "nlu" and is_deepspeed_zero3_enabled():
        raise UserError("NLU runs do not support ZeRO-3: use DDP or configs/deepspeed/zero2.json")
    return arguments


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
