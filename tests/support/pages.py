"""What people read: README.md, REPRODUCTION.md and docs/, their commands and their examples."""

import re
import textwrap

from tests.conftest import ROOT

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "REPRODUCTION.md", *sorted((ROOT / "docs").glob("*.md")))
}


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a language, without their indentation."""
    found = re.findall(rf"^([ ]*)```{language}\b[^\n]*\n(.*?)^\1```", text, flags=re.S | re.M)
    return [textwrap.dedent(block) for _, block in found]


def example(page: str, title: str) -> str:
    """Return the one block of a page with this title: the file that it tells the reader to write."""
    (block,) = re.findall(rf'^```\w+ title="{re.escape(title)}"\n(.*?)^```', PAGES[page], flags=re.S | re.M)
    return block


def commands(page: str) -> list[str]:
    """Return the lines of a page's shell blocks."""
    return [line for block in blocks(PAGES[page], "sh") for line in block.splitlines() if line.strip()]


COMMANDS = list(dict.fromkeys(line for page in PAGES for line in commands(page)))


def words_of(module: str, places: dict[str, object] | None = None) -> list[str]:
    """Return the arguments of the pages' only line for `python -m module`, its placeholders replaced."""
    (line,) = [line for line in COMMANDS if f"python -m {module} " in line and "RUN_OWN" not in line]
    text = " ".join(line.split()[3:])
    for name, place in (places or {}).items():
        text = text.replace(name, str(place))
    return text.split()
