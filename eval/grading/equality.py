"""Whether two LaTeX answers mean the same: their structure is compared part by part, formulas by their values.

Structure: lists and sets (any order), tuples and intervals (order and kind of each bracket count), unions, chains of
relations, matrices (row by row), ratios, `\\pm`, a unit, a name in front (`x = 5`, `x \\in [0, 1]`). Two formulas are
equal when their values are at three points (eval/grading/formulas.py): exactly where the values are fractions, to 40
digits where they are not. A decimal number of at least six decimals may stand for an irrational number whose digits it
gives.

An answer that is not understood as a whole is equal to nothing here: the string rule (eval/grading/notation.py) is left
to decide. So bases, congruences, derivatives, set builders and words are compared as they are written.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product

import mpmath

from eval.grading.formulas import (
    DIGITS,
    Tree,
    difference,
    is_constant,
    points,
    quotient,
    read_formula,
    same_at,
    value_at,
)
from eval.grading.notation import closing, is_symbol, opens, same_tokens, split_name, split_unit, tokens
from eval.grading.values import Unreadable

MAX_TOKENS = 400  # of an answer that is read; a longer one is a runaway
MAX_DEPTH = 20
_RELATIONS = ("=", "<", ">", "\\le", "\\ge", "\\ne")
_TURNED = {">": "<", "\\ge": "\\le"}
_BRACKETS = {"<": ("(", ")"), "\\le": ("[", "]")}  # of an interval's end that the relation leaves out or takes in
_MATRICES = ("matrix", "pmatrix", "bmatrix", "Bmatrix", "array", "smallmatrix")


def equal(gold: str, answer: str) -> bool:
    """Return whether `answer` means what `gold` says, by the string rule or by structure and value. Never raises."""
    left, right = tokens(gold), tokens(answer)
    if same_tokens(left, right) or _same_words(left, right):
        return True
    if max(len(left), len(right)) > MAX_TOKENS:
        return False
    try:
        return read(left).equals(read(right))
    except (Unreadable, RecursionError):
        return False


def _same_words(left: list[str], right: list[str]) -> bool:
    """Return whether both are words that differ in nothing but capitals and blanks.

    Where one is \\text{…}, three letters are a word, or "no"; where none is, a word of four is among them.
    """
    words = [[re.sub(r"\\text\{(.*)\}", r"\1", token) for token in part] for part in (left, right)]
    texts = ["".join(part).replace(" ", "").lower() for part in words]
    if any(len(part) == 1 and part[0].startswith("\\text{") for part in (left, right)):
        known = len(texts[0]) > 2 or texts[0] == "no"
    else:
        known = all(max(map(len, part), default=0) > 3 for part in words)
    return known and texts[0] == texts[1] and texts[0].isalnum()


@dataclass(frozen=True)
class Node:
    """A part of an answer.

    kind: "value", "list", "tuple", "union", "matrix", "ratio", "relation".
    parts: nodes; of a "value" one tree.
    mark: what must be the same besides: brackets, relation signs, a matrix's shape.
    unit: the one behind or the currency before.
    name: the tokens `x =` of `x = …`, `x \\in` of `x \\in …`; of `(x, y) = …` each part has its own.
    decimals: of a plain decimal number.
    letters: whether it is a letter, or a sum of such, as on the left of `m + n = 5`.
    """

    kind: str
    parts: tuple = ()
    mark: object = None
    unit: str | None = None
    name: tuple[str, ...] | None = None
    decimals: int | None = None
    letters: bool = False

    def equals(self, answer: "Node") -> bool:
        """Return whether `answer` means the same as this part of a gold answer."""
        if self.unit and answer.unit and self.unit != answer.unit:
            return False
        left, right = _alike(self, answer)
        if left.kind != right.kind:
            return False
        if left.kind == "value":
            return _same_value(left, right)
        if left.kind == "relation":
            return _same_relation(left, right)
        if len(left.parts) != len(right.parts):
            return False
        if left.kind == "ratio":
            return _proportional(*((part.parts[0] for part in node.parts) for node in (left, right)))
        if left.kind == "list":
            return _same_unordered(left.parts, right.parts)
        if left.mark != right.mark:
            return False
        if left.kind == "union":
            return _same_unordered(left.parts, right.parts)
        return all(one.equals(two) for one, two in zip(left.parts, right.parts, strict=True))


def read(found: list[str], depth: int = 0) -> Node:
    """Return the structure of tokens. Raises Unreadable for whatever is not understood whole."""
    if not found or depth > MAX_DEPTH:
        raise Unreadable("nothing there, or nested too deeply")
    parts, marks = split(found, (",", ";"))
    if marks:
        return Node("list", _flat(read(part, depth + 1) for part in parts), mark="bare")
    side, name = split_name(found)
    if name is not None:
        node = read(side, depth + 1)
        if node.kind == "relation" and set(node.mark) == {"="}:  # x = 2 + 3 = 5
            node = _stated(node)
        if node is None or node.name or node.kind == "relation":
            raise Unreadable("a chain that does not hold")
        if name[0] == "(":  # (x, y) = (3, 4)
            return _named_tuple(node, split(name[1:-2], (",",))[0])
        return replace(node, name=tuple(name))
    if "\\in" in found:
        raise Unreadable("\\in behind no letter")
    parts, marks = split(found, _RELATIONS)
    if marks:
        return _relation(parts, marks, depth)
    for joint, kind in (("\\cup", "union"), ("\\cap", "union"), ("\\setminus", "tuple")):
        parts, marks = split(found, (joint,))
        if marks:
            return Node(kind, tuple(read(part, depth + 1) for part in parts), mark=joint)
    return _single(found, depth)


def _named_tuple(node: Node, names: list[list[str]]) -> Node:
    """Return a tuple, each part with its letter as its name."""
    if node.kind != "tuple" or len(node.parts) != len(names) or any(part.name for part in node.parts):
        raise Unreadable("letters for something else than as many values")
    parts = (replace(part, name=(*name, "=")) for part, name in zip(node.parts, names, strict=True))
    return replace(node, parts=tuple(parts))


def split(found: Sequence[str], at: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """Return the parts between those tokens of `at` that stand outside brackets, and these tokens."""
    parts, marks, depth = [[]], [], 0
    for token in found:
        depth += opens(token)
        if depth < 0:
            raise Unreadable("a bracket too many")
        if depth == 0 and token in at:
            marks.append(token)
            parts.append([])
        else:
            parts[-1].append(token)
    if depth:
        raise Unreadable("a bracket too few")
    return parts, marks


def _flat(nodes: Iterable[Node]) -> tuple[Node, ...]:
    """Return the nodes, with the two of a `\\pm` each on its own."""
    return tuple(part for node in nodes for part in (node.parts if node.mark == "\\pm" else (node,)))


def _relation(parts: list[list[str]], marks: list[str], depth: int) -> Node:
    if all(mark in _TURNED for mark in marks):
        parts, marks = parts[::-1], [_TURNED[mark] for mark in marks[::-1]]
    if marks == ["="] and is_symbol(parts[1]):  # 5 = x
        return replace(read(parts[0], depth + 1), name=(*parts[1], "="))
    nodes = [read(part, depth + 1) for part in parts]
    if any(node.kind != "value" or node.unit for node in nodes[:-1]):
        raise Unreadable("a relation of no values")
    letters = [all(token in "+-" or is_symbol([token]) for token in part) and part[0] != "-" for part in parts]
    marked = [replace(node, letters=flag) for node, flag in zip(nodes, letters, strict=True)]
    return Node("relation", tuple(marked), mark=tuple(marks), unit=nodes[-1].unit)


def _single(found: list[str], depth: int) -> Node:
    """Read what has no comma, relation or union outside brackets."""
    found, unit = split_unit(found)
    if found == ["\\emptyset"]:
        return Node("list")
    if found[0] in ("(", "[", "\\{") and _encloses(found) and (node := _bracketed(found, depth)):
        return replace(node, unit=unit)
    if any(token in ("\\pm", "\\mp") for token in found):
        return Node("list", tuple(read(variant, depth + 1) for variant in _signed(found)), mark="\\pm", unit=unit)
    parts, marks = split(found, (":",))
    if marks:
        if len(parts) == 2 and all(len(part) == 1 for part in parts) and len(parts[1][0]) == 2:
            raise Unreadable("a time of the day")
        return Node("ratio", tuple(Node("value", (read_formula(part),)) for part in parts), unit=unit)
    if any(token.startswith("\\begin{") for token in found):
        return _matrix(found)
    decimals = len(found[-1].partition(".")[2]) if len(found) == 1 + (found[0] == "-") else None
    return Node("value", (read_formula(found),), unit=unit, decimals=decimals)


def _encloses(found: list[str]) -> bool:
    """Return whether the bracket that the first token opens is closed by the last one."""
    return opens(found[0]) > 0 and closing(found, 0) == len(found) - 1


def _bracketed(found: list[str], depth: int) -> Node | None:
    """Read a set, a tuple or an interval; None for a formula in brackets."""
    inner = found[1:-1]
    parts, marks = split(inner, (",", ";"))
    if found[0] == "\\{":
        if found[-1] != "\\}" or any(token in ("|", ":", "\\in", *_RELATIONS) for token in inner):
            raise Unreadable("a set builder")
        return Node("list", _flat(read(part, depth + 1) for part in parts) if inner else ())
    if marks:
        return Node("tuple", tuple(read(part, depth + 1) for part in parts), mark=(found[0], found[-1]))
    if found[0] + found[-1] not in ("()", "[]"):
        raise Unreadable("brackets of two kinds around one thing")
    if any(token.startswith("\\begin{") or token in ("\\cup", "\\cap") for token in inner):
        return read(inner, depth + 1)
    return None


def _signed(found: list[str]) -> list[list[str]]:
    """Return the formulas that one with \\pm stands for; beside a \\mp all signs go together."""
    signs = [place for place, token in enumerate(found) if token in ("\\pm", "\\mp")]
    if len(signs) > 3:
        raise Unreadable("too many \\pm")
    linked = [(True,) * len(signs), (False,) * len(signs)]
    variants = []
    for choice in linked if "\\mp" in found else product((True, False), repeat=len(signs)):
        variants.append(list(found))
        for place, upper in zip(signs, choice, strict=True):
            variants[-1][place] = "+" if upper == (found[place] == "\\pm") else "-"
    return variants


def _matrix(found: list[str]) -> Node:
    """Read a matrix, with a factor before it or none."""
    start = next(place for place, token in enumerate(found) if token.startswith("\\begin{"))
    kind = found[start][7:-1]
    if found[-1] != f"\\end{{{kind}}}" or not _encloses(found[start:]) or kind not in (*_MATRICES, "vmatrix"):
        raise Unreadable("an environment that is no matrix")
    inner = found[start + 1 : -1]
    rows = split(inner[:-1] if inner[-1:] == ["\\\\"] else inner, ("\\\\",))[0]
    cells = [split(row, ("&",))[0] for row in rows]
    if len({len(row) for row in cells}) != 1 or (kind == "vmatrix" and start):
        raise Unreadable("rows of different lengths, or a factor before a determinant")
    factor = found[:start][:-1] if start and found[start - 1] in ("\\cdot", "\\times", "*") else found[:start]
    factor = ["1"] if not factor else ["-", "1"] if factor == ["-"] else factor
    entries = [read_formula(["(", *factor, ")", "(", *cell, ")"]) for row in cells for cell in row]
    mark = (len(cells), len(cells[0]), kind == "vmatrix")
    return Node("matrix", tuple(Node("value", (entry,)) for entry in entries), mark=mark)


def _alike(gold: Node, answer: Node) -> tuple[Node, Node]:
    """Return the two in a common form where one of them says in another form what the other says."""
    if (gold.kind == "list") != (answer.kind == "list"):
        gold, answer = _element(gold), _element(answer)
    if gold.name and answer.name and gold.name != answer.name:
        values = gold.kind == answer.kind == "value"
        return (_equation(gold), _equation(answer)) if values else (gold, Node("none"))  # x = 2y, y = x/2
    if gold.kind == "list" and answer.kind == "list":
        names = [{part.name for part in node.parts if part.name} for node in (gold, answer)]
        if names[0] != names[1] and len(names[0] | names[1]) > 1:  # x = 1, y = 2 is not 2, 1
            return gold, Node("none")
    if answer.kind == "relation" and gold.kind != "relation":
        if gold.name and gold.kind == "value":
            return _equation(gold), answer
        return gold, _said(answer, gold.kind, letters=True)
    if gold.kind == "relation" and answer.kind != "relation":
        if answer.name and answer.kind == "value":
            return gold, _equation(answer)
        return _said(gold, answer.kind, letters=False), answer
    kinds = {gold.kind: gold, answer.kind: answer}
    if kinds.keys() == {"list", "union"}:
        ranges = tuple(_said(part, "tuple", letters=False) for part in kinds["list"].parts)
        kinds["list"] = Node("union", ranges, mark="\\cup")
    elif kinds.keys() == {"list", "tuple"} and kinds["list"].mark == "bare" and kinds["tuple"].mark == ("(", ")"):
        kinds["list"] = replace(kinds["list"], kind="tuple", mark=("(", ")"))
    elif kinds.keys() == {"ratio", "value"} and len(kinds["ratio"].parts) == 2:
        kinds["ratio"] = Node("value", (quotient(*(part.parts[0] for part in kinds["ratio"].parts)),))
    else:
        return gold, answer
    return kinds[gold.kind], kinds[answer.kind]


def _element(node: Node) -> Node:
    """Return the element of a set of one, any other node as it is."""
    if node.kind != "list" or len(node.parts) != 1:
        return node
    part = node.parts[0]
    return replace(part, unit=part.unit or node.unit, name=part.name or node.name)


def _equation(node: Node) -> Node:
    """Return `x = …` as a relation."""
    name = Node("value", (read_formula(list(node.name[:-1])),))
    return Node("relation", (name, replace(node, name=None)), mark=("=",))


def _said(node: Node, kind: str, *, letters: bool) -> Node:
    """Return the interval (for the kind tuple) or else the value that a relation states, as far as it does."""
    if node.kind != "relation":
        return node
    return (_interval(node) if kind == "tuple" else _stated(node, letters=letters)) or node


def _stated(relation: Node, *, letters: bool = False) -> Node | None:
    """Return the value of `1 + 1 = 2`; with `letters` of `m + n = 5` too. `2x = 10` states none."""
    *before, last = relation.parts
    if set(relation.mark) != {"="}:
        return None
    if letters and before[0].letters:
        before = before[1:]
    return last if all(part.equals(last) for part in before) else None


def _interval(relation: Node) -> Node | None:
    """Return the interval of `2 < x \\le 3`, `x \\ge 5` or `x < 5`, None for other relations."""
    if any(mark not in _BRACKETS for mark in relation.mark):
        return None
    infinity = Node("value", (read_formula(["\\infty"]),))
    minus = Node("value", (read_formula(["-", "\\infty"]),))
    parts, marks = relation.parts, [_BRACKETS[mark] for mark in relation.mark]
    if len(parts) == 3 and parts[1].letters:
        return Node("tuple", (parts[0], parts[2]), mark=(marks[0][0], marks[1][1]))
    if len(parts) == 2 and parts[1].letters:
        return Node("tuple", (parts[0], infinity), mark=(marks[0][0], ")"))
    if len(parts) == 2 and parts[0].letters:
        return Node("tuple", (minus, parts[1]), mark=("(", marks[0][1]))
    return None


def _same_value(left: Node, right: Node) -> bool:
    one, two = left.parts[0], right.parts[0]
    if all(same_at(one, two, point) for point in points(one, two)):
        return True
    return not (one.letters or two.letters) and (_rounds_to(left, one, two) or _rounds_to(right, two, one))


def _rounds_to(node: Node, decimal: Tree, exact: Tree) -> bool:
    """Return whether a number of at least six decimals and six digits gives an irrational number as far as it goes."""
    decimal, exact = (value_at(tree, 0) for tree in (decimal, exact))
    if (node.decimals or 0) < 6 or isinstance(exact, Fraction) or not isinstance(decimal, Fraction):
        return False
    with mpmath.workdps(DIGITS):
        error = abs(exact - mpmath.mpf(decimal.numerator) / decimal.denominator)
        return abs(decimal) * 10**node.decimals >= 10**5 and bool(error < mpmath.mpf(10) ** -node.decimals)


def _same_relation(left: Node, right: Node) -> bool:
    if left.mark != right.mark:
        return False
    if len(left.parts) == len(right.parts) and all(map(Node.equals, left.parts, right.parts)):
        return True
    if len(left.parts) != 2 or {part.kind for node in (left, right) for part in node.parts} != {"value"}:
        return False
    gaps = [difference(*(part.parts[0] for part in node.parts)) for node in (left, right)]
    ratio, at = quotient(*gaps), points(*gaps)
    first = value_at(ratio, at[0])
    if first == 0 or not is_constant(ratio, at):
        return False
    return left.mark[0] in ("=", "\\ne") or (isinstance(first, Fraction) and first > 0)


def _proportional(left: Iterable[Tree], right: Iterable[Tree]) -> bool:
    ratios = [quotient(one, two) for one, two in zip(left, right, strict=True)]
    at = points(*ratios)
    return all(is_constant(ratio, at) and same_at(ratios[0], ratio, at[0]) for ratio in ratios)


def _same_unordered(left: Sequence[Node], right: Sequence[Node]) -> bool:
    rest = list(right)
    for node in left:
        place = next((place for place, other in enumerate(rest) if node.equals(other)), None)
        if place is None:
            return False
        del rest[place]
    return not rest
