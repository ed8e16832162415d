"""Questions and answers of your own: a file with `question` and `answer`, or `answers`, a list of which any one counts.

exact_match, f1: as SQuAD grades (Rajpurkar et al., 2016, section 6.1): letters in lower case, punctuation and the
articles a, an, the left out, words compared as a bag for f1; the best of the answers. Extended to all scripts:
punctuation and symbols are those of Unicode, decimal digits of any script are 0 to 9, and what is written without
blanks (Han, kana, Thai, Lao, Khmer, Burmese) is compared sign by sign.
What is nothing but articles or signs (A, +) is compared as it stands.
numeric: where the right answer is a number, whether the same number is given (5.0 and 5); exact_match elsewhere.

What is graded is the whole completion, or what follows the last "The answer is:" where it has that.
"""

import collections
import json
import re
import unicodedata
from collections.abc import Sequence

from ba_lora.errors import UserError
from eval.grading.answers import MAX_TEXT, flexible_number, strict_tail
from eval.grading.numbers import parse_number
from eval.tasks.base import Grade, Item, Task, require_text

# scripts without blanks between words: Thai and Lao, Burmese, Khmer, kana, Han with its extensions
_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])"
)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def ascii_digits(text: str) -> str:
    """Return `text` with the decimal digits of every script as 0 to 9."""
    if text.isascii():
        return text
    return "".join(
        character if (digit := unicodedata.decimal(character, None)) is None else str(digit) for character in text
    )


def answer_words(text: str) -> list[str]:
    """Return the normalised words of an answer; see the head of this file. Only blank text has none."""
    text = ascii_digits(unicodedata.normalize("NFC", text)).lower()
    letters = "".join(character for character in text if unicodedata.category(character)[0] not in "PS")
    forms = (_UNSPACED.sub(r" \1 ", form).split() for form in (_ARTICLES.sub(" ", letters), letters, text))
    return next(filter(None, forms), [])


def token_f1(answer: Sequence[str], gold: Sequence[str]) -> float:
    """Return the harmonic mean of the shares of words that both have; 1 for two empty answers."""
    if not answer or not gold:
        return float(answer == gold)
    common = (collections.Counter(answer) & collections.Counter(gold)).total()
    return 2 * common / (len(answer) + len(gold))


class QA(Task):
    name = "qa"
    version = "2"
    max_new_tokens = 256
    metrics = ("exact_match", "f1", "numeric")
    groups = ("group",)
    columns = ("question",)

    def items_from_rows(self, rows: Sequence[dict], *, source: str) -> list[Item]:
        return [
            Item(
                task_id=f"{self.name}/{index}",
                instruction=require_text(row, "question", source=source, index=index),
                gold=_golds(row, f"{source}, row {index}"),
                meta={"group": row.get("group")},
            )
            for index, row in enumerate(rows)
        ]

    def grade(self, item: Item, completion: str) -> Grade:
        text = self.answer(completion)[-MAX_TEXT:]
        tail = strict_tail(text)
        text = text if tail is None else tail
        found, golds = answer_words(text), [answer_words(gold) for gold in item.gold]
        exact = float(found in golds)
        number = parse_number(ascii_digits(text.strip())) or getattr(flexible_number(ascii_digits(text)), "value", None)
        numbers = [parse_number(ascii_digits(gold.strip())) for gold in item.gold]
        numeric = any(
            found == words if wanted is None else number == wanted for words, wanted in zip(golds, numbers, strict=True)
        )
        return Grade(
            metrics={
                "exact_match": exact,
                "f1": max(token_f1(found, gold) for gold in golds),
                "numeric": float(numeric),
            },
            extracted={"exact_match": " ".join(found), "numeric": None if number is None else str(number)},
            invalid=not found,
        )


def _golds(row: dict, where: str) -> list[str]:
    """Return the right answers of a row: a text, a number, a list of them, or (in tables) a list as JSON."""
    given = [name for name in ("answer", "answers") if row.get(name) not in (None, "", [])]
    if len(given) != 1:
        raise UserError(f"{where}: one of answer and answers must hold the right answer, found {', '.join(row)}")
    value = row[given[0]]
    if isinstance(value, dict):  # SQuAD's own form
        value = value.get("text")
    if given == ["answers"] and isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(f"{where}: answers must be a list (as JSON in a table): {value!r:.60}") from error
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(text, str | int | float) and str(text).strip() for text in values):
        raise UserError(f"{where}: {given[0]} must be text or a list of texts, found {value!r:.60}")
    return [str(text) for text in values]
