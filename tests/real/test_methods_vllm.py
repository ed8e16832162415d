"""Plain LoRAs of methods of every kind, served hot by the real vLLM together: transformers' own completions."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from tests.support.tiny import save_tiny_model, tiny_moe

pytestmark = [pytest.mark.real, pytest.mark.slow]
METHODS = ("rslora", "olora", "lora_ga", "eva", "monteclora", "dylora", "delta_lora", "lorta")
OPTIONS = {
    "lora_ga": ["adapter.options.rows=8"],
    "eva": ["adapter.options={rows: 16, batch_size: 4}"],
    "delta_lora": ["adapter.options.start=2"],
}


def completions(runs, engine):
    words = ["--task", "toy", "--data", f"toy={ROOT / 'data/toy/test.jsonl'}", "--engine", engine]
    more = ["limit=12", "max_new_tokens=24", "serve=hot", "overwrite=true", "max_model_len=512"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "eval.generate", "--model", *map(str, runs), *words, *more]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = {run.name: (run / "completions" / "toy.jsonl").read_text().splitlines() for run in runs}
    return {name: [json.loads(line)["completion"] for line in found] for name, found in lines.items()}


def test_an_adapter_on_the_attention_of_a_model_with_experts_is_served_hot(train, tmp_path):
    """A random Qwen3-MoE of 2 layers; `all-linear` leaves its fused experts out."""
    pytest.importorskip("vllm", reason="vLLM is not installed (BA_LORA_NO_VLLM=1, or no build for this machine)")
    base = save_tiny_model(tmp_path / "moe", model=tiny_moe())
    words = [f"model.name={base}", "trainer.max_steps=4", "trainer.learning_rate=0.05", "export.merged=false"]
    runs = [train(*words, method=method, name=method) for method in ("lora", "ba_lora")]
    theirs = completions(runs, "hf")
    if not torch.cuda.is_available():
        with pytest.raises(
            AssertionError, match="error: vLLM on a CPU cannot serve adapters on .*: with adapters its experts need"
        ):
            completions(runs, "vllm")
        return
    assert (ours := completions(runs, "vllm")) == theirs
    assert ours["lora"] != ours["ba_lora"] and any(ours["lora"])


def test_each_kind_of_plain_lora_is_served_hot(train):
    pytest.importorskip("vllm", reason="vLLM is not installed (BA_LORA_NO_VLLM=1, or no build for this machine)")
    runs = [
        train(
            "trainer.max_steps=4",
            "trainer.learning_rate=0.05",
            "export.merged=false",
            *OPTIONS.get(m, []),
            method=m,
            name=m,
        )
        for m in METHODS
    ]
    theirs, ours = completions(runs, "hf"), completions(runs, "vllm")
    assert ours == theirs
    assert len({json.dumps(texts) for texts in ours.values()}) >= 3, "they do not all answer alike"
