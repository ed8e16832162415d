"""Where in a completion the answer stands: the two extractions that every score reports side by side.

strict: what follows the last "The answer is:" (the paper's form, spelled so, with its colon), nothing else. The last
one counts, as in the evaluators of the paper's lineage; text after a stop string ("### Instruction") is cut before.
flexible: the first of these forms that holds an answer, each at its last place in the text:
"The answer is" in any case with or without colon, `####`, \\boxed{…}, "final answer" or "Answer:", the last number.
"""

import re
from collections.abc import Iterator

from eval.grading.numbers import Found, first_number, last_number, leading_number

STRICT_MARKER = "The answer is:"

_ANSWER_IS = re.compile(r"\banswer\s+is\b\s*:?", re.IGNORECASE)
_FINAL_ANSWER = re.compile(r"\bfinal\s+answer\b(?:\s+is\b)?\W{0,3}?:?|\banswer\b\**\s*[:=]", re.IGNORECASE)
_HASHES = re.compile(r"####")
_OPENERS = re.compile(r"(?:\s|\*|:|\$(?=[\s\\\[$])|\\\[|\\\(|```\w*|\\begin\{[a-z]+\*?\})*+")
_BOX_TOKENS = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*(?:(?P<box>\{)|(?P<bare>[^\s{}$]+))|\\.|[{}]", re.DOTALL)
_BLANKS = re.compile(r"[\s:*]*+")
_DASH = re.compile(r"\A[-•]\s+")
MAX_TEXT = 100_000  # characters of a completion that are read, the last ones;
MAX_LINE = 2000  # of them after a marker, and
MAX_PLACES = 8  # places looked at per form: runaway repetitions must not make grading slow


def strict_tail(text: str) -> str | None:
    """Return all text after the last "The answer is:", or None."""
    _, marker, tail = text.rpartition(STRICT_MARKER)
    return tail if marker else None


def tails(text: str, form: re.Pattern) -> Iterator[str]:
    """Yield the text after each of the last matches of `form`, the very last first."""
    for match in list(form.finditer(text))[: -MAX_PLACES - 1 : -1]:
        yield text[match.end() :]


def answer_is_tails(text: str) -> Iterator[str]:
    """Yield the text after each "answer is", the last first."""
    return tails(text, _ANSWER_IS)


def hashes_tails(text: str) -> Iterator[str]:
    """Yield the text after each `####`, the last first."""
    return tails(text, _HASHES)


def final_answer_tails(text: str) -> Iterator[str]:
    """Yield the text after each "final answer" or "Answer:", the last first."""
    return tails(text, _FINAL_ANSWER)


def answer_start(tail: str) -> str:
    """Return the text behind a marker without the blanks, colons and bold marks before it, nor a list's dash.

    The dash is a list's where it begins a line of its own and a blank follows: `:\n- 18` is 18, `: - 18` is -18.
    """
    rest = tail[_BLANKS.match(tail).end() :]
    return _DASH.sub("", rest) if "\n" in tail[: len(tail) - len(rest)] else rest


def first_line(text: str) -> str:
    """Return the first line with something on it, past bold marks, a code fence and opening math delimiters."""
    text = answer_start(text)
    return text[_OPENERS.match(text).end() :].split("\n", 1)[0][:MAX_LINE]


def boxed_contents(text: str) -> list[str]:
    """Return what stands in each \\boxed{…} or \\fbox{…} with balanced braces, in order; `\\boxed 5` counts as 5.

    An inner box of a box is not listed apart. An unbalanced one (a truncated text) is not listed. One pass.
    """
    spans: list[tuple[int, int]] = []
    open_braces: list[int | None] = []  # start of the content for a box, None for any other brace
    for match in _BOX_TOKENS.finditer(text):
        if match["bare"]:
            spans.append(match.span("bare"))
        elif match["box"]:
            open_braces.append(match.end())
        elif match[0] == "{":
            open_braces.append(None)
        elif match[0] == "}" and open_braces:
            start = open_braces.pop()
            if start is not None:
                while spans and spans[-1][0] >= start:  # inner boxes
                    spans.pop()
                spans.append((start, match.start()))
    return [text[start:end] for start, end in spans]


def last_boxed(text: str) -> str | None:
    """Return the content of the last balanced box, or None."""
    contents = boxed_contents(text)
    return contents[-1] if contents else None


def strict_number(text: str) -> Found | None:
    """Return the number on the first line after the last "The answer is:", or None."""
    tail = strict_tail(text)
    return None if tail is None else first_number(first_line(tail))


def flexible_number(text: str) -> Found | None:
    """Return the number of the first form that has one (order: see the module), or None."""
    for tail in answer_is_tails(text):
        if found := first_number(first_line(tail)):
            return found
    for tail in hashes_tails(text):
        # right behind, so that "#### Step 1" is no answer
        if found := leading_number(tail.split("\n", 1)[0][:MAX_LINE]):
            return found
    for content in boxed_contents(text)[: -MAX_PLACES - 1 : -1]:
        if found := first_number(content[:MAX_LINE]):
            return found
    for tail in final_answer_tails(text):
        if found := first_number(first_line(tail)):
            return found
    return last_number(text)
