"""A run's folder: whose it is, what state it is in, and how a run ends.

outputs/<run_id>/claim.json    what must stay as it was: number of processes, hashes of a local training file, of a
                               local base and of the first factors; with config.yaml it makes the folder a run's
                 config.yaml   the resolved configuration
                 initial/      the first factors of PiSSA and kin
                 checkpoints/  Trainer's, each with the list of its files
                 adapter/ lora/ merged/
                 log.jsonl     every logged step
                 evaluations.jsonl    those inside the training, as soon as they are known; stop: a request to end it
                 predictions/  a classifier's; dev_texts.jsonl: the texts of its dev rows where they stand in no file
                 train.json    written last: what training and export did (status, times, terms, environment)

A run without a checkpoint and without an export has nothing to lose: it starts over where something has changed since,
and one that fails before its training leaves nothing. What somebody else has put into the folder stays, and then claim
and config as well, by which the folder remains the run's.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ba_lora.config.layers import load_run
from ba_lora.config.methods import writes_lora
from ba_lora.config.schema import RunConfig, setting_differences, to_yaml, training_hash, training_settings
from ba_lora.errors import UserError
from ba_lora.io import check_readable, disk_errors, read_object, sha256_file, write_json_atomic, write_text_atomic
from ba_lora.locks import locked, training_lock_path
from ba_lora.models.source import changed_after, folder_hash, model_source
from ba_lora.paths import resolve_data
from ba_lora.prompts import prompt_hash
from ba_lora.runs.environment import now
from ba_lora.runs.results import check_result_place, result_fault, write_result
from ba_lora.training.checkpoints import MANIFEST, checkpoint_folders
from ba_lora.training.evaluations import EVALUATIONS, STOP

CLAIM = "claim.json"
EXPORTS = ("adapter", "lora", "merged")
DEV_TEXTS = "dev_texts.jsonl"
FIRST_FACTORS = ("initial", "residual")
# What a run and its evaluation write into the folder, but for the checkpoints: overwrite=true removes nothing else. Not
# judgements/: they are paid for, and each is kept under the very answer that it judges.
_OWN = (
    "train.json", "log.jsonl", EVALUATIONS, STOP, "evaluation.json", "initial", "residual", "epochs", "features",
    DEV_TEXTS, "predictions", "completions", "grades", "scores", "wandb", "ranks", *EXPORTS,
    *(f"{name}.rejected" for name in EXPORTS), *(f".{name}.{end}" for name in EXPORTS for end in ("saving", "old")),
)  # fmt: skip


@contextlib.contextmanager
def claimed_folder(config: RunConfig, *, num_processes: int = 1) -> Iterator[None]:
    """Make the run's folder, or take up one of the very same training configuration, and hold its training lock.

    Raises UserError when another process holds the lock (see locks.py), when the folder belongs to another
    configuration, another number of processes or another version of a local training file, or holds something else,
    or when the result would replace that of another configuration: nothing has changed then. `overwrite=true` removes
    the run there, and its result, first, once its files of rows are found; not after a restart. Enter it on one process
    only.
    """
    path = config.run_path
    with disk_errors(path):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file: choose another output_dir")
    check_result_place(config)
    with locked(training_lock_path(path), doing=f"trains {path.name}", made=path):
        _claim(config, num_processes)
        yield


def _claim(config: RunConfig, num_processes: int) -> None:
    path, overwrite = config.run_path, config.overwrite and not is_restart()
    claim = {"num_processes": num_processes, "source_sha256": source_sha256(config)}
    if overwrite:  # told before anything is removed
        for file in _local_files(config):
            check_readable(file)
    with disk_errors(path):
        if _is_empty(path):
            if (read_object(config.result_path) or {}).get("status") == "ok" and not overwrite:
                print(f"{config.result_path} is of this config, made in another folder: this run's result replaces it")
        elif not is_run_folder(path):
            raise UserError(
                f"{path} is not empty and no run's folder, or its {CLAIM} or config.yaml is damaged: nothing in it is "
                "touched; choose another output_dir"
            )
        elif overwrite:
            remove_run(path)
        elif fault := _difference(config, claim):
            if has_begun(path):
                raise UserError(fault)
            remove_run(path)
        else:
            claim = read_object(path / CLAIM)
            if fault := _export_fault_of_trained(path, config):
                how = "it is exported again, from its last checkpoint"
                if not checkpoint_folders(path / "checkpoints"):
                    how = "no checkpoint is left to export it from: it is trained again from the start"
                print(f"{path.name}: {fault}: {how}")
        if overwrite:
            config.result_path.unlink(missing_ok=True)
        write_json_atomic(path / CLAIM, claim)
        write_text_atomic(path / "config.yaml", to_yaml(config))


def is_run_folder(path: Path) -> bool:
    """Return whether a folder is a run's: by its claim and a configuration of a run beside it."""
    claim = read_object(path / CLAIM)
    if claim is None or type(claim.get("num_processes")) is not int or "source_sha256" not in claim:
        return False
    try:
        return bool(load_run(path).method)
    except UserError:
        return False


def remove_run(path: Path) -> None:
    """Remove what a run has written into its folder; last, where nothing else is in it, claim, config and folder."""
    own = [path / name for name in _OWN]
    own += [path / "checkpoints" / folder.name for folder in checkpoint_folders(path / "checkpoints")]
    own += path.glob(f".*.{'[0-9a-f]' * 8}.tmp")
    own += path.glob("events.out.tfevents.*")
    for file in own:
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink(missing_ok=True)
    checkpoints, kept = path / "checkpoints", {path / CLAIM, path / "config.yaml"}
    if checkpoints.is_dir() and not checkpoints.is_symlink() and not any(checkpoints.iterdir()):
        checkpoints.rmdir()
    if path.is_dir() and kept.issuperset(path.iterdir()):
        for file in kept:
            file.unlink(missing_ok=True)
        if not path.is_symlink():
            path.rmdir()


def _is_empty(path: Path) -> bool:
    """Return whether nothing is in the folder, or only what a process left that was killed while it made it."""
    if not path.is_dir():
        return True
    names = [file.name for file in path.iterdir() if not file.name.endswith(".tmp")]
    return not names or (names == [CLAIM] and read_object(path / CLAIM) is not None)


def _difference(config: RunConfig, claim: dict[str, Any]) -> str | None:
    """Return why the run whose folder this is is not the very same run; None where it is."""
    path = config.run_path
    earlier_config = load_run(path)
    if training_hash(earlier_config) != training_hash(config):
        differing = setting_differences(training_settings(earlier_config), training_settings(config))
        return (
            f"{path} holds a run of another config ({'; '.join(differing[:3])}{'; …' if len(differing) > 3 else ''}): "
            "choose another output_dir, or overwrite=true to redo it"
        )
    earlier = read_object(path / CLAIM)
    if source_changed(earlier["source_sha256"], claim["source_sha256"]):
        files = " or ".join(config.data_files)
        return f"{files} has changed since {path.name} was started: overwrite=true redoes it"
    if is_trained(path, config):
        if base_changed(config, earlier.get("base")):
            return f"the base {config.model.name} has changed since {path.name} was trained: overwrite=true redoes it"
        return None
    if earlier["num_processes"] != claim["num_processes"]:
        return (
            f"{path.name} was started on {earlier['num_processes']} processes, this is {claim['num_processes']}: the "
            "effective batch would change on the way; use as many, or overwrite=true"
        )
    for name, sha256 in _inputs(config).items():
        if earlier.get(name, sha256) != sha256:  # claims of before these were kept have none
            what = f"the base {config.model.name}" if name == "base" else f"{path / name}"
            return f"{what} has changed since {path.name} was started: bring it back, or overwrite=true trains again"
    return None


def has_begun(path: Path) -> bool:
    """Return whether a run has something to lose: a finished checkpoint, or an export."""
    finished = [folder / MANIFEST for folder in checkpoint_folders(path / "checkpoints")]
    return any(manifest.is_file() for manifest in finished) or any((path / name).is_dir() for name in EXPORTS)


def keep_base(config: RunConfig, *, commit: str | None) -> None:
    """Write what the model is built from into the claim: the hash of a local base, the commit of one on the hub.

    Where first factors may be of another base, and nothing was trained from them, they are removed. Raises UserError
    where a run that has begun finds another commit. Call it on one process only, before the model is built.
    """
    path = config.run_path
    claim = read_object(path / CLAIM)
    moved = claim.get("commit", commit) != commit
    if moved and has_begun(path):
        raise UserError(
            f"{config.model.name} was {claim['commit']} when {path.name} was started and is {commit} now: set "
            "model.revision to the first, or overwrite=true trains again"
        )
    with disk_errors(path):
        if (moved or "base" not in claim) and not has_begun(path):
            for name in FIRST_FACTORS:
                claim.pop(name, None)
                shutil.rmtree(path / name, ignore_errors=True)
        if "base" not in claim:
            claim["base"] = folder_hash(model_source(config.model))
        write_json_atomic(path / CLAIM, claim | {"commit": commit})


def keep_factors(config: RunConfig) -> None:
    """Write the hashes of what PiSSA and CorDA start from into the claim. On one process only, once the model is built
    and before the first step."""
    path = config.run_path
    found = {name: folder_hash(path / name) for name in FIRST_FACTORS}
    with disk_errors(path):
        write_json_atomic(path / CLAIM, found | read_object(path / CLAIM))


def base_changed(config: RunConfig, sha256: str | None) -> bool:
    """Return whether a local base is another than the one of this hash, which the run in the folder was built from and
    has ended with since (None: not known). It is hashed only where a file of it is newer than the run's end."""
    ended, source = config.run_path / "train.json", model_source(config.model)
    return sha256 is not None and changed_after(source, ended.stat().st_mtime) and folder_hash(source) != sha256


def untuned_base_changed(config: RunConfig) -> bool:
    """Return whether a local base is another than when the pre-trained model got a run's folder."""
    return base_changed(config, (read_object(config.run_path / "train.json") or {}).get("base_sha256"))


def _inputs(config: RunConfig) -> dict[str, str | None]:
    """Return the hashes of a local base and of what PiSSA and CorDA start from, None for what is not there."""
    folders = {"base": model_source(config.model)} | {name: config.run_path / name for name in FIRST_FACTORS}
    return {name: folder_hash(folder) for name, folder in folders.items()}


def source_sha256(config: RunConfig) -> str | None:
    """Return the sha256 of the local files that the run reads its rows from, None where there are none."""
    return "+".join(sha256_file(file) for file in _local_files(config) if file.is_file()) or None


def source_changed(before: str | None, now: str | None) -> bool:
    """Return whether a run's files of rows are others, by their `source_sha256`. Files that are gone are no change:
    nothing tells what a trained run has lost, and one that is to be trained says which is missing."""
    hashes = [sha256.split("+") if sha256 else [] for sha256 in (before, now)]
    return hashes[0] != hashes[1] and len(hashes[1]) >= len(hashes[0])


def _local_files(config: RunConfig) -> list[Path]:
    """Return the files that a run's rows are read from, there or not; what is on the hub is left out."""
    return [path for name in config.data_files if (path := Path(resolve_data(name))).is_absolute()]


def is_restart() -> bool:
    """Return whether torchrun has started this process again (MAX_RESTARTS): what is in the run's folder is its own."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def is_trained(run_path: Path, config: RunConfig) -> bool:
    """Whether training and export are done and what they wrote is still there, whole."""
    trained = read_object(run_path / "train.json") or {}
    return trained.get("status") == "ok" and _export_fault(run_path, config, trained) is None


def is_finished(config: RunConfig) -> bool:
    """Whether the run's folder holds this very run, trained, and its result is written: nothing is left to train."""
    path = config.run_path
    if not is_run_folder(path) or not is_trained(path, config) or result_fault(config) is not None:
        return False
    claim = {"num_processes": None, "source_sha256": source_sha256(config)}
    return _difference(config, claim) is None


def _export_fault_of_trained(run_path: Path, config: RunConfig) -> str | None:
    trained = read_object(run_path / "train.json")
    if trained is None:
        return "train.json cannot be read" if (run_path / "train.json").is_file() else None
    return _export_fault(run_path, config, trained) if trained.get("status") == "ok" else None


def _export_fault(run_path: Path, config: RunConfig, trained: dict[str, Any]) -> str | None:
    """Return which exported file is gone or has another size than was written, None where all are whole."""
    wanted = set()
    if not config.adapter.trains_own_weights:
        wanted |= {"adapter", "lora"} if writes_lora(config.adapter) else {"adapter"}
    if config.export.merged or config.adapter.trains_own_weights:
        wanted.add("merged")
    wanted |= {f"ranks/{rank}" for rank in config.export.ranks}
    for name in sorted(wanted):
        if not any((run_path / name).glob("*.safetensors")):
            return f"{name}/ has no weights"
    recorded = trained.get("files")
    for name, size in recorded.items() if isinstance(recorded, dict) else ():
        file = run_path / name
        if Path(name).parent.as_posix() not in wanted:
            continue  # a merged model that is no longer asked for may go
        if not file.is_file():
            return f"{name} is gone"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def finish_run(run_path: Path, config: RunConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """Write train.json and the result; return the result."""
    folders = (*EXPORTS, *(f"ranks/{rank}" for rank in config.export.ranks))
    exported = [file for name in folders for file in sorted((run_path / name).glob("*")) if file.name != "README.md"]
    sizes = {str(file.relative_to(run_path)): file.stat().st_size for file in exported if file.is_file()}
    asked = facts.get("data", {}).get("prompt_hash", prompt_hash())
    ended = {"status": "ok", "error": None, "finished_at": now(), "prompt_hash": asked}
    write_json_atomic(run_path / "train.json", ended | facts | {"files": sizes})
    return write_result(run_path, config)


def complete_result(config: RunConfig) -> None:
    """Write the result and the model cards of a trained run that was killed before it had. On one process only."""
    from ba_lora.runs.card import write_model_card

    if fault := result_fault(config):
        print(f"{fault}: written from {config.run_path}")
        write_model_card(config.run_path, config, write_result(config.run_path, config))


@contextlib.contextmanager
def recorded(run_path: Path, config: RunConfig, *, main: bool) -> Iterator[None]:
    """Write how the run ended when it does not end well: failed, oom or cancelled, with the error's first line.

    A run that ends before its trainer is made (which makes checkpoints/), and has no export from before, leaves neither
    a folder nor a result.
    """
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
            _record_end(run_path, config, {"status": status, "error": text, "finished_at": now()})
        if isinstance(error, torch.OutOfMemoryError):
            raise UserError(
                "out of GPU memory: lower trainer.per_device_train_batch_size (and raise "
                "trainer.gradient_accumulation_steps), or set trainer.gradient_checkpointing=true"
            ) from error
        with disk_errors(run_path):
            raise


def _record_end(run_path: Path, config: RunConfig, ended: dict[str, Any]) -> None:
    """Write the end down, as far as the disk takes it: the error that came first is the one to report.

    The result of a run that has succeeded stays, whichever folder it was made in.
    """
    with contextlib.suppress(OSError, UserError):
        if not (run_path / "checkpoints").is_dir() and not has_begun(run_path):
            remove_run(run_path)
            return
        write_json_atomic(run_path / "train.json", ended)
    with contextlib.suppress(OSError, UserError):
        if (read_object(config.result_path) or {}).get("status") != "ok":
            write_result(run_path, config, ended)
