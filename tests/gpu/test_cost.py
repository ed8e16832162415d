"""What a step costs beside PiSSA's, and what a 7B shape takes: scripts/bench.py on the device."""

import json
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.gpu
NEEDED_GIB = 60  # of the 7B shape in bfloat16: weights, their SVDs, activations of 16 × 512 tokens, checkpointed


def rows(root, tmp_path, *words):
    command = [sys.executable, "scripts/bench.py", "--results", str(tmp_path / "bench.csv"), *words]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_steps_beside_pissa(device, figure, root, tmp_path):
    shape = "toy" if device == "cpu" else "default"
    words = ["--vocab", "32000"] if device == "cuda" else []
    measured = rows(root, tmp_path, "--device", device, "--shape", shape, "--repeats", "5", *words)
    found = {row["case"]: row for row in measured}
    assert {"pissa", "plain", "fused", "fused_cache", "packed"} <= set(found)
    for case, row in found.items():
        figure(
            f"{case} {1000 * row['step_s']:.0f} ms = {row['step_ratio']:.2f}, {row['memory_ratio']:.2f} of its memory"
        )
        assert row["step_s"] > 0 and row["peak_mb"] > 0


def test_a_7b_shape_fits(device, figure, root, tmp_path):
    if device == "cpu":
        pytest.skip("needs a GPU")
    if (there := torch.cuda.get_device_properties(0).total_memory / 2**30) < NEEDED_GIB:
        pytest.skip(f"needs {NEEDED_GIB} GiB of GPU memory, {there:.0f} are there")
    words = ["--device", "cuda", "--shape", "llama2-7b", "--cases", "fused", "--repeats", "2", "--warmup", "1"]
    for row in rows(root, tmp_path, *words):
        figure(f"{row['case']} {row['peak_mb'] / 1024:.1f} GiB, {row['step_s']:.2f} s a step")
