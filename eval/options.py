"""Arguments of the commands in eval/: --data, and `key=value` among the words of another option."""

import re
from collections.abc import Sequence
from pathlib import Path

from ba_lora.errors import UserError
from ba_lora.paths import resolve_data, resolve_path
from ba_lora.words import nearest
from eval.tasks import TASKS


def read_data(words: Sequence[str], names: Sequence[str], *, prefix: str = "", further: bool = False) -> dict[str, str]:
    """Return name → data from the words of --data: `NAME=FILE`, or a FILE where there is a single name.

    prefix: may stand before a name, and is taken off; further: names of the user's own are taken, too. Raises UserError
    for an unknown name (with the nearest), a name that is given twice, and a word without a name or a file.
    """
    data: dict[str, str] = {}
    names = list(dict.fromkeys(names))
    wanted = f"give NAME=FILE, NAME being {'one of ' if len(names) > 1 else ''}{', '.join(names)}"
    wanted += " or a name of your own" if further else ""
    for word in words:
        name, equals, file = word.partition("=")
        if len(names) == 1 and not further and (not equals or resolve_path(word).exists()):
            name, equals, file = names[0], "=", word
        name = name.removeprefix(prefix)
        if not equals or not file:
            raise UserError(f"--data {word}: {wanted}")
        if name not in names and not (further and re.fullmatch(r"[\w-]+", name)):
            raise UserError(f"--data {word}: {name} is unknown{nearest(name, names)}: {wanted}")
        if name in data:
            raise UserError(f"--data {word}: {name} is given twice")
        data[name] = resolve_data(file)
    return data


def split_options(*lists: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """Take `key=value` out of lists that argparse filled greedily: `--task gsm8k limit=5` means limit."""

    def is_option(text: str) -> bool:
        return (
            re.match(r"[a-z_]+=", text) is not None and text.partition("=")[0] not in TASKS and not Path(text).exists()
        )

    kept = [[text for text in entries if not is_option(text)] for entries in lists]
    return kept, [text for entries in lists for text in entries if is_option(text)]
