"""The whole chain on real input: a real pretrained Llama, real GSM8K, DeepSpeed on two processes, vLLM on the CPU.

So small a model solves nothing; what counts is that every stage runs and every figure is a fact.
"""

import json
import os
import subprocess

import pytest
import yaml

from tests.support.tiny import only_result

pytestmark = pytest.mark.real


def run_chain(root, real_data, folder, *, num_rows, limit, method, environment, overrides=()):
    """Run `sh scripts/ba-lora.sh` on a config written for the real data; return its result JSON and output."""
    config = folder / "gsm8k-tiny.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "model": {"name": str(real_data / "tiny_lm" / "stories260k_hd32"), "dtype": "float32"},
                "adapter": {"rank": 8},
                "data": {
                    "name": "gsm8k",
                    "source": str(real_data / "gsm8k" / "train.jsonl"),
                    "num_rows": num_rows,
                    "max_length": 512,
                },
                "trainer": {
                    "per_device_train_batch_size": 4,
                    "learning_rate": 1e-3,
                    "num_train_epochs": 1,
                    "logging_steps": 5,
                    "save_steps": 100,
                    "use_cpu": True,
                },
                "eval": {
                    "tasks": ["gsm8k"],
                    "data": {"gsm8k": str(real_data / "gsm8k" / "test.jsonl")},
                    "limit": limit,
                    "engine": "vllm",
                    "options": {"max_new_tokens": 128},
                },
            }
        )
    )
    command = ["sh", "scripts/ba-lora.sh", str(config), f"method={method}", *overrides]
    command += [f"output_dir={folder / 'run'}", f"results_dir={folder / 'results'}"]
    done = subprocess.run(
        command,
        cwd=root,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return only_result(folder / "results"), done.stdout


def check(result, *, num_rows, limit, processes):
    assert result["status"] == "ok"
    data, training = result["data"], result["training"]
    assert data["rows_chosen"] == num_rows and data["rows_used"] + data["rows_dropped"] == num_rows
    assert data["rows_cut"] + data["rows_dropped"] > 0.1 * num_rows  # 512 words for everything: many rows do not fit
    assert training["num_processes"] == processes and training["steps"] == -(-data["rows_used"] // (4 * processes))
    assert set(training["last_log"]) >= {"task", "consistency", "diversity", "svd", "share_svd"}
    assert max(result["export"]["max_logit_difference"].values()) < 1e-3
    score = result["evaluation"]["gsm8k"]
    assert score["n"] == limit and 0 <= score["metrics"]["strict"] <= score["metrics"]["flexible"] <= 1
    assert score["generation"]["engine"] == "vllm" and len(score["data_sha256"]) == 64


@pytest.mark.slow
def test_deepspeed_zero2_then_vllm(root, real_data, tmp_path):
    zero2 = {"ACCELERATE_CONFIG": "configs/accelerate/zero2.yaml", "NUM_PROCESSES": "2"}
    result, output = run_chain(
        root, real_data, tmp_path, num_rows=80, limit=10, method="ba_lora_iclr2026", environment=zero2
    )
    check(result, num_rows=80, limit=10, processes=2)
    assert result["method"] == "ba_lora_iclr2026" and " cut to 512 tokens" in output


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ba_lora", "lora"])
def test_deepspeed_zero3(root, real_data, tmp_path, method):
    """Weights split over two processes: PiSSA's factors, reference, svd term and export need them whole."""
    zero3 = {"ACCELERATE_CONFIG": "configs/accelerate/zero3.yaml", "NUM_PROCESSES": "2"}
    result, _ = run_chain(
        root,
        real_data,
        tmp_path,
        num_rows=40,
        limit=4,
        method=method,
        environment=zero3,
        overrides=["eval.engine=hf", "eval.options.max_new_tokens=16"],
    )
    assert result["status"] == "ok" and result["training"]["num_processes"] == 2
    assert max(result["export"]["max_logit_difference"].values()) < 1e-3
    assert (tmp_path / "run" / "merged" / "model.safetensors").is_file()
    if method == "ba_lora":
        assert set(result["training"]["last_log"]) >= {"consistency", "diversity", "svd"}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ba_lora", "ba_lora_iclr2026"])
def test_the_full_sized_chain(root, real_data, tmp_path, method):
    """2000 training rows, 100 test rows; DeepSpeed ZeRO-2 for one version, one process for the other."""
    zero2 = {"ACCELERATE_CONFIG": "configs/accelerate/zero2.yaml", "NUM_PROCESSES": "2"}
    environment = zero2 if method == "ba_lora" else {}
    result, _ = run_chain(root, real_data, tmp_path, num_rows=2000, limit=100, method=method, environment=environment)
    check(result, num_rows=2000, limit=100, processes=2 if environment else 1)
    print(json.dumps({key: result[key] for key in ("method", "data", "training", "evaluation")}))
