"""A table's cells: the values of a row's runs in a column, their mean, and the runs that gave none."""

from dataclasses import dataclass

from ba_lora.experiments.tables import Row
from eval.report.sources import PaperValue
from eval.report.stats import mean_std

COLLAPSED = "collapsed"
CellKey = tuple[Row, str]  # the row and the column's name


@dataclass(frozen=True)
class FailedRun:
    """A run whose value is not in the mean: status is failed, cancelled, oom, or, of a run that succeeded, collapsed or
    that of `why_missing`."""

    run_id: str
    status: str
    error: str | None


@dataclass(frozen=True)
class Cell:
    """A cell. values: one a seed, on the column's scale, in the order of `seeds`; mark: "best", "second" or "".

    difference: mean − the paper's, None where either is missing or the paper's is only a bound. notes: indices of the
    table's footnotes.
    """

    values: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()
    run_ids: tuple[str, ...] = ()
    num_planned: int = 0
    failures: tuple[FailedRun, ...] = ()
    paper: PaperValue | None = None
    mark: str = ""
    notes: tuple[int, ...] = ()

    @property
    def mean(self) -> float | None:
        return mean_std(self.values)[0] if self.values else None

    @property
    def std(self) -> float | None:
        return mean_std(self.values)[1] if self.values else None

    @property
    def num_collapsed(self) -> int:
        return len({failure.run_id for failure in self.failures if failure.status == COLLAPSED})

    @property
    def difference(self) -> float | None:
        if self.mean is None or self.paper is None or self.paper.is_bound:
            return None
        return self.mean - self.paper.mean

    @property
    def status(self) -> str:
        """ "ok", "missing", or how the runs ended where none has a value."""
        if self.values:
            return "ok"
        statuses = {failure.status for failure in self.failures}
        return "missing" if not statuses else statuses.pop() if len(statuses) == 1 else "failed"
