"""From a model's text to a program: the versioned post-processing of HumanEval and MBPP.

It corrects form and nothing else: code fences, prose before and after, the signature repeated or left out, imports that
the prompt has or that were forgotten, a lost indentation, tabs, CRLF, a truncated end; it leaves out what is not the
answer (code_pruning.py). What a function does is never touched.

Candidates, in this order; the first that gives each wanted function a body is taken, from its first statement:

1. the whole text, behind the prompt where there is one, then without it;
2. a whole block between fences (or before the first, or behind the last);
3. the longest stretch of Python in the whole text, in a block, in the blocks that belong together;
4. a block that goes on where the prompt ends;
5. the same, split at every three backticks, wherever they stand.

A body of a docstring, `pass`, `...` or NotImplementedError is none: it is taken only where no candidate has more. Then
comes a whole text that names a wanted function, and last code that defines something else. Names that the candidate
lacks are taken from the other blocks.

Any change here that turns some text into another program needs a new `POST_PROCESSING`.
"""

import ast
import codeop
import itertools
import re
import textwrap
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence

from eval.grading.code_pruning import (
    MODULES,
    NAMES,
    bound_names,
    is_stub,
    parse,
    parse_or_line,
    prune_program,
    unbound_names,
)

# 2: end-of-text marks are cut off; what fills a needed table is kept
# 3: whole texts and blocks first; stubs are no answer; what may change a needed object is kept; thinking is cut off
POST_PROCESSING = "3"
MAX_CHARS = 100_000  # of a completion, twenty times a long one; the rest is cut off
MAX_PARSED_CHARS = 1_000_000  # of all attempts at one completion: seconds at worst
MAX_SECONDS = 3.0  # of CPU, for one completion
INDENT = "    "
WHOLE, STUB, NOTHING = 2, 1, 0  # what a candidate has of the wanted functions

# A fence begins its line, or ends it: three backticks within a line stand in a string as often.
_FENCE = re.compile(r"^[ \t]*+(?:`{3,}+|~{3,}+)[^`\n]*+$|`{3,}+[\w+#.-]*+[ \t]*+$", re.MULTILINE)
_ANY_FENCE = re.compile(r"`{3,}+(?:[ \t]*+[\w+#.-]*+[ \t]*+$)?", re.MULTILINE)
# The marks at which models end, begin and pad, where a decoder left them in.
_MARK = re.compile(r"<\|[\w ./-]{1,40}\|>|<\uff5c[^\uff5c\n]{1,40}\uff5c>|</?s>|<(?:eos|bos|pad|end_of_turn)>")
# What hides a mark, or a quote that hides none: a word's apostrophe, an escape, a comment up to a mark, a string.
_HIDING = re.compile(
    rf"(?P<mark>{_MARK.pattern})|[A-Za-z]{{2,}}'(?=[a-z])|\\.|#(?:(?!{_MARK.pattern})[^\n])*+"
    r"""|"{3}(?:\\.|(?!"{3}).)*+"{3}|'{3}(?:\\.|(?!'{3}).)*+'{3}"""
    r"""|"(?:\\.|[^"\\\n])*+"|'(?:\\.|[^'\\\n])*+'""",
    re.DOTALL,
)


class TooLong(Exception):
    """The search for a program took more than `MAX_SECONDS`."""


def extract_program(
    completion: str, *, wanted: Sequence[str], helpers: Iterable[str] = (), prompt: str = ""
) -> str | None:
    """Return the program in `completion`, or None where no code can be found in it. Raises TooLong.

    wanted: the functions that the tests call; helpers: further names that the tests use, kept if they are there;
    prompt: code that the completion continues, or whose last function it repeats ("" where there is none).
    """
    text = completion[:MAX_CHARS].replace("\r\n", "\n").replace("\r", "\n")
    try:
        return _Search(text, wanted, helpers, prompt).program()
    except (RecursionError, MemoryError):  # nesting without end
        return None


class _Reader:
    """Parses, with a limit on all attempts at one completion."""

    def __init__(self) -> None:
        self._left = MAX_PARSED_CHARS
        self._end = time.thread_time() + MAX_SECONDS
        self._begin_code: dict[str, bool] = {}

    def check_clock(self) -> None:
        """Raise TooLong where the time is up."""
        if time.thread_time() > self._end:
            raise TooLong(f"post-processing took more than {MAX_SECONDS:g} s")

    def parse(self, source: str) -> tuple[ast.Module | None, int]:
        """Return the tree, or None and the line of the error (from 1; 0 where the limit is reached)."""
        self.check_clock()
        self._left -= len(source)
        return parse_or_line(source) if self._left >= 0 else (None, 0)

    def longest_prefix(self, lines: Sequence[str], *, at_least: int = 1) -> str | None:
        """Return the lines up to where they stop being Python; None where fewer than `at_least` are left."""
        count = len(lines)
        while count >= at_least:
            source = "\n".join(lines[:count]) + "\n"
            tree, wrong_line = self.parse(source)
            if tree is not None:
                return source
            if not wrong_line:
                return None
            count = min(count, wrong_line) - 1
        return None

    def stretches(self, text: str) -> Iterator[str]:
        """Yield stretches of Python in a text, each beginning with a line at its left edge that may begin one."""
        lines = text.split("\n")
        end = 0
        for start, line in enumerate(lines):
            if self._left <= 0:
                return
            if start >= end and self._begins_code(line):
                block = self.longest_prefix(lines[start:])
                if block is not None:
                    end = start + block.count("\n")
                    yield block

    def _begins_code(self, line: str) -> bool:
        if line not in self._begin_code:
            self.check_clock()
            self._left -= len(line)
            self._begin_code[line] = _begins_code(line)
        return self._begin_code[line]


class _Search:
    def __init__(self, text: str, wanted: Sequence[str], helpers: Iterable[str], prompt: str) -> None:
        self.raw = text
        self.texts = _before_end_mark(_tidy(text))
        self.wanted, self.roots, self.prompt = set(wanted), {*wanted, *helpers}, prompt
        self.name = wanted[0]
        self.head = _before_function(prompt, self.name) if prompt else ""
        self.given = set(_definitions(parse(self.head).body)) if self.head else set()
        self.reader = _Reader()

    def program(self) -> str | None:
        stub = other = None
        for text in self.texts:
            self.text = text
            self.blocks = [self.text[start:end] for start, end in _split(_FENCE, self.text)]
            for source in self._candidates():
                self.reader.check_clock()
                tree = parse(source)
                found = self._completeness(tree)
                if found == WHOLE:
                    return self._finish(source, tree)
                if found == STUB and stub is None:
                    stub = source
                if found == NOTHING and other is None:
                    bodies = {name for name, have_body in _definitions(tree.body).items() if any(have_body)}
                    if defined := bodies - self.given:
                        other = prune_program(source, self.roots | defined, self.reader.check_clock)
            if stub is not None:
                return prune_program(stub, self.roots, self.reader.check_clock)
        tree, _ = self.reader.parse(self.raw)
        if tree is not None and any(re.search(rf"\b{re.escape(name)}\b", self.raw) for name in self.wanted):
            if not all(isinstance(node, ast.Expr) and not isinstance(node.value, ast.Call) for node in tree.body):
                return self.raw  # exec("def f(): …") and its like
        return other

    def _candidates(self) -> Iterator[str]:
        """Yield sources that parse, in the order that the head of this file states."""
        for text in dict.fromkeys((self.raw, self.text)):
            if self.prompt and self.reader.parse(self.prompt + text)[0] is not None:
                if _end_of_body(parse(self.prompt + text), self.name, after=self.prompt.count("\n")):
                    yield self.prompt + text
            if self.reader.parse(self.head + text)[0] is not None:
                yield self.head + text
        yield from self._in_blocks(_split(_FENCE, self.text))
        if self.prompt:
            for block in self.blocks:
                if program := _continue(self.prompt, block, self.name, self.reader):
                    yield program
        if "```" in self.text:
            yield from self._in_blocks(_split(_ANY_FENCE, self.text))

    def _in_blocks(self, spans: Sequence[tuple[int, int]]) -> Iterator[str]:
        for index, (start, _) in enumerate(spans):
            for _, end in spans[index : index + 5 : 2]:  # to the block's end; else fences in a string had cut it
                if source := self._as_it_stands(self.text[start:end]):
                    yield source
                    break
        blocks = [self.text[start:end] for start, end in spans]
        together = ["\n".join(blocks[0::2]), "\n".join(blocks[1::2])] if len(blocks) > 1 else []
        whole_text = _FENCE.sub(lambda fence: f"\n{fence[0]}", self.text)  # a fence is no Python, and ends a stretch
        for text in dict.fromkeys((whole_text, *blocks, *together)):
            found = [[self.head + part for part in self.reader.stretches(reading)] for reading in _readings(text)]
            whole = [next((s for s in sources if self._completeness(parse(s)) == WHOLE), "") for sources in found]
            if any(whole):  # of the readings the one that lost fewest lines
                yield max(whole, key=lambda source: source.count("\n"))
            for sources in found:
                yield from sources

    def _as_it_stands(self, block: str) -> str | None:
        for reading in _readings(block):
            if self.reader.parse(self.head + reading)[0] is not None:
                return self.head + reading
        return None

    def _completeness(self, tree: ast.Module | None) -> int:
        """Return what the program has of the functions that are wanted."""
        found = _definitions(tree.body) if tree is not None else {}
        if not self.wanted <= set(found):
            return NOTHING
        return WHOLE if all(any(found[name]) for name in self.wanted) else STUB

    def _finish(self, source: str, tree: ast.Module) -> str:
        """Return the program, with what it lacks from the other blocks."""
        missing = unbound_names(tree) - set(MODULES) - set(NAMES) | self.roots - bound_names(tree)
        others = [part for block in self.blocks for part in self.reader.stretches(block)] if missing else []
        added: list[str] = []
        for part in others:
            other = parse(part)
            if part not in source and self._completeness(other) == NOTHING and bound_names(other) & missing:
                added.append(part)
                missing |= unbound_names(other)
        return prune_program("".join(added) + source, self.roots, self.reader.check_clock)


def _tidy(text: str) -> str:
    text = text.replace("\0", "").replace("\ufeff", "").replace("\u200b", "").replace("\u00a0", " ")
    return text.encode("utf-8", "ignore").decode("utf-8")


def _before_end_mark(text: str) -> list[str]:
    """Return the text before the first mark of a model's end that stands in no string; then, should that be wrong,
    all of the text, and what stands before its first mark. Marks at its head are cut."""
    while head := _MARK.match(text.lstrip()):
        text = text.lstrip()[head.end() :]
    outside = next((found.start() for found in _HIDING.finditer(text) if found["mark"]), len(text))
    first = _MARK.search(text)
    return list(dict.fromkeys((text[:outside], text, text[: first.start() if first else None])))


def _split(fence: re.Pattern, text: str) -> list[tuple[int, int]]:
    """Return where what stands between the fences begins and ends."""
    cuts = [(0, 0), *(match.span() for match in fence.finditer(text)), (len(text), len(text))]
    spans = [(start, end) for (_, start), (end, _) in itertools.pairwise(cuts)]
    return [(start, end) for start, end in spans if text[start:end].strip()]


def _begins_code(line: str) -> bool:
    """Whether a line can begin a statement that does something; words and values by themselves may be prose."""
    if not line or line[0] in " \t#":
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            codeop.compile_command(line)
        except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError):
            return False
    tree = parse(line)
    if tree is None or not tree.body:
        return True  # it goes on in the next line
    node = tree.body[0]
    is_value = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Call)
    return not (is_value and not (isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)))


def _readings(block: str) -> list[str]:
    """Return the text as it stands, and without a common indentation, its tabs as they are or as four columns."""
    return list(dict.fromkeys((block, textwrap.dedent(block), textwrap.dedent(block.expandtabs(4)))))


def _definitions(body: Sequence[ast.stmt]) -> dict[str, list[bool]]:
    """Return name → whether each of its definitions has a body, for functions, classes and what may be one of them."""
    found: dict[str, list[bool]] = {}
    pending = list(body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.setdefault(node.name, []).append(not is_stub(node))
        elif isinstance(node, ast.ClassDef):
            found.setdefault(node.name, []).append(True)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            is_function = isinstance(node.value, ast.Lambda | ast.Name | ast.Call | ast.Attribute)
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name) and is_function:
                    found.setdefault(target.id, []).append(True)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                found.setdefault(alias.asname or alias.name, []).append(False)
        else:  # if, try, with, for, while
            for name in ("body", "orelse", "finalbody", "handlers"):
                pending += getattr(node, name, [])
    return found


def _before_function(prompt: str, name: str) -> str:
    """Return the prompt's code before the function to be completed: imports and helper functions."""
    found = re.search(rf"^(async\s+)?def\s+{re.escape(name)}\b", prompt, re.MULTILINE)
    return prompt[: found.start()] if found else ""


def _continue(prompt: str, block: str, name: str, reader: _Reader) -> str | None:
    """Return prompt and continuation as far as they are Python and give the function a body, or None."""
    lines = block.strip("\n").split("\n")
    first_code = next((i for i, line in enumerate(lines) if line[:1] in (" ", "\t") and line.strip()), 0)
    variants = [
        block.split("\n"),
        block.expandtabs(4).split("\n"),
        [INDENT + lines[0].strip(), *"\n".join(lines[1:]).expandtabs(4).split("\n")],  # its first indentation was lost
        textwrap.indent(textwrap.dedent("\n".join(lines).expandtabs(4)), INDENT).split("\n"),  # all of it was lost
    ]
    if not any(_begins_code(line) for line in lines[:first_code]):  # a sentence first, and no other function's head
        variants.append(lines[first_code:])
    given = prompt if prompt.endswith("\n") else prompt + "\n"
    num_given = given.count("\n")
    best, best_end = None, 0
    for variant in variants:
        program = reader.longest_prefix([*given.split("\n")[:-1], *variant], at_least=num_given + 1)
        if program is not None and (end := _end_of_body(parse(program), name)) > best_end:
            best, best_end = program, end
    return best


def _end_of_body(tree: ast.Module, name: str, *, after: int = 0) -> int:
    """Return the last line of the function; 0 where its body is docstring and definitions, or ends before `after`."""
    found = [
        node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name
    ]
    body = found[-1].body if found else []
    empty = all(
        (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) or isinstance(node, ast.FunctionDef)
        for node in body
    )
    return 0 if empty or found[-1].end_lineno <= after else found[-1].end_lineno
