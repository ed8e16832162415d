"""CodeFeedback → HumanEval and MBPP, WizardLM → MT-Bench: the base config's variants, end to end at tiny size.

The training rows are real instructions in the sets' own columns; the model is the toy's, which knows no Python: what
counts is that every stage runs and every figure is a fact.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ba_lora.io import read_jsonl
from eval.sandbox.jobs import Limits
from tests.support.boxes import needs_bubblewrap
from tests.support.judge_server import JudgeServer, completion
from tests.support.tiny import only_result

pytestmark = [pytest.mark.real, pytest.mark.slow]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train_and_evaluate(root: Path, folder: Path, *overrides: str, environ: dict[str, str] | None = None) -> dict:
    """Run configs/nlg/llama-2-7b.yaml through the pipeline on the toy's base, and return the result."""
    command = [sys.executable, "-m", "ba_lora.experiments.pipeline", "configs/nlg/llama-2-7b.yaml", *overrides]
    command += ["model.name=data/toy/clean", "model.revision=null", "model.dtype=float32", "adapter.rank=4"]
    command += ["data.num_rows=48", "trainer.gradient_accumulation_steps=8", "trainer.bf16=false"]
    command += ["trainer.use_cpu=true", "trainer.learning_rate=1e-3", "eval.engine=hf", "eval.untuned=false"]
    command += [f"output_dir={folder / 'run'}", f"results_dir={folder / 'results'}"]
    done = subprocess.run(
        command,
        cwd=root,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"} | (environ or {}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    result = only_result(folder / "results")
    assert result["status"] == "ok" and result["data"]["rows_chosen"] == 48 and result["training"]["steps"] > 0
    return result


@needs_bubblewrap
def test_codefeedback_to_humaneval_and_mbpp(root: Path, real_data: Path, tmp_path: Path) -> None:
    rows = json.loads((real_data / "instruct" / "code_alpaca_2k.json").read_text(encoding="utf-8"))
    pairs = [{"query": f"{row['instruction']}\n{row['input']}".strip(), "answer": row["output"]} for row in rows]
    source = write_rows(tmp_path / "code.jsonl", pairs)
    mbpp = real_data / "mbpp" / "mbpp.jsonl"
    result = train_and_evaluate(
        root, tmp_path, "data.name=codefeedback", f"data.source={source}", "eval.tasks=[humaneval,mbpp]",
        f"eval.data={{mbpp: {mbpp}}}", "eval.limit=3", "eval.options={max_new_tokens: 24}",
    )  # fmt: skip
    assert result["data"]["name"] == "codefeedback"
    humaneval, mbpp = result["evaluation"]["humaneval"], result["evaluation"]["mbpp"]
    assert (humaneval["n"], humaneval["num_completions"], humaneval["num_missing"]) == (3, 15, 161)
    assert humaneval["choices"]["protocol"] == "paper2024"
    drawn = humaneval["generation"]["sampling"]
    assert (drawn["temperature"], drawn["top_p"], drawn["num_samples"]) == (0.8, 0.95, 5)
    assert set(humaneval["metrics"]) == {"strict", "pass@1", "pass@5"}
    assert (mbpp["n"], mbpp["num_completions"], mbpp["num_missing"]) == (3, 3, 497)
    assert mbpp["generation"]["sampling"]["temperature"] == 0
    for score in (humaneval, mbpp):
        assert score["sandbox"]["kind"] == "bubblewrap" and score["partial"]
        assert score["sandbox"]["limits"]["memory_bytes"] == Limits.memory_bytes
    prompts = [row["prompt"] for row in read_jsonl(tmp_path / "run" / "completions" / "humaneval.jsonl")]
    assert all(prompt.endswith("### Response:\n```python\n") for prompt in prompts)


def test_wizardlm_to_mt_bench(root: Path, real_data: Path, tmp_path: Path) -> None:
    rows = read_jsonl(real_data / "instruct" / "self_instruct_user_oriented_252.jsonl")
    talks = [
        [
            {"from": "human", "value": f"{row['instruction']}\n{row['instances'][0]['input']}".strip()},
            {"from": "gpt", "value": row["instances"][0]["output"]},
        ]
        for row in rows
    ]
    source = write_rows(tmp_path / "chat.jsonl", [{"conversations": talk} for talk in talks])
    questions = real_data / "mt_bench" / "mt_bench_question.jsonl"
    with JudgeServer(lambda number, body: completion("Poor. Rating: [[2]]")) as server:
        result = train_and_evaluate(
            root, tmp_path, "data.name=wizardlm", f"data.source={source}", "eval.tasks=[mt_bench]",
            f"eval.data={{mt_bench: {questions}}}", "eval.limit=4", "eval.options={max_new_tokens: 24}",
            environ=server.environ,
        )  # fmt: skip
        assert len(server.requests) == 4 * 3
    score = result["evaluation"]["mt_bench"]
    assert (score["n"], score["num_missing"], score["invalid"]) == (4, 156, 0)
    assert score["ratings"]["overall"] == 2 and score["metrics"]["rating"] == pytest.approx(0.2)
    assert score["judge"]["model"] == "judge-1" and score["judge"]["num_judgements"] == 12
    answers = {row["task_id"]: row for row in read_jsonl(tmp_path / "run" / "completions" / "mt_bench.jsonl")}
    assert answers["mt_bench/81/turn1"]["completion"].strip() in answers["mt_bench/81/turn2"]["prompt"]
