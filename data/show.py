"""What a model will see of the data, without a model: python -m data.show CONFIG [key=value …] [--rows 3]

prints what became of the rows (the same counts as the training's report), how long they are, and the first rows as they
are trained on, the labelled part coloured; in a file, between ⟦ and ⟧. CONFIG and key=value are as for the training
scripts; `--task NAME` for NLU. Only the tokenizer is loaded. Leaves with status 2 where nothing is left to learn.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from ba_lora.config.layers import load_config
from ba_lora.config.schema_nlg import NLGConfig
from ba_lora.config.schema_nlu import NLUConfig
from ba_lora.console import visible
from ba_lora.errors import CommandParser, UserError, run_entry_point

BINS = 10
BAR = 40  # letters of the longest bar
NAMED = 10  # rows that are named by number
LABELLED = ("\033[1;32m", "\033[0m")  # bold green
PLAIN = ("⟦", "⟧")


def main() -> int:
    parser = CommandParser(
        prog="python -m data.show", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=3, help="how many rows are shown (default 3)")
    parser.add_argument("--method", help="as for training; changes no row")
    parser.add_argument("--task", help="of an NLU config")
    parser.add_argument("config", help="a file, or the name of one in configs/nlg")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    typed = parser.parse_intermixed_args()
    if typed.rows < 0:
        raise UserError(f"--rows {typed.rows}: a number from 0 is needed")
    config = load_config(typed.config, method=typed.method, task=typed.task, overrides=typed.overrides)
    marks = LABELLED if sys.stdout.isatty() else PLAIN
    for line in _nlg_lines(config, typed.rows, marks) if config.kind == "nlg" else _nlu_lines(config, typed.rows):
        print(line)
    return 0


def _nlg_lines(config: NLGConfig, num_rows: int, marks: tuple[str, str]) -> Iterable[str]:
    from ba_lora.models.tokenizer import load_tokenizer
    from data.nlg import load_training_data
    from data.sets import chosen_set

    tokenizer = load_tokenizer(config.model, template=config.data.template)
    data = load_training_data(config.data, tokenizer)
    report = data.report
    yield f"{report['name']} from {report['source']}, template {config.data.template}, manifest {report['manifest']}"
    yield from _counts(
        report, ("read", "chosen", "used", "heldout", "cut", "dropped", "empty", "shortened", "duplicate")
    )
    found = chosen_set(config.data)
    unanswered = "no question with an answer" + (" before the first empty turn" if found.messages else "")
    what = {
        "cut": f"longer than data.max_length={config.data.max_length}, cut",
        "dropped": f"no answer left in data.max_length={config.data.max_length}, left out",
        "empty": unanswered + (", or turns that do not alternate" if found.exchanges else "") + ", left out",
        "shortened": "turns before the first question, from an empty turn on or behind the last answer are left out",
        "duplicate": "repeat an earlier row, trained on",
    }
    for name, reason in what.items():
        if numbers := data.numbers[name]:
            more = f", … ({len(numbers)} rows)" if len(numbers) > NAMED else ""
            yield f"{name} ({reason}): row {', '.join(map(str, numbers[:NAMED]))}{more}"
    lengths = data.dataset["length"][:]
    yield f"tokens: {report['tokens']}, labelled {report['response_tokens']}; {_spread(lengths)}"
    yield from histogram(lengths)
    for number, item in zip(data.numbers["used"][:num_rows], data.dataset, strict=False):
        learned = sum(label != -100 for label in item["labels"])
        yield f"\nrow {number}: {item['length']} tokens, {learned} labelled"
        yield _marked(item, tokenizer, marks)


def _marked(item: dict[str, Any], tokenizer: Any, marks: tuple[str, str]) -> str:
    """Return a row's text, its labelled parts between the marks."""
    parts, start = [], 0
    learned = [label != -100 for label in item["labels"]]
    for place in range(1, len(learned) + 1):
        if place == len(learned) or learned[place] != learned[start]:
            text = visible(tokenizer.decode(item["input_ids"][start:place]))
            parts.append(f"{marks[0]}{text}{marks[1]}" if learned[start] else text)
            start = place
    return "".join(parts)


def _nlu_lines(config: NLUConfig, num_rows: int) -> Iterable[str]:
    from ba_lora.models.tokenizer import load_tokenizer
    from data.nlu import load_nlu_data

    tokenizer = load_tokenizer(config.model, generates=False)
    data, task = load_nlu_data(config, tokenizer), config.definition
    report = data.report
    yield f"{report['name']} from {report['source']}, columns {', '.join((*task.columns, task.label))}"
    yield from _counts(report, ("read", "used", "heldout", "cut", "empty", "duplicate"))
    yield "classes: " + _classes(report["classes"])
    for name, dev in report["dev"].items():
        yield f"dev set {name} from {dev['source']}: {dev['rows']} rows, classes: {_classes(dev['classes'])}"
    lengths = [len(ids) for ids in data.train["input_ids"]]
    yield f"tokens: {report['tokens']}; {_spread(lengths)}"
    yield from histogram(lengths)
    for item in data.train.select(range(min(num_rows, len(data.train)))):
        label = item["labels"] if task.is_regression else task.labels[item["labels"]]
        yield f"\nrow {item['row']}: {len(item['input_ids'])} tokens, label {label}"
        yield visible(tokenizer.decode(item["input_ids"]))


def _counts(report: dict[str, Any], names: Sequence[str]) -> Iterable[str]:
    told = {"heldout": "held out", "duplicate": "repeated"}
    yield "rows: " + ", ".join(f"{report[f'rows_{name}']} {told.get(name, name)}" for name in names)


def _classes(counts: dict[str, int] | None) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) if counts else "none, a regression"


def _spread(lengths: Sequence[int]) -> str:
    ordered = sorted(lengths)
    return f"a row has {ordered[0]} to {ordered[-1]}, half of them at most {ordered[(len(ordered) - 1) // 2]}"


def histogram(lengths: Sequence[int]) -> list[str]:
    """Return a line for each of at most BINS ranges of lengths that are multiples of a round number: how many."""
    width = max(1, math.ceil((max(lengths) + 1) / BINS))
    round_to = 10 ** (len(str(width)) - 1)
    width = math.ceil(width / round_to) * round_to
    counts: dict[int, int] = {}
    for length in lengths:
        counts[length // width] = counts.get(length // width, 0) + 1
    most = max(counts.values())
    lines = []
    for place in range(min(counts), max(counts) + 1):
        count = counts.get(place, 0)
        bar = "█" * math.ceil(BAR * count / most)
        lines.append(f"{place * width:>7} to {(place + 1) * width - 1:<7} {bar:<{BAR}} {count}".rstrip())
    return lines


if __name__ == "__main__":
    run_entry_point(main)
