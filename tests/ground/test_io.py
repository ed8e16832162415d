"""Files read with errors of one line; files and folders written whole or not at all."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ba_lora import io
from ba_lora.errors import UserError
from ba_lora.io import (
    append_line,
    file_atomic,
    folder_atomic,
    iterate_json,
    load_tensors,
    read_json,
    read_jsonl,
    read_object,
    read_whole_lines,
    sha256_file,
)


def test_a_folder_takes_the_place_of_the_old_one(tmp_path):
    for text in ("first", "second"):
        with folder_atomic(tmp_path / "lora") as folder:
            (folder / text).write_text(text)
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["second"]
    with pytest.raises(RuntimeError), folder_atomic(tmp_path / "lora") as folder:
        (folder / "third").touch()
        raise RuntimeError
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_what_a_kill_between_the_two_renames_took_away_comes_back(tmp_path, monkeypatch):
    with folder_atomic(tmp_path / "lora") as folder:
        (folder / "first").touch()
    real = os.replace

    def killed(source, target):
        if Path(target) == tmp_path / "lora":
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), folder_atomic(tmp_path / "lora") as folder:
        (folder / "second").touch()
        patch.setattr(os, "replace", killed)
    assert not (tmp_path / "lora").exists()
    with pytest.raises(RuntimeError), folder_atomic(tmp_path / "lora"):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["lora"] and (tmp_path / "lora" / "first").is_file()


def test_lines_stand_behind_a_torn_one(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_line(path, {"step": 1})
    with open(path, "a") as file:
        file.write('{"step": 2, "max_s')  # a full disk
    append_line(path, {"step": 3, "text": "ü"})
    with open(path, "a") as file:
        file.write('{"step": 4}')  # still being written
    assert read_whole_lines(path) == [{"step": 1}, {"step": 3, "text": "ü"}]
    assert read_whole_lines(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("name", ["lora", "lora[1]"])
def test_only_its_own_leftovers_are_removed(tmp_path, name):
    """Those of a folder with a longer name may belong to a process that is at work."""
    stale = tmp_path / f".{name}.0123abcd.tmp"
    others = [
        tmp_path / text for text in (f".{name}.rejected.0123abcd.tmp", f".{name}.mine.tmp", ".lora1.0123abcd.tmp")
    ]
    for folder in (stale, *others):
        folder.mkdir()
    with folder_atomic(tmp_path / name):
        pass
    assert not stale.exists() and all(folder.is_dir() for folder in others)


def special_files(folder):
    """Yield kind → path of a pipe, a socket, a device without end, and a link to it."""
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "socket"))
    (folder / "link").symlink_to("/dev/zero")
    names = {"a pipe": "pipe", "a socket": "socket", "a device": "link", "a folder": "."}
    return {kind: folder / name for kind, name in names.items()} | {"device": "/dev/zero"}


@pytest.mark.parametrize("read", [read_json, read_jsonl, sha256_file])
def test_only_regular_files_are_read(tmp_path, read):
    for kind, path in special_files(tmp_path).items():
        with pytest.raises(UserError, match=f"{kind}, a file is needed") as error:
            read(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("read", [read_json, read_jsonl])
def test_files_above_the_limit_are_refused_unread(tmp_path, read):
    with open(tmp_path / "large", "wb") as file:
        file.truncate(io.MAX_FILE_BYTES + 1)  # a hole: no disk space is needed
    with pytest.raises(UserError, match="has 4.0 GiB, and at most 4 GiB are read"):
        read(tmp_path / "large")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": "é"}]', encoding="utf-8-sig")
    lines = '{"a": 1}\n\n'
    (tmp_path / "a.jsonl").write_bytes(2 * lines.encode("utf-8-sig"))  # two files joined
    assert read_json(tmp_path / "a.json") == [{"a": "é"}]
    assert read_jsonl(tmp_path / "a.jsonl") == [{"a": 1}] * 2


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 100_000, '{"a": '])
def test_what_is_no_json_is_one_line(tmp_path, text):
    (tmp_path / "a").write_text(text)
    for read in (read_json, read_jsonl):
        with pytest.raises(UserError, match="/a.*: not .* JSON") as error:
            read(tmp_path / "a")
        assert "\n" not in str(error.value)
    assert read_object(tmp_path / "a") is None


@pytest.mark.parametrize("text", ['[{"a": 1},]', '[{"a": 1}, ]', '[,{"a": 1}]', '[{"a": 1}', "[{}] 1"])
def test_a_list_that_is_no_json_is_one_line_when_it_is_read_row_by_row(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="a.json, line 1: not valid JSON"):
        list(iterate_json(tmp_path / "a.json"))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_have(tmp_path, number):
    """Data of others may hold them; our own files never do, and what is read from them is written again."""
    (tmp_path / "a").write_text(f'{{"a": {number}}}')
    assert json.dumps(read_json(tmp_path / "a")) == json.dumps(read_jsonl(tmp_path / "a")[0])
    with pytest.raises(UserError, match=f"/a: {number} is no number that JSON knows"):
        read_json(tmp_path / "a", finite=True)
    assert read_object(tmp_path / "a") is None


def test_nothing_takes_the_place_of_a_pipe_or_a_device(tmp_path):
    """As root, a rename over /dev/null would replace it for the whole machine."""
    files = special_files(tmp_path)
    before = {path: os.stat(path) for path in files.values()}
    for path in [tmp_path / "pipe", tmp_path / "socket", tmp_path / "link"]:
        for write in (file_atomic, folder_atomic):
            with pytest.raises(UserError, match=f"cannot write {path}: it is a"), write(path):
                raise AssertionError
    with pytest.raises(UserError, match="it is a folder"), file_atomic(tmp_path):
        raise AssertionError
    assert {path: os.stat(path) for path in files.values()} == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: torch.save({"a": torch.ones(2)}, path), "is a pickle"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "damaged or cut short"),
        (lambda path: path.write_bytes(b""), "damaged or cut short"),
        (Path.unlink, "no such file"),
    ],
    ids=["pickle", "cut", "empty", "gone"],
)
def test_files_of_tensors_that_are_none_are_one_line(tmp_path, damage, message):
    path = tmp_path / "initial_factors.safetensors"
    save_file({"a": torch.ones(2)}, path)
    assert load_tensors(path)["a"].tolist() == [1, 1]
    damage(path)
    with pytest.raises(UserError, match=f"initial_factors.safetensors.*{message}|{message}.*initial_factors") as error:
        load_tensors(path)
    assert "\n" not in str(error.value)
