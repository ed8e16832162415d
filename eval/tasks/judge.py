"""Prompts of your own, rated from 1 to 10 by a judge model, as MT-Bench's answers are (eval/tasks/mt_bench.py).

A file of prompts: `prompt`, or `turns`, a list of one text or two; `category` and `reference` (the right answer, or one
for each turn) where you have them. Beside `prompts.jsonl` may lie `prompts.rubric.txt`, or `prompts.jsonl.rubric.txt`,
which goes before it; of `prompts.jsonl.gz` likewise. It is what the judge is told: a text with {question} and {answer},
and {reference} where it wants it, that asks for the rating as [[rating]]. For a second turn {question} and {answer}
hold the whole conversation.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ba_lora.errors import UserError
from ba_lora.io import open_text, reading_errors
from ba_lora.paths import LOCAL_SUFFIXES
from ba_lora.rows import Source, load_rows
from eval.judge.judge import Judged
from eval.judge.store import Request, short_sha256
from eval.tasks.base import Item
from eval.tasks.mt_bench import MTBench

RUBRIC = """Rate how well the assistant answered the user: whether the answer is correct, helpful, complete and in the
user's language. Be as strict with long answers as with short ones. Explain your judgement in a few sentences, then give
a whole number from 1 (useless) to 10 (excellent) in exactly this form: [[rating]], for example [[5]].

[The user's question]
{question}

[A reference answer, if there is one]
{reference}

[The assistant's answer]
{answer}
"""
FIELDS = ("question", "answer", "reference")


class Judge(MTBench):
    name = "judge"
    version = "1"
    columns = ()
    judged = True

    def default_data(self) -> str:
        raise UserError("judge has no prompts of its own: give --data FILE or eval.data.judge=FILE")

    def load(self, data: str | None = None) -> tuple[list[Item], Source]:
        rows, source = load_rows(str(data) if data is not None else self.default_data(), split=self.hub_split)
        items = self.items_from_rows(rows, source=source.name)
        rubric = read_rubric(Path(data) if data is not None else None)
        for item in items:
            item.meta["rubric"] = rubric
        return items, source

    def items_from_rows(self, rows: Sequence[dict], *, source: str) -> list[Item]:
        items = []
        for index, row in enumerate(rows):
            turns, references = _texts(row, source, index)
            for turn in range(1, len(turns) + 1):
                meta = {
                    "question_id": index,
                    "category": str(row.get("category") or "all"),
                    "turn": turn,
                    "turns": turns,
                    "references": references,
                }
                before = f"{self.name}/{index}/turn1" if turn == 2 else None
                items.append(Item(f"{self.name}/{index}/turn{turn}", turns[turn - 1], None, meta, follows=before))
        return items

    def temperature(self, item: Item) -> float:
        return 0.0

    def judging(self, item: Item) -> tuple[Callable[..., Request], Callable[[Judged], dict]]:
        rubric = item.meta["rubric"]
        return functools.partial(_request, rubric=rubric), functools.partial(_record, rubric=rubric)


def read_rubric(prompts: Path | None) -> str:
    """Return the rubric beside a file of prompts, else RUBRIC. Raises UserError for one without its fields."""
    if prompts is None:
        return RUBRIC
    unpacked = prompts.with_suffix("") if prompts.suffix == ".gz" else prompts
    stem = unpacked.stem if unpacked.suffix in LOCAL_SUFFIXES else unpacked.name
    places = [prompts.with_name(f"{name}.rubric.txt") for name in (prompts.name, unpacked.name, stem)]
    path = next(filter(Path.is_file, places), None)
    if path is None:
        return RUBRIC
    with open_text(path) as file, reading_errors(path):
        rubric = file.read()
    missing = [name for name in FIELDS[:2] if f"{{{name}}}" not in rubric]
    if missing or "[[" not in rubric:
        raise UserError(
            f"{path}: a rubric holds {{question}} and {{answer}}, and asks for the rating as [[rating]]"
            + (f"; it lacks {{{missing[0]}}}" if missing else "")
        )
    return rubric


def _texts(row: dict, source: str, index: int) -> tuple[list[str], list[str]]:
    where = f"{source}, row {index}"
    turns = row["turns"] if row.get("turns") is not None else [row.get("prompt")]
    if (
        not isinstance(turns, list)
        or len(turns) not in (1, 2)
        or not all(isinstance(t, str) and t.strip() for t in turns)
    ):
        raise UserError(
            f"{where}: prompt must be text, or turns a list of one text or two; it has {', '.join(map(str, row))}"
        )
    references = row.get("reference") or []
    references = references if isinstance(references, list) else [references]
    if not all(isinstance(text, str) for text in references):
        raise UserError(f"{where}: reference must be text, or a list of texts")
    return turns, references


def _record(judged: Judged, *, rubric: str) -> dict:
    record = {**judged.record, "rubric_hash": short_sha256(rubric)}
    names = ("model", "version", "rubric_hash", "temperature", "max_tokens", "thinking")
    return {"id": " ".join(f"{name}={record[name]}" for name in names), **record}


def _request(item: Item, sample: int, texts: Mapping[tuple[str, int], str], *, rubric: str) -> Request:
    """Return what the judge is asked about one answer; see the head of this file."""
    turn, turns = item.meta["turn"], item.meta["turns"]
    ids = [item.follows, item.task_id] if item.follows else [item.task_id]
    if missing := [name for name in ids if (name, sample) not in texts]:
        raise UserError(f"{item.task_id} sample {sample} cannot be judged without {missing[0]}: generate that, too")
    given = [texts[name, sample] for name in ids]
    fields = {
        "question": "\n\n".join(turns[:turn]),
        "answer": "\n\n".join(given),
        "reference": "\n\n".join(item.meta["references"][:turn]) or "none",
    }
    user = rubric
    for name in FIELDS:  # no str.format: a rubric may hold other braces
        user = user.replace(f"{{{name}}}", f"\0{name}\0")
    for name in FIELDS:
        user = user.replace(f"\0{name}\0", fields[name])
    frame = json.dumps([rubric, fields["question"], fields["reference"]])
    return Request(item.meta["question_id"], turn, "\0".join(given), "", user, frame)
