"""LaTeX answers spelled in other ways that mean the same, and with one thing changed so that they mean another.

Independent of the graders that are tested with them: plain string work on the gold's LaTeX.
"""

import re
from collections.abc import Iterator

_TEXT = re.compile(r"\\(?:text|mbox)\s*\{[^{}]*\}")
_COMMAND_OR_TEXT = re.compile(r"\\(?:text|mbox|begin|end)\s*\{[^{}]*\}|\\[a-zA-Z]+|\\.")
_UNITS = {"\\text{ degrees}", "\\mbox{ inches}^2", "\\text{ cents}", "\\mbox{ cm}^2"}


def _outside(gold: str, pattern: str) -> Iterator[re.Match]:
    """Yield the matches of `pattern` that touch no command, environment or text."""
    hidden = _COMMAND_OR_TEXT.sub(lambda match: "\0" * len(match[0]), gold)
    yield from re.finditer(pattern, hidden)


def _without_blanks(gold: str) -> str:
    gold = re.sub(r"(\\[a-zA-Z]+) +(?=[a-zA-Z])", "\\1\0", gold)
    pieces = re.split(rf"({_TEXT.pattern})", gold)
    return "".join(p if index % 2 else p.replace(" ", "") for index, p in enumerate(pieces)).replace("\0", " ")


def right(gold: str) -> dict[str, str]:
    """Return name -> a spelling of `gold` that means the same."""
    found = {
        "as it is": gold,
        "no blanks": _without_blanks(gold),
        "blanks": re.sub(r"(?<![\\a-zA-Z_^{])([-+=()\[\]]|,(?!\\!|\d{3}\b))", r" \1 ", gold),
        "dollars": f"${gold}$",
        "parentheses": f"\\( {gold} \\)",
        "display": f"\\[\n{gold}\n\\]",
        "a stop": f"{gold}.",
        "boxed": f"\\boxed{{{gold}}}",
        "bold": f"**{gold}**",
        "bold and a stop": f"**{gold}.**",
        "displaystyle": f"\\displaystyle {gold}",
        "dfrac": re.sub(r"\\[dt]?frac(?![a-z])", r"\\dfrac", gold),
        "tfrac": re.sub(r"\\[dt]?frac(?![a-z])", r"\\tfrac", gold),
    }
    bare = gold.replace("\\left", "").replace("\\right", "")
    found["no left"] = bare
    if "\\text{(" not in gold:
        found["left"] = re.sub(r"(?<!\\)([(\[])", r"\\left\1", re.sub(r"(?<!\\)([)\]])", r"\\right\1", bare))
    if (row := re.search(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}", gold)) is not None:
        found["brackets"] = f"\\begin{{bmatrix}}{row[1]}\\end{{bmatrix}}"
        found["row breaks"] = gold.replace(" \\\\ ", "\\\\")
        found["last row break"] = gold.replace("\\end", "\\\\ \\end")
    if re.fullmatch(r"-?\d+(, ?-?\d+)+", gold) and not re.search(r"\d,\d{3}\b", gold):
        items = [item.strip() for item in gold.split(",")]
        found["order"] = ", ".join(reversed(items))
        found["set"] = f"\\{{{', '.join(items[1:] + items[:1])}\\}}"
        found["words"] = " and ".join(items)
    if gold.startswith("\\{") and gold.endswith("\\}"):
        found["order"] = f"\\{{{','.join(reversed(gold[2:-2].split(',')))}\\}}"
    if "\\cup" in gold:
        found["order"] = " \\cup ".join(reversed(gold.split("\\cup")))
        found["sign"] = gold.replace("\\cup", "∪")
    if re.fullmatch(r".+ \\pm .+", gold):
        left, _, other = gold.partition("\\pm")
        found["both"] = f"{left}-{other}, {left}+{other}"
    for unit in _UNITS:
        if unit in gold:
            found["no unit"] = gold.replace(unit, "")
            found["text"] = gold.replace("mbox", "text")
            found["roman"] = gold.replace("mbox", "mathrm").replace("text", "mathrm")
    if "^\\circ" in gold:
        found["degree sign"] = gold.replace("^\\circ", "°")
        found["braced"] = gold.replace("^\\circ", "^{\\circ}")
        found["in words"] = gold.replace("^\\circ", " \\text{ degrees}")
        found["no unit"] = gold.replace("^\\circ", "")
        found["an angle"] = f"\\angle ABC = {gold}"
    if gold.startswith("\\$"):
        found["no currency"] = gold[2:]
        found["in words"] = f"{gold[2:]} \\text{{ dollars}}"
    if re.fullmatch(r"-?\d{4,}", gold):
        for name, comma in (("commas", ","), ("braced commas", "{,}"), ("thin spaces", "\\,")):
            found[name] = re.sub(r"(?<=\d)(?=(?:\d{3})+$)", lambda match, comma=comma: comma, gold)
    if fraction := re.fullmatch(r"(-?)\\[d]?frac\{(\d+)\}\{(\d+)\}", gold):
        found["slash"] = f"{fraction[1]}{fraction[2]}/{fraction[3]}"
        found["sign inside"] = f"\\frac{{{fraction[1]}{fraction[2]}}}{{{fraction[3]}}}"
        found["doubled"] = f"{fraction[1]}\\frac{{{2 * int(fraction[2])}}}{{{2 * int(fraction[3])}}}"
    if "\\pi" in gold:
        found["sign"] = gold.replace("\\pi", "π")
    if re.fullmatch(r"[a-z] = .+|[a-z]=.+", gold):
        found["no name"] = gold.partition("=")[2].strip()
    elif re.fullmatch(r"-?\d+", gold):
        found["named"] = f"x = {gold}"
        found["a length"] = f"AB = {gold}"
        found["a set of one"] = f"\\{{{gold}\\}}"
        found["absolute"] = f"|{gold}|" if gold[0] != "-" else f"-|{gold}|"
        found["a function in degrees"] = f"{gold} \\tan 45^\\circ"
    if (pair := _pair(gold)) is not None:
        found["letters"] = f"(x, y) = ({','.join(pair)})"
    if word := re.fullmatch(r"\\text\{([A-Za-z]{3,}|No|no)\}", gold):
        found["small"] = word[1].lower()
        found["capitals"] = f"\\text{{{word[1].upper()}}}"
    return found


def _pair(gold: str) -> list[str] | None:
    """Return the two parts of a pair of numbers in round brackets, None for anything else."""
    inner = re.fullmatch(r"\((.*)\)", gold.replace("\\left", "").replace("\\right", ""))
    parts = inner[1].split(",") if inner and "\\infty" not in gold and "\\cup" not in gold else []
    return [part.strip() for part in parts] if len(parts) == 2 else None


def wrong(gold: str) -> dict[str, str]:
    """Return name -> `gold` with one thing changed so that it means another."""
    found = {}

    def put(kind: str, start: int, end: int, new: str) -> None:
        found[f"{kind} at {start}"] = gold[:start] + new + gold[end:]

    for match in _outside(gold, r"\d"):
        put("digit", match.start(), match.end(), str((int(match[0]) + 1) % 10))
    for match in _outside(gold, r"[+-]"):
        put("sign", match.start(), match.end(), "-" if match[0] == "+" else "+")
    if re.match(r"[\da-zA-Z.\\]", gold) and not re.match(r"\\(?:text\{|begin|\{|left)", gold) and "," not in gold:
        if not re.search(r"[=]|\\in|\\pm|\\\$", gold) and gold != "0":
            found["minus"] = f"-{gold}" if not re.search(r"[+-]|_", gold) else f"-({gold})"
    for match in _outside(gold, r"[a-zA-Z]"):
        put("letter", match.start(), match.end(), "w" if match[0] != "w" else "u")
        put("capital", match.start(), match.end(), match[0].swapcase())
    operators = {
        "+": "\\cdot ",
        "\\pm": "+",
        "\\cup": "\\cap",
        "\\frac": "\\binom",
        "\\pi": "\\theta",
        "\\cot": "\\tan",
        "\\sqrt": "\\ln ",
        "\\in": "=",
        "=": "<",
        "\\infty": "0",
        "/": "+",
        "^\\circ": "\\%",
    }
    for operator, other in operators.items():
        for match in re.finditer(re.escape(operator) + ("(?![a-zA-Z])" if operator[-1].isalpha() else ""), gold):
            put("operator", match.start(), match.end(), other)
    brackets = re.fullmatch(r"(.*?)(\\left)?([(\[])(.*,.*)([)\]])", gold)
    if brackets and "\\cup" not in gold:
        place = brackets.start(3)
        put("bracket", place, place + 1, "[" if brackets[3] == "(" else "(")
        put("bracket", len(gold) - 1, len(gold), "]" if brackets[5] == ")" else ")")
        inner = brackets[4].replace("\\right", "").split(",")
        if inner[0].strip() != inner[-1].strip():
            found["order"] = f"({','.join(reversed(inner))})"
    if (matrix := re.search(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}", gold)) is not None:
        column = "\\begin{{pmatrix}} {} \\end{{pmatrix}}".format
        rows = [row.strip() for row in matrix[1].split("\\\\")]
        for index in range(len(rows) - 1):
            swapped = rows[:index] + [rows[index + 1], rows[index]] + rows[index + 2 :]
            found[f"rows at {index}"] = column(" \\\\ ".join(swapped))
        found["a row less"] = column(" \\\\ ".join(rows[:-1]))
        found["a line"] = column(" & ".join(rows))
    units = {"degrees": "radians", "inches": "feet", "cents": "dollars", "cm": "km", "\\$": "€", "}^2": "}^3"}
    for unit, other in units.items():
        if unit in gold and (unit != "}^2" or "\\mbox" in gold):
            found[f"unit {unit}"] = gold.replace(unit, other)
    if base := re.search(r"_\{?\d\}?$", gold):
        found["no base"] = gold[: base.start()]
    if word := re.fullmatch(r"\\text\{(\(?)([A-Za-z]+)(\)?)\}", gold):
        for index, letter in enumerate(word[2]):
            other = "q" if letter.islower() else "D" if letter != "D" else "A"
            changed = word[2][:index] + other + word[2][index + 1 :]
            found[f"letter at {index}"] = f"\\text{{{word[1]}{changed}{word[3]}}}"
        if len(word[2]) > 2:
            found["anagram"] = f"\\text{{{word[2][::-1]}}}"
    if re.fullmatch(r"-?\d+", gold) and gold != "0":
        found["a function without degrees"] = f"{gold} \\tan 45"
        found["a set of two"] = f"\\{{{gold}, {int(gold) + 1}\\}}"
    if gold[0] == "-" and re.fullmatch(r"-?\d+", gold):
        found["absolute"] = f"|{gold}|"
    elif re.fullmatch(r"[\da-z+* -]+", gold) and re.search(r"[a-z]", gold):
        found["absolute"] = f"|{gold}|"
    if gold.endswith("^\\circ"):
        found["of an angle"] = f"\\sin {gold}"
    if (pair := _pair(gold)) is not None and pair[0] != pair[1]:
        found["letters"] = f"(x, y) = ({pair[1]}, {pair[0]})"
    for addition in ("2", "\\pi", "t", "\\mathrm{i}", "\\text{ million}", "+1"):
        nothing = re.search(r"(?<![\d.])0\Z", gold) and addition in ("\\pi", "t", "\\mathrm{i}")  # 0t is 0
        if not gold.startswith("\\text") and not nothing:
            found[f"more: {addition}"] = gold + addition
    return {name: answer for name, answer in found.items() if answer != gold}
