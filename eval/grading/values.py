"""The arithmetic of formulas: values, and the numbers that stand for letters.

Values are exact fractions where the formula allows it, else complex numbers by mpmath of the digits that are set. Sizes
are bounded: a power tower is Unreadable, not slow.
"""

import hashlib
import math
from collections.abc import Callable
from fractions import Fraction

import mpmath

MAX_BITS = 32_000  # of an exact value
MAX_LOG = 1e6  # of the natural logarithm of a power

Value = Fraction | mpmath.mpc
POINTS = tuple(range(14))
_SALT = "82"  # found by trial: see letter_value


class Unreadable(ValueError):
    """The tokens are no formula that this module reads whole, or its value is out of bounds."""


def letter_value(name: str, point: int) -> Fraction:
    """Return the number that stands for a letter: positive at points 0 to 2, negative at 3, of either sign at others.

    No two letters have the same or opposite signs at all points, and what is negated at 3 has its size of 0.
    """
    if point == 3:
        return -letter_value(name, 0)
    digest = int.from_bytes(hashlib.sha256(f"{name}{_SALT}{point}".encode()).digest()[:8])
    size = Fraction(300 + (digest >> 1) % 997, 701 + point)
    return size if point < 3 or digest % 2 else -size


def is_exact(value: Value) -> bool:
    """Return whether a value is a fraction."""
    return isinstance(value, Fraction)


def is_negative(value: Value) -> bool:
    """Return whether a value is a negative real number."""
    if isinstance(value, Fraction):
        return value < 0
    return bool(mpmath.re(value) < 0 and abs(mpmath.im(value)) <= abs(mpmath.re(value)) * 1e-40)


def to_mpmath(value: Value) -> mpmath.mpc | mpmath.mpf:
    return mpmath.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def bounded(value: Value) -> Value:
    if isinstance(value, Fraction):
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
            raise Unreadable("too large")
    elif mpmath.isnan(value):
        raise Unreadable("undefined")
    return value


def add(left: Value, right: Value) -> Value:
    exact = isinstance(left, Fraction) and isinstance(right, Fraction)
    return bounded(left + right if exact else to_mpmath(left) + to_mpmath(right))


def multiply(left: Value, right: Value) -> Value:
    exact = isinstance(left, Fraction) and isinstance(right, Fraction)
    return bounded(left * right if exact else to_mpmath(left) * to_mpmath(right))


def divide(left: Value, right: Value) -> Value:
    if right == 0:
        raise Unreadable("division by zero")
    exact = isinstance(left, Fraction) and isinstance(right, Fraction)
    return bounded(left / right if exact else to_mpmath(left) / to_mpmath(right))


def power(base: Value, exponent: Value) -> Value:
    if base == 0:
        if not (isinstance(exponent, Fraction) and exponent > 0):
            raise Unreadable("a power of zero")
        return Fraction(0)
    size = abs(mpmath.log(abs(to_mpmath(base)))) * abs(to_mpmath(exponent))
    if not size < MAX_LOG:
        raise Unreadable("too large")
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if exponent.denominator == 1:
            if size > MAX_BITS:
                raise Unreadable("too large")
            return bounded(base**exponent.numerator)
        if base > 0 and (found := _exact_root(base, exponent.denominator)) is not None:
            return power(found, Fraction(exponent.numerator))
    return bounded(mpmath.power(mpmath.mpc(to_mpmath(base)), to_mpmath(exponent)))


def _exact_root(value: Fraction, degree: int) -> Fraction | None:
    """Return the exact root of a positive fraction, None where it has none (or is too large to look for)."""
    roots = []
    for whole in (value.numerator, value.denominator):
        if degree > 64 or whole.bit_length() > 2000:
            return None
        found = int(mpmath.nint(mpmath.mpf(whole) ** (mpmath.mpf(1) / degree))) if degree > 2 else math.isqrt(whole)
        if found**degree != whole:
            return None
        roots.append(found)
    return Fraction(roots[0], roots[1])


def real_power(base: Value, exponent: Value) -> Value:
    """Return base^exponent for an exponent that is a fraction with an odd denominator, real where the base is."""
    if exponent.denominator == 1 or not is_negative(base):
        return power(base, exponent)
    result = power(_negated(base), exponent)
    return -result if exponent.numerator % 2 else result


def root(value: Value, degree: Value) -> Value:
    """Return the real root of odd degree where there is one, else the principal root."""
    if not isinstance(degree, Fraction) or degree == 0:
        raise Unreadable("the degree of a root")
    if degree.denominator == 1 and degree.numerator % 2:
        return real_power(value, 1 / degree)
    return power(value, 1 / degree)


def _negated(value: Value) -> Value:
    return -value if isinstance(value, Fraction) else mpmath.mpc(-mpmath.re(value))


def factorial(value: Value) -> Value:
    if not (isinstance(value, Fraction) and 0 <= value <= 3000 and value.denominator == 1):
        raise Unreadable("a factorial of no small whole number")
    return Fraction(math.factorial(value.numerator))


def binomial(top: Value, bottom: Value) -> Value:
    if not (isinstance(bottom, Fraction) and bottom.denominator == 1 and 0 <= bottom <= 3000):
        raise Unreadable("a binomial over no small whole number")
    if isinstance(top, Fraction) and top.denominator == 1 and 0 <= top <= 3000:
        return bounded(Fraction(math.comb(top.numerator, bottom.numerator)))
    if bottom > 100:
        raise Unreadable("a binomial over no small whole number")
    result = Fraction(1)
    for step in range(bottom.numerator):
        result = divide(multiply(result, add(top, Fraction(-step))), Fraction(step + 1))
    return result


def rounded(value: Value, how: Callable) -> Fraction:
    if not isinstance(value, Fraction):
        if abs(mpmath.im(value)) > 1e-40 or not abs(value) < 1e15:
            raise Unreadable("a whole part of no real number")
        return Fraction(int(how(mpmath.re(value))))
    return Fraction(how(value))


def absolute(value: Value) -> Value:
    return abs(value) if isinstance(value, Fraction) else mpmath.mpc(abs(value))


def apply(function: Callable, value: Value) -> Value:
    if not abs(to_mpmath(value)) < MAX_LOG:
        raise Unreadable("too large")
    return bounded(mpmath.mpc(function(mpmath.mpc(to_mpmath(value)))))
