"""Tokenized rows on disk: the runs of a table share them, and of a run's processes one makes them.

They lie in the datasets library's own cache (HF_DATASETS_CACHE, below `ba_lora`), one Arrow file for each digest of
what they depend on: texts, tokenizer, prompt, length, the code of the encoding, the versions of the libraries below it.
A token takes 12 bytes.
"""

import contextlib
import hashlib
import importlib.metadata
import inspect
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ba_lora.errors import UserError
from ba_lora.io import disk_errors
from ba_lora.locks import locked
from ba_lora.prompts import prompt_hash

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Encode = Callable[..., dict[str, Any] | None]


def tokenize_once(
    pairs: list[tuple[str, str]], encode: Encode, tokenizer: "PreTrainedTokenizerBase", *, max_length: int
) -> "Dataset":
    """Return `encode(instruction, response, tokenizer, max_length=…)` of the pairs, without those that are None.

    Columns input_ids, labels, length, response_length and cut. Read from the disk where the same has been made before;
    a process that finds another one at it waits. Raises UserError where the cache cannot be written.
    """
    from datasets import Dataset, Features, List, Value, config

    columns = {"input_ids": List(Value("int32")), "labels": List(Value("int64"))}
    features = Features(columns | {"length": Value("int64"), "response_length": Value("int64"), "cut": Value("bool")})

    def encode_batch(batch: dict[str, list[str]]) -> dict[str, list]:
        items = [
            encode(*pair, tokenizer, max_length=max_length)
            for pair in zip(batch["instruction"], batch["response"], strict=True)
        ]
        return {name: [item[name] for item in items if item is not None] for name in features}

    digest = _digest(pairs, encode, tokenizer, max_length)
    path = Path(config.HF_DATASETS_CACHE) / "ba_lora" / f"{digest}.arrow"
    instructions, responses = zip(*pairs, strict=True)
    texts = Dataset.from_dict({"instruction": instructions, "response": responses})
    try:
        with disk_errors(path), _no_progress_bars():
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.with_suffix(".lock"), doing="tokenizes the same rows", wait=True):
                return texts.map(
                    encode_batch,
                    batched=True,
                    remove_columns=texts.column_names,
                    features=features,
                    cache_file_name=str(path),
                    new_fingerprint=digest,
                )
    except UserError as error:
        raise UserError(f"{error} (HF_DATASETS_CACHE names the folder)") from error


def _digest(pairs: list[tuple[str, str]], encode: Encode, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> str:
    parts = {
        "pairs": pairs,
        "prompt": prompt_hash(),
        "max_length": max_length,
        "code": inspect.getsource(encode),
        "versions": [importlib.metadata.version(name) for name in ("tokenizers", "transformers", "datasets")],
    }
    sha = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            sha.update(f"{file.relative_to(folder)} {file.stat().st_size} ".encode())
            sha.update(file.read_bytes())
    return sha.hexdigest()


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep the standard error for errors: datasets would draw a bar for two rows, too."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
