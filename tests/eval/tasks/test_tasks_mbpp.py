"""MBPP: its two forms are recognised, the prompt shows the asserts, programs are graded as the data means it."""

import json
from pathlib import Path

import pytest

from ba_lora.errors import UserError
from ba_lora.prompts import build_prompt
from eval.scoring import ScoreOptions, score_file
from eval.tasks import get_task
from tests.support.boxes import needs_bubblewrap

TASK = get_task("mbpp")


def row(number: int, **more: object) -> dict:
    base = {
        "task_id": number,
        "text": "Write a function to add one.",
        "code": "def add_one(x):\r\n\treturn x + 1",
        "test_list": ["assert add_one(1) == 2", "assert add_one(2) == 3", "assert add_one(-1) == 0"],
        "test_setup_code": "",
        "challenge_test_list": [],
    }
    return base | more


NODE = row(
    12,
    code="class Node:\n    def __init__(self, value):\n        self.value = value\ndef depth(n):\n    return n.value",
    test_list=["assert depth(root) == 3"],
    test_setup_code="root = Node(3)",
    challenge_test_list=["assert depth(Node(4)) == 5"],
)
SUM = row(13, code="def sum(a, b):\n    return a + b", test_list=["assert sum(1, 2) == 3"])
SANITIZED = {
    "source_file": "x", "task_id": 17, "prompt": "Write a function to halve.", "code": "def half(x): return x / 2",
    "test_imports": ["import math"], "test_list": ["assert math.isclose(half(3), 1.5)"] * 4,
}  # fmt: skip


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_items_and_prompt(tmp_path: Path) -> None:
    items = TASK.load(write(tmp_path / "mbpp.jsonl", [row(10), row(11), NODE, SUM, row(511)]))[0]
    assert [item.task_id for item in items] == ["mbpp/10", "mbpp/11", "mbpp/12", "mbpp/13", "mbpp/511"]
    assert build_prompt(items[1].instruction, template=TASK.template) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nWrite a function to add one.\nYour code should satisfy these tests:\n"
        "assert add_one(1) == 2\nassert add_one(2) == 3\nassert add_one(-1) == 0\n\n### Response:"
    )
    assert (items[2].meta["wanted"], items[2].meta["helpers"]) == (("depth",), ("Node",))
    assert (TASK.temperature(items[0]), TASK.num_samples) == (0.0, 1)


def test_the_sanitized_set_is_recognised_by_its_columns(tmp_path: Path) -> None:
    (item,) = TASK.load(write(tmp_path / "s.jsonl", [SANITIZED]))[0]
    assert item.task_id == "mbpp/17" and item.instruction.startswith("Write a function to halve.\nYour code should")
    assert item.meta["tests"].startswith("import math\nassert") and item.instruction.count("assert") == 4


def test_which_items_are_scored(tmp_path: Path) -> None:
    items = TASK.load(write(tmp_path / "mbpp.jsonl", [row(10), row(11), row(510), row(511)]))[0]

    def ids(task, task_ids=None) -> list[str]:  # noqa: ANN001
        return [item.task_id for item in task.select(items, task_ids)]

    assert ids(TASK) == ids(TASK, ["mbpp/11", "mbpp/999"]) == ["mbpp/11", "mbpp/510"]
    assert len(ids(TASK, ["mbpp/10", "mbpp/11"])) == len(ids(TASK.configured({"subset": "all"}))) == 4
    assert TASK.select(items[:1]) == items[:1]  # a file without test ids


def test_the_hub_s_two_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_rows(name, *, split, configs):  # noqa: ANN001, ANN202
        from ba_lora.rows import Source

        asked.append((name, split, configs(name)))
        return [SANITIZED if configs(name) == ("sanitized",) else row(11)], Source(name=name)

    monkeypatch.setattr("eval.tasks.mbpp.load_rows", load_rows)
    hub = "google-research-datasets/mbpp"
    assert TASK.load()[1].name == f"{hub}@{TASK.hub_revision}"
    assert TASK.load(f"{hub}:sanitized")[1].name == f"{hub}:sanitized"
    assert asked == [(f"{hub}@{TASK.hub_revision}", "test", ("full",)), (hub, "test", ("sanitized",))]


@needs_bubblewrap
def test_grades(tmp_path: Path) -> None:
    items = TASK.load(write(tmp_path / "mbpp.jsonl", [row(11), NODE, SUM, SANITIZED]))[0]
    assert [set(grade.metrics.values()) for grade in TASK.grade_all([(i, i.gold) for i in items])] == [{1.0}] * 4
    texts = {
        " Here you go:\n```python\ndef add_one(x):\n    return x + 1\n```\nDone.": (0, 1),
        "def add_one(x):\n    return x + 2": (0, 0),
        "def add_1(x):\n    return x + 1": (0, 0),
        "def add_one(x):\n    return x + 1\nprint(add_one(input()))": (0, 1),
        "add_one = lambda x: x + 1": (1, 1),
        "def add_one(x: int):\r\n    return math.floor(x) + 1\r\n\r\nassert add_one(1) == 7": (0, 1),
        "import os\nos._exit(0)": (0, 0),
        "I do not know.": (0, 0),
    }
    grades = TASK.grade_all([(items[0], text) for text in texts])
    assert [(g.metrics["strict"], g.metrics["pass@1"]) for g in grades] == list(texts.values())
    assert [grade.invalid for grade in grades] == [False] * 6 + [True, True]
    assert TASK.grade(items[2], "def sum(a, b):\n    return b + a").metrics["pass@1"] == 1


@needs_bubblewrap
def test_setup_and_challenge(tmp_path: Path) -> None:
    (item,) = TASK.load(write(tmp_path / "mbpp.jsonl", [NODE]))[0]
    cases = {("true", "false"): 1, ("false", "false"): 0, ("true", "true"): 0}
    for (setup, challenge), passed in cases.items():
        task = TASK.configured({"setup": setup, "challenge": challenge})
        assert task.grade(item, item.gold).metrics == {"strict": passed, "pass@1": passed}
        told = task.conditions(timeout_s=5)["choices"]
        assert told == {"subset": None, "setup": setup, "challenge": challenge}


@needs_bubblewrap
def test_eval_score(tmp_path: Path) -> None:
    data = write(tmp_path / "mbpp.jsonl", [row(10), row(11), row(12)])
    rows = [{"task_id": f"mbpp/{n}", "completion": row(n)["code"]} for n in (11, 12)]
    write(tmp_path / "c.jsonl", rows)
    score = score_file(TASK, tmp_path / "c.jsonl", data=data)
    assert (score["n"], score["num_missing"], score["metrics"]) == (2, 0, {"strict": 1.0, "pass@1": 1.0})
    write(tmp_path / "c.jsonl", rows[:1])
    with pytest.raises(UserError, match="1 of 2 tasks have no completion, the first mbpp/12"):
        score_file(TASK, tmp_path / "c.jsonl", data=data)
    assert score_file(TASK, tmp_path / "c.jsonl", data=data, options=ScoreOptions(allow_partial=True))["partial"]
    write(tmp_path / "c.jsonl", [*rows, {"task_id": "mbpp/4000", "completion": ""}])
    with pytest.raises(UserError, match="task_id that the data does not have, the first 'mbpp/4000'"):
        score_file(TASK, tmp_path / "c.jsonl", data=data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task_id": "11"}, "task_id must be a whole number of its own, found '11'"),
        ({"test_list": []}, "test_list is empty"),
        ({"test_list": "assert"}, "test_list must be a list of texts"),
        ({"test_setup_code": 3}, "test_setup_code must be text"),
        ({"text": None}, "column text must be non-empty text"),
    ],
)
def test_damaged_data(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        TASK.load(write(tmp_path / "mbpp.jsonl", [row(11) | change]))[0]
    assert message in str(caught.value) and "row 0" in str(caught.value)
    with pytest.raises(UserError, match="row 1: task_id must be a whole number of its own, found 11"):
        TASK.load(write(tmp_path / "mbpp.jsonl", [row(11), row(11)]))[0]
    with pytest.raises(UserError, match="needs the columns text, but text is missing"):
        TASK.load(write(tmp_path / "mbpp.jsonl", [{k: v for k, v in row(11).items() if k != "text"}]))[0]
