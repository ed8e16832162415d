"""The reference on disk: the pre-trained model's top-K log-probabilities at every response position, written once.

    PATH/key.json              what the contents depend on, and which rows stand in which shard
         rows-A-B.safetensors  of the positions of rows A … B−1 in their order: tokens [P, K], log_probs [P, K] at the
                               temperature of the key, log_tail [P], entropy [P] (see regularizers.TopLogProbs)
         sample.safetensors    the logits of a few rows over the whole vocabulary, to measure what K leaves out
         lock                  locked byte by byte while a shard is written (fill.py)

The cache is of the pre-trained model itself, never of a method's residual: so every method, seed and rank of a table
shares it. It is bound to one temperature, since the tail's mass at another T does not follow from it. Every file says
which cache it belongs to and the hash of its own data; both are checked before training starts.
"""

import bisect
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ba_lora.config.schema import BALoRAConfig
from ba_lora.errors import UserError
from ba_lora.io import read_json
from ba_lora.objective import regularizers
from ba_lora.objective.reference_cache.files import key_differences, read_claimed, sha256_columns, write_claimed
from ba_lora.objective.regularizers import IGNORE_INDEX, TopLogProbs, response_mask
from ba_lora.objective.terms.consistency import CachedConsistency

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT = 1
KEY_FILE = "key.json"
SHARD_BYTES = 16 * 2**20  # of a full shard; what a killed run loses at most
SAMPLE_ROWS = 4
NOT_THESE_ROWS = "the training rows are not those of the reference cache: give it that data set as it is"
SAMPLE_BYTES = 64 * 2**20  # of the sample's logits at most


@dataclass(frozen=True)
class Rows:
    """The response positions of a tokenized data set: `offsets` [rows + 1], how many come before each row."""

    dataset: "Dataset"
    offsets: np.ndarray
    sha256: str

    @classmethod
    def of(cls, dataset: "Dataset") -> "Rows":
        """Count the positions of M and hash all tokens and labels. `dataset` has input_ids, labels and `row`."""
        if "row" not in dataset.column_names or dataset["row"][:] != list(range(len(dataset))):
            raise UserError("the reference cache needs a data set whose column `row` numbers its rows from 0")
        labels = dataset.select_columns(["labels"]).with_format("arrow")[:]["labels"].combine_chunks()
        lengths, labelled = labels.value_lengths().to_numpy(), labels.flatten().to_numpy() != IGNORE_INDEX
        starts = np.concatenate([[0], np.cumsum(lengths)])[:-1]
        labelled[starts] = False  # no position predicts a row's first token
        counts = np.add.reduceat(labelled, starts, dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        return cls(dataset, offsets, sha256_columns(dataset, ["input_ids", "labels"]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def count(self, first: int, last: int) -> int:
        """Return the number of positions of the rows first … last − 1."""
        return int(self.offsets[last] - self.offsets[first])


class CachedReference:
    """The reference distributions of the rows, read from memory-mapped files; any number of processes may.

    To a TokenObjective it is what reference.Reference is.

    `open_cache` makes it, fill.py fills it.
    """

    consistency = CachedConsistency
    columns = ("row",)
    shares_head = False
    frozen_model = None

    def __init__(self, path: Path, key: dict[str, Any], rows: Rows, boundaries: list[int]) -> None:
        self.path = path
        self.key = key
        self.rows = rows
        self.boundaries = boundaries  # shard i holds the rows boundaries[i] … boundaries[i + 1] − 1
        self.top_k: int = key["reference.top_k"]
        self.temperature: float = key["regularizers.temperature"]
        self.vocabulary: int = key["vocabulary"]
        self._digest = hashlib.sha256(json.dumps([key, boundaries]).encode()).hexdigest()
        self.report: dict[str, Any] = {name: key[f"reference.{name}"] for name in ("top_k", "dtype")}
        self._open: dict[int, Any] = {}

    def check(self, regularizers: BALoRAConfig) -> None:
        """Raise UserError where the cache is of another temperature."""
        if regularizers.temperature != self.temperature:
            raise UserError(
                f"{self.path} was made at temperature {self.temperature}, regularizers.temperature is "
                f"{regularizers.temperature}: set reference.cache to another folder"
            )

    def to(self, device: torch.device) -> None:
        """Nothing to move: what is looked up goes to the device."""

    def at(
        self, model: nn.Module, rows: Tensor | None, *, states: Callable[[nn.Module], Any]
    ) -> tuple[TopLogProbs, None]:
        """Return the distributions at the positions of the batch's `rows`; there is no pass, and no head."""
        if rows is None:
            raise UserError(NOT_THESE_ROWS)
        return self.lookup(rows.tolist(), device=rows.device), None

    # ---- reading ----

    def lookup(self, rows: Iterable[int], *, device: torch.device | str = "cpu") -> TopLogProbs:
        """Return the distributions at the positions of the rows, one row after the other, in float32 and summing to 1.

        That is the order of `tensor[mask]` for a batch of these rows, padded or packed.
        """
        parts = []
        for row in rows:
            shard = bisect.bisect_right(self.boundaries, row) - 1
            start = self.rows.count(self.boundaries[shard], row)
            where = slice(start, start + self.rows.count(row, row + 1))
            file = self._file(shard)
            parts.append([file.get_slice(name)[where] for name in ("tokens", "log_probs", "log_tail", "entropy")])
        tokens, log_probs, log_tail, entropy = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        log_probs, log_tail = log_probs.to(device).float(), log_tail.to(device)
        rounding = torch.cat([log_probs, log_tail[:, None]], dim=1).logsumexp(1)  # of the storage dtype, taken out
        return TopLogProbs(
            tokens.long().to(device), log_probs - rounding[:, None], log_tail - rounding, entropy.to(device)
        )

    def _file(self, shard: int) -> Any:
        if shard not in self._open:
            self._open[shard] = safe_open(self.shard_path(shard), framework="pt")
        return self._open[shard]

    # ---- files ----

    @property
    def num_shards(self) -> int:
        return len(self.boundaries) - 1

    @property
    def sample_path(self) -> Path:
        return self.path / "sample.safetensors"

    def shard_path(self, shard: int) -> Path:
        """Return the file of a shard."""
        first, last = self.boundaries[shard], self.boundaries[shard + 1]
        return self.path / f"rows-{first:08}-{last:08}.safetensors"

    def files(self) -> list[Path]:
        """Return every file of the full cache: the sample, then the shards."""
        return [self.sample_path, *(self.shard_path(shard) for shard in range(self.num_shards))]

    def rows_of(self, file: Path) -> list[int]:
        """Return the rows that one of `files()` holds."""
        if file == self.sample_path:
            return self.sample_rows
        first, last = map(int, file.stem.split("-")[1:])
        return list(range(first, last))

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """What is stored how."""
        return {
            "tokens": torch.uint16 if self.vocabulary <= 2**16 else torch.int32,
            "log_probs": getattr(torch, self.key["reference.dtype"]),
            "log_tail": torch.float32,
            "entropy": torch.float32,
        }

    def num_bytes(self, file: Path) -> int:
        """Return the size of a file's tensors, without reading it."""
        if file == self.sample_path:
            return self.vocabulary * 4 * self.sample_positions
        rows = self.rows_of(file)
        return bytes_per_position(self.key) * self.rows.count(rows[0], rows[-1] + 1)

    def write(self, file: Path, tensors: dict[str, Tensor]) -> None:
        """Write one of `files()`, whole or not at all."""
        for stale in self.path.glob(f".{file.name}.*.tmp"):  # of a killed run
            stale.unlink(missing_ok=True)
        write_claimed(file, tensors, {"cache": self._digest, "file": file.name})

    def verify(self) -> None:
        """Read every file and compare it with its hash; note the tail's mass over all positions in `report`.

        Raises UserError for a file that is missing, truncated, changed, or of another cache.
        """
        total, largest = 0.0, 0.0
        for file in self.files():
            tensors = self._verified(file)
            if file != self.sample_path:
                mass = tensors["log_tail"].double().exp()
                total, largest = total + mass.sum().item(), max(largest, mass.max().item() if len(mass) else 0.0)
        self.report["tail_mass"] = {"mean": total / self.rows.count(0, len(self.rows)), "max": largest}

    def _verified(self, file: Path) -> dict[str, Tensor]:
        fix = "delete it and run again, only its rows are computed again"
        tensors, claim = read_claimed(file, fix=fix)
        if claim.get("cache") != self._digest or claim.get("file") != file.name:
            raise UserError(f"{file} is no file of this reference cache: {fix}")
        return tensors

    # ---- what K leaves out ----

    @property
    def sample_rows(self) -> list[int]:
        """Rows spread evenly over the data set."""
        return sorted({int(row) for row in np.linspace(0, len(self.rows) - 1, SAMPLE_ROWS)})

    @property
    def sample_positions(self) -> int:
        """How many of their positions, from the first on, the sample holds."""
        return min(sum(self.rows.count(row, row + 1) for row in self.sample_rows), sample_limit(self.vocabulary))

    def error(self, tuned_logits_NV: Tensor) -> dict[str, float]:
        """Return {"exact", "cached"}: the consistency term of these logits at the sample's positions (T² KL, mean)."""
        with safe_open(self.sample_path, framework="pt") as handle:
            exact_logits_NV = handle.get_tensor("logits")
        every_N = torch.ones(len(exact_logits_NV), dtype=torch.bool)
        top = self.lookup(self.sample_rows)[: len(every_N)]
        settings = {"mask": every_N, "temperature": self.temperature}
        exact = regularizers.consistency(tuned_logits_NV, exact_logits_NV, **settings)
        cached = regularizers.cached_consistency(tuned_logits_NV, top, **settings)
        return {"exact": exact.item(), "cached": cached.item()}

    def measure(self, model: nn.Module, *, name: str) -> None:
        """Note `error` of a model as it is now in `report`; under ZeRO-3 every process calls it."""
        from ba_lora.methods.build import probe_logits

        logits = []
        for row in self.rows.dataset.select(self.sample_rows):  # one by one: [tokens, V] is large
            ids_1T = torch.tensor([row["input_ids"]])
            logits_TV = probe_logits(model, {"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T)})
            logits.append(logits_TV[response_mask(torch.tensor([row["labels"]]))[0]])
        self.report[name] = self.error(torch.cat(logits)[: self.sample_positions])

    def describe(self) -> str:
        """Return the line for the start of a run. A model as it was pre-trained shows no error, whatever K is: hence
        also that of a model that knows nothing."""
        self.report["sample_positions"] = self.sample_positions
        self.report["uniform"] = self.error(torch.zeros(self.sample_positions, self.vocabulary))
        exact, cached = self.report["uniform"]["exact"], self.report["uniform"]["cached"]
        mass = self.report["tail_mass"]
        return (
            f"reference cache: top {self.top_k} of {self.vocabulary:,} tokens leave out {mass['mean']:.2g} of the mass "
            f"(at most {mass['max']:.2g}); on {self.sample_positions} positions the consistency term of a uniform "
            f"model is {cached:.5g} with the cache, {exact:.5g} exactly"
        )


def open_cache(path: Path, key: dict[str, Any], rows: Rows) -> CachedReference:
    """Return the cache of `key` at `path`, full or not. Raises UserError where the folder holds something else.

    Nothing is written: `fill.claim` does that.
    """
    key = json.loads(json.dumps(key))  # as it will be read again
    saved = path / KEY_FILE
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file: set reference.cache to a folder")
    if not saved.is_file():
        if path.is_dir() and any(file.name != "lock" and not file.name.endswith(".tmp") for file in path.iterdir()):
            raise UserError(f"{path} is not empty and no reference cache: set reference.cache to another folder")
        return CachedReference(path, key, rows, _boundaries(rows, bytes_per_position(key)))
    stored = read_json(saved)
    if not isinstance(stored, dict) or not isinstance(stored.get("key"), dict):
        raise UserError(f"{saved} is no key of a reference cache: set reference.cache to another folder")
    differences = key_differences(stored["key"], key)
    if differences:
        raise UserError(
            f"{path} holds a reference cache made for something else ({differences}): set reference.cache to another "
            "folder, or delete this one"
        )
    return CachedReference(path, key, rows, stored["boundaries"])


def bytes_per_position(key: dict[str, Any]) -> int:
    """Return how many bytes the cache of `key` stores for a position."""
    token = 2 if key["vocabulary"] <= 2**16 else 4
    return key["reference.top_k"] * (token + (2 if key["reference.dtype"] == "float16" else 4)) + 8


def sample_limit(vocabulary: int) -> int:
    """Return how many positions of whole logits fit the sample."""
    return max(1, SAMPLE_BYTES // (4 * vocabulary))


def _boundaries(rows: Rows, a_position: int) -> list[int]:
    """Return the first row of each shard and the number of rows: shards of `SHARD_BYTES`, of one row at least."""
    boundaries, per_shard = [0], max(1, SHARD_BYTES // a_position)
    while boundaries[-1] < len(rows):
        full = int(np.searchsorted(rows.offsets, rows.offsets[boundaries[-1]] + per_shard, side="right")) - 1
        boundaries.append(min(max(full, boundaries[-1] + 1), len(rows)))
    return boundaries
