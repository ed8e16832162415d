"""The sandbox: verdicts, limits, boxes side by side, and its refusals; attacks are in test_sandbox_attacks.py."""
# ruff: noqa: E501 (a program reads best as the one string it is)

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ba_lora.errors import UserError
from eval.sandbox import box as sandbox_box
from eval.sandbox import launcher, pool
from eval.sandbox.jobs import EXITED, FAILED, PASSED, TIMEOUT, Job, Limits
from eval.sandbox.sandbox import Sandbox
from tests.support.boxes import MARK, QUICK, RIGHT, TESTS, needs_bubblewrap, open_to_all, processes_of_boxes


@needs_bubblewrap
def test_right_and_wrong(box) -> None:
    assert box("def f(x):\n    return x + 1").status == PASSED
    wrong = box("def f(x):\n    return x + 2")
    assert (wrong.status, wrong.detail) == (FAILED, "AssertionError: ")
    assert box("def f(x): return (").detail.startswith("SyntaxError")
    assert box("import dataclasses, typing, collections, heapq\ndef f(x): return x + 1").passed
    assert box("import asyncio\nasync def g(): return 2\ndef f(x): return asyncio.run(g())").passed
    assert box(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(0.2,)).start()\ndef f(x): return 2"
    ).passed
    assert box(
        "import subprocess\ndef f(x): return 2 + subprocess.run(['/usr/bin/true'], check=True).returncode"
    ).passed
    assert box("import signal\nsignal.signal(signal.SIGALRM, print)\nsignal.alarm(9)\ndef f(x): return 2").passed
    assert box("import tempfile\nwith tempfile.NamedTemporaryFile('w') as t: t.write('a')\ndef f(x): return 2").passed


@needs_bubblewrap
def test_one_endless_loop_delays_nothing_else(box) -> None:
    jobs = [Job("while True: pass", TESTS)] + [Job(f"def f(x): return x + 1 + {i} * 0", TESTS) for i in range(10)]
    finished: list[float] = []
    with Sandbox(limits=Limits(cpu_s=5, wall_s=30)) as sandbox:
        started = time.monotonic()
        verdicts = sandbox.run(jobs, workers=2, progress=lambda n: finished.append(time.monotonic() - started))
    assert verdicts[0].status == TIMEOUT and all(verdict.passed for verdict in verdicts[1:])
    assert finished[-2] < finished[-1] - 1, "the others were done long before the loop was ended"


@pytest.mark.slow
@needs_bubblewrap
def test_the_death_of_the_grader_ends_the_boxes(root: Path) -> None:
    program = f"import os\nos.execv('/usr/bin/sleep', ['{MARK}', '600'])"
    code = (
        "from eval.sandbox.sandbox import *\nfrom eval.sandbox.jobs import *\nwith Sandbox(limits=Limits(wall_s=600)) as s:\n"
        f"    print('go', flush=True)\n    s.run([Job({program!r}, '')] * 2, workers=2)"
    )
    grader = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE)
    grader.stdout.readline()
    deadline = time.monotonic() + 60
    while sum(MARK in line for line in processes_of_boxes()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    grader.send_signal(signal.SIGKILL)
    grader.communicate()
    deadline = time.monotonic() + 30
    while processes_of_boxes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of_boxes() == []


@needs_bubblewrap
def test_boxes_are_alone_at_the_same_time(box) -> None:
    """Two boxes that meet in time see nothing of each other: neither files nor processes nor a shared process limit."""
    program = (
        "import os, time\nopen('/tmp/mine', 'w').close()\nfor _ in range(10):\n    if os.fork() == 0: time.sleep(1); os._exit(0)\n"
        "time.sleep(0.5)\nn = len([p for p in os.listdir('/proc') if p.isdigit()])\nassert n <= 13 and os.listdir('/tmp') == ['mine'], n\n"
        "def f(x): return x + 1"
    )
    with Sandbox(limits=QUICK) as sandbox:
        verdicts = sandbox.run([Job(program, TESTS)] * 4, workers=4)
    assert [str(verdict) for verdict in verdicts] == [PASSED] * 4


@needs_bubblewrap
@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user's boxes all run as that user")
def test_two_graders_never_share_a_user() -> None:
    """Programs count against their user's process limit; two sandboxes of one process want the very same users."""
    with Sandbox(limits=QUICK) as first, Sandbox(limits=QUICK) as second:
        users = [sandbox._user(slot) for sandbox in (first, second) for slot in range(20)]
        assert len(set(users)) == 40 and first._user(3) == users[3]
        assert second.run([Job("import os\ndef f(x): return 1 + (os.getuid() == 65534)", TESTS)])[0].passed
    with Sandbox(limits=QUICK) as third:
        assert third._user(0) in users, "a closed sandbox frees its users"


@needs_bubblewrap
def test_tests_see_what_they_should(box) -> None:
    """Builtins and the tests' modules are untouched; a function of the program named as a builtin is taken if asked."""
    assert not box("abs = lambda x: 0\ndef f(x): return 5", "assert abs(f(1) - 2) < 1e-6").passed
    patched = "import math\nmath.isclose = lambda *a: True\ndef f(x): return 5"
    assert not box(patched, "import math\nassert math.isclose(f(1), 2)", modules=("math",)).passed
    assert box("def sum(a, b): return a + b", "assert sum(1, 2) == 3", names=("sum",)).passed
    assert box("def sum(a, b): return a + b", "assert sum([1, 2]) == 3").passed
    assert box(
        "class Node: pass\ncount = 0\ndef f(x):\n    global count\n    count += 1\n    return Node()",
        "assert isinstance(f(1), Node)",
    ).passed
    assert not box("", "import no_such_module", modules=("no_such_module",)).passed


# ---- failing closed


def test_without_bubblewrap_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as caught, Sandbox():
        pass
    assert "apt-get install bubblewrap" in str(caught.value) and "sandbox=unsafe" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'bwrap: No permissions to create new namespace' >&2; exit 1", "No permissions to create new namespace"),
        ("sleep 600", "does not start"),
        ("exit 0", "cannot make a box"),
    ],
)
def test_a_bubblewrap_that_cannot_work_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text(f"#!/bin/sh\ncase $1 in --version|--help) echo bubblewrap 0.8.0; exit 0;; esac\n{script}\n")
    fake.chmod(0o755)
    open_to_all(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sandbox_box, "START_LIMIT_S", 1.0)
    with pytest.raises(UserError) as caught, Sandbox():
        pass
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_unsafe_must_be_asked_for_and_says_so() -> None:
    with Sandbox(kind="unsafe", limits=QUICK) as sandbox:
        told = sandbox.describe()
        assert told["kind"] == "unsafe" and told["limits"]["cpu_s"] == 1
        assert told["limits"]["processes"] is told["limits"]["disk_bytes"] is None, "not enforced"
        jobs = [
            Job("def f(x): return x + 1", TESTS),
            Job("import os\nos._exit(0)", TESTS),
            Job("while True: pass", TESTS),
        ]
        assert [verdict.status for verdict in sandbox.run(jobs, workers=3)] == [PASSED, EXITED, TIMEOUT]
    with pytest.raises(UserError, match="sandbox=none is unknown"):
        Sandbox(kind="none")


KILLED_ONCE = """\
import os, pathlib
if not pathlib.Path({mark!r}).exists():
    pathlib.Path({mark!r}).touch()
    os.kill(os.getpid(), 9)
def f(x): return x + 1
"""


def test_a_program_that_the_machine_killed_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed twice it has failed, unless the kernel says that it had no memory left: then nothing is graded."""
    once = Job(KILLED_ONCE.format(mark=str(tmp_path / "was")), TESTS)
    itself = Job("import os\nos.kill(os.getpid(), 9)", TESTS)
    counted: list[int] = []
    with Sandbox(kind="unsafe", limits=QUICK) as sandbox:
        verdicts = sandbox.run([once, itself, Job(RIGHT, TESTS)], workers=2, progress=counted.append)
        assert [str(verdict) for verdict in verdicts] == [PASSED, "exited early: signal SIGKILL", PASSED]
        assert counted == [1, 1, 1]
        monkeypatch.setattr(pool, "memory_kills", lambda: -1)  # another number than before the job
        with pytest.raises(UserError, match="out of memory and has killed .* twice: run fewer at once, with workers=2"):
            sandbox.run([itself], workers=4)


@needs_bubblewrap
@pytest.mark.skipif(os.geteuid() != 0, reason="the suite already runs as an ordinary user")
def test_as_an_ordinary_user(box, root: Path, tmp_path: Path) -> None:
    """The same as an unprivileged user, with the system's Python where ours lies in root's home."""
    copied = tmp_path / "eval"
    shutil.copytree(root / "eval", copied, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(root / "ba_lora", tmp_path / "ba_lora", ignore=shutil.ignore_patterns("__pycache__"))
    open_to_all(tmp_path)
    python = sys._base_executable if launcher._open_to_all(Path(sys.base_prefix).resolve()) else "/usr/bin/python3"
    if (
        not Path(python).exists()
        or subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]).returncode
    ):
        pytest.skip("no Python 3.11 that an ordinary user may run")
    code = (
        "from eval.sandbox.sandbox import *\nfrom eval.sandbox.jobs import *\nwith Sandbox(limits=Limits(cpu_s=1, wall_s=8)) as s:\n"
        "    jobs = [Job('def f(x): return x + 1', 'assert f(1) == 2'), Job('import os\\nos._exit(0)', ''), Job('while 1: pass', '')]\n"
        "    jobs += [Job('import os\\nwhile True:\\n    try: os.fork()\\n    except OSError: pass', '')]\n"
        "    print([v.status for v in s.run(jobs)])"
    )
    done = subprocess.run(
        [python, "-c", code],
        cwd=tmp_path,
        user=1234,
        group=1234,
        extra_groups=[],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"]},
        timeout=60,
    )
    assert done.stdout.strip() == str([PASSED, EXITED, TIMEOUT, TIMEOUT]), done.stderr


def test_the_machine_is_unharmed_by_threads(box) -> None:
    """Starting boxes while other threads run (a progress bar's monitor) works."""
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        assert box("def f(x): return x + 1").passed
    finally:
        stop.set()
        thread.join()
