"""The embedded default's test: self-made arithmetic word problems in MetaMath's form, graded as GSM8K is.

The scores are also given per problem family, since the point of the set is which families a model has inherited.
"""

from collections.abc import Sequence

from ba_lora.errors import UserError
from ba_lora.paths import PROJECT_ROOT
from eval.grading.numbers import parse_number
from eval.tasks.base import Item, require_text
from eval.tasks.gsm8k import NumberTask


class Toy(NumberTask):
    name = "toy"
    version = "2"
    template = "alpaca"
    max_new_tokens = 128
    groups = ("family",)
    columns = ("query", "response", "family", "answer")

    def default_data(self) -> str:
        return str(PROJECT_ROOT / "data" / "toy" / "test.jsonl")

    def items_from_rows(self, rows: Sequence[dict], *, source: str) -> list[Item]:
        items = []
        for index, row in enumerate(rows):
            query = require_text(row, "query", source=source, index=index)
            gold = str(row["answer"]).strip()  # a JSON number or its text
            if isinstance(row["answer"], bool) or parse_number(gold) is None:
                raise UserError(f"{source}, row {index}: column answer must be a number, found {row['answer']!r:.60}")
            meta = {"family": str(row["family"])}
            items.append(Item(task_id=f"{self.name}/{index}", instruction=query, gold=gold, meta=meta))
        return items
