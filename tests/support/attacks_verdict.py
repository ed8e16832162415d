"""Programs that attack the sandbox's verdict: they want to pass without solving. For tests/eval/sandbox/test_sandbox_attacks.py."""
# ruff: noqa: E501 (an attack reads best as the one string it is)

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
    "cache of re": (
        "import re\nre._cache[str, 'b', 0] = re.compile('.')\ndef f(x): return 'a'",
        "import re\nassert re.match('b', f(1))",
        ("re",),
    ),
    "table of copy": (
        "import copy\ncopy._deepcopy_dispatch[int] = lambda x, memo: 5\ndef f(x): return 5",
        "import copy\nassert f(1) == copy.deepcopy(2)",
        ("copy",),
    ),
    "list among the defaults of a function": (
        "import copy\ncopy.deepcopy.__defaults__[1].append(5)\ndef f(x): return 1",
        "import copy\nassert f(1) == len(copy.deepcopy.__defaults__[1])",
        ("copy",),
    ),
    "decoder of json": (
        "import json\njson._default_decoder.decode = lambda s: 5\ndef f(x): return 5",
        "import json\nassert f(1) == json.loads('2')",
        ("json",),
    ),
    "dictionary of the decoder of json": (
        "import json\njson._default_decoder.__dict__ = {**vars(json._default_decoder), 'decode': lambda s: 5}\ndef f(x): return 5",
        "import json\nassert f(1) == json.loads('2')",
        ("json",),
    ),
    "class of the decoder of json": (
        "import json\nclass Decoder(json.JSONDecoder):\n    def decode(self, s): return 5\njson._default_decoder.__class__ = Decoder\ndef f(x): return 5",
        "import json\nassert f(1) == json.loads('2')",
        ("json",),
    ),
    "class of a module": (
        "import math, types\nclass Module(types.ModuleType):\n    def __getattribute__(self, name): return lambda *a: True\n"
        "math.__class__ = Module\ndef f(x): return 5",
        "import math\nassert math.isclose(f(1), 2)",
        ("math",),
    ),
    "base of a class": (
        "import fractions, numbers\nclass Base(numbers.Rational):\n    __slots__ = ()\n    def __eq__(self, other): return True\n"
        "del fractions.Fraction.__eq__\nfractions.Fraction.__bases__ = (Base,)\ndef f(x): return 5",
        "import fractions\nassert f(1) == fractions.Fraction(2)",
        ("fractions",),
    ),
    "results that a function keeps": (
        "import fnmatch\nbefore = fnmatch.translate\nfnmatch.translate = lambda pattern: '.*'\nfnmatch.fnmatch('a', 'b')\n"
        "fnmatch.translate = before\ndef f(x): return 'a'",
        "import fnmatch\nassert fnmatch.fnmatch(f(1), 'b')",
        ("fnmatch",),
    ),
    "function of a module that the tests' module imports": (
        "import math\nmath.gcd = lambda *numbers: 1\ndef f(x): return 2",
        "import fractions\nassert f(1) == fractions.Fraction(2, 4).numerator",
        ("fractions",),
    ),
    "variable in the closure of a function": (
        "import pkgutil\nfor cell in pkgutil.iter_importer_modules.__closure__:\n"
        "    if callable(cell.cell_contents): cell.cell_contents = lambda kind: lambda *a: [5]\ndef f(x): return 5",
        "import pkgutil\nassert list(pkgutil.iter_importer_modules(3)) == [f(1)]",
        ("pkgutil",),
    ),
}


# Programs that pass, where nothing stops them, although f is wrong: name → (program, tests).
TESTS = "x = f(1)\nassert x == 2\ny = 1"
FIVE = "\ndef f(x): return 5"
JUMP = """
import sys
def jump(frame, event, arg):
    if event == 'line' and frame.f_code.co_filename == 'tests.py': frame.f_lineno = 3
    return jump
"""
SET_JUMP = """
def f(x):
    sys._getframe(1).f_trace = jump
    sys.settrace(jump)
    return 5
"""
PASSES = {
    "frame of its own on the checker's line": (
        """
import marshal, os, socket
real = os.dup(3)
ours, theirs = socket.socketpair()
def steal():
    os.write(real, ours.recv(99))
    size = int.from_bytes(os.read(real, 8), 'big')
    os.write(real, b'P ' + marshal.loads(os.read(real, size))['nonce'] + b'\\n')
    os._exit(0)
body = marshal.dumps({'tests': 'steal()', 'nonce': b'0' * 32})
ours.send(len(body).to_bytes(8, 'big') + body)
os.dup2(theirs.fileno(), 3)
"""
        + FIVE,
        TESTS,
    ),
    "name that is no plain str": (
        """
import sys
class Late(str):
    __hash__ = str.__hash__
    def __eq__(self, other): return sys._getframe(1).f_code.co_filename == 'tests.py' and str.__eq__(self, other)
for name in ('abs', 'len', 'sorted'): globals()[Late(name)] = lambda x: 0
"""
        + FIVE,
        "assert abs(f(1) - 2) < 1 and len([f(1)]) == 0 and sorted([f(1)]) == 0",
    ),
    "handler of a signal in C takes the nonce off the socket": (
        """
import ctypes, fcntl, marshal, os, signal
def steal(number):
    try: frame = os.read(3, 99999)
    except OSError: return
    if len(frame) > 8:
        os.write(3, b'P ' + marshal.loads(frame[8:])['nonce'] + b'\\n')
        os._exit(0)
handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(steal)
ctypes.CDLL(None).signal(signal.SIGIO, handler)
fcntl.fcntl(3, fcntl.F_SETOWN, os.getpid())
fcntl.fcntl(3, fcntl.F_SETFL, fcntl.fcntl(3, fcntl.F_GETFL) | fcntl.FASYNC)
"""
        + FIVE,
        TESTS,
    ),
    "jump over the asserts": (JUMP + SET_JUMP, TESTS),
    "jump over the asserts, the checker's hook changed": (
        "import gc\nfor o in gc.get_objects():\n    if getattr(o, '__name__', '') == 'refuse': o.__code__ = (lambda *a: None).__code__"
        + JUMP
        + SET_JUMP,
        TESTS,
    ),
    "trace that sets itself again when it is deleted": (
        JUMP
        + """
class Again:
    def __call__(self, *arguments): return jump(*arguments)
    def __del__(self): sys.settrace(Again())
sys.settrace(Again())
"""
        + FIVE,
        TESTS,
    ),
    "signal handler that sets itself again when it is deleted": (
        JUMP
        + """
import signal
class Again:
    def __call__(self, number, frame):
        try: sys.settrace(jump)
        except RuntimeError: pass
        while frame: frame.f_trace, frame = jump, frame.f_back
    def __del__(self): signal.signal(signal.SIGALRM, Again()); signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0001)
signal.signal(signal.SIGALRM, Again())
"""
        + FIVE,
        "for i in range(10 ** 5): pass\nassert f(1) == 2\ny = 1",
    ),
}


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


GLOBALS = """
import sys
def f(x):
    sys._getframe(1).f_globals['abs'] = lambda x: 0
    return 5
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


# What the tests' modules reach is put back, but not what lies in C, nor modules that they import only when called.
REGISTER = "import numbers\nnumbers.Number.register(str)\ndef f(x): return 'a'"
LAZY = "import _strptime\n_strptime._strptime_datetime = lambda *a: 5\ndef f(x): return 5"
