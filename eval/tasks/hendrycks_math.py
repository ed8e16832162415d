"""MATH (Hendrycks et al.): competition problems whose gold answer is the expression in the solution's \\boxed{}.

strict: the text after the last "The answer is:", equal to the gold by the string rule (eval/latex.py), as in the
evaluators of the paper's lineage. flexible: the first form found of those in eval/answers.py, equal to the gold by the
string rule, as an exact number, or algebraically by math-verify within a time limit (eval/equality.py).
"""

from collections.abc import Callable, Sequence

from ba_lora.errors import UserError
from eval.answers import last_boxed
from eval.equality import EQUAL, FAILED, TIMEOUT, EqualityError, compare
from eval.latex import MAX_EXPRESSION, flexible_expression, same_string, strict_expression, tidy
from eval.rationals import parse_number
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
    version = "1"
    template = "alpaca_step_by_step"
    max_new_tokens = 2048
    groups = ("subject", "level")
    columns = ("problem", "solution")
    packages = ("math-verify", "latex2sympy2_extended", "sympy")
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
        """Grade one completion; starts a worker process for it when strings do not decide."""
        return self.grade_all([(item, completion)], workers=1)[0]

    def grade_all(
        self,
        pairs: Sequence[tuple[Item, str]],
        *,
        workers: int | None = None,
        timeout_s: float = 5.0,
        progress: Callable[[int], object] | None = None,
    ) -> list[Grade]:
        answers = []  # (strict text, flexible text) of each completion
        verdicts: list[float | None] = []  # of flexible; None: strings do not decide
        for item, completion in pairs:
            text = self.answer(completion)
            strict, flexible = strict_expression(text), flexible_expression(text)
            answers.append((strict, flexible))
            verdicts.append(decide_by_strings(item.gold, flexible))
        open_pairs = {
            (tidy(item.gold), tidy(flexible)): None
            for (item, _), (_, flexible), verdict in zip(pairs, answers, verdicts, strict=True)
            if verdict is None
        }
        if progress:
            progress(len(pairs) - sum(verdict is None for verdict in verdicts))
        try:
            found = compare(list(open_pairs), workers=workers, timeout_s=timeout_s)
        except EqualityError as error:
            raise UserError(f"{error} Run `pip install -r requirements.txt`") from error
        algebra = dict(zip(open_pairs, found, strict=True))
        grades = []
        for (item, _), (strict, flexible), verdict in zip(pairs, answers, verdicts, strict=True):
            outcome = None if verdict is not None else algebra[tidy(item.gold), tidy(flexible)]
            grades.append(
                Grade(
                    metrics={
                        "strict": float(strict is not None and same_string(item.gold, strict)),
                        "flexible": verdict if verdict is not None else float(outcome == EQUAL),
                    },
                    extracted={"strict": strict, "flexible": flexible},
                    invalid=flexible is None,
                    timeout=outcome in (TIMEOUT, FAILED),
                )
            )
        if progress:
            progress(sum(verdict is None for verdict in verdicts))
        return grades


def decide_by_strings(gold: str, answer: str | None) -> float | None:
    """Return 1.0 or 0.0 where strings or exact numbers settle whether `answer` is `gold`, else None."""
    if answer is None:
        return 0.0
    if same_string(gold, answer):
        return 1.0
    if len(answer) > MAX_EXPRESSION:
        return 0.0
    gold_value, value = parse_number(tidy(gold)), parse_number(tidy(answer))
    if gold_value is not None and value is not None:
        return float(gold_value == value)
    return None
