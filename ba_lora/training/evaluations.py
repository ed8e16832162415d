"""What an evaluation inside a training has given, for whoever watches the run: a line each, and a request to stop.

    <run>/evaluations.jsonl    {"step", "max_steps", "eval_task", …}, written as soon as it is known
    <run>/stop                 a file that somebody else makes: the training ends at its next step, as cancelled

A hyper-parameter search (ba_lora/experiments/search) reads the one and writes the other; any launcher and any machine
that shares the folder will do.
"""

from pathlib import Path
from typing import Any

from ba_lora.io import read_whole_lines

EVALUATIONS, STOP = "evaluations.jsonl", "stop"


def read_evaluations(run_path: Path) -> list[dict[str, Any]]:
    """Return the evaluations of a run so far, in the order of their steps. A resumed training repeats some: the last
    one of a step counts. A line that is not whole is left out."""
    lines = read_whole_lines(run_path / EVALUATIONS)
    return [entry for _, entry in sorted({line["step"]: line for line in lines}.items())]
