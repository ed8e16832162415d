"""Score completions: files in, one JSON object out; no model, no GPU, so a mended grader costs nothing to apply.

    python -m eval.score --task gsm8k --completions FILE.jsonl [--data FILE] [--output FILE.json] [key=value …]
    python -m eval.score --runs DIR [key=value …]        re-score every run below DIR
    python -m eval.score --stale DIR                     grade nothing; mark the scores below DIR that an older grader
                                                         or other completions gave: "stale" in the file says why

A completions line needs task_id and completion; `sample` tells several completions of a task apart (default 0) and
`finish_reason` is counted. Beside the completions a `<name>.meta.json` may say what made them; its `data` is the data
file where --data is not given. The last line on stdout is the result (see `score_file`); the grades of each completion
are written beside it, one JSON object a line: task_id, sample, metrics, extracted, gold, invalid, and the item's groups
(its family, its subject) where the task has some.

Keys: allow_partial=true scores what is there although tasks or samples are missing; workers=N and timeout_s=SECONDS
set the processes and the limit per completion of graders that compute. Tasks have choices of their own: humaneval and
mbpp sandbox=unsafe (run programs without bubblewrap; the result says so), mbpp challenge=true and setup=false.

MT-Bench is graded by a judge model (see eval/judge.py for JUDGE_MODEL, JUDGE_BASE_URL, JUDGE_API_KEY); what it is going
to cost is printed first, and its judgements are kept in RUN/judgements/mt_bench.jsonl, or <name>.judgements.jsonl
beside the completions. Its keys: judgements=3 (of each answer), judge_parallel=4 (calls at a time),
judge_timeout_s=120, judge_attempts=8 (for one judgement), judge_temperature=0, judge_max_tokens=2048 (none: not sent).
"""

import argparse
import difflib
import importlib.metadata
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ba_lora.config import PROJECT_ROOT
from ba_lora.errors import UserError, run_entry_point
from ba_lora.io import read_json, read_jsonl, sha256_file, write_json_atomic, write_jsonl_atomic
from eval.judge import JudgeOptions, one_judge
from eval.tasks import TASKS, get_task
from eval.tasks.base import Grade, Item, Source, Task

MAX_COMPLETION_CHARS = 10_000_000
MAX_LINE_BYTES = 80_000_000  # such a completion, every letter escaped, and its prompt
PROMPT_TOO_LONG = "prompt_too_long"  # finish_reason of an item that was never generated: counted, wrong, invalid
TRUNCATED = "length"


@dataclass(frozen=True)
class Options:
    """What `key=value` can set."""

    allow_partial: bool = False
    workers: int | None = None
    timeout_s: float = 5.0
    judgements: int = 3
    judge_parallel: int = 4
    judge_timeout_s: float = 120.0
    judge_attempts: int = 8
    judge_temperature: float | None = 0.0
    judge_max_tokens: int | None = 2048
    choices: Mapping[str, str] = field(default_factory=dict)  # of the tasks themselves, see Task.choices

    def judge(self) -> JudgeOptions:
        """Return what a judge is told."""
        named = {name.removeprefix("judge_"): value for name, value in vars(self).items() if name.startswith("judge")}
        return JudgeOptions(**named)


@dataclass(frozen=True)
class Completion:
    """One line of a completions file."""

    task_id: str
    sample: int
    text: str
    finish_reason: str | None


def parse_options(arguments: Sequence[str], tasks: Sequence[Task] = ()) -> Options:
    """Read `key=value` arguments, the choices of `tasks` included.

    Raises UserError for an unknown key (with the nearest) or a bad value.
    """
    values: dict[str, object] = {}
    choices: dict[str, str] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        owners = [task for task in tasks if key in task.choices or key in task.grading_choices]
        if equals and owners:
            owners[0].configured({key: text})  # checks the value
            choices[key] = text
            continue
        if not equals or key not in _PARSERS:
            own = {key: None for task in tasks for key in (*task.choices, *task.grading_choices)}
            near = difflib.get_close_matches(key, [*_PARSERS, *own], n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"unknown argument {argument!r}: {hint}keys: {', '.join([*_PARSERS, *own])}")
        try:
            values[key] = _PARSERS[key](text)
        except ValueError as error:
            raise UserError(f"{key}={text}: {error}") from error
    return Options(**values, choices=choices)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError("true or false is needed")
    return text.lower() == "true"


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("a whole number of at least 1 is needed")
    return int(text)


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise ValueError("a number of seconds above 0 is needed")
    return value


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 10:
        raise ValueError("a number of at least 0, or none, is needed")
    return value


def _or_none(parser: Callable[[str], object]) -> Callable[[str], object]:
    return lambda text: None if text.lower() == "none" else parser(text)


_PARSERS: dict[str, Callable[[str], object]] = {
    "allow_partial": _boolean,
    "workers": _positive_int,
    "timeout_s": _positive_float,
    "judgements": _positive_int,
    "judge_parallel": _positive_int,
    "judge_timeout_s": _positive_float,
    "judge_attempts": _positive_int,
    "judge_temperature": _or_none(_temperature),
    "judge_max_tokens": _or_none(_positive_int),
}


def read_completions(path: Path) -> list[Completion]:
    """Read a completions file, checking keys, types and that no (task_id, sample) comes twice; else UserError."""
    try:
        _check_lines(path)
        rows = read_jsonl(path)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, nesting without end
        raise UserError(f"{path}: not readable JSON ({error})") from error
    completions, seen = [], set()
    for number, row in enumerate(rows, start=1):
        where = f"{path}, entry {number}"
        for key in ("task_id", "completion"):
            if key not in row:
                raise UserError(f"{where}: the key {key} is missing; found: {', '.join(map(str, row)) or 'none'}")
            if not isinstance(row[key], str):
                raise UserError(f"{where}: {key} must be text, found {type(row[key]).__name__}")
        sample, reason = row.get("sample", 0), row.get("finish_reason")
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
        completions.append(Completion(row["task_id"], sample, row["completion"], reason))
    return completions


def _check_lines(path: Path) -> None:
    """Refuse a line that no completion can need, before it is taken apart."""
    if not path.is_file():
        return  # the reader tells what is wrong with it
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
    items: Sequence[Item], completions: Sequence[Completion], *, path: Path, allow_partial: bool
) -> list[tuple[Item, list[Completion]]]:
    """Pair items, in data order, with their completions in order of sample; items without one are left out.

    Raises UserError for ids that the data does not have, and, unless `allow_partial`, for missing items and for
    numbers of samples that differ between items.
    """
    by_id: dict[str, list[Completion]] = {item.task_id: [] for item in items}
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


def output_paths(completions: Path, output: Path | None) -> tuple[Path, Path]:
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
    meta = read_json(path)
    if not isinstance(meta, dict):
        raise UserError(f"{path}: a JSON object is needed, found {type(meta).__name__}")
    return meta


def resolve_data(data: str | None, meta: dict) -> str | None:
    """Return the data to grade against: --data, else the meta's (relative to here or to the repository), else None."""
    if data is not None:
        return data
    named = meta.get("data")
    if named is not None and not isinstance(named, str):
        raise UserError(f"the meta file's data must be a file or hub name, found {type(named).__name__}; give --data")
    if named and not Path(named).exists() and (PROJECT_ROOT / named).exists():
        return str(PROJECT_ROOT / named)
    return named or None


def score_file(
    task: Task,
    completions_path: Path,
    *,
    data: str | None = None,
    output: Path | None = None,
    options: Options | None = None,
    loaded: dict[tuple[str, str | None], tuple[list[Item], Source]] | None = None,
) -> dict:
    """Score one completions file, write score and grades atomically (the score last), return the score.

    loaded: items already read, by (task name, data), shared between calls. The result: task, version, n (items
    scored), num_completions, invalid (completions from which no answer could be read), metrics (fractions),
    interval_95 (bootstrap over items), groups, what the task's `conditions` tell (sandbox, limits, choices),
    partial, num_missing (items), num_truncated (finish_reason "length"), num_prompt_too_long, timeouts, data,
    data_sha256, completions_sha256, prompt_hash (None where the meta file does not tell), packages (versions the
    grader depends on), grader_seconds; from a judge also ratings and judge (eval/tasks/mt_bench.py).
    Raises UserError; nothing is written then, but judgements, which are paid for.
    """
    options = options or Options()
    completions = read_completions(completions_path)
    completions_sha256 = sha256_file(completions_path)
    meta = read_meta(completions_path)
    task = choose(task, meta, options)
    made_from = None if data is not None else meta.get("data_sha256")
    data = resolve_data(data, meta)
    loaded = {} if loaded is None else loaded
    if (task.name, data) not in loaded:
        loaded[task.name, data] = task.load(data)
    items, source = loaded[task.name, data]
    items = task.select(items, [completion.task_id for completion in completions])
    if isinstance(made_from, str) and source.sha256 not in (None, made_from):
        raise UserError(
            f"{completions_path}: {source.name} has changed since these completions were made; "
            "generate again, or name the data to grade against with --data"
        )
    matched = match_items(items, completions, path=completions_path, allow_partial=options.allow_partial)

    start = time.perf_counter()
    answers = [
        (item, [(c.sample, "" if c.finish_reason == PROMPT_TOO_LONG else c.text) for c in samples])
        for item, samples in matched
    ]
    if task.judged:
        per_item, judged = _judge(task, answers, judgements_path(completions_path), options)
    else:
        grades = iter(_grade(task, [(item, text) for item, samples in answers for _, text in samples], options))
        per_item, judged = [[next(grades) for _ in samples] for _, samples in answers], {}
    grader_seconds = time.perf_counter() - start
    grades = [grade for samples in per_item for grade in samples]
    summary = task.aggregate([item for item, _ in matched], per_item) | judged
    reasons = [completion.finish_reason for completion in completions]
    score = {
        "task": task.name,
        "version": task.version,
        "n": len(matched),
        "invalid": sum(grade.invalid for grade in grades),
        **summary,
        "num_completions": len(completions),
        "num_truncated": reasons.count(TRUNCATED),
        "num_prompt_too_long": reasons.count(PROMPT_TOO_LONG),
        "timeouts": sum(grade.timeout for grade in grades),
        "partial": len(matched) < len(items) or len({len(samples) for _, samples in matched}) > 1,
        "num_missing": len(items) - len(matched),
        "data": source.name,
        "data_sha256": source.as_result(),
        "completions_sha256": completions_sha256,
        "prompt_hash": meta.get("prompt_hash"),
        "packages": {name: importlib.metadata.version(name) for name in task.packages},
        **task.conditions(timeout_s=options.timeout_s),
        "grader_seconds": round(grader_seconds, 3),
    }
    rows = [
        {
            "task_id": item.task_id,
            "sample": completion.sample,
            "metrics": grade.metrics,
            "extracted": {name: _writable(text) for name, text in grade.extracted.items()},
            "gold": item.gold,
            "invalid": grade.invalid,
            **({"timeout": True} if grade.timeout else {}),
            **_groups(task, item),
        }
        for (item, samples), item_grades in zip(matched, per_item, strict=True)
        for completion, grade in zip(samples, item_grades, strict=True)
    ]
    score_path, grades_path = output_paths(completions_path, output)
    write_jsonl_atomic(grades_path, rows)
    write_json_atomic(score_path, score)
    return score


def _groups(task: Task, item: Item) -> dict[str, dict[str, str]]:
    """Return {"groups": key → the item's value} as `Task.aggregate` groups it; {} for an item of no group."""
    groups = {key: str(item.meta[key]) for key in task.groups if item.meta.get(key) is not None}
    return {"groups": groups} if groups else {}


def choose(task: Task, meta: Mapping, options: Options) -> Task:
    """Return the task with the choices that the completions were made with, and over them those of `options`."""
    made = meta.get("choices") or {}
    if not isinstance(made, dict):
        raise UserError(f"the meta file's choices must be a JSON object, found {type(made).__name__}")
    typed = {key: value for key, value in options.choices.items() if key in task.choices or key in task.grading_choices}
    return task.configured({**{key: value for key, value in made.items() if key in task.choices}, **typed})


def stale_reason(score: Mapping, *, completions: Path | None = None) -> str | None:
    """Return why a score no longer holds, None where it does: its grader's version, or the completions, changed."""
    name = score.get("task")
    if name in TASKS and score.get("version") != get_task(name).version:
        return f"graded by version {score.get('version')} of {name}, which is at version {get_task(name).version} now"
    if completions is not None and completions.is_file():
        if sha256_file(completions) != score.get("completions_sha256"):
            return "the completions have changed since"
    return None


def mark_stale(folder: Path) -> int:
    """Mark what is stale below `folder`: files scores/<task>.json, and the entries of assembled results.

    Marks that no longer hold are taken off. Prints each stale score, and a last JSON line; returns the exit status.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}; give the folder that holds runs or results")
    checked, stale = 0, []
    for path in sorted(folder.rglob("*.json")):
        is_score = path.parent.name == "scores"
        content = read_json(path) if is_score or path.parent.name == "runs" else None
        entries = {"": content} if is_score else content.get("evaluation") if isinstance(content, dict) else None
        changed = False
        for task, entry in entries.items() if isinstance(entries, dict) else ():
            if not isinstance(entry, dict) or "version" not in entry:
                continue
            checked += 1
            completions = path.parent.parent / "completions" / f"{path.stem}.jsonl" if is_score else None
            reason = stale_reason(entry, completions=completions)
            changed = changed or entry.get("stale") != reason
            entry.pop("stale", None)
            if reason is not None:
                entry["stale"] = reason
                stale.append(f"{os.path.relpath(path, folder)}{task and ' ' + task}")
                print(f"stale: {stale[-1]}: {reason}; python -m eval.score --runs re-scores it")
        if changed:
            write_json_atomic(path, content)
    print(json.dumps({"checked": checked, "stale": stale}, ensure_ascii=False))
    return 0


def _grade(task: Task, pairs: Sequence[tuple[Item, str]], options: Options) -> list[Grade]:
    from tqdm import tqdm

    with tqdm(total=len(pairs), desc=f"grading {task.name}", unit="completion", disable=None, leave=False) as bar:
        return task.grade_all(pairs, workers=options.workers, timeout_s=options.timeout_s, progress=bar.update)


def _judge(
    task: Task, answers: Sequence[tuple[Item, Sequence[tuple[int, str]]]], store: Path, options: Options
) -> tuple[list[list[Grade]], dict]:
    from tqdm import tqdm

    with tqdm(desc=f"judging {task.name}", unit="judgement", disable=None, leave=False) as bar:
        return task.judge_answers(answers, store=store, options=options.judge(), progress=bar.update)


def _writable(text: str | None) -> str | None:
    """Lone surrogates, which JSON escapes can smuggle in, cannot be written as UTF-8."""
    return None if text is None else text.encode("utf-8", "replace").decode("utf-8")


def score_runs(folder: Path, *, options: Options) -> int:
    """Re-score every run below `folder`; print one line a run and task and a last JSON line; return the exit status."""
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}; give the folder that holds the runs, e.g. outputs")
    files = sorted(path for path in folder.rglob("completions/*.jsonl") if not path.name.startswith("."))
    if not files:
        raise UserError(f"no run with completions/<task>.jsonl below {folder}; run eval.generate first")
    loaded: dict = {}
    scored, failed, judged = 0, [], []
    for path in files:
        run = os.path.relpath(path.parent.parent, folder)
        try:
            score = score_file(get_task(path.stem), path, options=options, loaded=loaded)
        except (UserError, OSError) as error:
            failed.append(f"{run}/{path.stem}")
            _mark_one(output_paths(path, None)[0], path)
            print(f"error: {run} {path.stem}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            continue
        scored += 1
        judged += [score] if "judge" in score else []
        metrics = " ".join(f"{name}={value:.4f}" for name, value in score["metrics"].items())
        partial = f" partial ({score['num_missing']} missing)" if score["partial"] else ""
        print(f"{run} {path.stem}: {metrics} n={score['n']} invalid={score['invalid']}{partial}", flush=True)
    print(json.dumps({"scored": scored, "failed": failed}, ensure_ascii=False))
    one_judge(judged)  # several would stand side by side above
    return 2 if failed else 0


def _mark_one(score_path: Path, completions: Path) -> None:
    """Mark the score that stays because its completions could not be graded again, if it no longer holds."""
    try:
        score = read_json(score_path)
    except UserError:
        return  # there is none, or none that could be read as one
    if isinstance(score, dict) and (reason := stale_reason(score, completions=completions)):
        write_json_atomic(score_path, {**score, "stale": reason})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message}; see python -m eval.score --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module."""
    parser = _Parser(prog="python -m eval.score", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--task")
    parser.add_argument("--completions", type=Path)
    parser.add_argument(
        "--data", help="a local json/jsonl/parquet file or a hub name; default: the meta file's, then the task's"
    )
    parser.add_argument("--output", type=Path, help="where the score goes; the grades go beside it")
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--stale", type=Path)
    parser.add_argument("options", nargs="*", metavar="key=value")
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.stale is not None:
        if parsed.options or parsed.runs or parsed.task or parsed.completions or parsed.data or parsed.output:
            raise UserError("--stale DIR takes no other argument")
        return mark_stale(parsed.stale)
    tasks = [get_task(parsed.task)] if parsed.task else list(TASKS.values())
    options = parse_options(parsed.options, tasks)
    if parsed.runs is not None:
        if parsed.task or parsed.completions or parsed.data or parsed.output:
            raise UserError("--runs takes task, completions and data from each run; leave the other arguments out")
        return score_runs(parsed.runs, options=options)
    if not parsed.task or not parsed.completions:
        raise UserError("--task and --completions are needed (or --runs DIR); see python -m eval.score --help")
    score = score_file(
        get_task(parsed.task), parsed.completions, data=parsed.data, output=parsed.output, options=options
    )
    if score["partial"]:
        print(
            f"note: partial: {score['num_missing']} of {score['n'] + score['num_missing']} tasks have no completion; "
            "the metrics are shares of what is there",
            file=sys.stderr,
        )
    print(json.dumps(score, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    run_entry_point(main)
