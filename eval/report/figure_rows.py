"""What all figures of a table share: which rows they show, in which style, and the words of their captions."""

import collections
from collections.abc import Sequence

from matplotlib.lines import Line2D

from ba_lora.errors import UserError
from ba_lora.experiments.tables import Row
from eval.report.block import Figure
from eval.report.cells import Cell
from eval.report.columns import ReportColumn
from eval.report.spec import PlannedRun, TableSpec, row_name, setting_value
from eval.report.style import Style, styles_of
from eval.report.table import ReportTable


class NothingToDraw(Exception):
    """Why a figure has nothing to show."""


def figure_rows(table: ReportTable, figure: Figure) -> list[Row]:
    """Return the rows that have something to show. Raises NothingToDraw where none has."""

    def has(row: Row) -> bool:
        cells = [table.cells[row, name] for name in figure.columns]
        if figure.kind == "scatter":
            x = table.cells[row, figure.x]
            return any((x.values and cell.values) or (x.paper and cell.paper) for cell in cells)
        return any(cell.values or cell.paper for cell in cells)

    rows = [row for row in table.spec.rows if not figure.methods or row.method in figure.methods]
    if figure.kind == "lines":  # over one of several settings: the others' rows have no place in it
        rows = [row for row in rows if not row.setting or setting_value(row.setting, figure.x) is not None]
        if not any(row.setting for row in rows):
            raise NothingToDraw(f"no setting gives {figure.x} a number")
    rows = [row for row in rows if figure.kind in ("training", "features") or has(row)]
    if not rows:
        raise NothingToDraw("no row has a value yet")
    if figure.kind in ("dots", "scatter"):
        rows = without_lone(table.spec, rows)
    if figure.kind == "scatter" and len({table.spec.block(row) for row in rows}) == len(rows):
        raise NothingToDraw("no two rows to compare have values yet")
    return rows


def without_lone(spec: TableSpec, rows: Sequence[Row]) -> list[Row]:
    """Return the rows without those that stand alone in their block, such as a repetition by another engine; all rows
    where every one does."""
    sizes = collections.Counter(spec.block(row) for row in rows)
    return [row for row in rows if sizes[spec.block(row)] > 1] or list(rows)


def runs_of_row(spec: TableSpec, figure: Figure, row: Row) -> list[PlannedRun]:
    """Return a row's runs, one a seed: those of the figure's columns, or of all.

    Raises UserError where they are several trainings, such as on several data sets: no mean over seeds has a meaning.
    """
    names = figure.columns or [column.name for column in spec.columns]
    runs = list(dict.fromkeys(run for name in names for run in spec.planned(row, spec.column(name))))
    if len({run.seed for run in runs}) < len(runs):
        raise UserError(f"figure {figure.name}: {row_name(row)} has several trainings: name columns of one of them")
    return runs


def series_of(spec: TableSpec, row: Row) -> tuple[str, ...]:
    """What tells the row from the others of its block."""
    setting = () if "setting" in spec.compare_within or not row.setting else (row.setting,)
    return (row.method, *setting)


def series_styles(spec: TableSpec) -> dict[tuple[str, ...], Style]:
    """Return the style of each series of the table, whatever a figure shows of it."""
    return styles_of([series_of(spec, row) for row in spec.rows] + [(row.method,) for row in spec.rows])


def has_paper_mark(cell: Cell) -> bool:
    """Whether the paper's value is drawn: it has one, and not just a bound."""
    return cell.paper is not None and not cell.paper.is_bound


def written_words(spec: TableSpec, words: Sequence[str]) -> str:
    return ", ".join(spec.label(word) for word in words if word)


def rows_together(spec: TableSpec, block: Sequence[str], column: ReportColumn, rows: Sequence[Row]) -> str:
    several = len({spec.block(row) for row in spec.rows}) > 1
    names = ", ".join(written_words(spec, series_of(spec, row)) for row in rows)
    return f"{written_words(spec, block)}: {names}" if several else names


def paper_handle(table: ReportTable, figure: Figure, *, marker: str = "o") -> list[Line2D]:
    """Return the legend's entry of the paper's marks, where there are any."""
    if not _paper_sources(table, figure):
        return []
    return [Line2D([], [], color="black", marker=marker, mfc="none", ls="", ms=5, label="paper (hollow)")]


def _paper_sources(table: ReportTable, figure: Figure) -> list[str]:
    cells = [table.cells[row, name] for row in figure_rows(table, figure) for name in figure.columns]
    return sorted({cell.paper.source for cell in cells if has_paper_mark(cell)})


def figure_caption(table: ReportTable, figure: Figure) -> str:
    cells = [table.cells[row, name] for row in figure_rows(table, figure) for name in figure.columns]
    counts = [len(cell.values) for cell in cells if cell.values]
    parts = [count_seeds(counts)]
    if max(counts, default=0) > 1 and figure.kind == "dots":
        parts.append(
            "Lines: 95 % confidence interval of the mean over seeds (t), cut at the panel's edge; strokes: the seeds."
        )
    elif max(counts, default=0) > 1:
        parts.append("Error bars: standard deviation over seeds.")
    if any(cell.num_collapsed for cell in cells):
        parts.append("Collapsed runs are left out.")
    if sources := _paper_sources(table, figure):
        marks = "Hollow marks and thin lines" if figure.kind == "lines" else "Hollow"
        parts.append(f"{marks}: the paper ({'; '.join(sources)}).")
    return " ".join(parts)


def count_seeds(counts: Sequence[int]) -> str:
    if not counts:
        return "No runs of ours yet."
    low, high = min(counts), max(counts)
    return f"n = {low if low == high else f'{low} to {high}'} seed{'' if high == 1 else 's'}."
