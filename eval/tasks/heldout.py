"""Held-out training rows of MetaMathQA's kind, to choose learning rates on: never a benchmark's test set.

The gold answer is what stands after the response's own "The answer is:"; completions are graded as MATH's are.
Without a file: rows 100,000 to 100,499 of MetaMathQA, right behind the 100K that the paper trains on. They rephrase
questions of which other rows were trained on, so the scores are good for comparing runs and for nothing else.
"""

from collections.abc import Sequence

from eval.grading.latex import strict_expression
from eval.tasks.base import Item, require_text
from eval.tasks.hendrycks_math import HendrycksMath

FIRST_ROW, NUM_ROWS = 100_000, 500


class Heldout(HendrycksMath):
    name = "heldout"
    version = "3"
    template = "alpaca"
    max_new_tokens = 1024
    groups = ()
    columns = ("query", "response")
    hub = "meta-math/MetaMathQA"
    hub_revision = "aa4f34d3d2d3231299b5b03d9b3e5a20da45aa18"
    hub_split = "train"

    def hub_configs(self, hub_name: str) -> tuple[str | None, ...]:
        return (None,)

    def items_from_rows(self, rows: Sequence[dict], *, source: str) -> list[Item]:
        """Return one item a row whose response states an answer; the others are left out."""
        first, last = (FIRST_ROW, FIRST_ROW + NUM_ROWS) if source.partition("@")[0] == self.hub else (0, len(rows))
        items = []
        for index in range(first, min(last, len(rows))):
            query = require_text(rows[index], "query", source=source, index=index)
            gold = strict_expression(require_text(rows[index], "response", source=source, index=index))
            if gold is not None:
                items.append(Item(task_id=f"{self.name}/{index}", instruction=query, gold=gold))
        return items
