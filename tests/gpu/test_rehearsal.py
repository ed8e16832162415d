"""The checks of the GPU, run on the CPU: they can run, and their table is made."""

import os
import subprocess
import sys

import pytest


def rehearse(root, *words, minutes):
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu", *words]
    environment = os.environ | {"BA_LORA_GPU_CHECKS": "cpu", "CUDA_VISIBLE_DEVICES": "", "BA_LORA_GPU_MINUTES": minutes}
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout


@pytest.mark.slow
def test_the_checks_can_run(root):
    status, said = rehearse(root, minutes="600")
    assert status == 0, said[-4000:]
    table = said.partition("checks of the GPU")[2]
    checks = ("float32-all", "4_bit[loftq]", "two_processes_give_the_losses_of_one[one_gpu_gloo]", "[launcher]")
    for check in (*checks, "gradient_checkpointing", "pissa"):
        assert check in table
    for figure in ("TF32 is CUDA's", "fused: value ", "in chunks: value ", "of the best PiSSA's, floor ", ", target "):
        assert figure in table


@pytest.mark.slow
def test_checks_that_would_begin_too_late_are_named(root):
    status, said = rehearse(root, "-k", "half_precision or versions", minutes="0")
    table = said.partition("checks of the GPU")[2]
    assert status == pytest.ExitCode.NO_TESTS_COLLECTED and table.count("left out: it would begin after 0 minutes") == 3
