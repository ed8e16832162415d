"""Rows of a data set, from a local json/jsonl/parquet/csv/tsv file or from the hub, and where they came from."""

import csv
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ba_lora.errors import UserError
from ba_lora.hub import hub_obstacle
from ba_lora.io import check_readable, read_json, read_jsonl, sha256_file
from ba_lora.paths import LOCAL_SUFFIXES, PROJECT_ROOT

if TYPE_CHECKING:
    from datasets import Dataset

Row = TypeVar("Row")


@dataclass(frozen=True)
class Source:
    """Where rows came from, as stored in every result.

    name: "hub/name[@revision]" or the path (inside the repository: relative to its root); sha256: of the local file,
    None for hub data; fingerprint and revision, the commit that was read: of hub data, None for local files (revision
    also where a branch was asked for and the hub's library does not tell what it stood for).
    """

    name: str
    sha256: str | None = None
    fingerprint: str | None = None
    revision: str | None = None

    def as_result(self) -> object:
        """Return what a result stores as `data_sha256`: the hex digest, or the hub's fingerprint and revision."""
        if self.sha256 is not None:
            return self.sha256
        return {"hub": self.name, "fingerprint": self.fingerprint, "revision": self.revision}


def load_rows(
    data: str,
    *,
    split: str = "test",
    configs: Callable[[str], tuple[str | None, ...]] = lambda name: (None,),
) -> tuple[list[dict], Source]:
    """Return the rows of a local file (one of LOCAL_SUFFIXES), or of a hub data set `owner/name[@revision]`.

    A name with one of the local suffixes, or that exists on disk, is a file; anything else is asked from the hub.
    Raises UserError in one line when it is absent, gated, out of reach, empty or damaged.
    """
    path = Path(data)
    if path.suffix in LOCAL_SUFFIXES or path.exists():
        return _local_rows(path), Source(name=portable_name(path), sha256=sha256_file(path))
    return _hub_rows(data, split=split, configs=configs)


def choose_rows(rows: list[Row], num_rows: int | None, sample_seed: int | None) -> list[Row]:
    """Return the first `num_rows` (None: all), or a sample of that size by `sample_seed`, in the rows' order."""
    if num_rows is None or num_rows >= len(rows):
        return rows
    if sample_seed is None:
        return rows[:num_rows]
    chosen = sorted(random.Random(sample_seed).sample(range(len(rows)), num_rows))
    return [rows[index] for index in chosen]


def portable_name(path: Path) -> str:
    """Return the path inside the repository for what lies there, so that runs may move between machines."""
    absolute = path.resolve()
    return absolute.relative_to(PROJECT_ROOT).as_posix() if absolute.is_relative_to(PROJECT_ROOT) else str(path)


def _local_rows(path: Path) -> list[dict]:
    check_readable(path)
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}") from error
    elif path.suffix == ".json":
        rows = _json_rows(path)
    elif path.suffix == ".jsonl":
        rows = read_jsonl(path)
    elif path.suffix in (".csv", ".tsv"):
        rows = _table_rows(path)
    else:
        raise UserError(f"{path} is not a data file: give one of {', '.join(LOCAL_SUFFIXES)}, or a hub name")
    if not rows:
        raise UserError(f"{path} is empty: at least one row is needed")
    refuse_surrogates(rows, path)
    return rows


def refuse_surrogates(rows: list[dict], path: Path) -> None:
    """Raise UserError for a text with half of a character, as JSON's \\ud83d without its other half gives."""

    def is_whole(value: object) -> bool:
        if isinstance(value, str):
            return value.isascii() or not re.search("[\ud800-\udfff]", value)
        if isinstance(value, dict):
            return all(is_whole(part) for item in value.items() for part in item)
        return all(is_whole(part) for part in value) if isinstance(value, list) else True

    for number, row in enumerate(rows):
        for column, value in row.items():
            if not is_whole([column, value]):
                raise UserError(
                    f"{path}, row {number}: {column!a} holds half of a character (a lone surrogate, \\ud800 to "
                    "\\udfff), which no tokenizer takes: remove it"
                )


def _table_rows(path: Path) -> list[dict]:
    """Return the lines under the header, every value as text. In .tsv files a quotation mark is an ordinary letter."""
    csv.field_size_limit(2**31 - 1)  # Python's default, 131,072 characters, is less than some texts have
    form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {"strict": True}
    rows = []
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, **form)
        try:
            header = next(reader, [])
            if twice := [name for name in header if name and header.count(name) > 1]:
                raise UserError(f"{path}: the column {twice[0]!r} comes twice; rename or remove one of them")
            for values in reader:
                if len(values) != len(header) and values:
                    raise UserError(
                        f"{path}, line {reader.line_num}: {len(values)} values under a header of {len(header)} columns"
                    )
                if values:
                    rows.append(dict(zip(header, values, strict=True)))
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: not a valid table ({error})") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    return rows


def _json_rows(path: Path) -> list[dict]:
    """A .json file holds one array of objects; many published ".json" files hold one object a line instead."""
    try:
        rows = read_json(path)
    except UserError:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            first = next((line for line in file if line.strip()), "")
        try:
            one_object_a_line = isinstance(json.loads(first), dict)
        except (ValueError, RecursionError):
            one_object_a_line = False
        if not one_object_a_line:
            raise
        return read_jsonl(path)
    if isinstance(rows, dict):
        rows = [rows]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: an array of JSON objects is needed")
    return rows


def _hub_rows(data: str, *, split: str, configs: Callable[[str], tuple[str | None, ...]]) -> tuple[list[dict], Source]:
    name, _, revision = data.partition("@")
    mend = "give a local file (--data FILE, data.source=FILE), or make the hub reachable"
    import datasets

    obstacle = hub_obstacle()
    rows: list[dict] = []
    fingerprints, commits = [], set()
    for config in configs(name):
        try:
            part = datasets.load_dataset(name, config, split=split, revision=revision or None)
        except Exception as error:  # the hub client raises many kinds: absent, gated, offline, wrong config
            cause = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            offline = f" ({obstacle})" if obstacle else ""
            raise UserError(f"cannot load {data} from the hub{offline}: {cause[:300]}; {mend}") from error
        rows.extend(part)
        fingerprints.append(part._fingerprint)
        commits |= _commits(part)
    if is_commit(revision) and (others := commits - {revision}):
        raise UserError(f"asked for {data}, found commit {others.pop()} in the cache; {mend}")  # offline, any will do
    if not rows:
        raise UserError(f"{data} has no rows in split {split!r}; {mend}")
    commit = commits.pop() if len(commits) == 1 else revision if is_commit(revision) else None
    return rows, Source(name=data, fingerprint="+".join(fingerprints), revision=commit)


def is_commit(revision: str | None) -> bool:
    """Whether a revision names one state of a repository for good, and no branch or tag, which may move."""
    return re.fullmatch(r"[0-9a-f]{40}", revision or "") is not None


def _commits(rows: "Dataset") -> set[str]:
    """Return the hub's commits that the rows are of: `datasets` names the folder of its cache after them."""
    folders = {Path(file["filename"]).parent.name for file in rows.cache_files}
    return {folder for folder in folders if is_commit(folder)}
