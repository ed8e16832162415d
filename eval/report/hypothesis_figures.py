"""What a table with hypotheses shows: means over its pre-trained models by level, and the figures of them.

dose      columns over the number that the levels give to `x`: a line an arm
tradeoff  a column against the column `x`, at one level: a mark an arm, with the front of arms that none beats
forest    the hypotheses' effects with their intervals and margins

Means are over pre-trained models, each the mean of its runs; bars are the means' 95 % confidence intervals (t).
"""

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure as Canvas

from eval.report.block import Figure
from eval.report.columns import ReportColumn
from eval.report.hypotheses import NOT_RUN, Finding, level_of
from eval.report.sheets import ARROWS, Sheet, Text, format_number, probability, signed
from eval.report.spec import setting_value
from eval.report.style import add_legend, axis_label, line_handle, panel_grid, pareto_front, styles_of, y_axis
from eval.report.table import ReportTable


@dataclass(frozen=True)
class Mean:
    """Of n pre-trained models: their mean, and half the width of its 95 % interval (0 for one)."""

    mean: float
    half: float
    n: int


def mean_at(table: ReportTable, method: str, level: str, column: ReportColumn) -> Mean | None:
    """Return an arm's mean at a level; None where a model has no value yet, or the table has no such rows."""
    from scipy import stats

    rows = [row for row in table.spec.rows if row.method == method and level_of(row, table.spec.clusters) == level]
    cells = [table.cell(row, column) for row in rows]
    if not cells or any(len(cell.values) < cell.num_planned or not cell.values for cell in cells):
        return None
    means = np.array([cell.mean for cell in cells])
    half = 0.0
    if len(means) > 1:
        half = float(stats.t.ppf(0.975, len(means) - 1) * means.std(ddof=1) / np.sqrt(len(means)))
    return Mean(float(means.mean()), half, len(means))


def arms_and_levels(table: ReportTable) -> tuple[list[str], list[str]]:
    """Return the table's methods and its levels, in its order."""
    rows = table.spec.rows
    methods = dict.fromkeys(row.method for row in rows)
    return list(methods), list(dict.fromkeys(level_of(row, table.spec.clusters) for row in rows))


def level_sheet(table: ReportTable) -> Sheet:
    """Return the means by level and arm; blank until all models of an arm have their values."""
    spec = table.spec
    methods, levels = arms_and_levels(table)
    rows, breaks = [], []
    for level in levels:
        breaks += [len(rows)] if rows else []
        for method in methods:
            found = [mean_at(table, method, level, column) for column in spec.columns]
            if any(found):
                rows.append(
                    (
                        Text(spec.label(level)),
                        Text(spec.label(method)),
                        *(_text(one, column) for one, column in zip(found, spec.columns, strict=True)),
                    )
                )
    header = ("level", "method", *(f"{axis_label(column)}{ARROWS[column.better]}" for column in spec.columns))
    return Sheet((("", len(header)),), header, tuple(rows), tuple(breaks))


def chosen_settings(table: ReportTable) -> dict[str, list[str]]:
    """Return method → the overrides of the setting that the table has chosen, as far as it has; {} where it chooses
    nothing."""
    if not table.spec.choose:
        return {}
    if table.spec.clusters:
        return _chosen_levels(table)
    return {row.method: row.setting.split() for row in table.compared}


def _chosen_levels(table: ReportTable) -> dict[str, list[str]]:
    """Return the best level of each method over all pre-trained models; {} until all have their values: budgets are
    equal only then."""
    column = table.spec.column(table.spec.choose)
    methods, levels = arms_and_levels(table)
    known = {(row.method, level_of(row, table.spec.clusters)) for row in table.spec.rows}
    found = {key: mean_at(table, *key, column) for key in known}
    if not all(found.values()):
        return {}
    sign = -1.0 if column.better == "lower" else 1.0
    best: dict[str, str] = {}
    for method in methods:
        own = [level for level in levels if (method, level) in found]
        best[method] = max(own, key=lambda level: sign * found[method, level].mean)
    return {method: level.split() for method, level in best.items()}


def _text(one: Mean | None, column: ReportColumn) -> Text:
    if one is None:
        return Text("")
    half = f" ± {format_number(one.half, column.decimals)}" if one.n > 1 else ""
    return Text(f"{format_number(one.mean, column.decimals)}{half} ({one.n})")


def hypothesis_sheet(table: ReportTable) -> Sheet:
    """Return the hypotheses, one a line."""
    header = ("", "hypothesis", "decision", "effect", "95 % interval", "p", "p, Holm", "models", "items")
    return Sheet((("", len(header)),), header, tuple(_line(table, one) for one in table.findings), num_names=3)


def _line(table: ReportTable, one: Finding) -> tuple[Text, ...]:
    decimals = table.spec.column(one.hypothesis.column).decimals
    interval = "" if one.low is None else f"{signed(one.low, decimals)} … {signed(one.high, decimals)}"
    decision = f"{NOT_RUN}: {one.num_missing} runs are missing" if one.decision == NOT_RUN else one.decision
    if one.guard is not None:
        guard = one.hypothesis.guard
        column = table.spec.column(guard.column)
        told = signed(one.guard, column.decimals)
        kept = "kept" if one.guard >= -guard.margin else "not kept"
        decision += f" (guard {kept}: {column.label} {told}, at least {format_number(-guard.margin, column.decimals)})"
    kind = " (primary)" if one.hypothesis.primary else " (condition)" if one.hypothesis.condition else ""
    words = (
        f"{one.hypothesis.name}{kind}", one.hypothesis.says, decision, signed(one.difference, decimals), interval,
        probability(one.p), probability(one.p_adjusted), " / ".join(map(str, one.num_clusters)),
        "" if one.num_items is None else str(one.num_items),
    )  # fmt: skip
    return tuple(Text(word) for word in words)


def hypothesis_legend(table: ReportTable) -> list[str]:
    """Return the sentences below the hypotheses."""
    if all(one.low is None or one.num_items for one in table.findings):
        return []
    return [
        "Where no items are given, grades are not at hand: interval, p and decision are by the models only, "
        "and say nothing of other items."
    ]


def draw_dose(table: ReportTable, figure: Figure) -> tuple[Canvas, str] | None:
    """Return the figure and its caption; None where no arm has values at two levels."""
    methods, levels = arms_and_levels(table)
    doses = {level: dose for level in levels if (dose := setting_value(level, figure.x)) is not None}
    styles = styles_of([(method,) for method in methods])
    canvas, axes = panel_grid(len(figure.columns), across=len(figure.columns))
    drawn, counts = [], set()
    for axis, name in zip(axes, figure.columns, strict=True):
        column = table.spec.column(name)
        for place, method in enumerate(one for one in methods if not figure.methods or one in figure.methods):
            points = [(doses[level], mean_at(table, method, level, column)) for level in doses]
            points = sorted(((dose, one) for dose, one in points if one), key=lambda point: point[0])
            if len(points) < 2:
                continue
            style = styles[method,]
            shift = 0.25 * (place - len(methods) / 2)  # bars beside each other
            x, y, half = zip(*((dose + shift, one.mean, one.half) for dose, one in points), strict=True)
            axis.errorbar(x, y, half, color=style.colour, marker=style.marker, ls=style.line, capsize=2)
            counts |= {one.n for _, one in points}
            drawn += [method] if method not in drawn else []
        axis.set_xticks(sorted(set(doses.values())))
        axis.set_xlabel(table.spec.label(figure.x))
        y_axis(axis, column)
    if not drawn:
        return None
    add_legend(canvas, [line_handle(styles[method,], table.spec.label(method)) for method in drawn])
    return canvas, _models(counts)


def draw_tradeoff(table: ReportTable, figure: Figure) -> tuple[Canvas, str] | None:
    """Return the figure and its caption; None where fewer than two arms have values."""
    methods, _ = arms_and_levels(table)
    styles = styles_of([(method,) for method in methods])
    across = table.spec.column(figure.x)
    canvas, axes = panel_grid(len(figure.columns), across=len(figure.columns))
    drawn, counts, has_front = [], set(), False
    for axis, name in zip(axes, figure.columns, strict=True):
        column = table.spec.column(name)
        points = []
        for method in (one for one in methods if not figure.methods or one in figure.methods):
            x, y = (mean_at(table, method, figure.level, one) for one in (across, column))
            if x is None or y is None:
                continue
            style = styles[method,]
            axis.errorbar(x.mean, y.mean, y.half, x.half, color=style.colour, marker=style.marker, ls="", capsize=2)
            points.append((x.mean, y.mean))
            counts |= {x.n, y.n}
            drawn += [method] if method not in drawn else []
        front = pareto_front(points, better=(across.better, column.better))
        if len(set(front)) > 1:
            has_front = True
            axis.plot(*zip(*front, strict=True), color="0.4", lw=0.9, ls="--", zorder=1)
        axis.set_xlabel(f"{axis_label(across)}{ARROWS[across.better]}")
        y_axis(axis, column)
    if len(drawn) < 2:
        return None
    add_legend(canvas, [line_handle(styles[method,], table.spec.label(method), line="") for method in drawn])
    dashed = " Dashed: the arms that none beats in both." if has_front else ""
    return canvas, f"At {table.spec.label(figure.level)}. {_models(counts)}{dashed}"


def draw_forest(table: ReportTable, figure: Figure) -> tuple[Canvas, str] | None:
    """Return the figure and its caption; None where no hypothesis has an interval."""
    found = [one for one in table.findings if one.low is not None]
    if not found:
        return None
    canvas, (axis,) = panel_grid(1, across=1, panel_width=5.0, panel_height=0.6 + 0.35 * len(found))
    for y, one in enumerate(found):
        margin = one.hypothesis.margin * (1 if one.hypothesis.expected == "above" else -1)
        axis.plot([one.low, one.high], [y, y], color="#0072B2", lw=1.6)
        axis.plot(one.difference, y, "o" if one.hypothesis.primary else "s", color="#0072B2", mec="black", mew=0.5)
        axis.plot([margin, margin], [y - 0.3, y + 0.3], color="#D55E00", lw=1.2, ls=":")
    axis.axvline(0, color="0.4", lw=0.8)
    axis.set_yticks(range(len(found)), [f"{one.hypothesis.name}: {one.decision}" for one in found])
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.set_xlabel("effect (points)")
    told = "; ".join(f"{one.hypothesis.name}: {one.hypothesis.says}" for one in found)
    over = "models and items" if all(one.num_items for one in found) else "models"
    dots = " Dots: primary." if any(one.hypothesis.primary for one in found) else ""
    return canvas, f"Effects with 95 % intervals over {over}; dotted: the margin.{dots} {told}."


def _models(counts: set[int]) -> str:
    if not counts:
        return ""
    number = str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return f"n = {number} pre-trained models. Bars: 95 % confidence interval of the mean over them (t)."
