"""Runs side by side, in the terminal: what differs in their settings, their scores, and the paired test.

    python -m eval.compare RUN RUN [RUN …] [output=DIR]

RUN is a run's folder, its result file, or a folder that holds runs. Runs that differ in their seed only are one row;
the first row is compared with each other one. The test is the report's (docs/statistics.md): it takes five seeds of
each row, on the same items, under the same settings of evaluation and data; where it is not allowed the line says why.
output=DIR also makes the page of these runs (eval/page/) there.
"""

import argparse
from collections.abc import Sequence

import numpy as np

from ba_lora.console import console_table
from ba_lora.errors import CommandParser, run_entry_point
from ba_lora.experiments.tables import Row
from eval.page.build import check_page_place
from eval.page.loose import LooseTable, table_of_runs
from eval.report.__main__ import loose_page, runs_and_output
from eval.report.comparisons import Comparison
from eval.report.paired import PairedTests, Untested
from eval.report.sheets import format_number, probability, signed
from eval.report.spec import row_name

MOST_SHOWN = 60  # characters of a setting's value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandParser(
        prog="python -m eval.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="+", metavar="RUN", help="run folders, result files, folders of runs")
    runs, output = runs_and_output("eval.compare", parser.parse_args(arguments).words)
    if output is not None:
        check_page_place(output, "output")
    loose = table_of_runs(runs)
    print("\n\n".join(printed_parts(loose)))
    if output is None:
        return 0
    return loose_page(runs, output)


def printed_parts(loose: LooseTable) -> list[str]:
    """Return the parts that the command prints: settings that differ, scores, comparisons, notes."""
    table = loose.table
    parts = []
    ids = [run.run_id for run in loose.shown]
    keys = list(dict.fromkeys(key for changed in loose.changed.values() for key in changed))
    if keys:
        rows = [["setting", *ids], *([key, *(_short(loose.changed[one].get(key)) for one in ids)] for key in keys)]
        parts.append("Settings that differ\n" + console_table(rows))
    columns = [
        column for column in table.spec.columns if any(table.cell(row, column).values for row in table.spec.rows)
    ]
    header = ["score", *(row_name(row) for row in table.spec.rows)]
    parts.append(
        "Scores\n"
        + console_table([header, *([c.label, *(_score(loose, row, c) for row in table.spec.rows)] for c in columns)])
    )
    first = [one for one in table.comparisons if one.focus == table.spec.rows[0]]
    if first:
        header = ["column", "first − other", "difference", "95 % interval", "p", "p, corrected", "items won, lost", ""]
        rows = [header, *(_comparison(loose, one) for one in first)]
        parts.append(f"{row_name(table.spec.rows[0])} against each other row\n" + console_table(rows))
    notes = [*table.footnotes, *loose.missing]
    return [*parts, *(["Notes\n" + "\n".join(f"- {note}" for note in notes)] if notes else [])]


def _short(value: object) -> str:
    text = "" if value is None else " ".join(str(value).split())
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]} …"


def _score(loose: LooseTable, row: Row, column) -> str:
    """Return a cell: its mean ± standard deviation, of a single run the interval over items where its score has one."""
    cell = loose.table.cell(row, column)
    if not cell.values:
        return "" if cell.status == "missing" else cell.status
    text = format_number(cell.mean, column.decimals)
    if cell.std is not None:
        return f"{text} ± {format_number(cell.std, column.decimals)} ({len(cell.values)})"
    entry = next(run for run in loose.shown if run.run_id == cell.run_ids[0]).evaluation.get(column.task) or {}
    interval = (entry.get("interval_95") or {}).get(column.metric)
    if not interval or None in interval:
        return text
    low, high = (format_number(column.scale * bound, column.decimals) for bound in interval)
    return f"{text} [{low}, {high}]"


def _comparison(loose: LooseTable, one: Comparison) -> list[str]:
    column = loose.table.spec.column(one.column)
    interval = "" if one.low is None else f"{signed(one.low, column.decimals)} … {signed(one.high, column.decimals)}"
    counts = items_won_and_lost(loose, one)
    return [
        column.label,
        row_name(one.other),
        signed(one.difference, column.decimals),
        interval,
        probability(one.p),
        probability(one.p_adjusted),
        "" if counts is None else f"{counts[0]}, {counts[1]} of {counts[2]}",
        f"no test: {one.untested}" if one.untested else "",
    ]


def items_won_and_lost(loose: LooseTable, one: Comparison) -> tuple[int, int, int] | None:
    """Return on how many items the focus has the better and the worse mean over its runs, and of how many; None where
    the items are not known, or not the same."""
    table = loose.table
    column = table.spec.column(one.column)
    tests = PairedTests(table.spec, loose.sources, table.cells)
    sides = []
    try:
        for row in (one.focus, one.other):
            run_ids = table.cell(row, column).run_ids
            sides.append([tests.items(run, column) for run in table.spec.planned(row, column) if run.run_id in run_ids])
    except Untested:
        return None
    if len({of.ids for side in sides for of in side}) != 1:
        return None
    ours, theirs = (np.mean([of.values_N for of in side], axis=0) for side in sides)
    sign = -1 if column.better == "lower" else 1
    better = sign * (ours - theirs)
    return int((better > 0).sum()), int((better < 0).sum()), len(better)


if __name__ == "__main__":
    run_entry_point(main)
