"""A folder of runs: score all of it again, or mark what is stale; and bring the runs' results up to date.

python -m eval.score --runs DIR        python -m eval.score --stale DIR
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from ba_lora.config.layers import load_run
from ba_lora.config.schema import RESULTS_PATH
from ba_lora.errors import UserError
from ba_lora.io import read_json, write_json_atomic
from ba_lora.runs.card import refresh_run
from ba_lora.runs.results import refresh_result
from eval import inheritance, likelihood
from eval.completions import score_paths
from eval.judge.judge import one_judge
from eval.scoring import ScoreOptions, score_file, stale_reason
from eval.tasks import get_task


def score_runs(folder: Path, *, options: ScoreOptions, results: Path | None = None) -> int:
    """Re-score every run below `folder`, and bring the runs' results in `results` (None: results/runs) up to date.

    Prints one line a run and task, one a refreshed result, and a last JSON line; returns the exit status.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}; give the folder that holds the runs, e.g. outputs")
    files = sorted(path for path in folder.rglob("completions/*.jsonl") if not path.name.startswith("."))
    if not files:
        raise UserError(f"no run with completions/<task>.jsonl below {folder}; run eval.generate first")
    loaded: dict = {}
    scored, failed, judged = 0, [], []
    for path in files:
        run = os.path.relpath(path.parent.parent, folder)
        try:
            score = score_file(get_task(path.stem), path, options=options, loaded=loaded)
        except (UserError, OSError) as error:
            failed.append(f"{run}/{path.stem}")
            _mark_one(score_paths(path, None)[0], path)
            print(f"error: {run} {path.stem}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            continue
        scored += 1
        judged += [score] if "judge" in score else []
        metrics = " ".join(f"{name}={value:.4f}" for name, value in score["metrics"].items())
        partial = f" partial ({score['num_missing']} missing)" if score["partial"] else ""
        print(f"{run} {path.stem}: {metrics} n={score['n']} invalid={score['invalid']}{partial}", flush=True)
    refreshed = []
    for path in sorted({path.parent.parent for path in files}):
        try:
            refreshed += [path.name] if _refresh(path, results) else []
        except (UserError, OSError) as error:
            failed.append(os.path.relpath(path, folder))
            print(f"error: {failed[-1]}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    print(json.dumps({"scored": scored, "failed": failed, "refreshed": refreshed}, ensure_ascii=False))
    one_judge(judged)  # several would stand side by side above
    return 2 if failed else 0


def _refresh(run: Path, results: Path | None) -> bool:
    """Bring a run's result and model cards up to date; return whether a score in them had changed."""
    config = load_run(run) if (run / "config.yaml").is_file() else None
    name = f"{run.name}.json" if config is None else config.result_path.name
    result_path = (results or RESULTS_PATH) / name
    if config is None:
        changed = refresh_result(run, result_path) is not None
    else:
        changed = refresh_run(run, config, result_path)
    if not changed:
        return False
    print(f"refreshed {result_path}", flush=True)
    return True


def _mark_one(score_path: Path, completions: Path) -> None:
    """Mark the score that stays because its completions could not be graded again, if it no longer holds."""
    try:
        score = read_json(score_path, finite=True)
    except UserError:
        return  # there is none, or none that could be read as one
    if isinstance(score, dict) and (reason := stale_reason(score, completions=completions)):
        write_json_atomic(score_path, {**score, "stale": reason})


def _scorer(score: Mapping) -> str:
    """Return the command that makes a score again."""
    if "of_task" in score:
        return "eval.nlu --model RUN scores the run again"
    if score.get("task") == inheritance.NAME:
        return "eval.inheritance --run RUN measures the run again"
    if score.get("task") == likelihood.NAME:
        command = "eval.likelihood" if "prompt_hash" in score else "eval.likelihood_nlu"
        return f"{command} --run RUN --data FILE measures the run again"
    return "eval.score --runs DIR re-scores it"


def mark_stale(folder: Path) -> int:
    """Mark what is stale below `folder`: files scores/<task>.json, and the entries of assembled results.

    Marks that no longer hold are taken off. Prints each stale score, and a last JSON line; returns the exit status.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}; give the folder that holds runs or results")
    checked, stale = 0, []
    for path in sorted(folder.rglob("*.json")):
        is_score = path.parent.name == "scores"
        content = read_json(path, finite=True) if is_score or path.parent.name == "runs" else None
        entries = {"": content} if is_score else content.get("evaluation") if isinstance(content, dict) else None
        changed = False
        for task, entry in entries.items() if isinstance(entries, dict) else ():
            if not isinstance(entry, dict) or "version" not in entry:
                continue
            checked += 1
            completions = path.parent.parent / "completions" / f"{path.stem}.jsonl" if is_score else None
            reason = stale_reason(entry, completions=completions)
            changed = changed or entry.get("stale") != reason
            entry.pop("stale", None)
            if reason is not None:
                entry["stale"] = reason
                stale.append(f"{os.path.relpath(path, folder)}{task and ' ' + task}")
                print(f"stale: {stale[-1]}: {reason}; python -m {_scorer(entry)}")
        if changed:
            write_json_atomic(path, content)
    print(json.dumps({"checked": checked, "stale": stale}, ensure_ascii=False))
    return 0


if __name__ == "__main__":  # the command line is that of eval.score, which imports this module
    import runpy

    runpy.run_module("eval.score", run_name="__main__")
