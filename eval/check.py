"""Check evaluations before the trainings that they are for: no model is loaded, nothing is downloaded or written.

    python -m eval.check [--graders] < COMMANDS.json

reads a JSON list of commands of eval.generate, eval.harness and eval.nlu, each a list of words from the module's name
on (or eval.metric_paths, a table's kind, a task and a metric of its score), and prints a JSON object. Its `errors` are,
for each command, the error, one line, that it would end with, or null. That covers its options, its engine and the
local data files; what only the hub or the model tells shows later. With --graders, `graders` has the graders as they
are now: task → version and pinned hub data.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from ba_lora.errors import CommandParser, UserError, run_entry_point


def find_error(module: str, arguments: Sequence[str]) -> str | None:
    """Return the error that the command would end with, None where none is found."""
    try:
        importlib.import_module(module).check(arguments)
    except UserError as error:
        return " ".join(str(error).split())
    return None


def main() -> int:
    """The command line; see the module."""
    parser = CommandParser(
        prog="python -m eval.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--graders", action="store_true")
    asked = parser.parse_args()
    answers: dict[str, Any] = {"errors": [find_error(module, words) for module, *words in json.load(sys.stdin)]}
    if asked.graders:
        from eval.scoring import grader_versions

        answers["graders"] = grader_versions()
    print(json.dumps(answers))
    return 0


if __name__ == "__main__":
    run_entry_point(main)
