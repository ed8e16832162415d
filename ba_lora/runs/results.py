"""Results are facts: one JSON a run, assembled from the run's own files and written atomically.

    {"run_id", "status", "error", "base", "method", "seed", "config", "model", "data", "prompt_hash", "training",
     "export", "evaluation", "environment", "finished_at"}

`status` is one of ok, failed, cancelled, oom. `prompt_hash` is that of the training's prompts. `evaluation` maps each
task to its scores and to how the completions were made. Tables are built from these files and from nothing else.
"""

import dataclasses
from pathlib import Path
from typing import Any

from ba_lora.config.layers import config_of_result
from ba_lora.config.schema import UNTUNED, RunConfig, training_hash
from ba_lora.errors import UserError
from ba_lora.io import read_object, remove_leftovers, write_json_atomic


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
    ranks/<b>/<task>: the score of a run at that rank, where it was exported for several.

    Raises UserError for a file that is damaged.
    """
    found = {}
    for rank in sorted(run_path.glob("ranks/[1-9]*/scores"), key=lambda folder: int(folder.parent.name)):
        found |= {f"ranks/{rank.parent.name}/{task}": score for task, score in evaluation(rank.parent).items()}
    folder = run_path / "scores"
    for path in sorted(folder.rglob("*.json")):  # those of lm-evaluation-harness are in a folder of their own
        score = read_record(path, "metrics", "n", fix="delete it, and score the run again")
        name = path.relative_to(folder).with_suffix("").as_posix()
        meta_path = run_path / "completions" / f"{name}.meta.json"
        meta = read_record(meta_path, fix="delete it, and generate again") if meta_path.is_file() else None
        found[name] = {"generation": meta} | score
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
    track_evaluation(run_path, result)
    return result


def track_evaluation(run_path: Path, result: dict[str, Any]) -> None:
    """Add the scores of a result to the run's tracked run, where trainer.report_to asks for one."""
    if result["config"]["trainer"].get("report_to", "none") != "none":
        from ba_lora.runs.tracking import track_scores

        track_scores(run_path, result)


def _without_seconds(scores: dict[str, Any]) -> dict[str, Any]:
    timed = ("seconds", "grader_seconds")
    return {task: {key: value for key, value in s.items() if key not in timed} for task, s in scores.items()}
