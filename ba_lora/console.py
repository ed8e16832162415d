"""The tables that commands print: columns of one width, a rule under their names; or as Markdown."""

from collections.abc import Sequence


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
