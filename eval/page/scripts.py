"""Values as script files, and the libraries that a page brings along, from the packages that ship them.

A page on file:// may fetch nothing, but it may load scripts: a value becomes a call `take("name", "<its JSON>")`, read
by JSON.parse, in which no text of a run can be code or change a prototype.
"""

import functools
import importlib.metadata
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from ba_lora.errors import UserError
from ba_lora.io import finite

# What JSON allows and a line of a script, or UTF-8, does not.
_ESCAPED = re.compile("[\u2028\u2029\ud800-\udfff\x7f]")


def script(name: str, value: Any) -> str:
    """Return the script that hands `value`, NaN and ±∞ as null, to the page under `name`."""
    text = json.dumps(finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    quoted = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"take({json.dumps(name)}, '{quoted}');\n"


@functools.cache
def libraries() -> dict[str, bytes]:
    """Return the files of lib/: DataTables (from itables), BokehJS (from bokeh) and their licences.

    Raises UserError where a package is missing, or is not as these versions are.
    """
    tables, plots = _folder("itables") / "html", _folder("bokeh") / "server" / "static" / "js"
    return {
        "datatables.js": _as_classic(_read(tables / "dt_bundle.js")).encode(),
        "datatables.css": _read(tables / "dt_bundle.css").encode(),
        "bokeh.js": _read(plots / "bokeh.min.js").encode(),
        "bokeh-api.js": _read(plots / "bokeh-api.min.js").encode(),
        "LICENSES.txt": "\n\n".join(map(_licence, ("itables", "bokeh"))).encode(),
    }


def _as_classic(module: str) -> str:
    """Return itables' bundle, an ES module, as a classic script that sets `DataTable`: file:// refuses modules."""
    found = re.findall(r"export\{([^{}]*)\}", module)
    name = re.search(r"(?:^|,)([\w$]+) as default(?:,|$)", found[0]) if len(found) == 1 else None
    if name is None or "import.meta" in module:
        raise UserError("itables' dt_bundle.js is not as in the pinned version: pip install -r requirements.txt")
    whole = f"export{{{found[0]}}}"
    return f"(() => {{\n{module.replace(whole, f'globalThis.DataTable = {name[1]}')}\n}})();\n"


def _folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise UserError(
            f"a page needs the package {package}: pip install -r requirements.txt, or leave it out: page=no"
        )
    return Path(found.origin).parent


def _read(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"no such file: {path}: the page needs the pinned version, pip install -r requirements.txt")
    return path.read_text(encoding="utf-8")


def _licence(package: str) -> str:
    files = importlib.metadata.files(package) or []
    texts = [file.read_text() for file in files if re.search(r"licen[sc]e", file.name, re.IGNORECASE)]
    return f"{package} {importlib.metadata.version(package)}\n\n" + "\n\n".join(texts)
