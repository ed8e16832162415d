"""MATH: its items and the two metrics."""

import json
from pathlib import Path

import pytest

from ba_lora.errors import UserError
from eval.tasks import Item, get_task

CASES = [
    # gold, completion, strict, flexible
    ("\\frac{1}{2}", "The answer is: \\dfrac12.", 1, 1),
    ("\\frac{1}{2}", "The answer is: $\\boxed{0.5}$", 1, 1),
    ("\\frac{1}{4}", "The answer is: 0.25", 0, 1),  # the string rule knows only 0.5
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "so \\[\\boxed{(3, \\pi/2)}\\]", 0, 1),
    ("x^2+2x+1", "The answer is: $(x+1)^2$", 0, 1),
    ("1,-2", "The answer is: $-2, 1$.", 0, 1),
    ("3\\sqrt{13}", "The answer is: $\\sqrt{117}$", 0, 1),
    ("10,\\!080", "The answer is: 10,080 ways.\n", 1, 1),
    ("90^\\circ", "The answer is: $90$ degrees.", 1, 1),
    ("\\text{Evelyn}", "The answer is: Evelyn.", 1, 1),
    ("\\text{(C)}", "The answer is: (C)", 1, 1),
    ("(-\\infty, 2) \\cup (3, \\infty)", "The answer is: $(-\\infty,2)\\cup(3,\\infty)$", 1, 1),
    ("5", "The answer is: 5\n\n### Instruction:\nThe answer is: 6", 1, 1),
    ("60", "The answer is: 60 = 100 - 40", 0, 1),
    ("24", "The answer is: 24 (n=2)", 0, 1),
    ("18", "The answer is: **18**", 1, 1),
    ("18", "**The answer is: $18$**", 1, 1),
    ("18", "The answer is: 18 - that is all", 0, 1),
    ("10", "The answer is: 10 = ten", 0, 1),
    ("8", "The answer is: $5 + $3 = $8", 0, 1),
    ("\\text{Yes}", "The answer is: yes.", 0, 1),
    ("\\text{Yes}", "The answer is: **Yes**.", 1, 1),
    ("13 \\text{ square units}", "The answer is: 13 \\text{ square units}", 1, 1),
    ("13 \\text{ square units}", "The answer is: 13 \\mbox{ square units}, which is all", 0, 1),
    ("\\text{no real solutions}", "The answer is: \\text{no real solutions}", 1, 1),
    ("120^\\circ", "The answer is: $\\angle A = 120^\\circ$.", 1, 1),
    ("(3,4)", "The answer is: $(x, y) = (3, 4)$", 1, 1),
    # wrong
    ("\\sin 30", "The answer is: $\\sin 30^\\circ$", 0, 0),
    ("ab", "The answer is: $|ab|$", 0, 0),
    ("2rs", "The answer is: 2", 0, 0),
    ("(y,x)=(3,4)", "The answer is: $(x, y) = (3, 4)$", 0, 0),
    ("9\\pi", "The answer is: 9", 0, 0),
    ("\\begin{pmatrix} 6 \\\\ 7 \\end{pmatrix}", "The answer is: \\begin{pmatrix}7\\\\6\\end{pmatrix}", 0, 0),
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


def test_a_displayed_answer_is_strict_too() -> None:
    task = get_task("math")
    for text in ("$$\n18\n$$", "```\n18\n```", "\\[\n18.\n\\]", "\\begin{equation*}\n18\n\\end{equation*}", "\n- 18"):
        grade = task.grade(Item("math/0", "", "18"), f"So.\nThe answer is:\n{text}\nDone.")
        assert grade.metrics == {"strict": 1.0, "flexible": 1.0}, text


def test_power_towers_cost_nothing() -> None:
    pairs = [(Item("math/0", "", "5"), f"The answer is: ${tower}$") for tower in ("9^{9^{9^{9}}}", "10^{10^{10}}")]
    assert [grade.metrics["flexible"] for grade in get_task("math").grade_all(pairs, timeout_s=1.0)] == [0.0, 0.0]


def test_items(tmp_path: Path) -> None:
    path = tmp_path / "math.jsonl"
    rows = [
        {"problem": "P", "solution": "S \\boxed{\\frac{1}{2}}", "answer": "0.5", "subject": "Algebra", "level": 2},
        {"problem": "P", "solution": "S \\boxed{\\frac{1}{2}}", "type": "Geometry", "level": "Level 5"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    first, second = get_task("math").load(str(path))[0]
    assert (first.task_id, first.gold, first.meta) == ("math/0", "0.5", {"subject": "Algebra", "level": "2"})
    assert (second.gold, second.meta) == ("\\frac{1}{2}", {"subject": "Geometry", "level": "5"})
    path.write_text('{"problem": "P", "solution": "no box"}', encoding="utf-8")
    with pytest.raises(UserError, match="row 0: no answer column and no"):
        get_task("math").load(str(path))[0]
    path.write_text('{"question": "P", "answer": "#### 1"}', encoding="utf-8")
    with pytest.raises(UserError, match="problem, solution is missing; found: question, answer"):
        get_task("math").load(str(path))[0]


def test_hub_configurations() -> None:
    task = get_task("math")
    assert len(task.hub_configs("EleutherAI/hendrycks_math")) == 7
    assert task.hub_configs("HuggingFaceH4/MATH-500") == (None,)
