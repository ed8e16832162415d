"""The sandbox is attacked: every attack must end as a failure, without harm, and without delaying the others."""
# ruff: noqa: E501 (a program reads best as the one string it is)

import contextlib
import dataclasses
import os
import resource
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from eval.sandbox.jobs import EXITED, FAILED, PASSED, TIMEOUT, Job
from eval.sandbox.sandbox import KNOWN_LIMITS, Sandbox
from eval.sandbox.usage import Usage
from tests.support.attacks import ATTACKS, DENIED, HARM, PRELUDE
from tests.support.attacks_verdict import FRAMES, GLOBALS, LAZY, PASSES, PATCHES, PROTOCOL, REGISTER, SCAN, YES_OBJECT
from tests.support.boxes import MARK, QUICK, RIGHT, TESTS, needs_bubblewrap, processes_of_boxes

WHY = {"disk fill": "No space left on device", "one large file": "File too large"}


@needs_bubblewrap
def test_attacks_fail(box) -> None:
    """All attacks at once, with right programs between them: all end in time and the right ones pass."""
    right = Job(RIGHT, TESTS)
    jobs = [Job(program, TESTS) for program, _ in ATTACKS.values()]
    with Sandbox(limits=QUICK) as sandbox:
        verdicts = sandbox.run([job for attack in jobs for job in (attack, right)], workers=4)
    assert [verdict.status for verdict in verdicts[1::2]] == [PASSED] * len(jobs)
    ended = dict(zip(ATTACKS, verdicts[::2], strict=True))
    # on a busy machine the wall may come before the end that an attack finds by itself
    late = [name for name, end in ended.items() if end.status == TIMEOUT and TIMEOUT not in ATTACKS[name][1]]
    with Sandbox(limits=dataclasses.replace(QUICK, wall_s=60)) as sandbox:
        ended |= dict(zip(late, sandbox.run([Job(ATTACKS[name][0], TESTS) for name in late]), strict=True))
    assert {name: str(end) for name, end in ended.items() if end.status not in ATTACKS[name][1]} == {}
    assert {name: ended[name].detail.partition("] ")[2] for name in WHY} == WHY
    assert processes_of_boxes() == []


@needs_bubblewrap
def test_nothing_outside_can_be_reached(box, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BA_LORA_TEST_SECRET", "secret")
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        unix.bind(str(tmp_path / "s"))
        abstract.bind("\0" + MARK)
        for listening in (unix, abstract):
            listening.listen()
        known = {"HOME": str(Path.home()), "REPOSITORY": str(root), "TCP": tcp.getsockname()[1], "PARENT": os.getpid()}
        known |= {"UNIX": str(tmp_path / "s"), "ABSTRACT": "\0" + MARK}
        head = "".join(f"{name} = {value!r}\n" for name, value in known.items()) + PRELUDE
        with Sandbox(limits=QUICK) as sandbox:
            verdicts = sandbox.run([Job(head + program, TESTS) for program in DENIED.values()])
    assert {name: str(end) for name, end in zip(DENIED, verdicts, strict=True) if not end.passed} == {}


@pytest.fixture
def world(root: Path, tmp_path: Path) -> Iterator[tuple[dict[str, object], Callable[[], set[str]]]]:
    """Give the names that the programs of HARM use, and a function that says which harm was done to what they name."""
    secret = secrets.token_hex(8)
    target, grader = tmp_path / "target", tmp_path / "grader.py"
    for path in (target, grader):
        path.write_text("unharmed")
        path.chmod(0o666)
    tmp_path.chmod(0o777)
    with contextlib.ExitStack() as stack:
        home_file = stack.enter_context(tempfile.NamedTemporaryFile("w", dir=Path.home()))
        home_file.write(secret)
        home_file.flush()
        victim, doomed = (
            stack.enter_context(subprocess.Popen(["sleep", "600"], env={"SECRET": secret})) for _ in range(2)
        )
        stack.callback(victim.kill)
        stack.callback(doomed.kill)
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("127.0.0.1", 0))
        unix, abstract = (stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2))
        for listening, name in ((unix, str(tmp_path / "s")), (abstract, f"\0{secret}")):
            listening.bind(name)
            listening.listen()
        for open_socket in (tcp, udp, unix, abstract):
            open_socket.setblocking(False)
        names = {
            "SECRET": secret,
            "HOME_FILE": home_file.name,
            "REPOSITORY": str(root),
            "TARGET": str(target),
            "GRADER": str(grader),
            "VICTIM": victim.pid,
            "DOOMED": doomed.pid,
            "TCP": tcp.getsockname()[1],
            "UDP": udp.getsockname()[1],
            "UNIX": unix.getsockname(),
            "ABSTRACT": f"\0{secret}",
        }
        open_files = resource.prlimit(victim.pid, resource.RLIMIT_NOFILE)

        def harm() -> set[str]:
            found = {path.name for path in (target, grader) if not path.exists() or path.read_text() != "unharmed"}
            with contextlib.suppress(subprocess.TimeoutExpired):
                doomed.wait(timeout=5)  # its signal may still be on its way
                found.add("killed")
            found |= {"limited"} if resource.prlimit(victim.pid, resource.RLIMIT_NOFILE) != open_files else set()
            for name, server in (("tcp", tcp), ("unix", unix), ("abstract", abstract)):
                with contextlib.suppress(BlockingIOError):
                    server.accept()[0].close()
                    found.add(name)
            with contextlib.suppress(BlockingIOError):
                udp.recv(9)
                found.add("udp")
            return found

        yield names, harm


def harming(names: dict[str, object]) -> list[Job]:
    head = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    return [Job(f"{head}{program}\n{RIGHT}", TESTS) for program in HARM.values()]


@needs_bubblewrap
def test_harm_is_prevented_and_graded_as_failed(root: Path, world) -> None:
    names, harm = world
    own = root / "eval" / "sandbox" / "child.py"
    before = own.read_bytes()
    for grader in (names["GRADER"], str(own)):
        with Sandbox(limits=QUICK) as sandbox:
            *verdicts, right = sandbox.run([*harming(names | {"GRADER": grader}), Job(RIGHT, TESTS)], workers=2)
        assert {name: str(end) for name, end in zip(HARM, verdicts, strict=True) if end.status != FAILED} == {}
        assert right.passed
    assert harm() == set() and own.read_bytes() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user may do less harm")
def test_the_same_programs_do_harm_without_a_box(world) -> None:
    """Else the test before this one would say nothing."""
    names, harm = world
    with Sandbox(kind="unsafe", limits=QUICK) as sandbox:
        verdicts = sandbox.run(harming(names), workers=1)
    prevented = {name for name, end in zip(HARM, verdicts, strict=True) if not end.passed}
    assert prevented <= {"reads the memory of another process", "stops another process by ptrace"}, "by some machines"
    assert harm() == {"target", "grader.py", "killed", "limited", "tcp", "udp", "unix", "abstract"}


@needs_bubblewrap
def test_daemons_end_with_the_box_and_are_no_pass(box) -> None:
    daemon = (
        "import os, time, signal\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        for s in range(1, 65):\n            try: signal.signal(s, signal.SIG_IGN)\n            except (OSError, ValueError): pass\n"
        f"        os.execv('/usr/bin/sleep', ['{MARK}', '600'])\n    os._exit(0)\nos.wait()\ntime.sleep(0.2)\ndef f(x): return x + 1"
    )
    assert box(daemon).detail == "left processes running when it had been loaded"
    late = box(
        "def f(x):\n    exec(DAEMON)\n    return 2".replace(
            "DAEMON", repr(daemon.replace("def f(x): return x + 1", ""))
        )
    )
    assert late.detail == "left processes running after the tests"
    assert box(daemon + "\nos._exit(0)").status == EXITED
    assert processes_of_boxes() == []


@needs_bubblewrap
def test_one_that_takes_the_processors_fails_nobody_else(box) -> None:
    """The right programs need half of their CPU limit; the others want all of the machine."""
    thieves = [name for name in ATTACKS if name.endswith("take the processors")]
    work = "import time\nwhile time.process_time() < 0.5: pass\n" + RIGHT
    jobs = [Job(ATTACKS[name][0], TESTS) for name in thieves] + [Job(work, TESTS)] * 3
    with Sandbox(limits=QUICK) as sandbox:
        verdicts = sandbox.run(jobs, workers=len(jobs))
    assert [str(verdict) for verdict in verdicts] == ["timeout: 1 s of CPU"] * len(thieves) + [PASSED] * 3


def test_the_cpu_of_all_processes_is_counted() -> None:
    """Of those that were waited for, of those that were not, and of those that still run."""
    burn = "import time\nwhile time.process_time() < 0.3: pass\n"
    code = (
        f"import os, signal, sys, time\nfor kind in range(3):\n    if kind == 1: signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        f"    if os.fork() == 0:\n        exec({burn!r})\n        time.sleep(0.5 if kind < 2 else 99)\n        os._exit(0)\n"
        "    if kind == 0: os.wait()\n    else: time.sleep(2)\nprint('done', flush=True)\ntime.sleep(99)"
    )
    process = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    usage = Usage(process.pid, memory_limit=2**40, boxed=False)
    try:
        os.set_blocking(process.stdout.fileno(), False)
        while not process.stdout.read():
            usage.look()
            time.sleep(0.05)
        usage.look()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert usage.cpu_s >= 0.6, "two of three at least by either count"
    assert usage.memory_bytes > 2**20 and usage.num_sockets == 0


@needs_bubblewrap
@pytest.mark.parametrize("name", PATCHES)
def test_the_tests_modules_are_as_they_were(box, name: str) -> None:
    program, tests, modules = PATCHES[name]
    assert box(program, tests, modules=modules).status == FAILED


@needs_bubblewrap
@pytest.mark.parametrize("name", PASSES)
def test_nothing_passes_that_is_not_solved(box, name: str) -> None:
    program, tests = PASSES[name]
    assert not box(program, tests).passed


@needs_bubblewrap
def test_modules_are_put_back_without_harm(box) -> None:
    """What right programs do to modules that the tests use as well: caches, submodules, settings, classes."""
    program = (
        "import collections, concurrent.futures, json, json.tool, os, random, re, sys, types, typing\nfrom dataclasses import dataclass\n"
        "sys.setrecursionlimit(5000)\nos.environ['KEY'] = 'x'\nrandom.seed(1)\nrandom.gauss(0, 1)\nre.compile('a+').match('aa')\n"
        "@dataclass\nclass Point(collections.UserList):\n    x: int = 1\n"
        "def f(x):\n    with concurrent.futures.ThreadPoolExecutor(1) as pool: y = pool.submit(lambda: x + 1).result()\n"
        "    assert json.loads('2') == y and json.tool and re.sub('a', 'b', 'a') == 'b' and typing.Optional[int]\n"
        "    return collections.Counter('a' * y)['a']"
    )
    tests = (
        "import collections, concurrent, json, random, re, typing\nfrom unittest import mock\nassert f(1) == 2\nassert isinstance(Point(), collections.UserList)\n"
        "assert collections.OrderedDict(a=1) == {'a': 1} and collections.namedtuple('P', 'x')(2).x == f(1)"
    )
    modules = ("collections", "concurrent", "json", "random", "re", "typing", "unittest.mock")
    assert str(box(program, tests, modules=modules)) == PASSED


@needs_bubblewrap
def test_known_limit_objects_equal_to_everything_pass(box) -> None:
    assert len(KNOWN_LIMITS) == 3
    assert box(YES_OBJECT).passed


@needs_bubblewrap
def test_known_limit_reading_and_changing_frames_passes(box) -> None:
    assert box(FRAMES).passed
    assert box(GLOBALS, "y = f(1)\nassert abs(y - 2) < 1").passed
    assert box(PROTOCOL).passed
    # Without the protocol there is nothing to find before the tests run.
    assert not box(FRAMES + "\nf(1)\nos._exit(0)").passed


@needs_bubblewrap
def test_known_limit_scanning_ones_own_memory_passes(box) -> None:
    assert box(SCAN).passed


@needs_bubblewrap
def test_known_limit_changing_what_lies_in_c_or_is_imported_late_passes(box) -> None:
    assert box(REGISTER, "import numbers\nassert isinstance(f(1), numbers.Number)", modules=("numbers",)).passed
    late = "import datetime\nassert f(1) == datetime.datetime.strptime('2020', '%Y')"
    assert box(LAZY, late, modules=("datetime",)).passed
