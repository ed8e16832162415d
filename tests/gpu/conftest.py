"""The checks of `sh scripts/test.sh gpu`: each says a figure, and a table of all of them ends the run.

They run on CUDA. BA_LORA_GPU_CHECKS=cpu rehearses them on the CPU with smaller sizes, which proves that they can run
and that they measure what they say, not that CUDA does.
"""

import os

import pytest
import torch

FIGURES = pytest.StashKey[list[str]]()


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
