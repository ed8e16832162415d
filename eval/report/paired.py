"""Two rows of a table on the same items: what their runs left for each item, and the paired bootstrap over it.

A column is one of three things:

- a mean over items (strict, pass@1, accuracy): each item counts by its grade, averaged over the seeds; where a judge
  left answers of a run unrated, that run's mean is the sum of the ratings that were drawn over their number;
- a metric of all items together (F1, Matthews, Pearson, Spearman, macro-F1, the recall of a class; the perplexity of
  texts): on each draw of items it is computed anew for every run of both rows, and averaged over the seeds of a row;
- a mean of such columns: the items of each test set are drawn by themselves, and columns on the same items (of RTE's
  and of QQP's model on MRPC, say) share the draw.

Grades are read from grades/<task>.jsonl of a run, a classifier's predictions from predictions/ (see
`Sources.predictions`). Either must give the value that stands in the result, or nothing is tested.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ba_lora.glue import find_task
from ba_lora.tables import Row
from eval.metrics.bootstrap import weighted_metric
from eval.report.sources import Sources
from eval.report.spec import Column, PlannedRun, TableSpec, metric_value
from eval.report.stats import Array, Interval, Sample, paired_bootstrap

if TYPE_CHECKING:
    from eval.report.table import Cell

NO_GRADES = "no grades at hand"
ROUNDING = 1e-6  # between the value in a result and that of the run's items, relative above 1


class Untested(Exception):
    """Why two rows cannot be tested, in a word or two."""


@dataclass(frozen=True)
class _Items:
    """What one run left for the items of a column, in the order of `ids`.

    values: grades; where `metric` is no mean over items, predictions, with their labels, or the texts' negative
    log-likelihoods, with their numbers of tokens as labels. rated: how many
    grades each item's value is the sum of, 0 to its number of turns; None where all have the same and values are means.
    """

    ids: tuple[str, ...]
    values_N: Array
    labels_N: Array | None = None
    rated_N: Array | None = None
    metric: Callable[[Array, Array, Array], Array] | None = None

    @property
    def is_mean(self) -> bool:
        """Whether the column's value is the plain mean of `values_N`."""
        return self.metric is None and self.rated_N is None

    def value(self, counts_RK: Array, items_K: Array | slice = slice(None)) -> Array:
        """Return the column's value [R] on resamples that hold each of these items so many times (default: all)."""
        values_K = self.values_N[items_K]
        if self.metric is not None:
            return self.metric(counts_RK, self.labels_N[items_K], values_K)
        return counts_RK @ values_K / (counts_RK.sum(axis=1) if self.is_mean else counts_RK @ self.rated_N[items_K])


class PairedTests:
    """The tests between rows of one table, each of `num_resamples`; what the runs left is read once."""

    def __init__(
        self, spec: TableSpec, sources: Sources, cells: Mapping[tuple[Row, str], "Cell"], *, num_resamples: int
    ) -> None:
        self._spec, self._sources, self._cells = spec, sources, cells
        self._num_resamples = num_resamples
        self._read: dict[tuple[str, str], _Items] = {}  # (run, column) → its items
        self._ids: dict[tuple[str, ...], tuple[str, ...]] = {}  # the runs on one set share one tuple

    def test(self, column: Column, focus: Row, other: Row) -> Interval:
        """Return the paired bootstrap of focus − other, on the column's scale. Raises Untested."""
        seeds, other_seeds = (self._cells[row, column.name].seeds for row in (focus, other))
        if sorted(seeds) != sorted(other_seeds):
            raise Untested("other seeds")
        terms: dict[tuple[str, ...], list[tuple[float, _Items]]] = {}  # ids of a set → (weight, items) of each run
        for part in [self._spec.column(name) for name in column.mean_of] or [column]:
            weight = column.scale * part.scale / len(column.mean_of) if column.mean_of else column.scale
            try:
                ours, theirs = self._pair(part, focus, other, seeds)
            except Untested as reason:
                raise Untested(f"{part.label}: {reason}" if column.mean_of else str(reason)) from reason
            of_set = terms.setdefault(ours[0].ids, [])
            of_set += [(weight / len(ours), one) for one in ours] + [(-weight / len(theirs), one) for one in theirs]
        samples = [_sample(of_set) for of_set in terms.values()]
        found = paired_bootstrap(samples, num_resamples=self._num_resamples)
        if found is None:
            raise Untested("undefined on every draw")
        return found

    def _pair(self, column: Column, focus: Row, other: Row, seeds: Sequence[int]) -> tuple[list[_Items], list[_Items]]:
        """Return what the runs of both rows left, all of it for the same items."""
        ours, theirs = (
            [self._items(run, column) for run in self._spec.planned(row, column) if run.seed in seeds]
            for row in (focus, other)
        )
        first, *others = ours + theirs
        if any(one.ids != first.ids or not np.array_equal(one.labels_N, first.labels_N) for one in others):
            raise Untested("other items")
        if len(first.ids) < 2:
            raise Untested("a single item")
        return ours, theirs

    def _items(self, run: PlannedRun, column: Column) -> _Items:
        if column.task is None:
            raise Untested("no mean over items")
        key = run.run_id, column.name
        if key not in self._read:
            result = self._sources.result(run)
            entry = result["evaluation"][column.task]
            is_classifier = "of_task" in entry
            if is_classifier:
                what, items = "predictions", self._predicted(run, column, entry)
            elif column.metric == "perplexity.after":
                what, items = "likelihoods", self._likely(run, column)
            else:
                what, items = "grades", self._graded(run, column)
            value = items.value(np.ones((1, len(items.ids))))[0]
            score = metric_value(result, column)
            if not abs(value - score) <= ROUNDING * max(1.0, abs(score)):
                raise Untested(f"{what} are not those of the score")
            self._read[key] = items
        return self._read[key]

    def _graded(self, run: PlannedRun, column: Column) -> _Items:
        if column.items is None:
            raise Untested("no mean over items")
        grades = self._sources.grades(run, column.items)
        if grades is None:
            raise Untested(NO_GRADES)
        ids = sorted(grades)
        sums_N, rated_N = np.array([grades[item] for item in ids]).T
        if (rated_N == rated_N[0]).all():
            return _Items(self._shared(ids), sums_N / rated_N)
        return _Items(self._shared(ids), sums_N, rated_N=rated_N)

    def _likely(self, run: PlannedRun, column: Column) -> _Items:
        lines = self._sources.likelihoods(run, column.task)
        if lines is None:
            raise Untested("no likelihoods at hand")
        nll, num_tokens = (np.array([line[name] for line in lines], np.float64) for name in ("nll", "num_tokens"))
        return _Items(self._shared([line["task_id"] for line in lines]), nll, num_tokens, metric=_perplexity)

    def _predicted(self, run: PlannedRun, column: Column, entry: Mapping[str, Any]) -> _Items:
        task = find_task(entry["of_task"])
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
            return _Items(ids, (labels == predictions).astype(np.float64))
        return _Items(ids, predictions, labels, metric=metric)

    def _shared(self, ids: Sequence[str]) -> tuple[str, ...]:
        return self._ids.setdefault(tuple(ids), tuple(ids))


def _perplexity(counts_RK: Array, num_tokens_K: Array, nll_K: Array) -> Array:
    """Return exp of the mean negative log-likelihood a token [R], each text drawn so many times."""
    with np.errstate(over="ignore"):
        return np.exp(counts_RK @ nll_K / (counts_RK @ num_tokens_K))


def _sample(terms: Sequence[tuple[float, _Items]]) -> Sample:
    """Return the weighted sum of the values of runs on the same items, (weight, items), as one sample."""
    means = [weight * one.values_N for weight, one in terms if one.is_mean]
    graded_N = sum(means, np.zeros(len(terms[0][1].ids)))  # a sum of means is the mean of the sum
    others = [(weight, one) for weight, one in terms if not one.is_mean]
    facts = [of_one for _, one in others for of_one in (one.labels_N, one.rated_N, one.values_N) if of_one is not None]
    kinds = np.stack([graded_N, *facts], axis=1)
    _, of_kind_K, counts_K = np.unique(kinds, axis=0, return_index=True, return_counts=True)

    def difference(counts_RK: Array) -> Array:
        total = counts_RK @ graded_N[of_kind_K] / counts_RK.sum(axis=1)
        for weight, one in others:
            total += weight * one.value(counts_RK, of_kind_K)
        return total

    return Sample(counts_K, difference)
