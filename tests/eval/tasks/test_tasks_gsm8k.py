"""The tasks whose answer is one number, gsm8k and toy: their items, their grades, and the registry."""

import json
import re
import signal
from pathlib import Path

import pytest

from ba_lora.errors import UserError
from ba_lora.prompts import TEMPLATES
from eval.tasks import TASKS, Grade, Item, get_task
from eval.tasks.base import Task, cut_at_stops, load_rows

GOLD_18 = Item(task_id="gsm8k/0", instruction="How much?", gold="18")


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_registry() -> None:
    assert {"toy", "gsm8k", "math"} <= set(TASKS)
    for name in TASKS:
        task = get_task(name)
        assert task.name == name and task.version and task.template in TEMPLATES and task.max_new_tokens > 0
    with pytest.raises(UserError, match=r"unknown task 'gsm9k' \(nearest: gsm8k"):
        get_task("gsm9k")


@pytest.mark.parametrize(
    ("completion", "strict", "flexible", "invalid"),
    [
        # right, in the trained form
        (" She sells 9 eggs.\n9 * 2 = $18\nThe answer is: 18", 1, 1, False),
        (" The answer is: $18.00 per day.", 1, 1, False),
        (" The answer is: 9 * 2 = 18", 1, 1, False),
        (" The answer is: \\boxed{18}", 1, 1, False),
        (" The answer is: 36/2", 1, 1, False),
        # right, in another form
        (" #### 18", 0, 1, False),
        (" so she makes \\$18 every day.", 0, 1, False),
        (" **The answer is $18**", 0, 1, False),
        # wrong
        (" The answer is: 19", 0, 0, False),
        (" The answer is: 1,8", 0, 0, False),
        (" The answer is: 180%", 0, 0, False),
        (" The answer is: 0.18", 0, 0, False),  # no factor 100 is forgiven
        (" The answer is: 1800", 0, 0, False),
        (" The answer is: 18.4", 0, 0, False),  # nor is anything rounded
        (" The answer is: -18", 0, 0, False),
        (" 18 eggs. The answer is: 9", 0, 0, False),
        # running on past its response
        (" The answer is: 18\n\n### Instruction:\nAnother. The answer is: 7", 1, 1, False),
        (" The answer is: 7\n\n### Response: The answer is: 18", 0, 0, False),
        # nothing
        (" I do not know.", 0, 0, True),
        ("", 0, 0, True),
    ],
)
def test_grades(completion: str, strict: int, flexible: int, invalid: bool) -> None:
    grade = get_task("gsm8k").grade(GOLD_18, completion)
    assert grade.metrics == {"strict": strict, "flexible": flexible} and grade.invalid is invalid


def test_items_of_gsm8k(tmp_path: Path) -> None:
    rows = [{"question": "How many?", "answer": "2 * 1000 = <<2*1000=2000>>2000\n#### 2,125"}]
    item = get_task("gsm8k").load(write(tmp_path / "a.jsonl", rows))[0][0]
    assert item == Item(task_id="gsm8k/0", instruction="How many?", gold="2,125")
    assert get_task("gsm8k").grade(item, "The answer is: 2125").metrics["strict"] == 1
    (tmp_path / "a.json").write_text(json.dumps(rows * 2), encoding="utf-8")
    assert [item.task_id for item in get_task("gsm8k").load(str(tmp_path / "a.json"))[0]] == ["gsm8k/0", "gsm8k/1"]
    write(tmp_path / "lines.json", rows * 3)  # one object a line in a file called .json
    assert len(get_task("gsm8k").load(str(tmp_path / "lines.json"))[0]) == 3


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist([{"question": "How many?", "answer": "#### 3"}])
    parquet.write_table(table, tmp_path / "a.parquet")
    items, source = get_task("gsm8k").load(str(tmp_path / "a.parquet"))
    assert items[0].gold == "3" and len(source.sha256) == 64
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="not a readable parquet file"):
        load_rows(str(tmp_path / "b.parquet"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ('{"question": "a", "answer": "#### 1"}\n{"question"', "line 2: not valid JSON"),
        ('{"query": "a", "response": "b"}', "question, answer is missing; found: query, response"),
        ('{"question": "a", "answer": "no mark"}', "row 0: the answer must end with"),
        ('{"question": "a", "answer": "#### many"}', "row 0: the answer must end with"),
        ('{"question": 5, "answer": "#### 1"}', "row 0: column question must be non-empty text, found 5"),
        ("[1]", "a JSON object is needed"),
    ],
)
def test_damaged_data(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        get_task("gsm8k").load(str(tmp_path / "a.jsonl"))[0]


def test_absent_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        get_task("gsm8k").load(str(tmp_path / "absent.jsonl"))[0]
    with pytest.raises(UserError, match="is a folder, a file is needed"):
        get_task("gsm8k").load(str(tmp_path))[0]


def test_hub_out_of_reach_is_one_line() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match="cannot load nobody/nothing from the hub") as caught:
        get_task("gsm8k").load("nobody/nothing")[0]
    assert "\n" not in str(caught.value) and "--data" in str(caught.value)


def test_toy(tmp_path: Path) -> None:
    rows = [
        {"query": "1 + 1?", "response": "The answer is: 2", "family": "sum", "answer": 2},
        {"query": "3 - 1?", "response": "The answer is: 2", "family": "sum", "answer": "2"},
        {"query": "2 * 3?", "response": "The answer is: 6", "family": "product", "answer": "6"},
    ]
    toy = get_task("toy")
    items = toy.load(write(tmp_path / "test.jsonl", rows))[0]
    assert [item.gold for item in items] == ["2", "2", "6"] and toy.max_new_tokens == 128 and toy.template == "alpaca"
    grades = [[toy.grade(item, text)] for item, text in zip(items, ["The answer is: 2", "5", "#### 6"], strict=True)]
    assert toy.aggregate(items, grades) == {
        "metrics": {"strict": 1 / 3, "flexible": 2 / 3},
        "interval_95": {"strict": [0.0, 1.0], "flexible": [0.0, 1.0]},
        "groups": {
            "family": {
                "product": {"n": 1, "metrics": {"strict": 0.0, "flexible": 1.0}},
                "sum": {"n": 2, "metrics": {"strict": 0.5, "flexible": 0.5}},
            }
        },
    }
    rows[1]["answer"] = "two"
    with pytest.raises(UserError, match="row 1: column answer must be a number, found 'two'"):
        toy.load(write(tmp_path / "test.jsonl", rows))[0]


def test_toy_data_of_the_repository(root: Path) -> None:
    if not (root / "data" / "toy" / "test.jsonl").exists():
        pytest.skip("data/toy/test.jsonl is not built")
    for index, item in enumerate(get_task("toy").load()[0]):
        assert item.task_id == f"toy/{index}" and item.meta["family"]


def test_samples_are_averaged_never_the_best() -> None:
    items = [Item(f"t/{index}", "", "1") for index in range(2)]
    right, wrong = Grade({"strict": 1.0}), Grade({"strict": 0.0})
    assert Task().aggregate(items, [[right, wrong, wrong, wrong], [wrong] * 4])["metrics"] == {"strict": 0.125}


def test_a_bad_item_is_counted_and_never_the_end() -> None:
    class Fragile(type(get_task("gsm8k"))):
        def grade(self, item: Item, completion: str) -> Grade:
            if completion == "breaks":
                raise KeyError("no such thing")
            while completion == "hangs":
                re.match(r"(a|a)*b", "a" * 26)  # a pattern that takes exponential time
            return super().grade(item, completion)

    before = signal.getsignal(signal.SIGPROF)
    texts = ["The answer is: 18", "breaks", "hangs", "The answer is: 18"]
    grades = Fragile().grade_all([(GOLD_18, text) for text in texts], timeout_s=0.3)
    assert [grade.metrics["strict"] for grade in grades] == [1, 0, 0, 1]
    assert [grade.timeout for grade in grades] == [False, False, True, False]
    assert [grade.error for grade in grades] == [None, "KeyError: 'no such thing'", None, None]
    assert signal.getsignal(signal.SIGPROF) == before and signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_stops() -> None:
    assert cut_at_stops("a ### Response b ### Instruction c", ("### Instruction", "### Response")) == "a "
    assert cut_at_stops("a", ("b",)) == "a"
