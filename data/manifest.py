"""What is known of each data set (data/manifest.yaml), and whether the rows just read are those.

The hash is over the rows' contents, so that the hub's parquet, a json array and a jsonl file of the same rows agree.
"""

import functools
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ba_lora.errors import UserError

MANIFEST_PATH = Path(__file__).with_name("manifest.yaml")


@functools.cache
def load() -> dict[str, dict[str, Any]]:
    """Return the manifest: set name → hub, config, revision, license, files, splits."""
    return OmegaConf.to_container(OmegaConf.load(MANIFEST_PATH))


def pinned_revision(name: str) -> str | None:
    """Return the hub commit pinned for the set `name`, or None."""
    return load().get(name, {}).get("revision")


def canonical_sha256(rows: Iterable[dict[str, Any]], columns: Sequence[str]) -> str:
    """Return the sha256 of `columns` of all rows, in order: one line of compact JSON with sorted keys for each row."""
    digest = hashlib.sha256()
    for row in rows:
        wanted = {column: row[column] for column in columns}
        line = json.dumps(wanted, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        digest.update(line.encode("utf-8", errors="surrogatepass") + b"\n")
    return digest.hexdigest()


def check(
    name: str, split: str, rows: Sequence[dict[str, Any]], columns: Sequence[str], *, strict: bool = False
) -> dict[str, Any]:
    """Compare rows with the manifest: return {"sha256", "num_rows", "status": "matches" | "differs" | "unknown"}.

    "unknown": no hash is recorded for this set, split and columns, or these are fewer rows than the whole split (a part
    cannot be told from another set). "differs" prints one warning line with both hashes, since a user's own version of
    a set is legitimate; with `strict` it raises UserError instead.
    """
    sha256 = canonical_sha256(rows, columns)
    known = load().get(name, {}).get("splits", {}).get(split, {})
    comparable = known.get("sha256") and sorted(known["columns"]) == sorted(columns) and len(rows) >= known["rows"]
    if not comparable:
        return {"sha256": sha256, "num_rows": len(rows), "status": "unknown"}
    if sha256 == known["sha256"]:
        return {"sha256": sha256, "num_rows": len(rows), "status": "matches"}
    line = (
        f"the {len(rows)} rows of {name} ({split}) are not those of data/manifest.yaml: "
        f"sha256 {sha256}, recorded for {known['rows']} rows: {known['sha256']}"
    )
    if strict:
        raise UserError(f"{line}; use the original data, or record your own set there")
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {line}", file=sys.stderr)
    return {"sha256": sha256, "num_rows": len(rows), "status": "differs"}
