"""What a table shows: the rows, columns and runs of its config as the report needs them, and which rows it compares."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ba_lora.config.schema import UNTUNED, RunConfig
from ba_lora.errors import UserError
from ba_lora.experiments.state import deciding
from ba_lora.experiments.table_file import Column
from ba_lora.experiments.tables import Row, Table
from eval.report.block import Figure, parse_report
from eval.report.columns import PERCENT, ReportColumn
from eval.report.declared import Collapse, Primary
from eval.report.hypotheses import Hypothesis
from eval.report.seeds import moved_by_seed
from eval.report.stats import MOST_PRIMARY


@dataclass(frozen=True)
class PlannedRun:
    """A run that the table asks for: the file of its result, and its own folder, which holds grades and log.

    config: what its result must have been trained with; gpus: on how many processes; None: anything.
    """

    method: str
    seed: int
    result_path: Path
    run_path: Path
    config: RunConfig | None = field(default=None, compare=False, repr=False)
    gpus: int | None = None

    @property
    def trained(self) -> bool:
        """Whether it is a training, and not the pre-trained model itself."""
        return self.method != UNTUNED

    @property
    def run_id(self) -> str:
        return self.result_path.stem


@dataclass(frozen=True)
class TableSpec:
    """A table as the report needs it.

    runs: (row, column's name) → the runs whose mean fills the cell, one a seed; none for columns that are a mean of
    others. ours: the methods that are tested against `against` (all others where empty); compare: pairs of methods or
    settings that are tested instead. labels: name → how written.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    columns: tuple[ReportColumn, ...]
    runs: Mapping[tuple[Row, str], tuple[PlannedRun, ...]]
    source: str | None = None
    note: str | None = None
    paper: tuple[str, ...] = ()
    ours: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    compare: tuple[tuple[str, str], ...] = ()
    compare_within: tuple[str, ...] = ("base",)
    allow: tuple[str, ...] = ()
    choose: str | None = None
    over_settings: tuple[str, ...] = ()  # the columns whose spread over settings is told
    names: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    figures: tuple[Figure, ...] = ()
    primary: tuple[Primary, ...] = ()
    num_primary: int = 0  # tests of the primary family, whether or not they can be made yet
    paired: bool = False
    collapsed: Collapse | None = None
    clusters: str = ""  # the word of a setting that names the pre-trained model
    hypotheses: tuple[Hypothesis, ...] = ()
    sha256: str = ""  # of the table's file
    deciding: dict[str, Any] = field(default_factory=dict)  # what ba_lora.experiments.state.deciding says of the table

    def is_primary(self, column: ReportColumn, focus: Row, other: Row) -> bool:
        """Whether the table has declared this comparison beforehand."""
        return any(one.is_of(column.name, focus, other) for one in self.primary)

    def is_paired(self, focus: Row, other: Row) -> bool:
        """Whether the runs of one seed are taken together: that is declared, and the seed moves the same in both."""
        moved = {words for row in (focus, other) for words in self.moved_by_seed(row)}
        return self.paired and len(moved) < 2

    def moved_by_seed(self, row: Row) -> list[tuple[str, ...]]:
        """Return what the seed moves in a row's trainings, one entry for each different answer."""
        runs = [run for column in self.columns for run in self.planned(row, column)]
        return list(dict.fromkeys(moved_by_seed(run.config) for run in runs if run.config and run.trained))

    def column(self, name: str) -> ReportColumn:
        """Return the column called `name`."""
        return next(column for column in self.columns if column.name == name)

    def planned(self, row: Row, column: ReportColumn) -> tuple[PlannedRun, ...]:
        """Return the runs whose mean fills a cell, one a seed."""
        return self.runs.get((row, column.name), ())

    def all_runs(self) -> list[PlannedRun]:
        """Return every run of the table once, in the order of the rows."""
        return list(dict.fromkeys(run for runs in self.runs.values() for run in runs))

    def blocks(self) -> list[list[Row]]:
        """Return the rows in groups that are ranked and compared, each in the table's order."""
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in self.rows:
            groups.setdefault(self.block(row), []).append(row)
        return list(groups.values())

    def block(self, row: Row) -> tuple[str, ...]:
        """Return what a row has in common with those that it is ranked and compared with."""
        return tuple(getattr(row, key) for key in self.compare_within)

    def label(self, name: str) -> str:
        """Return how a base, method, setting or column is written."""
        return self.labels.get(name, name)


def row_name(row: Row) -> str:
    """Return `base method setting`."""
    return " ".join(word for word in (row.base, row.method, row.setting) if word)


def _paper_names(column: Column) -> tuple[str, str] | None:
    """Return (task, metric) in the paper's file; None for a mean that the table does not name there."""
    metric = column.paper or column.metric
    return (column.paper_task or column.task or column.name, metric) if metric else None


def table_spec(table: Table) -> TableSpec:
    """Return a table of ba_lora.experiments.tables as the report needs it. Raises UserError for a wrong `report:`
    block."""
    columns = [
        ReportColumn(
            name=column.name,
            label=table.labels.get(column.name, column.name),
            task=column.task,
            metric=column.metric,
            mean_of=column.mean_of,
            unit="%" if column.unit == "percent" else column.unit,
            scale=PERCENT if column.unit == "percent" and not column.mean_of else 1.0,
            better=column.better,
            paper=_paper_names(column),
        )
        for column in table.columns
    ]
    runs: dict[tuple[Row, str], tuple[PlannedRun, ...]] = {}
    for cell in table.cells:
        key = (cell.row, cell.column.name)
        config = cell.config
        run = PlannedRun(config.method, config.seed, config.result_path, config.run_path, config, table.gpus[cell.row])
        runs[key] = (*runs.get(key, ()), run)
    spec = TableSpec(
        name=table.id,
        title=table.title,
        rows=table.rows,
        runs=runs,
        source=table.source,
        note=table.note,
        paper=table.paper,
        ours=table.ours,
        labels=table.labels,
        sha256=table.sha256,
        deciding=deciding(table),
        **parse_report(table.report, rows=table.rows, columns=columns, source=f"table {table.id}"),
    )
    return dataclasses.replace(spec, num_primary=num_primary(spec, source=f"table {table.id}: report.primary"))


def setting_value(setting: str, key: str) -> float | None:
    """Return the number that a setting such as `rank=8` or `regularizers.lambda_svd=1e-4, x=2` gives to `key`.

    `key` may be the last word of a dotted one. None where the setting does not name it, or gives it no number.
    """
    for pair in re.split(r"[,\s]+", setting):
        name, equals, text = pair.partition("=")
        if equals and key in (name, name.rpartition(".")[2]):
            try:
                return float(text)
            except ValueError:
                return None
    return None


def planned_comparisons(spec: TableSpec, rows: Sequence[Row]) -> list[tuple[ReportColumn, Row, Row]]:
    """Return (column, focus, other) of every comparison among `rows`, whether or not they have values."""
    if spec.clusters:  # it is about all pre-trained models together: two rows of one tell nothing
        return []
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


def num_primary(spec: TableSpec, *, source: str) -> int:
    """Return how many tests the primary family has. Raises UserError for an entry that is no comparison of the table,
    and for more than five tests."""
    planned = planned_comparisons(spec, spec.rows)
    if spec.choose:  # one of a method's settings will be compared
        planned = [(c, Row(f.base, f.method), Row(o.base, o.method)) for c, f, o in planned]
    planned = list(dict.fromkeys(planned))
    for one in spec.primary:
        if not any(one.is_of(c.name, f, o) for c, f, o in planned):
            raise UserError(
                f"{source}: the table has no comparison of {one.focus} against {one.against} in {one.column}: see "
                "ours, against and compare"
            )
    number = sum(spec.is_primary(*comparison) for comparison in planned)
    if number > MOST_PRIMARY:
        raise UserError(f"{source}: {number} tests, at most {MOST_PRIMARY} are allowed: name a base or a setting")
    return number
