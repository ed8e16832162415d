"""A table as texts under headings, before any mark-up: what Markdown and LaTeX have in common."""

import string
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from ba_lora.experiments.tables import Row
from eval.report.cells import Cell
from eval.report.columns import ReportColumn
from eval.report.comparisons import Comparison
from eval.report.hypotheses import level_of
from eval.report.paired import TOO_FEW
from eval.report.spec import TableSpec, row_name
from eval.report.stats import LEAST_SEEDS, SIGNIFICANT
from eval.report.table import ReportTable

ARROWS = {"higher": " ↑", "lower": " ↓", "none": ""}


@dataclass(frozen=True)
class Drawn:
    """A figure that was drawn: figures/<name>.png and .pdf, with its caption; `missing` says why one was not."""

    name: str
    title: str
    caption: str
    missing: str | None = None


@dataclass(frozen=True)
class Text:
    """What stands in one place: plain text, its mark ("best", "second", "") and its footnotes' letters."""

    text: str
    mark: str = ""
    notes: str = ""


@dataclass(frozen=True)
class Sheet:
    """Rows of texts under headings. groups: (heading, number of columns), one over each run of columns."""

    groups: tuple[tuple[str, int], ...]
    header: tuple[str, ...]
    rows: tuple[tuple[Text, ...], ...]
    breaks: tuple[int, ...] = ()  # rows before which a block begins
    num_names: int = 2  # leading columns that hold names, set to the left


def main_sheet(table: ReportTable) -> Sheet:
    """Return the table itself: ours, and where the paper reports anything in a column, its value and the difference."""
    spec = table.spec
    with_setting = any(row.setting for row in spec.rows)
    names = ["model", "method", *(["setting"] if with_setting else [])]
    groups: list[tuple[str, int]] = [("", len(names))]
    header = list(names)
    for column in spec.columns:
        beside = table.has_paper(column)
        unit = f" ({column.unit})" if column.unit else ""
        groups.append((f"{column.label}{unit}{ARROWS[column.better]}", 3 if beside else 1))
        header += ["ours (n)", *(["paper", "Δ"] if beside else [])]
    rows, breaks = [], []
    for number, row in enumerate(spec.rows):
        if number and row.base != spec.rows[number - 1].base:
            breaks.append(number)
        words = [spec.label(row.base), spec.label(row.method), *([spec.label(row.setting)] if with_setting else [])]
        texts = [Text(word) for word in words]
        for column in spec.columns:
            cell = table.cell(row, column)
            texts.append(_ours(cell, column))
            if table.has_paper(column):
                texts += [Text(_paper(cell, column)), Text(signed(cell.difference, column.decimals))]
        rows.append(tuple(texts))
    return Sheet(tuple(groups), tuple(header), tuple(rows), tuple(breaks), len(names))


def panels(sheet: Sheet, *, widest: int) -> list[Sheet]:
    """Return a sheet in parts of at most `widest` columns of values, no group broken, the names before each."""
    names = sheet.num_names
    parts: list[list[tuple[str, int]]] = [[]]
    for group in sheet.groups[1:]:
        if parts[-1] and sum(width for _, width in parts[-1]) + group[1] > widest:
            parts.append([])
        parts[-1].append(group)
    cut, first = [], names
    for groups in parts:
        last = first + sum(width for _, width in groups)
        rows = tuple((*row[:names], *row[first:last]) for row in sheet.rows)
        header = (*sheet.header[:names], *sheet.header[first:last])
        cut.append(Sheet((sheet.groups[0], *groups), header, rows, sheet.breaks, names))
        first = last
    return cut


def comparison_sheet(table: ReportTable) -> Sheet:
    """Return the comparisons, one a line, the primary ones first."""
    spec = table.spec
    header = ("column", "rows", "against", "difference", "by seed", "95 % interval", "p", "p, corrected", "items")
    rows = []
    for one in sorted(table.comparisons, key=lambda one: one.family != "primary"):
        column = spec.column(one.column)
        by_seed = (
            f"{seed}: {signed(value, column.decimals)}" for seed, value in zip(one.seeds, one.by_seed, strict=True)
        )
        rows.append(
            (
                Text(f"{column.label} (primary)" if one.family == "primary" else column.label),
                Text(_row_label(table, one.focus)),
                Text(_row_label(table, one.other)),
                Text(signed(one.difference, column.decimals)),
                Text(", ".join(by_seed)),
                Text(_interval(one, column)),
                Text(probability(one.p) if one.p is not None else ""),
                Text(probability(one.p_adjusted), "best" if one.is_significant else ""),
                Text("" if one.num_items is None else str(one.num_items)),
            )
        )
    return Sheet((("", len(header)),), header, tuple(rows), (), 3)


def legend(table: ReportTable, *, best: str = "**Bold**", second: str = "*italic*") -> list[str]:
    """Return the sentences below the table."""
    spec = table.spec
    within = " and ".join({"base": "model", "setting": "setting"}[key] for key in spec.compare_within)
    within = f"of one {within}" if within else "of the table"
    lines = [
        "Ours: mean ± standard deviation (n − 1) over n seeds; blank: no result. "
        f"{best}: best, {second}: second best {within}, the untuned model aside."
    ]
    sources = sorted({cell.paper.source for cell in table.cells.values() if cell.paper is not None})
    if sources:
        lines.append(f"Paper: {'; '.join(sources)}. Δ: ours − paper.")
    if spec.source and spec.source not in sources:
        lines.append(f"In the paper: {spec.source}.")
    if any(cell.num_collapsed for cell in table.cells.values()):
        rule = spec.collapsed
        lines.append(
            f"Collapsed: runs whose {spec.column(rule.column).label} is {rule.bound}. They count; the mean is that "
            "of the others."
        )
    lines += _seed_lines(spec)
    lines += _gradient_lines(table)
    lines += _cost_lines(table)
    if spec.note:
        lines.append(spec.note)
    return lines


def seed_moves(spec: TableSpec) -> dict[tuple[str, ...], list[str]]:
    """Return what the seed moves in a training → the methods of which that is true, as they are written."""
    methods: dict[tuple[str, ...], list[str]] = {}
    for row in spec.rows:
        for moved in spec.moved_by_seed(row):
            names = methods.setdefault(moved, [])
            if spec.label(row.method) not in names:
                names.append(spec.label(row.method))
    return methods


def _seed_lines(spec: TableSpec) -> list[str]:
    told = "; ".join(f"{', '.join(moved)} ({', '.join(names)})" for moved, names in seed_moves(spec).items())
    paired = " Runs of one seed are taken as pairs where it moves the same in both." if spec.paired else ""
    return [f"The seed moves: {told}.{paired}"] if told else []


def _gradient_lines(table: ReportTable) -> list[str]:
    """Return how strongly each method's terms pulled: the mean over its runs of their gradient shares; of each setting
    where they differ."""
    spec = table.spec
    shares = {run["run_id"]: run["gradient_shares"] for run in table.provenance if run["gradient_shares"]}
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in spec.rows:
        key = (row.method, level_of(row, spec.clusters))
        for run in {run.run_id for column in spec.columns for run in spec.planned(row, column)}:
            for term, share in shares.get(run, {}).items():
                found.setdefault(key, {}).setdefault(term, []).append(share)
    texts: dict[str, dict[str, list[str]]] = {}  # method → its terms' shares → the settings that have them
    for (method, setting), terms in found.items():
        text = ", ".join(f"{term} {_percent(fmean(values))}" for term, values in terms.items())
        texts.setdefault(method, {}).setdefault(text, []).append(setting)
    told = []
    for method, of in texts.items():
        common = set.intersection(*(set(setting.split()) for settings in of.values() for setting in settings))
        for text, settings in of.items():
            names = (spec.labels.get(setting) or _in_short(setting, without=common) for setting in settings)
            which = f" ({', '.join(names)})" if len(of) > 1 else ""
            told.append(f"{spec.label(method)}{which}: {text}")
    return [f"A term's gradient at the hidden states, in shares of the task's: {'; '.join(told)}."] if told else []


def _in_short(setting: str, *, without: Collection[str]) -> str:
    """Return a setting without these words, and of each other word's dotted name the last part."""
    words = (word.partition("=") for word in setting.split() if word not in without)
    return " ".join(f"{name.rpartition('.')[2]}{equals}{value}" for name, equals, value in words) or setting


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share >= 1e-5 or not share else "< 0.001 %"


def _cost_lines(table: ReportTable) -> list[str]:
    """Return what the table's times and memory were measured on, and how."""
    costs = [column for column in table.spec.columns if column.is_cost]
    used = {run for row in table.spec.rows for column in costs for run in table.cell(row, column).run_ids}
    machines = Counter(run["hardware"] or "unknown hardware" for run in table.provenance if run["run_id"] in used)
    if not machines:
        return []
    named = ", ".join(f"{machine} ({count} run{'s' if count > 1 else ''})" for machine, count in machines.items())
    line = f"{_labels(costs)}: measured on {named}."
    if any("seconds" in column.metric for column in costs):
        line += " Times are by the wall clock; whether other runs shared the machine meanwhile is not recorded."
    totals = [column for column in costs if column.metric.endswith("total_peak_memory_mb")]
    peaks = [column for column in costs if "memory" in column.metric and column not in totals]
    if peaks:
        line += f" {_labels(peaks)}: the most that one process held at once."
    if totals:
        line += f" {_labels(totals)}: the sum of the processes' peaks, which need not fall together."
    if peaks or totals:
        line += (
            " A GPU's memory counts what was allocated in training; a process without one, what was resident since it "
            "began, the SVDs of an initialisation included."
        )
    return [line]


def _labels(columns: Sequence[ReportColumn]) -> str:
    return "; ".join(column.label for column in columns)


def comparison_legend(table: ReportTable) -> list[str]:
    """Return the sentences below the comparisons."""
    tested = [one for one in table.comparisons if one.p is not None]
    seeds_only = any(one.low is not None and one.num_items is None for one in table.comparisons)
    lines = [
        "Difference of the means over seeds, rows − against; by seed: of the two runs with that seed. Interval and p: "
        "a t-test with seeds and items both as random effects (docs/statistics.md). They tell how far the difference "
        "would move with other seeds and other test items."
    ]
    if seeds_only:
        lines[0] += (
            " Where a reason stands in brackets the items are not known: the interval is over seeds only (t over "
            "seeds), and says nothing of other items."
        )
    if any((one.untested or "").endswith(TOO_FEW) for one in table.comparisons):
        lines[0] += f" With fewer than {LEAST_SEEDS} seeds there are intervals and no tests."
    declaration = [table.declaration] if table.declaration else []
    if not tested:
        return [*lines, *declaration]
    num_primary = sum(one.family == "primary" for one in tested)
    corrected = []
    if num_primary:
        corrected.append(f"{num_primary} primary tests, corrected by Holm over {table.spec.num_primary}")
    if num_primary < len(tested):
        corrected.append(
            f"{len(tested) - num_primary} exploratory tests, corrected by Benjamini and Hochberg: of those in bold one "
            "in twenty may be false"
        )
    return [*lines, f"Bold: corrected p below {SIGNIFICANT}. {'; '.join(corrected)}.", *declaration]


def unmatched_lines(table: ReportTable) -> list[str]:
    """Return what the paper reports in this table without a cell of ours."""
    lines = []
    for line in table.unmatched_paper:
        value = line.value
        spread = "" if value.std is None else f" ± {value.std:g}"
        bound = "more than " if value.is_bound else ""
        lines.append(f"{row_name(line.row)} {line.task}, {line.metric}: {bound}{value.mean:g}{spread} ({value.source})")
    return lines


def provenance_lines(table: ReportTable) -> list[str]:
    """Return how many runs there are, by which code they were made, and from which pre-trained models."""
    commits: dict[str, int] = {}
    for run in table.provenance:
        name = f"{(run['commit'] or 'unknown')[:12]}{' with uncommitted changes' if run['dirty'] else ''}"
        commits[name] = commits.get(name, 0) + 1
    planned = len(table.spec.all_runs())
    bases = ", ".join(
        f"{Path(name).name} {' or '.join(sha256[:12] for sha256 in hashes)}" for name, hashes in table.bases.items()
    )
    return [
        f"{len(table.provenance)} of {planned} runs have a result; `table.json` lists them with the hash of each file.",
        *(f"commit {name}: {count} run{'s' if count > 1 else ''}" for name, count in commits.items()),
        *([f"pre-trained models, the first 12 digits of their weights' sha256: {bases}"] if bases else []),
    ]


def letter(number: int) -> str:
    """Return a, b, … z, aa, ab, … for 0, 1, …"""
    prefix, rest = divmod(number, 26)
    return (letter(prefix - 1) if prefix else "") + string.ascii_lowercase[rest]


def format_number(value: float | None, decimals: int) -> str:
    """Return a value with its decimals; "" for None, and never a negative zero."""
    if value is None:
        return ""
    text = f"{value:.{decimals}f}"
    return (text.lstrip("-") if not text.strip("-0.") else text).replace("-", "−")


def signed(value: float | None, decimals: int) -> str:
    """Return a difference with its sign; "" for None."""
    text = format_number(value, decimals)
    return text if not text or text.startswith("−") or not text.strip("0.") else f"+{text}"


def probability(value: float | None) -> str:
    """Return a p-value with three or four decimals."""
    if value is None:
        return ""
    if value < 0.0001:
        return "< 0.0001"
    return f"{value:.4f}" if value < 0.01 else f"{value:.3f}"


def _ours(cell: Cell, column: ReportColumn) -> Text:
    notes = ",".join(letter(note) for note in cell.notes)
    if not cell.values:
        return Text("" if cell.status == "missing" else cell.status, notes=notes)
    spread = "" if cell.std is None else f" ± {format_number(cell.std, column.decimals)}"
    lost = f"; {cell.num_collapsed} of {cell.num_planned} collapsed" if cell.num_collapsed else ""
    return Text(f"{format_number(cell.mean, column.decimals)}{spread} ({len(cell.values)}{lost})", cell.mark, notes)


def _paper(cell: Cell, column: ReportColumn) -> str:
    if cell.paper is None:
        return ""
    bound = "> " if cell.paper.is_bound else ""
    spread = "" if cell.paper.std is None else f" ± {format_number(cell.paper.std, column.decimals)}"
    return f"{bound}{format_number(cell.paper.mean, column.decimals)}{spread}"


def _interval(one: Comparison, column: ReportColumn) -> str:
    if one.low is None:
        return one.untested or ""
    interval = f"{signed(one.low, column.decimals)} … {signed(one.high, column.decimals)}"
    return f"{interval} ({one.untested})" if one.num_items is None else interval


def _row_label(table: ReportTable, row: Row) -> str:
    return ", ".join(table.spec.label(word) for word in (row.base, row.method, row.setting) if word)
