"""ba_lora/rows.py: what is recorded of where the hub's rows came from."""

import datasets
import pytest
from datasets.arrow_writer import ArrowWriter

from ba_lora.errors import UserError
from ba_lora.rows import load_rows
from eval.score import grader_versions
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
