"""What a report is made from: result JSONs, grades and logs of the runs, and the paper's numbers. Nothing else."""

import csv
import hashlib
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ba_lora.config.layers import config_of_result
from ba_lora.config.schema import NOT_TRAINING, UNTUNED, RunConfig, setting_differences, training_settings
from ba_lora.errors import UserError
from ba_lora.experiments import state as grid_state
from ba_lora.experiments.table_file import PAPER_PATH
from ba_lora.experiments.tables import Row
from ba_lora.io import read_json, read_jsonl
from ba_lora.words import nearest
from eval.report.columns import Items, ReportColumn
from eval.report.spec import PlannedRun, row_name

STATUSES = ("ok", "failed", "cancelled", "oom")
PAPER_COLUMNS = ("table", "model", "method", "setting", "task", "metric", "mean", "std", "source")
MORE_THAN = ", more than"  # ends the metric of a value that the paper only bounds from below


@dataclass(frozen=True)
class PaperValue:
    """A number as published. is_bound: the paper says "more than" it."""

    mean: float
    std: float | None
    source: str
    is_bound: bool = False


@dataclass(frozen=True)
class PaperRow:
    """A line of a file of results/paper_reported, its names already ours."""

    table: str
    row: Row
    task: str
    metric: str
    value: PaperValue


@dataclass(frozen=True)
class FailedStage:
    """The stage of a run that failed last in a grid, named as in ba_lora/experiments/stages.py, and its error, one
    line.

    `tasks`: where only scorers failed, the task of each and its error.
    """

    name: str
    error: str
    tasks: Mapping[str, str] = field(default_factory=dict)

    def told(self, column: ReportColumn) -> str | None:
        """Return "stage or task: error" where the failure concerns the column's value, else None: a failed training
        concerns all columns, any other stage those of all tasks, failed scorers those of their tasks."""
        if self.tasks:
            return f"{column.task}: {self.tasks[column.task]}" if column.task in self.tasks else None
        return f"{self.name}: {self.error}" if self.name == "train" or column.task is not None else None


@dataclass(frozen=True)
class Sources:
    """The files of a report, read.

    results: run_id → result, of the runs that have one; sha256: run_id → hash of that file; failures: run_id → the
    stage that failed last in a grid, of the runs that are not done since; declared: the record of the table's file when
    its first run started (ba_lora/experiments/state.py), None where there is none. Grades and logs are read from the
    runs' own folders when they are asked for.
    """

    results: Mapping[str, dict[str, Any]]
    paper: tuple[PaperRow, ...] = ()
    sha256: Mapping[str, str] = field(default_factory=dict)
    failures: Mapping[str, FailedStage] = field(default_factory=dict)
    declared: Mapping[str, Any] | None = None

    def result(self, run: PlannedRun) -> dict[str, Any] | None:
        """Return a run's result, None where there is none yet."""
        return self.results.get(run.run_id)

    def failure(self, run: PlannedRun, column: ReportColumn) -> str | None:
        """Return what failed that was to give a run's value in this column, and its error; None: nothing did."""
        failed = self.failures.get(run.run_id)
        return None if failed is None else failed.told(column)

    def grades(self, run: PlannedRun, items: Items) -> dict[str, tuple[float, int]] | None:
        """Return item → (sum, number) of the grades of its turns, of the items that are asked for.

        A turn's grade is the mean of its samples'. The turns of one question (mt_bench/81/turn1) are one item, since
        they are no independent draws; any other item is a single turn. An answer that no judgement rated counts in
        neither, as in the score. None where the grades are not at hand, lack the metric, or do not tell the group of
        an item.
        """
        path = run.run_path / "grades" / f"{items.task}.jsonl"
        if not path.is_file():
            return None
        turns: dict[str, dict[str, list[float]]] = {}  # item → turn → the grades of its samples
        for row in read_jsonl(path):
            value = (row.get("metrics") or {}).get(items.metric)
            if items.group is not None:
                group = (row.get("groups") or {}).get(items.group)
                if group is None:
                    return None
                if group not in items.members:
                    continue
            turn = str(row.get("task_id"))
            samples = turns.setdefault("/".join(turn.split("/")[:2]), {}).setdefault(turn, [])
            if isinstance(value, int | float):
                samples.append(float(value))
            elif not _is_unrated(row):
                return None
        means = {item: [statistics.fmean(values) for values in of.values() if values] for item, of in turns.items()}
        return {item: (sum(values), len(values)) for item, values in means.items()} or None

    def likelihoods(self, run: PlannedRun, task: str) -> list[dict[str, Any]] | None:
        """Return the lines of eval/inheritance.py's texts, {"task_id", "nll", "num_tokens"}; None where there are none,
        or where a diverged model gave one no likelihood."""
        path = run.run_path / "grades" / f"{task}_texts.jsonl"
        lines = read_jsonl(path) if path.is_file() else []
        return lines if lines and all(line["nll"] is not None for line in lines) else None

    def predictions(self, run: PlannedRun, task: str) -> list[dict[str, Any]] | None:
        """Return a classifier's lines of one set, see eval/nlu.py; None where they are not at hand.

        What it predicted in training is in best.jsonl with the other dev sets; what eval.nlu has predicted since, in a
        file of its own, whose hash its score names.
        """
        entry = self.results[run.run_id]["evaluation"][task]
        path = run.run_path / "predictions" / (f"{task}.jsonl" if "predictions_sha256" in entry else "best.jsonl")
        if not path.is_file():
            return None
        return [line for line in read_jsonl(path) if line["task_id"].startswith(f"{task}/")] or None

    def log(self, run: PlannedRun) -> list[dict[str, Any]] | None:
        """Return the logged steps of a run's training, None where the log is not at hand."""
        path = run.run_path / "log.jsonl"
        return [entry for entry in read_jsonl(path) if "loss" in entry] if path.is_file() else None

    def paper_value(self, row: Row, column: ReportColumn) -> PaperValue | None:
        """Return what the paper reports for a cell, None where it reports nothing.

        Of several files that the table names the first with a value counts. Raises UserError where one file has two.
        """
        found = [line for line in self.paper if line.row == row and (line.task, line.metric) == column.paper]
        if not found:
            return None
        first = [line for line in found if line.table == found[0].table]
        if len(first) > 1:
            raise UserError(
                f"results/paper_reported/{found[0].table}.csv has {len(first)} values for {row_name(row)} "
                f"{column.name}: keep one"
            )
        return first[0].value


def _is_unrated(grade: Mapping[str, Any]) -> bool:
    """Whether this is the grade of an answer that the judge did not rate; see eval/tasks/mt_bench.py."""
    return bool(grade.get("invalid")) and not grade.get("metrics")


def read_results(runs: Iterable[PlannedRun]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return (run_id → result, run_id → sha256 of its file) of the planned runs that have a result.

    Raises UserError, naming the file, for one that is broken, or that is another run than its name says.
    """
    results, hashes = {}, {}
    for run in runs:
        path = run.result_path
        if not path.is_file():
            continue
        result = read_json(path)
        if not isinstance(result, dict) or result.get("status") not in STATUSES:
            raise UserError(f"{path} is no result: it has no status of {', '.join(STATUSES)}; make it again")
        wanted_facts = {"run_id": run.run_id, "method": run.method, "seed": run.seed}
        wanted_facts |= {"base": run.config.name} if run.config is not None else {}
        if run.method == UNTUNED:  # one result for all seeds
            del wanted_facts["seed"]
        for key, wanted in wanted_facts.items():
            if result.get(key) != wanted:
                raise UserError(f"{path} is another run than its name says: {key} is {result.get(key)}, not {wanted}")
        if run.config is not None and (change := _other_training(result.get("config") or {}, run.config)):
            raise UserError(f"{path} is another run than its name says: {change}")
        trained_on = (result.get("training") or {}).get("num_processes")
        if run.gpus is not None and trained_on not in (None, run.gpus):  # the effective batch grows with it
            raise UserError(
                f"{path} was trained by {trained_on} process(es), its row is set for {run.gpus}: set the row's "
                f"gpus, or delete {run.run_path} and train it again"
            )
        results[run.run_id] = result
        hashes[run.run_id] = hashlib.sha256(path.read_bytes()).hexdigest()
    return results, hashes


def _other_training(kept: Mapping[str, Any], planned: RunConfig) -> str | None:
    """Return a setting of the training (of the untuned model: the model) in which a result's config is another than the
    planned one, as `key found → wanted`; None where it is the same training."""
    try:
        config = config_of_result(
            {key: value for key, value in kept.items() if key not in NOT_TRAINING}, kind=planned.kind
        )
    except UserError as error:
        return str(error)
    pair = (config, planned)
    found, wanted = (
        {"model": asdict(one.model)} if planned.method == UNTUNED else training_settings(one) for one in pair
    )
    return next(iter(setting_differences(found, wanted)), None)


def read_failures(runs: Iterable[PlannedRun]) -> dict[str, FailedStage]:
    """Return run_id → the stage that failed, of the runs that are not done since.

    A result tells how the training ended; that the evaluation failed, or a training that could not say so, is in the
    grid's record only. A damaged record tells nothing: the run is missing, or its older values stand.
    """
    failures = {}
    for run in runs:
        if record := grid_state.read_failure(run.run_path):
            failures[run.run_id] = FailedStage(record["stage"], record["error"], record.get("tasks", {}))
    return failures


def read_paper(
    names: Iterable[str], *, renamed: Mapping[str, str] | None = None, folder: Path = PAPER_PATH
) -> tuple[PaperRow, ...]:
    """Return the lines of results/paper_reported/<name>.csv; `renamed`: the file's model, method or setting → ours.

    Raises UserError for a file that is missing or broken.
    """
    renamed = renamed or {}
    lines = []
    for name in names:
        path = folder / f"{name}.csv"
        if not path.is_file():
            known = sorted(file.stem for file in folder.glob("*.csv"))
            raise UserError(f"no such file: {path}: the table's report.paper names it{nearest(name, known)}")
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != PAPER_COLUMNS:
                raise UserError(f"{path}: its columns must be {', '.join(PAPER_COLUMNS)}")
            for row in reader:
                ours = [renamed.get(row[key], row[key]) for key in ("model", "method", "setting")]
                metric = row["metric"].removesuffix(MORE_THAN)
                try:
                    mean, std = float(row["mean"]), float(row["std"]) if row["std"] else None
                except ValueError as error:
                    raise UserError(f"{path}, line {reader.line_num}: {error}") from error
                value = PaperValue(mean, std, row["source"], is_bound=metric != row["metric"])
                lines.append(PaperRow(row["table"], Row(*ours), row["task"], metric, value))
    return tuple(lines)
