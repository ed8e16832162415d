"""Which expression a completion gives as its answer, for MATH: the strict and the flexible extraction.

Both return the LaTeX as it stands in the text; eval/grading/notation.py and eval/grading/equality.py compare it with
the gold.
"""

import re

from eval.grading.answers import (
    MAX_LINE,
    answer_is_tails,
    answer_start,
    boxed_contents,
    final_answer_tails,
    hashes_tails,
    last_boxed,
    strict_tail,
)
from eval.grading.numbers import first_number, last_number

_MATH_SEGMENT = re.compile(
    r"\$\$(.+?)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]|\\begin\{(?:align|equation)\*?\}(.+?)\\end",
    re.DOTALL,
)
_ENVIRONMENT = re.compile(r"[^\n]*?\\begin\{(\w+)\}.*?\\end\{\1\}", re.DOTALL)
_JOINT = re.compile(r"\s*(?:,|and|or|,\s*and|,\s*or)\s*")
_SENTENCE_END = re.compile(r"\.(?=\s|$)|\n")
_STRICT_END = re.compile(r"\.\s*\n|\n\s*\n")

# A word of prose, in a sentence without math delimiters: not a command, not in braces, no function or angle.
_WORD = re.compile(
    r"(?<![\\a-zA-Z{])(?<!\\angle )(?!(?:and|or|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi|mod)\b)[a-zA-Z]{3,}+(?!\})"
)
_UPRIGHT = re.compile(r"\\(?:text|mbox|mathrm)\{[^{}]*\}")  # words of a formula: a unit, `no real solutions`
_OPERATOR_END = re.compile(
    r"(?<![\^_{])(?:[-+*/=<>×÷−–—≤≥≈]|\\(?:times|cdot|div|pm|mp|leq?|geq?|neq?|approx)(?![a-zA-Z]))\s*\Z"
)
_REMARK = re.compile(r"(?<=\w)\s\([^()]*=[^()]*\)\Z")  # `24 (n = 2)`
# A formula on lines of its own: what opens it, and what closes it.
_DISPLAY = re.compile(r"(\$\$)|(\\\[)|(```)\w*\n|\\begin\{((?:equation|align|aligned|gather|displaymath)\*?)\}")


def strict_expression(text: str) -> str | None:
    """Return what follows the last "The answer is:", up to a full stop at a line's end or a blank line; or None.

    Several lines are kept together only inside an environment (a matrix). A formula on lines of its own ($$, \\[, a
    code fence, an equation) is given without what stands around it.
    """
    tail = strict_tail(text)
    if tail is None:
        return None
    tail = answer_start(tail)[:MAX_LINE].rstrip()
    if (formula := _displayed(tail)) is not None:
        return formula or None
    answer = _STRICT_END.split(tail, maxsplit=1)[0]
    if "\\begin{" not in answer:
        answer = answer.split("\n", 1)[0]
    return answer.strip(" \t\n*").removesuffix(".").rstrip(" *") or None


def _displayed(text: str, depth: int = 0) -> str | None:
    """Return the formula that `text` begins with on lines of its own, None where it begins otherwise.

    It may stand in three such marks, as in a code fence around an `aligned` between \\[ and \\].
    """
    opener = _DISPLAY.match(text)
    if not opener:
        return None
    dollars, bracket, fence, environment = opener.groups()
    close = "$$" if dollars else "\\]" if bracket else "```" if fence else f"\\end{{{environment}}}"
    formula, found, _ = text[opener.end() :].partition(close)
    if not found:  # cut off
        formula = formula.strip().split("\n", 1)[0]
    if environment and environment.startswith(("align", "gather")):
        formula = formula.strip().removesuffix("\\\\").rpartition("\\\\")[2].replace("&", "")  # the last row
    inner = _displayed(formula.strip(), depth + 1) if depth < 2 else None
    return formula.strip().removesuffix(".").strip() if inner is None else inner


def flexible_expression(text: str) -> str | None:
    """Return the expression of the first form that holds one (order: eval/grading/answers.py), or None."""
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
    tail = answer_start(tail)[:MAX_LINE]
    if formula := _displayed(tail):
        boxes = boxed_contents(formula)
        return boxes[0].strip() if boxes else formula
    math = _MATH_SEGMENT.match(tail)
    whole = math or _ENVIRONMENT.match(tail)  # a matrix may span lines
    sentence_end = _SENTENCE_END.search(tail, whole.end() if whole else 0)
    sentence = tail[: sentence_end.start()] if sentence_end else tail
    if boxes := boxed_contents(sentence):
        return boxes[0].strip() or None
    segments = list(_MATH_SEGMENT.finditer(sentence))
    if segments and not _OPERATOR_END.search(_inside(segments[0])[-20:]):  # `$5 + $3 = $8` is no formula
        parts = [_inside(segments[0])]
        for before, segment in zip(segments, segments[1:], strict=False):
            if not _JOINT.fullmatch(sentence[before.end() : segment.start()]):
                break
            parts.append(_inside(segment))
        return ", ".join(parts).strip() or None
    return _without_words(_REMARK.sub("", sentence.strip(" \t\n*").removesuffix(".").rstrip(" *"))) or None


def _without_words(sentence: str) -> str:
    """Return the expression a sentence without math delimiters starts with: `x = 3 units, as 0 < x` -> `x = 3`.

    A sentence that starts with a word is kept whole ("Evelyn") unless it goes on to a number ("a total of 5 ways").
    """
    word = _WORD.search(_UPRIGHT.sub(lambda found: " " * len(found[0]), sentence))
    if not word:
        return sentence
    head = sentence[: word.start()].rstrip(" ,;(")
    while operator := _OPERATOR_END.search(head[-20:]):  # `18 - that is all`
        head = head[: len(head) - len(operator[0])].rstrip(" ,;(")
    if re.search(r"\d|\\[a-zA-Z]", head):
        return head
    number = first_number(sentence) if word.start() == 0 or not head else None
    return number.text if number else sentence


def _inside(segment: re.Match) -> str:
    return next(group for group in segment.groups() if group is not None).strip().removesuffix(".").rstrip(",")
