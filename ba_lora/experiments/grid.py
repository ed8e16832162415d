"""Fill a table: from its config to missing runs to train → export → generate → score, then its report.

    sh scripts/reproduce.sh TABLE [--dry-run] [key=value …]          python -m ba_lora.experiments.grid TABLE …

Each stage is a command of ba_lora/experiments/stages.py in a process of its own. What is done and still holds is
skipped; what is stale (its config, its data or its grader changed) is named and redone; what failed is shown with its
error and redone with retry=true. Runs that share base and evaluation are generated for together, with one start of the
engine.

The same command may be given twice, at once or after Ctrl-C or kill -9: a run is worked on under its lock, and its
state is read from its files after the lock is taken (locks.py, state.py).

key=value changes every run (`data.num_rows=1000`), but for
    executor=NAME      where the stages run: a file of configs/executors (local), executor.KEY=VALUE over its settings
    retry=true         redo what failed                 workers=N     at most N runs at a time
    seeds=[1,2]        instead of the table's seeds     gpus=N        rows set for N GPUs a run (default: the fewest)
    only=WORD[,WORD]   the rows of these bases, methods, settings: only=llama-2-7b,lora,pissa
    output=DIR, allow=NAME, page=no    for the report; see eval/report/__main__.py
    cancel=true        Ctrl-C also ends the jobs that a cluster has (default: they go on, and are found again)
"""

import argparse
import os
import signal
import subprocess
import sys

from ba_lora.config.checks import check_places
from ba_lora.errors import CommandParser, UserError, run_entry_point
from ba_lora.experiments.executors import find_executor, open_executor
from ba_lora.experiments.grid_runs import Grid
from ba_lora.experiments.options import read_grid_options, rows_for_gpus, select_rows, without_unchosen
from ba_lora.experiments.pipeline import missing_judge
from ba_lora.experiments.plan import ask_evaluators, dry_run, plan_runs
from ba_lora.experiments.preparation import GRID_MODULE, prepare, prepare_words
from ba_lora.experiments.state import GRID_PATH, declaration_path, declare
from ba_lora.experiments.tables import available_tables, find_table, load_table, report_folder
from ba_lora.paths import PROJECT_ROOT, stage_environment


def main() -> int:
    parser = CommandParser(
        prog=f"python -m {GRID_MODULE}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", nargs="?", help="a file in configs/tables, by its name or path")
    parser.add_argument("--dry-run", action="store_true", help="print runs, their state, time and disk; run nothing")
    parser.add_argument("words", nargs="*", metavar="key=value")
    parsed = parser.parse_intermixed_args()
    if parsed.table is None:
        raise UserError(f"which table? {', '.join(available_tables())}")
    options, overrides = read_grid_options(parsed.words)
    find_executor(options.executor, options.executor_settings)  # an error in it is told in a dry run, too
    whole = load_table(find_table(parsed.table), overrides=overrides, seeds=options.seeds)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    calls = [prepare_words(call, options) for call in whole.prepare]
    for words in calls if not parsed.dry_run else ():
        prepare(words)
    if whole.prepare and not parsed.dry_run:  # what was chosen then is known now
        whole = load_table(find_table(parsed.table), overrides=overrides, seeds=options.seeds)
    unchosen: list[str] = []
    if not parsed.dry_run:
        whole, unchosen = without_unchosen(whole)
    table = select_rows(whole, options.only)
    table, gpus, left_out = rows_for_gpus(table, options.gpus)
    for spec in table.specs():
        check_places(spec.config)
    checks = ask_evaluators(table, prepared=not (parsed.dry_run and calls))
    planned = plan_runs(table, checks)
    if parsed.dry_run:
        first = [f"first: python -m {' '.join(words)}" for words in calls]
        first += [f"first: {command}" for command in dict.fromkeys(whole.unchosen.values()) if not calls]
        first += ["the runs below are not yet those of the table"] if whole.unchosen else []
        print("\n".join([*first, *dry_run(table, planned, retry=options.retry), *left_out]))
        return 0
    executor = open_executor(
        options.executor, options.executor_settings, folder=GRID_PATH, gpus=gpus, workers=options.workers
    )
    for entry in planned:
        if entry.changed:
            _say(f"stale: {entry.changed}; {entry.name} takes its place")
    if missing := missing_judge((spec.config for spec in table.specs()), os.environ):
        _say(missing)
    for line in [*unchosen, *left_out]:
        _say(line)
    refused = {entry.spec.config.run_path: entry.refused for entry in planned if entry.refused}
    for error in dict.fromkeys(refused.values()):
        number = list(refused.values()).count(error)
        _say(f"failed: {number} runs cannot be evaluated and are not trained: {error}")
    grid = Grid(
        table, executor, graders=checks.graders, refused=refused, retry=options.retry, cancel=options.cancel, say=_say
    )
    seeds = [f"seeds={','.join(map(str, options.seeds))}"] if options.seeds else []
    folder = report_folder(table.id, [*overrides, *seeds])
    declare(whole, find_table(parsed.table), declaration_path(folder, options.output))
    _say(f"{table.id}: {len(table.specs())} runs on {', '.join(executor.places)}")
    grid.run()
    _say(grid.progress())
    for path, error in grid.failed.items():
        _say(f"failed: {path.name}: {error}")
    report = [sys.executable, "-m", "eval.report", parsed.table, *seeds, *options.report, *overrides]
    status = subprocess.run(report, cwd=PROJECT_ROOT, env=stage_environment()).returncode
    return 1 if grid.failed else status


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    run_entry_point(main, resumes=True)
