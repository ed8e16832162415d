"""The comparisons of a table: which rows are tested against which, and what came of it."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ba_lora.experiments.tables import Row
from eval.report.cells import Cell
from eval.report.columns import ReportColumn
from eval.report.paired import PairedTests
from eval.report.sources import Sources
from eval.report.spec import TableSpec, planned_comparisons
from eval.report.stats import LEAST_SEEDS, SIGNIFICANT, benjamini_hochberg, holm

Cells = Mapping[tuple[Row, str], Cell]


@dataclass(frozen=True)
class Comparison:
    """A focus row against another one of its block, in one column; p is None where `untested` says why.

    difference: focus − other, of the means over seeds; by_seed: of the runs with the same seed, for each of `seeds`,
    which both rows have; low, high: the difference's 95 % confidence interval over seeds and items, over seeds only
    where num_items is None; all on the column's scale. family: "primary" or "exploratory"; p_adjusted: p corrected in
    its family, by Holm in the primary one and by Benjamini and Hochberg in the other.
    """

    column: str
    focus: Row
    other: Row
    difference: float
    seeds: tuple[int, ...]
    by_seed: tuple[float, ...]
    family: str = "exploratory"
    num_items: int | None = None
    low: float | None = None
    high: float | None = None
    df: float | None = None
    p: float | None = None
    p_adjusted: float | None = None
    untested: str | None = None

    @property
    def is_significant(self) -> bool:
        """Whether there is a test and its corrected p is below 0.05."""
        return self.p_adjusted is not None and self.p_adjusted < SIGNIFICANT

    @property
    def sign(self) -> int:
        """1 or −1 where the interval lies on one side of 0, else 0."""
        return 0 if self.low is None else int(self.low > 0) - int(self.high < 0)


def compare(spec: TableSpec, sources: Sources, cells: Cells, rows: Sequence[Row]) -> list[Comparison]:
    """Compare the rows of every planned comparison whose two cells have values."""
    return compare_pairs(spec, sources, cells, planned_comparisons(spec, rows))


def compare_pairs(
    spec: TableSpec, sources: Sources, cells: Cells, pairs: Iterable[tuple[ReportColumn, Row, Row]]
) -> list[Comparison]:
    """Compare focus and other in the column, of each (column, focus, other) whose two cells have values."""
    planned = [
        (column, focus, other)
        for column, focus, other in pairs
        if cells[focus, column.name].values and cells[other, column.name].values
    ]
    tests = PairedTests(spec, sources, cells)
    return _corrected([_compare(spec, tests, cells, *one) for one in planned], num_primary=spec.num_primary)


def _compare(
    spec: TableSpec, tests: PairedTests, cells: Cells, column: ReportColumn, focus: Row, other: Row
) -> Comparison:
    ours, theirs = cells[focus, column.name], cells[other, column.name]
    values, others = (dict(zip(cell.seeds, cell.values, strict=True)) for cell in (ours, theirs))
    seeds = tuple(seed for seed in values if seed in others)
    by_seed = tuple(values[seed] - others[seed] for seed in seeds)
    family = "primary" if spec.is_primary(column, focus, other) else "exploratory"
    estimate, untested = tests.test(column, focus, other)
    facts = {} if estimate is None else {key: getattr(estimate, key) for key in ("low", "high", "df", "num_items")}
    facts |= {"untested": untested} if untested else {"p": estimate.p}
    return Comparison(column.name, focus, other, ours.mean - theirs.mean, seeds, by_seed, family, **facts)


def _corrected(comparisons: list[Comparison], *, num_primary: int) -> list[Comparison]:
    """Add each p corrected over the tests of its family; of the primary one those count, too, that have no p yet."""
    families = {
        family: [i for i, one in enumerate(comparisons) if one.family == family and one.p is not None]
        for family in ("primary", "exploratory")
    }
    found = {family: [comparisons[i].p for i in tested] for family, tested in families.items()}
    unmade = [1.0] * (num_primary - len(found["primary"]))
    corrected = {"primary": holm(found["primary"] + unmade), "exploratory": benjamini_hochberg(found["exploratory"])}
    adjusted = {i: p for family, tested in families.items() for i, p in zip(tested, corrected[family], strict=False)}
    return [dataclasses.replace(one, p_adjusted=adjusted.get(i)) for i, one in enumerate(comparisons)]


def as_declared(spec: TableSpec, record: Mapping[str, Any] | None) -> tuple[TableSpec, str]:
    """Return the table with the primary family that it may claim, and a sentence on what was declared when.

    record: what ba_lora.experiments.state.declare has written when the table's first run started; None where nothing
    was. The family counts only where all that decides it is as declared, and no run had a result then: it never changes
    after a look.
    """
    without = dataclasses.replace(spec, primary=(), num_primary=0)
    if not spec.sha256:
        return spec, ""
    now = f"The table's file has the sha256 {spec.sha256[:12]}"
    if record is None:
        lost = "; its primary tests count as exploratory" if spec.primary else ""
        return without, f"{now}; what it was when the first run started is not recorded{lost}."
    same = record["sha256"] == spec.sha256
    when = "it was recorded" if record["num_results"] else "the first run started"
    then = f"the same as when {when} ({record['declared_at']})" if same else (
        f"{record['sha256'][:12]} when {when} ({record['declared_at']}): the file was changed since"
    )  # fmt: skip
    before = f"; {record['num_results']} results were there before" if record["num_results"] else ""
    if not spec.primary and not (record["tests"].get("report") or {}).get("primary"):
        return without, f"{now}, {then}{before}."
    if before:
        return without, f"{now}, {then}{before}: no test is primary."
    changed = sorted(key for key in spec.deciding if record["tests"].get(key) != spec.deciding[key])
    if changed:
        told = ", ".join(key.removesuffix("_sha256") for key in changed)
        return without, f"{now}, {then}; what decides its tests was changed ({told}): all tests count as exploratory."
    num_seeds = min(map(len, spec.runs.values()), default=0)
    few = f", not testable with {num_seeds} seeds ({LEAST_SEEDS} are needed)" if num_seeds < LEAST_SEEDS else ""
    return spec, f"{now}, {then}; its primary tests are as declared{few}."
