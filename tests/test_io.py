"""Folders written whole or not at all."""

import pytest

from ba_lora.io import folder_atomic


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
