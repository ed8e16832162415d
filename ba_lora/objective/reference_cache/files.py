"""What the reference caches on disk share: safetensors files that say whose they are and the hash of their contents.

A file's claim, one JSON object in its metadata, holds what its owner wants to find again, and `sha256`, the hash of the
tensors. So a truncated, changed or foreign file is told from a good one before anything is computed from it.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ba_lora.errors import UserError
from ba_lora.io import file_atomic

if TYPE_CHECKING:
    from datasets import Dataset

_METADATA = "ba_lora"  # only one entry: safetensors writes several in no fixed order


def write_claimed(path: Path, tensors: dict[str, Tensor], claim: dict[str, Any]) -> None:
    """Write the tensors with their claim, whole or not at all; who may read the folder may read the file."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    claim = claim | {"sha256": _sha256(tensors)}
    with file_atomic(path) as temporary:
        save_file(tensors, temporary, metadata={_METADATA: json.dumps(claim)})
        temporary.chmod(path.parent.stat().st_mode & 0o666)  # safetensors leaves it to its writer only


def read_claimed(path: Path, *, fix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the claim of a file of `write_claimed`.

    Raises UserError, which ends in `fix`, for a file that is missing, truncated, changed, or without a claim.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            claim = json.loads((handle.metadata() or {}).get(_METADATA, "null"))
            tensors = {name: handle.get_tensor(name) for name in sorted(handle.keys())}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): {fix}") from error
    if not isinstance(claim, dict):
        raise UserError(f"{path} is no file of this reference cache: {fix}")
    if claim.get("sha256") != _sha256(tensors):
        raise UserError(f"{path} has other contents than were written: {fix}")
    return tensors, claim


def key_differences(stored: dict[str, Any], key: dict[str, Any]) -> str:
    """Return the entries of two keys that differ, in the order of `key`; an empty text where none does."""
    names = sorted({*stored, *key}, key=lambda name: list(key).index(name) if name in key else -1)
    return "; ".join(
        f"{name} is {_short(stored.get(name))} there, {_short(key.get(name))} here"
        for name in names
        if stored.get(name) != key.get(name)
    )


def sha256_columns(dataset: "Dataset", columns: list[str]) -> str:
    """Return the hash of columns of integer lists: their lengths and values, whatever the integers' width."""
    table = dataset.select_columns(columns).with_format("arrow")[:]
    digest = hashlib.sha256()
    for name in table.column_names:
        lists = table[name].combine_chunks()
        for numbers in (lists.value_lengths(), lists.flatten()):
            digest.update(numbers.to_numpy().astype(np.int64).tobytes())
    return digest.hexdigest()


def _sha256(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) > 60 or (len(text) == 64 and text.isalnum()) else text
