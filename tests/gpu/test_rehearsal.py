"""The checks of the GPU, run on the CPU: they can run, and their table is made."""

import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_checks_can_run(root):
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"]
    environment = os.environ | {"BA_LORA_GPU_CHECKS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:]
    table = done.stdout.partition("checks of the GPU")[2]
    for check in ("float32-all", "4_bit", "two_processes", "gradient_checkpointing", "pissa"):
        assert check in table
    assert "TF32 is CUDA's" in table and "fused: value " in table and "of its memory" in table
