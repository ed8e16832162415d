"""What commands print: tables, columns of one width with a rule under their names, or as Markdown; texts of others."""

import re
from collections.abc import Sequence

_UNSEEN = re.compile(r"[^\S\n\t ]|[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


def console_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells, the columns' names first, padded to columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    names, *others = rows
    lines = [names, ["-" * width for width in widths], *others]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells, the columns' names first, as a Markdown table."""
    names, *others = rows
    return "\n".join(f"| {' | '.join(line)} |" for line in [names, ["---"] * len(names), *others])


def visible(text: str) -> str:
    """Return a text without characters that would steer the terminal or turn others round: as ⟨U+001B⟩."""
    return _UNSEEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)
