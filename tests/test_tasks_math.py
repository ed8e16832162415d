"""MATH: items, the two metrics, and algebraic equality within a time limit that holds."""

import json
import sys
import time
from pathlib import Path

import pytest

from ba_lora.errors import UserError
from eval import equality
from eval.equality import DIFFERENT, EQUAL, TIMEOUT, EqualityError, compare
from eval.tasks import Item, get_task
from eval.tasks.hendrycks_math import decide_by_strings

CASES = [
    # gold, completion, strict, flexible
    ("\\frac{1}{2}", "The answer is: \\dfrac12.", 1, 1),
    ("\\frac{1}{2}", "The answer is: $\\boxed{0.5}$", 1, 1),
    ("\\frac{1}{4}", "The answer is: 0.25", 0, 1),  # the string rule knows only 0.5
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "so \\[\\boxed{(3, \\pi/2)}\\]", 0, 1),
    ("x^2+2x+1", "The answer is: $(x+1)^2$", 0, 1),
    ("1,-2", "The answer is: $-2, 1$.", 0, 1),
    ("3\\sqrt{13}", "The answer is: $\\sqrt{117}$", 0, 1),
    ("10,\\!080", "The answer is: 10,080 ways.\n", 0, 1),
    ("90^\\circ", "The answer is: $90$ degrees.", 1, 1),
    ("\\text{Evelyn}", "The answer is: Evelyn.", 1, 1),
    ("\\text{(C)}", "The answer is: (C)", 1, 1),
    ("(-\\infty, 2) \\cup (3, \\infty)", "The answer is: $(-\\infty,2)\\cup(3,\\infty)$", 1, 1),
    ("5", "The answer is: 5\n\n### Instruction:\nThe answer is: 6", 1, 1),
    # wrong
    ("\\frac{1}{2}", "The answer is: \\frac{1}{3}", 0, 0),
    ("50\\%", "The answer is: 0.5", 0, 0),
    ("(3,4]", "The answer is: $(3,4)$", 0, 0),
    ("x^2+2x+1", "The answer is: $(x-1)^2$", 0, 0),
    ("\\text{east}", "The answer is: west", 0, 0),
    ("2k+2", "The answer is: $2k + 2.1$", 0, 0),
    ("5", "The answer is: \\frac{", 0, 0),
    ("5", "The answer is: " + "(" * 5000, 0, 0),
    ("5", "", 0, 0),
]


def test_grades() -> None:
    pairs = [(Item(f"math/{index}", "", gold), text) for index, (gold, text, _, _) in enumerate(CASES)]
    grades = get_task("math").grade_all(pairs, workers=1)
    found = [(gold, text, *grade.metrics.values()) for (gold, text, _, _), grade in zip(CASES, grades, strict=True)]
    assert found == [tuple(case) for case in CASES]
    assert [grade.invalid for grade in grades] == [not text for _, text, _, _ in CASES]


def test_one_grade() -> None:
    assert get_task("math").grade(Item("math/0", "", "5"), "\\boxed{5}").metrics == {"strict": 0.0, "flexible": 1.0}


def test_strings_decide_first() -> None:
    assert decide_by_strings("5", None) == 0.0
    assert decide_by_strings("\\frac43", "\\frac{4}{3}") == 1.0
    assert decide_by_strings("\\frac{57}{160}", ".35625") == 1.0
    assert decide_by_strings("5", "6") == 0.0
    assert decide_by_strings("x+1", "1+x") is None


def test_pathological_items_do_not_stall() -> None:
    towers = [("5", "9^{9^{9^{9}}}"), ("7", "10^{10^{10}}")]  # in one long C call: no Python signal gets through
    pairs = [("x+1", "1+x"), *towers, ("\\sqrt{8}", "2\\sqrt{2}"), ("x", "y+1")]
    done = []
    start = time.monotonic()
    verdicts = compare(pairs, workers=1, timeout_s=3.0, progress=done.append)
    assert verdicts == [EQUAL, TIMEOUT, TIMEOUT, EQUAL, DIFFERENT] and sum(done) == 5
    assert time.monotonic() - start < 45


def test_a_timeout_is_wrong_and_counted() -> None:
    pairs = [(Item("math/0", "", "5"), "The answer is: $9^{9^{9^{9}}}$")]
    (grade,) = get_task("math").grade_all(pairs, timeout_s=0.5)
    assert grade.timeout and grade.metrics == {"strict": 0.0, "flexible": 0.0} and not grade.invalid


def test_no_pairs_no_workers() -> None:
    assert compare([]) == []


def test_workers_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EqualityError, match="math-verify"):
        compare([("1", "2")])
    with pytest.raises(UserError, match="requirements"):
        get_task("math").grade(Item("math/0", "", "x"), "\\boxed{y+1}")


def test_numeric_shortcut_agrees_with_algebra() -> None:
    sympy = pytest.importorskip("sympy")
    x, y = sympy.symbols("x y")
    different = equality._clearly_different
    assert different([x + 1], [x + 2]) and different([sympy.Integer(2)], [sympy.sqrt(2) * 3])
    assert not different([(x + 1) ** 2], [x**2 + 2 * x + 1])
    assert not different([sympy.Rational(1, 3)], [sympy.Float("0.333333")])
    assert not different([x], [y + 1])  # a lone symbol may be a word
    assert not different([], [x]) and not different([sympy.FiniteSet(1)], [sympy.FiniteSet(2)])


def test_items(tmp_path: Path) -> None:
    path = tmp_path / "math.jsonl"
    rows = [
        {"problem": "P", "solution": "S \\boxed{\\frac{1}{2}}", "answer": "0.5", "subject": "Algebra", "level": 2},
        {"problem": "P", "solution": "S \\boxed{\\frac{1}{2}}", "type": "Geometry", "level": "Level 5"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    first, second = get_task("math").load_items(str(path))
    assert (first.task_id, first.gold, first.meta) == ("math/0", "0.5", {"subject": "Algebra", "level": "2"})
    assert (second.gold, second.meta) == ("\\frac{1}{2}", {"subject": "Geometry", "level": "5"})
    path.write_text('{"problem": "P", "solution": "no box"}', encoding="utf-8")
    with pytest.raises(UserError, match="row 0: no answer column and no"):
        get_task("math").load_items(str(path))
    path.write_text('{"question": "P", "answer": "#### 1"}', encoding="utf-8")
    with pytest.raises(UserError, match="problem, solution is missing; found: question, answer"):
        get_task("math").load_items(str(path))


def test_hub_configurations() -> None:
    task = get_task("math")
    assert len(task.hub_configs("EleutherAI/hendrycks_math")) == 7
    assert task.hub_configs("HuggingFaceH4/MATH-500") == (None,)
