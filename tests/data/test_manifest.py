"""data/manifest.py: hashes that do not depend on the file format, and what is said when they differ."""

import hashlib
import re
from pathlib import Path

import pytest

from ba_lora.config.registries import data_sets
from ba_lora.io import read_jsonl
from data import manifest

COLUMNS = ("query", "response")
ROWS = [{"query": "2 + 2?", "response": "4", "extra": 1}, {"query": "Größe\n?", "response": "é"}]


def digest(rows: list, columns: tuple) -> manifest.RowDigest:
    found = manifest.RowDigest(columns)
    for row in rows:
        found.add(row)
    return found


def test_hash_by_hand() -> None:
    text = '{"query":"2 + 2?","response":"4"}\n{"query":"Größe\\n?","response":"é"}\n'
    assert digest(ROWS, COLUMNS).sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_hash_ignores_other_columns_and_their_order_but_not_the_rows_order() -> None:
    expected = digest(ROWS, COLUMNS).sha256
    swapped = [{"response": row["response"], "query": row["query"]} for row in ROWS]
    assert digest(swapped, COLUMNS).sha256 == expected
    assert digest(ROWS, COLUMNS[::-1]).sha256 == expected
    assert digest(ROWS[::-1], COLUMNS).sha256 != expected
    assert digest(ROWS[:1], COLUMNS).sha256 != expected


def test_hash_of_nested_values() -> None:
    talk = [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}]
    other = [{"conversations": [{"value": "hi", "from": "human"}, {"value": "hello", "from": "gpt"}]}]
    assert digest(talk, ["conversations"]).sha256 == digest(other, ["conversations"]).sha256


def test_every_set_is_described() -> None:
    sets = manifest.load()
    assert set(data_sets()) | {"math", "humaneval", "mbpp", "mt_bench"} <= set(sets)
    for name, entry in sets.items():
        assert set(entry) <= {"hub", "config", "revision", "license", "files", "splits"}, name
        assert entry["license"] and entry["splits"], name
        assert entry["hub"] is None or re.fullmatch(r"[\w.-]+/[\w.-]+", entry["hub"]), name
        assert entry["hub"] is None or re.fullmatch(r"[0-9a-f]{40}|refs/convert/parquet", entry["revision"] or ""), name
        for digest in entry.get("files", {}).values():
            assert re.fullmatch(r"[0-9a-f]{64}", digest), name
        for split in entry["splits"].values():
            assert set(split) == {"rows", "columns", "sha256"}, name
            assert split["sha256"] is None or (re.fullmatch(r"[0-9a-f]{64}", split["sha256"]) and split["rows"]), name


def test_pinned_revision() -> None:
    assert manifest.pinned_revision("gsm8k") == manifest.load()["gsm8k"]["revision"]
    assert manifest.pinned_revision("toy") is None
    assert manifest.pinned_revision("no such set") is None


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    split = {"rows": 2, "columns": list(COLUMNS), "sha256": digest(ROWS, COLUMNS).sha256}
    monkeypatch.setattr(manifest, "load", lambda: {"known": {"splits": {"train": split}}})


def test_matches(known: None, capsys: pytest.CaptureFixture) -> None:
    result = manifest.check_rows("known", "train", digest(ROWS, COLUMNS))
    assert result == {"sha256": digest(ROWS, COLUMNS).sha256, "status": "matches"}
    assert capsys.readouterr().err == ""


def test_differs_warns_in_one_line_with_both_hashes(
    known: None, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = [ROWS[0], {"query": "x", "response": "y"}]
    result = manifest.check_rows("known", "train", digest(changed, COLUMNS))
    assert result["status"] == "differs"
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and printed.startswith("warning: ")
    assert result["sha256"] in printed and digest(ROWS, COLUMNS).sha256 in printed
    monkeypatch.setenv("RANK", "1")
    manifest.check_rows("known", "train", digest(changed, COLUMNS))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "split", "rows", "columns", "file_sha256"),
    [
        ("known", "train", ROWS[:1], COLUMNS, "aa"),
        ("known", "test", ROWS, COLUMNS, None),
        ("known", "train", ROWS, ("query",), None),
        ("another", "train", ROWS, COLUMNS, None),
    ],
    ids=["a part", "another split", "other columns", "another set"],
)
def test_unknown(
    known: None, capsys: pytest.CaptureFixture, name: str, split: str, rows: list, columns: tuple, file_sha256: str
) -> None:
    result = manifest.check_rows(name, split, digest(rows, columns), file_sha256=file_sha256)
    assert result["status"] == "unknown" and len(result["sha256"]) == 64
    assert capsys.readouterr().err == ""


def test_a_published_file_is_known_by_its_hash(known: None, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"files": {"a.json": "ab"}, "splits": {"train": {"rows": 9, "columns": list(COLUMNS), "sha256": None}}}
    monkeypatch.setattr(manifest, "load", lambda: {"known": entry})
    assert manifest.check_rows("known", "train", digest(ROWS, COLUMNS), file_sha256="ab")["status"] == "matches"
    assert manifest.check_rows("known", "train", digest(ROWS, COLUMNS), file_sha256="cd")["status"] == "unknown"


def test_a_hub_split_of_another_length_differs(known: None, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"splits": {"train": {"rows": 9, "columns": list(COLUMNS), "sha256": None}}}
    monkeypatch.setattr(manifest, "load", lambda: {"known": entry})
    assert manifest.check_rows("known", "train", digest(ROWS, COLUMNS))["status"] == "differs"


def test_the_committed_toy_file_is_the_recorded_one(root: Path) -> None:
    rows = read_jsonl(root / "data" / "toy" / "test.jsonl")
    assert manifest.check_rows("toy", "test", digest(rows, COLUMNS))["status"] == "matches"


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "split", "file"),
    [
        ("gsm8k", "train", "gsm8k/train.jsonl"),
        ("gsm8k", "test", "gsm8k/test.jsonl"),
        ("math500", "test", "math/math500.jsonl"),
        ("mbpp", "test", "mbpp/mbpp.jsonl"),
        ("mbpp_sanitized", "test", "mbpp/sanitized.jsonl"),
        ("mt_bench", "test", "mt_bench/mt_bench_question.jsonl"),
    ],
)
def test_real_files(real_data: Path, name: str, split: str, file: str) -> None:
    rows = read_jsonl(real_data / file)
    if name.startswith("mbpp"):
        rows = [row for row in rows if 11 <= row["task_id"] <= 510]
    columns = manifest.load()[name]["splits"][split]["columns"]
    assert manifest.check_rows(name, split, digest(rows, columns))["status"] == "matches"


def test_the_tasks_read_the_pinned_revisions():
    from eval.tasks import get_task

    for task, name in (("gsm8k", "gsm8k"), ("math", "math")):
        assert get_task(task).default_data() == f"{manifest.load()[name]['hub']}@{manifest.pinned_revision(name)}"
