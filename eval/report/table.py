"""From results to a table's cells, marks and footnotes; its comparisons are in comparisons.py."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ba_lora.config.schema import LIKELIHOOD, UNTUNED
from ba_lora.experiments.tables import Row
from ba_lora.runs.environment import hardware_name
from eval.report.cells import COLLAPSED, Cell, CellKey, FailedRun
from eval.report.columns import ReportColumn, metric_value, why_missing
from eval.report.comparisons import Comparison, as_declared, compare
from eval.report.crossed import Array
from eval.report.hypotheses import Clusters, Finding, decide_all, standing
from eval.report.paired import run_items
from eval.report.settings import Used, differences
from eval.report.sources import PaperRow, Sources
from eval.report.spec import PlannedRun, TableSpec
from eval.report.stats import first_and_second


@dataclass(frozen=True)
class ReportTable:
    """A table, ready to be written down. declaration: what is known of its file when the first run started."""

    spec: TableSpec
    cells: Mapping[CellKey, Cell]
    comparisons: tuple[Comparison, ...]
    footnotes: tuple[str, ...]
    unmatched_paper: tuple[PaperRow, ...]  # what the paper reports in this table for which it has no cell
    provenance: tuple[dict[str, Any], ...]
    declaration: str = ""
    findings: tuple[Finding, ...] = ()
    standing: str = ""  # of the hypotheses
    compared: tuple[Row, ...] = ()  # the rows that are ranked and compared
    bases: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # model.name → sha256 of its weights → runs

    def cell(self, row: Row, column: ReportColumn) -> Cell:
        return self.cells[row, column.name]

    def has_paper(self, column: ReportColumn) -> bool:
        """Whether the paper reports anything in this column."""
        return any(self.cell(row, column).paper is not None for row in self.spec.rows)


def build_table(spec: TableSpec, sources: Sources, *, allow: Iterable[str] = ()) -> ReportTable:
    """Return the table. Raises UserError where settings differ that are allowed neither here nor in its config."""
    spec, declaration = as_declared(spec, sources.declared)
    used = [
        Used(row, run, column, result)
        for column in spec.columns
        if column.metric is not None
        for row in spec.rows
        for run in spec.planned(row, column)
        if (result := sources.result(run)) is not None and _value(result, column) is not None
    ]
    notes = _Footnotes(differences(spec, used, allow=(*spec.allow, *allow)))
    cells: dict[CellKey, Cell] = {}
    for column in sorted(spec.columns, key=lambda column: bool(column.mean_of)):
        for row in spec.rows:
            cells[row, column.name] = (
                _mean_cell(spec, sources, row, column, cells)
                if column.mean_of
                else _measured_cell(spec, sources, row, column, notes)
            )
    bases = _bases(spec, sources)
    _note_other_bases(spec, sources, bases, cells, notes)
    rows = _chosen_rows(spec, cells, notes)
    _mark(spec, cells, rows, notes)
    findings = find(spec, sources, cells) if spec.hypotheses else ()
    any_primary = any(one.primary for one in spec.hypotheses)
    return ReportTable(
        spec=spec,
        cells=cells,
        comparisons=tuple(compare(spec, sources, cells, rows)),
        footnotes=tuple(notes.texts),
        unmatched_paper=_unmatched(spec, sources),
        provenance=tuple(_provenance(spec, sources)),
        declaration=declaration,
        findings=findings,
        standing=standing(sources.declared, spec.deciding, spec.sha256, any_primary=any_primary) if findings else "",
        compared=rows,
        bases=bases,
    )


def find(spec: TableSpec, sources: Sources, cells: Mapping[CellKey, Cell]) -> tuple[Finding, ...]:
    """Return what came of the table's hypotheses."""

    def values(row: Row, name: str) -> tuple[tuple[str, ...] | None, Array]:
        column, cell = spec.column(name), cells[row, name]
        items = run_items(sources, column, [run for run in spec.planned(row, column) if run.run_id in cell.run_ids])
        return (None, np.array(cell.values)[:, None]) if items is None else (items[0], column.scale * items[1])

    def num_missing(row: Row, name: str) -> int:
        cell = cells[row, name]
        return cell.num_planned - len(cell.values)

    return tuple(decide_all(spec.hypotheses, Clusters(spec.rows, spec.clusters, values, num_missing)))


class _Footnotes:
    """Footnotes in the order in which they are first needed; the same text is the same footnote."""

    def __init__(self, by_run: Mapping[tuple[str, str], list[str]]) -> None:
        self.by_run = by_run
        self.texts: list[str] = []

    def number(self, text: str) -> int:
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text)


def _value(result: Mapping[str, Any], column: ReportColumn) -> float | None:
    """Return a run's value on the column's scale, None where the run did not succeed or has none."""
    if result["status"] != "ok":
        return None
    value = metric_value(result, column)
    return None if value is None else value * column.scale


def _measured_cell(spec: TableSpec, sources: Sources, row: Row, column: ReportColumn, notes: _Footnotes) -> Cell:
    found: list[tuple[PlannedRun, float]] = []
    failures, outdated, texts = [], [], {}
    planned = spec.planned(row, column)
    for run in planned:
        result = sources.result(run)
        value = None if result is None else _value(result, column)
        failed = sources.failure(run, column)
        if value is not None and (reason := _collapsed(spec, run, column, result)):
            failures.append(FailedRun(run.run_id, COLLAPSED, reason))
        elif value is not None:
            found.append((run, value))
            outdated += [failed] if failed else []
            texts.update(dict.fromkeys(notes.by_run.get((run.run_id, column.name), ())))
        elif result is not None and result["status"] != "ok":
            failures.append(FailedRun(run.run_id, result["status"], result.get("error")))
        elif failed:
            failures.append(FailedRun(run.run_id, "failed", failed))
        elif result is not None and (missing := why_missing(result, column)):
            failures.append(FailedRun(run.run_id, *missing))
    for (status, error), count in Counter((failure.status, failure.error) for failure in failures).items():
        texts[f"{count} of {len(planned)} runs {status}: {error or 'no error was written'}"] = None
    for error, count in Counter(outdated).items():
        texts[f"{count} of {len(planned)} runs with an older value: its re-evaluation failed: {error}"] = None
    return Cell(
        values=tuple(value for _, value in found),
        seeds=tuple(run.seed for run, _ in found),
        run_ids=tuple(run.run_id for run, _ in found),
        num_planned=len(planned),
        failures=tuple(failures),
        paper=sources.paper_value(row, column),
        notes=tuple(notes.number(text) for text in texts),
    )


def _collapsed(spec: TableSpec, run: PlannedRun, column: ReportColumn, result: Mapping[str, Any]) -> str | None:
    """Return why a run counts as collapsed in a column, None where it does not; see `Collapse`."""
    rule = spec.collapsed
    if rule is None or not run.trained or column.name not in (rule.columns or [c.name for c in spec.columns if c.task]):
        return None
    judged = spec.column(rule.column)
    value = _value(result, judged)
    if value is None or not rule.is_beyond(value):
        return None
    return f"{judged.label} {rule.bound}"


def _mean_cell(
    spec: TableSpec, sources: Sources, row: Row, column: ReportColumn, cells: Mapping[CellKey, Cell]
) -> Cell:
    """The mean of other columns, seed by seed; only of seeds that all of them have."""
    parts = [cells[row, name] for name in column.mean_of]
    by_seed = [dict(zip(part.seeds, part.values, strict=True)) for part in parts]
    seeds = [seed for seed in by_seed[0] if all(seed in values for values in by_seed)]
    return Cell(
        values=tuple(column.scale * sum(values[seed] for values in by_seed) / len(by_seed) for seed in seeds),
        seeds=tuple(seeds),
        run_ids=tuple(dict.fromkeys(run_id for part in parts for run_id in part.run_ids)) if seeds else (),
        num_planned=min(part.num_planned for part in parts),
        failures=tuple(dict.fromkeys(failure for part in parts for failure in part.failures)),
        paper=sources.paper_value(row, column),
        notes=tuple(sorted({note for part in parts for note in part.notes})),
    )


def _chosen_rows(spec: TableSpec, cells: dict[CellKey, Cell], notes: _Footnotes) -> tuple[Row, ...]:
    """Return the rows that are ranked and compared: where the table chooses, of each base and method the setting whose
    mean is best in that column.

    Budgets are equal only where every setting was tried with every seed: a method has no choice before each of its runs
    has a value or has failed, and a setting that lost a run is not chosen. A footnote says of how many settings it was
    chosen, and whether at an edge of them in the table's order.
    """
    if spec.choose is None or spec.clusters:
        return spec.rows
    column = spec.column(spec.choose)
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in spec.rows:
        groups.setdefault((row.base, row.method), []).append(row)
    chosen = []
    for group in groups.values():
        in_column = {row: cells[row, column.name] for row in group}
        whole = [row for row, cell in in_column.items() if len(cell.values) == cell.num_planned]
        parts = [cells[row, name] for row in group for name in column.mean_of or (column.name,)]
        ended = all(
            len(cell.values) + sum(failure.status != "cancelled" for failure in cell.failures) == cell.num_planned
            for cell in parts
        )
        if not ended or not whole:
            text = f"not chosen yet: {len(whole)} of {len(group)} settings have all seeds"
            _add_note(cells, (group[0], column.name), notes.number(text))
            continue
        sign = -1.0 if column.better == "lower" else 1.0
        best = max(whole, key=lambda row: sign * in_column[row].mean)
        chosen.append(best)
        if len(group) > 1:
            text = f"chosen by {column.label} of {len(group)} settings"
            text += f", of which {len(group) - len(whole)} failed" if len(whole) < len(group) else ""
            text += ", at an edge of what was tried: try further" if best in (group[0], group[-1]) else ""
            _add_note(cells, (best, column.name), notes.number(text))
    return tuple(chosen)


def _mark(spec: TableSpec, cells: dict[CellKey, Cell], rows: Sequence[Row], notes: _Footnotes) -> None:
    """Mark best and second of each block and column, among those of `rows` that were trained; footnotes tell where
    one of them has fewer seeds than another. The column that the rows were chosen by would flatter the choice."""
    for column in spec.columns:
        if column.better == "none" or column.name == spec.choose:
            continue
        for block in spec.blocks():
            ranked = [row for row in block if row in rows and row.method != UNTUNED and cells[row, column.name].values]
            most = max((len(cells[row, column.name].values) for row in ranked), default=0)
            for row in ranked:
                cell = cells[row, column.name]
                if (count := len(cell.values)) < most and not cell.failures:  # whose footnotes tell it already
                    text = f"{count} seed{'s' if count > 1 else ''} where others have {most}"
                    _add_note(cells, (row, column.name), notes.number(text))
            means = [cells[row, column.name].mean for row in ranked]
            best, second = first_and_second(means, better=column.better, decimals=column.decimals)
            for mark, indices in (("best", best), ("second", second)):
                for index in indices:
                    key = (ranked[index], column.name)
                    cells[key] = dataclasses.replace(cells[key], mark=mark)


def _add_note(cells: dict[CellKey, Cell], key: CellKey, note: int) -> None:
    cells[key] = dataclasses.replace(cells[key], notes=(*cells[key].notes, note))


def _base_of(result: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return (name, sha256 of the weights) of the pre-trained model that a run's likelihoods were measured against."""
    sha256 = ((result.get("evaluation") or {}).get(LIKELIHOOD) or {}).get("base_sha256")
    return (result["config"]["model"]["name"], sha256) if sha256 else None


def _bases(spec: TableSpec, sources: Sources) -> dict[str, Counter[str]]:
    """Return name → sha256 → how many runs tell it, of the table's pre-trained models."""
    found: dict[str, Counter[str]] = {}
    for run in spec.all_runs():
        if (result := sources.result(run)) and (base := _base_of(result)):
            found.setdefault(base[0], Counter())[base[1]] += 1
    return found


def _note_other_bases(
    spec: TableSpec, sources: Sources, bases: Mapping[str, Mapping[str, int]], cells: dict[CellKey, Cell],
    notes: _Footnotes,
) -> None:  # fmt: skip
    """Add a footnote to each cell with a run on a pre-trained model of which not all runs had the same weights."""
    for key, cell in cells.items():
        for name in sorted({base[0] for run_id in cell.run_ids if (base := _base_of(sources.results[run_id]))}):
            if len(bases[name]) > 1:
                told = ", ".join(f"sha256 {sha256[:12]} in {number} runs" for sha256, number in bases[name].items())
                _add_note(cells, key, notes.number(f"{name} had different weights: {told}"))


def _unmatched(spec: TableSpec, sources: Sources) -> tuple[PaperRow, ...]:
    shown = {(row, column.paper) for row in spec.rows for column in spec.columns if column.paper}
    return tuple(
        line for line in sources.paper if line.table == spec.name and (line.row, (line.task, line.metric)) not in shown
    )


def _provenance(spec: TableSpec, sources: Sources) -> Iterable[dict[str, Any]]:
    for run in spec.all_runs():
        result = sources.result(run)
        if result is None:
            continue
        environment = result.get("environment") or {}
        git = environment.get("git") or {}
        yield {
            "run_id": run.run_id,
            "status": result["status"],
            "result_sha256": sources.sha256.get(run.run_id),
            "commit": git.get("commit"),
            "dirty": git.get("dirty"),
            "hardware": hardware_name(environment) if environment else None,
            "finished_at": result.get("finished_at"),
            "gradient_shares": (result.get("training") or {}).get("gradient_shares") or {},
        }
