"""MATH (Hendrycks et al.): competition problems whose gold answer is the expression in the solution's \\boxed{}.

strict: the text after the last "The answer is:", equal to the gold by the string rule (eval/grading/notation.py), as in
the evaluators of the paper's lineage. flexible: the first form found of those in eval/grading/answers.py, equal to the
gold by the string rule or in structure and value (eval/grading/equality.py).
"""

from collections.abc import Sequence

from ba_lora.errors import UserError
from eval.grading.answers import MAX_TEXT, last_boxed
from eval.grading.equality import equal
from eval.grading.latex import flexible_expression, strict_expression
from eval.grading.notation import same_string
from eval.tasks.base import Grade, Item, Task, require_text

SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


class HendrycksMath(Task):
    name = "math"
    version = "3"
    template = "alpaca_step_by_step"
    max_new_tokens = 2048
    groups = ("subject", "level")
    columns = ("problem", "solution")
    packages = ("mpmath",)
    hub = "EleutherAI/hendrycks_math"
    hub_revision = "21a5633873b6a120296cce3e2df9d5550074f4a3"

    def hub_configs(self, hub_name: str) -> tuple[str | None, ...]:
        return SUBJECTS if hub_name == self.hub else (None,)

    def items_from_rows(self, rows: Sequence[dict], *, source: str) -> list[Item]:
        items = []
        for index, row in enumerate(rows):
            problem = require_text(row, "problem", source=source, index=index)
            solution = require_text(row, "solution", source=source, index=index)
            gold = row.get("answer") or last_boxed(solution)
            if not isinstance(gold, str) or not gold.strip():
                raise UserError(f"{source}, row {index}: no answer column and no \\boxed{{}} in the solution")
            meta = {}
            if subject := row.get("subject") or row.get("type"):
                meta["subject"] = str(subject)
            if (level := row.get("level")) is not None:
                meta["level"] = str(level).removeprefix("Level ").strip()
            items.append(Item(task_id=f"{self.name}/{index}", instruction=problem, gold=gold.strip(), meta=meta))
        return items

    def grade(self, item: Item, completion: str) -> Grade:
        text = self.answer(completion)[-MAX_TEXT:]
        strict, flexible = strict_expression(text), flexible_expression(text)
        return Grade(
            metrics={
                "strict": float(strict is not None and same_string(item.gold, strict)),
                "flexible": float(flexible is not None and equal(item.gold, flexible)),
            },
            extracted={"strict": strict, "flexible": flexible},
            invalid=flexible is None,
        )
