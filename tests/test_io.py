"""Folders written whole or not at all; damaged files of tensors are one line."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ba_lora.errors import UserError
from ba_lora.io import folder_atomic, load_tensors


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
