"""The wheel, installed where the project is not: it imports, and trains the library's example."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

PAGES = ("docs/library.md", "README.md")


def example(root: Path) -> str:
    """Return the library's example, from the page that has it."""
    for name in PAGES:
        page = root / name
        if page.is_file() and (
            found := re.search(r"```python\n(.*?BALoRATrainer\(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        ):
            return found[1]
    raise AssertionError(f"no example in {', '.join(PAGES)}")


@pytest.mark.slow
def test_the_wheel_trains_the_librarys_example(root, tmp_path):
    """In an environment that shares the installed packages, but for this project, and from another folder."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    source = tmp_path / "source"  # a build leaves folders beside it
    for name in ("ba_lora", "data", "eval"):
        shutil.copytree(root / name, source / name)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(root / name, source)
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    target = ["install", "--no-deps", "--no-index", "--target", str(packages), str(wheel)]
    subprocess.run([*pip, *target], check=True, capture_output=True, cwd=tmp_path)
    # A line of a .pth file adds a folder without reading the .pth files in it, such as this project's own.
    (packages / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    code = example(root).replace('"data/toy/', f'"{root}/data/toy/')
    (tmp_path / "example.py").write_text(f"import ba_lora\nprint(ba_lora.__file__)\n{code}")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, "example.py"], cwd=tmp_path, env=environment | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(str(packages)) and list((tmp_path / "outputs").rglob("adapter_model.safetensors"))
