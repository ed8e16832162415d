"""mkdocs hooks: README.md and REPRODUCTION.md become pages of the site, and links lead to the pages there.

The pages are written for the repository, where a link counts from the file it is in.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "REPRODUCTION.md": "reproduction.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the two pages, and the figures that pages show from results/."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    for path in (ROOT / "docs").glob("*.md"):
        for figure in re.findall(r"\]\(\.\./(results/[^)]*\.png)\)", path.read_text(encoding="utf-8")):
            files.append(File.generated(config, figure, abs_src_path=str(ROOT / figure)))
        for folder in re.findall(r"\]\(\.\./(results/[^)]*)/index\.html\)", path.read_text(encoding="utf-8")):
            for file in sorted((ROOT / folder).rglob("*.*")):
                files.append(File.generated(config, str(file.relative_to(ROOT)), abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links from the root (docs/x.md) and to it (../REPRODUCTION.md) become links between the site's pages."""
    for name, page in PAGES.items():
        markdown = re.sub(rf"\]\((?:\.\./)?{name}", f"]({page}", markdown)
    markdown = markdown.replace("](docs/", "](").replace("](../results/", "](results/")
    return re.sub(r"\[([^\]]*)\]\(CITATION\.cff\)", r"\1", markdown)
