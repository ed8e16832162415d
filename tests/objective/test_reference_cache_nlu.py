"""A classifier's cached features: which runs share a file, and what a file must be to be used."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from ba_lora.errors import UserError
from ba_lora.objective.reference_cache.features import CachedFeatures, cached_features, features_key
from ba_lora.objective.reference_cache.files import write_claimed
from ba_lora.training.arguments import autocast_precision
from data.nlu import load_nlu_data
from tests.support.tiny import arguments
from tests.support.tiny_nlu import nlu_config, publish


@pytest.fixture
def encoder(tiny_encoder, tmp_path):
    """An encoder of one's own."""
    return shutil.copytree(tiny_encoder, tmp_path / "encoder")


def change_weights(folder):
    """Let the folder's weights differ by one bit, their size and the folder's name being what they were."""
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))


def rows_of(config, folder):
    return load_nlu_data(config, AutoTokenizer.from_pretrained(folder)).train


# ---- which runs share a file ----


def test_methods_heads_and_seeds_share_a_file(encoder, tmp_path):
    paths = set()
    for method, words in (
        ("ba_lora", []),
        ("ba_lora", ["seed=7", "regularizers.reference_head=probe"]),
        ("ba_lora_iclr2026", ["adapter.rank=2", "regularizers.features=pooled"]),
    ):
        config = nlu_config(encoder, f"reference.cache={tmp_path / 'cache'}", *words, method=method)
        paths.add(cached_features(config, rows_of(config, encoder)).path)
    assert len(paths) == 1 and paths.pop().parent == tmp_path / "cache"


def test_a_file_belongs_to_the_weights_and_not_to_the_folders_name(encoder, tmp_path):
    config = nlu_config(encoder)
    rows = rows_of(config, encoder)
    before = features_key(config, rows)
    copy = shutil.copytree(encoder, tmp_path / "copy")
    assert features_key(nlu_config(copy), rows) == before
    change_weights(encoder)
    after = features_key(config, rows)
    assert {name for name in before if before[name] != after[name]} == {"model.sha256"}
    assert CachedFeatures(tmp_path, before).path != CachedFeatures(tmp_path, after).path


def test_a_file_belongs_to_the_commit_that_the_hub_has_now(encoder, tmp_path, monkeypatch):
    """A base without a pinned revision, before and after its author's next commit."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    config, rows, keys = nlu_config(encoder, "model.name=someone/encoder"), rows_of(nlu_config(encoder), encoder), []
    for commit in ("a" * 40, "b" * 40):
        publish(encoder, tmp_path / "hub", name="someone/encoder", commit=commit)
        keys.append(features_key(config, rows))
    assert [key["model.revision"] for key in keys] == ["a" * 40, "b" * 40]
    pinned = nlu_config(encoder, "model.name=someone/encoder", f"model.revision={'a' * 40}")
    assert features_key(pinned, rows) == keys[0]


def test_a_file_belongs_to_all_that_the_encoder_reads(encoder):
    """Ids, segments and mask of every row in their order; labels are no part of it."""
    config = nlu_config(encoder)
    rows = rows_of(config, encoder)
    key = features_key(config, rows)
    assert features_key(config, rows.map(lambda row: {"labels": 0})) == key
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        other = rows.map(lambda row, name=name: {name: [*row[name][:-1], 1 - row[name][-1]]})
        assert {entry for entry, value in features_key(config, other).items() if value != key[entry]} == {
            f"rows.{name}"
        }
    assert features_key(config, rows.select(range(23, -1, -1)))["rows.input_ids"] != key["rows.input_ids"]
    for word in ("model.dtype=bfloat16", "model.attention=eager"):
        assert features_key(nlu_config(encoder, word), rows) != key


def test_a_file_belongs_to_its_autocast(encoder, tmp_path):
    """Which rounds the products of an adapter, so that the adapter counts, too; without it nothing says so."""
    rows = rows_of(nlu_config(encoder), encoder)
    pissa, lora = (nlu_config(encoder, method=method) for method in ("ba_lora", "lora_ba"))
    without, under = (features_key(pissa, rows, autocast=precision) for precision in ("no", "bf16"))
    assert "autocast" not in without and without == features_key(lora, rows)
    assert {name for name in under if under[name] != without.get(name)} == {"autocast", "adapter"}
    assert under != features_key(lora, rows, autocast="bf16") != features_key(lora, rows, autocast="fp16")
    assert [autocast_precision(arguments(tmp_path, bf16=on)) for on in (True, False)] == ["bf16", "no"]


# ---- what a file must be ----


@pytest.fixture
def features(tmp_path):
    return CachedFeatures(tmp_path / "cache", {"model.sha256": "a" * 64, "rows": 6})


@pytest.fixture
def pooled():
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def test_what_is_written_is_read_and_may_be_read_by_whoever_may_read_the_folder(features, pooled):
    features.write(pooled)
    assert torch.equal(features.read(num_rows=6, hidden_size=4), pooled)
    assert [file.name for file in features.folder.iterdir()] == [features.path.name]
    assert features.path.stat().st_mode & 0o777 == features.folder.stat().st_mode & 0o666


def truncate(features, pooled):
    features.path.write_bytes(features.path.read_bytes()[:-10])


def empty(features, pooled):
    features.path.write_bytes(b"")


def change_a_byte(features, pooled):
    content = features.path.read_bytes()
    features.path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def without_claim(features, pooled):
    save_file({"pooled": pooled}, features.path)


def of_another_encoder(features, pooled):
    other = CachedFeatures(features.folder, features.key | {"model.sha256": "b" * 64})
    other.write(pooled)
    other.path.rename(features.path)


def of_another_cache(features, pooled):
    write_claimed(features.path, {"pooled": pooled}, {"cache": "c", "file": features.path.name})


def fewer_rows(features, pooled):
    features.write(pooled[:5])


def another_width(features, pooled):
    features.write(pooled.repeat(1, 2))


def another_dtype(features, pooled):
    features.write(pooled.half())


def another_tensor(features, pooled):
    write_claimed(features.path, {"logits": pooled}, {"key": features.key})


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (truncate, r"damaged"),
        (empty, r"damaged"),
        (change_a_byte, r"other contents than were written"),
        (without_claim, r"no file of this reference cache"),
        (of_another_cache, r"no file of this reference cache"),
        (of_another_encoder, r"made for something else \(model.sha256 is b{12}… there, a{12}… here\)"),
        (fewer_rows, r"holds .*float32 \[5, 4\].* where .*float32 \[6, 4\].* is needed"),
        (another_width, r"holds .*float32 \[6, 8\].* where .*float32 \[6, 4\].* is needed"),
        (another_dtype, r"holds .*float16 \[6, 4\].* where .*float32 \[6, 4\].* is needed"),
        (another_tensor, r"holds .*logits.* where .*pooled.* is needed"),
    ],
)
def test_any_other_file_is_refused_and_left_alone(features, pooled, spoil, cause):
    features.write(pooled)
    spoil(features, pooled)
    content = features.path.read_bytes()
    with pytest.raises(UserError, match=rf"{features.path} .*{cause}.*: delete it, .* reference.cache to") as caught:
        features.read(num_rows=6, hidden_size=4)
    assert "\n" not in str(caught.value)
    assert features.path.read_bytes() == content


# ---- the whole command ----


def test_runs_share_a_file_until_the_weights_change(train_nlu, encoder, tmp_path):
    """Two methods and seeds, one file; changed weights, or autocast, another; a damaged one ends the run."""
    cache = tmp_path / "cache"
    words = [f"reference.cache={cache}", "trainer.num_train_epochs=1", "export.merged=false"]
    train_nlu(*words, model=encoder, name="first")
    (file,) = cache.iterdir()
    written = file.stat().st_mtime_ns
    assert load_file(file)["pooled"].shape == (24, 32)
    train_nlu(*words, "seed=7", model=encoder, method="ba_lora_iclr2026", name="second")
    assert list(cache.iterdir()) == [file] and file.stat().st_mtime_ns == written
    change_weights(encoder)
    train_nlu(*words, model=encoder, name="third")
    (other,) = set(cache.iterdir()) - {file}
    train_nlu(*words, "trainer.bf16=true", model=encoder, name="autocast")
    assert len(set(cache.iterdir()) - {file, other}) == 1
    other.write_bytes(other.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"{other} is missing or damaged"):
        train_nlu(*words, "seed=8", model=encoder, name="fourth")
