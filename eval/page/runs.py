"""What a page tells of a run: its settings and how they differ from its base's, scores, curves, versions, files."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ba_lora.config.layers import load_config
from ba_lora.errors import UserError
from ba_lora.io import read_jsonl
from ba_lora.paths import PROJECT_ROOT
from ba_lora.runs.environment import hardware_name

MOST_POINTS = 2000  # of a curve; of a longer log so many steps are drawn, and the page says so
MOST_FILES = 200
_NOT_SHOWN = ("output_dir", "results_dir", "overwrite")


@dataclass(frozen=True)
class ShownRun:
    """A run of a page: its result (None: gone or damaged) and its own folder."""

    run_id: str
    result: Mapping[str, Any] | None
    run_path: Path

    @property
    def evaluation(self) -> Mapping[str, Mapping[str, Any]]:
        found = (self.result or {}).get("evaluation") or {}
        return {task: entry for task, entry in found.items() if _is_score(entry)}

    @property
    def damaged(self) -> list[str]:
        """A sentence on each score that is none, which `evaluation` leaves out."""
        found = (self.result or {}).get("evaluation") or {}
        return [f"its score of {task} is damaged: score the run again" for task in found if task not in self.evaluation]


def _is_score(entry: Any) -> bool:
    if not isinstance(entry, Mapping):
        return False
    metrics, intervals = (entry.get(key) or {} for key in ("metrics", "interval_95"))
    return isinstance(metrics, Mapping) and isinstance(intervals, Mapping)


def describe_run(run: ShownRun) -> dict[str, Any]:
    """Return what the page shows of a run, as plain values; `missing` says in sentences what is not at hand."""
    result = run.result or {}
    environment, training = result.get("environment") or {}, result.get("training") or {}
    missing = run.damaged if run.result is not None else ["its result is gone or damaged"]
    config = flat(result.get("config") or {})
    log, num_logged, said = _log(run.run_path)
    num_drawn = len(log.get("step", ()))
    if said and training:
        missing.append(said)
    facts = {
        "status": result.get("status"),
        "error": result.get("error"),
        "finished": result.get("finished_at"),
        "base model": " ".join(str(word) for word in (result.get("model") or {}).values() if word),
        "training time (s)": training.get("seconds"),
        "tokens per second": training.get("tokens_per_second"),
        "steps": training.get("steps"),
        "steps in the curves": f"{num_drawn} of {num_logged}" if num_drawn < num_logged else None,
        "trained parameters": training.get("trainable_parameters"),
        "peak memory, one process (MiB)": training.get("peak_memory_mb"),
        "peak memory, all processes (MiB)": training.get("total_peak_memory_mb"),
        "loss computed": (training.get("loss") or {}).get("implementation"),
        "hardware": hardware_name(environment) if environment else None,
        "Python": environment.get("python"),
        "packages": ", ".join(f"{name} {version}" for name, version in (environment.get("packages") or {}).items()),
        "commit": _commit(environment.get("git") or {}),
        "training data": ", ".join(
            f"{key} {value}" for key, value in (result.get("data") or {}).items() if not isinstance(value, dict | list)
        ),
    }  # fmt: skip
    return {
        "id": run.run_id,
        "base": result.get("base"),
        "method": result.get("method"),
        "seed": result.get("seed"),
        "command": environment.get("command") and f"python {environment['command']}",
        "facts": {key: value for key, value in facts.items() if value not in (None, "")},
        "gradient_shares": training.get("gradient_shares") or {},
        "config": config,
        "base_config": _base_config(str(result.get("base")), *_kind_and_task(result.get("config") or {})),
        "scores": [score for task, entry in run.evaluation.items() for score in _scores(task, entry)],
        "log": log,
        "files": _files(run.run_path),
        "missing": missing,
    }


def _commit(git: Mapping[str, Any]) -> str | None:
    commit = git.get("commit")
    return f"{commit} with uncommitted changes" if commit and git.get("dirty") else commit


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key → value of nested settings; lists stay whole."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        elif prefix or key not in _NOT_SHOWN:
            found[f"{prefix}{key}"] = value
    return found


def _kind_and_task(config: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return nlg or nlu, and the task's name where the base does not describe the task itself."""
    task = (config.get("nlu") or {}).get("task")
    return "nlg" if task is None else "nlu", task if isinstance(task, str) else None


@functools.cache
def _base_config(base: str, kind: str, nlu_task: str | None) -> dict[str, Any] | None:
    """Return the flat settings of a base (configs/nlg or nlu) as it is today, under LoRA; None where it is gone."""
    path = PROJECT_ROOT / "configs" / kind / f"{base}.yaml"
    if not path.is_file():
        return None
    try:
        config = load_config(path, method="lora", task=nlu_task, kind=kind, checked=False)
    except UserError:
        return None
    return flat(dataclasses.asdict(config))


def _log(run_path: Path) -> tuple[dict[str, list[Any]], int, str | None]:
    """Return name → values at the drawn steps ("step" among them), how many were logged, and why there is none."""
    path = run_path / "log.jsonl"
    if not path.is_file():
        return {}, 0, "no log.jsonl is at hand, so that there are no curves"
    try:
        rows = [row for row in read_jsonl(path) if "loss" in row]
    except UserError as error:
        return {}, 0, f"the log cannot be read: {error}"
    stride = max(1, -(-(len(rows) - 1) // (MOST_POINTS - 1)))
    drawn = rows[:-1:stride] + rows[-1:]  # first and last among them
    names = dict.fromkeys(name for row in drawn for name, value in row.items() if isinstance(value, int | float))
    return {name: [_significant(row.get(name)) for row in drawn] for name in names}, len(rows), None


def _significant(value: Any) -> float | int | None:
    """Return a number at seven significant digits, which no screen shows more of."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    return value if isinstance(value, int) else None


def _scores(task: str, entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    intervals = entry.get("interval_95") or {}
    found = []
    for name, value in (entry.get("metrics") or {}).items():
        low, high = intervals.get(name) or (None, None)
        counts = {key: entry.get(key) for key in ("n", "invalid", "num_truncated", "num_missing", "timeouts")}
        found.append({"task": task, "metric": name, "value": value, "low": low, "high": high, **counts})
    return found


def _files(run_path: Path) -> list[list[Any]]:
    """Return (path in the run's folder, bytes) of its files, the first of many."""
    files = []
    for folder, _, names in os.walk(run_path):
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            try:
                files.append([path.relative_to(run_path).as_posix(), path.stat().st_size])
            except FileNotFoundError:  # a training that goes on deletes old checkpoints
                continue
    return sorted(files)[:MOST_FILES]
