"""What belongs to the answer in a generated program: statements at the top level are kept if the wanted functions need
them, directly or through others; examples, asserts, prints and `if __name__ == "__main__"` are left out.

Needed is what binds a name that is needed, and what may change an object that is needed: an assignment to a part of it,
a call of its methods, a call that it is passed to, a call of a function that changes it, all of these through another
name of the object, too; and what calls exec, eval, globals and their like, which may bind and read any name. In doubt a
statement stays: a program that passes as it stands must pass afterwards. Only examples (they use a wanted function,
read the input, exit or assert) must change a needed name by themselves.

Each statement is looked at once and each name is followed once, so that the time grows with the length of the text.
"""

import ast
import builtins
import re
import symtable
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

# Forgotten imports: a name that nothing binds, and where it comes from.
MODULES = (
    "bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "hashlib", "heapq",
    "itertools", "json", "math", "operator", "random", "re", "statistics", "string", "sys", "typing",
)  # fmt: skip
NAMES = {
    **dict.fromkeys(
        "Any Callable Deque Dict FrozenSet Generator Iterable Iterator List Mapping NamedTuple Optional Sequence Set "
        "Tuple Type TypeVar Union".split(),
        "typing",
    ),
    **dict.fromkeys("Counter OrderedDict defaultdict deque namedtuple".split(), "collections"),
    **dict.fromkeys("lru_cache reduce".split(), "functools"),
}
_EXAMPLE_NAMES = {"input", "exit", "quit", "breakpoint"}
_EXAMPLE_ATTRIBUTES = {"stdin", "exit", "_exit", "abort", "argv", "main", "testmod"}
_CHANGE_NOTHING = set("abs all any float int isinstance len max min print range repr sorted str sum type".split())
_HIDDEN = {"exec", "eval", "globals", "locals", "vars", "setattr"}  # they bind and read names unseen
_SETTINGS = {"setrecursionlimit", "set_int_max_str_digits", "stack_size"}  # of the interpreter: kept in any case


def parse(source: str) -> ast.Module | None:
    """Return the syntax tree, or None where there is none."""
    return parse_or_line(source)[0]


def parse_or_line(source: str) -> tuple[ast.Module | None, int]:
    """Return the tree, or None and the line of the error (from 1)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes and the like
        try:
            return ast.parse(source), 0
        except SyntaxError as error:
            return None, error.lineno or 1
        except (ValueError, MemoryError, RecursionError):
            return None, 1


def prune_program(source: str, roots: set[str], check_clock: Callable[[], object]) -> str:
    """Return the program without what the roots do not need, and with the imports that were forgotten.

    check_clock: called on the way; it raises where that takes too long.
    """
    tree = parse(source)
    try:
        kept = needed_statements(tree.body, roots, check_clock)
        program = _keep_lines(source, tree.body, kept)
    except RecursionError:  # an expression too deep for ast.unparse and its like
        kept, program = tree.body, source
    return _forgotten_imports(ast.Module(kept, [])) + program


def needed_statements(body: Sequence[ast.stmt], roots: set[str], check_clock: Callable[[], object]) -> list[ast.stmt]:
    """Return the statements that the names `roots` need, in order, imports from __future__ first."""
    body = _without_stubs(body)
    kept = _Needed(body, roots, check_clock).kept
    chosen = [node for node in body if id(node) in kept]
    return sorted(chosen, key=lambda node: not (isinstance(node, ast.ImportFrom) and node.module == "__future__"))


def is_stub(function: _Function) -> bool:
    """Whether a function's body is at most a docstring, constants (...), pass, NotImplementedError and definitions."""
    return all(
        isinstance(node, ast.Pass | _Definition | ast.Import | ast.ImportFrom)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        or (isinstance(node, ast.Raise) and root_name(node.exc) == "NotImplementedError")
        for node in function.body
    )


def unbound_names(tree: ast.Module) -> set[str]:
    """Return the names that the program uses and nothing in it binds; none where `import *` may bind them."""
    used, bound = set(), set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            bound.add(node.name)
        elif isinstance(node, _Definition | ast.Import | ast.ImportFrom):
            bound |= _bound_by(node)
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            return set()
    return used - bound


def bound_names(tree: ast.Module) -> set[str]:
    """Return the names that the program binds at its top level."""
    return {name for statement in tree.body for name in _Statement(statement).binds}


def root_name(node: ast.expr | None) -> str | None:
    """Return the name at the root of `name.attribute[index](…)…`, None for other expressions."""
    while node is not None and not isinstance(node, ast.Name):
        node = getattr(node, "func", None) or getattr(node, "value", None)
        if not isinstance(node, ast.expr):
            return None
    return node.id if node is not None else None


class _Statement:
    """What a statement at the top level does to names.

    binds; changes: names whose object it changes itself; touches: names whose object a call may change;
    other_names: (new name, name that it may stand for); is_example: see the head of this file.
    """

    def __init__(self, node: ast.stmt) -> None:
        self.node = node
        self.binds = _bound_by(node)
        self.changes: set[str | None] = set()
        self.touches: set[str | None] = set()
        self.other_names: set[tuple[str, str]] = set()
        self.loads: set[str] = set()
        self.is_example = self.is_setting = self.is_hidden = False
        for inner in _executed(node):
            self._read(inner)
        self.is_hidden = self.is_hidden and not self.is_example

    def _read(self, inner: ast.AST) -> None:
        if isinstance(inner, ast.Name):
            (self.loads if isinstance(inner.ctx, ast.Load) else self.binds).add(inner.id)
        elif isinstance(inner, ast.Subscript | ast.Attribute) and not isinstance(inner.ctx, ast.Load):
            self.changes.add(root_name(inner))
        elif isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Call):
            if isinstance(inner.value.func, ast.Attribute):  # table.append(…)
                self.changes.add(root_name(inner.value.func))
        elif isinstance(inner, _Definition | ast.Import | ast.ImportFrom):
            self.binds |= _bound_by(inner)
            self.touches |= {root_name(node) for node in getattr(inner, "decorator_list", ())}
            self.touches |= {root_name(node) for node in getattr(inner, "bases", ())}
        if isinstance(inner, ast.Call):
            arguments = [*inner.args, *(keyword.value for keyword in inner.keywords)]
            if root_name(inner.func) not in _CHANGE_NOTHING:
                self.touches |= {root_name(node) for node in (inner.func, *arguments)}
            called = inner.func.attr if isinstance(inner.func, ast.Attribute) else root_name(inner.func)
            self.is_setting = self.is_setting or called in _SETTINGS
            self.is_hidden = self.is_hidden or (isinstance(inner.func, ast.Name) and called in _HIDDEN)
        if isinstance(inner, ast.AugAssign):
            self.changes.add(root_name(inner.target))
        if isinstance(inner, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.NamedExpr):
            targets = inner.targets if isinstance(inner, ast.Assign) else [inner.target]
            self._other_names(targets, inner.value)
        elif isinstance(inner, ast.For | ast.AsyncFor | ast.comprehension):
            self._other_names([inner.target], inner.iter)
        elif isinstance(inner, ast.withitem):
            self._other_names([inner.optional_vars], inner.context_expr)
        self.is_example = self.is_example or _is_example(inner)

    def _other_names(self, targets: Sequence[ast.expr | None], value: ast.expr | None) -> None:
        sources = _names_in(value)
        names = {name for target in targets for name in _names_in(target)}
        self.other_names |= {(name, source) for name in names for source in sources} if len(sources) < 50 else set()


class _Needed:
    """The search for what the roots need; `kept` holds the ids of the statements."""

    def __init__(self, body: Sequence[ast.stmt], roots: set[str], check_clock: Callable[[], object]) -> None:
        self.kept: set[int] = set()
        self._needed: set[str] = set()
        self._watched: set[str] = set()  # names through which an object that is needed may be changed
        self._pending: list[str] = sorted(roots)
        self._binders, self._changers, self._touchers = defaultdict(list), defaultdict(list), defaultdict(list)
        self._standing_for: dict[str, set[str]] = defaultdict(set)  # a name → names that may change its object
        statements = [_Statement(node) for node in body if not _is_main_guard(node)]
        definitions = [s.node for s in statements if isinstance(s.node, _Definition)]
        data = {name for s in statements if not isinstance(s.node, _Definition) for name in s.binds}
        # not followed: functions, whose calls change nothing by themselves, and builtins
        self._constant = ({node.name for node in definitions} | set(dir(builtins))) - data
        self._outside: dict[int, set[str]] = {}
        for statement in statements:
            check_clock()
            self._outside[id(statement.node)] = _outside_names(statement.node)
        modules = self._index_imports(statements)
        examples = self._index_definitions(definitions, roots)
        for statement in statements:
            self._index_statement(statement, modules, examples)
        for index, statement in enumerate(statements):
            if _is_kept_anyway(statement, first=index == 0):
                self._keep(statement)
        while self._pending:
            self._need(self._pending.pop())

    def _index_imports(self, statements: Sequence[_Statement]) -> set[str]:
        """Return the names of modules and of what comes from them; names from one module stand for each other."""
        modules = set(MODULES)
        for statement in statements:
            for node in _executed(statement.node):
                for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
                    module = f"module {node.module if isinstance(node, ast.ImportFrom) else alias.name}"
                    name = (alias.asname or alias.name).partition(".")[0]
                    modules.add(name)
                    self._standing_for[name].add(module)
                    self._standing_for[module].add(name)
        return modules

    def _index_definitions(self, definitions: Sequence[ast.stmt], roots: set[str]) -> set[str]:
        """Note what functions and classes may change; return the names of those that use the roots or are examples."""
        defined = {node.name for node in definitions}
        users: dict[str, set[str]] = defaultdict(set)
        pending = list(roots)
        for node in definitions:
            outside = self._outside[id(node)]
            changed: set[str | None] = set()
            for inner in ast.walk(node):
                if isinstance(inner, ast.Name | ast.Subscript | ast.Attribute) and not isinstance(inner.ctx, ast.Load):
                    changed.add(root_name(inner))
                elif isinstance(inner, ast.Call):
                    method = [inner.func] if isinstance(inner.func, ast.Attribute) else []
                    changed |= {root_name(part) for part in (*method, *inner.args)}
                if _is_example(inner) and not isinstance(inner, ast.Assert):
                    pending.append(node.name)
            for name in outside:
                users[name].add(node.name)
                if name in changed or name in defined:
                    self._standing_for[name].add(node.name)
        self._hiding = _reachable(_HIDDEN, users) - _HIDDEN  # functions that call exec and its like
        return _reachable(pending, users)

    def _index_statement(self, statement: _Statement, modules: set[str], examples: set[str]) -> None:
        node, changes, touches = statement.node, statement.changes, statement.touches
        if not isinstance(node, ast.Expr):
            touches -= modules  # x = math.sqrt(2)
        elif isinstance(node.value, ast.Call):  # random.seed(0)
            touches |= changes & modules
            changes -= modules
        if not isinstance(node, _Definition):
            statement.is_example = statement.is_example or bool(statement.loads & examples)
        for index, names in ((self._binders, statement.binds), (self._changers, changes), (self._touchers, touches)):
            for name in names - {None}:
                index[name].append(statement)
        if statement.loads & self._hiding and not statement.is_example:
            statement.is_hidden = True
        for name, source in statement.other_names:
            if source not in examples:
                self._standing_for[source].add(name)

    def _keep(self, statement: _Statement) -> None:
        if id(statement.node) not in self.kept:
            self.kept.add(id(statement.node))
            self._pending += sorted(self._outside[id(statement.node)])

    def _need(self, name: str) -> None:
        if name in self._needed:
            return
        self._needed.add(name)
        for statement in (*self._binders[name], *self._changers[name]):
            self._keep(statement)
        for statement in self._touchers[name]:
            if not statement.is_example:
                self._keep(statement)
        if name not in self._constant:
            self._watch(name)

    def _watch(self, name: str) -> None:
        pending = [name]
        while pending:
            name = pending.pop()
            if name in self._watched:
                continue
            self._watched.add(name)
            for statement in (*self._changers[name], *self._touchers[name]):
                if not statement.is_example:
                    self._keep(statement)
            pending += self._standing_for[name]


def _reachable(names: Iterable[str], users: Mapping[str, set[str]]) -> set[str]:
    """Return the names, and those that use them directly or through others."""
    found: set[str] = set()
    pending = list(names)
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            pending += users.get(name, ())
    return found


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what runs when the statement runs: all of it, but of functions their decorators and defaults."""
    pending = [node]
    while pending:
        inner = pending.pop()
        yield inner
        if isinstance(inner, _Function):
            pending += [*inner.decorator_list, inner.args]
        else:
            pending += ast.iter_child_nodes(inner)


def _is_main_guard(node: ast.stmt) -> bool:
    """Whether a statement is what never runs where a program is imported, as it is for its tests."""
    tests = ("__name__ == '__main__'", "'__main__' == __name__")
    return isinstance(node, ast.If) and not node.orelse and ast.unparse(node.test) in tests


def _is_kept_anyway(statement: _Statement, *, first: bool) -> bool:
    node = statement.node
    if isinstance(node, ast.ImportFrom):
        return node.module == "__future__" or node.names[0].name == "*"
    is_docstring = first and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_docstring or statement.is_hidden or (statement.is_setting and not statement.is_example)


def _is_example(inner: ast.AST) -> bool:
    """Whether a part of a statement shows that the statement is no part of the answer."""
    return (
        isinstance(inner, ast.Assert)
        or (isinstance(inner, ast.Name) and inner.id in _EXAMPLE_NAMES)
        or (isinstance(inner, ast.Attribute) and inner.attr in _EXAMPLE_ATTRIBUTES)
    )


def _names_in(node: ast.expr | None) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)} if node is not None else set()


def _outside_names(node: ast.stmt) -> set[str]:
    """Return the module's names that a statement refers to; the local names of functions are not among them."""
    try:
        tables = [symtable.symtable(ast.unparse(node), "program", "exec")]
    except (SyntaxError, ValueError, RecursionError):  # "return" outside of a function and its like: any name will do
        return _names_in(node)
    found: set[str] = set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        top = table.get_type() == "module"
        found |= {symbol.get_name() for symbol in table.get_symbols() if top or symbol.is_global()}
    if found & _HIDDEN:
        alone = {id(inner.value) for inner in ast.walk(node) if isinstance(inner, ast.Expr)}  # docstrings are no code
        texts = [i.value for i in ast.walk(node) if isinstance(i, ast.Constant) and id(i) not in alone]
        found |= {name for text in texts if isinstance(text, str) for name in re.findall(r"[^\W\d]\w*", text)}
    return found


def _bound_by(node: ast.AST) -> set[str]:
    """Return the names that a definition or an import binds."""
    if isinstance(node, _Definition):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return set()


def _without_stubs(body: Sequence[ast.stmt]) -> list[ast.stmt]:
    """Return the statements without functions that have no body, where one of the same name has."""
    functions = [node for node in body if isinstance(node, _Function) and not node.decorator_list]
    whole = {node.name for node in functions if not is_stub(node)}
    stubs = {id(node) for node in functions if node.name in whole and is_stub(node)}
    return [node for node in body if id(node) not in stubs]


def _keep_lines(source: str, body: Sequence[ast.stmt], kept: Sequence[ast.stmt]) -> str:
    """Return the source without the lines of the other statements; comments stay."""
    if list(body) == list(kept):
        return source
    lines, ids = source.split("\n"), {id(node) for node in kept}
    for node in body:
        if id(node) not in ids:
            decorators = [decorator.lineno for decorator in getattr(node, "decorator_list", ())]
            for number in range(min([node.lineno, *decorators]), node.end_lineno + 1):
                lines[number - 1] = ""
    program = re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip("\n") + "\n"
    tree, places = parse(program), [node.lineno for node in kept]
    if tree is not None and len(tree.body) == len(kept) and places == sorted(places):
        return program
    return ast.unparse(ast.Module(list(kept), [])) + "\n"  # statements shared a line, or stand in another order


def _forgotten_imports(tree: ast.Module) -> str:
    """Return import lines for the well-known names that the program uses and nothing in it binds."""
    if any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body):
        return ""  # nothing may stand before it
    missing = sorted(unbound_names(tree))
    lines = [f"import {name}\n" for name in missing if name in MODULES]
    return "".join(lines + [f"from {NAMES[name]} import {name}\n" for name in missing if name in NAMES])
