"""Every published reference passes in each form in which a model may wrap it: 12 wrappings of MBPP and HumanEval."""

import ast
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from eval.sandbox.sandbox import Job, Sandbox
from eval.tasks import get_task
from eval.tasks.base import Item, Task
from eval.tasks.code import imported_modules, limits_for
from tests.support.boxes import needs_bubblewrap

pytestmark = [pytest.mark.real, needs_bubblewrap]

END_MARKS = (
    "<|endoftext|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|return|>",
    "<|fim_pad|>",
    "<|im_end|>",
    "</s>",
)
LEADING = (
    "K_0, L_0 = 4, 5\nfor i_0 in range(3):\n    pass\nif K_0:\n    L_0 = 6\n"
    "try:\n    import numpy as np_0\nexcept ImportError:\n    np_0 = None\n"
)


def in_two_blocks(code: str, name: str) -> str:
    """Put what stands before the function into a block of its own."""
    body = ast.parse(code).body
    first = next((node.lineno for node in body if getattr(node, "name", "") == name), 1)
    lines = code.splitlines()
    before = "\n".join(lines[: first - 1]) or "import math"
    return f"First:\n```python\n{before}\n```\nThen:\n```python\n{chr(10).join(lines[first - 1 :])}\n```\nDone."


def with_tabs(code: str) -> str:
    """Indent by tabs; return the code itself where the tabs would stand in a string."""
    lines = code.expandtabs(8).splitlines()
    widths = [len(line) - len(line.lstrip(" ")) for line in lines]
    unit = math.gcd(*widths) or 4
    text = "\n".join("\t" * (width // unit) + line.lstrip(" ") for line, width in zip(lines, widths, strict=True))
    try:
        same = ast.dump(ast.parse(text)) == ast.dump(ast.parse(code))
    except SyntaxError:
        same = False
    return text if same else code


WRAPPINGS: dict[str, Callable[[str, str, str, int], str]] = {  # of code, function, request, number
    "prose": lambda c, f, r, n: f"Sure! Here's the function:\n\n{c}\n\nIt's short, isn't it? Note: it works.",
    "fences": lambda c, f, r, n: f"Answer:\n\n```python\n{c}\n```\nIt uses `{f}`.",
    "restated prompt": lambda c, f, r, n: f'{r}\n\ndef {f}(*args):\n    """Do it."""\n\n{c}',
    "think block": lambda c, f, r, n: (
        f"<think>\n```python\ndef {f}(*args):\n    return None\n```\nNo.\n</think>\n\n{c}"
    ),
    "main guard": lambda c, f, r, n: f'{c}\n\nif __name__ == "__main__":\n    n = int(input())\n    print({f}(n))\n',
    "tests behind": lambda c, f, r, n: f"{c}\n\nassert {f}() == 17\nprint({f}(1))\nresult = {f}(None)\n",
    "tabs": lambda c, f, r, n: with_tabs(c),
    "CRLF": lambda c, f, r, n: c.replace("\r\n", "\n").replace("\n", "\r\n"),
    "end mark": lambda c, f, r, n: f"{c.rstrip()}{END_MARKS[n % len(END_MARKS)]}Human: go on",
    "two blocks": lambda c, f, r, n: in_two_blocks(c, f),
    "leading statements": lambda c, f, r, n: f"{LEADING}{c}",
    "trailing text": lambda c, f, r, n: f"{c}\n\nExplanation: it isn't long.\n1. It goes through the list\n2. (done",
}


def failures(task: Task, items: Sequence[Item], reference: Callable[[Item], tuple[str, str, str]]) -> list[tuple]:
    """Return (task id, wrapping, verdict, program) of each reference that passes bare and not wrapped."""
    jobs: dict[Job, tuple[str, str]] = {}
    for number, item in enumerate(items):
        code, name, request = reference(item)
        tests, names = task.tests(item)
        for wrapping, wrap in {"bare": lambda c, f, r, n: c, **WRAPPINGS}.items():
            text = wrap(code, name, request, number)
            program = task.program(item, task.answer(text)) or ""
            try:
                program = ast.unparse(ast.parse(program))  # a change of layout only needs no run of its own
            except (SyntaxError, RecursionError):
                pass
            jobs.setdefault(Job(program + "\n", tests, imported_modules(tests), names), (item.task_id, wrapping))
    with Sandbox(limits=limits_for(60)) as sandbox:  # a busy machine must not fail anybody
        verdicts = sandbox.run(list(jobs))
    return [
        (*where, str(verdict), job.program)
        for (job, where), verdict in zip(jobs.items(), verdicts, strict=True)
        if not verdict.passed
    ]


def humaneval_reference(item: Item) -> tuple[str, str, str]:
    prompt = item.meta["prompt"]
    return prompt + item.gold, item.meta["entry_point"], prompt


def mbpp_reference(item: Item) -> tuple[str, str, str]:
    return (
        item.gold.replace("\r\n", "\n"),
        item.meta["wanted"][0],
        item.instruction.replace("\nYour code", "\n\nYour code"),
    )


STEPS = [11, pytest.param(1, marks=pytest.mark.slow)]


@pytest.mark.parametrize("step", STEPS)
def test_humaneval_references_pass_in_every_wrapping(step: int) -> None:
    task = get_task("humaneval")
    assert len(WRAPPINGS) == 12
    assert failures(task, task.load()[0][::step], humaneval_reference) == []


@pytest.mark.parametrize("step", STEPS)
def test_mbpp_references_pass_in_every_wrapping(real_data: Path, step: int) -> None:
    task = get_task("mbpp")
    assert failures(task, task.load(str(real_data / "mbpp" / "mbpp.jsonl"))[0][::step], mbpp_reference) == []
