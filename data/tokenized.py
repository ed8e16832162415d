"""Tokenized rows on disk: the runs of a table share them, and of a run's processes one makes them.

They lie in the datasets library's own cache (HF_DATASETS_CACHE, below `ba_lora`), one Arrow file (or one for each
process that made them) for each digest of what they depend on: texts, tokenizer, template, length, the code of the
encoding, the versions of the libraries below it. A token takes 12 bytes.
"""

import contextlib
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ba_lora.chat
from ba_lora.errors import UserError
from ba_lora.io import disk_errors
from ba_lora.locks import locked, try_lock
from ba_lora.prompts import build_prompt
from data import conversations, encoding
from data.encoding import Encoder

if TYPE_CHECKING:
    from datasets import Dataset

    from data.conversations import Conversation

MANY_ROWS = 20_000  # from here on several processes tokenize, and a bar shows how far they are


def _cache_path() -> Path:
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "ba_lora"


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        with disk_errors(path):
            yield
    except UserError as error:
        if str(path) not in str(error):
            raise
        raise UserError(f"{error} (HF_DATASETS_CACHE names the folder)") from error


@contextlib.contextmanager
def _own_folder() -> Iterator[Path]:
    """Give a new folder in the cache, removed at the end. Those of processes that were killed are removed first."""
    folder = _cache_path()
    with _writing(folder / "rows"), locked(folder / "rows.lock", doing="makes a folder for its rows", wait=True):
        for lock in folder.glob("rows-*/lock"):
            if left := try_lock(lock):
                with left:
                    shutil.rmtree(lock.parent, ignore_errors=True)  # its process may just be removing it
        place = tempfile.TemporaryDirectory(dir=folder, prefix="rows-")
        lock = try_lock(Path(place.name) / "lock")
    with lock, place:
        yield Path(place.name)


@contextlib.contextmanager
def rows_on_disk(rows: Iterable["Conversation"]) -> Iterator["Dataset"]:
    """Give conversations as a data set that is mapped from a file, which is removed at the end: column `messages`.

    A thousand rows at a time are in memory. Raises UserError where the cache cannot be written.
    """
    import pyarrow as pa
    from datasets import Dataset

    kind = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
    schema = pa.schema({"messages": kind})
    with _own_folder() as place:
        path = place / "rows.arrow"
        with open(path, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            source = iter(rows)
            while batch := list(itertools.islice(source, 1000)):
                with _writing(path):
                    writer.write_batch(pa.record_batch({"messages": pa.array(batch, kind)}, schema=schema))
        yield Dataset.from_file(str(path))


def tokenize_once(
    rows: "Dataset", numbers: list[int], encoder: Encoder, source: str, *, digest: str, num_proc: int | None = None
) -> "Dataset":
    """Return `encoder(messages, number, source)` of the rows with these numbers, without those that are None.

    Columns input_ids, labels, length, response_length, cut and number. digest: of what the rows are. Read from the disk
    where the same has been made before; a process that finds another one at it waits. num_proc: processes; None: as
    many as there are cores for MANY_ROWS and more, else this one. Raises UserError where the cache cannot be written.
    """
    from datasets import Features, List, Value

    columns = {"input_ids": List(Value("int32")), "labels": List(Value("int64")), "length": Value("int64")}
    features = Features(columns | {"response_length": Value("int64"), "cut": Value("bool"), "number": Value("int64")})

    def encode_batch(batch: dict[str, list], places: list[int]) -> dict[str, list]:
        named = [numbers[place] for place in places]
        items = [
            (encoder(messages, number, source), number)
            for messages, number in zip(batch["messages"], named, strict=True)
        ]
        made = [item | {"number": number} for item, number in items if item is not None]
        return {name: [item[name] for item in made] for name in features}

    digest = _digest(digest, encoder)
    many = len(numbers) >= MANY_ROWS
    num_proc = num_proc or (min(len(os.sched_getaffinity(0)), 16) if many else None)
    path = _cache_path() / f"{digest}.arrow"
    with _writing(path), _progress_bars(shown=many):
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock"), doing="tokenizes the same rows", wait=True):
            return rows.select(numbers).map(
                encode_batch,
                batched=True,
                with_indices=True,
                num_proc=num_proc,
                remove_columns=["messages"],
                features=features,
                cache_file_name=str(path),
                new_fingerprint=digest,
                desc="tokenizing",
            )


def _digest(rows: str, encoder: Encoder) -> str:
    parts = {
        "rows": rows,
        "prompt": encoder.chat.text if encoder.chat else [build_prompt("1"), build_prompt("1", context="2")],
        "max_length": encoder.max_length,
        "code": [inspect.getsource(module) for module in (encoding, conversations, ba_lora.chat)],
        "versions": [importlib.metadata.version(name) for name in ("tokenizers", "transformers", "datasets")],
    }
    sha = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    with tempfile.TemporaryDirectory() as folder:
        encoder.tokenizer.save_pretrained(folder)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            sha.update(f"{file.relative_to(folder)} {file.stat().st_size} ".encode())
            sha.update(file.read_bytes())
    return sha.hexdigest()[:40]  # datasets takes 64 characters, with the number of the process


@contextlib.contextmanager
def _progress_bars(*, shown: bool) -> Iterator[Any]:
    """Keep the standard error for errors where the rows are few: datasets would draw a bar for two of them, too."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled() or (shown and os.environ.get("RANK", "0") == "0"):
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
