"""NLU rows: columns, labels, splits, shares, and what is refused; the self-made pairs."""

import csv
import json

import pytest
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, GPT2TokenizerFast

from ba_lora.config.schema import ModelConfig
from ba_lora.errors import UserError
from ba_lora.glue import HUB, HUB_REVISION, TASKS, hub_source
from ba_lora.models.tokenizer import encode_texts, load_tokenizer
from ba_lora.rows import Source
from data import toy_nlu
from data.nlu import load_nlu_data
from tests.support.tiny_nlu import ARCHITECTURES, nlu_config, save_tiny_encoder


@pytest.fixture(scope="module")
def tokenizer(tiny_encoder):
    return AutoTokenizer.from_pretrained(tiny_encoder)


@pytest.fixture
def load(tiny_encoder, tokenizer, tmp_path):
    """`load(rows, "key=value", …, task="sst2")`: rows as the training file, and the same as the dev file."""
    from ba_lora.config.layers import load_config
    from tests.conftest import ROOT

    def run(rows, *overrides, task="sst2", suffix=".jsonl", dev=True):
        file = tmp_path / f"rows{suffix}"
        if suffix == ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            with open(file, "w", newline="") as handle:
                form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None} if suffix == ".tsv" else {}
                writer = csv.DictWriter(handle, list(rows[0]), **form)
                writer.writeheader()
                writer.writerows(rows)
        words = [f"data.source={file}", f"model.name={tiny_encoder}", *overrides]
        words += [f"data.dev.{next(iter(TASKS[task].dev_sets))}={file}"] if dev else []
        return load_nlu_data(
            load_config(ROOT / "configs/nlu/minilm.yaml", task=task, overrides=words, kind="nlu"), tokenizer
        )

    return run


@pytest.mark.parametrize("base", ARCHITECTURES)
def test_something_stands_between_the_texts_of_a_pair(tmp_path, base):
    """Whatever the tokenizer's own form is; GPT-2's has none and gets its EOS, which counts as one of the tokens."""
    tokenizer = load_tokenizer(ModelConfig(name=str(save_tiny_encoder(tmp_path, base))), generates=False)
    pairs = [("ab", "c"), ("a", "bc"), ("a" * 300, "b" * 300)]
    rows, cut = encode_texts(tokenizer, pairs, max_length=20)
    first, second, long = rows["input_ids"]
    b, c = (tokenizer.convert_tokens_to_ids(letter) for letter in "bc")
    assert first != second and set(first[first.index(b) + 1 : first.index(c)]) & set(tokenizer.all_special_ids)
    assert len(long) == 20 and cut == 1
    alone = encode_texts(tokenizer, [("ab",)], max_length=20)[0]["input_ids"][0]
    if base == "gpt2-xl":
        assert tokenizer.decode(first) == "ab[SEP]c" and tokenizer.decode(alone) == "ab"
        assert tokenizer.decode(long) == "a" * 9 + "[SEP]" + "b" * 10


def test_gpt2s_own_tokenizer_separates_pairs_also_when_it_is_exported(tmp_path):
    words = sorted(ByteLevel.alphabet())
    (tmp_path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate([*words, "<|endoftext|>"])}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    GPT2TokenizerFast(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")).save_pretrained(tmp_path / "gpt2")
    bare = AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    assert bare.decode(bare("ab", "c")["input_ids"]) == "abc"  # what ours is made against
    tokenizer = load_tokenizer(ModelConfig(name=str(tmp_path / "gpt2")), generates=False)
    assert tokenizer.decode(tokenizer("ab", "c")["input_ids"]) == "ab<|endoftext|>c"
    tokenizer.save_pretrained(tmp_path / "exported")
    exported = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert exported("ab", "c")["input_ids"] == tokenizer("ab", "c")["input_ids"]
    for_text = load_tokenizer(ModelConfig(name=str(tmp_path / "gpt2")))
    assert for_text.decode(for_text("ab", "c")["input_ids"]) == "abc"


def sst2_rows(num_rows=10, **changes):
    return [{"sentence": f"film {index}", "label": index % 2} | changes for index in range(num_rows)]


def test_rows_become_tokens_labels_and_numbers(load, tokenizer):
    data = load(sst2_rows())
    row = data.train[3]
    assert tokenizer.decode(row["input_ids"]).endswith("film 3[SEP]") and (row["labels"], row["row"]) == (1, 3)
    assert data.heldout is None and len(data.dev["sst2"]) == 10
    assert data.report["classes"] == {"negative": 5, "positive": 5}
    assert data.report["rows_used"] == 10 and data.report["sha256"] and data.report["dev"]["sst2"]["rows"] == 10


def test_pairs_keep_their_order(load, tokenizer):
    rows = [{"premise": f"p{i}", "hypothesis": f"h{i}", "label": i % 3} for i in range(6)]
    text = tokenizer.decode(load(rows, task="mnli").train[4]["input_ids"])
    assert text.index("p4") < text.index("h4")


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_tables_and_label_names(load, suffix):
    rows = [{"sentence": 'a "fine" film', "label": "positive"}, {"sentence": "dull", "label": "0"}]
    assert load(rows, suffix=suffix).train["labels"] == [1, 0]


@pytest.mark.parametrize(
    ("rows", "task", "message"),
    [
        (sst2_rows(label=2), "sst2", "row 0: label 2 is out of range: labels are 0 \\(negative\\), 1 \\(positive\\)"),
        (sst2_rows(label=-1), "sst2", "row 0 has no label \\(−1\\), as in GLUE's test splits"),
        (sst2_rows(label=0.5), "sst2", "label 0.5 is out of range"),
        (sst2_rows(label="fair"), "sst2", "label 'fair' is out of range"),
        (sst2_rows(label=None), "sst2", "label None is out of range"),
        (sst2_rows(label=1), "sst2", "all 10 training rows of .* are of class positive: there is nothing to learn"),
        (sst2_rows(sentence="  "), "sst2", "no row of .* is left to train on: all are empty"),
        (sst2_rows(sentence=5), "sst2", "row 0: sentence must be text"),
        (sst2_rows(), "mrpc", "has the columns label, sentence; the task mrpc needs sentence1, sentence2, label"),
        ([*sst2_rows(2), {"sentence": "x"}], "sst2", "row 2 lacks a column"),
        ([{"sentence1": "a", "sentence2": "b", "label": 5.5}], "stsb", "label 5.5 is no score from 0 to 5"),
        ([{"sentence1": "a", "sentence2": "b", "label": -1.0}], "stsb", "has no label"),
    ],
)
def test_bad_rows_are_refused_in_one_line(load, rows, task, message):
    with pytest.raises(UserError, match=message) as error:
        load(rows, task=task)
    assert "\n" not in str(error.value)


def test_empty_texts_are_left_out_of_training_and_kept_in_dev(load):
    rows = sst2_rows()
    rows[4]["sentence"] = " "
    data = load(rows)
    assert 4 not in data.train["row"] and 4 in data.dev["sst2"]["row"]
    assert data.report["rows_empty"] == 1 and data.report["dev"]["sst2"]["rows_empty"] == 1


def test_long_pairs_are_cut_and_counted(load, tokenizer):
    rows = [{"premise": "p" * 200, "hypothesis": "short", "label": i % 3} for i in range(6)]
    rows[2]["premise"] = "p"
    data = load(rows, "data.max_length=40", task="mnli")
    assert data.report["rows_cut"] == 5 and data.report["dev"]["mnli"]["rows_cut"] == 5
    assert {len(ids) for ids in data.train["input_ids"]} == {40, 1 + 5 + 3}
    assert "short" in tokenizer.decode(data.train[0]["input_ids"])  # the longer of the two is cut


def test_a_length_that_the_model_cannot_take_is_refused(load, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "model_max_length", 64)
    assert len(load(sst2_rows(), "data.max_length=64").train) == 10
    with pytest.raises(UserError, match="data.max_length=65 is more than the 64 tokens that .* takes: lower it"):
        load(sst2_rows(), "data.max_length=65")


def test_the_held_out_part_is_of_training_rows_and_the_same_for_every_seed(load):
    rows = sst2_rows(100)
    first, second = (load(rows, "nlu.selection=tuned", f"seed={seed}") for seed in (1, 2))
    assert len(first.heldout) == 10 and first.report["rows_heldout"] == 10
    assert sorted([*first.train["row"], *first.heldout["row"]]) == list(range(100))
    assert first.heldout["row"] == second.heldout["row"]
    assert load(rows, "nlu.selection=tuned", "data.split_seed=1").heldout["row"] != first.heldout["row"]


def test_a_share_of_the_training_file_can_be_the_dev_set(load):
    data = load(sst2_rows(50), "data.dev_share=0.2", dev=False)
    assert len(data.dev["sst2"]) == 10 and not set(data.dev["sst2"]["row"]) & set(data.train["row"])
    with pytest.raises(UserError, match="has no dev set with it: add data.dev.sst2=FILE, or data.dev_share"):
        load(sst2_rows(), dev=False)


def test_a_dev_share_that_would_not_be_used_is_refused(load, tiny_encoder, tokenizer):
    with pytest.raises(UserError, match="data.dev_share=0.2 would not be used, data.dev names the dev set"):
        load(sst2_rows(50), "data.dev_share=0.2")
    with pytest.raises(UserError, match="data.dev_share=0.2 would not be used, sst2 has a dev set of its own"):
        load(sst2_rows(50), "data.dev_share=0.2", "data.source=null", dev=False)  # the hub's
    with pytest.raises(UserError, match="data.dev_share=0.2 would not be used, toy_pairs has a dev set of its own"):
        load_nlu_data(nlu_config(tiny_encoder, "data.dev_share=0.2"), tokenizer)


def test_class_shares(load):
    rows = [{"premise": "p", "hypothesis": "h", "label": i % 3} for i in range(300)]
    data = load(rows, "data.class_shares={contradiction: 0.02}", "data.num_rows=150", task="mnli")
    assert data.report["classes"] == {"entailment": 74, "neutral": 73, "contradiction": 3}
    assert data.report["dev"]["mnli"]["classes"]["contradiction"] == 100  # the dev set stays as it is
    again = load(rows, "data.class_shares={contradiction: 0.02}", "data.num_rows=150", "seed=9", task="mnli")
    assert again.train["row"] == data.train["row"]


def test_num_rows_takes_the_first_or_a_seeded_sample(load):
    assert load(sst2_rows(20), "data.num_rows=6").train["row"] == [0, 1, 2, 3, 4, 5]
    sample = load(sst2_rows(20), "data.num_rows=6", "data.sample_seed=1").train["row"]
    assert len(sample) == 6 and sample == sorted(sample) and sample != [0, 1, 2, 3, 4, 5]


def test_real_glue_files_are_read(real_data, load, tiny_encoder, tokenizer):
    from ba_lora.config.layers import load_config
    from tests.conftest import ROOT

    counts = {"cola": (8551, 1043), "sst2": (12000, 872), "mrpc": (4076, 1725), "stsb": (5749, 1500)}
    for task, (train, dev) in counts.items():
        folder = real_data / "glue" / task
        dev_file = folder / ("test.jsonl" if task == "mrpc" else "validation.jsonl")
        words = [f"data.source={folder / 'train.jsonl'}", f"data.dev.{task}={dev_file}", "data.max_length=512"]
        config = load_config(ROOT / "configs/nlu/minilm.yaml", task=task, overrides=words, kind="nlu")
        report = load_nlu_data(config, tokenizer).report
        assert (report["rows_read"], report["dev"][task]["rows"]) == (train, dev)
        assert report["rows_used"] == train - report["rows_empty"]


# ---- the self-made pairs ----


def test_pairs_are_the_same_on_every_call_and_only_appended_to():
    rows = toy_nlu.generate_pairs(num_rows=40, seed=3, split="train")
    assert rows == toy_nlu.generate_pairs(num_rows=60, seed=3, split="train")[:40]
    assert rows != toy_nlu.generate_pairs(num_rows=40, seed=4, split="train")
    assert {row["kind"] for row in toy_nlu.generate_pairs(num_rows=400, seed=0, split="train")} == {
        "synonym", "passive", "part", "detail", "other_fact", "number", "colour", "place", "opposite", "negation",
    }  # fmt: skip


def test_the_splits_share_no_object_and_no_premise():
    train, test = (toy_nlu.generate_pairs(num_rows=500, seed=0, split=split) for split in toy_nlu.SPLITS)
    assert not set(toy_nlu.OBJECTS["train"]) & set(toy_nlu.OBJECTS["test"])
    assert not {row["premise"] for row in train} & {row["premise"] for row in test}


def test_noise_changes_labels_alone_and_at_its_rate():
    clean = toy_nlu.generate_pairs(num_rows=2000, seed=0, split="train")
    noisy = toy_nlu.generate_pairs(num_rows=2000, seed=0, split="train", label_noise=0.2)
    assert [row["hypothesis"] for row in clean] == [row["hypothesis"] for row in noisy]
    assert all(row["label"] == row["true_label"] for row in clean)
    assert 0.17 < sum(row["label"] != row["true_label"] for row in noisy) / 2000 < 0.23
    only = toy_nlu.generate_pairs(num_rows=500, seed=0, split="train", label_noise=0.5, noisy_labels=["neutral"])
    assert {row["true_label"] for row in only if row["label"] != row["true_label"]} == {1}


def test_imbalance_makes_contradiction_rare():
    rows = toy_nlu.generate_pairs(num_rows=3000, seed=0, split="train", imbalance=0.9)
    counts = [sum(row["label"] == label for row in rows) for label in range(3)]
    assert counts[2] == pytest.approx(100, abs=30) and counts[0] == pytest.approx(1450, abs=120)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "dev"}, "unknown split"),
        ({"num_rows": 0}, "positive integer"),
        ({"label_noise": 1.5}, "label_noise is 1.5"),
        ({"imbalance": 1.0}, "imbalance is 1.0"),
        ({"noisy_labels": ["maybe"]}, "unknown label 'maybe'"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        toy_nlu.generate_pairs(**({"num_rows": 5, "seed": 0, "split": "train"} | changes))


def test_the_toys_settings_reach_it(tiny_encoder, tokenizer):
    config = nlu_config(tiny_encoder, "data.num_rows=600", "data.toy.imbalance=0.9", "data.toy.dev_rows=50")
    report = load_nlu_data(config, tokenizer).report
    assert report["classes"]["contradiction"] < 50 and report["dev"]["toy_pairs"]["rows"] == 50
    with pytest.raises(UserError, match="data.toy.imbalance is 2.0"):
        load_nlu_data(nlu_config(tiny_encoder, "data.toy.imbalance=2.0"), tokenizer)


def test_the_hubs_commit_is_kept_with_every_set(tokenizer, tiny_encoder, monkeypatch):
    """And goes over into the dev sets' scores, where a report compares it."""
    from ba_lora.config.layers import load_config
    from data import nlu
    from eval.nlu_scores import dev_scores
    from tests.conftest import ROOT

    asked = []

    def stream_rows(names, *, split, configs):
        (name,) = names
        asked.append((name, split, configs(HUB)))
        rows = [{"sentence1": "a", "sentence2": "b", "label": label} for label in (0, 1)]
        return iter(rows), Source(name, fingerprint="f", revision=name.split("@")[1])

    monkeypatch.setattr(nlu, "stream_rows", stream_rows)
    words = [f"model.name={tiny_encoder}"]
    config = load_config(ROOT / "configs/nlu/minilm.yaml", task="rte", overrides=words, kind="nlu")
    report = load_nlu_data(config, tokenizer).report
    assert asked == [(hub_source(), split, ("rte",)) for split in ("train", "validation")]
    kept = {"hub": hub_source(), "fingerprint": "f", "revision": HUB_REVISION}
    assert report["data_sha256"] == report["dev"]["rte"]["data_sha256"] == kept
    lines = [{"task_id": f"rte/{row}", "label": row, "prediction": row, "logits": [0, row]} for row in (0, 1)]
    monkeypatch.setattr("eval.nlu_scores.read_jsonl", lambda path: lines)
    assert dev_scores(ROOT, config, report)["rte"]["data_sha256"] == kept
