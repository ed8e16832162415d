"""Training on the device, from config to export: every method, and every way that memory is saved."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from ba_lora.config.layers import available_methods
from ba_lora.io import read_json, read_jsonl

pytestmark = pytest.mark.gpu
REHEARSED = ("ba_lora", "full_ft", "lora")  # on the CPU, where tests/ trains all of them in its own ways
LOSS_TOLERANCE = 1e-4  # relative, of float32 losses that are computed in another order


def losses(run) -> list[float]:
    return [entry["loss"] for entry in read_jsonl(run / "log.jsonl") if "loss" in entry]


def largest_difference(run, other) -> float:
    pairs = list(zip(losses(run), losses(other), strict=True))
    assert len(pairs) == 3
    return max(abs(one - two) / abs(two) for one, two in pairs)


@pytest.mark.parametrize("method", available_methods())
def test_every_method_trains_and_is_exported(device, on_device, figure, method):
    if device == "cpu" and method not in REHEARSED:
        pytest.skip("the rehearsal trains three methods")
    run = on_device("model.dtype=float32", method=method)
    told = read_json(run / "train.json")
    assert told["status"] == "ok" and len(losses(run)) == 3
    differences = told["export"]["max_logit_difference"]
    figure(f"loss {losses(run)[0]:.3f} → {losses(run)[-1]:.3f}")
    figure("logits of the exports off by " + ", ".join(f"{name} {value:.1e}" for name, value in differences.items()))
    figure(f"{told['training']['peak_memory_mb']:.0f} MiB")


@pytest.mark.parametrize(
    "words", ["trainer.gradient_checkpointing=true", "data.packing=true", "loss.implementation=plain"]
)
def test_another_way_to_the_same_losses(on_device, figure, words):
    """float32 throughout, so that only the order of additions differs."""
    usual, other = on_device(name="usual"), on_device(words, name="other")
    difference = largest_difference(other, usual)
    figure(f"losses differ by {difference:.1e}, allowed {LOSS_TOLERANCE:.0e}")
    assert difference < LOSS_TOLERANCE


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_packed_rows_in_bfloat16(device, on_device, figure, attention):
    if attention == "flash_attention_2" and (device == "cpu" or importlib.util.find_spec("flash_attn") is None):
        pytest.skip("flash-attn is not installed" if device == "cuda" else "flash-attn needs CUDA")
    words = ("model.dtype=bfloat16", f"model.attention={attention}")
    difference = largest_difference(
        on_device(*words, "data.packing=true", name="packed"), on_device(*words, name="padded")
    )
    figure(f"losses differ by {difference:.1e}, allowed 2e-02")
    assert difference < 0.02


@pytest.mark.parametrize("method", ["lora", "pissa", "ba_lora"])
def test_a_base_in_4_bit(on_device, figure, method):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    export = read_json(on_device("model.quantization=nf4", method=method) / "train.json")["export"]
    figure(f"logits of the merged model off by {export['max_logit_difference']['merged']:.1e}")
    figure(f"from the float parent {export['unquantized_logit_difference']:.2g}")


def test_two_processes_give_the_losses_of_one(device, tmp_path, root, tiny_model, figure):
    """The same six rows a step: three a process, or two micro-batches of three."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU, and NCCL takes one process a GPU: `sh scripts/test.sh` compares two on the CPU")
    shared = [
        f"model.name={tiny_model}", "model.dtype=float32", "adapter.rank=4", "data.num_rows=24",
        "data.max_length=400", "trainer.max_steps=3", "trainer.logging_steps=1", "eval.tasks=[]",
        "trainer.per_device_train_batch_size=3", f"trainer.use_cpu={device == 'cpu'}",
    ]  # fmt: skip
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    launcher += ["--config_file", str(root / "configs" / "accelerate" / ("cpu" if device == "cpu" else "multi_gpu"))]
    launcher[-1] += ".yaml"
    runs = []
    for name, launch, accumulation in (("two", launcher, 1), ("one", [], 2)):
        words = [f"output_dir={tmp_path / name}", f"results_dir={tmp_path / 'results'}", "overwrite=true"]
        words += [f"trainer.gradient_accumulation_steps={accumulation}", "name=" + name]
        command = [sys.executable, *launch, "train_nlg.py", "--config", "configs/nlg/toy.yaml", "--method", "ba_lora"]
        done = subprocess.run([*command, *shared, *words], cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        runs.append(tmp_path / name)
    difference = largest_difference(*runs)
    figure(f"losses differ by {difference:.1e}, allowed {LOSS_TOLERANCE:.0e}")
    figure(json.dumps(losses(runs[0])))
    assert difference < LOSS_TOLERANCE
