"""The inside of the sandbox: run one program and its tests, and prove that the tests were reached and passed.

`eval/sandbox.py` hands this file's text to a fresh interpreter; it imports nothing of the project. Frames (8 bytes of
length, then marshal) come in on descriptor 0, lines go out on the same socket:

    → limits, program, key         ← R        ready for a job
    (the program runs)             ← L key    it has been loaded
    → tests, nonce
    (the tests run)                ← P nonce  every statement of the tests was executed without an exception
                                   ← F text   something raised, or the program left something running

The nonce does not exist in this process before the program's top level has ended, and is written only after the last
test. So leaving early with status 0, printing, and patches made beforehand prove nothing. Before it is asked for, the
program must be alone: no thread or process that could read it off the socket, no timer, trace or audit hook that could
start one. All names that matter are locals bound before the program runs; the tests see untouched builtins, and the
modules they import as they were, their classes and functions included.
"""


def _main() -> None:
    import _signal
    import builtins
    import gc
    import marshal
    import os
    import resource
    import sys
    import time

    read, write, duplicate, close, leave, getpid = os.read, os.write, os.dup2, os.close, os._exit, os.getpid
    kill, wait, open_, no_hang = os.kill, os.waitpid, os.open, os.WNOHANG
    set_signal, get_signal, set_timer, timers = _signal.signal, _signal.getsignal, _signal.setitimer, (0, 1, 2)
    loads, run, build, as_text, kind, join = marshal.loads, exec, compile, str, type, b"".join
    disable_gc, enable_gc, gc_is_on, gc_callbacks = gc.disable, gc.enable, gc.isenabled, gc.callbacks
    settrace, setprofile, monitoring = sys.settrace, sys.setprofile, getattr(sys, "monitoring", None)
    now, pause, is_callable, set_attribute, delete_attribute = time.monotonic, time.sleep, callable, setattr, delattr
    min_, len_, whole, vars_, dict_, range_, system = min, len, int, vars, dict, range, sys
    own_pid = getpid()
    grace_s = 1.0  # for what is about to end by itself
    control = os.dup(0)  # not inherited by programs that the program starts

    def receive(size: int) -> bytes:
        parts = []
        while size:
            part = read(control, min_(size, 65536))
            if not part:
                leave(1)
            parts.append(part)
            size -= len_(part)
        return join(parts)

    def frame() -> dict:
        return loads(receive(whole.from_bytes(receive(8), "big")))

    write(control, b"R\n")
    job = frame()

    nowhere = os.open(os.devnull, os.O_RDONLY)
    duplicate(nowhere, 0)
    close(nowhere)
    with open("/proc/self/oom_score_adj", "w") as file:  # should memory run out, this process goes first
        file.write("1000")
    for name, (soft, hard) in job["limits"].items():
        resource.setrlimit(getattr(resource, name), (soft, hard))

    def refuse_audit_hooks(event: str, arguments: tuple) -> None:
        if event == "sys.addaudithook":
            raise RuntimeError  # this keeps the new hook out, without a word

    sys.addaudithook(refuse_audit_hooks)

    # ---- what the tests will find as it was

    function = kind(refuse_audit_hooks)
    modules, finders, search_path = sys.modules, list(sys.meta_path), list(sys.path)
    namespaces = [(vars(builtins), dict(vars(builtins)))]  # (a namespace, its content)
    kept_modules, missing, classes, attributes = {}, [], [], []  # attributes: (function, name, value)

    def remember(thing: object) -> None:
        if isinstance(thing, function):
            attributes.append((thing, "__code__", thing.__code__))
            attributes.append((thing, "__defaults__", thing.__defaults__))
            attributes.append((thing, "__kwdefaults__", thing.__kwdefaults__ and dict(thing.__kwdefaults__)))
        elif isinstance(thing, kind) and thing.__module__ in kept_modules:
            classes.append((thing, dict(vars(thing))))
            for member in vars(thing).values():
                if isinstance(member, function):
                    remember(member)

    def remember_modules(names: tuple) -> None:
        for name in names:
            try:
                __import__(name)
                kept_modules[name] = modules[name]
            except ImportError:
                missing.append(name)  # the tests will say so themselves
        for module in kept_modules.values():
            namespaces.append((vars(module), dict(vars(module))))
            for thing in vars(module).values():
                remember(thing)

    remember_modules(job["modules"])

    def restore() -> None:
        for namespace, content in namespaces:
            namespace.clear()
            namespace.update(content)
        modules.update(kept_modules)
        for name in missing:
            modules.pop(name, None)
        for class_, content in classes:
            present = dict_(vars_(class_))
            for name in present:
                if name not in content:
                    delete_attribute(class_, name)
            for name, value in content.items():
                if present.get(name) is not value:
                    set_attribute(class_, name, value)
        for thing, name, value in attributes:
            set_attribute(thing, name, value)
        system.meta_path, system.path = finders, search_path

    # ---- no one else

    def disarm() -> None:
        """Take away what would run the program's code between the lines of this file."""
        settrace(None)
        setprofile(None)
        disable_gc()
        gc_callbacks.clear()
        for timer in timers:
            set_timer(timer, 0)
        for number in range_(1, 65):
            if is_callable(get_signal(number)) and number not in (9, 19, 32, 33):
                set_signal(number, 0)
        for tool in range_(6) if monitoring is not None else ():
            if monitoring.get_tool(tool) is not None:
                monitoring.set_events(tool, 0)

    def left_running() -> str | None:
        """Return what else runs in the box when the grace is over: threads of this process, other processes."""
        end = now() + grace_s
        while True:
            status = open_("/proc/self/status", 0)
            threads = whole(read(status, 8192).partition(b"\nThreads:\t")[2].partition(b"\n")[0]) - 1
            close(status)
            processes = alone_in_box
            try:
                while processes and wait(-1, no_hang)[0]:  # what has ended already
                    pass
            except OSError:
                pass
            try:
                if processes:
                    kill(-1, 0)  # every process of the box but its first and this one: an error where there is none
            except OSError:
                processes = False
            if not threads and not processes:
                return None
            if now() > end:
                return "threads" if threads else "processes"
            pause(0.002)

    def fail(text: str) -> None:
        write(control, b"F " + text.replace("\n", " ").encode("utf-8", "replace")[:400] + b"\n")
        leave(1)

    def describe(error: BaseException) -> str:
        try:
            return f"{kind(error).__name__}: {as_text(error)[:200]}"
        except BaseException:  # its own __str__ may raise
            return kind(error).__name__

    pristine = dict(vars(builtins))
    solution = kind(sys)("solution")
    modules["solution"] = solution
    space = vars(solution)
    program, key, allowed, alone_in_box = job["program"], job["key"], frozenset(job["names"]), job["own_processes"]
    del job, name, resource, marshal, time, gc, os, sys, builtins, _signal

    try:
        run(build(program, "solution.py", "exec", dont_inherit=True), space)
    except BaseException as error:
        fail(describe(error))
    if getpid() != own_pid:
        leave(1)  # a copy that the program made of this process
    collects = gc_is_on()
    restore()
    disarm()
    if left := left_running():
        fail(f"left {left} running when it had been loaded")
    write(control, b"L " + key + b"\n")
    proof = frame()
    if collects:
        enable_gc()

    tests = {name: value for name, value in space.items() if name not in pristine or name in allowed}
    tests["__builtins__"] = pristine
    try:
        run(build(proof["tests"], "tests.py", "exec", dont_inherit=True), tests)
    except BaseException as error:
        fail(describe(error))
    if getpid() != own_pid:
        leave(1)
    disarm()
    if left := left_running():
        fail(f"left {left} running after the tests")
    write(control, b"P " + proof["nonce"] + b"\n")
    leave(0)


_main()
