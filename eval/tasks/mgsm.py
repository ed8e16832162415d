"""MGSM: 250 problems of GSM8K's test set in ten further languages, and in English (Shi et al., 2022).

Data: the published files mgsm_<language>.tsv (github.com/google-research/url-nlp: question and number, no header), or
any file or hub set with the columns question and answer (or answer_number). Graded as GSM8K is, with what languages
differ in: flexible also knows the words with which the published worked examples introduce their answer; digits of any
script are read; in languages with a decimal comma 1.000 is a thousand and 0,5 a half. There 1,000 could be both, and is
a thousand; 0,125, 1.000,125 and 3,1416 could not.
"""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from ba_lora.errors import UserError
from ba_lora.io import open_text, reading_errors, sha256_file
from ba_lora.paths import data_suffix
from ba_lora.rows import Source, portable_name
from eval.grading.numbers import parse_number
from eval.tasks.base import Grade, Item, require_text
from eval.tasks.gsm8k import NumberTask
from eval.tasks.qa import ascii_digits

DECIMAL_COMMA = ("de", "es", "fr", "ru")
# How the answer is introduced in the published worked examples, and close forms of it.
MARKERS = {
    "bn": r"উত্তর\s*(?:হল|হলো)?",
    "de": r"(?:die\s+)?antwort(?:\s+(?:ist|lautet))?",
    "en": r"the\s+answer\s+is",
    "es": r"(?:la\s+)?respuesta(?:\s+(?:final\s+)?es)?",
    "fr": r"(?:la\s+)?réponse(?:\s+(?:finale\s+)?est)?",
    "ja": r"答えは",
    "ru": r"ответ(?:\s*[—–-])?",
    "sw": r"jibu(?:\s+(?:ni|la\s+mwisho\s+ni))?",
    "te": r"సమాధానం",
    "th": r"คำตอบ(?:คือ)?",
    "zh": r"答案(?:是|为)?",
}


class MGSM(NumberTask):
    """One language; subclasses name it."""

    language: str
    version = "2"
    template = "alpaca_step_by_step"
    max_new_tokens = 1024
    columns = ("question",)

    def hub_configs(self, hub_name: str) -> tuple[str | None, ...]:
        return (self.language,)

    def load(self, data: str | None = None) -> tuple[list[Item], Source]:
        path = Path(data) if data is not None else None
        if path is None or data_suffix(path) != ".tsv" or not path.exists():
            return super().load(data)
        with open_text(path, encoding="utf-8-sig", newline="") as file, reading_errors(path):
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        if rows and "question" in rows[0]:
            return super().load(data)
        if not rows or any(len(row) != 2 for row in rows):
            raise UserError(f"{path}: each line needs a question and a number, with a tab between them")
        named = [{"question": question, "answer": answer} for question, answer in rows]
        source = Source(portable_name(path), sha256=sha256_file(path))
        return self.items_from_rows(named, source=source.name), source

    def items_from_rows(self, rows: Sequence[dict], *, source: str) -> list[Item]:
        items = []
        for index, row in enumerate(rows):
            question = require_text(row, "question", source=source, index=index)
            answer = row.get("answer_number", row.get("answer"))
            gold = self._plain(str(answer).rpartition("####")[2].strip())
            if answer is None or parse_number(gold) is None:
                raise UserError(f"{source}, row {index}: the answer must be a number, found {answer!r:.40}")
            items.append(Item(task_id=f"{self.name}/{index}", instruction=question, gold=gold))
        return items

    def grade(self, item: Item, completion: str) -> Grade:
        text = self._plain(completion)
        grade = super().grade(item, text)
        marked = re.compile(rf"(?<!\w){MARKERS[self.language]}(?!\w)\s*[:：]?", re.IGNORECASE)
        if self.language not in ("en", "zh", "ja", "th") and marked.search(text):
            translated = super().grade(item, marked.sub(" The answer is: ", text))
        elif self.language in ("zh", "ja", "th"):  # no blanks between words
            loose = re.compile(rf"{MARKERS[self.language]}\s*[:：]?")
            translated = super().grade(item, loose.sub(" The answer is: ", text)) if loose.search(text) else grade
        else:
            translated = grade
        return Grade(
            metrics={"strict": grade.metrics["strict"], "flexible": translated.metrics["flexible"]},
            extracted={"strict": grade.extracted["strict"], "flexible": translated.extracted["flexible"]},
            invalid=translated.invalid,
        )

    def _plain(self, text: str) -> str:
        """Return a text with ASCII digits and English separators."""
        text = ascii_digits(text).replace("，", ",").replace("。", ". ")
        if self.language in DECIMAL_COMMA:
            text = re.sub(
                r"(?<![\d.,])([1-9]\d{0,2}(?:[.\u00a0\u202f]\d{3})+)(?!\d)(,(?=\d))?",
                lambda m: re.sub(r"\D", "", m[1]) + ("." if m[2] else ""),
                text,
            )
            text = re.sub(r"(?<![\d.,])0,(?=\d)", "0.", text)
            text = re.sub(r"(?<=\d),(?=(?:\d{1,2}|\d{4,})(?!\d))", ".", text)
        return text


class Bengali(MGSM):
    name, language = "mgsm_bn", "bn"


class German(MGSM):
    name, language = "mgsm_de", "de"


class English(MGSM):
    name, language = "mgsm_en", "en"


class Spanish(MGSM):
    name, language = "mgsm_es", "es"


class French(MGSM):
    name, language = "mgsm_fr", "fr"


class Japanese(MGSM):
    name, language = "mgsm_ja", "ja"


class Russian(MGSM):
    name, language = "mgsm_ru", "ru"


class Swahili(MGSM):
    name, language = "mgsm_sw", "sw"


class Telugu(MGSM):
    name, language = "mgsm_te", "te"


class Thai(MGSM):
    name, language = "mgsm_th", "th"


class Chinese(MGSM):
    name, language = "mgsm_zh", "zh"
