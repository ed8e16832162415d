"""Files: read with errors that name the line, write so that a reader sees the old file or the new one, never half."""

import contextlib
import errno
import glob
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import stat
import uuid
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ba_lora.errors import UserError
from ba_lora.paths import no_such_file

if TYPE_CHECKING:
    from torch import Tensor

BOM = "\ufeff"  # the byte order mark, which some editors put in front
MAX_FILE_BYTES = 4 * 2**30  # files of text are read whole


@contextlib.contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turn "no space left", "not permitted" and files in the place of folders while writing `path` into one line.

    safetensors and torch report a full disk as errors of their own, known by their text only.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = getattr(error, "errno", None)
        texts = ("No space left on device", "PytorchStreamWriter failed writing", "unexpected pos")
        full = any(text in str(error) for text in texts)
        if full or number in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no disk space left while writing {path}: free some space, then run again") from error
        if isinstance(error, PermissionError) or number == errno.EROFS:
            raise UserError(f"cannot write {path}: permission denied; choose another output folder") from error
        if isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError):
            kind = "a folder" if isinstance(error, IsADirectoryError) else "no folder"
            found = f"{error.filename2 or error.filename} is {kind}"
            raise UserError(f"cannot write {path}: {found}; choose another output") from error
        raise


@contextlib.contextmanager
def file_atomic(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; on a clean exit it is synced and renamed over `path`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with disk_errors(path):
        if path.exists() and not path.is_file():
            raise UserError(f"cannot write {path}: it is {_kind_of_file(path)}; choose another output")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove what killed writers of the file `path` left beside it. For a path that has one writer at a time."""
    for stale in _temporaries(path):
        stale.unlink(missing_ok=True)


def _temporaries(path: Path) -> Iterator[Path]:
    return path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.tmp")


def write_bytes_atomic(path: str | Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all; see `file_atomic`."""
    with file_atomic(path) as temporary:
        temporary.write_bytes(content)


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write `text` to `path` in UTF-8; see `file_atomic`."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_json_atomic(path: str | Path, value: object) -> None:
    """Write `value` as indented JSON; NaN is refused, since it is not JSON."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def finite(value: object) -> object:
    """Return `value` with every number that JSON cannot hold (NaN, ±∞) replaced by None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_jsonl_atomic(path: str | Path, rows: Iterable[dict]) -> str:
    """Write one JSON object a line; return the hex sha256 of what was written."""
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    write_bytes_atomic(path, content)
    return hashlib.sha256(content).hexdigest()


def append_line(path: str | Path, value: object) -> None:
    """Append one JSON value as a line, behind whatever half of a line a full disk or a kill has left there."""
    path = Path(path)
    with disk_errors(path), open(path, "a+b") as file:
        file.seek(max(file.tell() - 1, 0))
        torn = file.read(1) not in (b"", b"\n")
        line = json.dumps(value, ensure_ascii=False) + "\n"
        file.write((b"\n" if torn else b"") + line.encode())


def read_whole_lines(path: str | Path) -> list[dict]:
    """Return the objects of a file that is appended to line by line, without what is torn or still being written."""
    path = Path(path)
    found = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else ():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


@contextlib.contextmanager
def folder_atomic(path: str | Path) -> Iterator[Path]:
    """Give a fresh temporary folder beside `path`; on a clean exit it takes the place of `path`.

    A process killed inside leaves a folder `.NAME.<8 hex digits>.tmp`, which the next call for this path removes.
    Killed between the two renames at the end, it leaves what stood at `path` as `.NAME.old`, which that call puts back.
    """
    path = Path(path)
    with disk_errors(path):
        if path.exists() and not path.is_dir():
            raise UserError(f"cannot write {path}: it is {_kind_of_file(path)}; choose another output folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.with_name(f".{path.name}.old")
        if before.is_dir() and not path.exists():
            os.replace(before, path)
        for stale in _temporaries(path):
            shutil.rmtree(stale)
        shutil.rmtree(before, ignore_errors=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
            if path.exists():
                os.replace(path, before)
            os.replace(temporary, path)
            shutil.rmtree(before, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _kind_of_file(path: Path) -> str:
    kinds = {
        stat.S_IFREG: "a file",
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(path.stat().st_mode), "a device")


def check_readable(path: Path) -> None:
    """Raise UserError unless `path` is a regular file of at most MAX_FILE_BYTES that may be read.

    Nothing is opened: a pipe would wait for a writer, and some devices have no end.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise UserError(f"{path} is {_kind_of_file(path)}, a file is needed")
    except FileNotFoundError as error:
        raise UserError(f"{no_such_file(path)}; check the path") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror.lower()}") from error
    if not os.access(path, os.R_OK, effective_ids=True):
        raise UserError(f"cannot read {path}: permission denied")
    if size > MAX_FILE_BYTES:
        raise UserError(
            f"{path} has {size / 2**30:.1f} GiB, and at most {MAX_FILE_BYTES // 2**30} GiB are read: give a part of it"
        )


def open_text(path: Path, *, encoding: str = "utf-8", newline: str | None = None) -> TextIO:
    """Return a text file, opened; unpacked where its name ends in .gz. Raises UserError."""
    check_readable(path)
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding=encoding, newline=newline)


@contextlib.contextmanager
def reading_errors(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a text file is read, other characters than UTF-8 or a damaged .gz, into one line."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}; save it as UTF-8") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is no gzip file, or is cut short: {error}; copy it again") from error


def _parse(text: str, path: Path, *, line: int | None = None, finite: bool = False) -> object:
    """Return the JSON value of a text, of this line of `path` where it is not all of it."""
    where = str(path) if line is None else f"{path}, line {line}"

    def refuse(constant: str) -> None:
        raise UserError(f"{where}: {constant} is no number that JSON knows; write null")

    try:
        return json.loads(text, parse_constant=refuse if finite else None)
    except UserError:
        raise
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {line or error.lineno}: not valid JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, nesting without end
        raise UserError(f"{where}: not readable JSON ({error})") from error


def read_json(path: str | Path, *, finite: bool = False) -> object:
    """Return the JSON value in `path`. Raises UserError naming the file, and the line where it breaks.

    finite: refuse NaN and ±∞, which none of our own files holds.
    """
    path = Path(path)
    with open_text(path) as file, reading_errors(path):
        return _parse(file.read().removeprefix(BOM), path, finite=finite)


def read_object(path: str | Path) -> dict | None:
    """Return the JSON object in `path`; None where there is none, or none that can be read: cut off, empty, no object.

    For files that can be made again.
    """
    try:
        value = read_json(path, finite=True)
    except UserError:
        return None
    return value if isinstance(value, dict) else None


def read_jsonl(path: str | Path) -> list[dict]:
    """Return the objects of a jsonl file, blank lines skipped. Raises UserError for a broken line or an empty file."""
    rows = list(iterate_jsonl(path))
    if not rows:
        raise UserError(f"{path} is empty: at least one line is needed")
    return rows


def iterate_jsonl(path: str | Path) -> Iterator[dict]:
    """Yield the objects of a jsonl file one by one, blank lines skipped. Raises UserError for a broken line."""
    path = Path(path)
    with open_text(path) as file, reading_errors(path):
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(BOM)  # joined files have several
            if not text.strip():
                continue
            row = _parse(text, path, line=number)
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: a JSON object is needed, found {type(row).__name__}")
            yield row


_BLANK = re.compile(r"[ \t\n\r]*")


def iterate_json(path: str | Path) -> Iterator[dict]:
    """Yield the objects of a .json file: of its array, the one that it is, or one a line as in jsonl, which many
    published ".json" files hold. The text is held whole, its objects are not. Raises UserError."""
    path = Path(path)
    with open_text(path) as file, reading_errors(path):
        text = file.read().removeprefix(BOM)
    place = _BLANK.match(text).end()
    decoder = json.JSONDecoder()

    def parsed(place: int) -> tuple[object, int]:
        value, end = decoder.raw_decode(text, place)
        return value, _BLANK.match(text, end).end()

    try:
        if text[place : place + 1] != "[":
            value, end = parsed(place)
            if not isinstance(value, dict):
                raise UserError(f"{path}: an array of JSON objects is needed")
            if end == len(text):
                yield value
                return
            del text
            yield from iterate_jsonl(path)
            return
        place = _BLANK.match(text, place + 1).end()
        while text[place : place + 1] != "]":
            value, place = parsed(place)
            if not isinstance(value, dict):
                raise UserError(f"{path}: an array of JSON objects is needed")
            yield value
            if text[place : place + 1] == ",":
                place = _BLANK.match(text, place + 1).end()
                if text[place : place + 1] == "]":
                    raise json.JSONDecodeError("Illegal trailing comma before end of array", text, place)
            elif text[place : place + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
        if text[place + 1 :].strip():
            raise json.JSONDecodeError("Extra data", text, place + 1)
    except UserError:
        raise
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable JSON ({error})") from error


def is_pickle(path: str | Path) -> bool:
    """Return whether a file begins as what torch.save or pickle writes."""
    with open(path, "rb") as file:
        head = file.read(2)
    return head == b"PK" or head[:1] == b"\x80"


def load_tensors(path: str | Path) -> "dict[str, Tensor]":
    """Return the tensors of a safetensors file. Raises UserError where it is gone, damaged, or a pickle."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}; restore it, or train again with overwrite=true") from error
    except SafetensorError as error:
        fault = "is a pickle, not a safetensors file" if is_pickle(path) else f"is damaged or cut short ({error})"
        raise UserError(f"{path} {fault}: restore it, or train again with overwrite=true") from error


def sha256_file(path: str | Path) -> str:
    """Return the hex sha256 of a file's bytes. Raises UserError for a pipe or a device, which have no end, and for a
    file that may not be read."""
    if (path := Path(path)).exists() and not path.is_file():
        raise UserError(f"{path} is {_kind_of_file(path)}, a file is needed")
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except PermissionError as error:
        raise UserError(f"cannot read {path}: permission denied") from error


def sha256_json(value: object) -> str:
    """Return the hex sha256 of a value's JSON text, its keys in their order."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
