"""HumanEval and MBPP whole: the published references pass, and a full evaluation is graded in a minute."""

import json
import os
import time
from pathlib import Path

import pytest

from eval.scoring import ScoreOptions, score_file
from eval.tasks import get_task
from tests.support.boxes import needs_bubblewrap

pytestmark = [
    pytest.mark.real,
    needs_bubblewrap,
]


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def references(data: Path, folder: Path, **options: object) -> dict:
    """Score the data's own reference programs, all that it holds."""
    task = get_task("mbpp")
    rows = [{"task_id": item.task_id, "completion": item.gold} for item in task.load(str(data))[0]]
    path = write(folder / "mbpp.jsonl", rows)
    return score_file(task, path, data=str(data), options=ScoreOptions(**options))


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_mbpp_test_references_pass(real_data: Path, tmp_path: Path, step: int) -> None:
    task = get_task("mbpp")
    items = task.select(task.load(str(real_data / "mbpp" / "mbpp.jsonl"))[0])
    assert [items[0].task_id, items[-1].task_id, len(items)] == ["mbpp/11", "mbpp/510", 500]
    rows = [{"task_id": item.task_id, "completion": item.gold} for item in items[::step]]
    path, options = write(tmp_path / "c.jsonl", rows), ScoreOptions(allow_partial=step > 1)
    score = score_file(task, path, data=str(real_data / "mbpp" / "mbpp.jsonl"), options=options)
    assert score["metrics"] == {"strict": 1.0, "pass@1": 1.0}
    assert (score["n"], score["num_missing"]) == (500 // step, 500 - 500 // step)


@pytest.mark.slow
def test_all_references_pass_challenges_included(real_data: Path, tmp_path: Path) -> None:
    score = references(real_data / "mbpp" / "mbpp.jsonl", tmp_path, choices={"challenge": "true"})
    assert score["n"] == 974 and score["metrics"] == {"strict": 1.0, "pass@1": 1.0}
    score = references(real_data / "mbpp" / "sanitized.jsonl", tmp_path)
    assert score["n"] == 427 and score["metrics"] == {"strict": 1.0, "pass@1": 1.0}


@pytest.mark.slow
def test_without_setup_code_two_references_fail(real_data: Path, tmp_path: Path) -> None:
    """367 and 927 test a tree that test_setup_code builds from the reference's own class."""
    references(real_data / "mbpp" / "mbpp.jsonl", tmp_path, choices={"setup": "false"})
    grades = [json.loads(line) for line in (tmp_path / "mbpp.grades.jsonl").read_text().splitlines()]
    failed = {grade["task_id"]: grade["extracted"]["outcome"] for grade in grades if not grade["metrics"]["pass@1"]}
    assert set(failed) == {"mbpp/367", "mbpp/927"}
    assert all("NameError: name 'root' is not defined" in outcome for outcome in failed.values())


@pytest.mark.slow
def test_a_whole_humaneval_is_graded_in_a_minute(tmp_path: Path) -> None:
    """164 problems × 5 different correct samples: 820 programs, at most 60 s on 2 free cores."""
    task = get_task("humaneval")
    rows = [
        {"task_id": item.task_id, "sample": sample, "completion": f"    # sample {sample}\n{item.gold}"}
        for item in task.load()[0]
        for sample in range(5)
    ]
    path = write(tmp_path / "humaneval.jsonl", rows)
    busy = os.getloadavg()[0]
    started = time.monotonic()
    score = score_file(task, path, options=ScoreOptions(workers=2))
    elapsed = time.monotonic() - started
    assert score["metrics"] == {"strict": 1.0, "pass@1": 1.0, "pass@5": 1.0}
    assert elapsed < 60 * max(1.0, busy / 2), f"{elapsed:.0f} s at load {busy:.1f}"
    print(f"{len(rows)} programs in {elapsed:.1f} s at load {busy:.1f}")
