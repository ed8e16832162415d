"""LaTeX answers as strings: extraction of an expression from a completion, and the string rule of equality.

`same_string` is the rule used for MATH in the paper's lineage: two answers are equal when they read the same after
spacing, sizing commands, units, degree, dollar and percent signs are dropped and fractions, roots and decimals are
written in one way. It knows no algebra: `x+1` and `1+x` differ (eval/equality.py is for that).
Additions to that rule, all of notation only: math delimiters and an enclosing \\boxed{} are dropped, thousands commas
are dropped from a whole number, `_{8}` is `_8`, a whole `\\text{…}` is its content, `(C)` alone is `C`.
"""

import re

from eval.answers import (
    MAX_LINE,
    answer_is_tails,
    boxed_contents,
    final_answer_tails,
    hashes_tails,
    last_boxed,
    strict_tail,
)
from eval.rationals import first_number, last_number

MAX_EXPRESSION = 400  # characters; a longer "answer" is a runaway and compared as a string only

_DELIMITED = [
    re.compile(pattern, re.DOTALL)
    for pattern in (r"\$\$(.*)\$\$", r"\$(.*)\$", r"\\\((.*)\\\)", r"\\\[(.*)\\\]", r"\*\*(.*)\*\*")
]
_MATH_SEGMENT = re.compile(
    r"\$\$(.+?)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]|\\begin\{(?:align|equation)\*?\}(.+?)\\end",
    re.DOTALL,
)
_ENVIRONMENT = re.compile(r"[^\n]*?\\begin\{(\w+)\}.*?\\end\{\1\}", re.DOTALL)
_JOINT = re.compile(r"\s*(?:,|and|or|,\s*and|,\s*or)\s*")
_SENTENCE_END = re.compile(r"\.(?=\s|$)|\n")
_STRICT_END = re.compile(r"\.\s*\n|\n\s*\n")

# A word of prose, in a sentence without math delimiters: not a command, not in braces (\\text{…}), no function name.
_WORD = re.compile(
    r"(?<![\\a-zA-Z{])(?!(?:and|or|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi|mod)\b)[a-zA-Z]{3,}(?![a-zA-Z]*\})"
)

_TIDY = [
    (re.compile(r"[\u2212\u2013\uff0d]"), "-"),
    (re.compile("π"), r"\\pi "),
    (re.compile("∞"), r"\\infty "),
    (re.compile("∪"), r"\\cup "),
    (re.compile(r"√\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*(\w)"), r"\\sqrt{\1}"),
    (re.compile(r"\\[!,;:]|\\ |~|\\q?quad(?![a-zA-Z])"), " "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![a-zA-Z])"), ""),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\leq(?![a-zA-Z])"), r"\\le"),
    (re.compile(r"\\geq(?![a-zA-Z])"), r"\\ge"),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z])|°"), ""),
    (re.compile(r"\\?\$|\\?%"), ""),
]
_UNIT = re.compile(
    r"(?<=\S)\s*\\(?:text|textrm|mbox|mathrm|textbf)\s*\{[^{}]*[a-zA-Z][^{}]*\}(?:\s*\^\s*\{?\d\}?)?\s*$"
)
_WHOLE_TEXT = re.compile(r"\\(?:text|textrm|textbf|textit|mbox|mathrm|mathbf)\s*\{([^{}]*)\}")
_ARGUMENT = r"(\{(?:[^{}]|\{[^{}]*\})*\}|\\[a-zA-Z]+|[^\s{}\\])"


def strict_expression(text: str) -> str | None:
    """Return what follows the last "The answer is:", up to a full stop at a line's end or a blank line; or None.

    Several lines are kept together only inside an environment (a matrix).
    """
    tail = strict_tail(text)
    if tail is None:
        return None
    answer = _STRICT_END.split(tail.strip(), maxsplit=1)[0]
    if "\\begin{" not in answer:
        answer = answer.split("\n", 1)[0]
    return answer.strip().removesuffix(".").strip() or None


def flexible_expression(text: str) -> str | None:
    """Return the expression of the first form that holds one (order: eval/answers.py), or None."""
    box = last_boxed(text)
    for tail in answer_is_tails(text):
        answer = _stated(tail)
        if answer and (re.search(r"[\d\\]", answer) or not box):  # "our answer is correct" does not beat a box
            return answer
    for tail in hashes_tails(text):
        if re.search(r"[\d\\$]", line := tail.split("\n", 1)[0].strip()):
            return line[:MAX_LINE].removesuffix(".")
    if box and box.strip():
        return box.strip()
    for tail in final_answer_tails(text):
        if answer := _stated(tail):
            return answer
    number = last_number(text)
    return number.text if number else None


def _stated(tail: str) -> str | None:
    """Return the expression that a sentence goes on to state: its box, its math, or the bare words."""
    tail = tail.lstrip(" \t\n:*")[:MAX_LINE]
    math = _MATH_SEGMENT.match(tail)
    whole = math or _ENVIRONMENT.match(tail)  # a matrix may span lines
    sentence_end = _SENTENCE_END.search(tail, whole.end() if whole else 0)
    sentence = tail[: sentence_end.start()] if sentence_end else tail
    if boxes := boxed_contents(sentence):
        return boxes[0].strip() or None
    segments = list(_MATH_SEGMENT.finditer(sentence))
    if segments:
        parts = [_inside(segments[0])]
        for before, segment in zip(segments, segments[1:], strict=False):
            if not _JOINT.fullmatch(sentence[before.end() : segment.start()]):
                break
            parts.append(_inside(segment))
        return ", ".join(parts).strip() or None
    return _without_words(sentence.strip(" \t\n*").removesuffix(".").strip()) or None


def _without_words(sentence: str) -> str:
    """Return the expression a sentence without math delimiters starts with: `x = 3 units, as 0 < x` -> `x = 3`.

    A sentence that starts with a word is kept whole ("Evelyn") unless it goes on to a number ("a total of 5 ways").
    """
    word = _WORD.search(sentence)
    if not word:
        return sentence
    head = sentence[: word.start()].rstrip(" ,;(")
    if re.search(r"\d|\\[a-zA-Z]", head):
        return head
    number = first_number(sentence) if word.start() == 0 or not head else None
    return number.text if number else sentence


def _inside(segment: re.Match) -> str:
    return next(group for group in segment.groups() if group is not None).strip().removesuffix(".").rstrip(",")


def tidy(answer: str) -> str:
    """Return `answer` without delimiters, sizing, units, degree, dollar and percent signs; still proper LaTeX."""
    answer = answer.strip()
    while True:
        stripped = answer.rstrip(".,; \t\n")
        for pattern in _DELIMITED:
            if (match := pattern.fullmatch(stripped)) and "$" not in match[1].replace("\\$", ""):
                stripped = match[1].strip()
        if stripped.startswith("\\boxed") and len(boxes := boxed_contents(stripped)) == 1:
            if stripped in (f"\\boxed{{{boxes[0]}}}", f"\\boxed {boxes[0]}"):
                stripped = boxes[0].strip()
        if stripped == answer:
            break
        answer = stripped
    for pattern, replacement in _TIDY:
        answer = pattern.sub(replacement, answer)
    answer = re.sub(r"(?<=\d)\s*,\s*(?=\d{3}(?!\d))", ",", answer) if _is_grouped(answer) else answer
    if whole := _WHOLE_TEXT.fullmatch(answer.strip()):
        answer = whole[1]
    else:
        answer = _UNIT.sub("", answer)
        answer = re.sub(r"(?<=[\d}])\s+(?:degrees?|cents?|dollars?|inch(?:es)?|feet|square units?|units?)$", "", answer)
    return re.sub(r"\s+", " ", answer).strip()


def _is_grouped(answer: str) -> bool:
    return bool(re.fullmatch(r"\s*-?\s*[1-9]\d{0,2}(?:\s*,\s*\d{3})+(?:\.\d+)?(?:\D.*)?\s*", answer, re.DOTALL))


def normalize(answer: str) -> str:
    """Return the one spelling by which the string rule compares answers."""
    answer = tidy(answer)
    answer = re.sub(rf"\\sqrt\s*(?!\[){_ARGUMENT}", lambda match: f"\\sqrt{_braced(match[1])}", answer)
    answer = re.sub(
        rf"\\frac\s*{_ARGUMENT}\s*{_ARGUMENT}",
        lambda match: f"\\frac{_braced(match[1])}{_braced(match[2])}",
        answer,
    )
    answer = re.sub(r"\s+", "", answer)
    answer = re.sub(r"^[a-zA-Z]\w?=(?=[^=]+$)", "", answer)
    answer = re.sub(r"(?<!\d)\.(?=\d)", "0.", answer)
    answer = re.sub(r"([_^])\{(\w)\}", r"\1\2", answer)
    if re.fullmatch(r"-?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?", answer):
        answer = answer.replace(",", "")
    if answer == "0.5":
        answer = "\\frac{1}{2}"
    if ratio := re.fullmatch(r"(-?)(\d+)/(\d+)", answer):
        answer = f"{ratio[1]}\\frac{{{ratio[2]}}}{{{ratio[3]}}}"
    if option := re.fullmatch(r"\(([A-Z])\)", answer):
        answer = option[1]
    return answer.rstrip(".")


def _braced(argument: str) -> str:
    return argument if argument.startswith("{") else f"{{{argument}}}"


def same_string(gold: str, answer: str) -> bool:
    """Return whether the two read the same after `normalize`."""
    return normalize(gold) == normalize(answer)
