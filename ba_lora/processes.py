"""The processes of a distributed run: how they come together, and how one error becomes everybody's."""

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ba_lora.errors import UserError, in_one_line


def start_processes(trainer: Mapping[str, Any]) -> PartialState:
    """Join the processes that the launcher has started; return what each knows of its place among them.

    `trainer` is the run's TrainingArguments by name; TrainingArguments itself comes too late to choose a backend.

    Without an accelerator they talk by gloo. accelerate must be told so: under DeepSpeed it finds no backend by itself,
    and takes every process for the only one. Raises UserError for a backend that is not there.
    """
    import torch
    from transformers import TrainingArguments

    seconds = trainer.get("ddp_timeout", TrainingArguments.ddp_timeout)
    on_cpu = trainer.get("use_cpu", False) or not torch.accelerator.is_available()
    backend = trainer.get("ddp_backend") if "LOCAL_RANK" in os.environ else None  # one process has none
    try:
        return PartialState(cpu=on_cpu, backend=backend, timeout=timedelta(seconds=seconds))
    except (RuntimeError, ValueError) as error:
        if backend is None:
            raise
        raise UserError(f"trainer.ddp_backend={backend}: {in_one_line(error)}") from error


def on_main_process(process: PartialState, function: Callable[..., None], *arguments: Any, **keywords: Any) -> None:
    """Call `function` on the main process while the others wait; its UserError is raised on all of them."""
    error: list[str | None] = [None]
    if process.is_main_process:
        try:
            function(*arguments, **keywords)
        except UserError as raised:
            error = [str(raised)]
    broadcast_object_list(error)
    if error[0] is not None:
        raise UserError(error[0])
