"""A run's folder: whose it is, what state it is in, and how a run ends.

outputs/<run_id>/config.yaml   the resolved configuration; written first, it claims the folder
                 claim.json    what else must stay as it was: number of processes, the local training file
                 initial/      the first factors of PiSSA and CorDA
                 checkpoints/  Trainer's, each with the list of its files
                 adapter/ lora/ merged/
                 log.jsonl     every logged step
                 train.json    written last: what training and export did (status, times, terms, environment)
"""

import contextlib
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ba_lora.config import RunConfig, resolve_path, to_yaml, training_hash
from ba_lora.config_layers import load_config
from ba_lora.errors import UserError
from ba_lora.io import disk_errors, read_json, sha256_file, write_json_atomic, write_text_atomic
from ba_lora.locks import locked, training_lock_path
from ba_lora.prompts import prompt_hash
from ba_lora.results import now, write_result

CLAIM = "claim.json"


def claim_folder(config: RunConfig, *, num_processes: int = 1) -> None:
    """Make the run's folder, or take up one of the very same training configuration.

    From here to its end this process holds the run's training lock (see locks.py). Raises UserError when another
    process does, when the folder belongs to another configuration, another number of processes or another version of
    a local training file, or holds something else: nothing in it has changed then. `overwrite=true` empties it first.
    Call it on one process only.
    """
    path = config.run_path
    _hold_training_lock(path)
    saved = path / "config.yaml"
    claim = {"num_processes": num_processes, "source_sha256": source_sha256(config)}
    with disk_errors(path):
        if path.is_file():
            raise UserError(f"{path} is a file: choose another output_dir")
        if config.overwrite and path.is_dir():
            if any(path.iterdir()) and not saved.is_file():
                raise UserError(f"{path} is no run's folder: it will not be emptied; choose another output_dir")
            shutil.rmtree(path)
            config.result_path.unlink(missing_ok=True)
        if saved.is_file():
            claim = _earlier_claim(config, claim)
        elif path.is_dir() and any(file for file in path.iterdir() if not file.name.endswith(".tmp")):
            raise UserError(f"{path} is not empty and no run's folder: choose another output_dir")
        write_text_atomic(saved, to_yaml(config))
        write_json_atomic(path / CLAIM, claim)


def _earlier_claim(config: RunConfig, claim: dict[str, Any]) -> dict[str, Any]:
    """Return the claim of the run whose folder this is. Raises UserError where it is not the very same run."""
    path = config.run_path
    if training_hash(load_config(path / "config.yaml")) != training_hash(config):
        raise UserError(
            f"{path} holds a run of another config: choose another output_dir, or overwrite=true to redo it"
        )
    earlier = read_json(path / CLAIM) if (path / CLAIM).is_file() else claim
    if earlier["source_sha256"] != claim["source_sha256"]:
        files = " or ".join(config.data_files)
        raise UserError(f"{files} has changed since {path.name} was started: overwrite=true redoes it")
    if earlier["num_processes"] != claim["num_processes"] and not is_trained(path, config):
        raise UserError(
            f"{path.name} was started on {earlier['num_processes']} processes, this is {claim['num_processes']}: the "
            "effective batch would change on the way; use as many, or overwrite=true"
        )
    return earlier


@functools.cache  # once a process: there is no going back from a claimed folder
def _hold_training_lock(run_path: Path) -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    stack.enter_context(locked(training_lock_path(run_path), doing=f"trains {run_path.name}"))
    return stack


def source_sha256(config: RunConfig) -> str | None:
    """Return the sha256 of the local files that the run reads its rows from, None where there are none."""
    files = [resolve_path(name) for name in config.data_files]
    return "+".join(sha256_file(file) for file in files if file.is_file()) or None


def is_trained(run_path: Path, config: RunConfig) -> bool:
    """Whether training and export are done and what they wrote is still there."""
    train_file = run_path / "train.json"
    if not train_file.is_file():
        return False
    if read_json(train_file)["status"] != "ok":
        return False
    if config.adapter.init != "lora" and not (run_path / "lora").is_dir():
        return False
    if config.export.merged or config.adapter.trains_own_weights:
        if not (run_path / "merged" / "config.json").is_file():
            return False
    return config.adapter.trains_own_weights or (run_path / "adapter").is_dir()


def finish(run_path: Path, config: RunConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """Write train.json and the result; return the result."""
    ended = {"status": "ok", "error": None, "finished_at": now(), "prompt_hash": prompt_hash()}
    write_json_atomic(run_path / "train.json", ended | facts)
    return write_result(run_path, config)


@contextlib.contextmanager
def recorded(run_path: Path, config: RunConfig, *, main: bool) -> Iterator[None]:
    """Write how the run ended when it does not end well: failed, oom or cancelled, with the error's first line."""
    import torch

    try:
        yield
    except BaseException as error:
        if main and not isinstance(error, SystemExit):
            status = "failed"
            if isinstance(error, KeyboardInterrupt):
                status = "cancelled"
            elif isinstance(error, torch.OutOfMemoryError | MemoryError):
                status = "oom"
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            with contextlib.suppress(OSError, UserError):  # the first error is the one to report, on a full disk too
                write_json_atomic(run_path / "train.json", {"status": status, "error": text, "finished_at": now()})
                write_result(run_path, config)
        if isinstance(error, torch.OutOfMemoryError):
            raise UserError(
                "out of GPU memory: lower trainer.per_device_train_batch_size (and raise "
                "trainer.gradient_accumulation_steps), or set trainer.gradient_checkpointing=true"
            ) from error
        with disk_errors(run_path):
            raise
