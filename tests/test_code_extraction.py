"""The post-processing of generated code, on texts as models write them for one problem: HumanEval/2."""

import shutil

import pytest

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
    # wrong, and never mended into something right
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
    item = task.load_items()[2]
    grades = task.grade_all([(item, text) for text, _ in TEXTS.values()])
    found = {name: grade.metrics["pass@1"] == 1 for name, grade in zip(TEXTS, grades, strict=True)}
    assert found == {name: passes for name, (_, passes) in TEXTS.items()}
