"""Training on the device, from config to export: every method, and every way that memory is saved."""

import importlib.util
import json
import sys

import pytest

from ba_lora.config.layers import available_methods
from ba_lora.io import read_json, read_jsonl
from ba_lora.runs.parity import FLOAT32_TOLERANCE
from tests.gpu.conftest import GPUS, NUM_GPUS
from tests.support.methods import CASES
from tests.support.slurm import free_ports

pytestmark = pytest.mark.gpu
STEPS = 3
LOSS_TOLERANCE = 1e-4  # relative, of float32 losses that are computed in another order


def losses(run) -> list[float]:
    return [entry["loss"] for entry in read_jsonl(run / "log.jsonl") if "loss" in entry]


def largest_difference(run, other) -> float:
    pairs = list(zip(losses(run), losses(other), strict=True))
    assert len(pairs) == STEPS
    return max(abs(one - two) / abs(two) for one, two in pairs)


@pytest.mark.parametrize("method", available_methods())
def test_every_method_trains_and_is_exported(on_device, figure, method):
    """With the options that a short run needs."""
    options, steps = ((), STEPS) if method not in CASES else (CASES[method].options, max(STEPS, CASES[method].steps))
    run = on_device("model.dtype=float32", f"trainer.max_steps={steps}", *options, method=method)
    told = read_json(run / "train.json")
    assert told["status"] == "ok" and len(losses(run)) == steps
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


@pytest.mark.parametrize("method", ["lora", "pissa", "ba_lora", "loftq"])
def test_a_base_in_4_bit(on_device, figure, method):
    """QLoRA, QPiSSA, Q-BA-LoRA and LoftQ: the merged model is the trained one, which is not the float parent."""
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    run = on_device("model.quantization=nf4", "model.dtype=float32", method=method)
    differences = read_json(run / "train.json")["export"]["max_logit_difference"]
    parent = differences["adapter" if method in ("lora", "loftq") else "lora"]
    figure(f"logits of the merged model off by {differences['merged']:.1e}, allowed {FLOAT32_TOLERANCE:.0e}")
    figure(f"from the unquantised base with the same adapter {parent:.2g}")
    assert differences["merged"] < FLOAT32_TOLERANCE < parent


@pytest.mark.parametrize("way", ["one_gpu_gloo", "launcher"])
def test_two_processes_give_the_losses_of_one(device, tmp_path, root, tiny_model, figure, finish, way):
    """The same six rows a step: three a process, or two micro-batches of three. By gloo both processes have the same
    GPU, as two machines with one GPU each would; the launcher gives each its own, by NCCL."""
    if way == "launcher" and device == "cuda" and NUM_GPUS < 2:
        pytest.skip("one GPU, and NCCL takes one process a GPU")
    shared = [
        "train_nlg.py", "--config", "configs/nlg/toy.yaml", "--method", "ba_lora", f"model.name={tiny_model}",
        "model.dtype=float32", "adapter.rank=4", "data.num_rows=24", "data.max_length=400", "trainer.max_steps=3",
        "trainer.logging_steps=1", "eval.tasks=[]", "trainer.per_device_train_batch_size=3",
        f"trainer.use_cpu={device == 'cpu'}", f"results_dir={tmp_path / 'results'}", "overwrite=true",
    ]  # fmt: skip
    two, one = (
        [*shared, f"output_dir={tmp_path / name}", f"name={name}", f"trainer.gradient_accumulation_steps={steps}"]
        for name, steps in (("two", 1), ("one", 2))
    )
    if way == "launcher":
        file = root / "configs" / "accelerate" / ("cpu.yaml" if device == "cpu" else "multi_gpu.yaml")
        launcher = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
        finish([sys.executable, *launcher, "--config_file", str(file), *two], environ=[{"CUDA_VISIBLE_DEVICES": GPUS}])
    else:
        world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
        command = [sys.executable, *two, "trainer.ddp_backend=gloo"]
        finish(command, command, environ=[world | {"RANK": rank} for rank in "01"])
    told = read_json(tmp_path / "two" / "train.json")["training"]
    assert told["num_processes"] == 2
    finish([sys.executable, *one])
    difference = largest_difference(tmp_path / "two", tmp_path / "one")
    figure(f"losses differ by {difference:.1e}, allowed {LOSS_TOLERANCE:.0e}")
    figure(json.dumps(losses(tmp_path / "two")))
    assert difference < LOSS_TOLERANCE
