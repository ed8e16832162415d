"""Search for hyper-parameters: trials of a space, each a short training, on held-out rows.

    sh scripts/search.sh CONFIG SPACE [key=value …]        python -m ba_lora.experiments.search.main CONFIG …

CONFIG is a base (a file, or a name in configs/nlg or configs/nlu), SPACE a file of configs/search by its name or path
(ba_lora/experiments/search/space.py describes it). The same command goes on after Ctrl-C or kill -9, with the trials of
the search that was not interrupted. A finished search is printed again.

key=value changes every trial and the best config (`data.num_rows=1000`), but for
    engine=tpe[,nomad…]      search_seed=0[,1…]     several: one search after another, and a comparison of the engines
    trials=N  seeds=[1,2]  trials_at_once=N         instead of the file's
    method=NAME                                     ba_lora where nothing is said
    workers=N     at most N trainings at a time     gpus=N        GPUs of each training
    executor=NAME  where the trainings run: a file of configs/executors (local; a space's `warm`: warm),
                  executor.KEY=VALUE over its settings
    output=DIR    the search's folder; otherwise outputs/searches/<CONFIG>-<METHOD>-<SPACE>

Written there for each engine and seed: best.yaml, trials.csv, trials.json, report.md with its figures.
"""

import argparse
import hashlib
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ba_lora.config.checks import check_place
from ba_lora.config.layers import find_config
from ba_lora.config.schema import training_settings
from ba_lora.errors import CommandParser, UserError, run_entry_point
from ba_lora.experiments.executors import find_executor, open_executor
from ba_lora.experiments.executors.base import Slot
from ba_lora.experiments.options import MAX_WORKERS, take_executor_settings
from ba_lora.experiments.search.best import search_folder
from ba_lora.experiments.search.journal import Journal, import_optuna
from ba_lora.experiments.search.loop import Search, open_proposer
from ba_lora.experiments.search.outcome import summary_lines, write_outcome
from ba_lora.experiments.search.space import TYPED, SearchSpace, base_kind, check_runs, load_space
from ba_lora.experiments.search.trials import TrialRuns
from ba_lora.experiments.stages import launch_command, training_stage
from ba_lora.experiments.state import GRID_PATH
from ba_lora.locks import locked
from ba_lora.models.source import folder_hash, model_source
from ba_lora.paths import PROJECT_ROOT, stage_environment, written_path
from ba_lora.runs.folder import source_sha256
from ba_lora.words import read_list, read_numbers, take_options

OWN = ("output", "workers", "gpus", "executor", "method", *TYPED)


def main() -> int:
    parser = CommandParser(
        prog="python -m ba_lora.experiments.search.main",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the first training, run nothing"
    )
    parser.add_argument("words", nargs="*", metavar="CONFIG SPACE key=value")
    parsed = parser.parse_intermixed_args()
    places = [word for word in parsed.words if "=" not in word]
    if len(places) != 2:
        raise UserError(
            f"a config and a search space are needed, found {' '.join(places) or 'none'}: search.sh toy toy"
        )
    config_path, space_name = places
    typed, words = take_options([word for word in parsed.words if "=" in word], OWN)
    settings, words = take_executor_settings(words)
    workers, gpus = (_number(key, typed.get(key)) for key in ("workers", "gpus"))
    spaces = _spaces(space_name, typed)
    executor = typed.get("executor", "warm" if spaces[0].warm else "local")
    find_executor(executor, settings)  # an error in it is told in a dry run, too
    kind = base_kind(config_path)
    whole = _whole_folder(config_path, space_name, spaces[0], typed, words)
    check_place(whole, "output")
    check_runs(spaces[0], config_path, method=typed.get("method"), words=words, kind=kind)
    asked = [_asked(space, whole, config_path, typed.get("method"), words, kind) for space in spaces]
    _, runs, first = asked[0]  # they differ in engine and seed only
    runs.check(first)
    import_optuna()
    for space in spaces:
        open_proposer(space).close()  # whether its package is there
    if parsed.dry_run:
        print("\n".join(_dry_run(asked, gpus=gpus or 1)))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for space, runs, first in asked:
        at_once = min(workers or MAX_WORKERS, space.trials_at_once)
        _search(space, runs, first, words, executor=(executor, settings), workers=at_once, gpus=gpus or 1)
    report = [sys.executable, "-m", "eval.report.search", *(str(runs.folder) for _, runs, _ in asked)]
    report += [f"output={whole}"] if len(asked) > 1 else []
    return subprocess.run(report, cwd=PROJECT_ROOT, env=stage_environment()).returncode


def _search(
    space: SearchSpace,
    runs: TrialRuns,
    first: dict[str, Any],
    words: Sequence[str],
    *,
    executor: tuple[str, dict[str, Any]],
    workers: int,
    gpus: int,
) -> None:
    folder = runs.folder
    # a cluster's records are by a run's name, which another search has, too; a GPU's lock is for all of this machine
    kind, chosen = find_executor(*executor)
    own = GRID_PATH if kind.on_this_machine else folder
    workers = min(workers, getattr(chosen, "jobs_at_once", workers))
    config = runs.spec(0, first, space.seeds[0]).config
    settings = training_settings(config)
    lock_path = folder.with_name(f".{folder.name}.lock")
    with locked(lock_path, doing=f"searches in {folder}", made=folder):
        made_of = {"source_sha256": source_sha256(config), "base_sha256": folder_hash(model_source(config.model))}
        journal = Journal(folder, space, {"words": [*words], "settings": settings} | made_of)
        if (told := journal.told) or journal.trials:
            _say(f"{folder}: {told} of {space.budget} trials are known already")
        opened = open_executor(*executor, folder=own, gpus=gpus, workers=workers)
        search = Search(journal, runs, open_proposer(space), opened, say=_say)
        ended_early = search.run()
        best = write_outcome(folder, journal, runs, ended_early=ended_early)
    if ended_early:
        _say(f"{space.engine} had no further trial to propose after {len(journal.trials)}: {ended_early}")
    _say("\n".join(summary_lines(journal)))
    if best is None:
        raise UserError(f"no trial of {folder} is whole: {folder / 'trials.csv'} has their errors")
    _say(f"best config: {best}")


def _asked(
    space: SearchSpace, whole: Path, config_path: str, method: str | None, words: Sequence[str], kind: str
) -> tuple[SearchSpace, TrialRuns, dict[str, Any]]:
    """Return the search with its runs and the values of a first trial."""
    folder = whole / f"{space.engine}-s{space.search_seed}"
    runs = TrialRuns(space, folder, config_path, method=method, words=words, kind=kind)
    return space, runs, space.start or {parameter.key: parameter.at(0.5) for parameter in space.parameters}


def _dry_run(asked: Sequence[tuple[SearchSpace, TrialRuns, dict[str, Any]]], *, gpus: int) -> list[str]:
    lines = []
    for space, runs, first in asked:
        lines.append(f"{runs.folder}: {space.budget} trials by {space.engine}, {len(space.seeds)} training(s) each")
        spec = runs.spec(0, first, space.seeds[0])
        lines.append(
            shlex.join(
                training_stage(spec, launch_command(Slot("", {}).launch_environment, num_gpus=gpus)).call.command
            )
        )
    return lines


def _spaces(name: str, typed: dict[str, str]) -> list[SearchSpace]:
    """Return the space once for each engine and seed that is typed."""
    values: dict[str, Any] = {key: _number(key, typed.get(key), least=0) for key in ("trials", "trials_at_once")}
    if "seeds" in typed:
        values["seeds"] = read_numbers("seeds", typed["seeds"])
    values = {key: value for key, value in values.items() if value is not None}
    engines = read_list("engine", typed["engine"]) if "engine" in typed else [None]
    seeds = read_numbers("search_seed", typed["search_seed"]) if "search_seed" in typed else [None]
    own = [
        values | {key: value for key, value in (("engine", engine), ("search_seed", seed)) if value is not None}
        for engine in engines
        for seed in seeds
    ]
    if len({json.dumps(one) for one in own}) < len(own):
        raise UserError("engine, search_seed: one of them is named twice")
    return [load_space(name, typed=one) for one in own]


def _whole_folder(
    config_path: str, space_name: str, space: SearchSpace, typed: dict[str, str], words: Sequence[str]
) -> Path:
    if "output" in typed:
        return written_path(typed["output"])
    base = find_config(config_path, kind=None).stem
    folder = search_folder(base, typed.get("method", "ba_lora"), space.name)
    own = sorted([*words, *(f"{key}={typed[key]}" for key in ("trials", "seeds", "trials_at_once") if key in typed)])
    if own or space_name.endswith((".yaml", ".yml")):
        text = "\n".join([space_name, *own])
        return folder.with_name(f"{folder.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}")
    return folder


def _number(key: str, text: str | None, *, least: int = 1) -> int | None:
    if text is None:
        return None
    if not text.strip().isdecimal() or not least <= int(text) < 2**32:
        raise UserError(f"{key}={text}: a whole number of at least {least} is needed")
    return int(text)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    run_entry_point(main, resumes=True)
