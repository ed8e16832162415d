"""Two machines: one run as on one machine with two processes; a lost machine is named, and the same command goes on."""

import base64
import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml

from ba_lora.config.layers import load_config
from ba_lora.errors import UserError
from ba_lora.runs import machines
from ba_lora.runs.environment import environment
from ba_lora.runs.machines import RunMachine
from tests.support import two_nodes as support
from tests.support.slurm import free_ports
from tests.support.tiny import only_result

LOST_AFTER_S = 20  # a busy machine keeps a living process waiting for some seconds
TOLD_AFTER_S = LOST_AFTER_S + 60  # and the end of all processes for some more


@pytest.fixture
def nodes(tmp_path):
    if reason := support.missing():
        pytest.skip(reason)
    with support.two_nodes(tmp_path) as made:
        yield made


@pytest.fixture
def base(tiny_model, tmp_path):
    """A BA-LoRA run of a few seconds with a PiSSA factors cache and a reference cache."""
    trainer = {"per_device_train_batch_size": 2, "max_steps": 60, "save_steps": 10, "learning_rate": 0.01}
    settings = {
        "model": {"name": str(tiny_model), "dtype": "float32"},
        "adapter": {"rank": 4},
        "data": {"name": "toy", "num_rows": 40, "max_length": 400},
        "trainer": trainer | {"logging_steps": 1, "disable_tqdm": True, "use_cpu": True},
        "eval": {"tasks": [], "untuned": False},
        "export": {"merged": False},
    }
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def words(base, folder, name, *more):
    caches = [f"reference.cache={folder}/{name}-reference", f"adapter.factors_cache={folder}/{name}-factors"]
    places = [f"output_dir={folder}/{name}", f"results_dir={folder}/{name}-results"]
    return ["sh", "scripts/ba-lora.sh", str(base), *caches, *places, *more]


def start(nodes, command, launcher, *, attempt="", **settings):
    settings = {"ACCELERATE_CONFIG": f"configs/accelerate/{launcher}.yaml", "OMP_NUM_THREADS": "1"} | settings
    settings.setdefault("BA_LORA_LOST_AFTER", str(LOST_AFTER_S))
    logs = [nodes.folder / f"log{rank}{attempt}" for rank in range(2)]
    return [nodes.start(rank, command, logs[rank], **settings) for rank in range(2)], logs


def ended(processes, logs, *, seconds=900):
    """Wait for both; return their exit statuses and what they said."""
    deadline = time.monotonic() + seconds
    try:
        statuses = [process.wait(max(1.0, deadline - time.monotonic())) for process in processes]
    finally:
        said = [log.read_text() for log in logs]
        print(*(text[-3000:] for text in said), sep="\n=====\n")
    return statuses, said


def one_node(root, command, launcher):
    settings = {
        "ACCELERATE_CONFIG": f"configs/accelerate/{launcher}.yaml",
        "NUM_PROCESSES": "2",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=root, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def until(holds, processes, *, seconds=600):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.05)


def losses(run):
    entries = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return {entry["step"]: (entry["loss"], entry["task"], entry["grad_norm"]) for entry in entries if "loss" in entry}


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "failure"), [("cpu", "cut link"), ("zero2", "killed node")])
def test_two_nodes_are_one_run_also_over_a_failure(nodes, base, tmp_path, root, launcher, failure):
    """Same losses as on one node; each process ends in time and says which rank was lost; the same command goes on.
    Each file of the caches is made once, those of PiSSA's factors by the first rank."""
    two, one = (words(base, tmp_path, name) for name in ("two", "one"))
    noted = {"PYTHONPATH": f"{root}:{root / 'tests' / 'workers' / 'noted'}", "NOTED": str(tmp_path / "noted")}
    processes, logs = start(nodes, two, launcher, **noted)
    until((tmp_path / "two" / "checkpoints" / "checkpoint-10" / "files.json").is_file, processes)
    broken = time.monotonic()
    if failure == "cut link":
        nodes.link("down")
    else:
        nodes.kill(1)
    statuses, said = ended(processes, logs, seconds=TOLD_AFTER_S)
    print(f"{failure}: all have ended after {time.monotonic() - broken:.0f} s")
    assert all(statuses) and time.monotonic() - broken < TOLD_AFTER_S
    assert re.search(r"^error: .*rank 1 on node1 (was lost|has ended)", said[0], flags=re.M)
    if failure == "cut link":
        assert re.search(
            r"^error: node0 \(rank 0\), which holds the meeting point, cannot be reached", said[1], flags=re.M
        )
        nodes.link("up")
    assert not [
        file
        for file in (tmp_path / "two").rglob("*.safetensors")
        if "checkpoints" not in file.parts and "initial" not in file.parts
    ]

    statuses, said = ended(*start(nodes, two, launcher, attempt="again", **noted))
    assert statuses == [0, 0] and re.search(r"resumed from step \d+ of 60", said[0])
    one_node(root, one, launcher)
    ours, theirs = (losses(tmp_path / name) for name in ("two", "one"))
    assert ours.keys() == theirs.keys() == set(range(1, 61))
    for step in theirs:
        assert ours[step] == pytest.approx(theirs[step], rel=1e-6, abs=1e-6), step
    result = only_result(tmp_path / "two-results")
    assert result["environment"]["num_machines"] == 2 and result["training"]["num_processes"] == 2
    assert only_result(tmp_path / "one-results")["environment"]["num_machines"] == 1
    assert len(list((tmp_path / "two" / "adapter").glob("*.safetensors"))) == 1 and (tmp_path / "two" / "lora").is_dir()
    files = [
        sorted(file.name for file in (tmp_path / f"{name}-factors").glob("*.safetensors")) for name in ("two", "one")
    ]
    assert files[0] == files[1] != []
    lines = [line.split(" ", 1) for line in (tmp_path / "noted").read_text().splitlines()]
    made = [(rank, Path(file)) for rank, file in lines]
    for kind, ranks in (("reference", {"0", "1"}), ("factors", {"0"})):
        there = [path.name for path in (tmp_path / f"two-{kind}").glob("*.safetensors")]
        by_rank = [(rank, file.name) for rank, file in made if file.parent.name == f"two-{kind}"]
        print(kind, by_rank)
        assert sorted(name for _, name in by_rank if name.endswith(".safetensors")) == sorted(there) != []
        assert {rank for rank, _ in by_rank} <= ranks


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["cut link", "killed", "error"])
def test_who_was_lost_is_told_in_time(nodes, tmp_path, root, failure):
    """The processes by themselves, without a training: the collective operation would wait for ten minutes."""
    logs, more = [tmp_path / f"log{rank}" for rank in range(2)], ["fail", "1"] if failure == "error" else []
    command = [sys.executable, str(root / "tests" / "workers" / "watched.py"), str(tmp_path), *more]
    settings = {"PYTHONPATH": str(root), "BA_LORA_LOST_AFTER": str(LOST_AFTER_S), "OMP_NUM_THREADS": "1"}
    settings |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    processes = [
        nodes.start(rank, command, logs[rank], RANK=str(rank), HOST=f"node{rank}", **settings) for rank in range(2)
    ]
    if failure != "error":
        until(lambda: (tmp_path / "pid1").is_file() and (tmp_path / "pid0").is_file(), processes)
        time.sleep(3)
        nodes.link("down") if failure == "cut link" else os.kill(int((tmp_path / "pid1").read_text()), signal.SIGKILL)
    broken = time.monotonic()
    statuses, said = ended(processes, logs)
    took_s = time.monotonic() - broken
    print(f"{failure}: all have ended after {took_s:.0f} s")
    lost = "rank 1 on node1 was lost: no sign of life for"
    if failure == "error":
        assert statuses == [2, 2] and "error: its disk is full" in said[1]
        assert "error: rank 1 on node1 has ended: its disk is full" in said[0]
    else:
        assert statuses[0] in (1, 2) and f"error: {lost}" in said[0] and "seen from rank 0 on node0" in said[0]
        assert took_s < TOLD_AFTER_S
    if failure == "killed":  # its broken connections are seen before its silence is long enough
        assert f"error: {lost} {LOST_AFTER_S / 3:.0f} s" in said[0]
    if failure == "cut link":
        told = "error: node0 (rank 0), which holds the meeting point, cannot be reached: no sign of life for"
        assert statuses[1] == 1 and told in said[1]


@pytest.mark.slow
def test_torchrun_starts_again_after_a_lost_process(nodes, base, tmp_path):
    """MAX_RESTARTS=2: one process is killed, all start again from the last checkpoint, nobody types anything."""
    command = words(base, tmp_path, "two")
    processes, logs = start(nodes, command, "cpu", MAX_RESTARTS="2", BA_LORA_LOST_AFTER="120")
    until((tmp_path / "two" / "checkpoints" / "checkpoint-10" / "files.json").is_file, processes)
    workers = [pid for pid in nodes.pids(1) if "RANK" in psutil.Process(pid).environ()]
    assert workers
    os.kill(workers[0], signal.SIGKILL)
    statuses, said = ended(processes, logs)
    assert statuses == [0, 0] and any(re.search(r"resumed from step \d+ of 60", text) for text in said)
    assert (
        set(losses(tmp_path / "two")) == set(range(1, 61)) and only_result(tmp_path / "two-results")["status"] == "ok"
    )


@pytest.mark.slow
def test_a_node_that_is_told_something_else_is_refused_by_name(nodes, base, tmp_path):
    logs = [tmp_path / f"log{rank}" for rank in range(2)]
    settings = {"ACCELERATE_CONFIG": "configs/accelerate/cpu.yaml", "OMP_NUM_THREADS": "1"}
    commands = [words(base, tmp_path, "two"), words(base, tmp_path, "two", "adapter.rank=2")]
    processes = [nodes.start(rank, commands[rank], logs[rank], **settings) for rank in range(2)]
    statuses, said = ended(processes, logs)
    line = "machine node1 (rank 1) sees another config than the first, node0 (rank 0): adapter.rank 4 → 2"
    assert all(statuses) and f"error: {line}" in said[0] and not (tmp_path / "two").exists()


def seen(**changes):
    first = {"commit": "a" * 40, "files": {"a.py": "1"}, "settings": {"seed": 1}, "data": {"rows.json": "1"}}
    return RunMachine("second", [2, 3], **(first | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"commit": "b" * 40}, "sees commit bbbbbbbbbb, the first, first (rank 0 to 1), aaaaaaaaaa"),
        ({"commit": None}, "sees commit none, the first"),
        ({"files": {"a.py": "2"}}, "sees other code than the first, first (rank 0 to 1), in a.py:"),
        ({"files": {"a.py": "1", "b.py": "1"}}, "in b.py:"),
        ({"settings": {"seed": 2}}, "sees another config than the first, first (rank 0 to 1): seed 1 → 2:"),
        ({"data": {"rows.json": None}}, "sees other data than the first, first (rank 0 to 1): rows.json differs"),
    ],
)
def test_what_a_machine_sees_is_compared_with_the_first(changes, message):
    first = seen()
    first.host, first.ranks = "first", [0, 1]
    fault = machines._difference(first, seen(**changes))
    assert fault is None if message is None else fault.startswith("machine second (rank 2 to 3) ") and message in fault


def test_rows_are_compared_whatever_their_pieces_are():
    from datasets import Dataset, concatenate_datasets

    rows = [{"ids": [1, 2, 3], "text": "a", "row": 0}, {"ids": [4], "text": None, "row": 1}]
    whole, parts = Dataset.from_list(rows), concatenate_datasets([Dataset.from_list([row]) for row in rows])
    assert machines._rows_hash(whole) == machines._rows_hash(parts) == machines._rows_hash(whole.select([0, 1]))
    for changed in (
        [*rows[:1], rows[1] | {"ids": [5]}],
        [rows[0] | {"ids": [1, 2]}, rows[1] | {"ids": [3, 4]}],
        rows[::-1],
    ):
        assert machines._rows_hash(Dataset.from_list(changed)) != machines._rows_hash(whole)


@pytest.mark.parametrize(("waits", "is_lost"), [([5.0] * 20, True), ([5.0, 600.0, *[5.0] * 11], False)])
def test_a_process_that_was_suspended_takes_no_other_for_lost(waits, is_lost, monkeypatch, capsys):
    """After 60 s of silence another one is lost, but a process's own 600 s do not count."""
    clock, waits = [0.0], iter(waits)

    def wait(seconds):
        passed = next(waits, None)
        clock[0] += passed or 0.0
        return passed is None  # then it has ended

    watch = object.__new__(machines.Watch)
    watch.rank, watch.machines, watch.beat_s, watch.lost_after_s = (
        0,
        [RunMachine("a", [0]), RunMachine("b", [1])],
        5,
        60,
    )
    watch._changed, watch._answered, watch._ended = {0: 0.0, 1: 0.0}, math.inf, SimpleNamespace(wait=wait)
    monkeypatch.setattr(machines, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(machines, "os", SimpleNamespace(_exit=sys.exit))
    with pytest.raises(SystemExit) if is_lost else contextlib.nullcontext():
        watch._guard()
    assert ("rank 1 on b was lost" in capsys.readouterr().err) == is_lost


def test_a_watch_that_has_ended_leaves_its_last_word_and_no_thread_in_torch(monkeypatch):
    """A thread that came back from torch's C++ code while Python ended aborted the process: no status 2."""
    (port,) = free_ports(1)
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True)
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "BA_LORA_LOST_AFTER": "6"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    process = SimpleNamespace(process_index=0, num_processes=1, wait_for_everyone=lambda: None)
    watch = machines.Watch(process, [RunMachine("a", [0])])
    watch.end("its disk is full")
    assert not watch._beating.is_alive()
    assert store.get("ba_lora/alive//0/0").decode() == f"{machines.ENDED} its disk is full"
    watch.end()  # well: it is the cause of nothing
    assert store.get("ba_lora/alive//0/0").decode() == machines.ENDED


@pytest.mark.parametrize("text", ["1 min", "0", "inf"])
def test_the_seconds_to_wait_for_a_sign_are_a_number(text, monkeypatch):
    monkeypatch.setenv("BA_LORA_LOST_AFTER", text)
    with pytest.raises(UserError, match=f"BA_LORA_LOST_AFTER={text}: a number of seconds above 0"):
        machines._lost_after_s()


@pytest.mark.slow
def test_deepspeeds_own_launcher_on_two_machines(base, tmp_path, root):
    """It does not say how many processes a machine has. Here both are this one."""
    world = base64.urlsafe_b64encode(json.dumps({"a": [0], "b": [0]}).encode()).decode()
    command = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--master_addr=127.0.0.1"]
    words = ["train_nlg.py", "--config", str(base), f"output_dir={tmp_path}/run", f"results_dir={tmp_path}/results"]
    (port,), environ = free_ports(1), os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [*command, f"--master_port={port}", f"--node_rank={rank}", *words, "trainer.max_steps=2"],
            cwd=root, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    told = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], told[0][-3000:]
    found = only_result(tmp_path / "results")["environment"]
    assert (found["num_machines"], found["num_processes"]) == (2, 2)


@pytest.mark.parametrize(
    ("places", "gpus", "ranks", "num_gpus"),
    [
        ([0, 1, 0, 1, 2], [None] * 5, [[0, 1], [2, 3, 4]], [0, 0]),
        ([0, 1, 0, 1, 2], ["a", "b", "c", "d", "d"], [[0, 1], [2, 3, 4]], [2, 2]),
        ([0, 1], ["a", "a"], [[0, 1]], [1]),
        ([0, 0], ["a", "a"], [[0], [1]], [1, 0]),
    ],
)
def test_the_machines_of_a_run_are_found_whatever_the_launcher_says(places, gpus, ranks, num_gpus, monkeypatch):
    """And their GPUs that are used: two processes may have one."""
    told = list(zip(places, gpus, strict=True))
    monkeypatch.setattr(machines, "gather_object", lambda own: told if isinstance(own[0], tuple) else own)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    config, found = load_config("toy"), []
    for rank in (rank for rank, place in enumerate(places) if place == 0):
        process = SimpleNamespace(
            num_processes=len(places), process_index=rank, local_process_index=0, device=torch.device("cpu")
        )
        found += machines.meet(process, config)
    assert [machine.ranks for machine in found] == ranks and [machine.num_gpus for machine in found] == num_gpus
    assert {machine.gpu for machine in found} == {"a GPU" if any(gpus) else None}


def test_the_id_of_a_gpu_is_asked_of_the_process_own_device(monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: asked.append(device) or SimpleNamespace(uuid="GPU-1")
    )
    assert machines._gpu_id(SimpleNamespace(device=torch.device("cuda:1"))) == "GPU-1"
    assert machines._gpu_id(SimpleNamespace(device=torch.device("cpu"))) is None and asked == [torch.device("cuda:1")]


def test_a_result_counts_the_gpus_of_all_machines():
    found = environment(num_processes=12, num_gpus=[8, 4])
    assert (found["hardware"]["num_gpus"], found["num_machines"], found["num_processes"]) == (12, 2, 12)
    assert environment()["num_machines"] == 1
