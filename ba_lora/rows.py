"""Rows of data sets, from local json/jsonl/parquet/csv/tsv files (or .gz of these) or from the hub, and where from."""

import csv
import gzip
import itertools
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ba_lora.errors import UserError
from ba_lora.hub import hub_obstacle
from ba_lora.io import check_readable, iterate_json, iterate_jsonl, open_text, reading_errors, sha256_file
from ba_lora.paths import LOCAL_SUFFIXES, PROJECT_ROOT, data_suffix

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
    rows, source = stream_rows([data], split=split, configs=configs)
    return list(rows), source


def stream_rows(
    names: Sequence[str],
    *,
    split: str,
    configs: Callable[[str], tuple[str | None, ...]] = lambda name: (None,),
) -> tuple[Iterator[dict], Source]:
    """Return the rows of several files or sets, one after another and one in memory at a time, and their source; see
    `load_rows`. A damaged or empty file is told when the rows are read."""
    parts, sources = [], []
    for name in names:
        path = Path(name)
        if data_suffix(path) in LOCAL_SUFFIXES or path.exists():
            check_readable(path)
            parts.append(_local_rows(path))
            sources.append(Source(name=portable_name(path), sha256=sha256_file(path)))
        else:
            rows, source = _hub_rows(name, split=split, configs=configs)
            parts.append(rows)
            sources.append(source)
    if len(sources) == 1:
        return parts[0], sources[0]
    digests, commits = [source.sha256 for source in sources], [source.revision for source in sources]
    return itertools.chain.from_iterable(parts), Source(
        name=", ".join(source.name for source in sources),
        sha256="+".join(digests) if all(digests) else None,
        fingerprint="+".join(filter(None, (source.fingerprint for source in sources))) or None,
        revision="+".join(commits) if all(commits) else None,
    )


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
    for one in (Path(os.path.abspath(path)), path.resolve()):  # as it is named, a link in the repository or to it
        if one.is_relative_to(PROJECT_ROOT):
            return one.relative_to(PROJECT_ROOT).as_posix()
    return str(path)


def _local_rows(path: Path) -> Iterator[dict]:
    readers = {".parquet": _parquet_rows, ".json": iterate_json, ".jsonl": iterate_jsonl}
    reader = (readers | dict.fromkeys((".csv", ".tsv"), _table_rows)).get(data_suffix(path))
    if reader is None:
        raise UserError(f"{path} is not a data file: give one of {', '.join(LOCAL_SUFFIXES)}, or a hub name")
    number = -1
    for number, row in enumerate(reader(path)):
        _refuse_half_characters(row, number, path)
        yield row
    if number < 0:
        raise UserError(f"{path} is empty: at least one row is needed")


def _parquet_rows(path: Path) -> Iterator[dict]:
    import pyarrow.parquet

    opened = gzip.open(path) if path.suffix == ".gz" else open(path, "rb")
    with reading_errors(path), opened as file:
        try:
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1000):
                yield from batch.to_pylist()
        except gzip.BadGzipFile:
            raise
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}") from error


def refuse_surrogates(rows: list[dict], path: Path) -> None:
    """Raise UserError for a text with half of a character, as JSON's \\ud83d without its other half gives."""
    for number, row in enumerate(rows):
        _refuse_half_characters(row, number, path)


HALF = "holds half of a character (a lone surrogate, \\ud800 to \\udfff), which no tokenizer takes: remove it"


def is_whole(value: object) -> bool:
    """Whether no text in a value has half of a character."""
    if isinstance(value, str):
        return value.isascii() or not re.search("[\ud800-\udfff]", value)
    if isinstance(value, dict):
        return all(is_whole(part) for item in value.items() for part in item)
    return all(map(is_whole, value)) if isinstance(value, list) else True


def _refuse_half_characters(row: dict, number: int, path: Path) -> None:
    for column, value in row.items():
        if not is_whole([column, value]):
            raise UserError(f"{path}, row {number}: {column!a} {HALF}")


def _table_rows(path: Path) -> Iterator[dict]:
    """Yield the lines under the header, every value as text. In .tsv files a quotation mark is an ordinary letter."""
    csv.field_size_limit(2**31 - 1)  # Python's default, 131,072 characters, is less than some texts have
    form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if data_suffix(path) == ".tsv" else {"strict": True}
    with open_text(path, encoding="utf-8-sig", newline="") as file, reading_errors(path):
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
                    yield dict(zip(header, values, strict=True))
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: not a valid table ({error})") from error


def _hub_rows(
    data: str, *, split: str, configs: Callable[[str], tuple[str | None, ...]]
) -> tuple[Iterator[dict], Source]:
    name, _, revision = data.partition("@")
    fix = "give a local file (--data FILE, data.source=FILE), or make the hub reachable"
    import datasets

    obstacle = hub_obstacle()
    parts, fingerprints, commits = [], [], set()
    for config in configs(name):
        try:
            part = datasets.load_dataset(name, config, split=split, revision=revision or None)
        except Exception as error:  # the hub client raises many kinds: absent, gated, offline, wrong config
            cause = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            offline = f" ({obstacle})" if obstacle else ""
            raise UserError(f"cannot load {data} from the hub{offline}: {cause[:300]}; {fix}") from error
        parts.append(part)
        fingerprints.append(part._fingerprint)
        commits |= _commits(part)
    if is_commit(revision) and (others := commits - {revision}):
        raise UserError(f"asked for {data}, found commit {others.pop()} in the cache; {fix}")  # offline, any will do
    if not any(map(len, parts)):
        raise UserError(f"{data} has no rows in split {split!r}; {fix}")
    commit = commits.pop() if len(commits) == 1 else revision if is_commit(revision) else None
    return itertools.chain.from_iterable(parts), Source(name=data, fingerprint="+".join(fingerprints), revision=commit)


def is_commit(revision: str | None) -> bool:
    """Whether a revision names one state of a repository for good, and no branch or tag, which may move."""
    return re.fullmatch(r"[0-9a-f]{40}", revision or "") is not None


def _commits(rows: "Dataset") -> set[str]:
    """Return the hub's commits that the rows are of: `datasets` names the folder of its cache after them."""
    folders = {Path(file["filename"]).parent.name for file in rows.cache_files}
    return {folder for folder in folders if is_commit(folder)}
