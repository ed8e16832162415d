"""LaTeX as a list of tokens of which only layout is gone; the string rule of equality compares such lists.

Layout is: spaces, sizes (\\left, \\big, \\displaystyle, \\dfrac for \\frac), math delimiters, an enclosing \\boxed{},
bold marks, thousands separators. Every other command stays a token of its own: what a reader does not know, it cannot
skip. One scan from left to right, in time linear in the text.

`same_string` is the rule used for MATH in the paper's lineage: two answers are equal when they read the same after
layout is dropped and fractions, roots and decimals are written in one way. A unit, a degree, dollar or percent sign, or
a name in front (`x = 5`) may stand on one side only; where both sides have one, they are compared. The rule knows no
algebra: `x+1` and `1+x` differ (eval/grading/equality.py is for that).
"""

import re
import unicodedata

from eval.grading.units import NAMES, is_bare_unit, unit_of

MAX_ANSWER = 2000  # characters; what is longer is a runaway, cut before it is read

_FUNCTIONS = (
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp sqrt pi gcd lcm max min mod det".split()
)
GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau phi chi psi omega".split()
)
FUNCTION_LETTERS = ("f", "g", "h")
_AND = "\\wedge"  # a comma, except between inequalities
_WORDS = {
    **{name: f"\\{name}" for name in (*_FUNCTIONS, *GREEK)},
    "infinity": "\\infty",
    "inf": "\\infty",
    "oo": "\\infty",
    "and": _AND,
    "or": ",",
}
_LAYOUT = set(
    "left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr displaystyle textstyle "
    "scriptstyle limits nolimits quad qquad thinspace hline strut mathstrut".split()
)
_ALIASES = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), "\\frac"),
    **dict.fromkeys(("dbinom", "tbinom"), "\\binom"),
    **dict.fromkeys(("leq", "leqslant"), "\\le"),
    **dict.fromkeys(("geq", "geqslant"), "\\ge"),
    **dict.fromkeys(("lvert", "rvert", "vert", "mid"), "|"),
    "neq": "\\ne",
    "lt": "<",
    "gt": ">",
    "lbrace": "\\{",
    "rbrace": "\\}",
    "lbrack": "[",
    "rbrack": "]",
    "ast": "*",
    "colon": ":",
    "degree": "^\\circ",
    "varnothing": "\\emptyset",
    "imath": "i",
    "textdegree": "^\\circ",
}
_UNICODE = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2012\u2013\ufe63\uff0d", "-"),
        **dict.fromkeys("\u2009\u202f\u00a0", " "),
        "×": "\\times ",
        "·": "\\cdot ",
        "⋅": "\\cdot ",
        "÷": "\\div ",
        "≤": "\\le ",
        "≥": "\\ge ",
        "≠": "\\ne ",
        "∞": "\\infty ",
        "∪": "\\cup ",
        "∩": "\\cap ",
        "∈": "\\in ",
        "∅": "\\emptyset ",
        "±": "\\pm ",
        "∓": "\\mp ",
        "°": "^{\\circ}",
        "√": "\\sqrt ",
        "π": "\\pi ",
        **{
            unicodedata.lookup(f"GREEK SMALL LETTER {name.upper().replace('LAMBDA', 'LAMDA')}"): f"\\{name} "
            for name in GREEK
        },
        **{superscript: f"^{{{digit}}}" for superscript, digit in zip("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789", strict=True)},
    }
)
_OTHERS = {
    "**": "^",
    "%": "\\%",
    "<=": "\\le",
    ">=": "\\ge",
    **{sign: f"\\text{{{sign}}}" for sign in "¢€£¥₹"},
}
_GAP = r"(?:\{,\}|,\s?\\!\s?|\\[,!])"
_TOKEN = re.compile(
    rf"""
    (?P<environment>\\(?:begin|end)\s?\{{[a-zA-Z]+\*?\}}(?:\s?\{{[clr|\s]*\}})?)
  | (?P<text>\\(?:text|textrm|textnormal|textbf|textit|mbox|mathrm|mathbf|mathit|rm|operatorname\*?)\s?\{{[^{{}}]*\}})
  | (?P<command>\\[a-zA-Z]+)
  | (?P<row>\\\\(?:\[\d[^\]\s]*\])?)
  | (?P<spacing>\\[,;:!\s>]|~|\s)
  | (?P<delimiter>\\[()\[\]])
  | (?P<symbol>\\.)
  | (?P<number>(?:[1-9]\d{{0,2}}(?:{_GAP}\d{{3}}){{1,60}}(?!\d)|\d++)(?:\.\d*+)?|\.\d++)
  | (?P<word>[a-zA-Z]++)
  | (?P<other>\*\*|<=|>=|[\s\S])
    """,
    re.VERBOSE,
)
_GROUPED = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3}){1,60}(?![\d,])")
_SPACED = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?: \d{3}){1,60}(?![\d ,])")
_OPEN, _CLOSE = ("(", "[", "\\{"), (")", "]", "\\}")


def tokens(answer: str) -> list[str]:
    """Return `answer` without its layout, as tokens in one spelling each. Any text has some."""
    return _tidied(_scan(answer))


def _scan(answer: str) -> list[str]:
    answer = answer[:MAX_ANSWER]
    if not answer.isascii():
        answer = "".join(_vulgar_fraction(character) for character in answer).translate(_UNICODE)
    answer = _unwrapped(re.sub(r"\s+", " ", answer).strip())
    depth, place, found, apart = 0, 0, [], False
    dollars = len(re.findall(r"(?<!\\)\$", answer)) == 1 and re.search(r"(?<!\\)\$\s?[-+]?[.\d]", answer)
    while place < len(answer):
        for grouping in (_GROUPED, _SPACED) if depth == 0 and answer[place].isdigit() else ():
            if match := grouping.match(answer, place):
                found.append(re.sub("[, ]", "", match[0]))
                break
        else:
            match = _TOKEN.match(answer, place)
            if match.lastgroup == "word":
                found += _word(match[0], behind=_takes_unit(found, apart), rest=answer[match.end() : match.end() + 20])
            else:
                found += _spelled(match.lastgroup, match[0], bool(dollars))
        place, apart = match.end(), match.lastgroup == "spacing"
        depth += sum((token in _OPEN) - (token in _CLOSE) for token in found[-1:]) if match[0] != " " else 0
    return found


def _spelled(kind: str, token: str, dollars: bool) -> list[str]:
    """Return the tokens that a piece of the text stands for: none for layout."""
    if kind in ("spacing", "delimiter"):
        return []
    if kind == "environment":
        return [token.split("}", 1)[0].replace(" ", "") + "}"]
    if kind == "row":
        return ["\\\\"]
    if kind == "number":
        whole, point, decimals = re.sub(_GAP, "", token).partition(".")
        return [(whole or "0") + point + decimals]
    if kind == "command":
        name = token[1:]
        if name in _ALIASES:
            return ["^", "\\circ"] if _ALIASES[name] == "^\\circ" else [_ALIASES[name]]
        return [] if name in _LAYOUT else [token]
    if kind == "text":
        return _text(token)
    if token == "$":
        return ["\\$"] if dollars else []
    return [_OTHERS.get(token, token)]


def _takes_unit(found: list[str], apart: bool) -> bool:
    """Return whether a short unit may follow: `5 cm`, `5 square cm`, `60 km/hr`; `5cm` may be 5·c·m."""
    if apart:
        return bool(found) and (found[-1][0].isdigit() or found[-1].startswith("\\text{"))
    return found[-1:] == ["/"] and found[-2:-1] != [] and found[-2].startswith("\\text{")


def _text(token: str) -> list[str]:
    command, _, content = token[:-1].partition("{")
    content = re.sub(r"[\s~]+", " ", re.sub(r"\\|\.(?!\d)", "", content)).strip()
    if content.lstrip(", ") in ("and", "or"):
        return [_AND if content.endswith("and") else ","]
    if not content:
        return []
    if content in _FUNCTIONS:
        return [f"\\{content}"]
    if content == "°":
        return ["^", "\\circ"]
    if len(content) == 1 and command.strip() not in ("\\text", "\\mbox") and content not in NAMES:
        return [content]
    return [f"\\text{{{content}}}"]


def _word(word: str, *, behind: bool, rest: str) -> list[str]:
    if word in _WORDS:
        return [_WORDS[word]]
    if len(word) > 3 or is_bare_unit(word, behind=behind, rest=rest):
        return [f"\\text{{{word}}}"]
    return list(word)


def _vulgar_fraction(character: str) -> str:
    if unicodedata.decomposition(character).startswith("<fraction>"):
        top, _, bottom = unicodedata.normalize("NFKC", character).partition("\u2044")
        return f"\\frac{{{top}}}{{{bottom}}}"
    return "/" if character == "\u2044" else character


def _unwrapped(answer: str) -> str:
    """Return `answer` without trailing punctuation and bold marks around it."""
    while True:
        stripped = answer.rstrip(".,;: ")
        if len(stripped) > 4 and stripped.startswith("**") and stripped.endswith("**"):
            stripped = stripped[2:-2].strip()
        if stripped.endswith("\\"):  # the rest of a control space
            stripped += " "
        if stripped == answer:
            return answer
        answer = stripped


def _tidied(found: list[str]) -> list[str]:
    """Return the tokens without boxes, trailing stops and zeros, and doubled commas (`1, 2, and 3`)."""
    result: list[str] = []
    if not any(token in ("<", ">", "\\le", "\\ge") for token in found):
        found = ["," if token == _AND else token for token in found]
    for place, token in enumerate(found):
        if "." in token and token[0].isdigit() and found[place + 1 : place + 2] != ["\\overline"]:
            token = token.rstrip("0").rstrip(".")
        if token not in ("\\boxed", "\\fbox") and (token != "," or result[-1:] != [","]):
            result.append(token)
        if result[-3:] in (["a", ".", "m"], ["p", ".", "m"]):
            result[-3:] = [f"\\text{{{result[-3]}m}}"]
    while result and result[-1] in (".", ",", "\\\\"):
        result.pop()
    result = _braced(result)
    while len(result) > 1 and result[0] == "{" and closing(result, 0) == len(result) - 1:
        result = result[1:-1]
    return result


def closing(found: list[str], place: int) -> int | None:
    """Return where the bracket, brace or environment that opens at `place` closes, None where it never does."""
    depth = 0
    for index in range(place, len(found)):
        depth += opens(found[index])
        if depth == 0:
            return index
    return None


def opens(token: str) -> int:
    """Return 1 for a token that opens a bracket, brace or environment, -1 for one that closes it, else 0."""
    if token in ("(", "[", "{", "\\{", "\\lfloor", "\\lceil") or token.startswith("\\begin{"):
        return 1
    return -(token in (")", "]", "}", "\\}", "\\rfloor", "\\rceil") or token.startswith("\\end{"))


_NUM_ARGUMENTS = {"\\frac": 2, "\\binom": 2, "^": 1, "_": 1} | dict.fromkeys(
    "\\sqrt \\pmod \\overline \\overrightarrow \\vec \\bar \\hat".split(), 1
)
_MAX_DEPTH = 40


def _braced(found: list[str], depth: int = 0) -> list[str]:
    """Return the tokens with braces around each argument: `\\frac12` is `\\frac{1}{2}`, `x^2` is `x^{2}`.

    Several digits without braces as an exponent, an index or under a root (`x^12`, `\\sqrt12`) are taken as they are
    meant, whole.
    """
    found, result, place = list(found), [], 0
    while place < len(found):
        result.append(found[place])
        place = _take_arguments(found, place, result, depth)
    return result


def _take_arguments(found: list[str], place: int, result: list[str], depth: int) -> int:
    """Append the arguments of the command at `place` to `result`; return the place behind them."""
    command = found[place]
    place += 1
    if command == "\\sqrt" and found[place : place + 1] == ["["] and (end := closing(found, place)):
        result += found[place : end + 1]
        place = end + 1
    for _ in range(_NUM_ARGUMENTS.get(command, 0)):
        if place >= len(found) or opens(found[place]) < 0 or depth > _MAX_DEPTH:
            break
        first, end = found[place], closing(found, place)
        if first == "{" or (first == "(" and command in ("\\sqrt", "^")):
            if end is None:
                break
            result += ["{", *_braced(found[place + 1 : end], depth + 1), "}"]
            place = end + 1
            continue
        if len(first) > 1 and first[0].isdigit() and command in ("\\frac", "\\binom"):
            found[place : place + 1] = [first[0], first[1:]]
        result += ["{", found[place]]
        if found[place] == "-" and command == "^" and place + 1 < len(found):
            place += 1
            result.append(found[place])
        depth += 1
        place = _take_arguments(found, place, result, depth)
        result.append("}")
    return place


def split_unit(found: list[str]) -> tuple[list[str], str | None]:
    """Return the tokens without the currency before or the unit behind them, and that unit's one spelling or None.

    Degrees behind \\sin and the like belong to the angle: they stay.
    """
    found, unit = list(found), None
    sign = found[:1] if found[:1] == ["-"] else []
    if len(found) > len(sign) + 1 and (unit := _currency(found[len(sign)])):
        return sign + found[len(sign) + 1 :], unit
    end, power, scale = len(found), 1, ""
    if found[-1:] in (["C"], ["F"], ["\\text{C}"], ["\\text{F}"]) and found[-5:-1] == _DEGREE:
        end, scale = end - 1, found[-1].removeprefix("\\text{")[0]
    if found[end - 4 : end] == _DEGREE and end > 4:
        return (found, None) if _has_angle(found) else (found[: end - 4], "degree" + scale)
    if end > 1 and found[end - 1] in ("\\%", "\\$"):
        return found[: end - 1], "percent" if found[end - 1] == "\\%" else "dollar"
    if found[end - 4 : end - 2] == ["^", "{"] and found[end - 2] in ("2", "3") and end > 5:
        end, power = end - 4, int(found[end - 2])
    start = end
    while start > 1 and (found[start - 1].startswith("\\text{") or (found[start - 1] == "/" and start < end)):
        start -= 1
    words = " ".join(token.removeprefix("\\text{").removesuffix("}") for token in found[start:end])
    unit = unit_of(words, power) if start < end else None
    if unit == "degree" and _has_angle(found):
        return found[:start] + _DEGREE, None
    return (found[:start], unit) if unit else (found, None)


_DEGREE = ["^", "{", "\\circ", "}"]
_OF_ANGLES = {f"\\{name}" for name in ("sin", "cos", "tan", "cot", "sec", "csc")}


def _has_angle(found: list[str]) -> bool:
    return not _OF_ANGLES.isdisjoint(found)


def _currency(token: str) -> str | None:
    unit = unit_of(token.removeprefix("\\text{").removesuffix("}").removeprefix("\\"))
    return unit if unit in ("dollar", "euro", "pound", "yen", "rupee", "cent") else None


def split_name(found: list[str]) -> tuple[list[str], list[str] | None]:
    """Return the right-hand side and the rest of `x = …` or `x \\in …`.

    The name x is a letter; before an equals sign it may also be `f(x)`, `f(2)`, `(x, y)`, `AB` or `\\angle ABC`.
    """
    for place in (1, 5):  # `x_{1}` has five tokens
        if found[place : place + 1] in (["="], ["\\in"]) and is_symbol(found[:place]):
            return found[place + 1 :], found[: place + 1]
    if found[4:5] == ["="] and (found[1], found[3]) == ("(", ")") and is_symbol(found[:1]):
        if is_symbol(found[2:3]) or (found[0] in FUNCTION_LETTERS and found[2].isdigit()):  # f(2) = 5
            return found[5:], found[:5]
    end = found.index("=") if "=" in found else 0
    name = found[:end]
    if name[:1] == ["("] and name[-1] == ")":
        letters = " ".join(name[1:-1]).split(" , ")
        named = len(letters) > 1 and all(is_symbol(letter.split(" ")) for letter in letters)
    elif "\\angle" in name[:2]:
        named = bool(re.fullmatch(r"(m )?\\angle [a-zA-Z]( [A-Z]){0,2}", " ".join(name)))
    else:
        named = bool(re.fullmatch(r"[A-Z] [A-Z]( [A-Z])?", " ".join(name)))
    return (found[end + 1 :], found[: end + 1]) if named else (found, None)


def is_symbol(found: list[str]) -> bool:
    """Return whether the tokens are one letter or Greek letter, with an index or not."""
    if not found or not re.fullmatch(rf"[a-zA-Z]|\\(?:{'|'.join(GREEK)})", found[0]):
        return False
    return len(found) == 1 or (len(found) == 5 and found[1:3] == ["_", "{"] and found[4] == "}")


def same_string(gold: str, answer: str) -> bool:
    """Return whether the two read the same by the string rule (see the module)."""
    return same_tokens(tokens(gold), tokens(answer))


def same_tokens(gold: list[str], answer: list[str]) -> bool:
    """`same_string` for answers that are tokens already."""
    (gold, gold_unit), (answer, unit) = split_unit(gold), split_unit(answer)
    if gold_unit and unit and gold_unit != unit:
        return False
    (gold_side, gold_name), (side, name) = split_name(gold), split_name(answer)
    if (gold_name is None) != (name is None) and "=" not in gold_side and "=" not in side:
        gold, answer = gold_side, side
    return _written(gold) == _written(answer) != ""


def _written(found: list[str]) -> str:
    """Return tokens as one string, in which a lone word, an option (C), a quotient and 0.5 have one spelling each."""
    text = " ".join(found)
    if len(found) == 1 and text.startswith("\\text{"):
        text = " ".join(tokens(text[6:-1]))
        if text.startswith("\\text{"):
            text = text[6:-1]
    if ratio := re.fullmatch(r"(- )?(\d+) / (\d+)", text):
        text = f"{ratio[1] or ''}\\frac {{ {ratio[2]} }} {{ {ratio[3]} }}"
    if option := re.fullmatch(r"\( ([A-Z]) \)", text):
        return option[1]
    return "\\frac { 1 } { 2 }" if text == "0.5" else text
