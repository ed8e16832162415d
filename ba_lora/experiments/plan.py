"""What a grid is going to do, known before it does anything: the state of each run, evaluations that cannot work, and
`--dry-run`, which tells it with time and disk."""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ba_lora.config.schema import UNTUNED, RunConfig
from ba_lora.errors import UserError
from ba_lora.experiments.estimates import estimate_lines
from ba_lora.experiments.evaluation_state import Graders
from ba_lora.experiments.pipeline import missing_judge
from ba_lora.experiments.spec import Spec
from ba_lora.experiments.stages import CHECKED, Call, ask_checks, evaluation_stages
from ba_lora.experiments.state import DONE, FAILED, MISSING, RUNNING, STALE, RunState, changed_config, inspect
from ba_lora.experiments.tables import SeedCell, Table
from ba_lora.glue import task_word
from ba_lora.locks import holder, try_lock, work_lock_path
from ba_lora.paths import resolve_path


@dataclass(frozen=True)
class Planned:
    """A run of a table, the cells that it fills, and its state as it is found.

    changed: what the config has in other values than the run that filled these cells before, which it replaces;
    refused: why it cannot be evaluated as it is asked for, so that it is not even trained.
    """

    spec: Spec
    cells: Sequence[SeedCell]
    state: RunState
    changed: str | None = None
    refused: str | None = None

    @property
    def name(self) -> str:
        return self.spec.config.run_path.name


@dataclass(frozen=True)
class Checks:
    """What eval/ answers before anything is run. graders: as they are now; refused: run folder → why its evaluation
    could not work, as far as that shows without the trained model."""

    graders: Graders = field(default_factory=dict)
    refused: Mapping[Path, str] = field(default_factory=dict)


def ask_evaluators(table: Table, *, prepared: bool = True) -> Checks:
    """Ask eval.check, in one process of its own, all that a table needs to know, of finished runs, too. prepared: what
    the table needs first has been run, so that a data file that is not there is an error.

    Runs with one model and one evaluation are checked once. Raises UserError, naming the column, for a metric that its
    task's score will not have.
    """
    columns = [column for column in table.columns if column.task is not None and column.metric is not None]
    calls = [Call("eval.metric_paths", settings=(table.kind, column.task, column.metric)) for column in columns]
    asked_for: list[list[RunConfig]] = []  # for each further call
    refused: dict[Path, str] = {}
    for members in _evaluated_alike(spec.config for spec in table.specs()):
        if not prepared and not all(resolve_path(file).is_file() for file in members[0].eval.data.values()):
            continue
        try:
            stages = evaluation_stages(members[:1])
        except UserError as error:
            refused |= {config.run_path: str(error) for config in members}
            continue
        checked = [stage.call for stage in stages if stage.call.module in CHECKED]
        calls += checked
        asked_for += [members] * len(checked)
    answers = ask_checks(calls, "--graders")
    of_columns, of_runs = answers["errors"][: len(columns)], answers["errors"][len(columns) :]
    for column, error in zip(columns, of_columns, strict=True):
        if error:
            raise UserError(f"table {table.id}: columns.{column.name}: {error}")
    for members, error in zip(asked_for, of_runs, strict=True):
        refused |= {config.run_path: error for config in members} if error else {}
    return Checks(answers["graders"], refused)


def _evaluated_alike(configs: Iterable[RunConfig]) -> Iterable[list[RunConfig]]:
    alike: dict[str, list[RunConfig]] = {}
    for config in configs:
        task = task_word(config.nlu.task) if config.kind == "nlu" else None
        settings = [dataclasses.asdict(config.model), dataclasses.asdict(config.eval)]
        key = json.dumps([config.kind, task, config.method == UNTUNED, *settings])
        alike.setdefault(key, []).append(config)
    return alike.values()


def plan_runs(table: Table, checks: Checks) -> list[Planned]:
    """Return the table's runs as they are found, each once."""
    planned = []
    for cells in table.cells_of_runs.values():
        spec = cells[0].spec
        try:
            state = inspect(spec, checks.graders)
        except UserError as error:
            state = RunState(FAILED, str(error))
        changed = changed_config(table, cells[0]) if state.status == MISSING else None
        refused = checks.refused.get(spec.config.run_path) if state.generates else None
        planned.append(Planned(spec, cells, state, changed, refused))
    return planned


def limit_lines(table: Table) -> list[str]:
    """Return what eval.limit does to the report of a table: scores of the first items, told in a footnote; refused
    where it differs within a column."""
    limits: dict[str, set[int | None]] = {}
    for cell in table.cells:
        if cell.column.task is not None:
            limits.setdefault(cell.column.name, set()).add(cell.config.eval.limit)
    lines = []
    for name, found in limits.items():
        if len(found) > 1:
            told = ", ".join("none" if one is None else str(one) for one in sorted(found, key=lambda one: one or 0))
            lines.append(f"warning: column {name}: eval.limit differs among its rows ({told}): the report refuses that")
    alike = {next(iter(found)) for found in limits.values() if len(found) == 1} - {None}
    if alike:
        told = ", ".join(map(str, sorted(alike)))
        lines.append(f"eval.limit={told}: scores are of the first items only, as a footnote of the table will say")
    return lines


def dry_run(table: Table, planned: Sequence[Planned], *, retry: bool = False) -> list[str]:
    """Return what would be done: one line a run, then the whole, its time and disk.

    Failed runs cost nothing unless `retry` has them done again.
    """
    lines, left = [], []
    counts: Counter[str] = Counter()
    for entry in planned:
        state = _told_state(entry)
        counts[state.status] += 1
        if state.status != DONE and not entry.refused and (state.status != FAILED or retry):
            left.append((entry.spec, state))
        row = entry.cells[0].row
        words = " ".join(word for word in (row.base, row.method, row.setting) if word)
        columns = ",".join(cell.column.name for cell in entry.cells)
        lines.append(f"{state.status:10} {words} seed {entry.spec.config.seed} → {columns}: {entry.name}")
        lines += [f"           {state.reason}"] if state.reason else []
    total = ", ".join(f"{number} {status}" for status, number in counts.items())
    lines.append(f"{table.id}: {len(table.cells)} cells from {len(planned)} runs: {total}")
    lines += limit_lines(table)
    if missing := missing_judge((entry.spec.config for entry in planned), os.environ):
        lines.append(missing)
    lines += [f"cost of the whole, as its file says: {table.cost}"] if table.cost else []
    return lines + estimate_lines(left)


def _told_state(entry: Planned) -> RunState:
    """Return a run's state with what others do with it, and what is wrong with what is asked of it."""
    if entry.refused:
        return replace(entry.state, status=FAILED, reason=entry.refused)
    lock_path = work_lock_path(entry.spec.config.run_path)
    if lock_path.is_file():  # a dry run leaves no file behind
        if (lock := try_lock(lock_path)) is None:
            return replace(entry.state, status=RUNNING, reason=holder(lock_path))
        lock.close()
    return replace(entry.state, status=STALE, reason=entry.changed) if entry.changed else entry.state
