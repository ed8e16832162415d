"""Numbers as models write them -> exact rationals (fractions.Fraction); nothing is rounded, no float is involved.

Read: signs (also the Unicode minus), currency before the number, thousands separators (`1,234,567`; also Indian
`12,34,567`, LaTeX `{,}` and `\\,`, and spaces or thin spaces between groups of exactly three digits, `1 000`), decimals
(`18.00` = 18, `.5`), fractions (`3/4`, `\\frac{3}{4}`, `\\frac34`, `¾`), mixed numbers (`2 1/2`, `2\\frac12`),
scientific notation (`1.5e6`, `1.5 \\times 10^6`, `3×10⁴`).
Not read as part of the number: units, percent signs (50 % is 50, by GSM8K's convention; no factor 100 is ever
forgiven), trailing full stops. Choices: a comma that does not separate groups of three ends the number (`1,5` is 1);
`x/0` and numbers of more than 1000 digits or |exponent| > 300 are not numbers; number words ("eighteen") are not read.
Every pattern here takes time linear in the text: runs of blanks are made one first, and no repetition has two ways.
"""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 1000
MAX_EXPONENT = 300
MAX_LINE = 20_000  # characters looked at from a line's end

_SPACE = " \u00a0\u2009\u202f"
_GROUPED = "|".join(
    rf"[1-9]{few}{{1,{MAX_DIGITS // 3}}}{end}(?!\d)"
    for few, end in (
        (r"\d{0,2}(?:,\d{3})", ""),
        (r"\d?(?:,\d{2})", r",\d{3}"),
        (rf"\d{{0,2}}(?:[{_SPACE}]\d{{3}})", ""),
    )
)
_PLAIN = rf"(?:(?:{_GROUPED}|\d++)(?:\.\d++)?|\.\d++)"
_ARGUMENT = rf"(?:\s*\{{\s*[-+]?{_PLAIN}\s*\}}|\s*\d)"
_FRAC = rf"\\frac{_ARGUMENT}{_ARGUMENT}"
_CURRENCY = r"(?:(?:US|A|C|NZ|HK)?\$|[€£¥₹₽₩₪₫]|(?:Rs\.?|USD|EUR|GBP|INR|AUD|CAD))"

_NUMBER = re.compile(
    rf"""
    (?<![^\W_])                                   # not inside a word (H2O) or another number
    (?P<sign>(?<![\w)\]}}%$.])[-+](?=\S))?        # a sign, not the minus of 10-5 or 10 - 5
    (?:{_CURRENCY}\s*)?
    (?P<inner_sign>(?<=\$)[-+])?                  # $-5
    (?:
        (?P<whole>\d++)\s*(?P<mixed_frac>{_FRAC})
      | (?P<frac>{_FRAC})
      | (?P<mixed>\d++)\s+(?P<mixed_top>\d++)\s?/\s?(?P<mixed_bottom>\d++)(?![\d/]|\.\d)
      | (?P<top>{_PLAIN})\s?/\s?\$?(?P<bottom>{_PLAIN})(?![\d/])
      | (?P<mantissa>{_PLAIN})\s*[×x*]\s*10\s*(?:\^|\*\*)\s*\{{?\s*(?P<power>[-+]?\d++)\s*\}}?
      | (?P<power_of_ten>10)\s*\^\s*\{{?\s*(?P<ten_power>[-+]?\d++)\s*\}}?
      | (?P<e_mantissa>{_PLAIN})[eE](?P<e_power>[-+]?\d++)(?!\w)
      | (?P<plain>{_PLAIN})
    )
    """,
    re.VERBOSE,
)

_BLANKS = re.compile(r"\s{2,}")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_CLEANING = [
    (re.compile(r"[\u2212\u2012\u2013\ufe63\uff0d]"), "-"),
    (re.compile(r"10([⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+)"), lambda match: "10^{" + match[1].translate(_SUPERSCRIPTS) + "}"),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\([$%#&])"), r"\1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r",\s*\\!\s*"), ","),
    (re.compile(r"(?<=\d)\\[,;: !](?=\d{3})"), "\u2009"),
    (re.compile(r"(?<!\\)\\[,;:! ]"), " "),  # not the second half of a row break
    (re.compile(r"\\(?:times|cdot)(?![a-zA-Z])"), "×"),
    (re.compile(r"(?<!\d)\*\*|\*\*(?!\d)"), ""),  # bold
    (re.compile(r"(?<!\\)\\[()\[\]]|\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|boxed)(?![a-zA-Z])"), " "),
]
_COMMAND = re.compile(r"\\(?!frac(?![a-zA-Z]))[a-zA-Z]+")
_JOINING = re.compile(
    r"\b(?:since|because|as|where|when|if|for|with|given|while|so|and|or|which|that)\b", re.IGNORECASE
)
_OPERATOR = re.compile(r"\s*[-+*/×÷^]|\s*x\s*\d")


@dataclass(frozen=True)
class Found:
    """A number in a text: its exact value and the characters that were read."""

    value: Fraction
    text: str


def _spelled(text: str) -> str:
    """Return `text` with one spelling for each thing that has several (minus signs, fractions, LaTeX spacing)."""
    if not text.isascii():
        text = "".join(_vulgar_fraction(character) for character in text)
    text = _BLANKS.sub(" ", text)
    for pattern, replacement in _CLEANING:
        text = pattern.sub(replacement, text)
    return _BLANKS.sub(" ", text)


def clean(text: str) -> str:
    """Return prose with one spelling for each thing and a blank for every LaTeX command but \\frac.

    What a command holds stays. This loses meaning (`\\sqrt{2}` becomes `{2}`): it serves to find numbers, never to tell
    whether two are equal.
    """
    return _BLANKS.sub(" ", _COMMAND.sub(" ", _spelled(text)))


def _vulgar_fraction(character: str) -> str:
    if unicodedata.decomposition(character).startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKC", character).replace("\u2044", "/")
    return "/" if character == "\u2044" else character


def _plain_value(text: str) -> Fraction | None:
    digits = re.sub(rf"[,{_SPACE}]", "", text)
    return Fraction(digits) if len(digits) <= MAX_DIGITS else None


def _ratio(top: str, bottom: str) -> Fraction | None:
    numerator, denominator = _plain_value(top), _plain_value(bottom)
    return numerator / denominator if numerator is not None and denominator else None


def _scaled(mantissa: str, power: str) -> Fraction | None:
    value = _plain_value(mantissa)
    if value is None or len(power) > 4 or abs(int(power)) > MAX_EXPONENT:
        return None
    return value * Fraction(10) ** int(power)


def _frac_value(text: str) -> Fraction | None:
    top, bottom = (
        argument.strip().strip("{}").strip()
        for argument in re.fullmatch(rf"\\frac({_ARGUMENT})({_ARGUMENT})", text).groups()
    )
    return _ratio(top, bottom)


def _value(match: re.Match) -> Fraction | None:
    part = match.groupdict()
    if part["whole"]:
        fraction, whole = _frac_value(part["mixed_frac"]), _plain_value(part["whole"])
        value = whole + fraction if fraction is not None and whole is not None else None
    elif part["frac"]:
        value = _frac_value(part["frac"])
    elif part["mixed"]:
        fraction, whole = _ratio(part["mixed_top"], part["mixed_bottom"]), _plain_value(part["mixed"])
        value = whole + fraction if fraction is not None and whole is not None else None
    elif part["top"]:
        value = _ratio(part["top"], part["bottom"])
    elif part["mantissa"]:
        value = _scaled(part["mantissa"], part["power"])
    elif part["power_of_ten"]:
        value = _scaled("1", part["ten_power"])
    elif part["e_mantissa"]:
        value = _scaled(part["e_mantissa"], part["e_power"])
    else:
        value = _plain_value(part["plain"])
    if value is not None and "-" in (part["sign"], part["inner_sign"]):
        return -value
    return value


def _found(match: re.Match) -> Found | None:
    value = _value(match)
    return None if value is None else Found(value, match[0].strip())


def first_number(text: str) -> Found | None:
    """Return the number that `text`, the words right after an answer marker, states.

    That is the first number, except after an equation: of `5 + 3 = 8` and of `x = 8` it is 8. A right-hand side counts
    only when it is one number (`15 = 3*5` is 15), and when its equation is not in brackets, behind a comma or a stop
    (`24 (n=2)` is 24). Where the left side is a number already, one with words behind it does not count either: of
    `8 = 2 cubed` it is 8, and by choice of `3 feet = 36 inches` 3. A sign may stand apart (`- 5`) at the start.
    """
    text = clean(text).strip()
    sides = _sides(text)
    for place in range(len(sides) - 1, 0, -1):
        numbers = _numbers(sides[place], 2)
        if numbers and (len(numbers) == 1 or len(_numbers(sides[place - 1], 2)) != 1):
            found, end = numbers[0]
            worded = re.search(r"[^\W\d_]|%", sides[place][end:])
            if not _OPERATOR.match(sides[place], end) and not (worded and _is_one_number(sides[place - 1])):
                return found
    return next((found for found, _ in _numbers(text, 1)), None)


def _is_one_number(side: str) -> bool:
    """Return whether a side of an equation is a number with nothing but words behind: no other, no operator."""
    numbers = _numbers(side, 2)
    if len(numbers) != 1:
        return False
    found, end = numbers[0]
    before = side[: end - len(found.text)] if side[:end].endswith(found.text) else "?"
    return not before.strip(" ${*") and not re.search(r"[-+*/×÷^(]", side[end:])


def _numbers(text: str, limit: int) -> list[tuple[Found, int]]:
    """Return the first numbers of cleaned text with the places where they end in it, at most `limit`."""
    numbers: list[tuple[Found, int]] = []
    for match in _NUMBER.finditer(_joined_sign(text)):
        if found := _found(match):
            numbers.append((found, match.end() + len(text) - len(_joined_sign(text))))
            if len(numbers) == limit:
                break
    return numbers


def _joined_sign(text: str) -> str:
    return re.sub(r"^([$({\s]*)-\s(?=[\d$.\\])", r"\1-", text)


def _sides(text: str) -> list[str]:
    """Return what stands between the = signs of the equation that cleaned `text` begins with, all of it without one.

    Brackets, commas and stops end or hide it once a number has been seen: `f(3) = 9` and `So, x = 8` are equations.
    """
    sides, start, depth, digit = [], 0, 0, None
    for place, character in enumerate(text):
        if digit is None and character.isdecimal():
            digit = place
        if digit is None and character != "=":
            continue
        if character in "([":
            depth += 1
        elif character in ")]":
            depth = max(0, depth - 1)
        elif depth == 0 and character in ",;." and not text[place + 1 : place + 2].isdecimal():
            return [*sides, text[start:place]]
        elif depth == 0 and character == "=":
            if digit is not None and _JOINING.search(text, max(start, digit), place):
                return [*sides, text[start:place]]
            sides.append(text[start:place])
            start = place + 1
    return [*sides, text[start:]]


def last_number(text: str) -> Found | None:
    """Return the last number of `text`, looking from the last line upwards."""
    for line in reversed(text.splitlines()):
        if not any(character.isdecimal() for character in line):
            continue
        for match in reversed(list(_NUMBER.finditer(clean(line[-MAX_LINE:])))):
            if found := _found(match):
                return found
    return None


def leading_number(text: str) -> Found | None:
    """Return the number with which `text` starts, after nothing but spaces, bold marks and math delimiters."""
    text = re.sub(r"^(?:\s|\*|\\\(|\\\[|\(|\[|\{)+", "", clean(text))
    text = re.sub(r"^-\s+(?=[\d$.\\])", "-", text)
    for candidate in (text, text.lstrip("$")):  # `$18` is currency, `$\\frac12$` is math
        if match := _NUMBER.match(candidate):
            return _found(match)
    return None


def parse_number(text: str) -> Fraction | None:
    """Return the value of `text` if it is one number and nothing else but a trailing full stop or percent sign.

    A LaTeX command that is not layout makes it another thing: `9\\pi`, `\\sqrt2` and `\\pm 5` are no plain numbers.
    """
    text = re.sub(r"^-\s", "-", _spelled(text).strip()).rstrip(".").strip()
    while len(text) > 1 and text[0] + text[-1] in ("{}", "$$"):
        text = text[1:-1].strip()
    text = text.removesuffix("%").strip()
    match = _NUMBER.fullmatch(text)
    return _value(match) if match else None
