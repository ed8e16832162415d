"""What is committed under results/, read from git: a user's own runs and measurements may lie beside it."""

import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT


def committed_paths(folder: str) -> list[str]:
    """The staged or committed files below a folder; a skip where the project is no git repository."""
    return _git("ls-files", "--", folder).splitlines()


def committed_text(path: str) -> str:
    """A file as it is staged or committed, whatever has been written to it since; a skip as above."""
    return _git("show", f":{path}")


def committed_copy(folder: str, place: Path) -> Path:
    """A folder as it is staged or committed, copied below `place`; a skip as above."""
    _git("checkout-index", f"--prefix={place}/", "--", *committed_paths(folder))
    return place / folder


def _git(*words: str) -> str:
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository: what is committed is not known")
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, encoding="utf-8", check=True).stdout
