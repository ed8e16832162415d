"""Runs of no table: a table made of them, a row for all that differ in their seed only, a column for each metric."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ba_lora.config.layers import load_run
from ba_lora.config.schema import HARNESS, NOT_TRAINING
from ba_lora.errors import UserError
from ba_lora.experiments.tables import Row
from ba_lora.io import read_json
from ba_lora.runs.results import assemble
from eval.metrics.scores import METRICS
from eval.nlu_scores import CLASS_METRICS
from eval.page.runs import ShownRun, flat
from eval.report.columns import ReportColumn
from eval.report.comparisons import compare_pairs
from eval.report.settings import NEVER_ALLOWED, SETTINGS
from eval.report.sources import STATUSES, Sources
from eval.report.spec import PlannedRun, TableSpec
from eval.report.table import ReportTable, build_table
from eval.tasks import TASKS

# the harness's metrics that are shares of right answers; of its others neither scale nor direction is known
HARNESS_SHARES = ("acc", "exact_match", "pass@")
LOWER = ("nll", "p_wrong", "wrong_rule", "ece")  # metrics of which less is better
NATS = ("nll", "kl")
HIGHER = {name for task in TASKS.values() for name in task.metrics}.difference(LOWER).union(
    METRICS, CLASS_METRICS, ("p_right", "distinct_1", "distinct_2", "distinct_3")
)
MOST_ROWS = 8  # which are all compared with each other; of more, the first with each
_OTHER_SETTINGS = "settings differ, see the notes"
_NO_ROW = frozenset({"seed", "name", "method", *NOT_TRAINING})  # runs that differ in these only share a row


@dataclass(frozen=True)
class LooseTable:
    """Runs as a table; missing: what of them could not be read, a sentence each; changed: run → the settings in which
    the runs differ, key → value."""

    table: ReportTable
    sources: Sources
    shown: tuple[ShownRun, ...]
    changed: Mapping[str, Mapping[str, Any]]
    missing: tuple[str, ...] = ()


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Return the run folders and result files that are named, or lie below the folders that are. Raises UserError."""
    if not paths:
        raise UserError("no run is named: give run folders, result files, or folders of runs")
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_file() and path.suffix == ".json":
            runs = [path]
        elif (path / "config.yaml").is_file():
            runs = [path]
        elif path.is_dir():
            runs = sorted(file.parent for file in path.rglob("config.yaml"))
            runs = runs or sorted(path.glob("*.json"))
        else:
            raise UserError(f"no such run: {path}; give a run's folder, its result file, or a folder of runs")
        if not runs:
            raise UserError(f"no run in {path}: a run's folder has a config.yaml")
        found |= dict.fromkeys(runs)
    return list(found)


def table_of_runs(paths: Sequence[Path], *, title: str | None = None) -> LooseTable:
    """Return the runs at `paths` (see `find_runs`) as a table in which nothing is refused but two judges.

    Results are read from the runs' own folders, so that these may be moved. Rows are compared with each other;
    where settings of evaluation or data differ there is no test. Raises UserError where no run has a result.
    """
    runs, missing = read_shown(paths)
    if not runs:
        raise UserError(missing[0] if len(missing) == 1 else f"no run could be read: {'; '.join(missing)}")
    rows, changed = _rows(runs)
    columns = _columns(runs)
    planned = {
        run.run_id: PlannedRun(
            str(run.result.get("method")), _seed(run.result), Path(f"{run.run_id}.json"), run.run_path
        )
        for run in runs
    }
    spec = TableSpec(
        name="runs",
        title=title or (f"{len(runs)} runs" if len(runs) > 1 else runs[0].run_id),
        rows=tuple(rows),
        columns=columns,
        runs={(row, c.name): tuple(planned[run.run_id] for run in of) for row, of in rows.items() for c in columns},
    )
    sources = Sources({run.run_id: dict(run.result) for run in runs})
    table = build_table(spec, sources, allow=[name for name in SETTINGS if name not in NEVER_ALLOWED])
    both = (
        list(itertools.combinations(rows, 2)) if len(rows) <= MOST_ROWS else [(next(iter(rows)), row) for row in rows]
    )
    pairs = [(column, *pair) for column in columns for pair in both if column.better != "none" and pair[0] != pair[1]]
    alike, others = [], []
    for column, *pair in pairs:
        notes = [table.cells[row, column.name].notes for row in pair]
        (alike if notes[0] == notes[1] else others).append((column, *pair))
    untested = [  # and so of no family whose p are corrected together
        dataclasses.replace(one, p=None, p_adjusted=None, low=None, high=None, df=None, untested=_OTHER_SETTINGS)
        for one in compare_pairs(spec, sources, table.cells, others)
    ]
    comparisons = (*compare_pairs(spec, sources, table.cells, alike), *untested)
    table = dataclasses.replace(table, comparisons=comparisons)
    return LooseTable(table, sources, tuple(runs), changed, tuple(missing))


def read_shown(paths: Sequence[Path]) -> tuple[list[ShownRun], list[str]]:
    """Return the runs at `paths` with their results, and of each that could not be read why, a sentence."""
    runs: list[ShownRun] = []
    missing: list[str] = []
    for path in paths:
        try:
            runs.append(_read_run(path, taken={run.run_id for run in runs}))
        except (UserError, OSError) as error:
            missing.append(f"{path.name} is left out: {error}")
    return runs, missing


def _seed(result: Mapping[str, Any]) -> int:
    seed = result.get("seed")
    return seed if isinstance(seed, int) else 0


def _read_run(path: Path, *, taken: Iterable[str]) -> ShownRun:
    """Return a run, its result assembled from its folder or read from its result file. Raises UserError."""
    if path.is_dir():
        config = load_run(path)
        result, run_path = assemble(path, config), path
        name = path.name
    else:
        result = read_json(path)
        if not isinstance(result, dict) or result.get("status") not in STATUSES or not result.get("run_id"):
            raise UserError(f"{path} is no result of a run")
        name = str(result["run_id"])
        run_path = path.parent.parent.parent / "outputs" / name  # where a run's folder lies by default
        run_path = run_path if run_path.is_dir() else path.parent / name
    for key in ("config", "model", "data", "training", "evaluation", "environment"):
        if not isinstance(result.get(key) or {}, Mapping):
            raise UserError(f"{path} is damaged: its {key} is no mapping")
    taken = set(taken)
    number = next(n for n in range(1, len(taken) + 2) if (name if n == 1 else f"{name}~{n}") not in taken)
    return ShownRun(name if number == 1 else f"{name}~{number}", result, run_path)


def _rows(runs: Sequence[ShownRun]) -> tuple[dict[Row, list[ShownRun]], dict[str, dict[str, Any]]]:
    """Return row → its runs, one a seed, and run → the settings in which the runs differ."""
    settings = {run.run_id: flat(run.result.get("config") or {}) for run in runs}
    keys = dict.fromkeys(key for one in settings.values() for key in one)
    differing = [key for key in keys if len({repr(one.get(key)) for one in settings.values()}) > 1]
    changed = {run_id: {key: one.get(key) for key in differing} for run_id, one in settings.items()}
    rows: dict[Row, list[ShownRun]] = {}
    groups: dict[tuple[str, str], list[ShownRun]] = {}
    for run in runs:
        groups.setdefault((str(run.result.get("base")), str(run.result.get("method"))), []).append(run)
    for (base, method), members in groups.items():
        own = [
            key
            for key in differing
            if key.partition(".")[0] not in _NO_ROW
            and len({repr(settings[run.run_id].get(key)) for run in members}) > 1
        ]
        for run in members:
            row = Row(base, method, " ".join(f"{key}={settings[run.run_id].get(key)}" for key in own))
            if any(_seed(other.result) == _seed(run.result) for other in rows.get(row, ())):
                row = dataclasses.replace(row, setting=" ".join([*row.setting.split(), run.run_id]))
            rows.setdefault(row, []).append(run)
    order = {run.run_id: number for number, run in enumerate(runs)}
    return dict(sorted(rows.items(), key=lambda row: order[row[1][0].run_id])), changed


def _columns(runs: Sequence[ShownRun]) -> tuple[ReportColumn, ...]:
    """Return a column for each metric of each task that some run has, then time and memory of the training."""
    found: dict[str, ReportColumn] = {}
    for run in runs:
        for task, entry in run.evaluation.items():
            for metric in entry.get("metrics") or {}:
                name = f"{task}.{metric}"
                found[name] = ReportColumn(name, f"{task}: {metric}", task, metric, **shape_of(task, metric))
            if "perplexity" in entry:
                name = f"{task}.perplexity"
                shown = {"unit": "", "scale": 1.0, "decimals": 3, "better": "lower"}
                found[name] = ReportColumn(name, f"{task}: perplexity", task, "perplexity.after", **shown)
    for metric, label, unit in (
        ("training.seconds", "training time", "s"),
        ("training.peak_memory_mb", "peak memory", "MiB"),
    ):
        if any((run.result.get("training") or {}).get(metric.split(".")[1]) is not None for run in runs):
            found[metric] = ReportColumn(metric, label, metric=metric, unit=unit, scale=1.0, decimals=0, better="none")
    return tuple(found.values())


def shape_of(task: str, metric: str) -> dict[str, Any]:
    """Return a metric's unit, scale and direction; of one that is not known it has neither, and is not ranked."""
    if metric.startswith("rating"):
        return {"unit": "", "scale": 10.0}
    better = "lower" if metric in LOWER else "higher"
    if metric in NATS and not task.startswith(HARNESS):
        better = "none" if metric == "kl" else better  # near to the base is no merit of itself
        return {"unit": "nats", "scale": 1.0, "decimals": 4, "better": better}
    if metric.startswith(HARNESS_SHARES) if task.startswith(HARNESS) else metric in HIGHER or metric in LOWER:
        return {"better": better}
    return {"unit": "", "scale": 1.0, "decimals": 4, "better": "none"}
