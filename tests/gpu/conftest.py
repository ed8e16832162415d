"""The checks of `sh scripts/test.sh gpu`: each says a figure, and a table of all of them ends the run.

They run on CUDA. BA_LORA_GPU_CHECKS=cpu rehearses them on the CPU with smaller sizes, which proves that they can run
and that they measure what they say, not that CUDA does. No check begins after 8 minutes (BA_LORA_GPU_MINUTES), and a
process that a check has started is ended then. On CUDA outputs/gpu/ keeps the table of the
last whole run, checks.txt, and the bench's rows.
"""

import contextlib
import os
import signal
import subprocess
import time

import pytest
import torch

from ba_lora.io import write_text_atomic
from tests.conftest import ROOT

# The checks see one GPU: with several, Trainer would share a step out among them in one process, which ours refuses.
NUM_GPUS = torch.cuda.device_count()  # by NVML, which opens no CUDA context
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(NUM_GPUS)))
if NUM_GPUS > 1:
    os.environ["CUDA_VISIBLE_DEVICES"] = GPUS.split(",")[0]

STARTED = time.monotonic()
MINUTES = float(os.environ.get("BA_LORA_GPU_MINUTES", 8))
ORDER = ("machine", "loss", "cost", "training", "serving")  # what only a GPU can tell comes first
KEPT = ROOT / "outputs" / "gpu"
LEAST_S = 90.0  # with less time than this a process is not begun, and its end is no verdict
COMMAND_S = 240.0  # for one process on a GPU; the rehearsal's machine may be slower, and busy
FIGURES = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = [place for place, item in enumerate(items) if item.get_closest_marker("gpu")]
    checks = sorted((items[place] for place in places), key=lambda item: ORDER.index(item.path.stem[5:]))
    for place, item in zip(places, checks, strict=True):
        items[place] = item


def seconds_left() -> float:
    return 60 * MINUTES - (time.monotonic() - STARTED)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and seconds_left() <= 0:
        pytest.skip(f"left out: it would begin after {MINUTES:g} minutes; BA_LORA_GPU_MINUTES=30 gives them more")


@pytest.fixture(scope="session")
def device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("BA_LORA_GPU_CHECKS") != "cpu":
        pytest.skip("no CUDA device was found (BA_LORA_GPU_CHECKS=cpu rehearses the checks on the CPU)")
    return "cpu"


@pytest.fixture
def on_device(device: str, train):
    """`train` of tests/conftest.py on the device."""

    def run(*words: str, **settings):
        return train(*words, f"trainer.use_cpu={device == 'cpu'}", **settings)

    return run


@pytest.fixture
def finish(device: str, root, tmp_path):
    """Run commands side by side, for a limited time, after which nothing of them is left: `finish(command, …)`.

    The check is skipped where the time of all checks would soon be over.
    """

    def run(*commands: list[str], environ: list[dict[str, str]] | None = None) -> None:
        limit_s = COMMAND_S * (1 if device == "cuda" else 5)
        limit_s = min(limit_s, seconds_left())
        if limit_s < LEAST_S:
            pytest.skip(
                f"left out: it could not end within {MINUTES:g} minutes; BA_LORA_GPU_MINUTES=30 gives them more"
            )
        deadline = time.monotonic() + limit_s
        logs, started = [tmp_path / f"command{number}.log" for number in range(len(commands))], []
        try:
            for command, path, more in zip(commands, logs, environ or [{}] * len(commands), strict=True):
                settings = {"cwd": root, "env": os.environ | more, "start_new_session": True}
                with open(path, "w") as log:
                    started.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **settings))
            for process, path in zip(started, logs, strict=True):
                try:
                    status = process.wait(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    status = f"it did not end within {limit_s:.0f} s"
                assert status == 0, f"{process.args}: {status}\n{path.read_text()[-2000:]}"
        finally:
            for process in started:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    return run


@pytest.fixture
def figure(request: pytest.FixtureRequest):
    """`figure("…")`: what the check has measured, for the table."""
    told = request.node.stash.setdefault(FIGURES, [])
    return told.append


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    if item.get_closest_marker("gpu"):
        report.gpu_check = item.nodeid.partition("tests/gpu/")[2], "; ".join(item.stash.get(FIGURES, []))
    return report


def pytest_terminal_summary(terminalreporter) -> None:
    lines = []
    for outcome in ("passed", "failed", "skipped", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            name, told = getattr(report, "gpu_check", (None, ""))
            if not name or (outcome == "passed" and report.when != "call"):
                continue
            if outcome == "skipped":
                told = report.longrepr[2].removeprefix("Skipped: ")
            lines.append((name, {"passed": "ok", "skipped": "not run"}.get(outcome, outcome), told))
    if lines:
        terminalreporter.section("checks of the GPU")
        width = max(len(name) for name, _, _ in lines)
        table = [f"{name:<{width}}  {outcome:<7}  {told}" for name, outcome, told in lines]
        for line in table:
            terminalreporter.write_line(line)
        chosen = terminalreporter.config.option.keyword or any("::" in word for word in terminalreporter.config.args)
        if torch.cuda.is_available() and not chosen:
            write_text_atomic(KEPT / "checks.txt", "".join(f"{line}\n" for line in table))
