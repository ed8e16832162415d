"""Figures of what runs leave beside their results: what training logged, and pooled features."""

import dataclasses

import numpy as np
from matplotlib.figure import Figure as Canvas

from ba_lora.experiments.tables import Row
from eval.report import features
from eval.report.block import Figure
from eval.report.figure_rows import (
    NothingToDraw,
    count_seeds,
    figure_rows,
    rows_together,
    runs_of_row,
    series_of,
    series_styles,
    without_lone,
    written_words,
)
from eval.report.sources import Sources
from eval.report.style import add_legend, line_handle, panel_grid
from eval.report.table import ReportTable


def draw_training(table: ReportTable, figure: Figure, sources: Sources) -> tuple[Canvas, str]:
    """One panel a block and term: what training logged, as the mean over seeds and a band of one deviation."""
    spec = table.spec
    logs = {
        row: [log for run in runs_of_row(spec, figure, row) if (log := sources.log(run))]
        for row in figure_rows(table, figure)
    }
    rows = [row for row, found in logs.items() if found]
    if not rows:
        raise NothingToDraw("no run's log.jsonl is at hand")
    rows = without_lone(spec, rows)
    blocks = list(dict.fromkeys(spec.block(row) for row in rows))
    series = list(dict.fromkeys(series_of(spec, row) for row in rows))
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
    counts, styles, together = [], series_styles(spec), []
    for axis, (block, term) in zip(axes, panels, strict=True):
        means: dict[Row, dict[int, float]] = {}
        for row in rows:
            found = curves[term, row]
            if spec.block(row) != block or not found:
                continue
            position, style = series.index(series_of(spec, row)), styles[series_of(spec, row)]
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
        axis.set_title(written_words(spec, block))
        axis.set_xlabel("step")
        axis.set_ylabel(term)
        for group in _coinciding_curves(means):
            if len(group) > 1:
                together.append(f"{term.partition(' ')[0]}, {rows_together(spec, block, None, group)}")
    add_legend(canvas, [line_handle(styles[one], written_words(spec, one)) for one in series])
    caption = f"{count_seeds(counts)} Lines: mean over seeds of what training logged; bands: standard deviation."
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


def draw_feature_panels(table: ReportTable, figure: Figure, sources: Sources) -> tuple[Canvas, str]:
    """A row of t-SNE panels over steps for each row of the table, of its first seed that has features at hand."""
    spec = table.spec
    runs, seeds = [], []
    for row in figure_rows(table, figure):
        found = [run for run in runs_of_row(spec, figure, row) if (run.run_path / "features").is_dir()]
        if found:
            seeds.append(found[0].seed)
            [run] = features.read_runs([found[0].run_path])
            runs.append(
                dataclasses.replace(run, name=written_words(spec, [word for word in dataclasses.astuple(row) if word]))
            )
    if not runs:
        raise NothingToDraw("no run's features are at hand")
    canvas = features.draw_features(runs, features.measure(runs))
    named = ", ".join(str(seed) for seed in dict.fromkeys(seeds))
    return canvas, (
        f"One run each, seed {named}. t-SNE of pooled features, each panel by itself: axes and distances between "
        "panels mean nothing. Silhouette and effective rank are of the features."
    )
