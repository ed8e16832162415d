"""What is known of each data set (data/manifest.yaml), and whether the rows just read are those.

The hash is over the rows' contents, so that the hub's parquet, a json array and a jsonl file of the same rows agree.
"""

import functools
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

MANIFEST_PATH = Path(__file__).with_name("manifest.yaml")


@functools.cache
def load() -> dict[str, dict[str, Any]]:
    """Return the manifest: set name → hub, config, revision, license, files, splits."""
    return OmegaConf.to_container(OmegaConf.load(MANIFEST_PATH))


def pinned_revision(name: str) -> str | None:
    """Return the hub commit pinned for the set `name`, or None."""
    return load().get(name, {}).get("revision")


class RowDigest:
    """The sha256 of `columns` of all rows, in order: one line of compact JSON with sorted keys for each row."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns, self.num_rows, self._sha = tuple(columns), 0, hashlib.sha256()

    def add(self, row: dict[str, Any]) -> None:
        """Count a row in."""
        wanted = {column: row.get(column) for column in self.columns}
        line = json.dumps(wanted, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
        self._sha.update(line.encode("utf-8", errors="surrogatepass") + b"\n")
        self.num_rows += 1

    @property
    def sha256(self) -> str:
        return self._sha.hexdigest()


def check_rows(name: str, split: str, rows: RowDigest, *, file_sha256: str | None = None) -> dict[str, Any]:
    """Compare rows with the manifest: return {"sha256", "status": "matches" | "differs" | "unknown"}.

    `file_sha256` is that of the local file the rows came from; None says that they are a whole split of the hub's. In
    turn: a published file's hash, the hash of the rows' contents, the number of rows. "unknown": nothing of these is
    recorded for this set, split and columns, or a local file has fewer rows (a part cannot be told from another set).
    "differs" prints one warning line, since a user's own version of a set is legitimate.
    """
    sha256, num_rows, columns = rows.sha256, rows.num_rows, rows.columns
    entry = load().get(name, {})
    known = entry.get("splits", {}).get(split, {})
    if file_sha256 is not None and file_sha256 in (entry.get("files") or {}).values():
        return {"sha256": sha256, "status": "matches"}
    if known.get("rows") is None or (file_sha256 is not None and num_rows < known["rows"]):
        return {"sha256": sha256, "status": "unknown"}
    if known["sha256"] is not None and sorted(known["columns"]) == sorted(columns):
        same, expected = sha256 == known["sha256"], f"{known['rows']} rows of sha256 {known['sha256']}"
    elif num_rows != known["rows"]:
        same, expected = False, f"{known['rows']} rows"
    else:
        return {"sha256": sha256, "status": "unknown"}
    if same:
        return {"sha256": sha256, "status": "matches"}
    if os.environ.get("RANK", "0") == "0":
        print(
            f"warning: the {num_rows} rows of {name} ({split}), sha256 {sha256}, are not those of data/manifest.yaml: "
            f"{expected}",
            file=sys.stderr,
        )
    return {"sha256": sha256, "status": "differs"}
