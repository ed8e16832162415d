"""How much hangs on a method's settings: best, median, worst and spread over the settings of a table.

    report: {over_settings: [accuracy, nll]}

The measure of robustness in MonteCLoRA's paper (arXiv 2411.04358): of a method over a grid of learning rates, ranks and
batch sizes, spread = best − worst, and the median. Each setting counts by its mean over the seeds. A setting without a
value, since a run of it has failed or is yet to be made, is in none of the four, and is told: a method that fails at
some settings is not robust, however small its spread over the others.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ba_lora.experiments.tables import Row
from eval.report.cells import Cell
from eval.report.columns import ReportColumn
from eval.report.sheets import ARROWS, Sheet, Text, format_number
from eval.report.table import ReportTable


@dataclass(frozen=True)
class OverSettings:
    """A method in one column. num_failed, num_missing: settings of which a run has failed, or is yet to be made; `best`
    and so on are None where all are."""

    base: str
    method: str
    column: str
    num_settings: int
    num_failed: int
    num_missing: int
    best: float | None = None
    median: float | None = None
    worst: float | None = None
    spread: float | None = None
    best_setting: str = ""


def over_settings(table: ReportTable) -> list[OverSettings]:
    """Return every base and method in each of the table's columns that are asked for, in the table's order."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in table.spec.rows:
        groups.setdefault((row.base, row.method), []).append(row)
    columns = [table.spec.column(name) for name in table.spec.over_settings]
    return [
        _of(base, method, column, {row: table.cell(row, column) for row in rows})
        for (base, method), rows in groups.items()
        for column in columns
    ]


def _of(base: str, method: str, column: ReportColumn, cells: dict[Row, Cell]) -> OverSettings:
    whole = {row: cell.mean is not None and len(cell.values) == cell.num_planned for row, cell in cells.items()}
    means = {row: cell.mean for row, cell in cells.items() if whole[row]}
    without = [cell for row, cell in cells.items() if not whole[row]]
    failed = sum(bool(cell.failures) for cell in without)
    counts = (base, method, column.name, len(cells), failed, len(without) - failed)
    if not means:
        return OverSettings(*counts)
    choose = min if column.better == "lower" else max
    best = choose(means, key=means.__getitem__)
    worst = (max if column.better == "lower" else min)(means.values())
    return OverSettings(
        *counts,
        best=means[best],
        median=statistics.median(means.values()),
        worst=worst,
        spread=abs(means[best] - worst),
        best_setting=best.setting,
    )


def over_settings_sheet(table: ReportTable) -> Sheet:
    """Return them as a sheet, a line for each base and method."""
    spec = table.spec
    found: dict[tuple[str, str], list[OverSettings]] = {}
    for one in over_settings(table):
        found.setdefault((one.base, one.method), []).append(one)
    columns = [spec.column(name) for name in spec.over_settings]
    groups: list[tuple[str, int]] = [("", 2)]
    header = ["model", "method"]
    for column in columns:
        unit = f" ({column.unit})" if column.unit else ""
        groups.append((f"{column.label}{unit}{ARROWS[column.better]}", 5))
        header += ["best", "median", "worst", "spread", "settings"]
    rows = []
    for (base, method), ones in found.items():
        texts = [Text(spec.label(base)), Text(spec.label(method))]
        for one, column in zip(ones, columns, strict=True):
            values = (one.best, one.median, one.worst, one.spread)
            texts += [Text(format_number(value, column.decimals)) for value in values]
            texts.append(Text(_settings(one)))
        rows.append(tuple(texts))
    breaks = [n for n, (base, _) in enumerate(found) if n and base != list(found)[n - 1][0]]
    return Sheet(tuple(groups), tuple(header), tuple(rows), tuple(breaks))


def _settings(one: OverSettings) -> str:
    parts: Sequence[str] = (
        str(one.num_settings),
        f"{one.num_failed} failed" if one.num_failed else "",
        f"{one.num_missing} missing" if one.num_missing else "",
    )
    return ", ".join(part for part in parts if part)
