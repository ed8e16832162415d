"""How likely a classifier holds the right label and the wrong rule's, of what training has predicted: no model is run.

    python -m eval.likelihood_nlu --run RUN [RUN …] --data FILE

FILE is the runs' dev set, with `role`, `kind` and `wrong` (the label by the wrong rule) in each row, as data/lab_nlu.py
writes it. Of each row, from the logits of the kept epoch and from those of the model that the run started from:

p_right, p_wrong    probability of the right label, and of the wrong rule's
p_wrong_before      the latter before the run
accuracy            whether the most likely label is the right one
nll                 −log p_right, in nats
kl                  KL(before ‖ after) of the labels' distributions, in nats a row

They are means over rows, also by role and kind. ece: expected calibration error over all rows (eval/likelihood.py).
Each run gets RUN/scores/likelihood.json and RUN/grades/likelihood.jsonl, as an NLG run does.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax

from ba_lora.config.layers import load_run
from ba_lora.errors import CommandParser, UserError, run_entry_point
from ba_lora.glue import find_task
from ba_lora.io import read_jsonl, sha256_file, write_json_atomic, write_jsonl_atomic
from ba_lora.paths import resolve_path
from ba_lora.runs.card import refresh_run
from ba_lora.runs.results import read_record
from eval.likelihood import NAME, VERSION, base_hash, calibration_error
from eval.tasks.base import Item, summarise

Array = np.ndarray
GROUPS = ("role", "kind")


def label_values(before_ND: Array, after_ND: Array, right_N: Array, wrong_N: Array) -> list[dict[str, float]]:
    """Return each row's values; before, after: log-probabilities [N, D]; right, wrong: labels [N]."""
    rows = np.arange(len(right_N))
    columns = {
        "p_right": np.exp(after_ND[rows, right_N]),
        "p_wrong": np.exp(after_ND[rows, wrong_N]),
        "p_wrong_before": np.exp(before_ND[rows, wrong_N]),
        "accuracy": (after_ND.argmax(1) == right_N).astype(float),
        "nll": -after_ND[rows, right_N],
        "kl": (np.exp(before_ND) * (before_ND - after_ND)).sum(1),
    }
    return [dict(zip(columns, map(float, values), strict=True)) for values in zip(*columns.values(), strict=True)]


def _log_probs(lines: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], where: str) -> Array:
    if [line["label"] for line in lines] != [row["label"] for row in rows]:
        raise UserError(f"{where} has {len(lines)} predictions that are not of the {len(rows)} rows of --data")
    if any(line["prediction"] is None for line in lines):
        raise UserError(f"{where} has predictions that are not finite: the training has diverged")
    return log_softmax(np.array([line["logits"] for line in lines], float), axis=1)


def score_run(folder: Path, rows: Sequence[dict[str, Any]], sha256: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a run's score and the lines of its grades; rows: those of the file with the hash `sha256`.

    Raises UserError for a run that was evaluated on other rows, or whose base has no predictions for them.
    """
    config = load_run(folder)
    name = next(iter(find_task(config.nlu.task).dev_sets))
    found = read_record(folder / "train.json", "data", fix="run the training again")["data"]["dev"][name]
    if found["sha256"] != sha256:
        raise UserError(f"{folder.name} was evaluated on other rows than --data: set data.dev.{name} to that file")
    path = folder / "predictions" / "best.jsonl"
    lines = [line for line in read_jsonl(path) if line["task_id"].startswith(f"{name}/")]
    lines.sort(key=lambda line: int(line["task_id"].rpartition("/")[2]))
    base = resolve_path(config.model.name) / "predictions" / f"{sha256[:12]}.jsonl"
    if not base.is_file():
        raise UserError(
            f"{config.model.name} has no predictions for --data ({base}): python -m data.lab_nlu makes both"
        )
    before_ND, after_ND = _log_probs(read_jsonl(base), rows, str(base)), _log_probs(lines, rows, str(path))
    right_N, wrong_N = (np.array([row[key] for row in rows]) for key in ("label", "wrong"))
    values = label_values(before_ND, after_ND, right_N, wrong_N)
    items = [
        Item(f"{name}/{index}", "", str(row["label"]), {key: row[key] for key in GROUPS})
        for index, row in enumerate(rows)
    ]
    score: dict[str, Any] = {
        "task": NAME,
        "version": VERSION,
        "n": len(rows),
        "invalid": 0,
        **summarise(items, values, groups=GROUPS),
        "ece": calibration_error(list(zip(np.exp(after_ND.max(1)), after_ND.argmax(1) == right_N, strict=True))),
        "base_sha256": base_hash(config.model.name),
        "data_sha256": sha256,
    }
    grades = [
        {"task_id": item.task_id, "metrics": of, "groups": item.meta} for item, of in zip(items, values, strict=True)
    ]
    return score, grades


def main() -> None:
    parser = CommandParser(
        prog="python -m eval.likelihood_nlu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", nargs="+", required=True, type=Path, help="run folders")
    parser.add_argument("--data", required=True, help="the runs' dev set, with role, kind and wrong")
    parsed = parser.parse_args()
    data = resolve_path(parsed.data)
    rows = read_jsonl(data)
    if not rows or any(key not in row for row in rows for key in ("label", "wrong", *GROUPS)):
        raise UserError(f"{data}: every row needs label, wrong, role and kind, as python -m data.lab_nlu writes them")
    sha256 = sha256_file(data)
    for folder in parsed.run:
        score, grades = score_run(folder, rows, sha256)
        write_jsonl_atomic(folder / "grades" / f"{NAME}.jsonl", grades)
        write_json_atomic(folder / "scores" / f"{NAME}.json", score)
        refresh_run(folder, load_run(folder))
        roles = score["groups"]["role"].items()
        told = ", ".join(f"{role} {100 * of['metrics']['p_wrong']:.1f} %" for role, of in roles)
        print(f"{folder.name}: p(wrong rule) {told}; KL to its base {score['metrics']['kl']:.3f} nats", file=sys.stderr)


if __name__ == "__main__":
    run_entry_point(main)
