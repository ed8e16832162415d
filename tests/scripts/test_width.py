"""The library with the oldest packages that pyproject.toml allows, and with the newest (scripts/width.sh)."""

import subprocess
import tomllib
from pathlib import Path

import pytest

NO_REGISTRY = 69


def test_the_pinned_packages_are_within_the_bounds(root: Path) -> None:
    from packaging.requirements import Requirement

    lines = (root / "requirements.txt").read_text().splitlines()
    pins = dict(line.split("  #")[0].strip().split("==") for line in lines if "==" in line)
    for need in map(Requirement, tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]):
        assert pins[need.name] in need.specifier, need


def test_it_says_what_it_takes(root: Path) -> None:
    done = subprocess.run(["sh", root / "scripts" / "width.sh", "middle"], capture_output=True, text=True)
    assert done.returncode == 2 and "sh scripts/width.sh oldest|newest" in done.stderr


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_the_library_works_with_the_oldest_and_the_newest_packages(root: Path, which: str) -> None:
    done = subprocess.run(["sh", root / "scripts" / "width.sh", which], capture_output=True, text=True)
    if done.returncode == NO_REGISTRY:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
