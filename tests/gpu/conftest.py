"""The checks of `sh scripts/test.sh gpu`: each says a figure, and a table of all of them ends the run.

They run on CUDA. BA_LORA_GPU_CHECKS=cpu rehearses them on the CPU with smaller sizes, which proves that they can run
and that they measure what they say, not that CUDA does. No check begins after 8 minutes (BA_LORA_GPU_MINUTES), and a
process that a check starts is ended after some minutes.
"""

import contextlib
import os
import signal
import subprocess
import time

import pytest
import torch

STARTED = time.monotonic()
MINUTES = float(os.environ.get("BA_LORA_GPU_MINUTES", 8))
COMMAND_S = 240.0  # for one process on a GPU; the rehearsal's machine may be slower, and busy
FIGURES = pytest.StashKey[list[str]]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and time.monotonic() - STARTED >= 60 * MINUTES:
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
    """Run commands side by side, for a limited time, after which nothing of them is left: `finish(command, …)`."""

    def run(*commands: list[str], environ: list[dict[str, str]] | None = None) -> None:
        deadline = time.monotonic() + COMMAND_S * (1 if device == "cuda" else 5)
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
                    status = "it did not end in time"
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
        for name, outcome, told in lines:
            terminalreporter.write_line(f"{name:<{width}}  {outcome:<7}  {told}")
