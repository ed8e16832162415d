"""What state a run of a grid is in: done, stale, failed, unfinished or missing; read from its files only.

outputs/.grid/<run>.failed.json       the stage that failed last, its error, its log, and, where all else of the run is
                                      well, the tasks that it failed for; gone once the run is done
              <table>/<cell>.txt      the run that last filled the cell, so that a changed config can be named
              logs/                   the output of every stage
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ba_lora.config.layers import load_config, read_yaml
from ba_lora.config.schema import RunConfig, setting_differences, training_hash, training_settings
from ba_lora.errors import UserError
from ba_lora.experiments.evaluation_state import evaluation_fault, evaluation_state
from ba_lora.experiments.executors.base import StageFailure, log_lines
from ba_lora.experiments.spec import Spec
from ba_lora.experiments.tables import SeedCell, Table
from ba_lora.glue import HUB, HUB_REVISION
from ba_lora.io import read_json, read_object, write_json_atomic, write_text_atomic
from ba_lora.paths import PROJECT_ROOT
from ba_lora.rows import is_commit
from ba_lora.runs.environment import git_state, is_committed, now
from ba_lora.runs.folder import CLAIM, base_changed, is_trained, source_changed, source_sha256, untuned_base_changed
from ba_lora.runs.results import result_fault

DECLARED = "declared.json"  # in the report's folder
GRID_PATH = PROJECT_ROOT / "outputs" / ".grid"
MANIFEST_PATH = PROJECT_ROOT / "data" / "manifest.yaml"

DONE, STALE, FAILED, UNFINISHED, MISSING = "done", "stale", "failed", "unfinished", "missing"
RUNNING = "running"  # another process works on it
_ERROR_LINE = re.compile(r"^(?:\[rank \d+\] )?(error: .*|[\w.]*(?:Error|Exception|Interrupt)\b.*)$")


@dataclass(frozen=True)
class RunState:
    """status, why, and what is to do where it is not done: train (with `overwrite`: again), else evaluate (`regrade`:
    the completions hold), or nothing but write the result (`record`)."""

    status: str
    reason: str = ""
    train: bool = False
    overwrite: bool = False
    regrade: bool = False
    record: bool = False

    @property
    def generates(self) -> bool:
        """Whether completions or predictions are to be made."""
        return self.status != DONE and not (self.regrade or self.record)


def inspect(spec: Spec, graders: Mapping[str, Mapping[str, str | None]]) -> RunState:
    """Return the state of a run, its failure included."""
    state = _inspect_files(spec, graders)
    if state.status != DONE and (record := read_failure(spec.config.run_path)):
        reason = f"{record['stage']}: {record['error']} (log: {record['log']})"
        return dataclasses.replace(state, status=FAILED, reason=reason)
    return state


def _inspect_files(spec: Spec, graders: Mapping[str, Mapping[str, str | None]]) -> RunState:
    config = spec.config
    if spec.trained:
        if not is_trained(config.run_path, config):
            started = (config.run_path / "config.yaml").is_file()
            return RunState(UNFINISHED if started else MISSING, train=True)
        if reason := _training_fault(config):
            return RunState(STALE, reason, train=True, overwrite=True)
    elif not (config.run_path / "train.json").is_file():
        return RunState(MISSING)
    elif untuned_base_changed(config):
        return RunState(STALE, f"the base {config.model.name} has changed since it was evaluated")
    fault = evaluation_fault(config, evaluation_state(config), graders=graders)
    if fault is not None:
        return RunState(STALE if fault.stale else UNFINISHED, fault.reason, regrade=fault.regrade)
    if reason := result_fault(config):
        return RunState(UNFINISHED, reason, record=True)
    return RunState(DONE)


def _training_fault(config: RunConfig) -> str | None:
    """Return why a trained run is no longer the run that its config asks for: its data or base have changed since."""
    claim = config.run_path / CLAIM
    claimed = read_json(claim) if claim.is_file() else {}
    if claimed and source_changed(claimed.get("source_sha256"), source_sha256(config)):
        return f"{' or '.join(config.data_files)} has changed since it was trained on"
    if base_changed(config, claimed.get("base")):
        return f"the base {config.model.name} has changed since it was trained from it"
    if config.data.source is not None:
        return None
    if config.kind == "nlu":
        name, pinned = HUB, config.data.revision or HUB_REVISION
    else:
        name, pinned = config.data.name, config.data.revision or _pinned_revisions().get(config.data.name)
    used = (read_json(config.run_path / "train.json").get("data") or {}).get("revision")
    if used and is_commit(pinned) and used != pinned:  # a branch that was asked for may stand for any commit
        return f"trained on revision {used[:10]} of {name}, pinned is {pinned[:10]}"
    return None


def _pinned_revisions() -> dict[str, str]:
    entries = read_yaml(MANIFEST_PATH)
    return {name: entry["revision"] for name, entry in entries.items() if entry.get("revision")}


def failure_path(run_path: Path) -> Path:
    """Return the record of a run's last failure."""
    return GRID_PATH / f"{run_path.name}.failed.json"


def read_failure(run_path: Path) -> dict[str, Any] | None:
    """Return what `record_failure` has written of a run; None where there is no record, or a damaged one."""
    record = read_object(failure_path(run_path)) or {}
    tasks = record.get("tasks", {})
    if not isinstance(tasks, dict):
        return None
    texts = [*(record.get(key) for key in ("stage", "error", "log")), *tasks.values()]
    return record if all(isinstance(text, str) for text in texts) else None


def record_failure(config: RunConfig, failures: Sequence[StageFailure]) -> str:
    """Write down the failures of a run's stages; return what failed and its error, one line.

    The record is that of the first failure. Where only scorers failed, its "tasks" are these scorers' tasks, each with
    its error: all other scores of the run are good.
    """
    errors = [stage_error(failure) for failure in failures]
    first = failures[0]
    record = {"stage": first.stage.name, "status": first.status, "error": errors[0], "log": str(first.log_path)}
    tasks = {failure.stage.task: error for failure, error in zip(failures, errors, strict=True)}
    write_json_atomic(failure_path(config.run_path), record if None in tasks else record | {"tasks": tasks})
    return "; ".join(f"{failure.stage.name}: {error}" for failure, error in zip(failures, errors, strict=True))


def stage_error(failure: StageFailure) -> str:
    """Return what the failure says itself, else the last line of the stage's log that reads like an error, else its
    last line, else the exit status."""
    if failure.error is not None:
        return failure.error
    lines = log_lines(failure.log_path)
    found = [match[1] for line in lines if (match := _ERROR_LINE.match(line))]
    signal = f"ended by signal {-failure.status}" if failure.status < 0 else f"exit status {failure.status}"
    return (found[-1] if found else f"{signal}; {lines[-1] if lines else 'no output'}").removeprefix("error: ")[:500]


def cell_path(table: Table, cell: SeedCell) -> Path:
    """Return the file that names the run which last filled a cell; cells that share a run share it, too."""
    key = json.dumps([dataclasses.astuple(cell.row), list(cell.column.overrides), cell.seed])
    words = "-".join(word for word in (cell.row.base, cell.row.method, cell.row.setting) if word)
    name = re.sub(r"[^\w.=-]+", "_", words)
    return GRID_PATH / table.id / f"{name}-s{cell.seed}-{hashlib.sha256(key.encode()).hexdigest()[:8]}.txt"


def remember_run(table: Table, cell: SeedCell) -> None:
    """Write down which run fills the cell."""
    path = cell_path(table, cell)
    if not path.is_file() or path.read_text(encoding="utf-8") != cell.config.run_path.name:
        write_text_atomic(path, cell.config.run_path.name)


def deciding(table: Table) -> dict[str, Any]:
    """Return all that decides a table's tests and what they are of, as JSON has it; how it is shown is left out."""
    shown = ("paper", "paper_task", "unit")
    runs = "\n".join(sorted(path.name for path in table.cells_of_runs))
    found = {
        "rows": [dataclasses.astuple(row) for row in table.rows],
        "columns": [{k: v for k, v in dataclasses.asdict(one).items() if k not in shown} for one in table.columns],
        "seeds": table.seeds,
        "ours": table.ours,
        "runs_sha256": hashlib.sha256(runs.encode()).hexdigest(),
        "report": {key: value for key, value in table.report.items() if key not in ("figures", "names")},
    }
    return json.loads(json.dumps(found))


def declaration_path(folder: Path, output: Path | None) -> Path:
    """Return where a table's declaration is, or is to be: in the chosen folder of the report (`output`), else in the
    table's own (`folder`). Where the chosen folder has none, that of a run that chose no folder counts."""
    own = folder / DECLARED
    return own if output is None or (own.exists() and not (output / DECLARED).exists()) else output / DECLARED


def declare(table: Table, path: Path, record_path: Path) -> None:
    """Write down, before the first run of a table starts, what its file (`path`) says: its hash, whether the commit has
    it like that, and all that decides its tests.

    The report tells by it whether the tests were chosen before a result was seen. The record (see `declaration_path`)
    is written once; a damaged one is told by the report, never replaced.
    """
    if record_path.exists():
        return
    committed = is_committed(table.sha256, path)
    results = {cell.config.result_path for cell in table.cells}
    write_json_atomic(
        record_path,
        {
            "sha256": table.sha256,
            "tests": deciding(table),
            "num_results": sum(result.is_file() for result in results),
            "declared_at": now(),
            "commit": git_state()["commit"],
            "dirty": None if committed is None else not committed,
        },
    )


def read_declaration(path: Path) -> dict[str, Any] | None:
    """Return what `declare` has written; None where there is no record. Raises UserError for a damaged one."""
    if not path.is_file():
        return None
    record = read_object(path) or {}
    if isinstance(record.get("primary"), list):  # of before the tests' whole definition was kept
        record.setdefault("tests", {})
    kinds = {"sha256": str, "tests": dict, "num_results": int, "declared_at": str}
    if not all(isinstance(record.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"{path} is damaged: restore it, or delete it (then no test of the table counts as primary)")
    return record


def changed_config(table: Table, cell: SeedCell) -> str | None:
    """Return what differs between a cell's run and the one that filled it before, None where there was none."""
    path = cell_path(table, cell)
    if not path.is_file():
        return None
    before = path.read_text(encoding="utf-8")
    if before == cell.config.run_path.name:
        return None
    saved = cell.config.run_path.with_name(before) / "config.yaml"
    try:
        old = load_config(saved, checked=False)
    except UserError:  # its folder is gone, or its keys are no longer known
        return f"config changed since {before}"
    if training_hash(old) == training_hash(cell.config):
        return None
    changes = setting_differences(training_settings(old), training_settings(cell.config))
    shown = ", ".join(changes[:3]) + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")
    return f"config changed since {before}: {shown}"
