"""Training rows for the NLG experiments: read, made into conversations, put into a template, tokenized, labelled.

    rows → conversations (data/conversations.py) → those chosen → tokens with labels on the answers (data/encoding.py)

What is read stands in a file of configs/data or in `data.columns` and `data.messages`: data/sets.py. Rows pass one by
one into an Arrow file and are tokenized from there, in several processes where they are many.
"""

import array
import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ba_lora.chat import load_chat
from ba_lora.config.schema_nlg import NLGDataConfig
from ba_lora.errors import UserError
from ba_lora.prompts import prompt_hash
from ba_lora.rows import choose_rows, stream_rows
from data import manifest
from data.conversations import read_conversation
from data.encoding import Encoder
from data.sets import DataSet, chosen_set, places
from data.tokenized import rows_on_disk, tokenize_once

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainingData:
    """The tokenized rows (input_ids, labels, length, and `row`, their number here) and what became of the raw ones.

    heldout: those that are kept out of training (`data.heldout_share`), None where there are none. numbers: what
    happened → the rows it happened to, numbered as in the source: used, heldout, cut, dropped, empty, shortened,
    duplicate.
    """

    dataset: "Dataset"
    report: dict[str, Any]
    heldout: "Dataset | None" = None
    numbers: dict[str, list[int]] = field(default_factory=dict)


def load_training_data(config: NLGDataConfig, tokenizer: "PreTrainedTokenizerBase") -> TrainingData:
    """Return the rows `config` names, tokenized.

    Labels are −100 but on the answers and their end tokens. A row longer than `max_length` is cut (it then lacks the
    last end token); a row of which no answer would be left is dropped. Both are counted in the report, as are rows
    without text, conversations of which turns are left out, and rows that another one repeats (which are trained on).
    Raises UserError for a missing or empty file, wrong columns, roles or templates, a broken line, an absent set, or
    when no row is left.
    """
    encoder = Encoder(tokenizer, config.max_length, load_chat(tokenizer, config.template))
    rows, found, origin = _open_rows(config)
    reader = _Reader(rows, found, encoder, origin["source"])
    with rows_on_disk(reader) as conversations:
        checked = manifest.check_rows(found.name, config.split, reader.digest, file_sha256=origin["file_sha256"])
        chosen = choose_rows(range(len(reader.hashes)), config.num_rows, config.sample_seed)
        empty = [number for number in chosen if number in reader.empty]
        filled = [number for number in chosen if number not in reader.empty]
        digest = hashlib.sha256(f"{reader.sha256} {config.num_rows} {config.sample_seed}".encode()).hexdigest()
        encoded = tokenize_once(conversations, filled, encoder, origin["source"], digest=digest) if filled else ()
    if not len(encoded):
        raise UserError(
            f"no row of {origin['source']} is left to train on: of {len(chosen)}, {len(empty)} hold no question with "
            f"an answer, and the prompts of the others fill data.max_length={config.max_length}: raise that, or "
            "check the file"
        )
    kept = encoded["number"][:]
    numbers = {
        "cut": [number for number, cut in zip(kept, encoded["cut"][:], strict=True) if cut],
        "dropped": sorted(set(filled) - set(kept)),
        "empty": empty,
        "shortened": [number for number in filled if number in reader.shortened],
        "duplicate": _repeated(filled, reader.hashes),
    }
    heldout = None
    if config.heldout_share:
        encoded, heldout = _hold_out(encoded, config.heldout_share)
    numbers |= {"used": encoded["number"][:], "heldout": heldout["number"][:] if heldout is not None else []}
    used = set(numbers["used"])
    report = {
        "name": found.name,
        **origin,
        "rows_read": len(reader.hashes),
        "rows_chosen": len(chosen),
        "rows_used": len(encoded),
        "rows_cut": sum(number in used for number in numbers["cut"]),
        "rows_dropped": len(numbers["dropped"]),
        "rows_empty": len(empty),
        "rows_shortened": len(numbers["shortened"]),
        "rows_duplicate": len(numbers["duplicate"]),
        "rows_heldout": len(numbers["heldout"]),
        "sha256": checked["sha256"],
        "manifest": checked["status"],
        "prompt_hash": encoder.chat.hash if encoder.chat else prompt_hash(),
        "tokens": sum(encoded["length"]),
        "response_tokens": sum(encoded["response_length"]),
    }
    further = ["response_length", "cut", "number"]
    if heldout is not None:
        heldout = heldout.remove_columns(further)
    dataset = encoded.remove_columns(further).add_column("row", list(range(len(encoded))))
    return TrainingData(dataset, report, heldout, numbers)


class _Reader:
    """Yields the conversation of each row, and remembers of the rows what is needed later; an empty row yields []."""

    def __init__(self, rows: Iterable[dict[str, Any]], of: DataSet, encoder: Encoder, source: str) -> None:
        self._rows, self._of, self._encoder, self._source = rows, of, encoder, source
        self._sha = hashlib.sha256()
        self.digest = manifest.RowDigest(of.read)
        self.hashes = array.array("Q")  # of each row's conversation
        self.empty: set[int] = set()
        self.shortened: set[int] = set()

    @property
    def sha256(self) -> str:
        """Of all conversations."""
        return self._sha.hexdigest()

    def __iter__(self) -> Iterator[list[dict[str, str]]]:
        found: set[str] = set()
        for number, row in enumerate(self._rows):
            where = f"{self._source}, row {number}"
            if missing := [column for column in self._of.needed if column not in row]:
                self._refuse_columns(row, found, missing, where)
            found.update(row)
            self.digest.add(row)
            conversation, shortened = read_conversation(row, self._of, where)
            self._encoder.check(conversation, where)
            line = json.dumps(conversation).encode()
            self._sha.update(line)
            self.hashes.append(int.from_bytes(hashlib.sha256(line).digest()[:8]))
            if not conversation:
                self.empty.add(number)
            if shortened:
                self.shortened.add(number)
            yield conversation
        if (column := self._of.columns.get("input")) is not None and column not in found:
            raise UserError(
                f"no row of {self._source} has the column {column} for the input; there are "
                f"{', '.join(sorted(found))}: name another one in columns.input, or leave input out"
            )

    def _refuse_columns(self, row: dict[str, Any], found: set[str], missing: list[str], where: str) -> None:
        needed = ", ".join(self._of.needed)
        if found:
            raise UserError(f"{where} lacks a column, {missing[0]}: {needed} are needed in every row")
        how = (
            "name the columns there are, data.columns or data.messages"
            if self._of.name == "own"
            else "choose the matching data.name, or name the columns, data.columns={instruction: …, response: …}"
        )
        raise UserError(
            f"{self._source} has the columns {', '.join(sorted(row))}; data.name={self._of.name} needs {needed}: {how}"
        )


def _repeated(numbers: list[int], hashes: "array.array[int]") -> list[int]:
    """Return the rows whose conversation stands in an earlier one already."""
    seen: set[int] = set()
    found = []
    for number in numbers:
        if hashes[number] in seen:
            found.append(number)
        seen.add(hashes[number])
    return found


def _hold_out(rows: "Dataset", share: float) -> tuple["Dataset", "Dataset"]:
    """Return the rows for training and the held-out ones, at least one each; they are the same for every seed."""
    number = round(share * len(rows))
    if not 0 < number < len(rows):
        raise UserError(
            f"data.heldout_share={share} of {len(rows)} rows are {number}: at least one row must be held out, and one "
            "be left to train on"
        )
    held = set(random.Random(0).sample(range(len(rows)), number))
    return rows.select([row for row in range(len(rows)) if row not in held]), rows.select(sorted(held))


def _open_rows(config: NLGDataConfig) -> tuple[Iterable[dict[str, Any]], DataSet, dict[str, Any]]:
    """Return the raw rows, how they are read, and where they come from."""
    found = chosen_set(config)
    if config.name == "toy" and config.source is None:
        from data import toy

        settings = config.toy
        try:
            rows = toy.generate_problems(
                num_rows=config.num_rows,
                seed=settings.seed,
                split="finetune",
                label_noise=settings.label_noise,
                noisy_families=tuple(settings.noisy_families),
                imbalance=settings.imbalance,
                family_weights=dict.fromkeys(settings.families, 1.0) or None,
            )
        except ValueError as error:
            raise UserError(f"data.toy: {error}") from error
        return rows, found, {"source": "generated by data/toy.py", "revision": None, "file_sha256": None}
    rows, where = stream_rows(places(config, found), split=config.split, configs=lambda hub: (found.subset,))
    return rows, found, {"source": where.name, "revision": where.revision, "file_sha256": where.sha256}
