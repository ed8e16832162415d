"""Two rows of a table on the same items: what their runs left for each item, and the test over seeds and items.

A column is one of three things:

- a mean over items (strict, pass@1, accuracy): an item's value is its grade;
- a metric of all items together (F1, Matthews, Pearson, Spearman, macro-F1, the recall of a class; the perplexity of
  texts; a mean of ratings where a judge left some out): an item's value is the jackknife's pseudo-value of the metric;
- a mean of such columns: each test set is a sample of items by itself, and columns on the same items (of RTE's and of
  QQP's model on MRPC, say) are added item by item.

Grades are read from grades/<task>.jsonl of a run, a classifier's predictions from predictions/ (see
`Sources.predictions`). Either must give the value that stands in the result, or the items count as unknown: then the
interval is that of the seeds only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ba_lora.errors import UserError
from ba_lora.experiments.tables import Row
from ba_lora.glue import find_task
from eval.metrics.bootstrap import weighted_metric
from eval.report.columns import ReportColumn, metric_value
from eval.report.crossed import Array, Estimate, crossed_t, pseudo_values, seeds_t
from eval.report.sources import Sources
from eval.report.spec import PlannedRun, TableSpec
from eval.report.stats import LEAST_SEEDS

if TYPE_CHECKING:
    from eval.report.cells import Cell

TOO_FEW = f"{LEAST_SEEDS} are needed"  # ends why rows with fewer seeds are not tested
NO_GRADES = "no grades at hand"
ROUNDING = 1e-6  # between the value in a result and that of the run's items, relative above 1


class Untested(Exception):
    """Why two rows cannot be tested, in a word or two."""


@dataclass(frozen=True)
class ItemValues:
    """What one run left for the items of a column, in the order of `ids`: values whose mean is the run's value, and the
    labels where there are some, which two runs must share."""

    ids: tuple[str, ...]
    values_N: Array
    labels_N: Array | None = None


class PairedTests:
    """The tests between rows of one table; what the runs left is read once."""

    def __init__(self, spec: TableSpec, sources: Sources, cells: Mapping[tuple[Row, str], "Cell"]) -> None:
        self._spec, self._sources, self._cells = spec, sources, cells
        self._read: dict[tuple[str, str], ItemValues] = {}  # (run, column) → its items
        self._ids: dict[tuple[str, ...], tuple[str, ...]] = {}  # the runs on one set share one tuple

    def test(self, column: ReportColumn, focus: Row, other: Row) -> tuple[Estimate | None, str | None]:
        """Return the estimate of focus − other on the column's scale, and why it is no test: seeds only are in it, or
        they are too few, or nothing varies. No estimate where one row has a single seed."""
        ours, theirs = (self._cells[row, column.name] for row in (focus, other))
        num_seeds = min(len(ours.seeds), len(theirs.seeds))
        if num_seeds < 2:
            return None, "a single seed"
        paired = num_seeds >= LEAST_SEEDS and self._spec.is_paired(focus, other) and ours.seeds == theirs.seeds
        few = None if num_seeds >= LEAST_SEEDS else f"{num_seeds} seeds, {TOO_FEW}"
        try:
            estimate = crossed_t(self._sets(column, focus, other), paired=paired)
            return estimate, "no spread" if estimate.p is None else few
        except Untested as reason:
            values = (np.array(cell.values) for cell in (ours, theirs))
            return seeds_t(*values, paired=paired), str(reason)

    def _sets(self, column: ReportColumn, focus: Row, other: Row) -> list[tuple[Array, Array]]:
        """Return the values of both rows' runs on the items of each test set, [seeds, items]. Raises Untested."""
        seeds = [self._cells[row, column.name].seeds for row in (focus, other)]
        sets: dict[tuple[str, ...], list[Array]] = {}  # the ids of a set → both rows' values on it
        for part in [self._spec.column(name) for name in column.mean_of] or [column]:
            weight = column.scale * part.scale / len(column.mean_of) if column.mean_of else column.scale
            try:
                ids, *both = self._on_common_items(part, (focus, other), seeds)
            except Untested as reason:
                raise Untested(f"{part.label}: {reason}" if column.mean_of else str(reason)) from reason
            before = sets.get(ids, [0.0, 0.0])
            sets[ids] = [sum_ + weight * values for sum_, values in zip(before, both, strict=True)]
        return [(ours, theirs) for ours, theirs in sets.values()]

    def _on_common_items(
        self, column: ReportColumn, rows: Sequence[Row], seeds: Sequence[Sequence[int]]
    ) -> tuple[tuple[str, ...], Array, Array]:
        """Return the items that all runs of the two rows have, and each row's values [seeds, items]."""
        left = [
            [self.items(run, column) for seed in of_row for run in self._spec.planned(row, column) if run.seed == seed]
            for row, of_row in zip(rows, seeds, strict=True)
        ]
        first, *others = [one for of_row in left for one in of_row]
        if any(one.ids != first.ids or not np.array_equal(one.labels_N, first.labels_N) for one in others):
            raise Untested("other items")
        if len(first.ids) < 2:
            raise Untested("a single item")
        return first.ids, *(np.stack([one.values_N for one in of_row]) for of_row in left)

    def items(self, run: PlannedRun, column: ReportColumn) -> ItemValues:
        """Return what the tests know of a run's items in a column. Raises Untested, with the reason."""
        if column.task is None:
            raise Untested("no mean over items")
        key = run.run_id, column.name
        if key not in self._read:
            result = self._sources.result(run)
            score = metric_value(result, column)
            if score is None:
                raise Untested("no value in the score")
            entry = result["evaluation"][column.task]
            is_classifier = "of_task" in entry
            what, read = "grades", self._graded
            if is_classifier:
                what, read = "predictions", self._predicted
            elif column.metric == "perplexity.after":
                what, read = "likelihoods", self._likely
            try:
                items = read(run, column, entry)
            except (UserError, KeyError, TypeError, ValueError) as error:  # not JSON, or not of this kind
                raise Untested(f"{what} cannot be read") from error
            if not _is_near(items.values_N.mean(), score):
                raise Untested(f"{what} are not those of the score")
            self._read[key] = items
        return self._read[key]

    def _graded(self, run: PlannedRun, column: ReportColumn, entry: Mapping[str, Any]) -> ItemValues:
        if column.items is None:
            raise Untested("no mean over items")
        grades = self._sources.grades(run, column.items)
        if grades is None:
            raise Untested(NO_GRADES)
        ids = sorted(grades)
        sums_N, rated_N = np.array([grades[item] for item in ids]).T
        if (rated_N == rated_N[0]).all():
            return ItemValues(self._shared(ids), sums_N / rated_N)
        return _of_metric(self._shared(ids), rated_N, sums_N, _ratio)

    def _likely(self, run: PlannedRun, column: ReportColumn, entry: Mapping[str, Any]) -> ItemValues:
        lines = self._sources.likelihoods(run, column.task)
        if lines is None:
            raise Untested("no likelihoods at hand")
        nll, num_tokens = (np.array([line[name] for line in lines], np.float64) for name in ("nll", "num_tokens"))
        return _of_metric(self._shared([line["task_id"] for line in lines]), num_tokens, nll, perplexity)

    def _predicted(self, run: PlannedRun, column: ReportColumn, entry: Mapping[str, Any]) -> ItemValues:
        task = find_task(entry.get("definition") or entry["of_task"])
        minority = (entry.get("per_class") or {}).get("minority")
        metric = weighted_metric(column.metric, classes=task.labels, minority=minority)
        if metric is None:
            raise Untested("no metric over items")
        lines = self._sources.predictions(run, column.task)
        if lines is None:
            raise Untested("no predictions at hand")
        lines = sorted(lines, key=lambda line: line["task_id"])
        if any(line["prediction"] is None for line in lines):
            raise Untested("predictions are not finite")
        ids = self._shared([line["task_id"] for line in lines])
        labels, predictions = (np.array([line[name] for line in lines]) for name in ("label", "prediction"))
        if column.metric == "accuracy":
            return ItemValues(ids, (labels == predictions).astype(np.float64))
        return _of_metric(ids, labels, predictions, metric)

    def _shared(self, ids: Sequence[str]) -> tuple[str, ...]:
        return self._ids.setdefault(tuple(ids), tuple(ids))


def run_items(
    sources: Sources, column: ReportColumn, runs: Sequence[PlannedRun]
) -> tuple[tuple[str, ...], Array] | None:
    """Return the ids of a column's items and the grades of runs on them, [runs, N]; None where one has none at hand, or
    grades that are not those of its score. Raises UserError where one has other items."""
    found = [None if column.items is None else sources.grades(run, column.items) for run in runs]
    if None in found:
        return None
    for run, grades in zip(runs, found, strict=True):
        if grades.keys() != found[0].keys():
            raise UserError(
                f"{run.run_id} has other items than {runs[0].run_id} for column {column.name}: score both on one file"
            )
    ids = tuple(sorted(found[0]))
    sums_RN, rated_RN = np.array([[grades[item] for item in ids] for grades in found]).transpose(2, 0, 1)
    if not rated_RN.all():
        return None
    values_RN = sums_RN / rated_RN
    for run, values_N in zip(runs, values_RN, strict=True):
        if not _is_near(values_N.mean(), metric_value(sources.result(run), column)):
            return None
    return ids, values_RN


def _is_near(value: float, score: float) -> bool:
    """Whether the value of a run's items is that of its score."""
    return abs(value - score) <= ROUNDING * max(1.0, abs(score))


def _of_metric(
    ids: tuple[str, ...], labels_N: Array, values_N: Array, metric: Callable[[Array, Array, Array], Array]
) -> ItemValues:
    pseudo_N = pseudo_values(metric, labels_N, values_N)
    if pseudo_N is None:
        raise Untested("undefined without one of the items")
    return ItemValues(ids, pseudo_N, None if metric is _ratio else labels_N)


def _ratio(counts_RK: Array, rated_K: Array, sums_K: Array) -> Array:
    """Return the mean of the ratings that were given [R]."""
    return counts_RK @ sums_K / (counts_RK @ rated_K)


def perplexity(counts_RK: Array, num_tokens_K: Array, nll_K: Array) -> Array:
    """Return exp of the mean negative log-likelihood a token [R]."""
    return np.exp(counts_RK @ nll_K / (counts_RK @ num_tokens_K))
