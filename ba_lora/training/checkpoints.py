"""Checkpoints that can be trusted: each lists its files, and a damaged one is told from a whole one."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from ba_lora.errors import UserError
from ba_lora.io import read_json, read_object, sha256_file, write_json_atomic

logger = logging.getLogger(__name__)

MANIFEST = "files.json"  # written last into a checkpoint: it is whole exactly when this fits


def write_checkpoint_manifest(folder: Path) -> None:
    """Record size and sha256 of every file of a finished checkpoint (files above 1 GiB: size only)."""
    assert folder.is_dir(), f"{folder} was removed while it was written"
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    write_json_atomic(folder / MANIFEST, _describe(folder))


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the folders checkpoint-<step> below `folder`, the newest first; a user's own copies have other names."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name.split("-", 1)[1].isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def find_checkpoint(folder: Path, *, before: int | None = None) -> Path | None:
    """Return the newest whole checkpoint below `folder` (of a step below `before`), or None.

    A damaged newer one is named in a warning.
    """
    for path in checkpoint_folders(folder):
        if before is not None and step_of(path) >= before:
            continue
        fault = checkpoint_fault(path)
        if fault is None:
            return path
        logger.warning(f"{path} is damaged ({fault}): going back to the checkpoint before it")
    return None


def clear_checkpoints(folder: Path, *, newest: Path | None) -> None:
    """Remove the checkpoints after `newest` (None: all), and lay copies under another step's name aside: Trainer's
    rotation would take either for the newest, and delete what is being written."""
    for path in checkpoint_folders(folder):
        if _saved_step(path) not in (None, step_of(path)):
            aside = path.with_name(f"copy-of-{path.name}")
            logger.warning(f"{path} is a copy of another step's checkpoint: it is kept as {aside.name}")
            if aside.exists():
                shutil.rmtree(aside)
            path.rename(aside)
        elif newest is None or step_of(path) > step_of(newest):
            shutil.rmtree(path)


def rotate_checkpoints(folder: Path, *, limit: int, best: str | None) -> None:
    """Remove the oldest checkpoints above `limit`; the newest and the best one stay.

    Trainer's own rotation goes by the files' times and counts a user's copies, checkpoint-final, among them.
    """
    found = checkpoint_folders(folder)
    kept = {path for path in found if path == found[0] or path.name == Path(best or "").name}
    for path in found:
        if len(kept) < limit:
            kept.add(path)
        if path not in kept:
            shutil.rmtree(path)


def checkpoint_fault(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None when every file is as it was written."""
    if not (folder / MANIFEST).is_file():
        return "it was not finished"
    recorded = read_object(folder / MANIFEST)
    if recorded is None:
        return f"{MANIFEST} cannot be read"
    if not recorded:
        return f"{MANIFEST} lists no files"
    for name, entry in recorded.items():
        if not (isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys()):
            return f"{MANIFEST} does not say what {name} is"
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
        if entry["sha256"] is not None and sha256_file(file) != entry["sha256"]:
            return f"{name} has other contents than were written"
    if (saved := _saved_step(folder)) not in (None, step_of(folder)):
        return f"it is of step {saved}"
    return None


def _saved_step(checkpoint: Path) -> int | None:
    """Return the step that Trainer wrote into the checkpoint; None where it cannot be read."""
    return _trainer_state(checkpoint).get("global_step")


def stopped_early(checkpoint: Path) -> bool:
    """Return whether early stopping had ended the training at this checkpoint."""
    found = _trainer_state(checkpoint).get("stateful_callbacks", {}).get("EarlyStoppingCallback", [])
    return any(
        state["attributes"]["early_stopping_patience_counter"] >= state["args"]["early_stopping_patience"]
        for state in (found if isinstance(found, list) else [found])
    )


def _trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Return what Trainer wrote, whose log may hold NaN and infinite values; {} where it cannot be read."""
    try:
        state = read_json(checkpoint / "trainer_state.json")
    except UserError:
        return {}
    return state if isinstance(state, dict) else {}


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[-1])


def _describe(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
    return {
        str(file.relative_to(folder)): {
            "bytes": file.stat().st_size,
            "sha256": sha256_file(file) if file.stat().st_size <= 2**30 else None,
        }
        for file in files
    }
