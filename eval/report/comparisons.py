"""The comparisons of a table: which rows are tested against which, and what came of it."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ba_lora.tables import Row
from eval.report.paired import PairedTests, Untested
from eval.report.sources import Sources
from eval.report.spec import Column, TableSpec
from eval.report.stats import SIGNIFICANT, holm, resamples_for

if TYPE_CHECKING:
    from eval.report.table import Cell

    Cells = Mapping[tuple[Row, str], Cell]


@dataclass(frozen=True)
class Comparison:
    """A focus row against another one of its block, in one column; p is None where `untested` says why.

    difference: focus − other, of the means over seeds; by_seed: of the runs with the same seed, for each of `seeds`,
    which both rows have; low, high: the difference's 95 % interval over items; all on the column's scale.
    num_undefined: resamples left out because the column's metric is undefined on them. p_holm: p corrected over all
    tests of the table.
    """

    column: str
    focus: Row
    other: Row
    difference: float
    seeds: tuple[int, ...]
    by_seed: tuple[float, ...]
    num_items: int | None = None
    num_undefined: int = 0
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    untested: str | None = None

    @property
    def is_significant(self) -> bool:
        """Whether the corrected p is below 0.05 and every seed, of two at least, has the same sign.

        p tells of other items alone: methods that differ by the seeds' noise and nothing else fall below 0.05 far more
        often than in 5 % of cases. That every seed has the sign is the least to ask for beside it.
        """
        one_sign = all(value > 0 for value in self.by_seed) or all(value < 0 for value in self.by_seed)
        return self.p_holm is not None and self.p_holm < SIGNIFICANT and len(self.by_seed) > 1 and one_sign


def planned_comparisons(spec: TableSpec, rows: Sequence[Row]) -> list[tuple[Column, Row, Row]]:
    """Return (column, focus, other) of every comparison among `rows`, whether or not they have values."""
    pairs = [
        (focus, other)
        for block in spec.blocks()
        for focus in block
        for other in block
        if focus in rows and other in rows and _is_asked(spec, focus, other)
    ]
    columns = [
        column
        for column in spec.columns
        if column.better != "none" and (column.task or column.mean_of) and column.name != spec.choose
    ]
    return [(column, focus, other) for column in columns for focus, other in pairs]


def _is_asked(spec: TableSpec, focus: Row, other: Row) -> bool:
    """Whether the table tests these two rows of one block.

    Of a pair of methods, in one setting (a method without settings stands for all); of a pair of settings, with one
    method.
    """
    if not spec.compare:
        is_other = other.method not in spec.ours and (not spec.against or other.method in spec.against)
        return focus.method in spec.ours and is_other
    if focus.method == other.method:
        return (focus.setting, other.setting) in spec.compare
    alike = focus.setting == other.setting or not (focus.setting and other.setting)
    return alike and (focus.method, other.method) in spec.compare


def compare(spec: TableSpec, sources: Sources, cells: "Cells", rows: Sequence[Row]) -> tuple[list[Comparison], int]:
    """Test every planned comparison whose two cells have values; return them and each test's number of resamples."""
    planned = [
        (column, focus, other)
        for column, focus, other in planned_comparisons(spec, rows)
        if cells[focus, column.name].values and cells[other, column.name].values
    ]
    num_resamples = resamples_for(len(planned))
    tests = PairedTests(spec, sources, cells, num_resamples=num_resamples)
    return _corrected([_compare(tests, cells, *one) for one in planned]), num_resamples


def _compare(tests: PairedTests, cells: "Cells", column: Column, focus: Row, other: Row) -> Comparison:
    ours, theirs = cells[focus, column.name], cells[other, column.name]
    values, others = (dict(zip(cell.seeds, cell.values, strict=True)) for cell in (ours, theirs))
    seeds = tuple(seed for seed in values if seed in others)
    by_seed = tuple(values[seed] - others[seed] for seed in seeds)
    comparison = Comparison(column.name, focus, other, ours.mean - theirs.mean, seeds, by_seed)
    try:
        test = tests.test(column, focus, other)
    except Untested as reason:
        return dataclasses.replace(comparison, untested=str(reason))
    facts = {key: getattr(test, key) for key in ("num_items", "num_undefined", "low", "high", "p")}
    return dataclasses.replace(comparison, **facts)


def _corrected(comparisons: list[Comparison]) -> list[Comparison]:
    """Add Holm's correction over all tests of the table."""
    adjusted = iter(holm([comparison.p for comparison in comparisons if comparison.p is not None]))
    return [
        comparison if comparison.p is None else dataclasses.replace(comparison, p_holm=next(adjusted))
        for comparison in comparisons
    ]
