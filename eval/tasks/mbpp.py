"""MBPP (Austin et al. 2021): functions described in a sentence, each with three asserts; scored on ids 11 to 510.

Data: the hub's set (`google-research-datasets/mbpp`, with ":sanitized" at the end for the hand-checked questions) or a
local file, e.g. the published mbpp.jsonl; the sanitized set is recognised by its columns (prompt instead of text,
test_imports). Task ids are MBPP's own: "mbpp/17" is the row whose task_id is 17. A file that holds more than the test
ids is scored on those only; completions that go beyond them (generated with subset=all) are held against all of it.

Not in the official code; ours: the Alpaca frame around the task's text and its asserts, greedy. strict: the completion
as it stands. setup=true (the default) runs test_setup_code between program and tests, since it uses the program's
classes; challenge=true adds the challenge tests, where a row has them.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from ba_lora.errors import UserError
from ba_lora.rows import Source, load_rows
from eval.grading.code_extraction import extract_program
from eval.tasks.base import Item, require_columns, require_text
from eval.tasks.code import CodeTask, defined_names, loaded_names

TEST_IDS = range(11, 511)
SANITIZED = ":sanitized"
REQUEST = "{text}\nYour code should satisfy these tests:\n{tests}"


class MBPP(CodeTask):
    name = "mbpp"
    version = "3"  # 2: threads or processes left running are no pass; 3: thinking is cut off, post-processing 3
    template = "alpaca"
    max_new_tokens = 1024
    columns = ("task_id", "code", "test_list")
    choices = {"subset": ("test", "all")}
    grading_choices = {**CodeTask.grading_choices, "setup": ("true", "false"), "challenge": ("false", "true")}
    hub = "google-research-datasets/mbpp"
    hub_revision = "4bb6404fdc6cacfda99d4ac4205087b89d32030c"

    def load(self, data: str | None = None) -> tuple[list[Item], Source]:
        data = str(data) if data is not None else self.default_data()
        name = data.removesuffix(SANITIZED)
        config = "sanitized" if name != data else "full" if name.partition("@")[0] == self.hub else None
        rows, source = load_rows(name, split=self.hub_split, configs=lambda hub_name: (config,))
        require_columns(rows, self.columns, source=source.name, task=self.name)
        if name != data:
            source = dataclasses.replace(source, name=data)
        return self.items_from_rows(rows, source=source.name), source

    def items_from_rows(self, rows: Sequence[dict], *, source: str) -> list[Item]:
        items, seen = [], set()
        for index, row in enumerate(rows):
            number = row["task_id"]
            if not isinstance(number, int) or isinstance(number, bool) or number in seen:
                raise UserError(
                    f"{source}, row {index}: task_id must be a whole number of its own, found {number!r:.40}"
                )
            seen.add(number)
            text_column = "prompt" if "prompt" in row else "text"
            require_columns([row], (text_column,), source=source, task=self.name)
            text = require_text(row, text_column, source=source, index=index)
            code = require_text(row, "code", source=source, index=index)
            lists = {}
            for column in ("test_list", "challenge_test_list", "test_imports"):
                lists[column] = row.get(column) or []
                if not isinstance(lists[column], list) or not all(isinstance(test, str) for test in lists[column]):
                    raise UserError(f"{source}, row {index}: {column} must be a list of texts")
            if not lists["test_list"]:
                raise UserError(f"{source}, row {index}: test_list is empty")
            setup = row.get("test_setup_code") or ""
            if not isinstance(setup, str):
                raise UserError(f"{source}, row {index}: test_setup_code must be text, found {setup!r:.40}")
            tests = "\n".join(lists["test_list"])
            defined = defined_names(code)
            # the functions under test, in the order of nothing but their names
            wanted = sorted(loaded_names(tests) & defined) or sorted(defined) or sorted(loaded_names(tests))
            meta = {
                "tests": "\n".join([*lists["test_imports"], *lists["test_list"]]),
                "setup": setup,
                "challenge": "\n".join(lists["challenge_test_list"]),
                "wanted": tuple(wanted),
                "helpers": tuple(sorted((loaded_names(setup) & defined) - set(wanted))),
            }
            instruction = REQUEST.replace("{tests}", tests).replace("{text}", text.strip())
            items.append(Item(task_id=f"{self.name}/{number}", instruction=instruction, gold=code, meta=meta))
        return items

    def select(self, items: list[Item], task_ids: Iterable[str] | None = None) -> list[Item]:
        """Return the test items; all, where completions go beyond them, subset=all asks, or none is a test item."""
        test_ids = {f"{self.name}/{number}" for number in TEST_IDS}
        test_items = [item for item in items if item.task_id in test_ids]
        known = {item.task_id for item in items}
        beyond = self.choice("subset") == "all" if task_ids is None else any(i in known - test_ids for i in task_ids)
        return items if beyond or not test_items else test_items

    def program(self, item: Item, text: str) -> str | None:
        return extract_program(text, wanted=item.meta["wanted"], helpers=item.meta["helpers"])

    def strict_program(self, item: Item, completion: str) -> str:
        return completion

    def tests(self, item: Item) -> tuple[str, tuple[str, ...]]:
        parts = [item.meta["setup"]] if self.choice("setup") == "true" else []
        parts.append(item.meta["tests"])
        parts += [item.meta["challenge"]] if self.choice("challenge") == "true" else []
        return "\n".join(parts) + "\n", (*item.meta["wanted"], *item.meta["helpers"])
