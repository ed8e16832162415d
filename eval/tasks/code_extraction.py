"""From a model's text to a program: the versioned post-processing of HumanEval and MBPP.

It mends form and nothing else: code fences, prose before and after, the signature repeated or left out, imports that
the prompt has or that were forgotten, a lost indentation, tabs, CRLF, a truncated end; it leaves out what is not the
answer: examples, asserts, prints, `if __name__ == "__main__"`. A statement at the top level is kept if the wanted
functions need it, directly or through others. What a function does is never touched.

Any change here that turns some text into another program needs a new `POST_PROCESSING`.
"""

import ast
import builtins
import re
import symtable
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence

POST_PROCESSING = "2"  # 2: end-of-text marks are cut off; what fills a needed table is kept
MAX_CHARS = 40_000  # of a completion, ten times a long one; the rest is cut off
MAX_PARSED_CHARS = 600_000  # of all attempts at one completion: seconds at worst
INDENT = "    "

# Forgotten imports: a name that nothing binds, and where it comes from.
_MODULES = (
    "bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "hashlib", "heapq",
    "itertools", "json", "math", "operator", "random", "re", "statistics", "string", "sys", "typing",
)  # fmt: skip
_NAMES = {
    **dict.fromkeys(
        "Any Callable Deque Dict FrozenSet Generator Iterable Iterator List Mapping NamedTuple Optional Sequence Set "
        "Tuple Type TypeVar Union".split(),
        "typing",
    ),
    **dict.fromkeys("Counter OrderedDict defaultdict deque namedtuple".split(), "collections"),
    **dict.fromkeys("lru_cache reduce".split(), "functools"),
}
_CODE_START = re.compile(r"(from|import|def|async def|class|@|[A-Za-z_]\w*\s*(:[^=\n]+)?=(?!=))\s*\S")
# Texts of the tokens at which chat models end, where a decoder left them in, at the end of a line.
_END = re.compile(r"(?:<\|(?:endoftext|end_of_text|im_end|eot_id|end)\|>|</s>|<eos>|<end_of_turn>)[ \t]*(?=\n|$)")
_FENCE = re.compile(r"(?:```+|~~~+)(?:[ \t]*[\w+#.-]*[ \t]*(?=\n|$))?")


def extract_program(
    completion: str, *, wanted: Sequence[str], helpers: Iterable[str] = (), prompt: str = ""
) -> str | None:
    """Return the program in `completion`, or None where no code can be found in it.

    wanted: the functions that the tests call; helpers: further names that the tests use, kept if they are there;
    prompt: code that the completion continues, or whose last function it repeats ("" where there is none).
    """
    text = completion[:MAX_CHARS].replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").replace("\ufeff", "")
    text = text.replace("\u00a0", " ").encode("utf-8", "ignore").decode("utf-8")
    text = _END.split(text, maxsplit=1)[0]
    try:
        return _extract(text, set(wanted), {*wanted, *helpers}, wanted[0], prompt)
    except (RecursionError, MemoryError):  # nesting without end
        return None


def _extract(text: str, wanted: set[str], roots: set[str], name: str, prompt: str) -> str | None:
    reader = _Reader()
    parts = [part for part in _FENCE.split(text) if part.strip()]
    head = _before_function(prompt, name) if prompt else ""
    whole = [*parts, "\n".join(parts[0::2]), "\n".join(parts[1::2])] if len(parts) > 1 else parts
    for part in whole:  # a part that defines all that is wanted
        # of each reading the first block that will do; of these the one that lost fewest lines
        found = [
            next((block for block in _blocks(text, reader) if wanted <= _defined(parse(head + block))), "")
            for text in _readings(part)
        ]
        if any(found):
            return _finish(head + max(found, key=lambda block: block.count("\n")), roots)
    if prompt:
        for part in parts:  # a part that goes on where the prompt ends
            if program := _continue(prompt, part, name, reader):
                return _finish(program, roots)
    for part in whole:  # code, if not what was asked for
        for block in _blocks(part, reader):
            if defined := _defined(parse(block)):
                return _finish(head + block, roots | defined)
    return None


def parse(source: str) -> ast.Module | None:
    """Return the syntax tree, or None where there is none."""
    return _parse(source)[0]


class _Reader:
    """Finds where Python ends, with a limit on its attempts at one completion."""

    def __init__(self) -> None:
        self.left = MAX_PARSED_CHARS

    def longest_prefix(self, lines: Sequence[str], *, at_least: int = 1) -> str | None:
        """Return the lines up to where they stop being Python; None where fewer than `at_least` are left."""
        count = len(lines)
        while count >= at_least:
            source = "\n".join(lines[:count]) + "\n"
            self.left -= len(source)
            if self.left < 0:
                return None
            tree, wrong_line = _parse(source)
            if tree is not None:
                return source
            count = min(count, max(wrong_line, 1)) - 1
        return None


def _parse(source: str) -> tuple[ast.Module | None, int]:
    """Return the tree, or None and the line of the error (from 1)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes and the like
        try:
            return ast.parse(source), 0
        except SyntaxError as error:
            return None, error.lineno or 1
        except (ValueError, MemoryError, RecursionError):
            return None, 1


def _readings(part: str) -> list[str]:
    """Return the text as it stands, and without a common indentation, its tabs as they are or as four columns."""
    return list(dict.fromkeys((part, textwrap.dedent(part), textwrap.dedent(part.expandtabs(4)))))


def _blocks(text: str, reader: _Reader) -> Iterable[str]:
    """Yield stretches of Python in a text, each beginning with a line that looks like code at its left edge."""
    lines = text.split("\n")
    end = 0
    for start, line in enumerate(lines):
        if start >= end and _CODE_START.match(line):
            block = reader.longest_prefix(lines[start:])
            if block is not None:
                end = start + block.count("\n")
                yield block


def _defined(tree: ast.Module | None) -> set[str]:
    """Return the names of functions and classes, and of functions bound by an assignment, at the top level."""
    found: set[str] = set()
    for node in tree.body if tree is not None else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda | ast.Name | ast.Call | ast.Attribute):
            found.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return found


def _before_function(prompt: str, name: str) -> str:
    """Return the prompt's code before the function to be completed: imports and helper functions."""
    found = re.search(rf"^(async\s+)?def\s+{re.escape(name)}\b", prompt, re.MULTILINE)
    return prompt[: found.start()] if found else ""


def _continue(prompt: str, part: str, name: str, reader: _Reader) -> str | None:
    """Return prompt and continuation as far as they are Python and give the function a body, or None."""
    lines = part.strip("\n").split("\n")
    first_code = next((i for i, line in enumerate(lines) if line[:1] in (" ", "\t") and line.strip()), 0)
    variants = [
        part.split("\n"),
        part.expandtabs(4).split("\n"),
        [INDENT + lines[0].strip(), *"\n".join(lines[1:]).expandtabs(4).split("\n")],  # its first indentation was lost
        textwrap.indent(textwrap.dedent("\n".join(lines).expandtabs(4)), INDENT).split("\n"),  # all of it was lost
        lines[first_code:],  # a sentence first
    ]
    given = prompt if prompt.endswith("\n") else prompt + "\n"
    num_given = given.count("\n")
    best, best_end = None, 0
    for variant in variants:
        program = reader.longest_prefix([*given.split("\n")[:-1], *variant], at_least=num_given + 1)
        if program is not None and (end := _end_of_body(parse(program), name)) > best_end:
            best, best_end = program, end
    return best


def _end_of_body(tree: ast.Module, name: str) -> int:
    """Return the last line of the function; 0 where it has no body, but a docstring or constants at most."""
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    body = found[-1].body if found else []
    empty = all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)
    return 0 if empty else found[-1].end_lineno


# ---- what belongs to the answer


def _finish(source: str, roots: set[str]) -> str:
    """Return the program without what the roots do not need, and with the imports that were forgotten."""
    tree = parse(source)
    kept = _needed_statements(tree.body, roots)
    program = _cut_lines(source, tree.body, kept)
    return _forgotten_imports(ast.Module(kept, [])) + program


def _needed_statements(body: Sequence[ast.stmt], roots: set[str]) -> list[ast.stmt]:
    # functions that a call at the top level may prepare something with, and what; those that use the roots are examples
    functions = [node for node in body if isinstance(node, ast.FunctionDef) and node.name not in roots]
    changes = {node.name: _changed(node) & names for node in functions if not (names := _outside_names(node)) & roots}
    needed = set(roots)
    kept: set[int] = set()
    grown = True
    while grown:
        grown = False
        for index, node in enumerate(body):
            if index not in kept and _is_needed(node, needed, changes):
                kept.add(index)
                needed |= _outside_names(node)
                grown = True
    return [node for index, node in enumerate(body) if index in kept]


def _outside_names(node: ast.stmt) -> set[str]:
    """Return the module's names that a statement refers to; the local names of functions are not among them."""
    try:
        tables = [symtable.symtable(ast.unparse(node), "program", "exec")]
    except SyntaxError:  # "return" outside of a function and its like: any name will do
        return {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    found: set[str] = set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        top = table.get_type() == "module"
        found |= {symbol.get_name() for symbol in table.get_symbols() if top or symbol.is_global()}
    return found


def _is_needed(node: ast.stmt, needed: set[str], changes: Mapping[str, set[str]]) -> bool:
    """Whether a statement at the top level is needed. changes: function → the module's names that a call changes."""
    if isinstance(node, ast.ImportFrom) and (node.module == "__future__" or node.names[0].name == "*"):
        return True
    if isinstance(node, ast.If) and any(isinstance(n, ast.Name) and n.id == "__name__" for n in ast.walk(node.test)):
        return False
    if isinstance(node, ast.Expr):
        called = node.value.func if isinstance(node.value, ast.Call) else None
        if isinstance(called, ast.Name):  # fill_table()
            return not node.value.args and bool(changes.get(called.id, set()) & needed)
        return isinstance(called, ast.Attribute) and (
            ast.unparse(called) == "sys.setrecursionlimit"
            or _owner(called) in needed - set(_MODULES)  # table.append(…)
        )
    return bool(_bound(node) & needed)


def _bound(node: ast.AST) -> set[str]:
    """Return the names that a statement binds or changes at its own level."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return _changed(node) if not isinstance(node, ast.Expr | ast.Assert) else set()


def _changed(node: ast.AST) -> set[str]:
    """Return the names that are bound, or whose object may be changed, anywhere inside."""
    found: set[str | None] = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name | ast.Subscript | ast.Attribute) and isinstance(inner.ctx, ast.Store | ast.Del):
            found.add(_owner(inner))
        elif isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Call):
            found |= {_owner(inner.value.func)} - set(_MODULES)  # table.append(…), whose value nobody takes
        elif inner is not node and isinstance(inner, ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom):
            found |= _bound(inner)
    return {name for name in found if name is not None}


def _owner(node: ast.expr) -> str | None:
    """Return the name at the root of `name.attribute[index]…`, None for other expressions."""
    while isinstance(node, ast.Subscript | ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _cut_lines(source: str, body: Sequence[ast.stmt], kept: Sequence[ast.stmt]) -> str:
    """Return the source without the lines of the other statements; comments stay."""
    if len(kept) == len(body):
        return source
    lines = source.split("\n")
    for node in body:
        if node not in kept:
            decorators = [decorator.lineno for decorator in getattr(node, "decorator_list", ())]
            for number in range(min([node.lineno, *decorators]), node.end_lineno + 1):
                lines[number - 1] = ""
    program = re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip("\n") + "\n"
    tree = parse(program)
    if tree is not None and len(tree.body) == len(kept):
        return program
    return ast.unparse(ast.Module(list(kept), [])) + "\n"  # several statements shared a line


def _forgotten_imports(tree: ast.Module) -> str:
    """Return import lines for the well-known names that the program uses and nothing in it binds."""
    used, bound = set(), set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom):
            bound |= _bound(node)
        if isinstance(node, ast.ImportFrom) and (node.names[0].name == "*" or node.module == "__future__"):
            return ""  # anything may come from there; and nothing may stand before a future import
    missing = sorted(used - bound)
    lines = [f"import {name}\n" for name in missing if name in _MODULES]
    return "".join(lines + [f"from {_NAMES[name]} import {name}\n" for name in missing if name in _NAMES])
