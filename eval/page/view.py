"""A report's table as the page shows it: the same numbers, marks and notes, and the items behind its paired tests."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ba_lora.experiments.tables import Row
from eval.report.cells import Cell
from eval.report.columns import ReportColumn
from eval.report.comparisons import Comparison
from eval.report.paired import PairedTests, Untested
from eval.report.sheets import ARROWS, comparison_legend, format_number, legend, letter, provenance_lines, signed
from eval.report.sources import Sources
from eval.report.stats import mean_interval
from eval.report.table import ReportTable
from eval.report.verdict import verdict


def table_view(table: ReportTable) -> dict[str, Any]:
    """Return the table as plain values: rows and columns in its order, cells[row][column]."""
    spec = table.spec
    return {
        "name": spec.name,
        "title": spec.title,
        "verdict": verdict(table) if table.comparisons else [],
        "columns": [
            {
                "name": column.name,
                "place": place,
                "label": column.label,
                "heading": f"{column.label}{f' ({column.unit})' if column.unit else ''}{ARROWS[column.better]}",
                "task": column.task,
                "metric": column.metric,
                "mean_of": [spec.column(name).label for name in column.mean_of],
                "decimals": column.decimals,
                "scale": column.scale,
                "better": column.better,
                "has_paper": table.has_paper(column),
            }
            for place, column in enumerate(spec.columns)
        ],
        "rows": [
            {
                **dataclasses.asdict(row),
                "names": [spec.label(word) for word in (row.base, row.method, row.setting)],
                "cells": [_cell(table, table.cell(row, column), column) for column in spec.columns],
            }
            for row in spec.rows
        ],
        "comparisons": [_comparison(table, one) for one in table.comparisons],
        "legend": [line.replace("**", "").replace("*", "") for line in legend(table)],
        "comparison_legend": comparison_legend(table) if table.comparisons else [],
        "footnotes": [[letter(number), text] for number, text in enumerate(table.footnotes)],
        "provenance": provenance_lines(table),
    }


def _cell(table: ReportTable, cell: Cell, column: ReportColumn) -> dict[str, Any]:
    low, high = mean_interval(cell.values) if len(cell.values) > 1 else (None, None)
    spread = "" if cell.std is None else f" ± {format_number(cell.std, column.decimals)}"
    paper = cell.paper
    return {
        "text": f"{format_number(cell.mean, column.decimals)}{spread}" if cell.values else "",
        "mean": cell.mean,
        "low": low,
        "high": high,
        "n": len(cell.values),
        "planned": cell.num_planned,
        "collapsed": cell.num_collapsed,
        "values": dict(zip(map(str, cell.seeds), cell.values, strict=True)),
        "runs": list(cell.run_ids),
        "lost": [dataclasses.asdict(failure) for failure in cell.failures],
        "status": cell.status,
        "mark": cell.mark,
        "notes": [letter(note) for note in cell.notes],
        "paper": None
        if paper is None
        else ("> " if paper.is_bound else "") + format_number(paper.mean, column.decimals),
        "paper_value": None if paper is None else paper.mean,
        "paper_source": None if paper is None else paper.source,
        "difference": cell.difference,
        "difference_text": signed(cell.difference, column.decimals),
    }


def _comparison(table: ReportTable, one: Comparison) -> dict[str, Any]:
    rows = table.spec.rows
    facts = dataclasses.asdict(one) | {"focus": rows.index(one.focus), "other": rows.index(one.other)}
    return facts | {"is_significant": one.is_significant}


def runs_of(table: ReportTable, row: Row, column: ReportColumn) -> list[str]:
    """Return the ids of the runs behind a cell, with those that gave no value."""
    names = column.mean_of or (column.name,)
    return list(dict.fromkeys(run.run_id for name in names for run in table.spec.planned(row, table.spec.column(name))))


def item_values(table: ReportTable, sources: Sources) -> dict[str, dict[str, Any]]:
    """Return column → {"ids", "runs": run_id → values, "untested": run_id → why there are none}: the very numbers that
    the paired tests compare (eval/report/paired.py), unscaled, of the columns that are means over items.

    Runs on other items than most have an `ids` of their own in "other_ids".
    """
    tests = PairedTests(table.spec, sources, table.cells)
    found: dict[str, dict[str, Any]] = {}
    for column in table.spec.columns:
        if column.task is None:
            continue
        values: dict[str, Any] = {"ids": None, "runs": {}, "untested": {}, "other_ids": {}}
        runs = {run for row in table.spec.rows for run in table.spec.planned(row, column)}
        for run in sorted(runs, key=lambda run: run.run_id):
            result = sources.result(run)
            if result is None or not _has(result, column):
                continue
            try:
                items = tests.items(run, column)
            except Untested as reason:
                values["untested"][run.run_id] = str(reason)
                continue
            values["ids"] = values["ids"] or list(items.ids)
            values["runs"][run.run_id] = [round(float(value), 6) for value in items.values_N]
            if list(items.ids) != values["ids"]:
                values["other_ids"][run.run_id] = list(items.ids)
        if values["runs"] or values["untested"]:
            found[column.name] = values
    return found


def _has(result: Mapping[str, Any], column: ReportColumn) -> bool:
    return result.get("status") == "ok" and column.task in (result.get("evaluation") or {})
