"""Rows for the NLU experiments: a GLUE task from the hub (`nyu-mll/glue`), or any task from files of its columns.

    training rows → class shares (data/imbalance.py) → number of rows → a held-out part (selection=tuned) → tokens

Columns and labels of each task stand in configs/nlu/tasks, or in the configuration (`nlu.task`). Labels are ids, or
names; in csv and tsv files as text.
"""

import collections
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ba_lora.config.schema_nlu import NLUConfig, NLUDataConfig
from ba_lora.errors import UserError
from ba_lora.glue import NLUTask, find_task
from ba_lora.models.tokenizer import encode_texts
from ba_lora.paths import resolve_data
from ba_lora.rows import Source, choose_rows, stream_rows
from data.imbalance import imbalanced_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

UNLABELLED = -1  # what the hub puts where GLUE keeps the labels to itself


@dataclass(frozen=True)
class NLUData:
    """Tokenized rows: the tokenizer's columns, `labels`, and `row`, the row's number in its file.

    dev: one data set for each evaluation set, the first of which the papers choose the best epoch by. heldout: the part
    of the training rows that `selection=tuned` chooses by instead. report: what became of the rows.
    """

    train: "Dataset"
    heldout: "Dataset | None"
    dev: dict[str, "Dataset"]
    report: dict[str, Any]


@dataclass(frozen=True)
class _Row:
    number: int
    texts: tuple[str, ...]
    label: int | float


def load_nlu_data(config: NLUConfig, tokenizer: "PreTrainedTokenizerBase") -> NLUData:
    """Return the rows `config` names, tokenized.

    Training rows with an empty text are left out, dev rows are kept whatever they hold; both are counted, and so are
    texts and pairs cut to `data.max_length` tokens (the longer of a pair first).
    Raises UserError for absent or empty files, wrong columns, labels out of range or missing, training rows of one
    class only, a dev share beside a dev set, shares that the rows cannot fill, and a length above the model's.
    """
    task = find_task(config.nlu.task)
    if config.data.max_length > tokenizer.model_max_length:
        raise UserError(
            f"data.max_length={config.data.max_length} is more than the {tokenizer.model_max_length} tokens that "
            f"{config.model.name} takes: lower it"
        )
    train, dev, origins = _read(config, task)
    report = {"name": task.name, **origins["train"], "rows_read": len(train)}
    filled = [row for row in train if all(text.strip() for text in row.texts)]
    report["rows_empty"] = len(train) - len(filled)
    train = _choose(filled, config.data, task)
    heldout: list[_Row] = []
    if config.nlu.selection == "tuned":
        train, heldout = _split(train, config.nlu.heldout_share, config.data.split_seed, task)
    _refuse_one_class(train, task, where=origins["train"]["source"])
    if empty := [name for name, count in (_class_counts(train, task) or {}).items() if task.is_own and not count]:
        raise UserError(
            f"no training row of {origins['train']['source']} is of class {empty[0]}: take it out of nlu.task.labels, "
            "or use more rows (data.num_rows)"
        )

    sets, cut = {}, {}
    for name, rows in {"train": train, "heldout": heldout, **dev}.items():
        sets[name], cut[name] = _tokenize(rows, tokenizer, config.data.max_length) if rows else (None, 0)
    report |= {
        "rows_used": len(train),
        "rows_cut": cut["train"],
        "rows_heldout": len(heldout),
        "rows_duplicate": len(train) - len({(row.texts, row.label) for row in train}),
        "classes": _class_counts(train, task),
        "tokens": sum(map(len, sets["train"]["input_ids"])),
        "dev": {
            name: {
                **origins[name],
                "rows": len(rows),
                "rows_cut": cut[name],
                "rows_empty": sum(not all(text.strip() for text in row.texts) for row in rows),
                "classes": _class_counts(rows, task),
            }
            for name, rows in dev.items()
        },
    }
    return NLUData(sets["train"], sets["heldout"], {name: sets[name] for name in dev}, report)


def _read(config: NLUConfig, task: NLUTask) -> tuple[list[_Row], dict[str, list[_Row]], dict[str, dict]]:
    """Return training rows, the rows of each dev set, and where each of them came from."""
    data = config.data
    if data.dev_share is not None and (data.dev or data.source is None):
        other = "data.dev names the dev set" if data.dev else f"{task.name} has a dev set of its own"
        raise UserError(f"data.dev_share={data.dev_share:g} would not be used, {other}: leave data.dev_share out")
    if config.nlu.task == "toy_pairs" and data.source is None:
        return _generate(config, task)
    train, origin = _read_set(data.sources, config, task, split=data.split)
    origins, dev = {"train": origin}, {}
    for name, split in task.dev_sets.items():
        if name in data.dev:
            dev[name], origins[name] = _read_set([data.dev[name]], config, task, split=split)
        elif data.source is None:
            dev[name], origins[name] = _read_set([], config, task, split=split)
    if data.dev_share is not None:
        name = next(iter(task.dev_sets))
        train, dev[name] = _split(train, data.dev_share, data.split_seed, task)
        origins[name] = origin | {"split": f"{data.dev_share:g} of the training rows, seed {data.split_seed}"}
    first = next(iter(task.dev_sets))
    if first not in dev:
        raise UserError(f"{data.source} has no dev set with it: add data.dev.{first}=FILE, or data.dev_share=0.1")
    return train, dev, origins


def _generate(config: NLUConfig, task: NLUTask) -> tuple[list[_Row], dict[str, list[_Row]], dict[str, dict]]:
    from data import toy_nlu

    toy = config.data.toy
    try:
        train = toy_nlu.generate_pairs(
            num_rows=config.data.num_rows,
            seed=toy.seed,
            split="train",
            label_noise=toy.label_noise,
            noisy_labels=tuple(toy.noisy_labels),
            imbalance=toy.imbalance,
        )
        test = toy_nlu.generate_pairs(num_rows=toy.dev_rows, seed=toy.seed, split="test")
    except ValueError as error:
        raise UserError(f"data.toy: {error}") from error
    origin = {"source": "generated by data/toy_nlu.py", "revision": None, "sha256": None}
    (name,) = task.dev_sets
    rows = {part: [_to_row(i, row, task, "toy") for i, row in enumerate(made)] for part, made in
            (("train", train), (name, test))}  # fmt: skip
    return rows["train"], {name: rows[name]}, {"train": origin, name: origin}


def _read_set(names: list[str], config: NLUConfig, task: NLUTask, *, split: str) -> tuple[list[_Row], dict[str, Any]]:
    revision = config.data.revision
    found = [resolve_data(name) for name in names]
    found = [f"{name}@{revision}" if revision and not Path(name).is_absolute() else name for name in found]
    stream, source = stream_rows(
        found or [task.hub_rows(revision)], split=split, configs=lambda hub: (task.subset if hub == task.hub else None,)
    )
    rows = list(stream)
    origin = {
        "source": source.name,
        "revision": source.revision,
        "sha256": source.sha256,
        "data_sha256": source.as_result(),  # as in the scores of the sets that are evaluated later
    }
    _check_columns(rows, task, source)
    found = [_to_row(number, row, task, source.name) for number, row in enumerate(rows)]
    return found, origin if source.sha256 else origin | {"split": split}


def _check_columns(rows: list[dict[str, Any]], task: NLUTask, source: Source) -> None:
    needed = (*task.columns, task.label)
    if any(column not in rows[0] for column in needed):
        raise UserError(
            f"{source.name} has the columns {', '.join(sorted(rows[0]))}; the task {task.name} needs "
            f"{', '.join(needed)}: "
            + ("name them in nlu.task" if task.is_own else "choose the matching task, or describe yours in nlu.task")
        )
    for number, row in enumerate(rows):
        if any(column not in row for column in needed):
            raise UserError(f"{source.name}, row {number} lacks a column: {', '.join(needed)} are needed in every row")


def _to_row(number: int, row: dict[str, Any], task: NLUTask, where: str) -> _Row:
    texts = tuple(row[column] for column in task.columns)
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}, row {number}: {', '.join(task.columns)} must be text: {row!r:.120}")
    return _Row(number, texts, _to_label(row[task.label], task, f"{where}, row {number}"))


def _to_label(value: Any, task: NLUTask, where: str) -> int | float:
    """Return the label's id, or the score. Raises UserError for what is neither, and for unlabelled rows."""
    if isinstance(value, list | dict):
        raise UserError(f"{where}: several labels a row are not supported: train one task for each label")
    if not task.is_regression and (found := task.label_id(value)) is not None:
        return found
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    low, high = task.score_range or (math.inf, -math.inf)
    if low <= number <= high:
        return number
    if number == UNLABELLED and not task.is_own:
        raise UserError(f"{where} has no label (−1), as in GLUE's test splits: use a labelled split")
    if task.is_regression:
        raise UserError(f"{where}: label {value!r} is no score from {low:g} to {high:g}")
    labels = ", ".join(f"{index} ({name})" for index, name in enumerate(task.labels))
    raise UserError(f"{where}: label {value!r} is out of range: labels are {labels}")


def _choose(rows: list[_Row], config: NLUDataConfig, task: NLUTask) -> list[_Row]:
    """Return the rows to train on: with the asked class shares, or the first ones, or a seeded sample."""
    if config.class_shares:
        chosen = imbalanced_rows(
            [row.label for row in rows],
            config.class_shares,
            classes=task.labels,
            num_rows=config.num_rows,
            seed=config.split_seed,
        )
        return [rows[index] for index in chosen]
    return choose_rows(rows, config.num_rows, config.sample_seed)


def _split(rows: Sequence[_Row], share: float, seed: int, task: NLUTask) -> tuple[list[_Row], list[_Row]]:
    """Return (the rest, a random `share` of the rows), each in the file's order.

    Of a task of one's own both have the classes in like shares; GLUE's are drawn as they always were.
    """
    count = round(share * len(rows))
    if not 0 < count < len(rows):
        raise UserError(f"a share of {share:g} of {len(rows)} rows leaves one part empty: use more rows")
    drawn = random.Random(f"split/{seed}").sample(range(len(rows)), count)
    if task.is_own and not task.is_regression:
        order = list(range(len(rows)))
        random.Random(f"split/{seed}").shuffle(order)
        order.sort(key=lambda index: rows[index].label)
        drawn = [
            row for place, row in enumerate(order) if (place + 1) * count // len(rows) > place * count // len(rows)
        ]
    taken = set(drawn)
    return (
        [row for index, row in enumerate(rows) if index not in taken],
        [row for index, row in enumerate(rows) if index in taken],
    )


def _refuse_one_class(rows: list[_Row], task: NLUTask, *, where: str) -> None:
    if not rows:
        raise UserError(f"no row of {where} is left to train on: all are empty")
    if not task.is_regression and len({row.label for row in rows}) == 1:
        name = task.labels[rows[0].label]
        raise UserError(f"all {len(rows)} training rows of {where} are of class {name}: there is nothing to learn")


def _class_counts(rows: list[_Row], task: NLUTask) -> dict[str, int] | None:
    if task.is_regression:
        return None
    counts = collections.Counter(row.label for row in rows)
    return {name: counts[label] for label, name in enumerate(task.labels)}


def _tokenize(rows: list[_Row], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> tuple["Dataset", int]:
    """Return the data set and how many of its rows were cut to `max_length` tokens."""
    from datasets import Dataset

    encoded, cut = encode_texts(tokenizer, [row.texts for row in rows], max_length=max_length)
    encoded |= {"labels": [row.label for row in rows], "row": [row.number for row in rows]}
    return Dataset.from_dict(encoded), cut
