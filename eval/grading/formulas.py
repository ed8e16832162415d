"""Formulas without =, < and commas: tokens (eval/grading/notation.py) -> a tree -> its value at a point.

A formula is read whole or not at all: a token that the grammar below does not know raises Unreadable, so that nothing
is ever skipped. Ambiguous forms are not read either: `1/2x`, `x2`, `2 3`.
Read: numbers (exact fractions), letters, \\pi, e, i, \\infty, + - * / \\cdot \\times \\div, products without a sign,
mixed numbers, powers, \\frac, \\sqrt, \\binom, !, |x|, floor and ceiling, degrees, repeating decimals, and FUNCTIONS.
\\log is to base 10, as in the competitions that MATH comes from.

Values are exact fractions where the formula allows it, else complex numbers of 60 digits by mpmath. Sizes are bounded:
a power tower is Unreadable, not slow.
"""

import hashlib
import math
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

import mpmath

from eval.grading.notation import closing, is_symbol

DIGITS = 60
MAX_DEPTH = 40
MAX_BITS = 32_000  # of an exact value
MAX_LOG = 1e6  # of the natural logarithm of a power

Value = Fraction | mpmath.mpc
POINTS = (0, 1, 2)
Tree = Callable[[int], Value]  # the number of a point -> the value there


class Unreadable(ValueError):
    """The tokens are no formula that this module reads whole, or its value is out of bounds."""


FUNCTIONS = {
    **{name: getattr(mpmath, name) for name in "sin cos tan cot sec csc sinh cosh tanh exp".split()},
    **{f"arc{name}": getattr(mpmath, f"a{name}") for name in "sin cos tan".split()},
    "ln": mpmath.log,
    "log": lambda value: mpmath.log(value, 10),
    "lg": lambda value: mpmath.log(value, 10),
}
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

    What 60 digits show as nearly zero is looked at again with 400, since rounding alone could have left it there.
    """
    for digits in (DIGITS, 400):
        with mpmath.workdps(digits):
            try:
                value = tree(point)
            except (ArithmeticError, ValueError, TypeError, NotImplementedError) as error:
                raise Unreadable(str(error)) from error
            if isinstance(value, Fraction) or abs(value) > 1e-25:
                return value
    return Fraction(0) if abs(value) < mpmath.mpf(10) ** -350 else value


def close(one: Value, two: Value) -> bool:
    """Return whether two values are equal: exactly where both are fractions or infinite, else to 40 digits."""
    if all(isinstance(value, Fraction) or mpmath.isinf(value) for value in (one, two)):
        return bool(one == two)
    if any(not isinstance(value, Fraction) and mpmath.isinf(value) for value in (one, two)):
        return False
    with mpmath.workdps(DIGITS):
        left, right = _number(one), _number(two)
        return bool(abs(left - right) <= max(abs(left), abs(right)) * mpmath.mpf(10) ** -40)


def difference(left: Tree, right: Tree) -> Tree:
    """Return the tree of left - right."""
    return _sum_of(left, right, minus=True)


def quotient(left: Tree, right: Tree) -> Tree:
    """Return the tree of left / right."""
    return _product_of(left, right, _divide)


def letter_value(name: str, point: int) -> Fraction:
    """Return the number that stands for a letter: all positive at point 0, of mixed and opposite signs at 1 and 2."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    size = Fraction(300 + (digest >> 8 * point) % 997, 701 + point)
    return size if point == 0 or (digest + point) % 2 else -size


def _number(value: Value) -> mpmath.mpc | mpmath.mpf:
    return mpmath.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _bounded(value: Value) -> Value:
    if isinstance(value, Fraction):
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
            raise Unreadable("too large")
    elif mpmath.isnan(value):
        raise Unreadable("undefined")
    return value


def _add(left: Value, right: Value) -> Value:
    exact = isinstance(left, Fraction) and isinstance(right, Fraction)
    return _bounded(left + right if exact else _number(left) + _number(right))


def _multiply(left: Value, right: Value) -> Value:
    exact = isinstance(left, Fraction) and isinstance(right, Fraction)
    return _bounded(left * right if exact else _number(left) * _number(right))


def _divide(left: Value, right: Value) -> Value:
    if right == 0:
        raise Unreadable("division by zero")
    exact = isinstance(left, Fraction) and isinstance(right, Fraction)
    return _bounded(left / right if exact else _number(left) / _number(right))


def _power(base: Value, exponent: Value) -> Value:
    if base == 0:
        if not (isinstance(exponent, Fraction) and exponent > 0):
            raise Unreadable("a power of zero")
        return Fraction(0)
    size = abs(mpmath.log(abs(_number(base)))) * abs(_number(exponent))
    if not size < MAX_LOG:
        raise Unreadable("too large")
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if exponent.denominator == 1:
            if size > MAX_BITS:
                raise Unreadable("too large")
            return _bounded(base**exponent.numerator)
        if base > 0 and (root := _exact_root(base, exponent.denominator)) is not None:
            return _power(root, Fraction(exponent.numerator))
    return _bounded(mpmath.power(mpmath.mpc(_number(base)), _number(exponent)))


def _exact_root(value: Fraction, degree: int) -> Fraction | None:
    """Return the exact root of a positive fraction, None where it has none (or is too large to look for)."""
    roots = []
    for whole in (value.numerator, value.denominator):
        if degree > 64 or whole.bit_length() > 2000:
            return None
        root = int(mpmath.nint(mpmath.mpf(whole) ** (mpmath.mpf(1) / degree))) if degree > 2 else math.isqrt(whole)
        if root**degree != whole:
            return None
        roots.append(root)
    return Fraction(roots[0], roots[1])


def _root(value: Value, degree: Value) -> Value:
    """Return the real root of odd degree where there is one, else the principal root."""
    if not isinstance(degree, Fraction) or degree == 0:
        raise Unreadable("the degree of a root")
    real = isinstance(value, Fraction) and value < 0 and degree.denominator == 1 and degree.numerator % 2
    root = _power(-value if real else value, 1 / degree)
    return -root if real else root


def _factorial(value: Value) -> Value:
    if not (isinstance(value, Fraction) and 0 <= value <= 3000 and value.denominator == 1):
        raise Unreadable("a factorial of no small whole number")
    return Fraction(math.factorial(value.numerator))


def _binomial(top: Value, bottom: Value) -> Value:
    if not (isinstance(bottom, Fraction) and bottom.denominator == 1 and 0 <= bottom <= 3000):
        raise Unreadable("a binomial over no small whole number")
    if isinstance(top, Fraction) and top.denominator == 1 and 0 <= top <= 3000:
        return _bounded(Fraction(math.comb(top.numerator, bottom.numerator)))
    if bottom > 100:
        raise Unreadable("a binomial over no small whole number")
    result = Fraction(1)
    for step in range(bottom.numerator):
        result = _divide(_multiply(result, _add(top, Fraction(-step))), Fraction(step + 1))
    return result


def _rounded(value: Value, how: Callable) -> Fraction:
    if not isinstance(value, Fraction):
        if abs(mpmath.im(value)) > 1e-40 or not abs(value) < 1e15:
            raise Unreadable("a whole part of no real number")
        return Fraction(int(how(mpmath.re(value))))
    return Fraction(how(value))


def _absolute(value: Value) -> Value:
    return abs(value) if isinstance(value, Fraction) else mpmath.mpc(abs(value))


def _apply(function: Callable, value: Value) -> Value:
    if not abs(_number(value)) < MAX_LOG:
        raise Unreadable("too large")
    return _bounded(mpmath.mpc(function(mpmath.mpc(_number(value)))))


def _constant(value: Value) -> Tree:
    return lambda point: value


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
            tree = _product_of(tree, right, _multiply if operator in _TIMES else _divide)
            sign = -sign if minus else sign
        return tree if sign > 0 else _product_of(_constant(Fraction(-1)), tree, _multiply)

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
                tree = _product_of(tree, self.power(), _multiply)
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
                    tree = _product_of(tree, lambda point: mpmath.pi / 180, _multiply)
                    continue
                tree = _product_of(tree, self.argument(), _power)
                if self.next() == "^":
                    raise Unreadable("a^b^c")
            elif self.take("!"):
                if self.next() == "!":
                    raise Unreadable("n!!")
                tree = _of(tree, _factorial)
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
            return _of(self.inside("|"), _absolute)
        if token == "\\lfloor":
            return _of(self.inside("\\rfloor"), lambda value: _rounded(value, math.floor))
        if token == "\\lceil":
            return _of(self.inside("\\rceil"), lambda value: _rounded(value, math.ceil))
        if token == "\\frac":
            if self.is_derivative():
                raise Unreadable("a derivative")
            return _product_of(self.argument(), self.argument(), _divide)
        if token == "\\binom":
            return _product_of(self.argument(), self.argument(), _binomial)
        if token == "\\sqrt":
            degree = self.inside("]") if self.take("[") else _constant(Fraction(2))
            return _product_of(self.argument(), degree, _root)
        if token == "\\pi":
            return lambda point: mpmath.mpc(mpmath.pi)
        if token == "\\infty":
            return lambda point: mpmath.mpc(mpmath.inf)
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
        return _constant(_bounded(value))

    def symbol(self, token: str) -> Tree:
        if self.next() == "_":
            if not is_symbol(self.tokens[self.place - 1 : self.place + 4]):
                raise Unreadable("an index of several tokens")
            token += "_" + self.next(2)
            self.place += 4
        if token == "e":
            return lambda point: mpmath.mpc(mpmath.e)
        if token == "i":
            return _constant(mpmath.mpc(0, 1))
        return lambda point: letter_value(token, point)

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
                tree = _product_of(tree, self.power(), _multiply)
            if self.next() in ("(", "/"):
                raise Unreadable("where the argument of a function ends")
            tree = _product_of(_constant(Fraction(-1)), tree, _multiply) if sign else tree
        result = _of(tree, lambda value: _apply(apply, value))
        if base is not None:
            result = _product_of(_of(tree, _log), _of(base, _log), _divide)
        return _product_of(result, exponent, _power) if exponent is not None else result


def _log(value: Value) -> Value:
    return _apply(mpmath.log, value)


def _of(tree: Tree, function: Callable[[Value], Value]) -> Tree:
    return lambda point: function(tree(point))


def _sum_of(left: Tree, right: Tree, minus: bool) -> Tree:
    if minus:
        return lambda point: _add(left(point), -right(point))
    return lambda point: _add(left(point), right(point))


def _product_of(left: Tree, right: Tree, combine: Callable[[Value, Value], Value]) -> Tree:
    return lambda point: combine(left(point), right(point))
