"""Figures of a table, as PNG and PDF: dots, lines over a setting, scatter with its Pareto front, training curves.

They read in grey: each method has a marker and a line style beside its colour, the same in every figure. Hollow marks
are the paper's values. Rows that lie on each other are said to do so; a row that stands alone in its panel, compared
with none, is left out. Every caption tells n.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from ba_lora.errors import UserError
from ba_lora.experiments.tables import Row
from eval.report import features, hypothesis_figures
from eval.report.block import Figure
from eval.report.cells import Cell
from eval.report.columns import ReportColumn
from eval.report.sheets import ARROWS, Drawn
from eval.report.sources import Sources
from eval.report.spec import PlannedRun, TableSpec, row_name, setting_value
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
    styles_of,
    y_axis,
)
from eval.report.table import ReportTable


class NothingToDraw(Exception):
    """Why a figure has nothing to show."""


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
    rows = _rows(table, figure)
    styles = _styles(spec)
    blocks = list(dict.fromkeys(spec.block(row) for row in rows))
    series = list(dict.fromkeys(_series(spec, row) for row in rows))
    panels = [(block, spec.column(name)) for name in figure.columns for block in blocks]
    across = len(blocks) if len(blocks) > 1 else min(2, len(figure.columns))
    canvas, axes = panel_grid(len(panels), across=across, panel_height=0.8 + 0.17 * len(series))
    for axis, (block, column) in zip(axes, panels, strict=True):
        shown = []
        for row in rows:
            if spec.block(row) != block:
                continue
            cell, y, style = table.cell(row, column), series.index(_series(spec, row)), styles[_series(spec, row)]
            if cell.mean is not None:
                low, high = mean_interval(cell.values)
                axis.plot([low, high], [y, y], color=style.colour, lw=1.2, zorder=2)
                axis.plot(cell.values, [y] * len(cell.values), "|", color="0.25", ms=6, mew=0.8, zorder=3)
                axis.plot(cell.mean, y, style.marker, color=style.colour, mec="black", mew=0.5, zorder=4)
                shown += [*cell.values]
            if _has_paper_mark(cell):
                axis.plot(cell.paper.mean, y, "D", path_effects=HALO, **(HOLLOW | {"zorder": 5}))
                shown.append(cell.paper.mean)
        if shown:  # the interval of a few seeds may be wider than all that is compared
            margin = 0.08 * (max(shown) - min(shown)) or 1.0
            axis.set_xlim(min(shown) - margin, max(shown) + margin)
        axis.set_yticks(range(len(series)), [_written(spec, one) for one in series])
        axis.set_ylim(len(series) - 0.4, -0.6)
        axis.locator_params(axis="x", nbins=6)
        axis.set_title(_written(spec, block))
        axis.set_xlabel(f"{axis_label(column)}{ARROWS[column.better]}")
        if axis.get_subplotspec().is_first_col() is False:
            axis.tick_params(axis="y", labelleft=False)
    if handles := _paper_handle(table, figure, marker="D"):
        add_legend(canvas, handles)
    return canvas, _caption(table, figure)


def _styles(spec: TableSpec) -> dict[tuple[str, ...], Style]:
    """Return the style of each series of the table, whatever a figure shows of it."""
    return styles_of([_series(spec, row) for row in spec.rows] + [(row.method,) for row in spec.rows])


def _lines(table: ReportTable, figure: Figure, sources: Sources) -> tuple[Canvas, str]:
    """One panel a base and column, one line a method over the number that the settings give to `x`."""
    spec = table.spec
    rows = _rows(table, figure)
    bases = list(dict.fromkeys(row.base for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    styles = _styles(spec)
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
            ticks.update(x for x, cell in points if cell.values or _has_paper_mark(cell))
            ours = [(x, cell.mean, np.nan if cell.std is None else cell.std) for x, cell in points if cell.values]
            if ours:
                axis.errorbar(
                    *zip(*ours, strict=True), color=style.colour, marker=style.marker, ls=style.line, capsize=2
                )
            reported = [(x, cell.paper.mean) for x, cell in points if _has_paper_mark(cell)]
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
    add_legend(canvas, [*handles, *_paper_handle(table, figure)])
    return canvas, _caption(table, figure)


def _scatter(table: ReportTable, figure: Figure, sources: Sources) -> tuple[Canvas, str]:
    """One panel a block and column: the column against the column `x`, with the front of rows that none beats."""
    spec = table.spec
    rows = _rows(table, figure)
    blocks = list(dict.fromkeys(spec.block(row) for row in rows))
    series = list(dict.fromkeys(_series(spec, row) for row in rows))
    cost = spec.column(figure.x)
    panels = [(block, spec.column(name)) for name in figure.columns for block in blocks]
    canvas, axes = panel_grid(len(panels), across=len(blocks) if len(blocks) > 1 else len(figure.columns))
    front_line = {"color": "0.4", "lw": 0.9, "ls": "--"}
    has_front = False
    styles, together, drawn = _styles(spec), [], []
    for axis, (block, column) in zip(axes, panels, strict=True):
        points: dict[Row, tuple[float, float]] = {}
        for row in rows:
            if spec.block(row) != block:
                continue
            x, y, style = table.cell(row, cost), table.cell(row, column), styles[_series(spec, row)]
            if x.mean is not None and y.mean is not None:
                points[row] = (x.mean, y.mean)
            if _has_paper_mark(x) and _has_paper_mark(y):
                axis.plot(x.paper.mean, y.paper.mean, mfc="none", color=style.colour, marker=style.marker, ls="")
                drawn.append(_series(spec, row))
        above = True
        for first, *others in _coinciding(points):
            x, y, style = table.cell(first, cost), table.cell(first, column), styles[_series(spec, first)]
            look = {"color": style.colour, "marker": style.marker, "ls": ""}
            axis.errorbar(x.mean, y.mean, y.std, x.std, mec="black", mew=0.5, capsize=2, lw=0.8, **look)
            drawn.append(_series(spec, first))
            if others:
                place = (5, 5) if above else (5, -11)
                axis.annotate(f"{len(others) + 1}×", points[first], place, textcoords="offset points", fontsize=7)
                above = not above
                together.append(_together(spec, block, column, [first, *others]))
        front = pareto_front(list(points.values()), better=(cost.better, column.better))
        if len(set(front)) > 1:  # one point is no line
            axis.plot(*zip(*front, strict=True), zorder=1, **front_line)
            has_front = True
        axis.margins(0.12)
        axis.locator_params(axis="x", nbins=6)
        axis.set_title(_written(spec, block))
        axis.set_xlabel(f"{axis_label(cost)}{ARROWS[cost.better]}")
        y_axis(axis, column)
    handles = [line_handle(styles[one], _written(spec, one), line="") for one in series if one in drawn]
    front_handles = [Line2D([], [], label="Pareto front", **front_line)] if has_front else []
    add_legend(canvas, [*handles, *front_handles, *_paper_handle(table, figure)])
    told = f" Rows on one point, drawn as the first of them: {'; '.join(together)}." if together else ""
    return canvas, _caption(table, figure) + told


def _coinciding(points: dict[Row, tuple[float, float]]) -> list[list[Row]]:
    """Return the rows in groups that the eye cannot tell apart: within 2 % of what is shown, in both directions."""
    values = np.array(list(points.values())).reshape(-1, 2)
    near = 0.02 * (np.ptp(values, axis=0) if len(values) else np.zeros(2))
    groups: list[list[Row]] = []
    for row, point in points.items():
        same = (group for group in groups if (np.abs(np.subtract(point, points[group[0]])) <= near).all())
        group = next(same, None)
        groups.append([row]) if group is None else group.append(row)
    return groups


def _together(spec: TableSpec, block: Sequence[str], column: ReportColumn, rows: Sequence[Row]) -> str:
    several = len({spec.block(row) for row in spec.rows}) > 1
    names = ", ".join(_written(spec, _series(spec, row)) for row in rows)
    return f"{_written(spec, block)}: {names}" if several else names


def _training(table: ReportTable, figure: Figure, sources: Sources) -> tuple[Canvas, str]:
    """One panel a block and term: what training logged, as the mean over seeds and a band of one deviation."""
    spec = table.spec
    logs = {row: [log for run in _runs(spec, figure, row) if (log := sources.log(run))] for row in _rows(table, figure)}
    rows = [row for row, found in logs.items() if found]
    if not rows:
        raise NothingToDraw("no run's log.jsonl is at hand")
    rows = _without_lone(spec, rows)
    blocks = list(dict.fromkeys(spec.block(row) for row in rows))
    series = list(dict.fromkeys(_series(spec, row) for row in rows))
    curves = {
        (term, row): [
            curve
            for log in logs[row]
            if (curve := {entry["step"]: entry[name] for entry in log if isinstance(entry.get(name), int | float)})
        ]
        for term in figure.terms
        for name in [term.partition(" ")[0]]
        for row in rows
    }
    terms = [term for term in figure.terms if any(curves[term, row] for row in rows)]
    if not terms:
        raise NothingToDraw("no run has logged any of its terms")
    panels = [(block, term) for term in terms for block in blocks]
    canvas, axes = panel_grid(len(panels), across=len(blocks) if len(blocks) > 1 else len(terms))
    counts, styles, together = [], _styles(spec), []
    for axis, (block, term) in zip(axes, panels, strict=True):
        means: dict[Row, dict[int, float]] = {}
        for row in rows:
            found = curves[term, row]
            if spec.block(row) != block or not found:
                continue
            position, style = series.index(_series(spec, row)), styles[_series(spec, row)]
            counts.append(len(found))
            steps = sorted(set.intersection(*(set(curve) for curve in found)))
            values = np.array([[curve[step] for step in steps] for curve in found])  # (seeds, steps)
            mean = values.mean(axis=0)
            means[row] = dict(zip(steps, mean, strict=True))
            every = (0.15 * position / len(series), 0.15)  # staggered: curves may lie on each other
            axis.plot(steps, mean, color=style.colour, ls=style.line, marker=style.marker, markevery=every, ms=4, lw=1)
            if len(found) > 1:
                std = values.std(axis=0, ddof=1)
                axis.fill_between(steps, mean - std, mean + std, color=style.colour, alpha=0.2, lw=0)
        axis.set_title(_written(spec, block))
        axis.set_xlabel("step")
        axis.set_ylabel(term)
        for group in _coinciding_curves(means):
            if len(group) > 1:
                together.append(f"{term.partition(' ')[0]}, {_together(spec, block, None, group)}")
    add_legend(canvas, [line_handle(styles[one], _written(spec, one)) for one in series])
    caption = f"{_count(counts)} Lines: mean over seeds of what training logged; bands: standard deviation."
    caption += f" Curves on each other: {'; '.join(together)}." if together else ""
    absent = [term.partition(" ")[0] for term in figure.terms if term not in terms]
    return canvas, f"{caption} Not logged: {', '.join(absent)}." if absent else caption


def _coinciding_curves(means: dict[Row, dict[int, float]]) -> list[list[Row]]:
    """Return the rows in groups whose mean curves the eye cannot tell apart: within 2 % of what the panel shows."""
    shown = [value for curve in means.values() for value in curve.values()]
    near = 0.02 * (max(shown) - min(shown)) if shown else 0.0
    groups: list[list[Row]] = []
    for row, curve in means.items():
        for group in groups:
            other = means[group[0]]
            common = curve.keys() & other.keys()
            if common and all(abs(curve[step] - other[step]) <= near for step in common):
                group.append(row)
                break
        else:
            groups.append([row])
    return groups


def _features(table: ReportTable, figure: Figure, sources: Sources) -> tuple[Canvas, str]:
    """A row of t-SNE panels over steps for each row of the table, of its first seed that has features at hand."""
    spec = table.spec
    runs, seeds = [], []
    for row in _rows(table, figure):
        found = [run for run in _runs(spec, figure, row) if (run.run_path / "features").is_dir()]
        if found:
            seeds.append(found[0].seed)
            [run] = features.read_runs([found[0].run_path])
            runs.append(
                dataclasses.replace(run, name=_written(spec, [word for word in dataclasses.astuple(row) if word]))
            )
    if not runs:
        raise NothingToDraw("no run's features are at hand")
    canvas = features.draw_features(runs, features.measure(runs))
    named = ", ".join(str(seed) for seed in dict.fromkeys(seeds))
    return canvas, (
        f"One run each, seed {named}. t-SNE of pooled features, each panel by itself: axes and distances between "
        "panels mean nothing. Silhouette and effective rank are of the features."
    )


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
    "training": _training,
    "features": _features,
    "dose": _of_models(hypothesis_figures.draw_dose),
    "tradeoff": _of_models(hypothesis_figures.draw_tradeoff),
    "forest": _of_models(hypothesis_figures.draw_forest),
}


def _rows(table: ReportTable, figure: Figure) -> list[Row]:
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
        rows = _without_lone(table.spec, rows)
    if figure.kind == "scatter" and len({table.spec.block(row) for row in rows}) == len(rows):
        raise NothingToDraw("no two rows to compare have values yet")
    return rows


def _without_lone(spec: TableSpec, rows: Sequence[Row]) -> list[Row]:
    """Return the rows without those that stand alone in their block, such as a repetition by another engine; all rows
    where every one does."""
    sizes = collections.Counter(spec.block(row) for row in rows)
    return [row for row in rows if sizes[spec.block(row)] > 1] or list(rows)


def _runs(spec: TableSpec, figure: Figure, row: Row) -> list[PlannedRun]:
    """Return a row's runs, one a seed: those of the figure's columns, or of all.

    Raises UserError where they are several trainings, such as on several data sets: no mean over seeds has a meaning.
    """
    names = figure.columns or [column.name for column in spec.columns]
    runs = list(dict.fromkeys(run for name in names for run in spec.planned(row, spec.column(name))))
    if len({run.seed for run in runs}) < len(runs):
        raise UserError(f"figure {figure.name}: {row_name(row)} has several trainings: name columns of one of them")
    return runs


def _series(spec: TableSpec, row: Row) -> tuple[str, ...]:
    """What tells the row from the others of its block."""
    setting = () if "setting" in spec.compare_within or not row.setting else (row.setting,)
    return (row.method, *setting)


def _level(axis: Axes, cell: Cell, style: Style) -> None:
    """A row without any setting, such as full fine-tuning over ranks: a level line."""
    if cell.mean is not None:
        axis.axhline(cell.mean, color=style.colour, ls=style.line)
    if _has_paper_mark(cell):
        axis.axhline(cell.paper.mean, color=style.colour, ls=style.line, lw=0.6)


def _has_paper_mark(cell: Cell) -> bool:
    """Whether the paper's value is drawn: it has one, and not just a bound."""
    return cell.paper is not None and not cell.paper.is_bound


def _written(spec: TableSpec, words: Sequence[str]) -> str:
    return ", ".join(spec.label(word) for word in words if word)


def _paper_handle(table: ReportTable, figure: Figure, *, marker: str = "o") -> list[Line2D]:
    """Return the legend's entry of the paper's marks, where there are any."""
    if not _paper_sources(table, figure):
        return []
    return [Line2D([], [], color="black", marker=marker, mfc="none", ls="", ms=5, label="paper (hollow)")]


def _paper_sources(table: ReportTable, figure: Figure) -> list[str]:
    cells = [table.cells[row, name] for row in _rows(table, figure) for name in figure.columns]
    return sorted({cell.paper.source for cell in cells if _has_paper_mark(cell)})


def _caption(table: ReportTable, figure: Figure) -> str:
    cells = [table.cells[row, name] for row in _rows(table, figure) for name in figure.columns]
    counts = [len(cell.values) for cell in cells if cell.values]
    parts = [_count(counts)]
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


def _count(counts: Sequence[int]) -> str:
    if not counts:
        return "No runs of ours yet."
    low, high = min(counts), max(counts)
    return f"n = {low if low == high else f'{low} to {high}'} seed{'' if high == 1 else 's'}."
