"""Held-out training rows: which are taken, what their gold answer is, how they are graded."""

import json

import pytest

from ba_lora.errors import UserError
from eval.tasks import get_task
from eval.tasks.heldout import FIRST_ROW, NUM_ROWS

ROWS = [
    {"query": "What is 2 + 3?", "response": "2 + 3 = 5.\nThe answer is: 5"},
    {"query": "Explain it.", "response": "There is nothing to say."},  # states no answer: no item
    {"query": "Half of one?", "response": "It is a half.\nThe answer is: \\frac{1}{2}"},
]


def test_rows_of_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = get_task("heldout")
    items = task.load(str(path))[0]
    assert [(item.task_id, item.gold) for item in items] == [("heldout/0", "5"), ("heldout/2", "\\frac{1}{2}")]
    right, wrong = task.grade_all([(items[1], "The answer is: \\dfrac12"), (items[0], "The answer is: 6")])
    assert right.metrics["strict"] == 1.0 and wrong.metrics["strict"] == 0.0
    path.write_text(json.dumps({"query": "No response?"}) + "\n")
    with pytest.raises(UserError, match="response"):
        task.load(str(path))[0]


@pytest.mark.parametrize("commit", [f"@{get_task('heldout').hub_revision}", ""])
def test_of_the_published_set_only_rows_that_no_run_trains_on(commit):
    task = get_task("heldout")
    rows = [{"query": f"q{index}", "response": "The answer is: 1"} for index in range(FIRST_ROW + 2 * NUM_ROWS)]
    items = task.items_from_rows(rows, source=f"{task.hub}{commit}")
    assert len(items) == NUM_ROWS and items[0].task_id == f"heldout/{FIRST_ROW}" and items[0].instruction == "q100000"
