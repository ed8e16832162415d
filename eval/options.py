"""Arguments of the commands in eval/: --data, and `key=value` among the words of another option."""

import re
from collections.abc import Sequence
from pathlib import Path

from ba_lora.errors import UserError
from ba_lora.paths import resolve_data
from eval.tasks import TASKS


def read_data(entries: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    """Return task → data from `FILE` (a single task) or `TASK=FILE` entries."""
    data = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if equals and name in TASKS:
            data[name] = resolve_data(path)
        elif len(tasks) == 1 and not data:
            data[tasks[0]] = resolve_data(entry)
        else:
            raise UserError(f"--data {entry}: with several tasks or files write TASK=FILE")
    return data


def split_options(*lists: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """Take `key=value` out of lists that argparse filled greedily: `--task gsm8k limit=5` means limit."""

    def is_option(text: str) -> bool:
        return (
            re.match(r"[a-z_]+=", text) is not None and text.partition("=")[0] not in TASKS and not Path(text).exists()
        )

    kept = [[text for text in entries if not is_option(text)] for entries in lists]
    return kept, [text for entries in lists for text in entries if is_option(text)]
