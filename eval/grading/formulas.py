"""Formulas without =, < and commas: tokens (eval/grading/notation.py) -> a tree -> its value at a point.

A formula is read whole or not at all: a token that the grammar below does not know raises Unreadable, so that nothing
is ever skipped. Ambiguous forms are not read either: `1/2x`, `x2`, `2 3`.
Read: numbers (exact fractions), letters, \\pi, e, i, \\infty, + - * / \\cdot \\times \\div, products without a sign,
mixed numbers, powers, \\frac, \\sqrt, \\binom, !, |x|, floor and ceiling, degrees, repeating decimals, and FUNCTIONS.
\\log is to base 10, as in the competitions that MATH comes from.

`f(2)` is no product: f, g and h before a bracket are not read.

Two formulas are compared at POINTS. At the first three every letter is positive, at the others the signs differ, so
that |ab| is not ab and \\sqrt{x^2} is not x. But where what stands under an even root or in a logarithm is negative
somewhere (\\sqrt{xy}, \\ln x), the letters stand for positive numbers only, so that \\sqrt{xy} is \\sqrt x \\sqrt y;
unless a |…| with letters says that signs matter.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import mpmath

from eval.grading import values
from eval.grading.notation import FUNCTION_LETTERS, closing, is_symbol
from eval.grading.values import MAX_BITS, Unreadable, Value, is_exact, is_negative, letter_value, to_mpmath

DIGITS = 60
MORE_DIGITS = 400
MAX_DEPTH = 40
POSITIVE = values.POINTS[:3]


@dataclass(frozen=True, eq=False)
class Tree:
    """A formula that has been read.

    at: the number of a point -> the value there.
    letters: whether it has letters.
    absolute: whether it has letters between |…|.
    radicands: what has letters and stands under an even root, a fractional power or in a logarithm.
    """

    at: Callable[[int], Value]
    letters: bool = False
    absolute: bool = False
    radicands: tuple["Tree", ...] = ()


FUNCTIONS = {
    **{name: getattr(mpmath, name) for name in "sin cos tan cot sec csc sinh cosh tanh exp".split()},
    **{f"arc{name}": getattr(mpmath, f"a{name}") for name in "sin cos tan".split()},
    "ln": mpmath.log,
    "log": lambda value: mpmath.log(value, 10),
    "lg": lambda value: mpmath.log(value, 10),
}
_LOGARITHMS = ("ln", "log", "lg")
_INVERSES = {name: FUNCTIONS[f"arc{name}"] for name in ("sin", "cos", "tan")}
_STARTS = ("\\frac", "\\sqrt", "\\binom", "\\pi", "\\infty", "(", "[", "{", "\\lfloor", "\\lceil")
_TIMES = ("*", "\\cdot", "\\times")
_OVER = ("/", "\\div")


def read_formula(tokens: list[str]) -> Tree:
    """Return the tree of `tokens`. Raises Unreadable."""
    if "\\infty" in tokens and tokens[tokens[0] in ("+", "-") :] != ["\\infty"]:
        raise Unreadable("a formula with \\infty in it")
    reader = _Reader(tokens)
    tree = reader.sum()
    if reader.place < len(tokens):
        raise Unreadable(f"not understood: {tokens[reader.place]}")
    return tree


@lru_cache(maxsize=2**14)
def value_at(tree: Tree, point: int) -> Value:
    """Return the value of the tree with every letter set to its number at that point. Raises Unreadable.

    What 60 digits show as nearly zero is looked at again with 400, since rounding by itself could have left it there.
    """
    for digits in (DIGITS, MORE_DIGITS):
        value = _evaluated(tree, point, digits)
        if isinstance(value, Fraction) or abs(value) > 1e-25:
            return value
    return Fraction(0) if abs(value) < mpmath.mpf(10) ** -350 else value


def _evaluated(tree: Tree, point: int, digits: int) -> Value:
    with mpmath.workdps(digits):
        try:
            return tree.at(point)
        except (ArithmeticError, ValueError, TypeError, NotImplementedError) as error:
            raise Unreadable(str(error)) from error


def points(*trees: Tree) -> tuple[int, ...]:
    """Return the points at which these formulas are compared (see the module): one where they have no letters."""
    if not any(tree.letters for tree in trees):
        return POSITIVE[:1]
    under = [] if any(tree.absolute for tree in trees) else [part for tree in trees for part in tree.radicands]
    negative = any(is_negative(value_at(part, point)) for part in under for point in values.POINTS)
    return POSITIVE if negative else values.POINTS


def same_at(left: Tree, right: Tree, point: int) -> bool:
    """Return whether two formulas have the same value at a point."""
    return _same((left, point), (right, point))


def is_constant(tree: Tree, at: Iterable[int]) -> bool:
    """Return whether a formula has the same value at all these points."""
    return all(_same((tree, POSITIVE[0]), (tree, point)) for point in at)


def _same(left: tuple[Tree, int], right: tuple[Tree, int]) -> bool:
    """Compare exactly where both values are fractions or infinite, else to 40 digits and, if these agree, to 350."""
    found = value_at(*left), value_at(*right)
    if all(map(is_exact, found)) or any(map(mpmath.isinf, map(to_mpmath, found))):
        return bool(found[0] == found[1])
    if not _close(*found, DIGITS, 40):
        return False
    return _close(_evaluated(*left, MORE_DIGITS), _evaluated(*right, MORE_DIGITS), MORE_DIGITS, 350)


def _close(one: Value, two: Value, digits: int, to: int) -> bool:
    with mpmath.workdps(digits):
        left, right = to_mpmath(one), to_mpmath(two)
        return bool(abs(left - right) <= max(abs(left), abs(right)) * mpmath.mpf(10) ** -to)


def difference(left: Tree, right: Tree) -> Tree:
    """Return the tree of left - right."""
    return _sum_of(left, right, minus=True)


def quotient(left: Tree, right: Tree) -> Tree:
    """Return the tree of left / right."""
    return _product_of(left, right, values.divide)


def _constant(value: Value) -> Tree:
    return Tree(lambda point: value)


class _Reader:
    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.place, self.depth = tokens, 0, 0

    def next(self, ahead: int = 0) -> str:
        place = self.place + ahead
        return self.tokens[place] if place < len(self.tokens) else ""

    def take(self, *wanted: str) -> bool:
        found = self.next() in wanted and self.next() != ""
        self.place += found
        return found

    def inside(self, close: str) -> Tree:
        """Read a sum up to `close`, which is taken; the bracket before has been."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("nested too deeply")
        tree = self.sum()
        if not self.take(close):
            raise Unreadable(f"no {close}")
        self.depth -= 1
        return tree

    def argument(self) -> Tree:
        if not self.take("{"):
            raise Unreadable("no argument")
        return self.inside("}")

    def sum(self) -> Tree:
        tree = self.product()
        while self.next() in ("+", "-"):
            minus = self.next() == "-"
            self.place += 1
            tree = _sum_of(tree, self.product(), minus)
        return tree

    def product(self) -> Tree:
        sign = 1
        while self.next() in ("+", "-"):
            sign = -sign if self.next() == "-" else sign
            self.place += 1
        tree = self.factors()[0]
        while (operator := self.next()) in _TIMES or operator in _OVER:
            self.place += 1
            minus = self.take("-")
            right, count = self.factors()
            if operator in _OVER and count > 1:
                raise Unreadable("a/bc")
            tree = _product_of(tree, right, values.multiply if operator in _TIMES else values.divide)
            sign = -sign if minus else sign
        return tree if sign > 0 else _product_of(_constant(Fraction(-1)), tree, values.multiply)

    def factors(self) -> tuple[Tree, int]:
        """Read factors without a sign between; return their product and how many they are."""
        first = self.next()
        tree, count = self.power(), 1
        while self.starts_factor():
            if self.next()[0].isdigit() and (first[0].isdigit() or is_symbol([first])):
                raise Unreadable("a number behind a number or a letter")
            if count == 1 and first.isdigit() and self.next() == "\\frac" and self.is_plain_fraction():
                tree = _sum_of(tree, self.power(), False)  # a mixed number
                if self.starts_factor() and self.next() == "\\frac":
                    raise Unreadable("a mixed number times a fraction")
            else:
                first = self.next()
                tree = _product_of(tree, self.power(), values.multiply)
                count += 1
        return tree, count

    def starts_factor(self) -> bool:
        token = self.next()
        if token == "|":
            return False
        known = token in _STARTS or token.removeprefix("\\") in FUNCTIONS or is_symbol([token])
        return bool(token) and (known or token[0].isdigit())

    def is_plain_fraction(self) -> bool:
        inner = self.tokens[self.place + 1 : self.place + 7]
        return [part for part in inner if not part.isdigit()] == ["{", "}", "{", "}"] and self.next(7) != "^"

    def power(self) -> Tree:
        tree = self.primary()
        while True:
            if self.take("^"):
                if self.tokens[self.place : self.place + 3] == ["{", "\\circ", "}"]:
                    self.place += 3
                    tree = _product_of(tree, Tree(lambda point: mpmath.pi / 180), values.multiply)
                    continue
                tree = _power_of(tree, self.argument())
                if self.next() == "^":
                    raise Unreadable("a^b^c")
            elif self.take("!"):
                if self.next() == "!":
                    raise Unreadable("n!!")
                tree = _of(tree, values.factorial)
            else:
                return tree

    def primary(self) -> Tree:
        token = self.next()
        self.place += 1
        if token and token[0].isdigit():
            return self.number(token)
        if is_symbol([token]):
            return self.symbol(token)
        if token in ("(", "[", "{"):
            return self.inside({"(": ")", "[": "]", "{": "}"}[token])
        if token == "|":
            tree = self.inside("|")
            return _joined(lambda point: values.absolute(tree.at(point)), tree, absolute=tree.letters)
        if token == "\\lfloor":
            return _of(self.inside("\\rfloor"), lambda value: values.rounded(value, math.floor))
        if token == "\\lceil":
            return _of(self.inside("\\rceil"), lambda value: values.rounded(value, math.ceil))
        if token == "\\frac":
            if self.is_derivative():
                raise Unreadable("a derivative")
            return _product_of(self.argument(), self.argument(), values.divide)
        if token == "\\binom":
            return _product_of(self.argument(), self.argument(), values.binomial)
        if token == "\\sqrt":
            degree = self.inside("]") if self.take("[") else _constant(Fraction(2))
            return _root_of(self.argument(), degree)
        if token == "\\pi":
            return Tree(lambda point: mpmath.mpc(mpmath.pi))
        if token == "\\infty":
            return Tree(lambda point: mpmath.mpc(mpmath.inf))
        if token.removeprefix("\\") in FUNCTIONS:
            return self.function(token.removeprefix("\\"))
        raise Unreadable(f"not understood: {token}")

    def is_derivative(self) -> bool:
        """Return whether the \\frac before is d…/dx."""
        end = closing(self.tokens, self.place)
        below = self.tokens[end + 1 : end + 4] if end else []
        return self.next(1) == "d" and below[:2] == ["{", "d"] and is_symbol(below[2:])

    def number(self, token: str) -> Tree:
        if self.next() == "_":
            raise Unreadable("a number in another base")
        if len(token) > MAX_BITS // 4:
            raise Unreadable("too large")
        value = Fraction(token.rstrip("."))
        if "." in token and self.next() == "\\overline":
            digits = self.next(2)
            if self.next(1) != "{" or self.next(3) != "}" or not digits.isdigit():
                raise Unreadable("what repeats is no number")
            self.place += 4
            places = len(token.partition(".")[2])
            value += Fraction(int(digits), 10**places * (10 ** len(digits) - 1))
        return _constant(values.bounded(value))

    def symbol(self, token: str) -> Tree:
        if self.next() == "_":
            if not is_symbol(self.tokens[self.place - 1 : self.place + 4]):
                raise Unreadable("an index of several tokens")
            token += "_" + self.next(2)
            self.place += 4
        if token == "e":
            return Tree(lambda point: mpmath.mpc(mpmath.e))
        if token == "i":
            return _constant(mpmath.mpc(0, 1))
        if token in FUNCTION_LETTERS and self.next() == "(":
            raise Unreadable("a function's value")
        return Tree(lambda point: letter_value(token, point), letters=True)

    def function(self, name: str) -> Tree:
        """Read what follows \\sin, \\log_2, \\sin^2, …: a bracket, or the factors up to the next function or sign."""
        apply, exponent = FUNCTIONS[name], None
        if name in ("log", "lg") and self.take("_"):
            base = self.argument()
        else:
            base = None
        if self.take("^"):
            if self.tokens[self.place : self.place + 4] == ["{", "-", "1", "}"]:
                if name not in _INVERSES:
                    raise Unreadable("an inverse function")
                apply = _INVERSES[name]
                self.place += 4
            else:
                exponent = self.argument()
        if self.next() in ("(", "[", "{", "|"):
            tree = self.power() if self.next() in ("{", "|") else self.primary()
        else:
            sign = self.take("-")
            if not self.starts_factor() or self.next().removeprefix("\\") in FUNCTIONS:
                raise Unreadable(f"\\{name} of nothing")
            tree = self.power()
            while self.starts_factor() and self.next().removeprefix("\\") not in FUNCTIONS and self.next() != "(":
                if self.next()[0].isdigit():
                    raise Unreadable("a number behind a factor")
                tree = _product_of(tree, self.power(), values.multiply)
            if self.next() in ("(", "/"):
                raise Unreadable("where the argument of a function ends")
            tree = _product_of(_constant(Fraction(-1)), tree, values.multiply) if sign else tree
        result = _of(tree, lambda value: values.apply(apply, value), positive=name in _LOGARITHMS)
        if base is not None:
            result = _product_of(_of(tree, _log, positive=True), _of(base, _log, positive=True), values.divide)
        return _power_of(result, exponent) if exponent is not None else result


def _log(value: Value) -> Value:
    return values.apply(mpmath.log, value)


def _joined(at: Callable[[int], Value], *trees: Tree, positive: Tree | None = None, absolute: bool = False) -> Tree:
    """Return the tree made of others; `positive` is one that an even root, a fractional power or a logarithm takes."""
    radicands = tuple(dict.fromkeys(part for tree in trees for part in tree.radicands))
    return Tree(
        at,
        letters=any(tree.letters for tree in trees),
        absolute=absolute or any(tree.absolute for tree in trees),
        radicands=(*radicands, positive) if positive is not None and positive.letters else radicands,
    )


def _of(tree: Tree, function: Callable[[Value], Value], *, positive: bool = False) -> Tree:
    return _joined(lambda point: function(tree.at(point)), tree, positive=tree if positive else None)


def _sum_of(left: Tree, right: Tree, minus: bool) -> Tree:
    if minus:
        return _joined(lambda point: values.add(left.at(point), -right.at(point)), left, right)
    return _joined(lambda point: values.add(left.at(point), right.at(point)), left, right)


def _product_of(left: Tree, right: Tree, combine: Callable[[Value, Value], Value]) -> Tree:
    return _joined(lambda point: combine(left.at(point), right.at(point)), left, right)


def _power_of(base: Tree, exponent: Tree) -> Tree:
    """Return base^exponent, real for a negative base where the exponent is a fraction with an odd denominator."""
    fixed = Fraction(1, 2) if exponent.letters else value_at(exponent, POSITIVE[0])
    odd = isinstance(fixed, Fraction) and fixed.denominator % 2
    combine = values.real_power if odd else values.power
    return _joined(
        lambda point: combine(base.at(point), exponent.at(point)), base, exponent, positive=None if odd else base
    )


def _root_of(tree: Tree, degree: Tree) -> Tree:
    fixed = Fraction(2) if degree.letters else value_at(degree, POSITIVE[0])
    odd = isinstance(fixed, Fraction) and fixed.denominator == 1 and fixed.numerator % 2
    return _joined(
        lambda point: values.root(tree.at(point), degree.at(point)), tree, degree, positive=None if odd else tree
    )
