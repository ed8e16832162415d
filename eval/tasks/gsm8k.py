"""GSM8K: grade-school word problems whose gold answer is one number (the data ends each answer with `#### N`).

strict: the number after the last "The answer is:", the form the paper's training data teaches, and nothing else.
flexible: the first form found of those in eval/grading/answers.py. Numbers are compared as exact rationals; there is no
leniency about percent (50 % is 50, never 0.5) and no rounding.
"""

from collections.abc import Sequence

from ba_lora.errors import UserError
from eval.grading.answers import MAX_TEXT, flexible_number, strict_number
from eval.grading.numbers import parse_number
from eval.tasks.base import Grade, Item, Task, require_text


class NumberTask(Task):
    """Grading shared by the tasks whose answer is one number; `item.gold` is its text."""

    def grade(self, item: Item, completion: str) -> Grade:
        text = self.answer(completion)[-MAX_TEXT:]
        gold = parse_number(item.gold)
        strict, flexible = strict_number(text), flexible_number(text)
        return Grade(
            metrics={
                "strict": float(strict is not None and strict.value == gold),
                "flexible": float(flexible is not None and flexible.value == gold),
            },
            extracted={
                "strict": strict.text if strict else None,
                "flexible": flexible.text if flexible else None,
            },
            invalid=flexible is None,
        )


class GSM8K(NumberTask):
    name = "gsm8k"
    version = "2"
    template = "alpaca_step_by_step"
    max_new_tokens = 1024
    columns = ("question", "answer")
    hub = "openai/gsm8k"
    hub_revision = "740312add88f781978c0658806c59bc2815b9866"

    def hub_configs(self, hub_name: str) -> tuple[str | None, ...]:
        return ("main",)

    def items_from_rows(self, rows: Sequence[dict], *, source: str) -> list[Item]:
        items = []
        for index, row in enumerate(rows):
            question = require_text(row, "question", source=source, index=index)
            answer = require_text(row, "answer", source=source, index=index)
            gold = answer.rpartition("####")[2].strip() if "####" in answer else ""
            if parse_number(gold) is None:
                raise UserError(
                    f"{source}, row {index}: the answer must end with `#### NUMBER`, found {answer[-40:]!r}"
                )
            items.append(Item(task_id=f"{self.name}/{index}", instruction=question, gold=gold))
        return items
