"""A classifier's reference on disk: the frozen encoder's pooled features of the training rows, written once.

    FOLDER/nlu-<key's hash>.safetensors     pooled [rows, hidden] in float32, in the order of the rows

One file for each encoder and set of rows, which methods (in float32), heads and seeds share. The key says what the
features depend on: the encoder's weights or commit, not just its name (model.model_identity), how it is loaded, the
autocast it runs under, and all that it reads. It stands in the file, with the features' hash: a file that is damaged or
of something else is refused, never used.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ba_lora.config.schema_nlu import NLUConfig
from ba_lora.errors import UserError
from ba_lora.io import sha256_json
from ba_lora.models.predict import input_columns
from ba_lora.models.source import model_identity
from ba_lora.objective.reference_cache.files import key_differences, read_claimed, sha256_columns, write_claimed
from ba_lora.paths import resolve_path

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT = 2


@dataclass(frozen=True)
class CachedFeatures:
    """The features of `key` below `folder`, written or not. Any number of processes may read, and write, them."""

    folder: Path
    key: dict[str, Any]

    @property
    def path(self) -> Path:
        return self.folder / f"nlu-{sha256_json(self.key)[:16]}.safetensors"

    def write(self, pooled_NH: Tensor) -> None:
        """Write the features [rows, hidden], float32 on the CPU, whole or not at all."""
        write_claimed(self.path, {"pooled": pooled_NH}, {"key": self.key})

    def read(self, *, num_rows: int, hidden_size: int) -> Tensor:
        """Return the features [num_rows, hidden_size], float32 on the CPU.

        Raises UserError for a file that is missing, truncated, changed, of another key, shape or dtype.
        """
        fix = "delete it, it will be made again, or set reference.cache to another folder"
        tensors, claim = read_claimed(self.path, fix=fix)
        stored = claim.get("key")
        if not isinstance(stored, dict):
            raise UserError(f"{self.path} is no file of this reference cache: {fix}")
        if differences := key_differences(stored, self.key):
            raise UserError(f"{self.path} was made for something else ({differences}): {fix}")
        found = {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()}
        wanted = {"pooled": f"{torch.float32} {[num_rows, hidden_size]}"}
        if found != wanted:
            raise UserError(f"{self.path} holds {found} where {wanted} is needed: {fix}")
        return tensors["pooled"]


def cached_features(config: NLUConfig, rows: "Dataset", *, autocast: str = "no") -> CachedFeatures | None:
    """Return `reference.cache` for a run's encoder and training rows, None without a cache; every process calls it.

    `autocast` is the precision that training runs under: no, bf16 or fp16.
    """
    if not config.uses_reference_cache:
        return None
    is_main = PartialState().is_main_process  # only one reads the weights
    key = [features_key(config, rows, autocast=autocast) if is_main else None]
    broadcast_object_list(key)
    return CachedFeatures(resolve_path(config.reference.cache), key[0])


def features_key(config: NLUConfig, rows: "Dataset", *, autocast: str = "no") -> dict[str, Any]:
    """Return what the features depend on. Labels and the rows' numbers are no part of it.

    In float32 the pre-trained encoder is the same however a method takes it apart; a rounded or quantised residual of
    PiSSA with its factors put back, or their products under autocast, are not quite LoRA's base: such features are
    shared by equal adapters only.
    """
    exact = config.model.dtype == "float32" and config.model.quantization == "none" and autocast == "no"
    adapter = {name: value for name, value in dataclasses.asdict(config.adapter).items() if name != "factors_cache"}
    return {
        "format": FORMAT,
        **model_identity(config.model),
        "model.dtype": config.model.dtype,
        "model.quantization": config.model.quantization,
        "model.attention": config.model.attention,
        **({} if autocast == "no" else {"autocast": autocast}),
        "adapter": None if exact else adapter,
        "rows": len(rows),
        **{f"rows.{name}": sha256_columns(rows, [name]) for name in input_columns(rows)},
    }
