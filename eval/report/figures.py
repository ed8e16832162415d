"""Figures of a table, as PNG and PDF: dots, lines over a setting, scatter with its Pareto front, training curves.

They read in grey: each method has a marker and a line style beside its colour, the same in every figure. Hollow marks
are the paper's values. Rows that lie on each other are said to do so; a row that stands alone in its panel, compared
with none, is left out. Every caption tells n.
"""

import math
from collections.abc import Callable, Iterator

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from ba_lora.errors import UserError
from ba_lora.experiments.tables import Row
from eval.report import hypothesis_figures
from eval.report.block import Figure
from eval.report.cells import Cell
from eval.report.figure_rows import (
    NothingToDraw,
    figure_caption,
    figure_rows,
    has_paper_mark,
    paper_handle,
    rows_together,
    series_of,
    series_styles,
    written_words,
)
from eval.report.run_figures import draw_feature_panels, draw_training
from eval.report.sheets import ARROWS, Drawn
from eval.report.sources import Sources
from eval.report.spec import setting_value
from eval.report.stats import mean_interval
from eval.report.style import (
    HALO,
    HOLLOW,
    RC,
    Style,
    add_legend,
    axis_label,
    line_handle,
    log_x,
    panel_grid,
    pareto_front,
    save,
    y_axis,
)
from eval.report.table import ReportTable


def draw_figures(table: ReportTable, sources: Sources) -> Iterator[tuple[Drawn, dict[str, bytes]]]:
    """Yield each figure of the table and its files, {"png": …, "pdf": …}, or none where there is nothing to draw."""
    for figure in table.spec.figures:
        title = figure.title or table.spec.title
        try:
            with matplotlib.rc_context(RC):
                canvas, caption = _KINDS[figure.kind](table, figure, sources)
                caption = " ".join(part for part in (figure.caption, caption) if part)
                files = save(canvas, title, caption)
        except NothingToDraw as reason:
            yield Drawn(figure.name, title, "", missing=str(reason)), {}
            continue
        yield Drawn(figure.name, title, caption), files


def _dots(table: ReportTable, figure: Figure, sources: Sources) -> tuple[Canvas, str]:
    """A panel for each column and block, a line for each method: its mean, the mean's interval, and the seeds."""
    spec = table.spec
    rows = figure_rows(table, figure)
    styles = series_styles(spec)
    blocks = list(dict.fromkeys(spec.block(row) for row in rows))
    series = list(dict.fromkeys(series_of(spec, row) for row in rows))
    panels = [(block, spec.column(name)) for name in figure.columns for block in blocks]
    across = len(blocks) if len(blocks) > 1 else min(2, len(figure.columns))
    canvas, axes = panel_grid(len(panels), across=across, panel_height=0.8 + 0.17 * len(series))
    for axis, (block, column) in zip(axes, panels, strict=True):
        shown = []
        for row in rows:
            if spec.block(row) != block:
                continue
            cell, y, style = table.cell(row, column), series.index(series_of(spec, row)), styles[series_of(spec, row)]
            if cell.mean is not None:
                low, high = mean_interval(cell.values)
                axis.plot([low, high], [y, y], color=style.colour, lw=1.2, zorder=2)
                axis.plot(cell.values, [y] * len(cell.values), "|", color="0.25", ms=6, mew=0.8, zorder=3)
                axis.plot(cell.mean, y, style.marker, color=style.colour, mec="black", mew=0.5, zorder=4)
                shown += [*cell.values]
            if has_paper_mark(cell):
                axis.plot(cell.paper.mean, y, "D", path_effects=HALO, **(HOLLOW | {"zorder": 5}))
                shown.append(cell.paper.mean)
        if shown:  # the interval of a few seeds may be wider than all that is compared
            margin = 0.08 * (max(shown) - min(shown)) or 1.0
            axis.set_xlim(min(shown) - margin, max(shown) + margin)
        axis.set_yticks(range(len(series)), [written_words(spec, one) for one in series])
        axis.set_ylim(len(series) - 0.4, -0.6)
        axis.locator_params(axis="x", nbins=6)
        axis.set_title(written_words(spec, block))
        axis.set_xlabel(f"{axis_label(column)}{ARROWS[column.better]}")
        if axis.get_subplotspec().is_first_col() is False:
            axis.tick_params(axis="y", labelleft=False)
    if handles := paper_handle(table, figure, marker="D"):
        add_legend(canvas, handles)
    return canvas, figure_caption(table, figure)


def _lines(table: ReportTable, figure: Figure, sources: Sources) -> tuple[Canvas, str]:
    """One panel a base and column, one line a method over the number that the settings give to `x`."""
    spec = table.spec
    rows = figure_rows(table, figure)
    bases = list(dict.fromkeys(row.base for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    styles = series_styles(spec)
    panels = [(base, spec.column(name)) for name in figure.columns for base in bases]
    canvas, axes = panel_grid(len(panels), across=len(bases) if len(bases) > 1 else len(figure.columns))
    for axis, (base, column) in zip(axes, panels, strict=True):
        ticks: set[float] = set()
        for method in methods:
            style = styles[method,]
            mine = {
                row: setting_value(row.setting, figure.x) for row in rows if (row.base, row.method) == (base, method)
            }
            points = [(x, table.cell(row, column)) for row, x in mine.items() if x is not None]
            points.sort(key=lambda point: point[0])
            ticks.update(x for x, cell in points if cell.values or has_paper_mark(cell))
            ours = [(x, cell.mean, np.nan if cell.std is None else cell.std) for x, cell in points if cell.values]
            if ours:
                axis.errorbar(
                    *zip(*ours, strict=True), color=style.colour, marker=style.marker, ls=style.line, capsize=2
                )
            reported = [(x, cell.paper.mean) for x, cell in points if has_paper_mark(cell)]
            if reported:
                axis.plot(
                    *zip(*reported, strict=True),
                    color=style.colour,
                    marker=style.marker,
                    mfc="none",
                    ls=style.line,
                    lw=0.6,
                )
            for row, x in mine.items():
                if x is None:
                    _level(axis, table.cell(row, column), style)
        if figure.log_x and ticks:
            log_x(axis, sorted(ticks))
        axis.set_title(spec.label(base))
        axis.set_xlabel(spec.label(figure.x))
        y_axis(axis, column)
    handles = [line_handle(styles[method,], spec.label(method)) for method in methods]
    for handle, method in zip(handles, methods, strict=True):
        if not any(row.setting for row in rows if row.method == method):  # a level, without marks
            handle.set_marker("")
    add_legend(canvas, [*handles, *paper_handle(table, figure)])
    return canvas, figure_caption(table, figure)


def _level(axis: Axes, cell: Cell, style: Style) -> None:
    """A row without any setting, such as full fine-tuning over ranks: a level line."""
    if cell.mean is not None:
        axis.axhline(cell.mean, color=style.colour, ls=style.line)
    if has_paper_mark(cell):
        axis.axhline(cell.paper.mean, color=style.colour, ls=style.line, lw=0.6)


def _scatter(table: ReportTable, figure: Figure, sources: Sources) -> tuple[Canvas, str]:
    """One panel a block and column: the column against the column `x`, with the front of rows that none beats."""
    spec = table.spec
    rows = figure_rows(table, figure)
    blocks = list(dict.fromkeys(spec.block(row) for row in rows))
    series = list(dict.fromkeys(series_of(spec, row) for row in rows))
    cost = spec.column(figure.x)
    panels = [(block, spec.column(name)) for name in figure.columns for block in blocks]
    canvas, axes = panel_grid(len(panels), across=len(blocks) if len(blocks) > 1 else len(figure.columns))
    front_line = {"color": "0.4", "lw": 0.9, "ls": "--"}
    has_front = False
    styles, together, drawn, unplaced = series_styles(spec), [], [], []
    for axis, (block, column) in zip(axes, panels, strict=True):
        points: dict[Row, tuple[float, float]] = {}
        for row in rows:
            if spec.block(row) != block:
                continue
            x, y, style = table.cell(row, cost), table.cell(row, column), styles[series_of(spec, row)]
            if figure.log_x and any(
                value is not None and value <= 0 for value in (x.mean, x.paper.mean if x.paper else None)
            ):
                unplaced.append(written_words(spec, series_of(spec, row)))
                continue
            if x.mean is not None and y.mean is not None:
                points[row] = (x.mean, y.mean)
            if has_paper_mark(x) and has_paper_mark(y):
                axis.plot(x.paper.mean, y.paper.mean, mfc="none", color=style.colour, marker=style.marker, ls="")
                drawn.append(series_of(spec, row))
        above = True
        for first, *others in _coinciding(points, log_x=figure.log_x):
            x, y, style = table.cell(first, cost), table.cell(first, column), styles[series_of(spec, first)]
            look = {"color": style.colour, "marker": style.marker, "ls": ""}
            axis.errorbar(x.mean, y.mean, y.std, x.std, mec="black", mew=0.5, capsize=2, lw=0.8, **look)
            drawn.append(series_of(spec, first))
            if others:
                place = (5, 5) if above else (5, -11)
                axis.annotate(f"{len(others) + 1}×", points[first], place, textcoords="offset points", fontsize=7)
                above = not above
                together.append(rows_together(spec, block, column, [first, *others]))
        front = pareto_front(list(points.values()), better=(cost.better, column.better))
        if len(set(front)) > 1:  # one point is no line
            axis.plot(*zip(*front, strict=True), zorder=1, **front_line)
            has_front = True
        axis.margins(0.12)
        if figure.log_x:
            axis.set_xscale("log")
        else:
            axis.locator_params(axis="x", nbins=6)
        axis.set_title(written_words(spec, block))
        axis.set_xlabel(f"{axis_label(cost)}{ARROWS[cost.better]}")
        y_axis(axis, column)
    handles = [line_handle(styles[one], written_words(spec, one), line="") for one in series if one in drawn]
    front_handles = [Line2D([], [], label="Pareto front", **front_line)] if has_front else []
    add_legend(canvas, [*handles, *front_handles, *paper_handle(table, figure)])
    told = f" Rows on one point, drawn as the first of them: {'; '.join(together)}." if together else ""
    told += f" Not above 0, so not drawn: {', '.join(dict.fromkeys(unplaced))}." if unplaced else ""
    return canvas, figure_caption(table, figure) + told


def _coinciding(points: dict[Row, tuple[float, float]], *, log_x: bool) -> list[list[Row]]:
    """Return the rows in groups that the eye cannot tell apart: within 2 % of what is shown, in both directions."""
    if log_x:
        points = {row: (math.log(x), y) for row, (x, y) in points.items()}
    values = np.array(list(points.values())).reshape(-1, 2)
    near = 0.02 * (np.ptp(values, axis=0) if len(values) else np.zeros(2))
    groups: list[list[Row]] = []
    for row, point in points.items():
        same = (group for group in groups if (np.abs(np.subtract(point, points[group[0]])) <= near).all())
        group = next(same, None)
        groups.append([row]) if group is None else group.append(row)
    return groups


def _of_models(draw: Callable[..., tuple[Canvas, str] | None]) -> Callable[..., tuple[Canvas, str]]:
    """Return a figure of a table with hypotheses as one of the kinds below."""

    def kind(table: ReportTable, figure: Figure, sources: Sources) -> tuple[Canvas, str]:
        if not table.spec.hypotheses:
            raise UserError(f"figure {figure.name}: {figure.kind} shows a table with report.hypotheses")
        if (drawn := draw(table, figure)) is None:
            raise NothingToDraw("no arm has all its values yet")
        return drawn

    return kind


_KINDS: dict[str, Callable[[ReportTable, Figure, Sources], tuple[Canvas, str]]] = {
    "dots": _dots,
    "lines": _lines,
    "scatter": _scatter,
    "training": draw_training,
    "features": draw_feature_panels,
    "dose": _of_models(hypothesis_figures.draw_dose),
    "tradeoff": _of_models(hypothesis_figures.draw_tradeoff),
    "forest": _of_models(hypothesis_figures.draw_forest),
}
