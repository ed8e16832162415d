"""The graders on real data: every gold answer is read, and scoring is fast enough to be repeated at will."""

import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from ba_lora.io import read_jsonl
from eval.grading.equality import equal
from eval.grading.limits import TimeLimit, cpu_limit
from eval.scoring import ScoreOptions, score_file
from eval.tasks import get_task
from tests.support.respellings import right, wrong

pytestmark = pytest.mark.real


def score(task: str, texts: list[str], data: Path, folder: Path, **options: object) -> dict:
    path = folder / f"{task}.jsonl"
    rows = [{"task_id": f"{task}/{index}", "completion": text} for index, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return score_file(get_task(task), path, data=str(data), options=ScoreOptions(**options))


@pytest.fixture(scope="module")
def gsm8k(real_data: Path) -> Path:
    return real_data / "gsm8k" / "test.jsonl"


@pytest.fixture(scope="module")
def math500(real_data: Path) -> Path:
    return real_data / "math" / "math500.jsonl"


def test_gsm8k_raw_golds(gsm8k: Path, tmp_path: Path) -> None:
    result = score("gsm8k", [row["answer"] for row in read_jsonl(gsm8k)], gsm8k, tmp_path)
    assert (result["n"], result["invalid"], result["metrics"]) == (1319, 0, {"strict": 0.0, "flexible": 1.0})


def test_gsm8k_golds_in_the_trained_form(gsm8k: Path, tmp_path: Path) -> None:
    golds = [row["answer"].split("####")[1].strip() for row in read_jsonl(gsm8k)]
    assert sum("," in gold for gold in golds) > 10
    result = score("gsm8k", [f"We see.\nThe answer is: {gold}" for gold in golds], gsm8k, tmp_path)
    assert result["metrics"] == {"strict": 1.0, "flexible": 1.0} and result["n"] == 1319
    plain = [f"The answer is: {gold.replace(',', '')}.00." for gold in golds]
    assert score("gsm8k", plain, gsm8k, tmp_path)["metrics"] == {"strict": 1.0, "flexible": 1.0}
    wrong = [f"It is {gold}. The answer is: {gold}1" for gold in golds]
    assert score("gsm8k", wrong, gsm8k, tmp_path)["metrics"] == {"strict": 0.0, "flexible": 0.0}


def test_gsm8k_takes_two_seconds_at_most(gsm8k: Path, tmp_path: Path) -> None:
    long_texts = [(row["answer"].replace("####", "So") + "\n") * 8 for row in read_jsonl(gsm8k)]  # runaways
    start = time.process_time()
    result = score("gsm8k", long_texts, gsm8k, tmp_path)
    assert time.process_time() - start < 2.0 and result["metrics"]["flexible"] == 1.0


def test_math500_raw_solutions(math500: Path, tmp_path: Path) -> None:
    result = score("math", [row["solution"] for row in read_jsonl(math500)], math500, tmp_path)
    assert result["n"] == 500 and result["metrics"]["flexible"] >= 0.995
    assert sum(group["n"] for group in result["groups"]["subject"].values()) == 500
    assert set(result["groups"]["level"]) == set("12345")


def test_math500_golds_in_the_trained_form(math500: Path, tmp_path: Path) -> None:
    golds = [row["answer"] for row in read_jsonl(math500)]
    for form in ("The answer is: {}", "The answer is: ${}$.", "Thus.\nThe answer is: \\boxed{{{}}}.\n"):
        texts = [form.format(gold) for gold in golds]
        assert score("math", texts, math500, tmp_path)["metrics"] == {"strict": 1.0, "flexible": 1.0}
    shifted = [f"The answer is: ${gold}$" for gold in golds[1:] + golds[:1]]
    assert score("math", shifted, math500, tmp_path)["metrics"]["flexible"] < 0.05


def every_pair(math500: Path) -> list[tuple[str, str, bool]]:
    """Return (gold, answer, whether it is right): each gold of MATH-500 respelled, and with one thing changed."""
    golds = list(dict.fromkeys(row["answer"] for row in read_jsonl(math500)))
    return [
        (gold, answer, verdict)
        for gold in golds
        for variants, verdict in ((right(gold), True), (wrong(gold), False))
        for answer in dict.fromkeys(variants.values())
    ]


def test_golds_respelled_stay_right_and_changed_become_wrong(math500: Path, tmp_path: Path) -> None:
    pairs = every_pair(math500)
    assert len(pairs) > 6000 and {verdict for *_, verdict in pairs} == {True, False}
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"problem": "P", "solution": "S", "answer": gold}) + "\n" for gold, *_ in pairs))
    for form in ("The answer is: {}", "The answer is:\n$$\n{}\n$$", "Thus $x$ is\n\\[\\boxed{{{}}}\\]"):
        delimited = form != "The answer is: {}"
        texts = [form.format(bare(answer) if delimited else answer) for _, answer, _ in pairs]
        result = score("math", texts, data, tmp_path)
        rows = read_jsonl(tmp_path / "math.grades.jsonl")
        assert result["grader_errors"] == result["timeouts"] == 0
        violations = [
            (gold, text, row["extracted"])
            for (gold, _, verdict), text, row in zip(pairs, texts, rows, strict=True)
            if (row["metrics"]["flexible"] == 1) != verdict or (row["metrics"]["strict"] == 1 and not verdict)
        ]
        assert violations == []


def bare(answer: str) -> str:
    """Return an answer without its own math delimiters."""
    for left, end in (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if answer.startswith(left) and answer.endswith(end):
            answer = answer[len(left) : -len(end)].strip()
    return answer


def test_fewer_errors_than_two_other_graders(math500: Path, capsys: pytest.CaptureFixture) -> None:
    """math-verify used by itself and, where installed, PRM800K's grader: pip install --no-deps mathruler pylatexenc."""
    math_verify = pytest.importorskip("math_verify")
    graders = {"ours": equal, "math-verify": lambda gold, answer: verified(math_verify, gold, answer)}
    if importlib.util.find_spec("mathruler") and importlib.util.find_spec("pylatexenc"):
        prm800k = importlib.import_module("mathruler.grader")  # not among our requirements
        graders["mathruler"] = lambda gold, answer: prm800k.grade_answer(bare(answer.removesuffix(".")), gold)
    pairs = every_pair(math500)[::10]
    errors = {}
    for name, grader in graders.items():
        refused, accepted = 0, 0
        for gold, answer, verdict in pairs:
            found = judged(grader, gold, answer)
            refused += verdict and not found
            accepted += found and not verdict
        errors[name] = refused + accepted
        with capsys.disabled():
            print(f"\n{name}: {refused} right answers refused, {accepted} wrong ones accepted, of {len(pairs)}")
    assert errors["ours"] == 0 and all(errors[name] > 10 for name in graders if name != "ours")


def judged(grader: Callable[[str, str], bool], gold: str, answer: str) -> bool:
    """Return the verdict; an exception, or ten seconds of processor time, is a refusal."""
    try:
        with cpu_limit(10.0):
            return bool(grader(gold, answer))
    except (Exception, TimeLimit):
        return False


def verified(math_verify: ModuleType, gold: str, answer: str) -> bool:
    return math_verify.verify(math_verify.parse(f"${gold}$"), math_verify.parse(f"${bare(answer.removesuffix('.'))}$"))


def test_math_costs_little_enough(math500: Path, tmp_path: Path) -> None:
    """5000 items in 30 s of processor time are 6 ms an item; here one item in ten, of mixed kinds."""
    golds = [row["answer"] for row in read_jsonl(math500)]
    kinds = [
        "Then \\boxed{{{gold}}}.",
        "The answer is: ${gold}$.",
        "The answer is: {other}",
        "so $x = \\boxed{{{gold} + {index}}}$",
        "so \\boxed{{\\frac{{2}}{{2}} \\cdot ({gold})}}.",
        "The answer is: x = {other} units, which is 0.{index}",
        "The answer is: {gold} \\cdot (\\sin^2 {index} + \\cos^2 {index})",
    ]
    texts = [
        kinds[index % len(kinds)].format(gold=gold, other=golds[index - 3], index=index + 1)
        for index, gold in enumerate(golds)
    ]

    start = time.process_time()
    result = score("math", texts, math500, tmp_path)
    assert (time.process_time() - start) / len(texts) < 0.006
    assert result["timeouts"] == 0 and result["metrics"]["flexible"] > 0.4
