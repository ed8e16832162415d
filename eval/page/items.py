"""The answers of a run to one task: what was asked, answered, extracted and judged, one entry an answer.

Each file is optional. What is gone or damaged is named in `Answers.missing`, and the rest is shown.

    completions/<task>.jsonl   prompt, completion, finish reason
    grades/<task>.jsonl        metrics, what was extracted, gold, groups; of code the program and the sandbox's verdict
    judgements/<task>.jsonl    MT-Bench: each judgement's text
    predictions/<set>.jsonl    a classifier's label, prediction and logits (best.jsonl: its dev sets)
    dev_texts.jsonl            the texts of dev rows that were generated for the run
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ba_lora.config.schema import HARNESS, RUN_MEASURES
from ba_lora.errors import UserError
from ba_lora.io import read_jsonl, sha256_file
from ba_lora.prompts import build_conversation
from ba_lora.runs.folder import DEV_TEXTS
from eval.grading.thinking import THINKING, cut_thinking
from eval.judge.store import short_sha256

Entry = Mapping[str, Any]  # one task's part of a result's "evaluation"


@dataclass
class Answers:
    """The answers to one task, in the files' order.

    kind: "text", "code", "judged" or "classes"; metrics: the names that some answer has; rows: one an answer, see
    `_row`; missing: what is not at hand, a sentence each.
    """

    task: str
    kind: str = "text"
    metrics: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def has_answers(task: str) -> bool:
    """Whether a run has answers to a task of its evaluation: measures of the run itself and the harness keep none."""
    return not task.startswith(HARNESS) and task.rpartition("/")[2] not in RUN_MEASURES  # at a lower rank: ranks/4/…


def read_answers(run_path: Path, task: str, entry: Entry) -> Answers:
    """Return what a run's folder holds of its answers to `task`, whose score is `entry`. Never raises UserError."""
    if "of_task" in entry:
        return _predicted(run_path, task, entry)
    if task.startswith("ranks/"):  # of the run at a lower rank, which keeps its own
        rank, _, asked = task.rpartition("/")
        return replace(read_answers(run_path / rank, asked, entry), task=task)
    answers = Answers(task)
    places = [run_path / folder / f"{task}.jsonl" for folder in ("completions", "grades")]
    if not any(place.is_file() for place in places):
        return Answers(task, missing=["no completions and no grades at hand"])
    completions, grades = (_read(place, answers, place.parent.name) for place in places)
    frame = _Frame(str(_mapping(entry.get("generation")).get("template") or "alpaca"))
    texts = {_key(line): line for line in completions}
    graded = {_key(line): line for line in grades}
    for key in dict.fromkeys([*texts, *graded]):
        answers.rows.append(_row(key, texts.get(key, {}), graded.get(key, {}), frame))
    _tell_change(answers, completions, places[0], entry.get("completions_sha256"))
    if completions and grades and (left := len(texts.keys() ^ graded.keys())):
        answers.missing.append(f"{left} answers stand in only one of completions and grades")
    if task == "mt_bench" or "judge" in entry:
        answers.kind = "judged"
        _add_judgements(run_path, answers, thinking=entry.get("thinking") or THINKING)
    elif any("program" in row["extracted"] for row in answers.rows):
        answers.kind = "code"
    answers.metrics = list(dict.fromkeys(name for row in answers.rows for name in row["metrics"]))
    return answers


def _key(line: Mapping[str, Any]) -> tuple[str, int]:
    sample = line.get("sample", 0)
    return str(line.get("task_id")), sample if isinstance(sample, int) else 0


def _read(path: Path, answers: Answers, what: str) -> list[dict[str, Any]]:
    if not path.is_file():
        answers.missing.append(f"no {what} at hand")
        return []
    try:
        return read_jsonl(path)
    except UserError as error:
        answers.missing.append(f"{what} cannot be read: {error}")
        return []


def _tell_change(answers: Answers, lines: Sequence[Any], path: Path, graded: str | None) -> None:
    """Say where a file that was read is not the one with the hash that its score names."""
    if lines and graded is not None and sha256_file(path) != graded:
        answers.missing.append(f"the {path.parent.name} have changed since they were graded")


def _row(key: tuple[str, int], text: Mapping[str, Any], grade: Mapping[str, Any], frame: "_Frame") -> dict[str, Any]:
    """Return an answer: id, sample, question, prompt, completion, finish, gold, metrics, extracted, groups, invalid,
    timeout, error. None: not at hand."""
    prompt = _text(text.get("prompt"))
    return {
        "id": key[0],
        "sample": key[1],
        "question": frame.question(prompt),
        "prompt": prompt,
        "completion": _text(text.get("completion")),
        "finish": _text(text.get("finish_reason")),
        "gold": _text(grade.get("gold")),
        "metrics": {str(k): v for k, v in _mapping(grade.get("metrics")).items() if isinstance(v, int | float)},
        "extracted": {str(k): _text(v) for k, v in _mapping(grade.get("extracted")).items()},
        "groups": {str(k): _text(v) for k, v in _mapping(grade.get("groups")).items()},
        "invalid": bool(grade.get("invalid")),
        "timeout": bool(grade.get("timeout")),
        "error": _text(grade.get("error")),
        "is_graded": bool(grade),
    }


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else str(value)


class _Frame:
    """What a prompt template puts around a question, of a first turn and of a later one."""

    def __init__(self, template: str) -> None:
        self.first, self.later = ("", ""), ""
        try:
            first = build_conversation(["\0"], [], template=template).split("\0")
            both = build_conversation(["\0", "\0"], ["\0"], template=template).split("\0")
        except UserError:  # a template of another version of the project: prompts are shown whole
            return
        if len(first) == 2 and len(both) == 4:
            self.first, self.later = (first[0], first[1]), both[2]

    def question(self, prompt: str | None) -> str | None:
        """Return the question that a prompt asks, of several turns the last one; the prompt where it has no frame."""
        if prompt is None:
            return None
        before, after = self.first
        if not (prompt.startswith(before) and prompt.endswith(after) and len(prompt) >= len(before) + len(after)):
            return prompt
        middle = prompt[len(before) : len(prompt) - len(after)]
        return middle.rpartition(self.later)[2] if self.later else middle


def _add_judgements(run_path: Path, answers: Answers, *, thinking: str) -> None:
    """Give each answer its judgements, found by the hash of the very text that was judged (eval/judge/store.py)."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for line in _read(run_path / "judgements" / f"{answers.task}.jsonl", answers, "judgements"):
        key = tuple(str(line.get(name)) for name in ("question_id", "turn", "answer_hash"))
        kept = {name: _text(line.get(name)) for name in ("judge", "judge_version", "judgement", "finish_reason")}
        found.setdefault(key, []).append({**kept, "index": line.get("index")})
    texts = {
        (row["id"], row["sample"]): cut_thinking(row["completion"] or "", thinking).strip() for row in answers.rows
    }
    for row in answers.rows:
        parts = row["id"].split("/")
        if len(parts) != 3 or not parts[1].isdecimal() or not parts[2].removeprefix("turn").isdecimal():
            continue
        turn = int(parts[2].removeprefix("turn"))
        shown = [texts.get(("/".join([*parts[:2], f"turn{n}"]), row["sample"]), "") for n in range(1, turn + 1)]
        row["judgements"] = found.get((str(int(parts[1])), str(turn), short_sha256("\0".join(shown))), [])


def _predicted(run_path: Path, task: str, entry: Entry) -> Answers:
    """Return a classifier's predictions on one set as answers: the labels by name, the softmax of the logits."""
    from ba_lora.glue import find_task, task_word

    answers = Answers(task, kind="classes")
    name = f"{task}.jsonl" if "predictions_sha256" in entry else "best.jsonl"
    path = run_path / "predictions" / name
    lines = _read(path, answers, "predictions")
    _tell_change(answers, lines, path, entry.get("predictions_sha256"))
    lines = [line for line in lines if _is_of(line, task)]
    try:
        word = task_word(entry.get("definition") or str(entry["of_task"]))
        of = find_task(word)
    except UserError as error:
        answers.missing.append(str(error))
        return answers
    texts = _texts(run_path, task, entry, answers, of_task=word) if lines else {}
    for line in lines:
        label, prediction, logits = line.get("label"), line.get("prediction"), line.get("logits")
        row = _row(_key(line), {}, {}, _Frame("alpaca"))
        row |= {"gold": _label(label, of), "question": texts.get(row["id"]), "completion": _label(prediction, of)}
        row |= {"is_graded": isinstance(label, int | float), "invalid": prediction is None}
        if not of.is_regression:
            row["probabilities"] = _softmax(logits, of.labels)
            row["metrics"] = {"correct": float(prediction == label)} if row["is_graded"] else {}
        elif row["is_graded"] and isinstance(prediction, int | float):
            row["metrics"] = {"error": abs(float(prediction) - float(label))}
        answers.rows.append(row)
    if unlabelled := sum(not row["is_graded"] for row in answers.rows):
        answers.missing.append(f"{unlabelled} predictions have no label")
    answers.metrics = ["error"] if of.is_regression else ["correct"]
    return answers


def _label(value: Any, of: Any) -> str | None:
    if value is None or of.is_regression or not isinstance(value, int) or not 0 <= value < len(of.labels):
        return None if value is None else str(value)
    return str(of.labels[value])


def _softmax(logits: Any, labels: Sequence[str]) -> dict[str, float]:
    if (
        not isinstance(logits, list)
        or len(logits) != len(labels)
        or not all(isinstance(x, int | float) for x in logits)
    ):
        return {}
    weights = [math.exp(x - max(logits)) for x in logits]
    return {str(label): round(weight / sum(weights), 4) for label, weight in zip(labels, weights, strict=True)}


def _texts(run_path: Path, task: str, entry: Entry, answers: Answers, *, of_task: str) -> dict[str, str]:
    """Return task_id → the text or texts of a set's rows: the run's own copy of generated ones, others read again from
    where it had them.

    A dev set that is a share of the training rows has their numbers, and its texts are read from their file.
    """
    from ba_lora.config.layers import load_run

    try:
        if kept := _kept_texts(run_path, task):
            return kept
        given = entry.get("data")
        if not isinstance(given, str):
            config = load_run(run_path)
            given = config.data.dev.get(task) or (config.eval.data or {}).get(task)
            if given is None and config.data.dev_share is not None and isinstance(config.data.source, str):
                given = config.data.source
        return _texts_of_set(of_task, task, given)
    except (UserError, OSError) as error:
        answers.missing.append(f"the texts of {task} are not at hand: {error}")
        return {}


def _kept_texts(run_path: Path, task: str) -> dict[str, str]:
    path = run_path / DEV_TEXTS
    lines = [line for line in read_jsonl(path) if _is_of(line, task)] if path.is_file() else []
    return {
        line["task_id"]: "\n\n".join(map(str, line["texts"])) for line in lines if isinstance(line.get("texts"), list)
    }


def _is_of(line: Mapping[str, Any], task: str) -> bool:
    return str(line.get("task_id")).startswith(f"{task}/")


_FOUND: dict[tuple[str, str, str | None], dict[str, str] | UserError] = {}  # each set is read once a process


def _texts_of_set(of_task: str, name: str, given: str | None) -> dict[str, str]:
    from ba_lora.glue import find_task
    from ba_lora.paths import resolve_data
    from eval.tasks.glue import to_examples
    from eval.tasks.glue_x import find_set

    key = (of_task, name, given)
    if key not in _FOUND:
        try:
            of, label_map = find_set(of_task, name)
            rows, source = of.load(None if given is None else resolve_data(given))
            read = to_examples(rows, of, task=find_task(of_task), label_map=label_map, source=source.name)
            _FOUND[key] = {example.task_id: "\n\n".join(example.texts) for example in read.examples}
        except UserError as error:
            _FOUND[key] = error
    found = _FOUND[key]
    if isinstance(found, UserError):
        raise found
    return found
