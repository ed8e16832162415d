"""Checkpoints that can be trusted: each lists its files, and a damaged one is told from a whole one."""

import json
import os
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ba_lora.io import sha256_file, write_json_atomic

logger = logging.get_logger(__name__)

MANIFEST = "files.json"  # written last into a checkpoint: it is whole exactly when this fits


def write_checkpoint_manifest(folder: Path) -> None:
    """Record size and sha256 of every file of a finished checkpoint (files above 1 GiB: size alone)."""
    assert folder.is_dir(), f"{folder} was removed while it was written"
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    write_json_atomic(folder / MANIFEST, _describe(folder))


def find_checkpoint(folder: Path, *, before: int | None = None) -> Path | None:
    """Return the newest whole checkpoint below `folder` (of a step below `before`), or None.

    A damaged newer one is named in a warning.
    """
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name.split("-")[-1].isdigit()]
    for path in sorted(found, key=step_of, reverse=True):
        if before is not None and step_of(path) >= before:
            continue
        fault = checkpoint_fault(path)
        if fault is None:
            return path
        logger.warning(f"{path} is damaged ({fault}): going back to the checkpoint before it")
    return None


def checkpoint_fault(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None when every file is as it was written."""
    try:
        recorded = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return "it was not finished"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    if not recorded:
        return f"{MANIFEST} lists no files"
    for name, entry in recorded.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
        if entry["sha256"] is not None and sha256_file(file) != entry["sha256"]:
            return f"{name} has other contents than were written"
    return None


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
