"""The inside of the sandbox: run one program and its tests, and prove that the tests were reached and passed.

`eval/sandbox/sandbox.py` hands this file's text to a fresh interpreter; it imports nothing of the project. Frames (8
bytes of length, then marshal) come in on descriptor 0, lines go out on the same socket:

    → limits, program, key         ← R        ready for a job
    (the program runs)             ← L key    it has been loaded
    → tests, nonce
    (the tests run)                ← P nonce  every statement of the tests was executed without an exception
                                   ← F text   something raised, or the program left something running

The nonce does not exist in this process before the program's top level has ended, and is written only after the last
test. So leaving early with status 0, printing, and patches made beforehand prove nothing. Before it is asked for, the
program must be alone: no thread or process that could read it off the socket, no timer, signal handler, trace or audit
hook that could start one; and the socket must be the one that the box began with. All names that matter are locals
bound before the program runs; the tests see untouched builtins, and the modules they import as they were: all that
those reach, classes, functions, dictionaries, caches and other objects, is put back.
"""


def _main() -> None:
    import _signal
    import builtins
    import fcntl
    import functools
    import gc
    import marshal
    import os
    import resource
    import sys
    import time

    read, write, duplicate, close, leave, getpid = os.read, os.write, os.dup2, os.close, os._exit, os.getpid
    kill, wait, open_, no_hang, status_of = os.kill, os.waitpid, os.open, os.WNOHANG, os.fstat
    change_file, get_flags, set_flags, asynchronous = fcntl.fcntl, fcntl.F_GETFL, fcntl.F_SETFL, fcntl.FASYNC
    set_signal, get_signal, set_timer, timers = _signal.signal, _signal.getsignal, _signal.setitimer, (0, 1, 2)
    loads, run, build, as_text, kind, join = marshal.loads, exec, compile, str, type, b"".join
    disable_gc, enable_gc, gc_is_on, gc_callbacks = gc.disable, gc.enable, gc.isenabled, gc.callbacks
    settrace, setprofile, monitoring = sys.settrace, sys.setprofile, getattr(sys, "monitoring", None)
    gettrace, getprofile = sys.gettrace, sys.getprofile
    now, pause, is_callable, is_a, ignored = time.monotonic, time.sleep, callable, isinstance, _signal.SIG_IGN
    get_on_object, set_on_object = object.__getattribute__, object.__setattr__
    set_on_class, delete_on_class, dict_, list_ = type.__setattr__, type.__delattr__, dict, list
    min_, len_, whole, vars_, range_, any_, id_ = min, len, int, vars, range, any, id
    system, built_in, os_error, any_error = sys, builtins, OSError, BaseException
    own_pid = getpid()
    grace_s = 1.0  # for what is about to end by itself
    control = os.dup(0)  # not inherited by programs that the program starts
    inode = status_of(control)[1:3]

    def check_line() -> None:
        """Leave where the program has put something else in the place of the socket, to say or hear other things."""
        try:
            found = status_of(control)[1:3]
        except os_error:
            found = None
        if found != inode:
            leave(1)

    def say(line: bytes) -> None:
        check_line()
        write(control, line + b"\n")

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
        check_line()
        return loads(receive(whole.from_bytes(receive(8), "big")))

    say(b"R")
    job = frame()

    nowhere = os.open(os.devnull, os.O_RDONLY)
    duplicate(nowhere, 0)
    close(nowhere)
    with open("/proc/self/oom_score_adj", "w") as file:  # should memory run out, this process goes first
        file.write("1000")
    for name, (soft, hard) in job["limits"].items():
        resource.setrlimit(getattr(resource, name), (soft, hard))

    locked = False  # True while the tests run: then nothing may trace them

    def refuse(event: str, arguments: tuple) -> None:
        """Raise in the audited action; a hook that would be added is kept out without a word."""
        if event == "sys.addaudithook" or (event == "object.__setattr__" and arguments[0] is refuse):
            raise RuntimeError(event)
        if locked and event in ("sys.settrace", "sys.setprofile", "sys.monitoring.register_callback"):
            raise RuntimeError(event)

    sys.addaudithook(refuse)

    # ---- what the tests will find as it was

    module, function, lru_cache = kind(sys), kind(refuse), kind(functools.lru_cache(refuse))
    modules, finders, search_path = sys.modules, list(sys.meta_path), list(sys.path)
    missing, types, classes, attributes = [], [], [], []  # …, (thing, type), (class, content), (thing, name, value)
    dictionaries, collections, cells, caches = [], [], [], []  # (thing, content) thrice, how to clear a cache

    def remember(waiting: list) -> None:
        """Keep the state of these things and of all that they reach, none of which the program has made."""
        apart = (system.modules, vars(system), vars(built_in), vars(modules["__main__"]))
        seen, alive = {id(thing) for thing in apart}, []
        while waiting:
            thing = waiting.pop()
            if id(thing) in seen:
                continue
            seen.add(id(thing))
            alive.append(thing)  # else another thing may get its id
            of = type(thing)
            if of.__flags__ & 0x300 == 0x200:  # made at run time, and not immutable
                types.append((thing, of))
                waiting.append(of)
            if issubclass(of, dict):
                dictionaries.append((thing, dict(thing)))
                waiting += thing.values()
            elif of in (list, set):
                collections.append((thing, list(thing)))
                waiting += thing
            elif of in (tuple, frozenset):
                waiting += thing
            elif of is module:
                types.append((thing, of))
                seen |= {id(vars(thing).get(name)) for name in ("__spec__", "__loader__")} - {id(None)}
                waiting.append(vars(thing))
            elif issubclass(of, type):
                if thing.__flags__ & 0x300 == 0x200:
                    attributes.append((thing, "__bases__", thing.__bases__))
                    classes.append((thing, dict(vars(thing))))
                    waiting += [*vars(thing).values(), *thing.__bases__]
            elif of is function:
                names = ("__code__", "__defaults__", "__kwdefaults__", "__dict__")
                attributes.extend((thing, name, getattr(thing, name)) for name in names)
                waiting += [thing.__defaults__, thing.__kwdefaults__, vars(thing), thing.__globals__]
                for cell in thing.__closure__ or ():
                    try:
                        cells.append((cell, cell.cell_contents))
                        waiting.append(cell.cell_contents)
                    except ValueError:  # empty
                        pass
            elif of is lru_cache:
                caches.append(thing.cache_clear)
                waiting.append(thing.__wrapped__)
            elif of in (staticmethod, classmethod, property) or hasattr(of, "__self__"):  # methods
                inner = ("__func__", "fget", "fset", "fdel", "__self__")
                waiting += [getattr(thing, name) for name in inner if hasattr(of, name)]
            else:
                try:
                    content = get_on_object(thing, "__dict__")
                    waiting.append(content)
                    set_on_object(thing, "__dict__", content)
                    attributes.append((thing, "__dict__", content))
                except (AttributeError, TypeError):  # it has none, or cannot be given another
                    pass

    def remember_modules(names: tuple) -> dict:
        """Import these modules, remember them, and return all that are loaded."""
        for name in names:
            try:
                __import__(name)
            except ImportError:
                missing.append(name)  # the tests will say so themselves
        remember([modules[name] for name in names if name in modules])
        dictionaries.append((vars(built_in), dict(vars(built_in))))
        if "sys" in names:
            dictionaries.append((vars(system), dict(vars(system))))
        return dict(modules)

    loaded = remember_modules(job["modules"])

    def restore() -> None:
        for thing, of in types:
            if kind(thing) is not of:
                (set_on_class if is_a(thing, kind) else set_on_object)(thing, "__class__", of)
        for class_, content in classes:
            present = dict_(vars_(class_))
            for name in present:
                if name not in content:
                    delete_on_class(class_, name)
            for name, value in content.items():
                if present.get(name) is not value:
                    set_on_class(class_, name, value)
        for thing, name, value in attributes:
            if is_a(thing, kind):
                if [id_(base) for base in thing.__bases__] != [id_(base) for base in value]:
                    set_on_class(thing, name, value)
            elif get_on_object(thing, name) is not value:
                set_on_object(thing, name, value)
        for cell, value in cells:
            cell.cell_contents = value
        for thing, content in dictionaries:
            added, of = submodules(thing), kind(thing)
            of.clear(thing)
            of.update(thing, content)
            of.update(thing, added)
        for thing, content in collections:
            thing.clear()
            (thing.extend if kind(thing) is list_ else thing.update)(content)
        for clear in caches:
            clear()
        modules.update(loaded)
        for name in missing:
            modules.pop(name, None)
        system.meta_path, system.path = finders, search_path

    def submodules(namespace: dict) -> dict:
        """Return what imports by the program have added to a package."""
        package = namespace.get("__name__")
        if kind(package) is not as_text or kind(namespace) is not dict_:
            return {}
        return {
            name: value
            for name, value in namespace.items()
            if kind(name) is as_text and kind(value) is module and modules.get(f"{package}.{name}") is value
        }

    # ---- no one else

    def disarm() -> None:
        """Take away what would run the program's code between the lines of this file.

        Objects of the program that go with it may set something up again when they are deleted: so do it until
        nothing is left.
        """
        nonlocal locked
        locked = False
        for _ in range_(10):
            settrace(None)
            setprofile(None)
            disable_gc()
            gc_callbacks.clear()
            for timer in timers:
                set_timer(timer, 0)
            for number in range_(1, 65):
                if number not in (9, 19, 32, 33):  # a handler that C has set is none that Python knows of
                    set_signal(number, 1 if get_signal(number) is ignored else 0)
            change_file(control, set_flags, change_file(control, get_flags) & ~asynchronous)
            for tool in range_(6) if monitoring is not None else ():
                if monitoring.get_tool(tool) is not None:
                    monitoring.set_events(tool, 0)
            handlers = any_(is_callable(get_signal(number)) for number in range_(1, 65))
            if gettrace() is getprofile() is None and not gc_callbacks and not gc_is_on() and not handlers:
                locked = True
                return
        fail("sets up hooks again and again")

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
            except os_error:
                pass
            try:
                if processes:
                    kill(-1, 0)  # every process of the box but its first and this one: an error where there is none
            except os_error:
                processes = False
            if not threads and not processes:
                return None
            if now() > end:
                return "threads" if threads else "processes"
            pause(0.002)

    def fail(text: str) -> None:
        if getpid() == own_pid:  # and no copy that the program made of this process
            say(b"F " + text.replace("\n", " ").encode("utf-8", "replace")[:400])
        leave(1)

    def describe(error: BaseException) -> str:
        try:
            return f"{kind(error).__name__}: {as_text(error)[:200]}"
        except any_error:  # its own __str__ may raise
            return kind(error).__name__

    pristine = dict(vars(builtins))
    solution = kind(sys)("solution")
    modules["solution"] = solution
    space = vars(solution)
    program, key, allowed, alone_in_box = job["program"], job["key"], frozenset(job["names"]), job["own_processes"]
    del job, name, resource, marshal, time, gc, os, sys, builtins, fcntl, functools, _signal

    try:
        run(build(program, "solution.py", "exec", dont_inherit=True), space)
    except any_error as error:
        fail(describe(error))
    if getpid() != own_pid:
        leave(1)  # a copy that the program made of this process
    collects = gc_is_on()
    for step in (disarm, restore, disarm):  # what ends in the meantime ends with the modules as the program left them
        step()
        if left := left_running():
            fail(f"left {left} running when it had been loaded")
    say(b"L " + key)
    proof = frame()
    if collects:
        enable_gc()

    tests = {
        name: value
        for name, value in space.items()
        if kind(name) is as_text and (name not in pristine or name in allowed)  # other keys may equal what they like
    }
    tests["__builtins__"] = pristine
    try:
        run(build(proof["tests"], "tests.py", "exec", dont_inherit=True), tests)
    except any_error as error:
        fail(describe(error))
    if getpid() != own_pid:
        leave(1)
    disarm()
    if left := left_running():
        fail(f"left {left} running after the tests")
    say(b"P " + proof["nonce"])
    leave(0)


_main()
