"""The tasks of classifiers: columns, labels, evaluation sets, metrics. GLUE's and the self-made one are files of
configs/nlu/tasks; one of your own is a mapping of the same keys in a configuration (`nlu.task`), with a name:

    {name: tass, text: [text], label: label, labels: [N, NEU, P], metrics: [macro_f1, accuracy]}

Shared by training data (data/nlu.py), the model's head and the evaluation, so that a label means one thing everywhere.
"""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from ba_lora.errors import UserError
from ba_lora.paths import PROJECT_ROOT
from ba_lora.words import YAML_WORDS, holds_bool, nearest

HUB = "nyu-mll/glue"
HUB_REVISION = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
TASKS_PATH = PROJECT_ROOT / "configs" / "nlu" / "tasks"
AUTO = "auto"  # labels: taken from the training file
KEYS = ("name", "text", "label", "labels", "range", "metrics", "dev", "hub", "subset", "sets")
REGRESSION_METRICS = ("pearson", "spearman")


def hub_source(revision: str | None = None) -> str:
    """Return GLUE's name on the hub with the commit that is read: `revision`, else the pinned one."""
    return f"{HUB}@{revision or HUB_REVISION}"


@dataclass(frozen=True)
class NLUTask:
    """One task.

    columns: the text columns, one for single sentences, two for pairs; label: the column of the labels.
    labels: label names by id; empty for regression, and None where they are still to be read from the training file.
    metrics: names of what is reported, the first one chooses the best epoch.
    dev_sets: name of each evaluation set → its split on the hub; the first one chooses the best epoch.
    score_range: of a regression's labels. hub: where the rows live, None for those of files only; subset: its
    configuration there, of GLUE the task's name.
    sets: sets of another domain in columns or labels of their own → {text, label, map: {their label: ours}}.
    definition: the mapping in a configuration, for a task of one's own; None for a named one.
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    dev_sets: dict[str, str]
    score_range: tuple[float, float] | None = None
    label: str = "label"
    hub: str | None = None
    subset: str | None = None
    sets: dict[str, dict[str, Any]] = field(default_factory=dict)
    definition: dict[str, Any] | None = None

    @property
    def is_own(self) -> bool:
        """Whether a configuration describes it."""
        return self.definition is not None

    def hub_rows(self, revision: str | None = None) -> str | None:
        """Return the set on the hub with the commit that is read: `revision`, else GLUE's pinned one; None without."""
        if self.hub is None or self.hub == HUB:
            return self.hub and hub_source(revision)
        return f"{self.hub}@{revision}" if revision else self.hub

    @property
    def is_regression(self) -> bool:
        return self.score_range is not None

    @property
    def num_labels(self) -> int:
        """The number D of logits: one a class, or one for regression."""
        return max(len(self.labels or ()), 1)

    def label_id(self, value: Any) -> int | None:
        """Return the id of a label as it stands in a file; None where it is none of the labels.

        It is a name, a number equal to a name (1.0 and 1), or, where no name is a number, an id.
        """
        text = plain_label(value)
        if not text:
            return None
        if isinstance(value, bool):
            names = [name.lower() for name in self.labels]
            return names.index(text) if text in names else None
        if text in self.labels:
            return self.labels.index(text)
        number, names = _number(text), [_number(name) for name in self.labels]
        known = range(len(names)) if all(name is None for name in names) else names
        return known.index(number) if number is not None and number in known else None


def plain_label(value: Any) -> str:
    """Return a label as a name: its text without blanks around it, 1 for 1.0, true for JSON's true; "" for a missing
    one (null, or a number that is none)."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def parse_task(plain: Mapping[str, Any], where: str, *, name: str | None = None) -> NLUTask:
    """Return the task that a mapping describes; `name` is that of a named one. Raises UserError naming `where`."""

    def refuse(reason: str) -> UserError:
        return UserError(f"{where}: {reason}")

    if unknown := [key for key in plain if key not in KEYS]:
        raise refuse(f"unknown key {unknown[0]}{nearest(str(unknown[0]), KEYS)}; a task has {', '.join(KEYS)}")
    for key, value in plain.items():
        if holds_bool(value):
            raise refuse(f"{key}={value}: {YAML_WORDS}")
    given = name or plain.get("name")
    if not _is_file_name(given):
        raise refuse(f"name={given}: {FILE_NAME}")
    if name is None and given in TASKS:
        raise refuse(f"name={given} is the name of a task of configs/nlu/tasks: give yours another one")
    columns = _words(plain.get("text"))
    if columns is None or len(columns) not in (1, 2):
        raise refuse("text must name the column of the text, or the two columns of a pair: text: [premise, hypothesis]")
    if len(set(columns)) < len(columns):
        raise refuse(f"text names the column {columns[0]} twice: a pair has two")
    label = plain.get("label", "label")
    if not isinstance(label, str):
        raise refuse(
            f"label={label}: the name of one column is needed (several labels a row are not supported: train one task "
            "for each label)"
        )
    if label in columns:
        raise refuse(f"label={label} is a column of the text: name that of the labels")
    if (plain.get("labels") is None) == (plain.get("range") is None):
        raise refuse("give labels (a list, or auto) for classes, or range: [LOW, HIGH] for a regression")
    labels, score_range = (), None
    if plain.get("range") is not None:
        score_range = _range(plain["range"], refuse)
    elif plain["labels"] == AUTO:
        labels = None
    else:
        labels = _labels(plain["labels"], refuse)
    usual = REGRESSION_METRICS if score_range else ("accuracy", "macro_f1")
    metrics = _words(plain.get("metrics") or list(usual))
    if not metrics or any((metric in REGRESSION_METRICS) != (score_range is not None) for metric in metrics):
        kind = "a regression has pearson and spearman" if score_range else "pearson and spearman are a regression's"
        raise refuse(f"metrics={plain.get('metrics')}: a list of metrics is needed, and {kind}")
    if "f1" in metrics and labels is not None and len(labels) != 2:
        raise refuse(f"metrics: f1 is of two classes, and there are {len(labels)}: use macro_f1")
    dev = plain.get("dev") or {given: "validation"}
    if not isinstance(dev, Mapping) or not all(_is_file_name(key) for key in dev):
        raise refuse(f"dev={dev}: a mapping of names is needed; of a name, {FILE_NAME}")
    if not all(isinstance(split, str) and split for split in dev.values()):
        raise refuse(f"dev={dict(dev)}: each name leads to a split of the hub's set, such as validation")
    sets = _sets(plain.get("sets") or {}, columns, labels, score_range is not None, refuse)
    hub, subset = plain.get("hub"), plain.get("subset")
    if not all(word is None or isinstance(word, str) for word in (hub, subset)) or (subset and not hub):
        raise refuse(f"hub={hub}, subset={subset}: hub is OWNER/NAME, and subset one of its configurations")
    return NLUTask(
        name=given,
        columns=columns,
        labels=labels,
        metrics=metrics,
        dev_sets=dict(dev),
        score_range=score_range,
        label=label,
        hub=hub,
        subset=subset or (given if hub == HUB else None),
        sets=sets,
        definition=dict(plain) if name is None else None,
    )


FILE_NAME = "a word of letters, digits, - and _ is needed; it becomes part of files' names"


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and value.replace("_", "").replace("-", "").isalnum()


def _sets(
    plain: Any, columns: tuple[str, ...], labels: tuple[str, ...] | None, is_regression: bool, refuse: Any
) -> dict[str, dict[str, Any]]:
    """Return the sets of another domain, keys that are null left out."""
    if not isinstance(plain, Mapping) or not all(_is_file_name(other) for other in plain):
        raise refuse(f"sets={plain}: a mapping of names is needed; of a name, {FILE_NAME}")
    found = {}
    for other, form in plain.items():
        if not isinstance(form, Mapping) or set(form) - {"text", "label", "map"}:
            raise refuse(f"sets.{other} may have text, label and map: {{their label: ours}}")
        form = found[other] = {key: value for key, value in form.items() if value is not None}
        if "text" in form and len(_words(form["text"]) or ()) != len(columns):
            raise refuse(f"sets.{other}.text={form['text']}: as many columns as text has are needed, {len(columns)}")
        if not isinstance(form.get("label", ""), str):
            raise refuse(f"sets.{other}.label={form['label']}: the name of one column is needed")
        if "map" not in form:
            continue
        if not isinstance(form["map"], Mapping) or not form["map"] or is_regression:
            classes = "a regression has no labels to map" if is_regression else "{their label: ours} is needed"
            raise refuse(f"sets.{other}.map={form['map']}: {classes}")
        for ours in form["map"].values():
            if labels is not None and plain_label(ours) not in labels:
                raise refuse(f"sets.{other}.map leads to {ours}, which is none of the labels {', '.join(labels)}")
    return found


def _words(value: Any) -> tuple[str, ...] | None:
    values = [value] if isinstance(value, str) else value
    return tuple(values) if isinstance(values, list | tuple) and all(isinstance(v, str) for v in values) else None


def _range(value: Any, refuse: Any) -> tuple[float, float]:
    numbers = isinstance(value, list | tuple) and len(value) == 2
    if not numbers or not all(type(v) in (int, float) for v in value) or not -math.inf < value[0] < value[1] < math.inf:
        raise refuse(f"range={value}: two numbers, the lower first, are needed: range: [0, 5]")
    return float(value[0]), float(value[1])


def _labels(value: Any, refuse: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or any(isinstance(v, list | dict) or v is None for v in value):
        raise refuse(f"labels={value}: a list of names is needed, or auto")
    labels = tuple(map(plain_label, value))
    if len(labels) < 2:
        raise refuse(f"labels={list(labels)}: at least two classes are needed")
    if not all(labels):
        raise refuse(f"labels={list(labels)}: one of them is empty, as the label of a row without one")
    if len({label.lower() for label in labels}) < len(labels):
        raise refuse(f"labels={list(labels)}: two of them are alike but for capitals")
    numbers = [number for number in map(_number, labels) if number is not None]
    if len(set(numbers)) < len(numbers):
        raise refuse(f"labels={list(labels)}: two of them are the same number")
    return labels


def _named(name: str) -> NLUTask:
    path = TASKS_PATH / f"{name}.yaml"
    return parse_task(yaml.safe_load(path.read_text(encoding="utf-8")), str(path), name=name)


class _NamedTasks(Mapping[str, NLUTask]):
    """The files of configs/nlu/tasks, each read when it is asked for."""

    def __init__(self) -> None:
        self._read = functools.cache(_named)
        self._names = sorted(path.stem for path in TASKS_PATH.glob("*.yaml"))

    def __getitem__(self, name: str) -> NLUTask:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self):  # noqa: ANN204
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


TASKS: Mapping[str, NLUTask] = _NamedTasks()


# Task → the sets of GLUE-X on which a model tuned on it is evaluated as it is (eval/tasks/glue_x.py knows how).
OUT_OF_DOMAIN = {
    "sst2": ("imdb", "yelp", "amazon", "flipkart"),
    "cola": ("grammar_test",),
    "mnli": ("mnli_mm", "snli", "sick"),
    "qnli": ("newsqa",),
    "rte": ("mrpc", "qqp", "hans", "scitail"),
    "mrpc": ("qqp", "rte", "hans", "twitter"),
    "qqp": ("mrpc", "rte", "hans", "twitter"),
    "stsb": ("sick",),
}


def task_word(task: str | Mapping[str, Any]) -> str:
    """Return a task as one word of a command line, which `find_task` reads: its name, or its mapping as JSON."""
    return task if isinstance(task, str) else json.dumps(task, ensure_ascii=False)


def find_task(task: str | Mapping[str, Any]) -> NLUTask:
    """Return the task of a name, of a mapping, or of a mapping as JSON text. Raises UserError naming the tasks."""
    if isinstance(task, str) and task.startswith("{"):
        try:
            task = json.loads(task)
        except ValueError as error:
            raise UserError(f"the task {task:.60} is no JSON mapping: {error}") from error
    if isinstance(task, Mapping):
        return parse_task(task, "nlu.task")
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}: choose one of {', '.join(TASKS)}")
    return TASKS[task]
