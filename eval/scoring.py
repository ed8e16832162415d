"""Scoring one completions file: grades an item, the score of them all, and whether a score on disk still holds."""

import dataclasses
import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ba_lora.config.checks import check_place
from ba_lora.config.structured import read_typed
from ba_lora.errors import UserError
from ba_lora.glue import TASKS as GLUE_TASKS
from ba_lora.io import sha256_file, write_json_atomic, write_jsonl_atomic
from ba_lora.rows import is_commit
from eval.completions import (
    PROMPT_TOO_LONG,
    TRUNCATED,
    graded_data,
    judgements_path,
    match_items,
    read_completions,
    read_meta,
    score_paths,
)
from eval.grading.thinking import THINKING, check_marks
from eval.judge.client import JudgeOptions
from eval.tasks import TASKS
from eval.tasks.base import Grade, Item, Source, Task


@dataclass(frozen=True)
class ScoreOptions:
    """What `key=value` can set; `choices` are those of the tasks themselves, see Task.choices."""

    allow_partial: bool = False
    workers: int | None = None
    timeout_s: float = 5.0
    thinking: str = ""  # empty: as the completions were made
    judgements: int = JudgeOptions.judgements
    judge_parallel: int = JudgeOptions.parallel
    judge_timeout_s: float = JudgeOptions.timeout_s
    judge_attempts: int = JudgeOptions.attempts
    judge_temperature: float | None = JudgeOptions.temperature
    judge_max_tokens: int | None = JudgeOptions.max_tokens
    judge_thinking: str = JudgeOptions.thinking
    choices: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("workers", "judgements", "judge_parallel", "judge_attempts", "judge_max_tokens"):
            value = getattr(self, name)
            most = 1024 if name in ("workers", "judge_parallel") else 10**9
            if value is not None and not 1 <= value <= most:
                raise UserError(f"{name}={value}: a whole number of at least 1 and at most {most} is needed")
        for name in ("timeout_s", "judge_timeout_s"):
            if not 0 < getattr(self, name) < 1e6:
                raise UserError(f"{name}={getattr(self, name):g}: a number of seconds above 0 is needed")
        if self.judge_temperature is not None and not 0 <= self.judge_temperature <= 10:
            raise UserError(f"judge_temperature={self.judge_temperature:g}: a number from 0 to 10, or none, is needed")
        if self.thinking:
            check_marks("thinking", self.thinking)
        check_marks("judge_thinking", self.judge_thinking)

    def judge(self) -> JudgeOptions:
        """Return what a judge is told."""
        named = {name.removeprefix("judge_"): value for name, value in vars(self).items() if name.startswith("judge")}
        return JudgeOptions(**named)


def read_options(arguments: Sequence[str], tasks: Sequence[Task]) -> ScoreOptions:
    """Read `key=value` arguments, the choices of `tasks` included. Raises UserError."""
    owners = {key: task for task in reversed(tasks) for key in (*task.choices, *task.grading_choices)}
    options, choices = read_typed(ScoreOptions, arguments, further=owners)
    for key, value in choices.items():
        owners[key].configured({key: value})  # checks the value
    return dataclasses.replace(options, choices=choices)


def score_file(
    task: Task,
    completions_path: Path,
    *,
    data: str | None = None,
    output: Path | None = None,
    options: ScoreOptions | None = None,
    loaded: dict[tuple[str, str | None], tuple[list[Item], Source]] | None = None,
) -> dict:
    """Score one completions file, write score and grades atomically (the score last), return the score.

    loaded: items already read, by (task name, data), shared between calls. The result: task, version, n (items
    scored), num_completions, invalid (completions from which no answer could be read), metrics (fractions),
    interval_95 (bootstrap over items), groups, what the task's `conditions` tell (sandbox, limits, choices),
    partial, num_missing (items), num_truncated (finish_reason "length"), num_prompt_too_long, timeouts,
    grader_errors (completions on which the grader failed; both count as wrong), data,
    data_sha256, completions_sha256, prompt_hash (None where the meta file does not tell), packages (versions the
    grader depends on), grader_seconds; from a judge also ratings and judge (eval/tasks/mt_bench.py).
    Raises UserError; nothing is written then, but judgements, which are paid for.
    """
    options = options or ScoreOptions()
    check_place(score_paths(completions_path, output)[0].parent, "--output")
    completions = read_completions(completions_path)
    completions_sha256 = sha256_file(completions_path)
    meta = read_meta(completions_path)
    if meta.get("completions_sha256") not in (None, completions_sha256):
        raise UserError(
            f"{completions_path.with_name(f'{completions_path.stem}.meta.json')} belongs to other completions: remove "
            "it, or generate again"
        )
    task = choose(task, meta, options)
    made_from = None if data is not None else meta.get("data_sha256")
    data = graded_data(data, meta)
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
        "grader_errors": sum(grade.error is not None for grade in grades),
        "partial": len(matched) < len(items) or len({len(samples) for _, samples in matched}) > 1,
        "num_missing": len(items) - len(matched),
        "data": source.name,
        "data_sha256": source.as_result(),
        "completions_sha256": completions_sha256,
        "prompt_hash": meta.get("prompt_hash"),
        "packages": {name: importlib.metadata.version(name) for name in task.packages},
        "thinking": task.thinking,
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
            **({"error": _writable(grade.error)} if grade.error else {}),
            **_groups(task, item),
        }
        for (item, samples), item_grades in zip(matched, per_item, strict=True)
        for completion, grade in zip(samples, item_grades, strict=True)
    ]
    score_path, grades_path = score_paths(completions_path, output)
    write_jsonl_atomic(grades_path, rows)
    write_json_atomic(score_path, score)
    return score


def _groups(task: Task, item: Item) -> dict[str, dict[str, str]]:
    """Return {"groups": key → the item's value} as `Task.aggregate` groups it; {} for an item of no group."""
    groups = {key: str(item.meta[key]) for key in task.groups if item.meta.get(key) is not None}
    return {"groups": groups} if groups else {}


def choose(task: Task, meta: Mapping, options: ScoreOptions) -> Task:
    """Return the task with the choices that the completions were made with, and over them those of `options`."""
    made = meta.get("choices") or {}
    if not isinstance(made, dict):
        raise UserError(f"the meta file's choices must be a JSON object, found {type(made).__name__}")
    typed = {key: value for key, value in options.choices.items() if key in task.choices or key in task.grading_choices}
    chosen = task.configured({**{key: value for key, value in made.items() if key in task.choices}, **typed})
    chosen.thinking = options.thinking or meta.get("thinking") or THINKING
    return chosen


def stale_reason(score: Mapping, *, completions: Path | None = None) -> str | None:
    """Return why a score no longer holds, None where it does: its grader's version, or the completions, changed."""
    from eval.tasks.glue import VERSION

    name, version = str(score.get("task")), score.get("version")
    is_classifier = "of_task" in score  # also on a set of one's own
    now = VERSION if is_classifier else grader_versions().get(name, {}).get("version", version)
    if version != now:
        return f"graded by version {version} of {name}, which is at version {now} now"
    if completions is not None and completions.is_file():
        if sha256_file(completions) != score.get("completions_sha256"):
            return "the completions have changed since"
    return None


def grader_versions() -> dict[str, dict[str, str | None]]:
    """Return task, or a classifier's set → {"version", "hub"}: the grader's version, the hub set with its commit (None
    for a set of no pinned commit, which cannot be told stale by it)."""
    from eval import inheritance, likelihood
    from eval.tasks.glue import VERSION, own_sets
    from eval.tasks.glue_x import find_set, out_of_domain

    versions: dict[str, dict[str, str | None]] = {}
    for task in GLUE_TASKS:
        for name in (*own_sets(task), *out_of_domain(task)):
            of, _ = find_set(task, name)
            hub = f"{of.hub}@{of.revision}" if of.hub and is_commit(of.revision) else None
            versions[name] = {"version": VERSION, "hub": hub}
    for name, task in TASKS.items():
        hub = f"{task.hub}@{task.hub_revision}" if task.hub and task.hub_revision else None
        versions[name] = {"version": task.version, "hub": hub}
    return versions | {one.NAME: {"version": one.VERSION, "hub": None} for one in (inheritance, likelihood)}


def _grade(task: Task, pairs: Sequence[tuple[Item, str]], options: ScoreOptions) -> list[Grade]:
    from tqdm import tqdm

    with tqdm(total=len(pairs), desc=f"grading {task.name}", unit="completion", disable=None, leave=False) as bar:
        return task.grade_all(pairs, workers=options.workers, timeout_s=options.timeout_s, progress=bar.update)


def _judge(
    task: Task, answers: Sequence[tuple[Item, Sequence[tuple[int, str]]]], store: Path, options: ScoreOptions
) -> tuple[list[list[Grade]], dict]:
    from tqdm import tqdm

    with tqdm(desc=f"judging {task.name}", unit="judgement", disable=None, leave=False) as bar:
        return task.judge_answers(answers, store=store, options=options.judge(), progress=bar.update)


def _writable(text: str | None) -> str | None:
    """Lone surrogates, which JSON escapes can smuggle in, cannot be written as UTF-8."""
    return None if text is None else text.encode("utf-8", "replace").decode("utf-8")
