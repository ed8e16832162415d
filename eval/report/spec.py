"""What a table shows: rows, columns and runs from its config, and how to show them from the config's `report:` block.

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
                                       # the other columns; with clusters: the best settings, which are overrides, are
                                       # written to chosen.yaml for another table (`chosen`)
      over_settings: [accuracy, nll]   # columns whose best, median, worst and spread over a method's settings are told
      names: {not stated: roberta-large}                 # the paper file's name of a model, method or setting → ours
      columns: {parameters: {scale: 1.0e-6, decimals: 1}}     # how a column's numbers are shown; `allow`: in it only
      figures:
        ablation: {kind: dots, columns: [gsm8k, math]}
        ranks: {kind: lines, columns: [gsm8k], x: rank, log_x: true}      # x: a key of the settings' names
        pareto: {kind: scatter, columns: [gsm8k], x: seconds}
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
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ba_lora.config.schema import UNTUNED, RunConfig
from ba_lora.errors import UserError
from ba_lora.experiments import tables
from ba_lora.experiments.state import deciding
from ba_lora.experiments.tables import Row, Table
from eval.report.checks import choice, mapping, words
from eval.report.declared import Collapse, Primary, parse_collapse, parse_primary
from eval.report.hypotheses import Hypothesis, parse_hypotheses
from eval.report.seeds import moved_by_seed
from eval.report.stats import MOST_PRIMARY

BLOCK_KEYS = ("base", "setting")
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
_PERCENT = 100.0


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
class Items:
    """The graded items whose mean a column shows: all of a task, or those whose `group` is one of `members`."""

    task: str
    metric: str
    group: str | None = None
    members: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReportColumn:
    """A column: where its value stands in a result, and how it is shown.

    task: the evaluation that holds it (None: the result itself); metric: a name among the task's metrics, or a dotted
    path (see `metric_value`); mean_of: the columns whose mean it is, instead; scale: the value shown is the stored one
    times this; better: the direction that is ranked, "none" for no ranking and no test; paper: (task, metric) in the
    paper's file; allow: the settings that may differ in this column.
    """

    name: str
    label: str
    task: str | None = None
    metric: str | None = None
    mean_of: tuple[str, ...] = ()
    unit: str = "%"
    scale: float = _PERCENT
    decimals: int = 2
    better: str = "higher"
    paper: tuple[str, str] | None = None
    allow: tuple[str, ...] = ()

    @property
    def items(self) -> Items | None:
        """The items whose grades have the column's value as their mean; None where it is no mean over items."""
        if self.task is None or self.metric is None:
            return None
        if re.fullmatch(r"[^.{}]+", self.metric):
            return Items(self.task, self.metric)
        found = re.fullmatch(r"groups\.([^.{}]+)\.(?:\{([^}]*)\}|([^.{}]+))\.metrics\.([^.{}]+)", self.metric)
        if found is None:
            return None
        members = tuple(name.strip() for name in (found[2] or found[3]).split(","))
        return Items(self.task, found[4], group=found[1], members=members)

    @property
    def is_cost(self) -> bool:
        """Whether the value depends on the hardware: a time or a memory."""
        return re.search(r"(seconds|_mb|_per_second)$", self.metric or "") is not None


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


def _paper_names(column: tables.Column) -> tuple[str, str] | None:
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
            scale=_PERCENT if column.unit == "percent" and not column.mean_of else 1.0,
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


def parse_report(block: Any, *, rows: Sequence[Row], columns: Sequence[ReportColumn], source: str) -> dict[str, Any]:
    """Check a `report:` block and return `TableSpec`'s fields that it sets; `rows`, `columns`: as they are without it.

    Raises UserError, naming `source` and the key, for what is wrong.
    """
    known = (
        "allow", "against", "compare", "compare_within", "choose", "primary", "paired", "collapsed", "names", "columns",
        "figures", "clusters", "hypotheses", "over_settings",
    )  # fmt: skip
    block = mapping(block, known, where=f"{source}: report")
    values: dict[str, Any] = {
        key: words(block[key], where=f"{source}: report.{key}")
        for key in ("allow", "against", "compare_within")
        if key in block
    }
    for key in values.get("compare_within", ()):
        choice(key, BLOCK_KEYS, where=f"{source}: report.compare_within")
    values["names"] = {
        key: str(name) for key, name in mapping(block.get("names") or {}, where=f"{source}: report.names").items()
    }
    values["compare"] = _pairs(block.get("compare") or [], rows, where=f"{source}: report.compare")
    names = [column.name for column in columns]
    if "choose" in block:
        values["choose"] = choice(block["choose"], names, where=f"{source}: report.choose")
    values["over_settings"] = words(block.get("over_settings", []), where=f"{source}: report.over_settings")
    for name in values["over_settings"]:
        choice(name, [column.name for column in columns if column.better != "none"], where=f"{source}: over_settings")
    values["primary"] = parse_primary(block.get("primary") or [], rows, names, where=f"{source}: report.primary")
    values["paired"] = block.get("paired", False)
    if not isinstance(values["paired"], bool):
        raise UserError(f"{source}: report.paired must be true or false, found {values['paired']!r}")
    if "collapsed" in block:
        values["collapsed"] = parse_collapse(block["collapsed"], names, where=f"{source}: report.collapsed")
    values["clusters"] = block.get("clusters", "")
    if "hypotheses" in block and not values["clusters"]:
        raise UserError(f"{source}: report.hypotheses needs report.clusters: the word that names the pre-trained model")
    values["hypotheses"] = parse_hypotheses(
        block.get("hypotheses") or {}, rows, names, clusters=values["clusters"], where=f"{source}: report.hypotheses"
    )
    shown = mapping(block.get("columns") or {}, names, where=f"{source}: report.columns")
    values["columns"] = tuple(
        _show(column, shown.get(column.name) or {}, where=f"{source}: report.columns.{column.name}")
        for column in columns
    )
    figures = mapping(block.get("figures") or {}, where=f"{source}: report.figures")
    values["figures"] = tuple(
        _figure(name, entry, columns=names, where=f"{source}: figure {name}") for name, entry in figures.items()
    )
    return values


def metric_value(result: Mapping[str, Any], column: ReportColumn) -> float | None:
    """Return the number that a result holds for a column, unscaled; None where nothing (or null) stands there.

    A path is read from the task's entry, or from the result where the column has no task. `{a,b}` in it takes the mean
    over the alternatives, each weighted by its `n` where all have one (so that the mean over groups of items is the
    mean over their items); one that is missing makes the whole None.
    """
    node: Any = result
    if column.task is not None:
        node = (result.get("evaluation") or {}).get(column.task) or {}
        metrics = node.get("metrics") or {}
        node = metrics if column.metric in metrics else node
    return _resolve(node, re.findall(r"\{[^}]*\}|[^.{}]+", column.metric or ""))[0]


def why_missing(result: Mapping[str, Any], column: ReportColumn) -> tuple[str, str] | None:
    """Return (status, reason) of a run that has no number for a column and will have none.

    The status is "undefined" where the data leave the metric undefined, "unmeasured" where nothing was measured. None
    where the evaluation is yet to be made, and where the column does not apply to the run.
    """
    if column.task is not None:
        entry = (result.get("evaluation") or {}).get(column.task)
        if not entry:
            return None
        notes, metric = entry.get("notes") or {}, column.metric or ""
        note = notes.get(metric) or notes.get(metric.removeprefix("per_class."))
        return ("undefined", note.removeprefix("undefined: ")) if note else ("unmeasured", f"its score has no {metric}")
    *keys, last = (column.metric or "").split(".")
    node: Any = result
    for key in keys:
        node = node.get(key) if isinstance(node, Mapping) else None
    if not isinstance(node, Mapping) or last not in node:
        return None
    resumed = node.get("resumed_from")
    return "unmeasured", f"the training was resumed from {resumed}" if resumed else f"the run gave no {last}"


def _resolve(node: Any, keys: Sequence[str]) -> tuple[float | None, int | None]:
    """Return (value, the nearest n above it)."""
    count = None
    for position, key in enumerate(keys):
        if not isinstance(node, Mapping):
            return None, count
        count = node.get("n", count)
        if key.startswith("{"):
            names = [name.strip() for name in key[1:-1].split(",")]
            found = [_resolve(node.get(name), keys[position + 1 :]) for name in names]
            if any(value is None for value, _ in found):
                return None, count
            weights = [weight if all(n for _, n in found) else 1 for _, weight in found]
            return sum(w * value for w, (value, _) in zip(weights, found, strict=True)) / sum(weights), sum(weights)
        node = node.get(key)
    is_number = isinstance(node, int | float) and not isinstance(node, bool)
    return (float(node) if is_number else None), count


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


def _show(column: ReportColumn, entry: Any, *, where: str) -> ReportColumn:
    entry = mapping(entry, ("scale", "decimals", "allow"), where=where)
    allow = words(entry.get("allow", []), where=f"{where}: allow")
    scale, decimals = entry.get("scale", column.scale), entry.get("decimals", column.decimals)
    try:
        scale = float(scale)  # YAML 1.1 reads 1e-6 as text
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: scale must be a number, found {scale!r}") from error
    if not 0 < scale < math.inf:
        raise UserError(f"{where}: scale must be above 0, found {scale:g}")
    if not isinstance(decimals, int) or not 0 <= decimals <= 10:
        raise UserError(f"{where}: decimals must be a whole number from 0 to 10, found {decimals!r}")
    return dataclasses.replace(column, scale=scale, decimals=decimals, allow=allow)


def _figure(name: str, entry: Any, *, columns: Sequence[str], where: str) -> Figure:
    known = [entry.name for entry in dataclasses.fields(Figure) if entry.name != "name"]
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise UserError(f"{where}: the name becomes a file's: letters, digits, _ and - are allowed")
    values = mapping(entry, known, where=where)
    kind = choice(values.get("kind", ""), list(FIGURE_KINDS), where=f"{where}: kind")
    for key in ("columns", "terms", "methods"):
        values[key] = words(values.get(key, []), where=f"{where}: {key}")
    missing = [key for key in FIGURE_KINDS[kind] if not values.get(key)]
    if missing:
        raise UserError(f"{where}: a figure of kind {kind} needs {' and '.join(missing)}")
    for column in (*values["columns"], *([values["x"]] if kind in ("scatter", "tradeoff") else [])):
        choice(column, columns, where=where)
    if values["terms"]:
        from ba_lora.training.log import LOGGED_NAMES

        for term in values["terms"]:
            choice(term.partition(" ")[0], LOGGED_NAMES, where=f"{where}: terms")
    return Figure(name=name, **values)


def _pairs(value: Any, rows: Sequence[Row], *, where: str) -> tuple[tuple[str, str], ...]:
    """Check pairs of what rows are called by, two methods or two settings each."""
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise UserError(f"{where} must be a list of pairs, [[a, b], …], found {value!r}")
    methods, settings = (list(dict.fromkeys(getattr(row, key) for row in rows)) for key in ("method", "setting"))
    for first, second in value:
        choice(first, [*methods, *settings], where=where)
        choice(second, methods if first in methods else settings, where=where)
    return tuple((first, second) for first, second in value)


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
