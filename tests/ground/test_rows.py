"""ba_lora/rows.py: files as people have them, and what is recorded of where the hub's rows came from."""

import csv
import json
import os
import tempfile
from pathlib import Path

import datasets
import pytest
from datasets.arrow_writer import ArrowWriter

from ba_lora import rows
from ba_lora.errors import UserError
from ba_lora.io import sha256_file
from ba_lora.rows import LOCAL_SUFFIXES, load_rows
from eval.scoring import grader_versions
from eval.tasks.glue_x import SETS

OLD, NEW = "0" * 40, "a1" * 20


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Put a data set of two rows, read from `hub["commit"]`, in the hub's place; as datasets caches it."""
    state = {"commit": NEW, "asked": []}

    def load_dataset(name, config, *, split, revision):
        state["asked"].append((name, config, split, revision))
        folder = tmp_path / "cache" / "owner___name" / "default" / "0.0.0" / state["commit"]
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"name-{split}.arrow"
        with ArrowWriter(path=str(file)) as writer:
            for label in (0, 1):
                writer.write({"text": "x", "label": label})
            writer.finalize()
        return datasets.Dataset.from_file(str(file))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return state


@pytest.mark.parametrize("asked", ["", "@main", "@refs/convert/parquet", f"@{NEW}"])
def test_the_commit_that_was_read_is_recorded(hub, asked):
    rows, source = load_rows(f"owner/name{asked}")
    assert [row["label"] for row in rows] == [0, 1]
    assert (source.name, source.revision) == (f"owner/name{asked}", NEW)
    assert source.as_result()["revision"] == NEW
    assert hub["asked"] == [("owner/name", None, "test", asked.removeprefix("@") or None)]


def test_a_branch_is_never_recorded_as_a_commit(hub):
    hub["commit"] = "not-a-commit"
    assert load_rows("owner/name@refs/convert/parquet")[1].revision is None
    assert load_rows(f"owner/name@{NEW}")[1].revision == NEW


def test_another_commit_than_the_one_asked_for_is_refused(hub):
    """Offline, datasets takes whichever version its cache holds."""
    hub["commit"] = OLD
    with pytest.raises(UserError, match=f"asked for owner/name@{NEW}, found commit {OLD} in the cache; give a local"):
        load_rows(f"owner/name@{NEW}")


def test_sets_on_a_branch_are_not_published_as_pinned():
    hubs = {name: grader["hub"] for name, grader in grader_versions().items() if name in SETS}
    assert {name for name, of in SETS.items() if of.revision and hubs[name] is None} == {"sick", "hans", "scitail"}
    assert all(hub is None or len(hub.split("@")[1]) == 40 for hub in hubs.values())


ROWS = [{"text": "Größe", "label": "1"}, {"text": "é", "label": "0"}]
FORMS = {
    "array.json": json.dumps(ROWS),
    "lines.json": "\n".join(map(json.dumps, ROWS)),
    "a.jsonl": "\n".join(map(json.dumps, ROWS)),
    "a.csv": "text,label\nGröße,1\né,0\n",
    "a.tsv": "text\tlabel\nGröße\t1\né\t0\n",
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_files_with_and_without_a_byte_order_mark(tmp_path, name, encoding):
    (tmp_path / name).write_text(FORMS[name], encoding=encoding)
    assert load_rows(str(tmp_path / name))[0] == ROWS


@pytest.mark.parametrize("suffix", LOCAL_SUFFIXES)
def test_pipes_and_devices_are_no_data_files(tmp_path, suffix):
    os.mkfifo(tmp_path / f"a{suffix}")
    (tmp_path / f"b{suffix}").symlink_to("/dev/zero")
    for name, kind in (("a", "a pipe"), ("b", "a device")):
        with pytest.raises(UserError, match=f"{name}{suffix} is {kind}, a file is needed"):
            load_rows(str(tmp_path / f"{name}{suffix}"))


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_file_that_may_not_be_read_is_one_line():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        for name in ("a.csv", "a.parquet"):
            Path(folder, name).touch(0o000)
            os.seteuid(65534)
            try:
                for read in (load_rows, sha256_file):
                    with pytest.raises(UserError, match=f"cannot read .*{name}: permission denied"):
                        read(f"{folder}/{name}")
            finally:
                os.seteuid(0)


def test_long_cells_of_tables(tmp_path):
    text = "word " * 100_000
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], [text, 1]])
    (tmp_path / "a.tsv").write_text(f"text\tlabel\n{text}\t1\n")
    for name in ("a.csv", "a.tsv"):
        assert load_rows(str(tmp_path / name))[0] == [{"text": text, "label": "1"}]


def test_a_column_that_comes_twice_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text(",text,text,\n0,a,b,\n")
    with pytest.raises(UserError, match="a.csv: the column 'text' comes twice"):
        load_rows(str(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    "row", [{"a": "x\ud800"}, {"b": "", "a": [{"c": "\udfff"}]}, {"a": {"\udc00": 1}}, {"\ud83d": "x", "a": "x"}]
)
def test_half_of_a_character_is_named_with_its_row(tmp_path, row):
    for name, text in (("a.jsonl", f'{{"a": "🐈"}}\n{json.dumps(row)}\n'), ("a.json", json.dumps([{"a": "🐈"}, row]))):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=rf"{name}, row 1: '.*' holds half of a character") as error:
            load_rows(str(tmp_path / name))
        assert str(error.value).isascii() and "\n" not in str(error.value)


def test_a_file_inside_the_repository_has_its_place_there_as_its_name_also_by_a_link(tmp_path, monkeypatch):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    (elsewhere / "rows.jsonl").write_text("{}\n")
    (root / "own").symlink_to(elsewhere)
    (tmp_path / "to_root").symlink_to(root)
    (root / "rows.jsonl").write_text("{}\n")
    monkeypatch.setattr(rows, "PROJECT_ROOT", root)
    assert rows.portable_name(root / "own" / "rows.jsonl") == "own/rows.jsonl"
    assert rows.portable_name(tmp_path / "to_root" / "rows.jsonl") == "rows.jsonl"
    assert rows.portable_name(elsewhere / "rows.jsonl") == str(elsewhere / "rows.jsonl")
