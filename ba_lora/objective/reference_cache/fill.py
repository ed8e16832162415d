"""Filling the reference cache: what of it is missing is computed with the pre-trained model, by whoever has time.

Every process, of this run and of any other on the same cache, takes the next file that nobody is at: it locks the
file's byte in `lock` (the system frees it when a process dies), computes, writes whole or not at all. At the end it
waits for the files that others hold. What is there already is never computed again, so a killed run goes on.
Under ZeRO-3, where a forward pass needs all processes, the run takes all locks and its processes share the files out.
"""

import contextlib
import fcntl
import hashlib
import inspect
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled

from ba_lora.config.schema_nlg import NLGConfig
from ba_lora.errors import UserError
from ba_lora.io import disk_errors, sha256_json, write_json_atomic
from ba_lora.models.load import load_model
from ba_lora.models.source import model_identity
from ba_lora.objective.reference_cache.store import FORMAT, KEY_FILE, CachedReference, Rows, open_cache
from ba_lora.objective.regularizers import IGNORE_INDEX, response_mask, top_log_probs
from ba_lora.paths import resolve_path
from ba_lora.prompts import prompt_hash

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

LOGITS_BYTES = 512 * 2**20  # of a batch's logits in float32
REPORT_S = 20


def cached_reference(
    config: NLGConfig, dataset: "Dataset", data_report: dict[str, Any], tokenizer: "PreTrainedTokenizerBase"
) -> CachedReference:
    """Return the full, verified cache of a run's reference, computing what is missing; every process calls it.

    Raises UserError for a cache of something else, damaged files, or too little disk space.
    """
    process = PartialState()
    path = resolve_path(config.reference.cache)
    rows = Rows.of(dataset)
    key = [cache_key(config, rows, data_report, tokenizer) if process.is_main_process else None]
    broadcast_object_list(key)
    if process.is_main_process:
        claim(open_cache(path, key[0], rows))
    process.wait_for_everyone()
    cache = open_cache(path, key[0], rows)
    fill(cache, lambda: load_model(config.model))
    process.wait_for_everyone()
    if process.is_main_process:
        cache.verify()
        print(cache.describe(), flush=True)
    process.wait_for_everyone()
    return cache


def cache_key(
    config: NLGConfig, rows: Rows, data_report: dict[str, Any], tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, Any]:
    """Return what the cache depends on, most of it under the name of its configuration key.

    `rows.sha256` covers all tokens and labels; the entries around it say why two caches differ.
    """
    local_data = data_report["file_sha256"] is not None
    return {
        "format": FORMAT,
        **model_identity(config.model),
        "model.dtype": config.model.dtype,
        "model.quantization": config.model.quantization,
        "tokenizer": sha256_json(sorted(tokenizer.get_vocab().items())),
        "prompt": data_report.get("prompt_hash", prompt_hash()),
        "data.name": config.data.name,
        "data.source": None if local_data else data_report["source"],
        "data.revision": data_report["revision"],
        "data.split": config.data.split,
        "data.num_rows": config.data.num_rows,
        "data.sample_seed": config.data.sample_seed,
        "data.max_length": config.data.max_length,
        "data.toy": vars(config.data.toy) if config.data.name == "toy" else None,
        "data.sha256": data_report["sha256"],
        "rows": len(rows),
        "rows.sha256": rows.sha256,
        "reference.top_k": config.reference.top_k,
        "reference.dtype": config.reference.dtype,
        "regularizers.temperature": config.regularizers.temperature,
    }


def claim(cache: CachedReference) -> None:
    """Say what is to be computed and how large it is, and make the folder. Raises UserError where it does not fit.

    One process of a run calls it.
    """
    if cache.top_k > cache.vocabulary:
        raise UserError(
            f"reference.top_k={cache.top_k} is above the vocabulary, {cache.vocabulary}: use {cache.vocabulary}"
        )
    missing = [file for file in cache.files() if not file.is_file()]
    if not missing:
        return
    needed = sum(map(cache.num_bytes, missing))
    existing = next(folder for folder in (cache.path, *cache.path.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"the reference cache needs {_megabytes(needed)} more and {existing} has {_megabytes(free)} free: lower "
            "reference.top_k, or set reference.cache to a folder on another disk"
        )
    print(
        f"reference cache: {cache.path}, {len(cache.rows):,} rows, {cache.rows.count(0, len(cache.rows)):,} "
        f"positions, top {cache.top_k} of {cache.vocabulary:,} tokens; {_megabytes(needed)} to be computed",
        flush=True,
    )
    with disk_errors(cache.path):
        cache.path.mkdir(parents=True, exist_ok=True)
        locks = FileLocks(cache.path)
        locks.acquire(cache.path / KEY_FILE, wait=True)
        with contextlib.closing(locks):
            open_cache(cache.path, cache.key, cache.rows)  # another run may have come first, with another key
            if not (cache.path / KEY_FILE).is_file():
                write_json_atomic(cache.path / KEY_FILE, {"key": cache.key, "boundaries": cache.boundaries})


def fill(cache: CachedReference, load: Callable[[], nn.Module]) -> None:
    """Compute the missing files of a claimed cache; `load` gives the pre-trained model where any is missing."""
    missing = [file for file in cache.files() if not file.is_file()]
    if not missing:
        return
    locks = FileLocks(cache.path)
    if is_deepspeed_zero3_enabled():
        _fill_together(cache, load, locks)
        return
    main = PartialState().is_main_process
    progress = _Progress(len(missing), silent=not main)
    loaded: list[nn.Module] = []

    def write(file: Path, *, wait: bool) -> bool:
        """Return whether `file` is there now; False: someone else is at it."""
        if not locks.acquire(file, wait=wait):
            return False
        with contextlib.closing(locks):
            if not file.is_file():
                if not loaded:
                    loaded.append(_on_device(load()))
                cache.write(file, _compute(cache, file, loaded[0]))
        progress.count()
        return True

    busy = [file for file in missing if not write(file, wait=False)]
    if busy and main:
        print(f"reference cache: waiting for {len(busy)} files that other processes compute", flush=True)
    for file in busy:
        write(file, wait=True)
    loaded.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _fill_together(cache: CachedReference, load: Callable[[], nn.Module], locks: "FileLocks") -> None:
    """`fill` under ZeRO-3: the processes take turns with the files, and each runs as many forward passes as any."""
    process = PartialState()
    if process.is_main_process:
        locks.acquire_all()
    missing = [[file for file in cache.files() if not file.is_file()] if process.is_main_process else None]
    broadcast_object_list(missing)
    mine = missing[0][process.process_index :: process.num_processes]
    passes = sum(len(_batches(cache, cache.rows_of(file))) for file in mine)
    most = max(gather_object([passes]))
    if most:
        engine = _zero3_engine(load())
        for file in mine:
            cache.write(file, _compute(cache, file, engine))
        for _ in range(most - passes):
            _logits(cache, engine, [0])
        engine.destroy()
    process.wait_for_everyone()
    if process.is_main_process:
        locks.close()


def _zero3_engine(model: nn.Module) -> nn.Module:
    """Return the split model inside an engine, whose hooks gather its weights for each forward pass."""
    import deepspeed

    dtype = next(model.parameters()).dtype
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    return deepspeed.initialize(model=model.eval(), config=settings)[0]


def _on_device(model: nn.Module) -> nn.Module:
    if not getattr(model, "is_quantized", False):
        model = model.to(PartialState().device)
    return model.eval()


# ---- the forward pass ----


def _compute(cache: CachedReference, file: Path, model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of one file. Its batches depend on the file only, so its bytes do too."""
    rows, found = cache.rows_of(file), {}
    for batch in _batches(cache, rows):
        for row, logits_NV in zip(batch, _logits(cache, model, batch), strict=True):
            if file == cache.sample_path:
                found[row] = {"logits": logits_NV.float().cpu()}
                continue
            top = top_log_probs(logits_NV, top_k=cache.top_k, temperature=cache.temperature)
            found[row] = {name: getattr(top, name).to(dtype).cpu() for name, dtype in cache.dtypes.items()}
    tensors = {name: torch.cat([found[row][name] for row in rows]) for name in found[rows[0]]}
    if file == cache.sample_path:
        return {"logits": tensors["logits"][: cache.sample_positions]}
    if not bool(tensors["entropy"].isfinite().all()):
        raise UserError(
            f"the pre-trained model gives NaN or infinite logits in {cache.key['model.dtype']}: use another"
        )
    return tensors


def _batches(cache: CachedReference, rows: list[int]) -> list[list[int]]:
    """Return the rows in batches of like length, whose logits stay within `LOGITS_BYTES`."""
    lengths = dict(zip(rows, map(len, cache.rows.dataset.select(rows)["input_ids"]), strict=True))
    batches: list[list[int]] = []
    for row in sorted(rows, key=lambda row: (lengths[row], row)):
        tokens = lengths[row] * (len(batches[-1]) + 1) if batches else 0
        if not batches or tokens * cache.vocabulary * 4 > LOGITS_BYTES:
            batches.append([])
        batches[-1].append(row)
    return batches


@torch.no_grad()
def _logits(cache: CachedReference, model: nn.Module, batch: list[int]) -> list[Tensor]:
    """Return the model's logits at each row's response positions, [n, V] a row."""
    rows = cache.rows.dataset.select(batch).to_list()
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in values], device=PartialState().device)

    mask_BT = response_mask(padded([row["labels"] for row in rows], IGNORE_INDEX))
    inputs = {
        "input_ids": padded([row["input_ids"] for row in rows], 0),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
    }
    if "logits_to_keep" in inspect.signature(getattr(model, "module", model).forward).parameters:
        kept = mask_BT.any(0).nonzero()[:, 0]
        inputs["logits_to_keep"], mask_BT = kept, mask_BT[:, kept]
    logits_BTV = model(**inputs, use_cache=False).logits
    if logits_BTV.shape[-1] != cache.vocabulary:
        raise UserError(
            f"the model gives {logits_BTV.shape[-1]} logits and its config.json says vocab_size {cache.vocabulary}: "
            "fix one of the two"
        )
    return [logits_TV[mask_T] for logits_TV, mask_T in zip(logits_BTV, mask_BT, strict=True)]


# ---- locks, progress ----


class FileLocks:
    """One lock a file of the cache: a byte of `lock`, held by this process until `close` or its death.

    Byte locks (fcntl) also hold between the machines of a shared file system.
    """

    def __init__(self, path: Path) -> None:
        self._path = path / "lock"
        self._handle: Any = None

    def acquire(self, file: Path, *, wait: bool) -> bool:
        """Lock `file`; without `wait` return False where another process holds it."""
        byte = int(hashlib.sha256(file.name.encode()).hexdigest()[:15], 16)
        return self._lock(byte, 1, wait=wait)

    def acquire_all(self) -> None:
        """Wait for every file's lock and take them all."""
        self._lock(0, 0, wait=True)

    def close(self) -> None:
        """Let go of everything."""
        self._handle.close()

    def _lock(self, start: int, length: int, *, wait: bool) -> bool:
        self._handle = open(self._path, "ab")
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), length, start)
        except (BlockingIOError, PermissionError):
            self._handle.close()
            return False
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be locked ({error.strerror}): set reference.cache to another disk"
            ) from error
        return True


class _Progress:
    def __init__(self, num_files: int, *, silent: bool) -> None:
        self._done, self._all, self._silent, self._last = 0, num_files, silent, time.monotonic()

    def count(self) -> None:
        """Count one file; print a line now and then."""
        self._done += 1
        if not self._silent and time.monotonic() - self._last > REPORT_S:
            print(f"reference cache: {self._done} of {self._all} files", flush=True)
            self._last = time.monotonic()


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
