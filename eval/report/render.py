"""A table written down: Markdown for people, LaTeX (booktabs) for papers, CSV and JSON for programs.

The texts of Markdown and LaTeX are made once, as `Sheet`s; what differs is the mark-up.
"""

import csv
import dataclasses
import io
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ba_lora.tables import Row
from eval.report.spec import Column, row_name
from eval.report.stats import NUM_RESAMPLES, SIGNIFICANT
from eval.report.table import Cell, Comparison, ReportTable

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


def to_markdown(table: ReportTable, figures: Sequence[Drawn] = ()) -> str:
    """Return the report as Markdown, the figures linked from figures/."""
    parts = [f"# {table.spec.title}", _markdown_sheet(main_sheet(table)), *legend(table)]
    notes = [f"<sup>{letter(number)}</sup> {_pipes(text)}" for number, text in enumerate(table.footnotes)]
    if notes:
        parts.append("  \n".join(notes))
    if table.comparisons:
        parts += ["## Comparisons", _markdown_sheet(comparison_sheet(table)), *comparison_legend(table)]
    if table.unmatched_paper:
        parts += ["## Also reported by the paper", _bullets(unmatched_lines(table))]
    if figures:
        parts.append("## Figures")
    for figure in figures:
        if figure.missing:
            parts.append(f"{figure.title}: not drawn, {figure.missing}.")
        else:
            parts += [f"![{figure.title}](figures/{figure.name}.png)", f"*{figure.title}.* {figure.caption}"]
    parts += ["## Where it comes from", _bullets(provenance_lines(table))]
    return "\n\n".join(parts) + "\n"


def to_latex(table: ReportTable) -> str:
    """Return the table and a second one of its comparisons; the document loads booktabs, graphicx and longtable."""
    sheet = main_sheet(table)
    columns = "l" * sheet.num_names + "r" * (len(sheet.header) - sheet.num_names)
    lines = [
        "% Needs \\usepackage{booktabs,graphicx,longtable}",
        "\\begin{table}[t]",
        "\\centering",
        f"\\caption{{{escape_latex(table.spec.title)}}}",
        f"\\label{{tab:{re.sub('[^a-z0-9]+', '-', table.spec.name.lower())}}}",
        "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%",
        f"\\begin{{tabular}}{{{columns}}}",
        *_latex_body(sheet),
        "\\end{tabular}}",
        "\\par\\smallskip",
        "\\begin{minipage}{\\linewidth}\\footnotesize",
        *(f"{escape_latex(line)}\\par" for line in legend(table, best="Bold", second="underlined")),
        *(f"\\textsuperscript{{{letter(n)}}} {escape_latex(text)}\\par" for n, text in enumerate(table.footnotes)),
        "\\end{minipage}",
        "\\end{table}",
    ]
    if table.comparisons:
        sheet = comparison_sheet(table)
        columns = "l" * sheet.num_names + "r" * (len(sheet.header) - sheet.num_names)
        lines += [
            "",
            "{\\footnotesize\\setlength{\\tabcolsep}{3pt}",
            f"\\begin{{longtable}}{{{columns}}}",
            f"\\caption{{{escape_latex(table.spec.title)}: comparisons}}\\\\",
            *_latex_body(sheet, repeated_head=True),
            "\\end{longtable}",
            *(f"{escape_latex(line)}\\par" for line in comparison_legend(table)),
            "}",
        ]
    return "\n".join(lines) + "\n"


def to_csv(table: ReportTable) -> str:
    """Return one line a cell, on the scale that is shown; `values` are separated by spaces, in the order of `seeds`."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = (
        "base", "method", "setting", "column", "unit", "status", "mean", "std", "n", "planned", "seeds", "values",
        "mark", "paper_mean", "paper_std", "paper_is_bound", "difference", "paper_source", "notes",
    )  # fmt: skip
    writer.writerow(names)
    for row in table.spec.rows:
        for column in table.spec.columns:
            facts = cell_facts(table, row, column)
            facts["seeds"] = " ".join(map(str, facts["seeds"]))
            facts["values"] = " ".join(f"{value:.10g}" for value in facts["values"])
            facts["notes"] = "; ".join(facts["notes"])
            writer.writerow([_csv_text(facts[name]) for name in names])
    return out.getvalue()


def to_json(table: ReportTable, figures: Sequence[Drawn] = ()) -> dict[str, Any]:
    """Return everything the report knows, as plain values."""
    spec = table.spec
    return {
        "table": spec.name,
        "title": spec.title,
        "source": spec.source,
        "note": spec.note,
        "columns": [dataclasses.asdict(column) for column in spec.columns],
        "cells": [cell_facts(table, row, column) for row in spec.rows for column in spec.columns],
        "comparisons": [dataclasses.asdict(comparison) for comparison in table.comparisons],
        "bootstrap_resamples": NUM_RESAMPLES,
        "footnotes": list(table.footnotes),
        "also_reported": [dataclasses.asdict(line) for line in table.unmatched_paper],
        "figures": [dataclasses.asdict(figure) for figure in figures],
        "runs": list(table.provenance),
    }


def cell_facts(table: ReportTable, row: Row, column: Column) -> dict[str, Any]:
    """Return a cell as plain values."""
    cell = table.cell(row, column)
    paper = cell.paper
    return {
        **dataclasses.asdict(row),
        "column": column.name,
        "unit": column.unit,
        "status": cell.status,
        "mean": cell.mean,
        "std": cell.std,
        "n": len(cell.values),
        "planned": cell.num_planned,
        "seeds": list(cell.seeds),
        "values": list(cell.values),
        "run_ids": list(cell.run_ids),
        "mark": cell.mark,
        "paper_mean": paper.mean if paper else None,
        "paper_std": paper.std if paper else None,
        "paper_is_bound": paper.is_bound if paper else None,
        "paper_source": paper.source if paper else None,
        "difference": cell.difference,
        "failures": [dataclasses.asdict(failure) for failure in cell.failures],
        "notes": [table.footnotes[number] for number in cell.notes],
    }


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


def comparison_sheet(table: ReportTable) -> Sheet:
    """Return the tests, one a line."""
    spec = table.spec
    header = ("column", "rows", "against", "difference", "95 % interval", "p", "p (Holm)", "items", "seeds")
    rows = []
    for one in table.comparisons:
        column = spec.column(one.column)
        significant = one.p_holm is not None and one.p_holm < SIGNIFICANT
        rows.append(
            (
                Text(column.label),
                Text(_row_label(table, one.focus)),
                Text(_row_label(table, one.other)),
                Text(signed(one.difference, column.decimals)),
                Text(one.untested or _interval(one, column)),
                Text(probability(one.p)),
                Text(probability(one.p_holm), "best" if significant else ""),
                Text("" if one.num_items is None else str(one.num_items)),
                Text(str(one.num_seeds)),
            )
        )
    return Sheet((("", len(header)),), header, tuple(rows), (), 3)


def legend(table: ReportTable, *, best: str = "**Bold**", second: str = "*italic*") -> list[str]:
    """Return the sentences below the table."""
    spec = table.spec
    within = " and ".join({"base": "model", "setting": "setting"}[key] for key in spec.compare_within)
    lines = [
        "Ours: mean ± standard deviation (n − 1) over n seeds; blank: no result. "
        f"{best}: best, {second}: second best of one {within}, among the rows with most seeds."
    ]
    sources = sorted({cell.paper.source for cell in table.cells.values() if cell.paper is not None})
    if sources:
        lines.append(f"Paper: {'; '.join(sources)}. Δ: ours − paper.")
    if spec.source:
        lines.append(f"In the paper: {spec.source}.")
    if spec.note:
        lines.append(spec.note)
    return lines


def comparison_legend(table: ReportTable) -> list[str]:
    """Return the sentences below the comparisons."""
    num_tests = sum(comparison.p is not None for comparison in table.comparisons)
    return [
        "Difference of the means over seeds, rows − against. Interval and p: paired bootstrap over test items "
        f"({NUM_RESAMPLES:,} resamples) of each item's mean over seeds; it tells how far the difference would move on "
        "other items, not with other seeds. Holm: corrected over the "
        f"{num_tests} tests of this table, bold below {SIGNIFICANT}. A test that could not be made says why."
    ]


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
    """Return how many runs there are, and by which code they were made."""
    commits: dict[str, int] = {}
    for run in table.provenance:
        name = f"{(run['commit'] or 'unknown')[:12]}{' with uncommitted changes' if run['dirty'] else ''}"
        commits[name] = commits.get(name, 0) + 1
    planned = len(table.spec.all_runs())
    return [
        f"{len(table.provenance)} of {planned} runs have a result; `table.json` lists them with the hash of each file.",
        *(f"commit {name}: {count} run{'s' if count > 1 else ''}" for name, count in commits.items()),
    ]


def letter(number: int) -> str:
    """Return a, b, … z, aa, ab, … for 0, 1, …"""
    prefix, rest = divmod(number, 26)
    return (letter(prefix - 1) if prefix else "") + string.ascii_lowercase[rest]


def number(value: float | None, decimals: int) -> str:
    """Return a value with its decimals; "" for None, and never a negative zero."""
    if value is None:
        return ""
    text = f"{value:.{decimals}f}"
    return (text.lstrip("-") if not text.strip("-0.") else text).replace("-", "−")


def signed(value: float | None, decimals: int) -> str:
    """Return a difference with its sign; "" for None."""
    text = number(value, decimals)
    return text if not text or text.startswith("−") or not text.strip("0.") else f"+{text}"


def probability(value: float | None) -> str:
    """Return a p-value with three or four decimals."""
    if value is None:
        return ""
    return f"{value:.4f}" if value < 0.01 else f"{value:.3f}"


def escape_latex(text: str) -> str:
    """Return text for LaTeX: its special characters escaped, the few symbols that are used here in math mode."""
    return "".join(_LATEX.get(character, character) for character in text)


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "±": "$\\pm$",
    "−": "$-$",
    "Δ": "$\\Delta$",
    "λ": "$\\lambda$",
    "↑": "$\\uparrow$",
    "↓": "$\\downarrow$",
    "→": "$\\rightarrow$",
    "≤": "$\\leq$",
    "≥": "$\\geq$",
    "×": "$\\times$",
    "…": "\\dots{}",
    "²": "$^2$",
}


def _ours(cell: Cell, column: Column) -> Text:
    notes = ",".join(letter(note) for note in cell.notes)
    if not cell.values:
        return Text("" if cell.status == "missing" else cell.status, notes=notes)
    spread = "" if cell.std is None else f" ± {number(cell.std, column.decimals)}"
    return Text(f"{number(cell.mean, column.decimals)}{spread} ({len(cell.values)})", cell.mark, notes)


def _paper(cell: Cell, column: Column) -> str:
    if cell.paper is None:
        return ""
    bound = "> " if cell.paper.is_bound else ""
    spread = "" if cell.paper.std is None else f" ± {number(cell.paper.std, column.decimals)}"
    return f"{bound}{number(cell.paper.mean, column.decimals)}{spread}"


def _interval(one: Comparison, column: Column) -> str:
    return f"{signed(one.low, column.decimals)} … {signed(one.high, column.decimals)}"


def _row_label(table: ReportTable, row: Row) -> str:
    return ", ".join(table.spec.label(word) for word in (row.base, row.method, row.setting) if word)


def _markdown_sheet(sheet: Sheet) -> str:
    """Markdown has one line of headings: a group's heading stands before those of its columns."""
    heads = []
    columns = iter(sheet.header)
    for heading, width in sheet.groups:
        names = [next(columns) for _ in range(width)]
        heads += [f"{heading}: {name}" if heading and position == 0 else name for position, name in enumerate(names)]
    lines = [_markdown_row(heads), _markdown_row(["---"] * sheet.num_names + ["---:"] * (len(heads) - sheet.num_names))]
    lines += [_markdown_row([_marked(text, _MARKDOWN, _pipes) for text in row]) for row in sheet.rows]
    return "\n".join(lines)


def _latex_body(sheet: Sheet, *, repeated_head: bool = False) -> list[str]:
    lines = ["\\toprule"]
    if any(heading for heading, _ in sheet.groups):
        cells, rules, first = [], [], 1
        for heading, width in sheet.groups:
            cells.append(f"\\multicolumn{{{width}}}{{c}}{{{escape_latex(heading)}}}")
            rules += [f"\\cmidrule(lr){{{first}-{first + width - 1}}}"] if heading else []
            first += width
        lines += [" & ".join(cells) + " \\\\", "".join(rules)]
    lines += [" & ".join(map(escape_latex, sheet.header)) + " \\\\", "\\midrule"]
    lines += ["\\endhead"] if repeated_head else []
    for number_, row in enumerate(sheet.rows):
        lines += ["\\midrule"] if number_ in sheet.breaks else []
        lines.append(" & ".join(_marked(text, _LATEX_MARKS, escape_latex) for text in row) + " \\\\")
    return [*lines, "\\bottomrule"]


_MARKDOWN = {"best": "**{}**", "second": "*{}*", "": "{}", "notes": "<sup>{}</sup>"}
_LATEX_MARKS = {"best": "\\textbf{{{}}}", "second": "\\underline{{{}}}", "": "{}", "notes": "\\textsuperscript{{{}}}"}


def _marked(text: Text, marks: dict[str, str], escape: Callable[[str], str]) -> str:
    if not text.text and not text.notes:
        return ""
    return marks[text.mark].format(escape(text.text)) + (marks["notes"].format(text.notes) if text.notes else "")


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _pipes(text: str) -> str:
    return text.replace("|", "\\|")


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _csv_text(value: Any) -> Any:
    return f"{value:.10g}" if isinstance(value, float) else value
