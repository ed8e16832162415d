"""vLLM and transformers on the device: base, hot adapter and merged model give the same greedy completions."""

import importlib.util
import json
import sys

import pytest

pytestmark = pytest.mark.gpu


def test_vllm_answers_as_transformers_does(figure, finish, tmp_path, root):
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    from ba_lora.io import read_jsonl
    from ba_lora.prompts import build_prompt

    prompts = [build_prompt(row["query"]) for row in read_jsonl(root / "data" / "toy" / "test.jsonl")[:16]]
    request = {"model": str(root / "data" / "toy" / "clean"), "prompts": prompts, "max_model_len": 256}
    (tmp_path / "request.json").write_text(json.dumps(request | {"long_prompts": prompts[:2]}))
    worker = root / "tests" / "real" / "test_vllm_cpu.py"
    finish([sys.executable, str(worker), str(tmp_path)])
    answer = json.loads((tmp_path / "answer.json").read_text())
    pairs = {
        "base": (answer["vllm"]["free"], answer["hf"]["free"]),
        "hot adapter": (answer["vllm"]["adapter"], answer["hf"]["adapter"]),
        "hot adapter and merged model": (answer["vllm"]["adapter"], answer["merged"]),
    }
    for name, (ours, theirs) in pairs.items():
        alike = sum(one == two for one, two in zip(ours, theirs, strict=True))
        figure(f"{name}: {alike} of {len(ours)} alike")
        assert alike == len(ours)
    figure(f"vLLM starts in {answer['vllm_startup_seconds']:.0f} s")
