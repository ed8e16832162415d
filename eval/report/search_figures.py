"""The figures of searches: best value by trial, importances, slices, parallel coordinates; the engines side by side."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from ba_lora.experiments.search.journal import PRUNED
from eval.report.search_trials import SearchTrials, short_names
from eval.report.style import RC, add_legend, as_files, line_handle, panel_grid, style_of

COLOURS = "viridis"


def search_figures(search: SearchTrials, importances: Mapping[str, float]) -> dict[str, bytes]:
    """Return each figure's PNG; {} where there are no importances, which need a few whole trials."""
    if not importances:
        return {}
    files = {}
    with matplotlib.rc_context(RC):
        canvas, (axis,) = panel_grid(1, across=1)
        _history(axis, search)
        files["history"] = as_files(canvas)["png"]
        canvas, (axis,) = panel_grid(1, across=1)
        names = list(reversed(importances))
        axis.barh(names, [importances[name] for name in names], color=style_of(0).colour)
        axis.set_xlabel("importance")
        files["importances"] = as_files(canvas)["png"]
        keys = [parameter["key"] for parameter in search.space["parameters"]]
        canvas, axes = panel_grid(len(keys), across=4, panel_width=2.2, panel_height=1.9)
        for axis, parameter in zip(axes, search.space["parameters"], strict=True):
            _slice(axis, search, parameter)
        files["slice"] = as_files(canvas)["png"]
        canvas, (axis,) = panel_grid(1, across=1, panel_width=max(4.2, 1.2 * len(keys) + 1.5), panel_height=3.0)
        _parallel_coordinates(canvas, axis, search)
        files["parallel_coordinates"] = as_files(canvas)["png"]
    return files


def _objective(search: SearchTrials) -> str:
    return search.space["objective"].replace("_", " ")


def _history(axis: Axes, search: SearchTrials) -> None:
    whole, style = search.whole, style_of(0)
    axis.plot([t["number"] + 1 for t in whole], [t["value"] for t in whole], "o", ms=3, color="0.6", label="a trial")
    pruned = [t for t in search.trials if t["status"] == PRUNED and t["value"] is not None]
    if pruned:
        axis.plot(
            [t["number"] + 1 for t in pruned], [t["value"] for t in pruned], "x", ms=3, color="0.6", label="pruned"
        )
    best = search.best_so_far()
    axis.step(range(1, len(best) + 1), best, where="post", color=style.colour, label="best so far")
    axis.set_xlabel("trials")
    axis.set_ylabel(_objective(search))
    axis.legend()


def _slice(axis: Axes, search: SearchTrials, parameter: Mapping[str, Any]) -> None:
    """The value against one parameter; later trials are darker."""
    whole, key = search.whole, parameter["key"]
    places = [_place(parameter, trial["values"][key]) for trial in whole]
    numbers = [trial["number"] for trial in whole]
    axis.scatter(places, [trial["value"] for trial in whole], c=numbers, cmap=COLOURS + "_r", s=10)
    axis.set_xlabel(short_names([one["key"] for one in search.space["parameters"]])[key])
    axis.set_ylabel(_objective(search))
    if parameter["kind"] == "choice":
        axis.set_xticks(range(len(parameter["choices"])), [str(choice) for choice in parameter["choices"]])
    elif parameter["log"]:
        axis.set_xscale("log")


def _place(parameter: Mapping[str, Any], value: Any) -> float:
    return parameter["choices"].index(value) if parameter["kind"] == "choice" else value


def _parallel_coordinates(canvas: Any, axis: Axes, search: SearchTrials) -> None:
    """A line a trial over all parameters, each from its low end (bottom) to its high one; the best are drawn last."""
    from ba_lora.experiments.search.space import Parameter

    raw = search.space["parameters"]
    parameters = [Parameter(**{**one, "choices": tuple(one["choices"])}) for one in raw]
    names = short_names([parameter.key for parameter in parameters])
    values = [trial["value"] for trial in search.whole]
    scale = Normalize(min(values), max(values))
    colours = matplotlib.colormaps[COLOURS if not search.maximise else COLOURS + "_r"]
    for trial in sorted(search.whole, key=lambda one: one["value"], reverse=not search.maximise):
        shares = [parameter.share_of(trial["values"][parameter.key]) for parameter in parameters]
        axis.plot(range(len(shares)), shares, color=colours(scale(trial["value"])), lw=1, alpha=0.8)
    ends = [
        (parameter.choices[0], parameter.choices[-1]) if parameter.kind == "choice" else (parameter.low, parameter.high)
        for parameter in parameters
    ]
    axis.set_xticks(
        range(len(parameters)), [f"{_end(low)}\n{names[p.key]}" for p, (low, _) in zip(parameters, ends, strict=True)]
    )
    for place, (_, high) in enumerate(ends):
        axis.annotate(_end(high), (place, 1.02), ha="center", fontsize=7)
    axis.set_yticks([])
    canvas.colorbar(ScalarMappable(scale, colours), ax=axis, label=_objective(search))


def _end(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def comparison_figure(groups: Mapping[str, Sequence[SearchTrials]]) -> dict[str, bytes]:
    """Return the best value so far by trial: each search thin, the mean of each engine thick; as png and pdf."""
    with matplotlib.rc_context(RC):
        canvas, (axis,) = panel_grid(1, across=1, panel_width=4.6, panel_height=3.0)
        handles = []
        for position, (engine, found) in enumerate(groups.items()):
            style = style_of(position)
            curves = [search.best_so_far() for search in found]
            for curve in curves:
                axis.step(range(1, len(curve) + 1), curve, where="post", color=style.colour, lw=0.6, alpha=0.6)
            length = min(map(len, curves))
            mean = [statistics.fmean(values) for values in zip(*(curve[:length] for curve in curves), strict=True)]
            axis.step(range(1, length + 1), mean, where="post", color=style.colour, ls=style.line, lw=2)
            handles.append(line_handle(style, f"{engine}, mean of {len(found)}"))
        axis.set_xlabel("trials")
        axis.set_ylabel(f"best {_objective(next(iter(groups.values()))[0])} so far")
        add_legend(canvas, handles)
        return as_files(canvas)
