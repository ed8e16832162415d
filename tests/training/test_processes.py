"""The processes of one run: one takes the folder for all, and its error is everybody's."""

import os
import subprocess
import sys

import pytest

from ba_lora import processes
from ba_lora.errors import UserError
from ba_lora.processes import start_processes

WORKER = """
import sys
from ba_lora.config.layers import load_config
from ba_lora.errors import UserError, run_entry_point
from ba_lora.processes import on_main_process, start_processes

def claim(told):
    print("claimed")
    if told:
        raise UserError("the folder is taken")

def main():
    process = start_processes(load_config("configs/nlg/toy.yaml").trainer)
    assert process.num_processes == 2, process
    on_main_process(process, claim, told=sys.argv[1] == "fails")
    print(f"process {process.process_index} goes on")

run_entry_point(main)
"""


def test_the_backend_that_is_asked_for_is_opened(monkeypatch):
    """On CUDA accelerate takes NCCL where it is told none, which does not put two processes on one GPU."""
    opened = []
    monkeypatch.setattr(processes, "PartialState", lambda **settings: opened.append(settings["backend"]))
    for launched in (False, True):
        if launched:
            monkeypatch.setenv("LOCAL_RANK", "0")
        else:
            monkeypatch.delenv("LOCAL_RANK", raising=False)
        start_processes({"ddp_backend": "gloo"})
        start_processes({})
    assert opened == [None, None, "gloo", None]

    def refused(**_):
        raise ValueError("Your assigned backend ccl is not available, please use gloo")

    monkeypatch.setattr(processes, "PartialState", refused)
    with pytest.raises(UserError, match="trainer.ddp_backend=ccl: .* please use gloo"):
        start_processes({"ddp_backend": "ccl"})


@pytest.mark.parametrize(
    ("launcher", "what"),
    [
        ("cpu", "fails"),
        ("zero2", "works"),
        pytest.param("cpu", "works", marks=pytest.mark.slow),
        pytest.param("zero2", "fails", marks=pytest.mark.slow),
    ],
)
def test_one_process_claims_for_all(root, tmp_path, launcher, what):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--num_processes", "2"]
    command += ["--config_file", str(root / "configs" / "accelerate" / f"{launcher}.yaml"), str(worker), what]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment, timeout=3600)
    assert done.stdout.count("claimed") == 1, done.stderr
    if what == "works":
        assert done.returncode == 0, done.stderr
        assert sorted(line[8] for line in done.stdout.splitlines() if "goes on" in line) == ["0", "1"]
    else:
        assert done.returncode != 0 and "goes on" not in done.stdout
        assert done.stderr.count("error: the folder is taken") == 1 and "worker.py" not in done.stderr.split("====")[0]
