"""A table written down: Markdown for people, LaTeX (booktabs) for papers, CSV and JSON for programs.

The texts of Markdown and LaTeX are made once (sheets.py); what differs is the mark-up.
"""

import csv
import dataclasses
import html
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from ba_lora.experiments.tables import Row
from eval.report.columns import ReportColumn
from eval.report.hypothesis_figures import hypothesis_legend, hypothesis_sheet, level_sheet
from eval.report.over_settings import over_settings, over_settings_sheet
from eval.report.sheets import (
    Drawn,
    Sheet,
    Text,
    comparison_legend,
    comparison_sheet,
    legend,
    letter,
    main_sheet,
    panels,
    provenance_lines,
    seed_moves,
    unmatched_lines,
)
from eval.report.table import ReportTable
from eval.report.verdict import verdict

LATEX_WIDTH = 12  # columns of numbers abreast, as many as can be read when they are made to fit
LATEX_HEIGHT = 0.65  # of the text's height, which leaves room for caption and legend
# The table of comparisons: lines break in its names, and in the interval's place, where a reason may stand.
COMPARISONS = 3 * "p{0.11\\linewidth}" + "rp{0.13\\linewidth}p{0.13\\linewidth}rrr"


OVER_SETTINGS = (
    "Of each setting its mean over seeds counts; spread: the distance between the best and the worst setting. Settings "
    "whose runs have failed, or are missing, are in none of them."
)
STATISTICS = "t over seeds and items, crossed"  # what the comparisons' intervals are


def to_markdown(table: ReportTable, figures: Sequence[Drawn] = ()) -> str:
    """Return the report as Markdown, the figures linked from figures/."""
    parts = [f"# {escape_markdown(table.spec.title)}"]
    if table.findings:
        parts += ["## Hypotheses", escape_markdown(table.standing), _markdown_sheet(hypothesis_sheet(table))]
        parts += map(escape_markdown, hypothesis_legend(table))
    if table.spec.clusters:
        parts += ["## Means over the pre-trained models", _markdown_sheet(level_sheet(table)), "## Every model"]
    else:
        parts.append(_bullets(verdict(table)))
    parts += [_markdown_sheet(main_sheet(table)), *map(escape_markdown, legend(table))]
    notes = [f"<sup>{letter(number)}</sup> {escape_markdown(text)}" for number, text in enumerate(table.footnotes)]
    if notes:
        parts.append("  \n".join(notes))
    if table.spec.over_settings:
        parts += ["## Over the settings", _markdown_sheet(over_settings_sheet(table)), OVER_SETTINGS]
    if table.comparisons:
        parts += ["## Comparisons", _markdown_sheet(comparison_sheet(table))]
        parts += map(escape_markdown, comparison_legend(table))
    if table.unmatched_paper:
        parts += ["## Also reported by the paper", _bullets(unmatched_lines(table))]
    if figures:
        parts.append("## Figures")
    for figure in figures:
        title, caption = escape_markdown(figure.title), escape_markdown(figure.caption)
        if figure.missing:
            parts.append(f"{title}: not drawn, {escape_markdown(figure.missing)}.")
        else:
            parts += [f"![{title}](figures/{figure.name}.png)", f"*{title}.* {caption}"]
    parts += ["## Where it comes from", _bullets(provenance_lines(table))]
    return "\n\n".join(parts) + "\n"


def to_latex(table: ReportTable) -> str:
    """Return the table and a second one of its comparisons; the document loads booktabs, graphicx and longtable.

    A wide table is set in parts, one below the other; each is made smaller where it would not fit into a page.
    """
    parts = panels(main_sheet(table), widest=LATEX_WIDTH)
    if table.spec.over_settings:
        parts.append(over_settings_sheet(table))
    lines = [
        "% Needs \\usepackage{booktabs,graphicx,longtable}",
        "\\begin{table}[t]",
        "\\centering",
        f"\\caption{{{escape_latex(table.spec.title)}}}",
        f"\\label{{tab:{re.sub('[^a-z0-9]+', '-', table.spec.name.lower())}}}",
        *(line for part in parts for line in _latex_part(part, share=LATEX_HEIGHT / len(parts))),
        "\\begin{minipage}{\\linewidth}\\footnotesize",
        *(f"{escape_latex(line)}\\par" for line in legend(table, best="Bold", second="underlined")),
        *([f"{OVER_SETTINGS}\\par"] if table.spec.over_settings else []),
        *(f"\\textsuperscript{{{letter(n)}}} {escape_latex(text)}\\par" for n, text in enumerate(table.footnotes)),
        "\\end{minipage}",
        "\\end{table}",
    ]
    if table.comparisons:
        sheet = comparison_sheet(table)
        lines += [
            "",
            "{\\scriptsize\\setlength{\\tabcolsep}{2pt}",
            f"\\begin{{longtable}}{{{COMPARISONS}}}",
            f"\\caption{{{escape_latex(table.spec.title)}: comparisons}}\\\\",
            *_latex_body(sheet, is_long=True),
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
        "comparisons": [{**dataclasses.asdict(one), "is_significant": one.is_significant} for one in table.comparisons],
        **({"over_settings": [dataclasses.asdict(one) for one in over_settings(table)]} if spec.over_settings else {}),
        "hypotheses": [dataclasses.asdict(one) for one in table.findings],
        "standing": table.standing,
        "statistics": STATISTICS,
        "table_sha256": spec.sha256,
        "declaration": table.declaration,
        "verdict": verdict(table),
        "seed_moves": [{"moved": list(moved), "methods": names} for moved, names in seed_moves(spec).items()],
        "footnotes": list(table.footnotes),
        "also_reported": [dataclasses.asdict(line) for line in table.unmatched_paper],
        "figures": [dataclasses.asdict(figure) for figure in figures],
        **({"bases": {name: [*hashes] for name, hashes in table.bases.items()}} if table.bases else {}),
        "runs": list(table.provenance),
    }


def cell_facts(table: ReportTable, row: Row, column: ReportColumn) -> dict[str, Any]:
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


def escape_markdown(text: str) -> str:
    """Return text for Markdown that brings no HTML, no link, no other cell and no other line with it."""
    return html.escape(" ".join(text.split("\n")), quote=False).replace("|", "\\|").replace("](", "]\\(")


def escape_latex(text: str) -> str:
    """Return text for LaTeX: its special characters escaped, the few symbols that are used here in math mode.

    What pdflatex may not know, such as a strange character in an error message, becomes its code point, [U+2502].
    """
    return "".join(_LATEX.get(character) or _plain_latex(character) for character in text)


def _plain_latex(character: str) -> str:
    if character.isspace():
        return " "
    is_known = character.isprintable() and (character.isascii() or character in _TYPED)
    return character if is_known else f"[U+{ord(character):04X}]"


_TYPED = "·–—‘’“”äöüÄÖÜßàáâçèéêëíîñóôøúûåæ"
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


def _markdown_sheet(sheet: Sheet) -> str:
    """Markdown has one line of headings: a group's heading stands before those of its columns."""
    heads = []
    columns = iter(sheet.header)
    for heading, width in sheet.groups:
        names = [next(columns) for _ in range(width)]
        heads += [f"{heading}: {name}" if heading and position == 0 else name for position, name in enumerate(names)]
    lines = [
        _markdown_row([escape_markdown(head) for head in heads]),
        _markdown_row(["---"] * sheet.num_names + ["---:"] * (len(heads) - sheet.num_names)),
    ]
    lines += [_markdown_row([_marked(text, _MARKDOWN, escape_markdown) for text in row]) for row in sheet.rows]
    return "\n".join(lines)


def _latex_part(sheet: Sheet, *, share: float) -> list[str]:
    """Return a sheet as a tabular that is no wider than the line and no higher than its share of the text."""
    height = f"{share:.3f}\\textheight"
    columns = "l" * sheet.num_names + "r" * (len(sheet.header) - sheet.num_names)
    return [
        f"\\resizebox*{{!}}{{\\ifdim\\totalheight>{height}{height}\\else\\totalheight\\fi}}{{%",
        "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%",
        f"\\begin{{tabular}}{{{columns}}}",
        *_latex_body(sheet),
        "\\end{tabular}}}",
        "\\par\\smallskip",
    ]


def _latex_body(sheet: Sheet, *, is_long: bool = False) -> list[str]:
    """Return the lines between \\begin and \\end; is_long: of a longtable whose columns of names break their lines."""
    lines = ["\\toprule"]
    if any(heading for heading, _ in sheet.groups):
        cells, rules, first = [], [], 1
        for heading, width in sheet.groups:
            cells.append(f"\\multicolumn{{{width}}}{{c}}{{{escape_latex(heading)}}}")
            rules += [f"\\cmidrule(lr){{{first}-{first + width - 1}}}"] if heading else []
            first += width
        lines += [" & ".join(cells) + " \\\\", "".join(rules)]
    lines += [" & ".join(map(escape_latex, sheet.header)) + " \\\\", "\\midrule"]
    lines += ["\\endhead"] if is_long else []
    for number_, row in enumerate(sheet.rows):
        lines += ["\\midrule"] if number_ in sheet.breaks else []
        cells = [_marked(text, _LATEX_MARKS, escape_latex) for text in row]
        if is_long:
            cells[: sheet.num_names] = [_breakable(cell) for cell in cells[: sheet.num_names]]
        lines.append(" & ".join(cells) + " \\\\")
    return [*lines, "\\bottomrule"]


def _breakable(name: str) -> str:
    """Let lines break inside names such as regularizers.lambda_svd=0.1, and leave them ragged."""
    return "\\raggedright " + re.sub(r"(=|\.(?=\D)|\\_|/)", r"\1\\allowbreak{}", name)


_MARKDOWN = {"best": "**{}**", "second": "*{}*", "": "{}", "notes": "<sup>{}</sup>"}
_LATEX_MARKS = {"best": "\\textbf{{{}}}", "second": "\\underline{{{}}}", "": "{}", "notes": "\\textsuperscript{{{}}}"}


def _marked(text: Text, marks: dict[str, str], escape: Callable[[str], str]) -> str:
    if not text.text and not text.notes:
        return ""
    return marks[text.mark].format(escape(text.text)) + (marks["notes"].format(text.notes) if text.notes else "")


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {escape_markdown(line)}" for line in lines)


def _csv_text(value: Any) -> Any:
    return f"{value:.10g}" if isinstance(value, float) else value
