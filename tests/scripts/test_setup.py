"""scripts/setup.sh and test.sh with a pretended Python and pip, and the requirement files against the imports."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHELL = shutil.which("dash") or "sh"
REQUIREMENTS = sorted(ROOT.glob("requirements*.txt"))
# Answers as a Python would, and writes what pip was asked for to $CALLS. Fails when the call matches $FAIL; it is the
# network where that is for a CPU build.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
--version) echo "Python 3.12.0"; exit 0 ;;
*version_info*) exit "${FAKE_TOO_OLD:-0}" ;;
*importlib.metadata*) [ -f "$CALLS.torch" ]; exit ;;
*getsitepackages*) echo "${0%/bin/python}"; exit 0 ;;
*fcntl*) exec "$REAL_PYTHON" "$@" ;;
*"-m venv --clear "*) mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
*"pip "*"--version") exit 0 ;;
esac
echo "$*" >>"$CALLS"
if [ -n "${FAIL:-}" ] && echo "$*" | grep -qE -- "$FAIL"; then
    case "$*" in *+cpu*) echo "WARNING: NewConnectionError" ;; *) echo "${FAIL_SAYS:-ERROR: broken}" ;; esac
    exit 1
fi
case "$*" in *torch==*) : >"$CALLS.torch" ;; esac
sleep "${FAKE_SECONDS:-0}"
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what set-up reads, and a PATH folder with a pretended Python 3.12 and no nvidia-smi."""
    tree = tmp_path / "a tree"
    (tree / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "setup.sh", tree / "scripts")
    for path in [*REQUIREMENTS, ROOT / "pyproject.toml"]:
        shutil.copy(path, tree)
    tools = tmp_path / "tools"
    tools.mkdir()
    names = "sh cat cksum tr sed grep mkdir rm mv cp date uname tail cut dirname sleep kill flock true echo".split()
    for name in names:
        found = shutil.which(name)
        if found:
            (tools / name).symlink_to(found)
    add_program(tools / "python3.12", FAKE_PYTHON)
    return tree


def add_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def start(tree: Path, **environ: str) -> subprocess.Popen:
    environ = {"PATH": str(tree.parent / "tools"), "CALLS": str(tree.parent / "calls")} | environ
    command = [SHELL, str(tree / "scripts" / "setup.sh")]
    return subprocess.Popen(command, env=environ, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def set_up(tree: Path, **environ: str) -> tuple[int, str]:
    """Run setup.sh; return status and stderr."""
    process = start(tree, **environ)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def calls(tree: Path) -> list[str]:
    path = tree.parent / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_shell_scripts_parse() -> None:
    scripts = [*ROOT.glob("scripts/**/*.sh"), ROOT / ".ci" / "run"]
    assert len(scripts) >= 3
    for script in scripts:
        assert script.read_text().startswith("#!/bin/sh\n"), script
        checked = subprocess.run([SHELL, "-n", str(script)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_first_call_installs_and_the_second_does_nothing(tree: Path) -> None:
    status, err = set_up(tree)
    assert status == 0, err
    assert [line.split()[1] for line in err.splitlines()[:5]] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    done = calls(tree)
    assert any("-m venv" in call for call in done) and done[-1].endswith("--no-build-isolation -e .")
    if os.uname().machine == "x86_64":
        assert any("--no-deps -r requirements-cpu.txt" in call for call in done)
    assert set_up(tree) == (0, "")
    assert calls(tree) == done

    with open(tree / "requirements.txt", "a") as file:  # a changed pin sets up again, in the same environment
        file.write("somepackage==1.0\n")
    status, err = set_up(tree)
    assert status == 0 and "environment .venv is there" in err and len(calls(tree)) > len(done)


def test_a_moved_folder_is_set_up_anew(tree: Path) -> None:
    assert set_up(tree)[0] == 0
    moved = tree.rename(tree.parent / "moved")
    status, err = set_up(moved)
    assert status == 0 and "1/5 environment .venv (Python" in err


def test_no_python(tree: Path) -> None:
    (tree.parent / "tools" / "python3.12").rename(tree.parent / "tools" / "python3")
    status, err = set_up(tree, FAKE_TOO_OLD="1")
    assert status == 1
    assert err.splitlines() == ["error: no Python 3.11 or newer found: install one, or set PYTHON=/path/to/python3.11"]
    status, err = set_up(tree, PYTHON="/no/such/python")
    assert status == 1 and err.startswith("error: PYTHON=/no/such/python") and len(err.splitlines()) == 1
    assert not (tree / ".venv").exists()


def test_a_python_that_does_not_start_is_passed_over(tree: Path) -> None:
    add_program(tree.parent / "tools" / "python3.13", "#!/bin/sh\nexit 127\n")
    assert set_up(tree)[0] == 0


@pytest.mark.parametrize(
    ("says", "line"),
    [
        ("OSError: [Errno 28] No space left on device", "no disk space left while installing requirements.txt"),
        ("WARNING: Retrying: NewConnectionError('…')", "the package registry cannot be reached"),
        ("ERROR: something else\nmore", "installing requirements.txt failed: ERROR: something else"),
    ],
)
def test_a_failed_step_is_one_line_and_the_next_call_continues(tree: Path, says: str, line: str) -> None:
    status, err = set_up(tree, FAIL="-r requirements.txt", FAIL_SAYS=says)
    assert status == 1
    errors = [text for text in err.splitlines() if text.startswith("error:")]
    assert len(errors) == 1 and line in errors[0]
    assert not (tree / ".venv" / ".setup-stamp").exists()
    status, err = set_up(tree)
    assert status == 0 and "environment .venv is there" in err and "torch" in err and "is there" in err
    assert sum("-m venv" in call for call in calls(tree)) == 1


def test_what_went_wrong_before_and_was_tolerated_is_not_blamed(tree: Path) -> None:
    _, err = set_up(tree, FAIL=r"\+cpu|-r requirements.txt", FAIL_SAYS="ERROR: no such package")
    assert err.splitlines()[-1].startswith("error: installing requirements.txt failed: ERROR: no such package")


def test_the_cpu_build_of_torch_is_looked_for_in_three_places(tree: Path) -> None:
    status, err = set_up(tree, FAIL=r"torch==[0-9.]+\+cpu")
    assert status == 0 and "no CPU build found" in err
    tries = [call for call in calls(tree) if "torch==" in call]
    assert len(tries) == 3
    assert "--index-url" not in tries[0] and "+cpu" in tries[0]
    assert "--index-url https://download.pytorch.org/whl/cpu" in tries[1] and "+cpu" in tries[1]
    assert "--index-url" not in tries[2] and "+cpu" not in tries[2]


def test_calls_at_the_same_time_set_up_once(tree: Path) -> None:
    processes = [start(tree, FAKE_SECONDS="0.2") for _ in range(3)]
    assert [(process.communicate(timeout=60), process.returncode)[1] for process in processes] == [0, 0, 0]
    assert sum("-m venv" in call for call in calls(tree)) == 1
    assert sum("-e ." in call for call in calls(tree)) == 1


def test_without_flock_a_set_up_waits_for_the_one_that_works(tree: Path) -> None:
    (tree.parent / "tools" / "flock").unlink(missing_ok=True)
    processes = [start(tree, FAKE_SECONDS="0.5") for _ in range(3)]
    assert [(process.communicate(timeout=60), process.returncode)[1] for process in processes] == [0, 0, 0]
    assert sum("-m venv" in call for call in calls(tree)) == 1


def test_without_flock_a_killed_set_up_leaves_no_lock_behind(tree: Path) -> None:
    (tree.parent / "tools" / "flock").unlink(missing_ok=True)
    process = start(tree, FAKE_SECONDS="30")
    lock = tree / ".cache" / "setup.lock.d" / "pid"
    while not (lock.exists() and lock.read_text().strip()):
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert set_up(tree)[0] == 0
    assert not lock.parent.exists()


def test_the_harness_is_set_up_once_by_calls_at_the_same_time_and_again_after_a_kill(tree: Path) -> None:
    shutil.copy(ROOT / "scripts" / "harness.sh", tree / "scripts")
    assert set_up(tree)[0] == 0

    def start(seconds: str) -> subprocess.Popen:
        environ = {"PATH": str(tree.parent / "tools"), "CALLS": str(tree.parent / "calls"), "FAKE_SECONDS": seconds}
        command = [SHELL, str(tree / "scripts" / "harness.sh"), "--setup"]
        return subprocess.Popen(command, env=environ | {"REAL_PYTHON": sys.executable}, start_new_session=True)

    def installs() -> int:
        return sum("lm-eval==" in call for call in calls(tree))

    killed = start("30")
    while not any("lm-eval" in call for call in calls(tree)):
        time.sleep(0.02)
    os.killpg(killed.pid, 9)
    killed.wait()
    before = installs()
    assert [process.wait(timeout=60) for process in [start("0.2") for _ in range(3)]] == [0, 0, 0]
    assert installs() == before + 1


def test_an_nvidia_driver_means_gpu_packages_and_flash_attn_is_optional(tree: Path) -> None:
    add_program(tree.parent / "tools" / "nvidia-smi", "#!/bin/sh\nexit 0\n")
    status, err = set_up(tree, FAIL="no-deps flash-attn")
    assert status == 0
    assert sum("flash-attn" in text and "sdpa" in text for text in err.splitlines()) == 1
    done = "\n".join(calls(tree))
    assert "+cpu" not in done and "requirements-cpu.txt" not in done and "requirements-gpu.txt" in done
    assert "vllm" in (tree / ".cache" / "requirements-gpu.txt").read_text()
    assert set_up(tree) == (0, "")
    (tree.parent / "tools" / "nvidia-smi").unlink()
    assert set_up(tree) == (0, ""), "a GPU environment serves a machine without GPU, too"
    assert "cpu" in set_up(tree, BA_LORA_SETUP="cpu")[1].splitlines()[0]


def test_what_only_tests_need_is_installed_once_and_they_run_without_it(tree: Path) -> None:
    shutil.copy(ROOT / "scripts" / "test.sh", tree / "scripts")
    add_program(tree.parent / "tools" / "bwrap", "#!/bin/sh\n")

    def test(*words: str, **environ: str) -> str:
        environ = {"PATH": str(tree.parent / "tools"), "CALLS": str(tree.parent / "calls")} | environ
        command = [SHELL, str(tree / "scripts" / "test.sh"), *(words or ("slow", "-x"))]
        done = subprocess.run(command, env=environ, capture_output=True, text=True)
        chosen = "gpu -n 0 --dist worksteal tests/gpu" if words else "not gpu -n 0 --dist worksteal -x"
        assert done.returncode == 0 and calls(tree)[-1].endswith(f"-m pytest -m {chosen}")
        return done.stderr

    assert "requirements-test.txt cannot be installed" in test(FAIL="-r requirements-test.txt")
    for _ in range(2):
        assert "test: " not in test()
    assert sum("-r requirements-test.txt" in call for call in calls(tree)) == 2
    test("gpu")  # the bench's packages are there
    assert not any("[bench]" in call for call in calls(tree))
    assert "cut-cross-entropy and Liger cannot be installed" in test("gpu", FAIL="cut_cross_entropy|bench")
    assert calls(tree)[-2].endswith("--no-build-isolation -e .[bench]")


def test_vllm_can_be_left_out(tree: Path) -> None:
    assert set_up(tree, BA_LORA_NO_VLLM="1")[0] == 0
    assert not any("requirements-cpu" in call for call in calls(tree))


def pins() -> dict[str, set[str]]:
    """Return distribution → versions pinned in a requirements file or an extra; every line must be an exact pin."""
    found: dict[str, set[str]] = {}
    lines = {path.name: path.read_text().splitlines() for path in REQUIREMENTS}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("optional-dependencies", {})
    for name, content in (lines | extras).items():
        for line in content:
            line = re.sub(r"\s+#.*", "", line).strip()
            if line and not line.startswith("#"):
                match = re.fullmatch(r"([\w.-]+)(\[[\w,.-]+\])?==([\w.!+-]+)", line)
                assert match, f"{name}: {line!r} is no exact pin"
                found.setdefault(normal(match[1]), set()).add(match[3])
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_requirements_are_exact_and_agree() -> None:
    found = pins()
    assert len(found) > 20 and found["torch"] == {"2.13.0"}
    assert {name: versions for name, versions in found.items() if len(versions) > 1} == {}


def test_every_import_is_pinned() -> None:
    files = [path for part in ("ba_lora", "data", "eval", "scripts", "tests") for path in (ROOT / part).rglob("*.py")]
    files += ROOT.glob("*.py")
    imports: dict[str, Path] = {}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imports |= {alias.name.split(".")[0]: path for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imports[node.module.split(".")[0]] = path
    folders = (ROOT, ROOT / "scripts", ROOT / "tests" / "workers")  # whose files may be imported by their bare names
    own = {"ba_lora", "data", "eval", "scripts", "tests"} | {path.stem for path in files if path.parent in folders}
    distributions, pinned = importlib.metadata.packages_distributions(), pins()
    third_party = set(imports) - set(sys.stdlib_module_names) - own
    assert {"torch", "transformers", "vllm"} <= third_party
    for name in sorted(third_party):
        if name == "lm_eval":  # in an environment of its own
            assert re.search(r"^VERSION=[\d.]+$", (ROOT / "scripts" / "harness.sh").read_text(), re.M)
            continue
        candidates = [
            *distributions.get(name, []),
            name,
        ]  # what is not installed here is mostly called as it is imported
        assert any(normal(candidate) in pinned for candidate in candidates), (
            f"{imports[name]} imports {name}, which no requirements file and no extra pins"
        )


def test_the_installed_folder_has_every_package_that_a_command_needs() -> None:
    """After `pip install -e .` python -m eval.score works from any folder."""
    from setuptools import find_packages

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    found = set(find_packages(str(ROOT), include=settings["include"]))
    wanted = {path.parent for top in ("ba_lora", "data", "eval") for path in (ROOT / top).rglob("__init__.py")}
    assert {".".join(path.relative_to(ROOT).parts) for path in wanted} <= found
    assert not any(name.startswith("tests") for name in found)
