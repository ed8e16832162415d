"""How the report's figures look: colours, markers and lines, panels, legend, and how they are saved."""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from eval.report.columns import ReportColumn
from eval.report.sheets import ARROWS

RC = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "pdf.fonttype": 42,  # letters stay letters: searchable, editable
    "ps.fonttype": 42,
}
PANEL_WIDTH, PANEL_HEIGHT, DPI = 3.2, 2.5, 200  # inches, dots an inch


@dataclass(frozen=True)
class Style:
    """How a row is drawn."""

    colour: str
    marker: str
    line: Any


# Colours of Okabe and Ito, which colour-blind readers tell apart, but for their yellow, which is lost in grey; lists of
# unequal lengths, so that no two rows of a table share all four.
_COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#A09000", "#B5B5B5", "#777777", "#7A3E00",
    "#6A3D9A", "#1B2A6B", "#00502F", "#F4A6C0", "#000000", "#A6D854",
)  # fmt: skip
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "p", "*", "d", "8")
_LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 2)))


HOLLOW = {"mfc": "none", "mec": "black", "ms": 3.2, "mew": 0.8, "zorder": 4}
HALO = [withStroke(linewidth=2, foreground="white")]  # keeps a hollow mark visible on a dark bar


_FIRST = (("lora",), ("pissa",), ("ba_lora",), ("ba_lora_iclr2026",), ("full_ft",), ("untuned",))


def styles_of(series: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], Style]:
    """Return the style of each of a table's series, (method, setting …): the same in all its figures, and for the
    methods that most tables have, in all tables."""
    order = [*_FIRST, *(one for one in dict.fromkeys(series) if one not in _FIRST)]
    return {one: style_of(order.index(one)) for one in series}


def style_of(position: int) -> Style:
    """Return the n-th style."""
    lists = (_COLOURS, _MARKERS, _LINES)
    return Style(*(choices[position % len(choices)] for choices in lists))


def panel_grid(
    count: int, *, across: int, panel_width: float = PANEL_WIDTH, panel_height: float = PANEL_HEIGHT
) -> tuple[Canvas, list[Axes]]:
    """Return a canvas and its first `count` panels, row by row, at most four abreast."""
    across = min(across, 4)
    down = -(-count // across)
    canvas = Canvas(figsize=(max(panel_width * across, 4.2), panel_height * down + 0.7), layout="constrained")
    axes = list(canvas.subplots(down, across, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    return canvas, axes[:count]


def pareto_front(
    points: Sequence[tuple[float, float]], *, better: tuple[str, str] = ("lower", "higher")
) -> list[tuple[float, float]]:
    """Return the points that no other point is at least as good as in both values and better in one, sorted by x.

    better: the good direction of x and y, "lower" or "higher" ("none" counts as lower for x, higher for y).
    """
    signs = (1 if better[0] == "higher" else -1, -1 if better[1] == "lower" else 1)
    good = [(signs[0] * x, signs[1] * y) for x, y in points]
    return sorted(
        point
        for point, mine in zip(points, good, strict=True)
        if not any(other != mine and other[0] >= mine[0] and other[1] >= mine[1] for other in good)
    )


def log_x(axis: Axes, ticks: list[float]) -> None:
    """A logarithmic axis with a tick at each value; 0, where there is one, stands a step before the smallest."""
    positive = [tick for tick in ticks if tick > 0]
    if len(positive) < len(ticks):
        axis.set_xscale("symlog", linthresh=positive[0], linscale=0.5)
    else:
        axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def axis_label(column: ReportColumn) -> str:
    """Return what stands on an axis that shows a column."""
    return f"{column.label}{f' ({column.unit})' if column.unit else ''}"


def y_axis(axis: Axes, column: ReportColumn) -> None:
    """Name the y axis after a column, with the direction that is better."""
    axis.set_ylabel(f"{axis_label(column)}{ARROWS[column.better]}")


def line_handle(style: Style, label: str, *, line: Any = None) -> Line2D:
    """Return a line's entry in the legend; line: another line style, "" for none."""
    return Line2D([], [], color=style.colour, marker=style.marker, ls=style.line if line is None else line, label=label)


def add_legend(canvas: Canvas, handles: Sequence[Any]) -> None:
    """Put the legend above the panels, in as many columns as there is room for."""
    width, _ = canvas.get_size_inches()
    longest = max(len(handle.get_label()) for handle in handles)
    across = max(1, min(len(handles), int(width * 13 / (longest + 7))))
    _make_room(canvas, 0.17 * -(-len(handles) // across))
    canvas.legend(handles=list(handles), loc="outside upper center", ncols=across)


def _make_room(canvas: Canvas, inches: float) -> None:
    """Make the canvas so much higher, for what stands above or below its panels."""
    width, height = canvas.get_size_inches()
    canvas.set_size_inches(width, height + inches)


def save(canvas: Canvas, title: str, caption: str) -> dict[str, bytes]:
    """Put title and caption around the panels; return the files. The title stands over the legend, if there is one."""
    width, _ = canvas.get_size_inches()
    wrapped = "\n".join(textwrap.wrap(title, int(width * 13)))
    if canvas.legends:
        canvas.legends[0].set_title(wrapped, prop={"size": 10})
    else:
        canvas.suptitle(wrapped, fontsize=10)
    lines = textwrap.wrap(caption, int(width * 19))
    _make_room(canvas, 0.13 * len(lines))
    wrapped = "\n".join(lines)
    canvas.supxlabel(wrapped, x=0.01, ha="left", fontsize=7, color="0.25")
    return as_files(canvas)


def as_files(canvas: Canvas) -> dict[str, bytes]:
    """Return {"png": …, "pdf": …}, without dates: the same results give the same bytes.

    Call it where the figure's settings (RC) hold: how letters are stored in a PDF is decided here.
    """
    files = {}
    for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        buffer = io.BytesIO()
        canvas.savefig(buffer, format=kind, dpi=DPI, metadata=metadata, bbox_inches="tight")
        files[kind] = buffer.getvalue()
    return files
