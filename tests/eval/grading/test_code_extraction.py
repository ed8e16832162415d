"""The post-processing of generated code, on texts as models write them for one problem: HumanEval/2."""

import ast
import shutil
import time

import pytest

from eval.grading import code_extraction
from eval.grading.code_extraction import MAX_CHARS, MAX_SECONDS, TooLong, extract_program
from eval.tasks import get_task

SIGNATURE = "def truncate_number(number):"
RIGHT = f"{SIGNATURE}\n    return number % 1.0\n"
BODY = "    return number % 1.0"

# name → (text, whether it passes)
TEXTS = {
    "steps before and after": (f"1. First we take the floor.\n2. Then subtract:\n\n{RIGHT}\n3. Done.", True),
    "fence on a line of prose": (f"Answer: ```python\n{RIGHT}```", True),
    "fence named py": (f"```py\n{RIGHT}```", True),
    "fence named Python": (f"```Python\n{RIGHT}```", True),
    "fence with attributes": (f"```python3 {{.line-numbers}}\n{RIGHT}```", True),
    "fence in an indented list": (
        f"- Solution:\n\n  ```python\n  {SIGNATURE}\n      return number % 1.0\n  ```\n",
        True,
    ),
    "fence in a docstring": (f'{SIGNATURE}\n    """Example:\n    ```\n    x\n    ```\n    """\n{BODY}\n', True),
    "fence twice": (f"```\n```python\n{RIGHT}```", True),
    "fence that never closes, prose after": (f"```python\n{RIGHT}\nThis function returns the decimal part.", True),
    "tags": (f"[PYTHON]\n{RIGHT}[/PYTHON]", True),
    "markup": (f"<code>\n{RIGHT}</code>", True),
    "headings": (f"**Solution**\n\n{RIGHT}\n**Explanation**\n\n- `%` gives the rest", True),
    "prose that begins like code": (f"From the statement we know this.\nimport the module first.\n\n{RIGHT}", True),
    "typographic quotes": (f"Here’s the function — it’s simple:\n\n{RIGHT}", True),
    "zero-width space": (f"\u200b{RIGHT}", True),
    "notebook's prompt": (f"In [1]: x\n{RIGHT}", True),
    "shebang and coding": (f"#!/usr/bin/env python3\n# -*- coding: utf-8 -*-\n{RIGHT}", True),
    "session after": (f"{RIGHT}\n>>> truncate_number(3.5)\n0.5\n", True),
    "printed output after": (f"{RIGHT}\nOutput:\n0.5\n", True),
    "another language's print": (f"{RIGHT}\nprint truncate_number(3.5)\n", True),
    "loop over the input after": (f"{RIGHT}\nwhile True:\n    print(truncate_number(float(input())))\n", True),
    "unit tests after": (f"{RIGHT}\nimport unittest\nclass T(unittest.TestCase):\n    pass\nunittest.main()\n", True),
    "old Mac's line ends": (RIGHT.replace("\n", "\r"), True),
    "body on the line of the colon": (f"{SIGNATURE} return number % 1.0;", True),
    "body alone": (BODY, True),
    "body alone, no indentation": (BODY.strip(), True),
    "body alone, two columns": ("  return number % 1.0\n", True),
    "body alone, eight columns": ("        return number % 1.0\n", True),
    "body alone, tab": ("\treturn number % 1.0\n", True),
    "body and prose without a blank line": (f"{BODY}\nThe function above returns.", True),
    "body with a half statement": (f"{BODY}\n    x = (", True),
    "half a second function": (f"{RIGHT}\ndef other(a, b):\n    if a >", True),
    "lambda": ("truncate_number = lambda number: number % 1.0", True),
    "another argument": ("def truncate_number(número: float) -> float:\n    return número - int(número)\n", True),
    "helper after": (f"{SIGNATURE}\n    return rest(number)\n\ndef rest(x):\n    return x % 1.0\n", True),
    "helper with decorator": (
        f"from dataclasses import dataclass\n@dataclass\nclass P:\n    x: float\n"
        f"{SIGNATURE}\n    return P(number).x % 1.0",
        True,
    ),
    "constant before": (f"ONE = 1.0\n{SIGNATURE}\n    return number % ONE\n", True),
    "registry": (f"F = {{}}\nF['f'] = lambda x: x % 1.0\n{SIGNATURE}\n    return F['f'](number)\n", True),
    "forgotten import": (f"{SIGNATURE}\n    return math.modf(number)[0]\n", True),
    "forgotten decorator": (f"@lru_cache(None)\n{RIGHT}", True),
    "import that may fail": (f"try:\n    import numpy as np\nexcept ImportError:\n    np = None\n{RIGHT}", True),
    "match": (f"{SIGNATURE}\n    match number:\n        case _:\n            return number % 1.0\n", True),
    "signature again, without a body": (f"{RIGHT}\n{SIGNATURE}\n    pass\n", True),
    "broken again at the end": (f"{RIGHT}\n{SIGNATURE}\n    return number\n", False),
    # wrong, and never fixed into something right
    "corrected in a second block": (
        f"```python\n{SIGNATURE}\n    return number\n```\nBetter:\n```python\n{RIGHT}```",
        False,
    ),
    "method of a class": (
        "class Solution:\n    def truncate_number(self, number):\n        return number % 1.0\n",
        False,
    ),
    "coroutine": (f"async {RIGHT}", False),
    "pass": ("    pass\n", False),
    "nothing but a comment": (f"{SIGNATURE}\n    # your code here\n", False),
    "line numbers": (f"1 {SIGNATURE}\n2 {BODY}\n", False),
    "quoted": (f"> {SIGNATURE}\n> {BODY}\n", False),
    "another function": ("def round_number(number):\n    return number % 1.0\n", False),
}


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="no bubblewrap: apt-get install bubblewrap")
def test_texts() -> None:
    task = get_task("humaneval")
    item = task.load()[0][2]
    grades = task.grade_all([(item, text) for text, _ in TEXTS.values()])
    found = {name: grade.metrics["pass@1"] == 1 for name, grade in zip(TEXTS, grades, strict=True)}
    assert found == {name: passes for name, (_, passes) in TEXTS.items()}


def run_program(text: str, **more: str) -> dict:
    """Return the names of the program that post-processing finds in `text` for a function f."""
    space: dict = {"__name__": "solution"}
    exec(extract_program(text, wanted=("f",), **more), space)
    return space


BODY_OF_F = "def f(a):\n    return K * a\n"
FIRST_STATEMENTS = {
    "tuple assignment": "K, L = 4, 5",
    "starred assignment": "K, *L = [4, 5]",
    "docstring": '"""Squares."""\nK = 4',
    "comment": "# the sides\nK = 4",
    "try around an import": "try:\n    import no_such_module\n    K = 3\nexcept ImportError:\n    K = 4",
    "for": "for K in range(5):\n    pass",
    "if": "import sys\nif sys.maxsize:\n    K = 4",
    "with": "import contextlib\nwith contextlib.suppress(ValueError):\n    K = int('4')",
    "while": "K = 0\nwhile K < 4:\n    K += 1",
    "global of a function": "def setup():\n    global K\n    K = 4\nsetup()",
    "global of a function's function": "def one():\n    global K\n    K = 4\ndef two():\n    one()\ntwo()",
    "string with backticks": "K = len('```') + 1",
    "text with a fence": 'TEXT = """\n```\n1234\n```\n"""\nK = len(TEXT.split("```")[1].strip())',
    "heapify": "import heapq\nH = [9, 8, 4]\nheapq.heapify(H)\nK = H[0]",
    "insort": "import bisect\nL = [1, 9]\nbisect.insort(L, 4)\nK = L[1]",
    "seed": "import random\nrandom.seed(3)\nK = 4 if random.random() == random.Random(3).random() else 0",
    "setattr": "class S: pass\nsetattr(S, 'k', 4)\nK = S.k",
    "rows of a table": "T = [[0], [0]]\nfor row in T:\n    row[0] = 2\nK = T[0][0] + T[1][0]",
    "another name": "T = []\nalias = T\nalias.append(4)\nK = T[0]",
    "comprehension": "T = []\n_ = [T.append(i) for i in (4, 5)]\nK = T[0]",
    "pop that nobody takes": "T = [4, 5]\nlast = T.pop()\nK = T[-1]",
    "call with arguments": "G = {}\ndef add(g, k, v):\n    g[k] = v\nadd(G, 'k', 4)\nK = G['k']",
    "decorator that registers": "R = []\ndef register(g):\n    R.append(g)\n    return g\n"
    "@register\ndef four():\n    return 4\nK = R[0]()",
    "precision": "from decimal import Decimal, getcontext\ngetcontext().prec = 1\nK = int(Decimal(39) / Decimal(10))",
    "deep expression": "K = 4" + " + 0" * 1500,
    "globals": "globals()['K'] = 4",
    "globals, updated": "globals().update(K=4)",
    "exec": "exec('K = 4')",
    "exec that needs a name": "four = 4\nexec('K = four')",
    "exec in a function": "def setup():\n    exec('K = 4', globals())\nsetup()",
    "vars": "vars().update(K=4)",
    "eval": "four = 4\ndef get():\n    return eval('four')\nK = get()",
    "not the main guard": "if not __name__ == '__main__':\n    K = 4",
    "part of a main guard": "if __name__ == '__main__' or True:\n    K = 4",
}


@pytest.mark.parametrize("first", FIRST_STATEMENTS.values(), ids=FIRST_STATEMENTS)
def test_a_program_that_passes_as_it_stands_passes_afterwards(first: str) -> None:
    code = f"{first}\n{BODY_OF_F}"
    for text in (
        code,
        f"Here it is:\n\n```python\n{code}```\nThat's all.",
        f"Here it is:\n\n{code}\nThat's all (done.",
        f"{code}\nassert f(1) == 17\nprint(f(1))\n",
        f"{code}<|endoftext|>",
    ):
        assert run_program(text)["f"](3) == 12, text


OTHER_BINDINGS = {
    "import": "from operator import neg as f",
    "tuple": "f, g = (lambda x: -x), None",
    "conditional": "if True:\n    def f(x):\n        return -x\nelse:\n    f = None",
    "try": "try:\n    from no_such_module import f\nexcept ImportError:\n    def f(x):\n        return -x",
    "annotated": "f: object = lambda x: -x",
    "exec": "exec('def f(x): return -x')",
    "globals": "globals()['f'] = lambda x: -x",
    "class": "class C:\n    def __call__(self, x):\n        return -x\nf = C()",
}


@pytest.mark.parametrize("text", OTHER_BINDINGS.values(), ids=OTHER_BINDINGS)
def test_other_ways_to_define_a_function(text: str) -> None:
    assert run_program(text)["f"](3) == -3


MARKS = ["<|endoftext|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|return|>", "<|fim_pad|>", "<|im_end|>", "</s>"]


@pytest.mark.parametrize("mark", MARKS)
def test_a_mark_costs_no_line(mark: str) -> None:
    for text in (
        f"def f(x):\n    y = 2\n    return x * y{mark}{mark}user: and now?",
        f"{mark}def f(x): return 2 * x{mark}",
    ):
        assert run_program(text)["f"](3) == 6
    inside = f"def f(x):\n    return '{mark}' + x{mark}"
    assert run_program(inside)["f"]("x") == f"{mark}x"


QUOTES = {
    "in the other quotes": 'return "don\'t"',
    "escaped": "return 'don\\'t'",
    "in a comment": 'return "don" + chr(39) + "t"  # don\'t',
    "plural in a comment": "return \"don't\"  # of the words' end",
    "three": 'return """don\'t"""',
    "the end of a long string": 'return """\ndon\'t""".strip()',
    "prefix": "return f'don{chr(39)}t'",
    "escape in three": 'return """d\\"""".replace(chr(34), "on\'t")',
}


@pytest.mark.parametrize("line", QUOTES.values(), ids=QUOTES)
def test_a_mark_behind_quotes_ends_the_program(line: str) -> None:
    code = f"def f():\n    word = 'wrong'\n    {line}"
    for text in (f"{code}<|endoftext|>", f"{code}</s>user: it's <b>", f"It's this:\n```python\n{code}<|im_end|>"):
        assert run_program(text)["f"]() == "don't", text
    program = extract_program(f"{code}</s>\nuser: it's (", wanted=("f",))
    assert program.rstrip() == code


@pytest.mark.parametrize(
    "code",
    [
        'def f():\n    """Stop\n    at </s> and\n    <|endoftext|>.\n    """\n    return 4',
        "def f():\n    # up to </s>\n    return 4",
        "def f():\n    return {'</s>': 4, \"it's <|im_end|>\": 5}['</s>']",
    ],
)
def test_a_mark_within_a_program_is_no_end(code: str) -> None:
    assert run_program(f"Here it is:\n```python\n{code}\n```\nIt's done.")["f"]() == 4
    assert run_program(code)["f"]() == 4


STUBS = ['    """Do it."""', "    pass", "    ...", "    raise NotImplementedError", '    """Do it."""\n    pass']


@pytest.mark.parametrize("stub", STUBS)
def test_a_stub_is_never_chosen_over_a_definition(stub: str) -> None:
    stub, whole = f"def f(x):\n{stub}\n", "def f(x):\n    return 2 * x\n"
    for text in (
        f"{stub}\n{whole}",
        f"{whole}\n{stub}",
        f"```python\n{stub}```\nSolved:\n```python\n{whole}```",
        f"The signature is\n\n{stub}\nand this is the answer:\n\n{whole}\nDone (really.",
    ):
        assert run_program(text)["f"](3) == 6, text
        assert run_program(text, prompt=f"def f(x):\n    {STUBS[0].strip()}\n")["f"](3) == 6, text
    assert extract_program(stub, wanted=("f",)).rstrip() == stub.rstrip()  # there is nothing else


def test_blocks_that_need_each_other() -> None:
    text = (
        "A helper:\n```python\nimport math\nTWO = 2\ndef helper(x):\n    return math.floor(x) * TWO\n```\n"
        "And:\n```python\ndef f(x):\n    return helper(x)\n```\nUse it:\n```python\nprint(f(1))\n```\n"
    )
    assert run_program(text)["f"](3.5) == 6
    loose = "K, L = 4, 5\n\nNow the function (short):\n\ndef f(x):\n    return K * x\n\nIt's done."
    assert run_program(loose)["f"](3) == 12


def test_a_program_as_long_as_models_never_write() -> None:
    table = "T = [\n" + "    1234567,\n" * 6000 + "]\n"
    assert len(table) > 70_000 and run_program(f"{table}def f(x):\n    return T[x]\n")["f"](5999) == 1234567


GROWING = {
    "chain of statements": lambda n: (
        "x0 = 1\n" + "".join(f"x{i + 1} = x{i}\n" for i in range(n)) + f"def f(): return x{n}"
    ),
    "chain of functions": lambda n: (
        "".join(f"def f{i}(): return f{i + 1}()\n" for i in range(n)) + "def f(): return f0()"
    ),
    "chain of changes": lambda n: "T = []\n" + "T.append(1)\nx = T\nx += T\n" * n + "def f(): return T",
    "fence and blanks": lambda n: "```" + " " * 24 * n + "x",
    "fences": lambda n: "``` x\n" * 4 * n,
    "open strings": lambda n: "x = '''\ny(\n" * 2 * n,
    "open brackets": lambda n: "x = (\n" * 4 * n,
    "prose and code": lambda n: "x = 1\nNo code here!\n" * n,
    "marks": lambda n: "x<|a|>'" * 3 * n,
    "blank lines": lambda n: " \n" * 12 * n + "def f",
    "marks in strings": lambda n: 'x = \'<|a|>\' """\n' * n,
    "open quotes": lambda n: ('"' * 3 + "\\" + "'" * 3 + "\\") * 3 * n + "</s>",
    "blocks": lambda n: "```\na b\n" * 2 * n,
    "statements on a line": lambda n: "x=1;" * 5 * n,
    "halves": lambda n: "def f(x):\n    return (\n" * n,
}


@pytest.mark.parametrize("grow", GROWING.values(), ids=GROWING)
def test_the_search_is_linear(grow: object) -> None:
    """Four times the text takes at most ten times as long (quadratic: sixteen times), or hardly anything."""

    def seconds(number: int) -> float:
        text = grow(number)
        assert len(text) < MAX_CHARS
        started = time.thread_time()
        extract_program(text, wanted=("f",))
        return time.thread_time() - started

    small = min(seconds(300) for _ in range(2))
    assert seconds(1200) < max(10 * small, 2.0)


LONG = {"brackets": "x=(\n" * 25000, "blocks": "```\na b\n" * 12000, "statements": "x=1;" * 20000}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
@pytest.mark.parametrize("prompt", ["", "def f(x):\n"])
def test_the_longest_texts_end_at_the_deadline(text: str, prompt: str) -> None:
    started = time.thread_time()
    try:
        extract_program(text, wanted=("f",), prompt=prompt)
    except TooLong:
        pass
    assert time.thread_time() - started < 2 * MAX_SECONDS


def test_the_search_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_extraction, "MAX_SECONDS", -1.0)
    with pytest.raises(TooLong, match="post-processing took more than"):
        extract_program("def f(x): return x", wanted=("f",))


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="no bubblewrap: apt-get install bubblewrap")
def test_a_search_that_takes_too_long_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    task = get_task("humaneval")
    item = task.load()[0][2]
    monkeypatch.setattr(code_extraction, "MAX_SECONDS", -1.0)
    grade = task.grade(item, BODY)
    assert grade.metrics == {"strict": 1.0, "pass@1": 0.0} and grade.timeout and grade.invalid


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="no bubblewrap: apt-get install bubblewrap")
def test_thinking_is_cut_before_strict_and_extraction() -> None:
    task = get_task("humaneval")
    item = task.load()[0][2]
    draft = f"```python\n{SIGNATURE}\n    return number\n```"
    texts = {
        f"<think>\n{draft}\n</think>\n{RIGHT}": (1, 1),
        f"{draft}\n</think>\n{BODY}": (1, 1),
        f"<think>{RIGHT}</think>\n{draft}": (0, 0),
        f"<think>{RIGHT}": (0, 0),
        f"{item.meta['prompt']}\n\n{RIGHT}": (1, 1),  # the problem again, then its solution
    }
    grades = task.grade_all([(item, text) for text in texts])
    assert [tuple(grade.metrics.values()) for grade in grades] == list(texts.values())
    assert ast.parse(grades[0].extracted["program"])
