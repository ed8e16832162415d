"""The sandbox is attacked: every attack must end as a failure, without harm, and without delaying the others."""
# ruff: noqa: E501 (an attack reads best as the one string it is)

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ba_lora.errors import UserError
from eval import sandbox as module
from eval import sandbox_box
from eval.sandbox import KNOWN_LIMITS, Sandbox
from eval.sandbox_box import EXITED, FAILED, MEMORY, OUTPUT, PASSED, TIMEOUT, Job, Limits

QUICK = Limits(cpu_s=1, wall_s=4, memory_bytes=256 * 2**20, processes=16)
TESTS = "assert f(1) == 2"


def no_sandbox() -> str | None:
    try:
        with Sandbox():
            return None
    except UserError as error:
        return str(error)


needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason=f"no bubblewrap: {module.INSTALL}")


@pytest.fixture(scope="module")
def box():
    """Run one program in a box with quick limits."""
    reason = no_sandbox()
    if reason is not None:
        pytest.skip(reason)
    with Sandbox(limits=QUICK) as sandbox:
        yield lambda program, tests=TESTS, **more: sandbox.run([Job(program, tests, **more)], workers=1)[0]


def processes_of_boxes() -> list[str]:
    """Return the command lines of this test's processes that run in a box."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if "_main()" in text or MARK in text:
            found.append(text)
    return found


MARK = f"mark-{secrets.token_hex(8)}"


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


# Reads the frame with tests and nonce off any socket of this process, and answers as the checker would.
STEAL = """
import marshal, os, stat, threading, time
def steal():
    for d in range(3, 64):
        try:
            if not stat.S_ISSOCK(os.fstat(d).st_mode): continue
            size = int.from_bytes(os.read(d, 8), 'big')
            os.write(d, b'P ' + marshal.loads(os.read(d, size))['nonce'] + b'\\n')
            time.sleep(9)
        except OSError: pass
"""
FIVE = "\ndef f(x): return 5"

# name → (program, the statuses it may end with). All are given the tests `assert f(1) == 2`.
ATTACKS = {
    "endless loop": ("while True: pass", {TIMEOUT}),
    "endless loop in C": ("import itertools, collections\ncollections.deque(itertools.repeat(0), maxlen=0)", {TIMEOUT}),
    "endless sleep": ("import time\ntime.sleep(1000)", {TIMEOUT}),
    "endless loop, SIGXCPU and SIGTERM caught": (
        "import signal\n"
        "for s in (signal.SIGXCPU, signal.SIGTERM, signal.SIGINT, signal.SIGALRM): signal.signal(s, lambda *a: None)\n"
        "while True: pass",
        {TIMEOUT},
    ),
    "fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", {TIMEOUT, EXITED}),
    "thread bomb": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
        {FAILED},
    ),
    "thread that never ends": (
        "import threading\ndef g():\n    while True: pass\nt = threading.Thread(target=g); t.start(); t.join()",
        {TIMEOUT},
    ),
    "memory bomb": ("x = []\nwhile True: x.append(bytearray(10**7))", {MEMORY}),
    "memory bomb in many processes": (
        "import os, time\nfor i in range(8):\n    if os.fork() == 0:\n        x = b'x' * 150_000_000\n        time.sleep(99)\ntime.sleep(99)",
        {MEMORY, FAILED, TIMEOUT},
    ),
    "huge integer": ("x = 10 ** 10 ** 10", {TIMEOUT, MEMORY}),
    "huge integer as text": ("x = str(2 ** (2 ** 26))", {FAILED, TIMEOUT, MEMORY}),
    "recursion": ("def g(): g()\ng()", {FAILED}),
    "recursion without limit": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef g(n): return [g(n + 1)]\ng(0)",
        {EXITED, MEMORY, TIMEOUT},
    ),
    "disk fill": ("while True:\n    with open('/tmp/%d' % id(object()), 'ab') as f: f.write(b'x' * 2**20)", {FAILED}),
    "one large file": ("with open('/tmp/x', 'wb') as f:\n    while True: f.write(b'x' * 2**20)", {FAILED, EXITED}),
    "many small files": ("for i in range(10**9): open('/tmp/%d' % i, 'w').close()", {OUTPUT, TIMEOUT}),
    "output flood": ("while True: print('x' * 10000)", {OUTPUT}),
    "error flood": ("import sys\nwhile True: sys.stderr.write('x' * 10000)", {OUTPUT}),
    "leaves with status 0": ("import sys\nsys.exit(0)", {FAILED}),
    "leaves hard with status 0": ("import os\nos._exit(0)", {EXITED}),
    "leaves when called": ("import sys\ndef f(x): sys.exit(0)", {FAILED}),
    "leaves hard when called": ("import os\ndef f(x): os._exit(0)", {EXITED}),
    "quits": ("quit()", {FAILED}),
    "execs true": ("import os\nos.execv('/usr/bin/true', ['true'])", {EXITED}),
    "kills itself": ("import os\nos.kill(os.getpid(), 9)", {EXITED, TIMEOUT}),
    "kills all": (
        "import os\nos.kill(-1, 9)\nos.kill(1, 9)\nos.kill(os.getppid(), 9)\nos.killpg(0, 9)",
        {FAILED, EXITED, TIMEOUT},
    ),
    "leaves in atexit": ("import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit", {FAILED}),
    "prints pass markers": (
        "import sys\nfor w in ('P', 'passed', 'P ' + '0' * 32, 'OK', '{\"passed\": true}'):\n"
        "    print(w, flush=True); print(w, file=sys.stderr, flush=True)\nraise SystemExit(0)",
        {FAILED},
    ),
    "writes pass markers to every descriptor": (
        "import os\nfor d in range(64):\n    try: os.write(d, b'P ' + b'0' * 32 + b'\\nL\\nP \\n')\n    except OSError: pass\n"
        "os._exit(0)",
        {FAILED, EXITED},
    ),
    "closes every descriptor": ("import os\nos.closerange(0, 1000)\nos._exit(0)", {EXITED}),
    "reads the line of the checker": (
        "import os\nfor d in range(3, 64):\n    try: os.set_blocking(d, False); print(os.read(d, 9999))\n    except OSError: pass",
        {FAILED, EXITED},
    ),
    "equal to everything by a patched builtin": (
        "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.AssertionError = ValueError\nbuiltins.__build_class__ = None\n"
        "def f(x): return 5",
        {FAILED},
    ),
    "patches what the checker uses": (
        "import os, sys, builtins\nos.write = os.read = os._exit = sys.exit = lambda *a: None\n"
        "builtins.exec = builtins.compile = builtins.len = builtins.min = lambda *a, **k: None\n"
        "sys.excepthook = lambda *a: os.abort()\ndef f(x): return 5",
        {FAILED},
    ),
    "traces the tests": (
        "import sys, threading\ndef t(frame, event, arg):\n    frame.f_trace_lines = False\n    raise SystemExit(0)\n"
        "sys.settrace(t); sys.setprofile(t)\ndef f(x): return 5",
        {FAILED, EXITED},
    ),
    "copies the checker's process": ("import os\nos.fork()\ndef f(x): return 5", {FAILED, EXITED}),
    "reads stdin": ("x = input()", {FAILED}),
    "reads stdin to the end": ("import sys\nx = sys.stdin.read()\nassert x", {FAILED}),
    "thread that never ends, f is right": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\ndef f(x): return 2",
        {FAILED},
    ),
    "thread left by f": (
        "import threading, time\ndef f(x):\n    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n    return 2",
        {FAILED},
    ),
    "thread takes the nonce off the socket": (
        STEAL + "threading.Thread(target=steal, daemon=True).start()\ntime.sleep(0.2)" + FIVE,
        {FAILED},
    ),
    "child takes the nonce off the socket": (
        STEAL + "if os.fork() == 0: steal()\ntime.sleep(0.2)" + FIVE,
        {FAILED, TIMEOUT},
    ),
    "grandchild in a session of its own takes the nonce off the socket": (
        STEAL
        + "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: steal()\n    os._exit(0)\ntime.sleep(0.2)"
        + FIVE,
        {FAILED, TIMEOUT},
    ),
    "timer forks a child that takes the nonce off the socket": (
        STEAL + "import signal\nsignal.signal(signal.SIGALRM, lambda *a: os.fork() or steal())\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)" + FIVE,
        {FAILED, TIMEOUT, EXITED},
    ),
    "garbage collector forks a child that takes the nonce off the socket": (
        STEAL + "import gc\ngc.callbacks.append(lambda *a: os.fork() or steal())\ngc.set_threshold(1)" + FIVE,
        {FAILED, TIMEOUT, EXITED},
    ),
    "audit hook reads the checker's frames": (
        "import os, sys\ndef hook(event, arguments):\n    frame = sys._getframe()\n    while frame:\n"
        "        found = frame.f_locals.get('proof')\n        if found: os.write(frame.f_locals['control'], b'P ' + found['nonce'] + b'\\n')\n"
        "        frame = frame.f_back\nsys.addaudithook(hook)" + FIVE,
        {FAILED},
    ),
    "looks for the nonce among the collector's objects": (
        "import gc, os\ndef f(x):\n    for o in gc.get_objects():\n        for r in [o, *gc.get_referents(o)]:\n"
        "            if type(r) is dict and 'nonce' in r:\n                for d in range(3, 64):\n"
        "                    try: os.write(d, b'P ' + r['nonce'] + b'\\n')\n                    except OSError: pass\n    return 5",
        {FAILED},
    ),
    "changes the checker's module": (
        "import __main__\n__main__._main = print\nfor n in list(vars(__main__)): setattr(__main__, n, ())" + FIVE,
        {FAILED},
    ),
    "changes every builtin": (
        "import builtins\nfor n in list(vars(builtins)):\n    if n != 'setattr': setattr(builtins, n, lambda *a, **k: True)"
        + FIVE,
        {FAILED},
    ),
    "stops itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)" + FIVE, {TIMEOUT}),
    "stops the box": (
        "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)\nos.killpg(0, signal.SIGSTOP)" + FIVE,
        {TIMEOUT, FAILED},
    ),
    "closes its output": (
        "import os, sys\nsys.stdout.close()\nsys.stderr.close()\nos.close(1)\nos.close(2)" + FIVE,
        {FAILED},
    ),
    "zombies": ("import os\nwhile True:\n    try: os.fork() or os._exit(0)\n    except OSError: pass", {TIMEOUT}),
    "one line without end": ("import os\nwhile True: os.write(1, b'x' * 65536)", {OUTPUT}),
    "lines without end for the checker": (
        "import os\nwhile True:\n    for d in range(3, 64):\n        try: os.write(d, b'\\n' * 65536)\n        except OSError: pass",
        {FAILED, EXITED},
    ),
    "folders without end": ("import os\nwhile True: os.mkdir('d'); os.chdir('d')", {OUTPUT, FAILED}),
    "names of four bytes a letter": (
        "import os\nfor i in range(10**9): open('/tmp/' + chr(0x1F600 + i % 50) * 50 + str(i), 'w').close()",
        {OUTPUT, TIMEOUT},
    ),
    "a list of huge integers": ("def f(x): return [10 ** (10 ** 7)] * 10 ** 6", {TIMEOUT, MEMORY}),
    "becomes another Python": (
        "import os, sys\nfor d in range(3, 64):\n    try: os.set_inheritable(d, True)\n    except OSError: pass\n"
        f"os.execv(sys.executable, [sys.executable, '-c', {STEAL + 'steal()'!r}])",
        {EXITED, TIMEOUT, FAILED},
    ),
    "recursion in finalizers": (
        "class D:\n    def __del__(self): D().x = D()\nd = D()\nraise SystemExit(0)",
        {FAILED, EXITED},
    ),
    "atexit without end": (
        "import atexit\n@atexit.register\ndef g():\n    while True: pass\nraise SystemExit(0)",
        {FAILED},
    ),
    "modules of its own": (
        "import sys\nopen('/tmp/math.py', 'w').write('raise SystemExit(0)')\nsys.path.insert(0, '/tmp')\nsys.modules.pop('math', None)"
        + FIVE,
        {FAILED},
    ),
    "memory shared between processes": (
        "import mmap, os, time\nfor i in range(4):\n    if os.fork() == 0: break\nm = mmap.mmap(-1, 150 * 2**20)\nm.write(b'x' * len(m))\ntime.sleep(99)",
        {MEMORY, TIMEOUT, FAILED},
    ),
    "pipes and sockets full of bytes": (
        "import os, socket\nkept = []\nwhile True:\n    a, b = socket.socketpair()\n    kept += [a, b]\n    a.setblocking(False)\n"
        "    try:\n        while True: a.send(b'x' * 65536)\n    except BlockingIOError: pass",
        {FAILED},
    ),
    "compiles without end": (
        "x = " + "(" * 150 + "0" + ")" * 150 + "\n" + "-" * 200_000 + "1",
        {FAILED, EXITED, TIMEOUT, MEMORY},
    ),
}


@needs_bubblewrap
def test_attacks_fail(box) -> None:
    """All attacks at once, with right programs between them: all end in time and the right ones pass."""
    right = Job("def f(x):\n    return x + 1", TESTS)
    jobs = [Job(program, TESTS) for program, _ in ATTACKS.values()]
    with Sandbox(limits=QUICK) as sandbox:
        verdicts = sandbox.run([job for attack in jobs for job in (attack, right)], workers=4)
    assert [verdict.status for verdict in verdicts[1::2]] == [PASSED] * len(jobs)
    ended = dict(zip(ATTACKS, verdicts[::2], strict=True))
    assert {name: str(end) for name, end in ended.items() if end.status not in ATTACKS[name][1]} == {}
    assert processes_of_boxes() == []


# Programs that try something forbidden; each must see that it does not work: then f is right and the tests pass.
DENIED = {
    "home": "import os\nfor p in ('/root', '/home', HOME): assert not os.path.exists(p) or not os.listdir(p), p",
    "repository": "import os\nassert not os.path.exists(REPOSITORY)\nimport sys\nassert not any(REPOSITORY in p for p in sys.path)",
    "etc": "import os\nassert not os.path.exists('/etc/passwd') and not os.path.exists('/var') and not os.path.exists('/sys')",
    "environment": "import os\nassert 'BA_LORA_TEST_SECRET' not in os.environ\nassert len(os.environ) <= 6, os.environ",
    "environment of others": (
        "import glob\nfor p in glob.glob('/proc/*/environ'):\n    try: assert b'BA_LORA_TEST_SECRET' not in open(p, 'rb').read()\n"
        "    except (PermissionError, ProcessLookupError): pass"
    ),
    "processes of others": "import os\nassert len([p for p in os.listdir('/proc') if p.isdigit()]) <= 3",
    "outside": (
        "import os\nfor p in ('/x', '/usr/x', '/usr/bin/python3', '/python/x', '/dev/x', '/dev/shm/x', '/proc/sys/kernel/x', '/etc/x'):\n"
        "    try: open(p, 'w')\n    except OSError: continue\n    raise SystemExit(p)"
    ),
    "sysctl": "denied(lambda: open('/proc/sys/vm/overcommit_memory', 'w').write('1'))\ndenied(lambda: open('/proc/sysrq-trigger', 'w').write('h'))",
    "symlinks": (
        "import os\nos.symlink('/usr', '/tmp/u')\ndenied(lambda: open('/tmp/u/x', 'w'))\nos.symlink('/proc/1/root', '/tmp/r')\n"
        "for p in ('/tmp/r' + HOME, '/tmp/r/root', '/proc/self/root/root', '/proc/self/cwd/../root'): assert not os.path.exists(p), p\n"
        "os.symlink('/python/lib', '/tmp/l')\ndenied(lambda: open('/tmp/l/x', 'w'))"
    ),
    "checker's files": "import os, sys\ndenied(lambda: open(os.__file__, 'a'))\ndenied(lambda: os.unlink(os.__file__))\ndenied(lambda: open(sys.executable, 'ab'))",
    "tcp": "import socket\ndenied(lambda: socket.create_connection(('127.0.0.1', TCP), 1))\ndenied(lambda: socket.create_connection(('1.1.1.1', 53), 1))",
    "udp": "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ndenied(lambda: s.sendto(b'x', ('1.1.1.1', 53)))",
    "unix": (
        "import socket\nfor name in (UNIX, ABSTRACT):\n    s = socket.socket(socket.AF_UNIX)\n    denied(lambda: s.connect(name))"
    ),
    "raw": "import socket\ndenied(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))\ndenied(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))",
    "name service": "import socket\ndenied(lambda: socket.getaddrinfo('example.org', 80))",
    "siblings": "import os\nassert os.getppid() <= 2\nfor pid in (PARENT, PARENT - 1, PARENT + 1): denied(lambda: os.kill(pid, 9))",
    "ptrace": (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nassert libc.ptrace(16, os.getppid(), 0, 0) == -1 and ctypes.get_errno() == 1\n"
        "assert libc.ptrace(0, 0, 0, 0) == -1"
    ),
    "namespaces": (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "for flag in (0x10000000, 0x20000, 0x40000000): assert libc.unshare(flag) == -1\n"
        "assert libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0) == -1\nassert libc.syscall(435, 0, 0) == -1 and ctypes.get_errno() == 38\n"
        "assert libc.mount(b'none', b'/tmp', b'tmpfs', 0, b'') == -1 and libc.umount(b'/tmp') == -1"
    ),
    "privileges": (
        "import os\nassert os.getuid() == 65534 and os.getgid() == 65534\nstatus = dict(l.split(':\\t', 1) for l in open('/proc/self/status'))\n"
        "assert status['NoNewPrivs'].strip() == '1' and int(status['CapEff'], 16) == int(status['CapPrm'], 16) == int(status['CapBnd'], 16) == 0\n"
        "denied(lambda: os.setuid(0))\nassert status['Seccomp'].strip() == '2'\n"
        "assert open('/proc/self/oom_score_adj').read().strip() == '1000'"
    ),
    "limits": (
        "import resource\nfor n in ('CPU', 'AS', 'NPROC', 'FSIZE', 'NOFILE', 'CORE'):\n"
        "    k = getattr(resource, 'RLIMIT_' + n); soft, hard = resource.getrlimit(k); assert hard < 2**31, n\n"
        "    denied(lambda: resource.setrlimit(k, (hard + 1, hard + 1)))"
    ),
    "keys": "import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.syscall(250, 0, -3, 1) == -1 and libc.syscall(248, b'user', b'x', b'y', 1, -3) == -1",
    "descriptors of others": "import ctypes, os\nlibc = ctypes.CDLL(None)\nassert libc.syscall(438, libc.syscall(434, os.getppid(), 0), 0, 0) == -1",
    "io_uring": "import ctypes\nassert ctypes.CDLL(None).syscall(425, 8, 0) == -1",
    "limits of others": "import os, resource\ndenied(lambda: resource.prlimit(PARENT, resource.RLIMIT_CPU, (1, 1)))",
    "the checker's secrets": (
        "import os\nfor name in ('environ', 'cmdline', 'auxv', 'fdinfo', 'map_files'):\n    path = '/proc/self/' + name\n"
        "    try: text = b''.join(open(path + '/' + n, 'rb').read() for n in os.listdir(path)) if os.path.isdir(path) else open(path, 'rb').read()\n"
        "    except OSError: continue\n    import re\n    assert not re.search(rb'(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])', text), name"
    ),
    "memory of no process": "import os\ndenied(lambda: os.memfd_create('x'))\nimport ctypes\nassert ctypes.CDLL(None).shmget(0, 4096, 0o1666) == -1",
    "tmp is its own": "import os\nassert os.listdir('/tmp') == []\nopen('/tmp/left', 'w').close()",
}
PRELUDE = """
def f(x): return x + 1
def denied(act):
    try: act()
    except (OSError, ValueError): return
    raise SystemExit('it worked')
"""


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
def test_one_endless_loop_delays_nothing_else(box) -> None:
    jobs = [Job("while True: pass", TESTS)] + [Job(f"def f(x): return x + 1 + {i} * 0", TESTS) for i in range(30)]
    finished: list[float] = []
    with Sandbox(limits=Limits(cpu_s=5, wall_s=30)) as sandbox:
        started = time.monotonic()
        verdicts = sandbox.run(jobs, workers=2, progress=lambda n: finished.append(time.monotonic() - started))
    assert verdicts[0].status == TIMEOUT and all(verdict.passed for verdict in verdicts[1:])
    assert finished[-2] < finished[-1] - 1, "the thirty others were done long before the loop was ended"


@needs_bubblewrap
def test_the_death_of_the_grader_ends_the_boxes(root: Path) -> None:
    program = f"import os\nos.execv('/usr/bin/sleep', ['{MARK}', '600'])"
    code = (
        "from eval.sandbox import *\nfrom eval.sandbox_box import *\nwith Sandbox(limits=Limits(wall_s=600)) as s:\n"
        f"    print('go', flush=True)\n    s.run([Job({program!r}, '')] * 2, workers=2)"
    )
    grader = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE)
    grader.stdout.readline()
    deadline = time.monotonic() + 20
    while sum(MARK in line for line in processes_of_boxes()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    grader.send_signal(signal.SIGKILL)
    grader.communicate()
    deadline = time.monotonic() + 5
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


# What a program may do to the modules that the tests use, before they use them: name → program, tests, modules.
PATCHES = {
    "method of a class": (
        "from collections import Counter\nCounter.__eq__ = lambda *a: True\nCounter.__ne__ = lambda *a: False\ndef f(x): return 'a'",
        "from collections import Counter\nassert Counter(f(1)) == Counter('b')",
        ("collections",),
    ),
    "method added to a class": (
        "import random\nrandom.Random.__getattribute__ = lambda *a: lambda *b: 5\ndef f(x): return 5",
        "import random\nassert f(1) == random.Random(0).randint(1, 3)",
        ("random",),
    ),
    "code of a function": (
        "import copy\ncopy.deepcopy.__code__ = (lambda x, memo=None, _nil=[]: 5).__code__\ndef f(x): return 5",
        "import copy\nassert f(1) == copy.deepcopy(2)",
        ("copy",),
    ),
    "defaults of a function": (
        "import statistics\nstatistics.quantiles.__kwdefaults__['n'] = 2\nstatistics.quantiles.__kwdefaults__ = {'n': 2, 'method': 'exclusive'}\n"
        "def f(x): return 1",
        "import statistics\nassert f(1) == len(statistics.quantiles([1, 2, 3, 4]))",
        ("statistics",),
    ),
    "module of its own in the place of one that is missing": (
        "import sys, types\nsys.modules['no_such_module'] = types.SimpleNamespace(same=lambda *a: True)\ndef f(x): return 5",
        "import no_such_module\nassert no_such_module.same(f(1), 2)",
        ("no_such_module",),
    ),
    "finder of modules": (
        "import importlib.machinery, sys, types\nclass Finder:\n    def find_spec(*a): return importlib.machinery.ModuleSpec(a[1], Finder)\n"
        "    def create_module(spec): return types.ModuleType('m')\n    def exec_module(m): m.same = lambda *a: True\n"
        "sys.meta_path.insert(0, Finder())\nsys.modules.pop('no_such_module', None)\ndef f(x): return 5",
        "import no_such_module\nassert no_such_module.same(f(1), 2)",
        ("no_such_module",),
    ),
}


@needs_bubblewrap
@pytest.mark.parametrize("name", PATCHES)
def test_the_tests_modules_are_as_they_were(box, name: str) -> None:
    program, tests, modules = PATCHES[name]
    assert box(program, tests, modules=modules).status == FAILED


# ---- what a checker in the program's own process cannot stop: shown, so that nobody believes otherwise

YES_OBJECT = "class Yes:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\ndef f(x): return Yes()"
FRAMES = """
import os, sys
def f(x):
    frame = sys._getframe()
    while frame:
        proof, control = frame.f_locals.get('proof'), frame.f_locals.get('control')
        if proof and control is not None:
            os.write(control, b'P ' + proof['nonce'] + b'\\n')
            os._exit(0)
        frame = frame.f_back
"""


PROTOCOL = """
import os, sys, marshal
frame = sys._getframe()
while 'key' not in frame.f_locals:
    frame = frame.f_back
control, key = frame.f_locals['control'], frame.f_locals['key']
os.write(control, b'L ' + key + b'\\n')
size = int.from_bytes(os.read(control, 8), 'big')
os.write(control, b'P ' + marshal.loads(os.read(control, size))['nonce'] + b'\\n')
os._exit(0)
"""


SCAN = """
import os, re
def scan():
    memory, found = open('/proc/self/mem', 'rb', 0), set()
    for line in open('/proc/self/maps').read().splitlines():
        place, rights = line.split()[:2]
        start, end = (int(number, 16) for number in place.split('-'))
        if 'w' in rights and end - start < 2**25:
            memory.seek(start)
            found |= set(re.findall(rb'(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])', memory.read(end - start)))
    return found
before = scan()
def f(x):
    for nonce in scan() - before:
        os.write(3, b'P ' + nonce + b'\\n')
    return 5
"""


@needs_bubblewrap
def test_known_limit_objects_equal_to_everything_pass(box) -> None:
    assert len(KNOWN_LIMITS) == 2
    assert box(YES_OBJECT).passed


@needs_bubblewrap
def test_known_limit_reading_the_checkers_frames_passes(box) -> None:
    assert box(FRAMES).passed
    assert box(PROTOCOL).passed
    # Without the protocol there is nothing to find before the tests run.
    assert not box(FRAMES + "\nf(1)\nos._exit(0)").passed


@needs_bubblewrap
def test_known_limit_scanning_ones_own_memory_passes(box) -> None:
    assert box(SCAN).passed


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
    tmp_path.chmod(0o755)
    for folder in (tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sandbox_box, "START_LIMIT_S", 1.0)
    with pytest.raises(UserError) as caught, Sandbox():
        pass
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_unsafe_must_be_asked_for_and_says_so() -> None:
    with Sandbox(kind="unsafe", limits=QUICK) as sandbox:
        assert sandbox.describe()["kind"] == "unsafe"
        jobs = [
            Job("def f(x): return x + 1", TESTS),
            Job("import os\nos._exit(0)", TESTS),
            Job("while True: pass", TESTS),
        ]
        assert [verdict.status for verdict in sandbox.run(jobs, workers=3)] == [PASSED, EXITED, TIMEOUT]
    with pytest.raises(UserError, match="sandbox=none is unknown"):
        Sandbox(kind="none")


@needs_bubblewrap
@pytest.mark.skipif(os.geteuid() != 0, reason="the suite already runs as an ordinary user")
def test_as_an_ordinary_user(box, root: Path, tmp_path: Path) -> None:
    """The same as an unprivileged user, with the system's Python where ours lies in root's home."""
    copied = tmp_path / "eval"
    shutil.copytree(root / "eval", copied, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(root / "ba_lora", tmp_path / "ba_lora", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)
    python = sys._base_executable if module._open_to_all(Path(sys.base_prefix).resolve()) else "/usr/bin/python3"
    if (
        not Path(python).exists()
        or subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]).returncode
    ):
        pytest.skip("no Python 3.11 that an ordinary user may run")
    code = (
        "from eval.sandbox import *\nfrom eval.sandbox_box import *\nwith Sandbox(limits=Limits(cpu_s=1, wall_s=4)) as s:\n"
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
