"""Score completions: files in, one JSON object out; no model, no GPU, so a better grader costs nothing to apply.

    python -m eval.score --task gsm8k --completions FILE.jsonl [--data FILE] [--output FILE.json] [key=value …]
    python -m eval.score --runs DIR [--results DIR] [key=value …]
                                                         re-score every run below DIR, and bring the runs' results
                                                         (default: results/runs) up to date
    python -m eval.score --stale DIR                     grade nothing; mark the scores below DIR that an older grader
                                                         or other completions gave: "stale" in the file says why

A completions line needs task_id and completion; `sample` tells several completions of a task apart (default 0) and
`finish_reason` is counted. Beside the completions a `<name>.meta.json` may say what made them; its `data` is the data
file where --data is not given. The last line on stdout is the result (see `score_file`); the grades of each completion
are written beside it, one JSON object a line: task_id, sample, metrics, extracted, gold, invalid, and the item's groups
(its family, its subject) where the task has some.

Keys: allow_partial=true scores what is there although tasks or samples are missing; workers=N and timeout_s=SECONDS
set the processes and the limit per completion of graders that compute. What a reasoning model writes before its answer
is cut off: thinking='<think> </think>' names the marks around it (none: nothing is cut). Tasks have choices of their
own: humaneval and mbpp sandbox=unsafe (run programs without bubblewrap; the result says so), mbpp challenge=true and
setup=false.

MT-Bench is graded by a judge model (see eval/judge/judge.py for JUDGE_MODEL, JUDGE_BASE_URL, JUDGE_API_KEY); what it is
going to cost is printed first, and its judgements are kept in RUN/judgements/mt_bench.jsonl, or <name>.judgements.jsonl
beside the completions. Its keys: judgements=3 (of each answer), judge_parallel=4 (calls at a time),
judge_timeout_s=120, judge_attempts=8 (for one judgement), judge_temperature=0, judge_max_tokens=2048 (none: not sent),
judge_thinking='<think> </think>' (the marks around the judge's own thinking).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ba_lora.errors import CommandParser, UserError, run_entry_point
from eval.rescore import mark_stale, score_runs
from eval.scoring import read_options, score_file
from eval.tasks import TASKS, get_task


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module."""
    parser = CommandParser(
        prog="python -m eval.score", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--task")
    parser.add_argument("--completions", type=Path)
    parser.add_argument(
        "--data", help="a local json/jsonl/parquet file or a hub name; default: the meta file's, then the task's"
    )
    parser.add_argument("--output", type=Path, help="where the score goes; the grades go beside it")
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--results", type=Path, help="with --runs: where the runs' results are; default results/runs")
    parser.add_argument("--stale", type=Path)
    parser.add_argument("options", nargs="*", metavar="key=value")
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.results is not None and parsed.runs is None:
        raise UserError("--results belongs to --runs DIR")
    if parsed.stale is not None:
        if parsed.options or parsed.runs or parsed.task or parsed.completions or parsed.data or parsed.output:
            raise UserError("--stale DIR takes no other argument")
        return mark_stale(parsed.stale)
    tasks = [get_task(parsed.task)] if parsed.task else list(TASKS.values())
    options = read_options(parsed.options, tasks)
    if parsed.runs is not None:
        if parsed.task or parsed.completions or parsed.data or parsed.output:
            raise UserError("--runs takes task, completions and data from each run; leave the other arguments out")
        return score_runs(parsed.runs, options=options, results=parsed.results)
    if not parsed.task or not parsed.completions:
        raise UserError("--task and --completions are needed (or --runs DIR); see python -m eval.score --help")
    score = score_file(
        get_task(parsed.task), parsed.completions, data=parsed.data, output=parsed.output, options=options
    )
    if score["grader_errors"]:
        print(
            f"note: the grader failed on {score['grader_errors']} completions, which count as wrong; "
            'the grades file says why under "error"',
            file=sys.stderr,
        )
    if score["partial"]:
        print(
            f"note: partial: {score['num_missing']} of {score['n'] + score['num_missing']} tasks have no completion; "
            "the metrics are shares of what is there",
            file=sys.stderr,
        )
    print(json.dumps(score, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    run_entry_point(main)
