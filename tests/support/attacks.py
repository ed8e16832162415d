"""Programs that attack the sandbox, for tests/eval/sandbox/test_sandbox_attacks.py; those that attack its verdict: attacks_verdict.py."""
# ruff: noqa: E501 (an attack reads best as the one string it is)

from eval.sandbox.jobs import EXITED, FAILED, MEMORY, OUTPUT, TIMEOUT

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
    "disk fill": (
        "import itertools\nfor i in itertools.count():\n    with open('/tmp/%d' % i, 'wb') as f: f.write(b'x' * 2**22)",
        {FAILED},
    ),
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
    "shared memory that it lets go": (
        "import mmap, time\nm = mmap.mmap(-1, 200 * 2**20)\nfor i in range(0, len(m), 2**20):\n    m[i:i + 2**20] = b'x' * 2**20\n    m.madvise(mmap.MADV_DONTNEED)\ntime.sleep(99)",
        {FAILED},
    ),
    "sockets full of bytes in many processes": (
        "import os, socket, time\nfor i in range(9):\n    if os.fork() == 0: break\nkept = []\ntry:\n    while True:\n"
        "        a, b = socket.socketpair(); kept += [a, b]; a.setblocking(False)\n        try:\n            while True: a.send(b'x' * 65536)\n"
        "        except BlockingIOError: pass\nexcept OSError: time.sleep(99)",
        {OUTPUT},
    ),
    "children in sessions of their own take the processors": (
        "import os, time\nfor i in range(12):\n    if os.fork() == 0:\n        os.setsid()\n        while True: pass\ntime.sleep(99)",
        {TIMEOUT},
    ),
    "children that nobody waits for take the processors": (
        "import os, signal, time\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\nwhile True:\n    try:\n        if os.fork() == 0:\n"
        "            end = time.process_time() + 0.02\n            while time.process_time() < end: pass\n            os._exit(0)\n"
        "    except OSError: time.sleep(0.01)",
        {TIMEOUT},
    ),
}


# Programs that do harm and then answer rightly: each passes where nothing stops it, so that a box must make it fail.
HARM = {
    "reads the home folder": "assert open(HOME_FILE).read() == SECRET",
    "reads the repository": "assert 'BA-LoRA' in open(REPOSITORY + '/README.md').read()",
    "reads the environment of another process": "assert SECRET in open(f'/proc/{VICTIM}/environ').read()",
    "reads the memory of another process": (
        "lines = [l.split() for l in open(f'/proc/{VICTIM}/maps')]\nstart = int(lines[0][0].split('-')[0], 16)\n"
        "memory = open(f'/proc/{VICTIM}/mem', 'rb')\nmemory.seek(start)\nassert memory.read(4) == b'\\x7fELF'"
    ),
    "writes outside": "open(TARGET, 'w').write('harm')",
    "writes outside through a symlink": "import os\nos.symlink(TARGET, 'link')\nopen('link', 'w').write('harm')",
    "links to a file outside": "import os\nos.link(TARGET, 'hard')\nopen('hard', 'w').write('harm')",
    "changes the grader's file": "open(GRADER, 'a').write('# harm')",
    "removes the grader's file": "import os\nos.unlink(GRADER)",
    "takes open files from another process": "import resource\nresource.prlimit(VICTIM, resource.RLIMIT_NOFILE, (5, 5))",
    "connects by TCP": "import socket\nsocket.create_connection(('127.0.0.1', TCP), 2).sendall(b'harm')",
    "sends by UDP": (
        "import socket\nanswer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\nanswer.connect(('127.0.0.1', UDP))\n"
        "answer.send(b'harm')\nimport time\ntime.sleep(0.1)\nanswer.send(b'harm')  # raises where the first was refused"
    ),
    "connects to a Unix socket": "import socket\nsocket.socket(socket.AF_UNIX).connect(UNIX)",
    "connects to an abstract Unix socket": "import socket\nsocket.socket(socket.AF_UNIX).connect(ABSTRACT)",
    "stops another process by ptrace": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, VICTIM, 0, 0) == 0",
    "kills another process": "import os\nos.kill(DOOMED, 9)",
}

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
    "memory that is shared": (
        "import mmap\ndenied(lambda: mmap.mmap(-1, 4096))\nzero = open('/dev/zero', 'r+b')\ndenied(lambda: mmap.mmap(zero.fileno(), 4096))\n"
        "denied(lambda: mmap.mmap(zero.fileno(), 4096, access=mmap.ACCESS_READ))\n"
        "denied(lambda: mmap.mmap(-1, 2**21, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000))\n"
        "m = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\nm[:] = b'x' * 4096"
    ),
    "memory given to a pipe": (
        "import ctypes, os, platform\nnumber = {'x86_64': 278, 'aarch64': 75}[platform.machine()]\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "a, b = os.pipe()\nassert libc.syscall(number, b, 0, 0, 0) == -1 and ctypes.get_errno() == 1"
    ),
    "families of sockets": (
        "import socket\nfor family, kind, protocol in ((40, 1, 0), (16, 3, 0), (17, 3, 0), (38, 5, 0), (2, 5, 132), (2, 1, 262), (2, 2, 1)):\n"
        "    try: socket.socket(family, kind, protocol)\n    except PermissionError: continue\n    raise SystemExit((family, kind, protocol))\n"
        "for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6):\n    for kind in (1, 2): socket.socket(family, kind).close()\n"
        "a, b = socket.socketpair()\na.send(b'x')\nassert b.recv(1) == b'x'"
    ),
    "tmp is its own": "import os\nassert os.listdir('/tmp') == []\nopen('/tmp/left', 'w').close()",
}
PRELUDE = """
def f(x): return x + 1
def denied(act):
    try: act()
    except (OSError, ValueError): return
    raise SystemExit('it worked')
"""
