"""MT-Bench with the published files, and with a real OpenAI-compatible server: vLLM on the CPU as model and judge."""

import collections
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from ba_lora.io import read_json, read_jsonl
from eval import scoring
from eval.judge.client import NO_RATING, JudgeOptions
from eval.judge.store import Request
from eval.tasks import get_task
from eval.tasks.mt_bench import FILES, JUDGE_PROMPTS, locate, make_request, read_judge_prompts, read_references
from tests.support.judge_server import JudgeServer, completion

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 900  # 30 s on a free machine
pytestmark = pytest.mark.real


@pytest.fixture
def published(real_data: Path) -> Path:
    return real_data / "mt_bench"


def test_the_published_files(published: Path) -> None:
    from ba_lora.io import sha256_file

    items, _ = get_task("mt_bench").load(str(published))
    assert len(items) == 160 and [item.task_id for item in items[::159]] == ["mt_bench/81/turn1", "mt_bench/160/turn2"]
    assert set(collections.Counter(item.meta["category"] for item in items).values()) == {20}
    drawn = collections.Counter(get_task("mt_bench").temperature(item) for item in items)
    assert drawn == {0.0: 80, 0.1: 40, 0.7: 40}
    files = locate(published)
    assert {role: sha256_file(path) for role, path in files.items()} == {role: FILES[role][1] for role in FILES}
    references = read_references(files["references"])
    assert sorted(references) == [*range(101, 131)]  # reasoning, maths, coding
    assert set(read_judge_prompts(files["judge_prompts"])) == set(JUDGE_PROMPTS)


def requests(published: Path, answer: str) -> list[Request]:
    files = locate(published)
    prompts, references = read_judge_prompts(files["judge_prompts"]), read_references(files["references"])
    items, _ = get_task("mt_bench").load(str(published))
    texts = {(item.task_id, 0): answer for item in items}
    return [make_request(item, 0, texts, prompts=prompts, references=references) for item in items]


def test_the_judge_is_asked_what_fastchat_asks(published: Path) -> None:
    """The published templates, filled here by plain replacement from the raw files."""
    answer = "An {answer} with {braces} and\n[[3]]"
    raw = {row["name"]: row for row in read_jsonl(published / "judge_prompts.jsonl")}
    references = {
        row["question_id"]: row["choices"][0]["turns"]
        for row in read_jsonl(published / "mt_bench_reference_answer_gpt-4.jsonl")
    }
    asked = iter(requests(published, answer))
    for question in read_jsonl(published / "mt_bench_question.jsonl"):
        number, turns = question["question_id"], question["turns"]
        for turn in (1, 2):
            name = "single-math-v1" if number in references else "single-v1"
            prompt = raw[name + ("-multi-turn" if turn == 2 else "")]
            fields = {"question": turns[0], "question_1": turns[0], "question_2": turns[1], "answer": answer}
            fields |= {"answer_1": answer, "answer_2": answer}
            fields |= {f"ref_answer_{n}": text for n, text in enumerate(references.get(number, ()), start=1)}
            # field by field, so that braces in a text are not taken for fields
            parts, expected = prompt["prompt_template"], ""
            while parts:
                before, brace, rest = parts.partition("{")
                field, _, parts = rest.partition("}") if brace else ("", "", "")
                expected += before + (fields[field] if field else "")
            request = next(asked)
            assert (request.question_id, request.turn) == (number, turn)
            assert (request.system, request.user) == (prompt["system_prompt"], expected)


def test_a_whole_run_of_the_published_questions(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items, _ = get_task("mt_bench").load(str(published))
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps({"task_id": i.task_id, "completion": i.task_id}) + "\n" for i in items))
    options = scoring.ScoreOptions(judgements=1, judge_parallel=2)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with JudgeServer(lambda number, body: completion(f"Rating: [[{number % 10 + 1}]]")) as server:
        for name, value in server.environ.items():
            monkeypatch.setenv(name, value)
        result = scoring.score_file(get_task("mt_bench"), path, data=str(published), options=options)
        assert len(server.requests) == 160
    assert result["ratings"]["overall"] == pytest.approx(5.5) and result["metrics"]["rating"] == pytest.approx(0.55)
    assert result["invalid"] == 0 and len(result["groups"]["category"]) == 8


@contextlib.contextmanager
def vllm_server(model: Path, folder: Path, *, max_model_len: int) -> Iterator[str]:
    """Serve `model` with vLLM's OpenAI-compatible server; give its address; end it and its children."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    template = folder / "chat.jinja"
    template.write_text("{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "tiny-judge", "--dtype", "float32", "--max-model-len", str(max_model_len)]
    command += ["--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--chat-template", str(template), "--generation-config", "vllm"]
    environ = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environ, cwd=folder, start_new_session=True
        )
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while True:
                assert process.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()[
                    -3000:
                ]
                with contextlib.suppress(OSError):
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as reply:
                        if reply.status == 200:
                            break
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # whatever is left of it
            process.wait()


@pytest.mark.slow
def test_vllm_as_model_and_as_judge(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed (BA_LORA_NO_VLLM=1, or no build for this machine)")
    model = ROOT / "data" / "toy" / "clean"
    if not (model / "config.json").is_file():
        pytest.skip("data/toy/clean is not there")
    environ = os.environ | {"HF_HUB_OFFLINE": "1"}
    number = 24  # 12 questions: two categories, and a judge's context that not every prompt fits
    command = [sys.executable, "-m", "eval.generate", "--model", str(model), "--task", "mt_bench", "--engine", "vllm"]
    command += ["--data", str(published), "--output", str(tmp_path / "completions")]
    generated = subprocess.run(
        [*command, f"limit={number}", "max_new_tokens=48"], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    assert generated.returncode == 0, generated.stderr[-3000:]
    path = tmp_path / "completions" / "mt_bench.jsonl"
    rows = {row["task_id"]: row for row in read_jsonl(path)}
    assert len(rows) == number and read_json(path.with_name("mt_bench.meta.json"))["engine"] == "vllm"
    first, second = rows["mt_bench/81/turn1"], rows["mt_bench/81/turn2"]
    assert second["prompt"].startswith(f"{first['prompt']} {first['completion'].strip()}\n\n### Instruction:\n")

    with vllm_server(model, tmp_path, max_model_len=768) as url:
        for name, value in {"MODEL": "tiny-judge", "BASE_URL": url, "API_KEY": "none"}.items():
            monkeypatch.setenv(f"JUDGE_{name}", value)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        options = scoring.ScoreOptions(
            judgements=2, judge_parallel=4, judge_max_tokens=24, judge_temperature=1.0, allow_partial=True
        )
        started = time.monotonic()
        result = scoring.score_file(get_task("mt_bench"), path, options=options)
        judged_s = time.monotonic() - started
    assert result["n"] == number and result["judge"]["version"] == "tiny-judge"
    # nonsense: counted, no crash (a rating by chance is possible, but rare)
    judgements = read_jsonl(tmp_path / "judgements" / "mt_bench.jsonl")
    assert len(judgements) == result["judge"]["num_judgements"] >= number
    assert sum(row["rating"] == NO_RATING for row in judgements) == result["judge"]["num_invalid_judgements"]
    assert result["invalid"] > number * 0.8
    answered = [row for row in judgements if row["finish_reason"] in ("stop", "length")]
    assert answered and any(row["judgement"].strip() for row in answered)
    assert result["judge"]["num_prompt_too_long"] == len(judgements) - len(answered) > 0
    assert result["judge"]["prompt_tokens"] > 100 * len(answered)
    print(
        f"{len(answered)} judgements in {judged_s:.1f} s, {result['judge']['num_prompt_too_long']} prompts too long, "
        f"{result['invalid']} of {number} answers without a rating"
    )
    # the server is gone: what it said is on file
    assert scoring.score_file(get_task("mt_bench"), path, options=options)["ratings"] == result["ratings"]
    assert options.judge() == JudgeOptions(judgements=2, parallel=4, temperature=1.0, max_tokens=24)
