"""The `report:` block of a table's file: how the table is shown.

    report:
      allow: [engine]                  # settings that may differ, footnoted where they do (settings.py)
      against: [lora, pissa]           # the rows that the table's `ours` are tested against; default: all other methods
      compare: [[ba_lora, pissa], [rank=8, rank=4]]      # or: these methods and settings, the first against the second
      primary:                         # at most five tests, declared before the first run; all others are exploratory
        - {column: gsm8k, focus: ba_lora, against: pissa}     # in all bases and settings that have both, or in one:
        - {column: math, focus: ba_lora, against: pissa, base: llama-2-7b, setting: rank=8}
      paired: true                     # runs of one seed are taken together where the seed moves the same in both rows
      collapsed: {column: strict, below: 10, columns: [strict]}    # or above: a run beyond it is counted as a failure
                                       # in these columns (default: all), beside the mean of the others
      compare_within: [base]           # what ranked and compared rows have in common: base, setting, both or none
      clusters: base                   # the word of a setting that names a pre-trained model: means are over these
      hypotheses: {…}                  # about them, instead of comparisons of two rows (hypotheses.py)
      choose: heldout                  # of rows that differ in their setting, the best in this column is compared, in
                                       # the other columns, and written to chosen.yaml for another table (`chosen`):
                                       # settings are named by their overrides
      over_settings: [accuracy, nll]   # columns whose best, median, worst and spread over a method's settings are told
      names: {not stated: roberta-large}                 # the paper file's name of a model, method or setting → ours
      columns: {parameters: {scale: 1.0e-6, decimals: 1}}     # how a column's numbers are shown; `allow`: in it only
      figures:
        ablation: {kind: dots, columns: [gsm8k, math]}
        ranks: {kind: lines, columns: [gsm8k], x: rank, log_x: true}      # x: a key of the settings' names
        pareto: {kind: scatter, columns: [gsm8k], x: seconds, log_x: true}     # x: another column
        terms: {kind: training, terms: [loss (nats), svd], methods: [pissa, ba_lora]}    # a unit may follow
        tsne: {kind: features}         # over steps (features.py)
        dose: {kind: dose, columns: [wrong], x: noise}     # these three: of a table with hypotheses
        front: {kind: tradeoff, columns: [accuracy], x: wrong, level: noise=40}      # (hypothesis_figures.py)
        forest: {kind: forest}

The terms of a training figure are names of a run's log.jsonl (LOGGED_NAMES of ba_lora/training/log.py). A training or
features figure shows the runs behind `columns`, needed where a row's columns are trained on several sets.
`title`, `caption` (a sentence more) and `methods` (the rows drawn; default: all) go with every figure.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ba_lora.config.structured import read_mapping
from ba_lora.errors import UserError
from ba_lora.experiments.tables import Row
from ba_lora.words import check_choice
from eval.report.columns import ReportColumn
from eval.report.declared import parse_collapse, parse_primary
from eval.report.hypotheses import parse_hypotheses

FIGURE_KINDS = {  # kind → what it needs
    "dots": ("columns",),
    "lines": ("columns", "x"),
    "scatter": ("columns", "x"),
    "training": ("terms",),
    "features": (),
    "dose": ("columns", "x"),
    "tradeoff": ("columns", "x", "level"),
    "forest": (),
}


@dataclass(frozen=True)
class Figure:
    """A figure: its kind and what is drawn, see the head of this module."""

    name: str
    kind: str
    columns: tuple[str, ...] = ()
    x: str = ""
    log_x: bool = False
    terms: tuple[str, ...] = ()
    level: str = ""
    methods: tuple[str, ...] = ()
    title: str = ""
    caption: str = ""


@dataclass(frozen=True)
class ShownColumn:
    """How a column's numbers are shown, see the head of this module; None: as usual."""

    scale: float | None = None
    decimals: int | None = None
    allow: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReportBlock:
    """The block, see the head of this module. The entries of lists and mappings have types of their own, which are
    read one by one, so that an error names the entry."""

    allow: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    compare: tuple[Any, ...] = ()
    compare_within: tuple[str, ...] = ("base",)
    choose: str | None = None
    over_settings: tuple[str, ...] = ()
    primary: tuple[Any, ...] = ()
    paired: bool = False
    collapsed: Any = None
    clusters: str = ""
    hypotheses: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


def parse_report(raw: Any, *, rows: Sequence[Row], columns: Sequence[ReportColumn], source: str) -> dict[str, Any]:
    """Check a `report:` block and return `TableSpec`'s fields that it sets; `rows`, `columns`: as they are without it.

    Raises UserError, naming `source` and the key, for what is wrong.
    """
    where = f"{source}: report"
    block = read_mapping(ReportBlock, raw, where=where)
    names = [column.name for column in columns]
    for key in block.compare_within:
        check_choice(f"{where}.compare_within", key, ("base", "setting"))
    for name in block.columns:
        check_choice(f"{where}.columns", name, names)
    if block.choose is not None:
        check_choice(f"{where}.choose", block.choose, names)
        _check_settings(rows, clusters=block.clusters, where=f"{where}.choose")
    for name in block.over_settings:
        check_choice(f"{where}.over_settings", name, [column.name for column in columns if column.better != "none"])
    if block.hypotheses and not block.clusters:
        raise UserError(f"{where}.hypotheses needs report.clusters: the word that names the pre-trained model")
    shown = {
        name: read_mapping(ShownColumn, entry, where=f"{where}.columns.{name}") for name, entry in block.columns.items()
    }
    return {
        **{
            key: getattr(block, key)
            for key in ("allow", "against", "compare_within", "choose", "over_settings", "paired", "clusters", "names")
        },
        "compare": _pairs(block.compare, rows, where=f"{where}.compare"),
        "primary": parse_primary(block.primary, rows, names, where=f"{where}.primary"),
        "collapsed": (
            None if block.collapsed is None else parse_collapse(block.collapsed, names, where=f"{where}.collapsed")
        ),
        "hypotheses": parse_hypotheses(
            block.hypotheses, rows, names, clusters=block.clusters, where=f"{where}.hypotheses"
        ),
        "columns": tuple(
            _show(one, shown[one.name], where=f"{where}.columns.{one.name}") if one.name in shown else one
            for one in columns
        ),
        "figures": tuple(
            _figure(name, entry, names, where=f"{source}: figure {name}") for name, entry in block.figures.items()
        ),
    }


def _check_settings(rows: Sequence[Row], *, clusters: str, where: str) -> None:
    """Raise UserError where the settings that are chosen from could not be written as another table's overrides."""
    if len({row.base for row in rows}) > 1:
        raise UserError(f"{where}: the rows have several bases, and a choice is of one: leave one")
    for word in {word for row in rows for word in row.setting.split()}:
        key = word.partition("=")[0]
        if "." not in key and key != clusters:
            raise UserError(f"{where}: the setting {word} is no config key=value: name each setting by its overrides")


def _show(column: ReportColumn, shown: ShownColumn, *, where: str) -> ReportColumn:
    if shown.scale is not None and shown.scale <= 0:
        raise UserError(f"{where}: scale must be above 0, found {shown.scale:g}")
    if shown.decimals is not None and not 0 <= shown.decimals <= 10:
        raise UserError(f"{where}: decimals must be a whole number from 0 to 10, found {shown.decimals}")
    given = {key: value for key, value in vars(shown).items() if value is not None}
    return dataclasses.replace(column, **given)


def _figure(name: str, entry: Any, columns: Sequence[str], *, where: str) -> Figure:
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise UserError(f"{where}: the name becomes a file's: letters, digits, _ and - are allowed")
    figure = read_mapping(Figure, entry, where=where, name=name)
    check_choice(f"{where}: kind", figure.kind, FIGURE_KINDS)
    if missing := [key for key in FIGURE_KINDS[figure.kind] if not getattr(figure, key)]:
        raise UserError(f"{where}: a figure of kind {figure.kind} needs {' and '.join(missing)}")
    for column in (*figure.columns, *([figure.x] if figure.kind in ("scatter", "tradeoff") else [])):
        check_choice(f"{where}: column", column, columns)
    if figure.terms:
        from ba_lora.training.log import LOGGED_NAMES

        for term in figure.terms:
            check_choice(f"{where}: terms", term.partition(" ")[0], LOGGED_NAMES)
    return figure


def _pairs(pairs: Sequence[Any], rows: Sequence[Row], *, where: str) -> tuple[tuple[str, str], ...]:
    """Check pairs of what rows are called by, two methods or two settings each."""
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise UserError(f"{where} must be a list of pairs, [[a, b], …], found {pairs!r}")
    methods, settings = (list(dict.fromkeys(getattr(row, key) for row in rows)) for key in ("method", "setting"))
    for first, second in pairs:
        check_choice(where, first, [*methods, *settings])
        check_choice(where, second, methods if first in methods else settings)
    return tuple((first, second) for first, second in pairs)
