"""A report's columns: where a value stands in a result, how it is shown, and why it is missing."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PERCENT = 100.0


@dataclass(frozen=True)
class Items:
    """The graded items whose mean a column shows: all of a task, or those whose `group` is one of `members`."""

    task: str
    metric: str
    group: str | None = None
    members: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReportColumn:
    """A column: where its value stands in a result, and how it is shown.

    task: the evaluation that holds it (None: the result itself); metric: a name among the task's metrics, or a dotted
    path (see `metric_value`); mean_of: the columns whose mean it is, instead; scale: the value shown is the stored one
    times this; better: the direction that is ranked, "none" for no ranking and no test; paper: (task, metric) in the
    paper's file; allow: the settings that may differ in this column.
    """

    name: str
    label: str
    task: str | None = None
    metric: str | None = None
    mean_of: tuple[str, ...] = ()
    unit: str = "%"
    scale: float = PERCENT
    decimals: int = 2
    better: str = "higher"
    paper: tuple[str, str] | None = None
    allow: tuple[str, ...] = ()

    @property
    def items(self) -> Items | None:
        """The items whose grades have the column's value as their mean; None where it is no mean over items."""
        if self.task is None or self.metric is None:
            return None
        if re.fullmatch(r"[^.{}]+", self.metric):
            return Items(self.task, self.metric)
        found = re.fullmatch(r"groups\.([^.{}]+)\.(?:\{([^}]*)\}|([^.{}]+))\.metrics\.([^.{}]+)", self.metric)
        if found is None:
            return None
        members = tuple(name.strip() for name in (found[2] or found[3]).split(","))
        return Items(self.task, found[4], group=found[1], members=members)

    @property
    def is_cost(self) -> bool:
        """Whether the value depends on the hardware: a time or a memory."""
        return re.search(r"(seconds|_mb|_per_second)$", self.metric or "") is not None


def metric_value(result: Mapping[str, Any], column: ReportColumn) -> float | None:
    """Return the number that a result holds for a column, unscaled; None where nothing (or null) stands there.

    A path is read from the task's entry, or from the result where the column has no task. `{a,b}` in it takes the mean
    over the alternatives, each weighted by its `n` where all have one (so that the mean over groups of items is the
    mean over their items); one that is missing makes the whole None.
    """
    node: Any = result
    if column.task is not None:
        node = (result.get("evaluation") or {}).get(column.task) or {}
        metrics = node.get("metrics") or {}
        node = metrics if column.metric in metrics else node
    return _resolve(node, re.findall(r"\{[^}]*\}|[^.{}]+", column.metric or ""))[0]


def why_missing(result: Mapping[str, Any], column: ReportColumn) -> tuple[str, str] | None:
    """Return (status, reason) of a run that has no number for a column and will have none.

    The status is "undefined" where the data leave the metric undefined, "unmeasured" where nothing was measured. None
    where the evaluation is yet to be made, and where the column does not apply to the run.
    """
    if column.task is not None:
        entry = (result.get("evaluation") or {}).get(column.task)
        if not entry:
            return None
        notes, metric = entry.get("notes") or {}, column.metric or ""
        note = notes.get(metric) or notes.get(metric.removeprefix("per_class."))
        return ("undefined", note.removeprefix("undefined: ")) if note else ("unmeasured", f"its score has no {metric}")
    *keys, last = (column.metric or "").split(".")
    node: Any = result
    for key in keys:
        node = node.get(key) if isinstance(node, Mapping) else None
    if not isinstance(node, Mapping) or last not in node:
        return None
    resumed = node.get("resumed_from")
    return "unmeasured", f"the training was resumed from {resumed}" if resumed else f"the run gave no {last}"


def _resolve(node: Any, keys: Sequence[str]) -> tuple[float | None, int | None]:
    """Return (value, the nearest n above it)."""
    count = None
    for position, key in enumerate(keys):
        if not isinstance(node, Mapping):
            return None, count
        count = node.get("n", count)
        if key.startswith("{"):
            names = [name.strip() for name in key[1:-1].split(",")]
            found = [_resolve(node.get(name), keys[position + 1 :]) for name in names]
            if any(value is None for value, _ in found):
                return None, count
            weights = [weight if all(n for _, n in found) else 1 for _, weight in found]
            return sum(w * value for w, (value, _) in zip(weights, found, strict=True)) / sum(weights), sum(weights)
        node = node.get(key)
    is_number = isinstance(node, int | float) and not isinstance(node, bool)
    return (float(node) if is_number else None), count
