"""Labelled sets for evaluating a classifier: GLUE's dev sets, and how rows of any set become examples of a task.

A set has its own columns and its own label names; a label map, one for each pair of task and set, says what such a
label means to the task. Both are written out (here, and in glue_x.py for the sets of another domain), so that a label
that nobody thought of is an error and never a wrong class.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ba_lora.errors import UserError
from ba_lora.glue import HUB, HUB_REVISION, NLUTask, find_task, plain_label
from ba_lora.rows import Source, load_rows

VERSION = "1"  # of the sets, maps and metrics; bumped whenever some row's gold label or a score's value changes
UNLABELLED = (None, "")  # of any set; NaN has become None
UNLABELLED_OF_GLUE = (*UNLABELLED, -1, "-")  # GLUE's test splits and SNLI's rows without a majority


@dataclass(frozen=True)
class ScoreColumn:
    """The labels of a regression: numbers from `low` to `high` in one of `columns`; gold = number + offset."""

    columns: tuple[str, ...]
    low: float
    high: float
    offset: float = 0.0


@dataclass(frozen=True)
class EvaluationSet:
    """One labelled set.

    texts: text columns, and further names that published versions of the set have for them; labels: likewise.
    classes: raw label → the set's own class name. score: instead, for a regression.
    hub, config, revision, split: where it lives; hub None: only local files.
    """

    name: str
    texts: tuple[tuple[str, ...], ...]
    classes: Mapping[int | str, str] = field(default_factory=dict)
    labels: tuple[str, ...] = ("label",)
    score: ScoreColumn | None = None
    hub: str | None = None
    config: str | None = None
    revision: str | None = None
    split: str = "test"

    def load(self, data: str | None = None) -> tuple[list[dict], Source]:
        """Return the rows of `data` (local file, hub name, `name@revision`; None: the set's place on the hub)."""
        if data is None and self.hub is None:
            raise UserError(f"{self.name} has no place on the hub: give a local file, --data {self.name}=FILE")
        default = f"{self.hub}@{self.revision}" if self.revision else self.hub
        return load_rows(
            data or default, split=self.split, configs=lambda name: (self.config if name == self.hub else None,)
        )


@dataclass(frozen=True)
class Example:
    """One row: one text or two, and its label, the task's class name or a number."""

    task_id: str  # "<set>/<row from 0>"
    texts: tuple[str, ...]
    label: str | float


@dataclass(frozen=True)
class Examples:
    """The labelled rows of a set, in order, and what was counted on the way.

    num_empty: of the examples, those with an empty text (they are evaluated all the same).
    """

    examples: list[Example]
    num_unlabelled: int
    num_empty: int


def class_names(names: Sequence[str]) -> dict[int | str, str]:
    """Return the raw labels of classes that a set numbers from 0, or writes out by name."""
    return {**dict(enumerate(names)), **{name: name for name in names}}


def own_sets(name: str) -> dict[str, EvaluationSet]:
    """Return the dev sets of a task (its name, or its mapping as JSON): of MNLI, matched and mismatched."""
    task = find_task(name)
    hub = {"hub": HUB, "config": task.name, "revision": HUB_REVISION} if task.hub == HUB else {}
    return {set_name: set_of(task, set_name, split=split, **hub) for set_name, split in task.dev_sets.items()}


def set_of(task: NLUTask, name: str, *, split: str = "test", **hub: str) -> EvaluationSet:
    """Return a set in the columns and labels of a task, or in those that the task's `sets` names for it."""
    form = task.sets.get(name, {})
    columns, label = form.get("text", task.columns), form.get("label", task.label)
    columns = (columns,) if isinstance(columns, str) else tuple(columns)
    score = ScoreColumn((label,), *task.score_range) if task.is_regression else None
    classes = class_names(task.labels)
    if task.is_own and not task.is_regression:
        names = [plain_label(raw) for raw in form["map"]] if "map" in form else task.labels
        named = {_plain(name): name for name in names}
        classes = named if "map" in form or any(isinstance(raw, int | float) for raw in named) else classes | named
    return EvaluationSet(name, (columns,), classes, labels=(label,), score=score, split=split, **hub)


def to_examples(
    rows: Sequence[dict], of: EvaluationSet, *, task: NLUTask, label_map: Mapping[str, str], source: str
) -> Examples:
    """Return the rows of the set `of` as examples of `task`.

    label_map: the set's class name → the task's; ignored for a regression. Rows without a label are left out and
    counted. Raises UserError, naming `source` and the row, for absent columns, text that is no text and labels that the
    set does not have; also where no row has a label.
    """
    columns = _find_columns(rows, of, source=source)
    label_column = _find_label(rows, of, source=source)
    unlabelled = UNLABELLED if task.is_own else UNLABELLED_OF_GLUE
    examples, num_unlabelled, num_empty = [], 0, 0
    for index, row in enumerate(rows):
        raw = _plain(_cell(row, label_column, source=source, index=index))
        if raw in unlabelled:
            num_unlabelled += 1
            continue
        if task.is_regression:
            label = _score(raw, of.score, source=source, index=index)
        else:
            label = label_map[_class(raw, of, source=source, index=index)]
        texts = tuple(_text(row, column, source=source, index=index) for column in columns)
        num_empty += not all(text.strip() for text in texts)
        examples.append(Example(f"{of.name}/{index}", texts, label))
    if not examples:
        raise UserError(f"{source}: none of the {len(rows)} rows has a label; give a labelled split of {of.name}")
    return Examples(examples, num_unlabelled, num_empty)


def _find_columns(rows: Sequence[dict], of: EvaluationSet, *, source: str) -> tuple[str, ...]:
    for columns in of.texts:
        if all(column in rows[0] for column in columns):
            return columns
    wanted = " or ".join(" and ".join(columns) for columns in of.texts)
    raise UserError(f"{source}: {of.name} needs the columns {wanted}; found: {', '.join(map(str, rows[0]))}")


def _find_label(rows: Sequence[dict], of: EvaluationSet, *, source: str) -> str:
    columns = of.score.columns if of.score else of.labels
    for column in columns:
        if column in rows[0]:
            return column
    raise UserError(
        f"{source}: {of.name} needs a label column called {' or '.join(columns)}; found: {', '.join(map(str, rows[0]))}"
    )


def _cell(row: dict, column: str, *, source: str, index: int) -> object:
    if column not in row:
        raise UserError(f"{source}, row {index}: the column {column} is missing; every row needs it")
    return row[column]


def _text(row: dict, column: str, *, source: str, index: int) -> str:
    value = _cell(row, column, source=source, index=index)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{source}, row {index}: column {column} must be text, found {value!r:.60}")
    return value


def _plain(raw: object) -> object:
    """Return 1 for 1.0 and "1", and text in lower case without space around it, of true and false too: files differ in
    such things."""
    if isinstance(raw, bool):
        return str(raw).lower()
    if isinstance(raw, str):
        text = raw.strip().lower()
        try:
            raw = float(text)
        except ValueError:
            return text
    if isinstance(raw, float) and raw.is_integer():
        return int(raw)
    return None if raw != raw else raw  # NaN, pandas' missing value


def _class(raw: object, of: EvaluationSet, *, source: str, index: int) -> str:
    if not isinstance(raw, int | float | str) or raw not in of.classes:
        known = ", ".join(str(label) for label in of.classes)
        raise UserError(f"{source}, row {index}: {raw!r:.60} is no label of {of.name}; its labels are {known}")
    return of.classes[raw]


def _score(raw: object, column: ScoreColumn, *, source: str, index: int) -> float:
    if not isinstance(raw, int | float) or not column.low <= raw <= column.high:
        raise UserError(
            f"{source}, row {index}: {raw!r:.60} is no score: a number from {column.low:g} to {column.high:g} is needed"
        )
    return raw + column.offset
