"""MT-Bench: FastChat's files, generation in two turns, and the whole way to a score, with a judge of the test's own.

The questions here are the test's own, in FastChat's form; tests/real has the published ones.
"""

import ast
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ba_lora.errors import UserError
from ba_lora.io import read_json, read_jsonl
from ba_lora.prompts import ALPACA, build_conversation, build_prompt, prompt_hash, template_stops
from eval import generate, score
from eval.engines.base import Completion
from eval.engines.requests import GenerateOptions, load_questions
from eval.judge.client import JudgeOptions
from eval.judge.store import short_sha256
from eval.tasks import get_task
from eval.tasks.mt_bench import (
    REPOSITORY,
    REVISION,
    TEMPERATURES,
    WITH_REFERENCE,
    describe_ratings,
    fetch,
    locate,
)
from tests.eval.engines.test_engines import save_model
from tests.support.judge_server import JudgeServer, completion

QUESTIONS = [
    (81, "writing", ["Write a line.", "Now another."]),
    (111, "math", ["What is 1 + 2?", "And times 3?"]),
    (121, "coding", ["Write {x}.", "Make it faster."]),
    (141, "stem", ["Why is it blue?", "Why red?"]),
]
PROMPTS = {
    "single-v1": "Q: {question}\nA: {answer}",
    "single-math-v1": "Q: {question}\nR: {ref_answer_1}\nA: {answer}",
    "single-v1-multi-turn": "Q: {question_1}\nA: {answer_1}\nQ: {question_2}\nA: {answer_2}",
    "single-math-v1-multi-turn": "R: {ref_answer_1} {ref_answer_2}\nQ: {question_1}\nA: {answer_1}\n"
    "Q: {question_2}\nA: {answer_2}",
}


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def judge_prompt(name: str, text: str) -> dict:
    return {
        "name": name,
        "type": "single",
        "system_prompt": "S",
        "prompt_template": text,
        "output_format": "[[rating]]",
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """FastChat's layout below llm_judge/data, with four questions."""
    folder = tmp_path / "fastchat"
    rows = [{"question_id": number, "category": kind, "turns": turns} for number, kind, turns in QUESTIONS]
    write_rows(folder / "mt_bench" / "question.jsonl", rows)
    answers = [
        {"question_id": number, "choices": [{"index": 0, "turns": [f"ref {number}.1", f"ref {number}.2"]}]}
        for number in (111, 121)
    ]
    write_rows(folder / "mt_bench" / "reference_answer" / "gpt-4.jsonl", answers)
    write_rows(folder / "judge_prompts.jsonl", [judge_prompt(*item) for item in PROMPTS.items()])
    return folder


def write_answers(path: Path, *, samples: int = 1, only: tuple[str, ...] = ()) -> Path:
    ids = [f"mt_bench/{number}/turn{turn}" for number, *_ in QUESTIONS for turn in (1, 2)]
    rows = [
        {"task_id": name, "sample": sample, "completion": f" says {name} {sample}\n"}
        for name in ids
        if not only or name in only
        for sample in range(samples)
    ]
    write_rows(path, rows)
    return path


@pytest.fixture
def judged_by(monkeypatch: pytest.MonkeyPatch):
    """Set the environment to a server: `judged_by(server)`."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("JUDGE_MODEL", "JUDGE_BASE_URL", "JUDGE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def use(server: JudgeServer, **more: str) -> None:
        for name, value in (server.environ | more).items():
            monkeypatch.setenv(name, value)

    return use


def last_json(capsys: pytest.CaptureFixture) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_items(folder: Path) -> None:
    items, source = get_task("mt_bench").load(str(folder))
    assert [item.task_id for item in items[:3]] == ["mt_bench/81/turn1", "mt_bench/81/turn2", "mt_bench/111/turn1"]
    assert [item.follows for item in items[:3]] == [None, "mt_bench/81/turn1", None]
    assert items[1].instruction == "Now another." and len(items) == 8
    assert source.name == str(folder / "mt_bench" / "question.jsonl") and len(source.sha256) == 64
    assert [get_task("mt_bench").temperature(item) for item in items[::2]] == [0.7, 0.0, 0.0, 0.1]


def test_temperatures_and_reference_categories_are_fastchats() -> None:
    import importlib.util

    source = Path(importlib.util.find_spec("fastchat").origin).parent / "llm_judge" / "common.py"
    published = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id in ("temperature_config", "NEED_REF_CATS")
    }
    of_another_set = "arena-hard-200"
    assert TEMPERATURES == {k: v for k, v in published["temperature_config"].items() if k != of_another_set}
    assert set(WITH_REFERENCE) == set(published["NEED_REF_CATS"]) - {of_another_set}


def test_the_files_are_found_in_each_layout(folder: Path, tmp_path: Path) -> None:
    whole = locate(folder)
    assert whole["questions"] == folder / "mt_bench" / "question.jsonl" and all(whole.values())
    inner = locate(folder / "mt_bench")  # as `--data …/data/mt_bench`; the prompts lie one folder up
    assert {role: path.resolve() for role, path in inner.items()} == {r: p.resolve() for r, p in whole.items()}
    beside = locate(folder / "mt_bench" / "question.jsonl")
    assert {role: path.resolve() for role, path in beside.items()} == {r: p.resolve() for r, p in whole.items()}
    flat = tmp_path / "flat"
    write_rows(flat / "my_questions.jsonl", read_jsonl(whole["questions"]))
    assert locate(flat / "my_questions.jsonl") == {
        "questions": flat / "my_questions.jsonl", "references": None, "judge_prompts": None,
    }  # fmt: skip
    with pytest.raises(UserError, match="no questions in .*: put FastChat's mt_bench/question.jsonl there"):
        locate(flat)
    with pytest.raises(UserError, match="no such file or folder"):
        locate(tmp_path / "nowhere")


def test_the_published_files_are_fetched_once_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_data: Path
) -> None:
    from eval.tasks import mt_bench

    published = {
        "question.jsonl": real_data / "mt_bench" / "mt_bench_question.jsonl",
        "gpt-4.jsonl": real_data / "mt_bench" / "mt_bench_reference_answer_gpt-4.jsonl",
        "judge_prompts.jsonl": real_data / "mt_bench" / "judge_prompts.jsonl",
    }
    asked = []

    def download(url: str, timeout: float):  # noqa: ANN202
        asked.append(url)
        return open(published[url.rpartition("/")[2]], "rb")

    monkeypatch.setattr(mt_bench, "PROJECT_ROOT", tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("urllib.request.urlopen", download)
    items, source = get_task("mt_bench").load()
    assert (len(items), source.name) == (160, f"{REPOSITORY}@{REVISION}") and len(asked) == 3
    assert all(url.startswith(f"https://raw.githubusercontent.com/{REPOSITORY}/{REVISION}/") for url in asked)
    assert get_task("mt_bench").load(source.name)[1] == source and len(asked) == 3

    cached = fetch(source.name)["judge_prompts"]
    cached.write_text("damaged")
    published["judge_prompts.jsonl"] = published["gpt-4.jsonl"]
    with pytest.raises(UserError, match="is not the file we know"):
        fetch(source.name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set; give a folder"):
        fetch(source.name)
    monkeypatch.delenv("HF_HUB_OFFLINE")

    def unreachable(url: str, timeout: float) -> None:
        raise OSError("no route")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(UserError, match="cannot fetch https://.*: no route; give a folder"):
        fetch(source.name)
    with pytest.raises(UserError, match="are known at"):
        get_task("mt_bench").load(f"{REPOSITORY}@main")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question_id": "81", "category": "x", "turns": ["a", "b"]}, "question_id must be a whole number"),
        ({"question_id": 81, "category": 3, "turns": ["a", "b"]}, "category must be text"),
        ({"question_id": 81, "category": "x", "turns": ["a"]}, "turns must be two texts"),
        ({"question_id": 81, "category": "x", "turns": ["a", " "]}, "turns must be two texts"),
        ({"question_id": 81, "category": "x"}, "turns is missing"),
    ],
)
def test_damaged_questions(tmp_path: Path, row: dict, said: str) -> None:
    write_rows(tmp_path / "question.jsonl", [row])
    with pytest.raises(UserError, match=said):
        get_task("mt_bench").load(str(tmp_path))


def test_conversations() -> None:
    two = build_conversation(["One", "Two"], [" first answer\n"])
    assert two == ALPACA.replace("{instruction}", "One") + (" first answer\n\n### Instruction:\nTwo\n\n### Response:")
    assert build_conversation(["One"], []) == build_prompt("One")
    step = build_conversation(["One", "Two"], ["a"], template="alpaca_step_by_step")
    assert step.count("Let's think step by step.") == 2 and step.count("Below is an instruction") == 1
    vicuna = build_conversation(["One", "Two"], ["a"], template="fschat/vicuna_v1.1")
    assert vicuna.endswith("USER: One ASSISTANT: a</s>USER: Two ASSISTANT:")
    assert build_prompt("One", template="fschat/vicuna_v1.1").endswith("USER: One ASSISTANT:"), "no state is kept"
    # the tokenizer adds BOS itself
    assert build_prompt("One", template="fschat/deepseek-chat").startswith("User: One")
    assert template_stops("alpaca") is None and template_stops("fschat/vicuna_v1.1") == ()
    assert template_stops("fschat/falcon-chat") == ("\nUser:",) and template_stops("fschat/aquila-chat")[0] == "###"
    assert len({prompt_hash(template=f"fschat/{name}") for name in ("mistral", "llama-2", "zephyr")}) == 3
    for name in ("fschat/vicuna", "fschat/chatgpt", "vicuna"):
        with pytest.raises(UserError, match="choose"):
            build_prompt("One", template=name)


@pytest.mark.parametrize(
    ("thinking", "seen"),
    [
        ("<think> </think>", "It is 12."),
        ("[T] [/T]", "<think>9?</think>\nIt is 12."),
        ("none", "<think>9?</think>\nIt is 12."),
    ],
)
def test_the_second_turn_does_not_see_the_thinking_of_the_first(folder: Path, thinking: str, seen: str) -> None:
    questions = load_questions(get_task("mt_bench"), str(folder), GenerateOptions(thinking=thinking))
    answers = [[Completion("<think>9?</think>\nIt is 12.", "stop", 9)] for _ in questions.items]
    turns = questions.instructions[1]
    assert questions.prompts(1, answers) == [build_conversation(turns, [seen])]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"), context=900)


def test_generation_takes_turns(folder: Path, base: Path, tmp_path: Path) -> None:
    command = ["--model", str(base), "--task", "mt_bench", "--engine", "hf", "--data", str(folder)]
    generate.main([*command, "--output", str(tmp_path / "out"), "max_new_tokens=12"])
    rows = {row["task_id"]: row for row in read_jsonl(tmp_path / "out" / "mt_bench.jsonl")}
    assert list(rows) == [f"mt_bench/{number}/turn{turn}" for number, *_ in QUESTIONS for turn in (1, 2)]
    for number, _, turns in QUESTIONS:
        first, second = (rows[f"mt_bench/{number}/turn{turn}"] for turn in (1, 2))
        assert first["prompt"] == build_prompt(turns[0])
        assert second["prompt"] == build_conversation(turns, [first["completion"]])
        assert first["completion"].strip() and second["completion"].strip()
    meta = read_json(tmp_path / "out" / "mt_bench.meta.json")
    assert meta["sampling"]["temperature"] == {"0.0": 4, "0.1": 2, "0.7": 2}
    assert meta["template"] == "alpaca" and meta["num_items"] == 8 and meta["num_clamped"] == 0
    assert "### Instruction:" in meta["sampling"]["stop"]

    generate.main([*command, "--output", str(tmp_path / "again"), "max_new_tokens=12"])
    assert read_jsonl(tmp_path / "again" / "mt_bench.jsonl") == list(rows.values())
    more = ["max_new_tokens=12", "template=fschat/falcon-chat", "temperature=1.0", "num_samples=2", "limit=3"]
    generate.main([*command, "--output", str(tmp_path / "chat"), *more])
    chat = read_jsonl(tmp_path / "chat" / "mt_bench.jsonl")
    assert [(row["task_id"][9:], row["sample"]) for row in chat] == [
        ("81/turn1", 0), ("81/turn1", 1), ("81/turn2", 0), ("81/turn2", 1), ("111/turn1", 0), ("111/turn1", 1),
    ]  # fmt: skip
    for sample in (0, 1):
        history = chat[sample]["completion"].strip()
        assert chat[2 + sample]["prompt"] == f"User: Write a line.\nFalcon: {history}\nUser: Now another.\nFalcon:"
    assert chat[2]["prompt"] != chat[3]["prompt"]
    meta = read_json(tmp_path / "chat" / "mt_bench.meta.json")
    assert meta["sampling"]["temperature"] == 1.0 and meta["sampling"]["stop"] == ["\nUser:"]
    assert meta["prompt_hash"] == prompt_hash(template="fschat/falcon-chat")


def test_context_too_short_for_the_second_turn(folder: Path, base: Path, tmp_path: Path) -> None:
    command = ["--model", str(base), "--task", "mt_bench", "--engine", "hf", "--data", str(folder)]
    generate.main([*command, "--output", str(tmp_path), "max_new_tokens=80", "max_model_len=200"])
    reasons = [row["finish_reason"] for row in read_jsonl(tmp_path / "mt_bench.jsonl")]
    assert "prompt_too_long" not in reasons[::2] and "prompt_too_long" in reasons[1::2]


def test_unknown_template(folder: Path, base: Path, tmp_path: Path) -> None:
    command = ["--model", str(base), "--task", "mt_bench", "--engine", "hf", "--data", str(folder)]
    with pytest.raises(UserError, match="unknown prompt template 'chatty'"):
        generate.main([*command, "--output", str(tmp_path), "template=chatty"])


def rate(number: int, body: dict) -> tuple:
    """Rate by what is asked: turn 1 gets 8, turn 2 gets 4, maths gets nothing readable."""
    text = body["messages"][1]["content"]
    rating = "no idea" if "1 + 2" in text else "[[4]]" if text.count("A: ") == 2 else "[[8]]"
    return completion(f"Rating: {rating}")


def test_the_whole_way_to_a_score(folder: Path, tmp_path: Path, judged_by, capsys: pytest.CaptureFixture) -> None:
    path = write_answers(tmp_path / "run" / "completions" / "mt_bench.jsonl")
    command = ["--task", "mt_bench", "--completions", str(path), "--data", str(folder), "judgements=2"]
    with JudgeServer(rate) as server:
        judged_by(server)
        assert score.main(command) == 0
        result = last_json(capsys)
        asked = [body["messages"] for body in server.requests]
    assert len(asked) == 16
    # turn 2's four answers lie at 4, turn 1's at 8; the two of maths have no rating and are left out
    assert result["metrics"] == pytest.approx({"rating": 0.6, "rating_turn1": 0.8, "rating_turn2": 0.4})
    ratings = result["ratings"]
    assert (ratings["overall"], ratings["turn1"], ratings["turn2"]) == (6, 8, 4)
    assert (ratings["judgements"], ratings["std"], ratings["answer_std"]) == ([6, 6], 0, 0)
    assert (ratings["num_rated"], ratings["num_answers"]) == (6, 8)
    assert (result["n"], result["invalid"], result["num_completions"]) == (8, 2, 8)
    assert result["judge"]["num_invalid_judgements"] == 4 and result["judge"]["num_judgements"] == 16
    assert result["judge"]["version"] == "judge-1-0101" and result["judge"]["prompt_hash"] in result["judge"]["id"]
    assert result["judge"]["id"].endswith(" max_tokens=2048 thinking=<think> </think>")
    assert result["groups"]["category"]["math"] == {"n": 2, "metrics": {}}
    assert result["groups"]["category"]["stem"]["metrics"]["rating"] == pytest.approx(0.6)
    assert result["groups"]["turn"]["1"]["metrics"] == pytest.approx({"rating": 0.8, "rating_turn1": 0.8})
    assert set(result["interval_95"]) == {"rating", "rating_turn1", "rating_turn2"}

    users = {messages[1]["content"] for messages in asked}
    assert "Q: Write a line.\nA: says mt_bench/81/turn1 0" in users
    assert (
        "R: ref 121.1 ref 121.2\nQ: Write {x}.\nA: says mt_bench/121/turn1 0\nQ: Make it faster.\n"
        "A: says mt_bench/121/turn2 0"
    ) in users
    assert "Q: What is 1 + 2?\nR: ref 111.1\nA: says mt_bench/111/turn1 0" in users
    assert {messages[0]["content"] for messages in asked} == {"S"}

    run = tmp_path / "run"
    rows = read_jsonl(run / "judgements" / "mt_bench.jsonl")
    assert len(rows) == 16 and rows[0]["judgement"].startswith("Rating: ")
    assert rows[0]["answer_hash"] in {short_sha256(f"says mt_bench/{number}/turn1 0") for number, *_ in QUESTIONS}
    grades = {row["task_id"]: row for row in read_jsonl(run / "grades" / "mt_bench.jsonl")}
    assert grades["mt_bench/81/turn2"]["extracted"] == {"ratings": "4 4"}
    assert grades["mt_bench/111/turn1"] | {"invalid": True, "metrics": {}} == grades["mt_bench/111/turn1"]
    assert read_json(run / "scores" / "mt_bench.json") == result


def test_scored_again_without_the_judge(
    folder: Path, tmp_path: Path, judged_by, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_answers(tmp_path / "runs" / "a" / "completions" / "mt_bench.jsonl")
    path = tmp_path / "runs" / "a" / "completions" / "mt_bench.jsonl"
    (path.parent / "mt_bench.meta.json").write_text(json.dumps({"data": str(folder / "mt_bench" / "question.jsonl")}))
    with JudgeServer(rate) as server:
        judged_by(server)
        assert score.main(["--runs", str(tmp_path / "runs")]) == 0
    first = read_json(tmp_path / "runs" / "a" / "scores" / "mt_bench.json")
    for name in server.environ:
        monkeypatch.delenv(name)
    assert score.main(["--runs", str(tmp_path / "runs")]) == 0
    again = read_json(tmp_path / "runs" / "a" / "scores" / "mt_bench.json")
    assert {**again, "grader_seconds": 0} == {**first, "grader_seconds": 0}
    # another answer needs the judge again, and says so
    write_rows(path, [row | {"completion": "new"} for row in read_jsonl(path)])
    capsys.readouterr()
    assert score.main(["--runs", str(tmp_path / "runs")]) == 2
    assert "name the judge with JUDGE_MODEL" in capsys.readouterr().err


def test_runs_of_two_judges_are_not_put_side_by_side(folder: Path, tmp_path: Path, judged_by, monkeypatch) -> None:
    common = ["--data", str(folder), "judgements=1"]
    for name in ("a", "b"):
        path = write_answers(tmp_path / name / "completions" / "mt_bench.jsonl")
        (path.parent / "mt_bench.meta.json").write_text(json.dumps({"data": str(folder)}))
        with JudgeServer(lambda number, body: completion("[[5]]", model=body["model"])) as server:
            judged_by(server, JUDGE_MODEL=f"judge-{name}")
            score.main(["--task", "mt_bench", "--completions", str(path), *common])
    for name in server.environ:
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match="different judges, .*judge-a.*judge-b"):
        score.main(["--runs", str(tmp_path), "judgements=1"])


def test_nothing_but_nonsense_is_no_crash_and_no_score(
    folder: Path, tmp_path: Path, judged_by, capsys: pytest.CaptureFixture
) -> None:
    path = write_answers(tmp_path / "answers.jsonl")
    with JudgeServer(lambda number, body: completion("once upon a [[time]]")) as server:
        judged_by(server)
        assert score.main(["--task", "mt_bench", "--completions", str(path), "--data", str(folder)]) == 0
    result = last_json(capsys)
    assert result["metrics"] == {} == result["interval_95"] and result["invalid"] == 8
    assert result["ratings"]["overall"] is None and result["ratings"]["judgements"] == [None] * 3
    assert result["judge"]["num_invalid_judgements"] == 24
    assert (tmp_path / "answers.judgements.jsonl").is_file()


def test_a_killed_scorer_pays_twice_for_nothing_but_the_calls_under_way(
    root: Path, folder: Path, tmp_path: Path, judged_by
) -> None:
    """SIGKILL while judging, then the same command; and the key stands in no file, output or process list."""
    path = write_answers(tmp_path / "run" / "completions" / "mt_bench.jsonl")
    command = [sys.executable, "-m", "eval.score", "--task", "mt_bench", "--completions", str(path)]
    command += ["--data", str(folder), "judgements=3", "judge_parallel=2"]
    store = tmp_path / "run" / "judgements" / "mt_bench.jsonl"
    key = "key-7f3a9c"
    killed = threading.Event()

    def answer(number: int, body: dict) -> tuple:
        if number >= 9:
            killed.wait(60)
        return completion("[[7]]")

    with (
        JudgeServer(answer) as server,
        open(tmp_path / "log", "w") as log,
    ):
        judged_by(server, JUDGE_API_KEY=key)
        scorer = subprocess.Popen(command, cwd=root, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while len(server.requests) < 11 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert key not in Path(f"/proc/{scorer.pid}/cmdline").read_text()
        scorer.kill()
        scorer.wait()
        killed.set()
        asked, kept = len(server.requests), len(store.read_text().splitlines())
        assert asked == 11 and 9 <= kept <= 11  # two calls were under way
        assert not (tmp_path / "run" / "scores").exists(), "nothing half-judged"
        done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, stderr=log, text=True)
        assert done.returncode == 0 and len(server.requests) == asked + 24 - kept
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["judge"]["num_judgements"] == 24 and result["ratings"]["overall"] == 7
    assert f"{24 - kept} calls ({kept} of 24 judgements are on file)" in (tmp_path / "log").read_text()
    assert all(key not in file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    assert key not in done.stdout


def test_several_samples_and_missing_answers(folder: Path, tmp_path: Path, judged_by, capsys) -> None:
    path = write_answers(tmp_path / "answers.jsonl", samples=2)
    command = ["--task", "mt_bench", "--completions", str(path), "--data", str(folder), "judgements=1"]
    with JudgeServer(
        lambda number, body: completion("[[8]]" if " 1" in body["messages"][1]["content"] else "[[6]]")
    ) as s:
        judged_by(s)
        assert score.main(command) == 0
        result = last_json(capsys)
        assert (result["n"], result["num_completions"], result["ratings"]["num_answers"]) == (8, 16, 16)
        write_answers(path, only=("mt_bench/81/turn1", "mt_bench/81/turn2", "mt_bench/141/turn1"))
        assert score.main([*command, "allow_partial=true"]) == 0
        assert last_json(capsys)["num_missing"] == 5
        write_answers(path, only=("mt_bench/81/turn2",))
        with pytest.raises(UserError, match="cannot be judged without mt_bench/81/turn1"):
            score.main([*command, "allow_partial=true"])
    assert len(s.requests) == 16


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "judge_prompts.jsonl").unlink(), "no judge prompts beside"),
        (lambda f: write_rows(f / "judge_prompts.jsonl", [{"name": "x"}]), "single-v1, .* are missing"),
        (
            lambda f: write_rows(
                f / "judge_prompts.jsonl", [judge_prompt("single-v1", "{q}") | {"output_format": "A"}]
            ),
            "single-v1 is no judge prompt",
        ),
        (
            lambda f: write_rows(f / "judge_prompts.jsonl", [judge_prompt(name, "{q}") for name in PROMPTS]),
            "has a field that MT-Bench does not fill: 'q'",
        ),
        (lambda f: (f / "mt_bench" / "reference_answer" / "gpt-4.jsonl").unlink(), "no references beside"),
        (
            lambda f: write_rows(f / "mt_bench" / "reference_answer" / "gpt-4.jsonl", [{"question_id": 111}]),
            "row 0: no reference answer",
        ),
        (
            lambda f: write_rows(
                f / "mt_bench" / "reference_answer" / "gpt-4.jsonl",
                [{"question_id": 111, "choices": [{"turns": ["a", "b"]}]}],
            ),
            r"question 121 \(coding\) has no reference answer",
        ),
    ],
)
def test_damaged_judge_files(folder: Path, tmp_path: Path, damage, said: str) -> None:
    damage(folder)
    path = write_answers(tmp_path / "answers.jsonl")
    with pytest.raises(UserError, match=said):
        score.main(["--task", "mt_bench", "--completions", str(path), "--data", str(folder)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answers.jsonl", "fastchat"]


def test_without_a_judge_the_estimate_is_told_and_nothing_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in ("JUDGE_BASE_URL", "JUDGE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JUDGE_MODEL", "gpt-4-0613")
    path = write_answers(tmp_path / "answers.jsonl")
    with pytest.raises(UserError, match="JUDGE_API_KEY is not set"):
        score.main(["--task", "mt_bench", "--completions", str(path), "--data", str(folder)])
    assert "judge gpt-4-0613: 24 calls (0 of 24 judgements are on file)" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answers.jsonl", "fastchat"]


def test_keys_of_the_judge() -> None:
    options = score.read_options(
        ["judgements=5", "judge_temperature=none", "judge_max_tokens=none", "judge_parallel=9"], []
    )
    assert options.judge() == JudgeOptions(judgements=5, temperature=None, max_tokens=None, parallel=9)
    assert score.read_options([], []).judge() == JudgeOptions()
    for wrong in ("judgements=0", "judge_temperature=hot", "judge_max_tokens=-1", "judge_parallel=many"):
        with pytest.raises(UserError, match=wrong.split("=")[0]):
            score.read_options([wrong], [])


def test_spread_by_hand(folder: Path) -> None:
    items, _ = get_task("mt_bench").load(str(folder))
    ratings = [[[6.0, 8.0, -1.0]], [[2.0, 2.0, 5.0]]]  # two items, one sample, three judgements
    result = describe_ratings(items[:2], ratings)
    assert (result["turn1"], result["turn2"], result["overall"]) == (7, 3, 5)
    assert result["judgements"] == [4, 5, 5] and result["std"] == pytest.approx((1 / 3) ** 0.5)
    assert result["answer_std"] == pytest.approx((2**0.5 + 3**0.5) / 2)
