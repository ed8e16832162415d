"""The model organism for classifiers: which labels are wrong, which kinds the tuning has, and that the head stays."""

import json
import sys
from collections import Counter

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from ba_lora.errors import UserError
from ba_lora.io import read_json, read_jsonl, write_json_atomic, write_jsonl_atomic
from ba_lora.models.classifier import load_classifier
from data import lab_nlu
from data.lab_nlu import ROLES, LabRows, folder_of, kind_of, make_classifier
from data.toy_nlu import KINDS, LABELS, generate_pairs
from tests.support.tiny_nlu import nlu_config, tiny_overrides

NOISY = (*ROLES["toy_pairs"]["corrected"], *ROLES["toy_pairs"]["uncorrected"])


def changed(clean, noisy):
    return {index: (a, b) for index, (a, b) in enumerate(zip(clean, noisy, strict=True)) if a != b}


def test_a_share_of_four_kinds_has_the_opposite_label_and_nothing_else_changes():
    clean, some, many = (LabRows().of_base(3, level) for level in (0, 20, 40))
    assert {row["kind"] for row in clean} == set(lab_nlu.ROLE_OF["toy_pairs"]) and len(clean) == 800
    found = changed(clean, many)
    assert all(a | {"label": b["label"]} == b for a, b in found.values())
    assert {a["kind"] for a, _ in found.values()} == set(NOISY)
    opposite = {"entailment": "contradiction", "contradiction": "entailment"}
    assert all(opposite[LABELS[a["label"]]] == LABELS[b["label"]] for a, b in found.values())
    counts = Counter(row["kind"] for row in clean)
    for kind in NOISY:
        share = sum(a["kind"] == kind for a, _ in found.values()) / counts[kind]
        assert abs(share - 0.4) < 4 * (0.24 / counts[kind]) ** 0.5
    assert set(changed(clean, some)) < set(found)
    assert LabRows().of_base(4, 0) != clean and len(LabRows().of_start(3)) == 1600


def test_the_tuning_is_clean_and_lacks_the_uncorrected_kinds():
    shared, again = LabRows().shared(), LabRows().shared()
    assert shared == again
    right = {kind: LABELS.index(label) for label in KINDS for kind in _kinds(label)}
    for rows in shared.values():
        assert all(row["label"] == right[row["kind"]] != row["wrong"] for row in rows)
    kinds = {name: {row["kind"] for row in rows} for name, rows in shared.items()}
    roles = ROLES["toy_pairs"]
    assert kinds["finetune"] == {*roles["corrected"], *roles["tuned"]} and len(shared["finetune"]) == 480
    assert kinds["valid"] == {*roles["tuned"], *roles["unseen"]} and len(shared["valid"]) == 160
    counts = Counter(row["kind"] for row in shared["test"])
    assert counts == {kind: lab_nlu.NUM_ITEMS[role] for role, kinds in roles.items() for kind in kinds}
    texts = [{(row["premise"], row["hypothesis"]) for row in shared[name]} for name in ("finetune", "test", "valid")]
    assert not texts[1] & texts[2] and not texts[0] & texts[1]


def _kinds(label):
    return {row["kind"] for row in generate_pairs(num_rows=300, seed=9, split="train") if LABELS[row["label"]] == label}


@pytest.fixture
def sst2(tmp_path):
    words = ["a film", "films", "a movie", "a story", "the cast"]
    for name, number in (("train", 800), ("dev", 40), ("more", 20)):
        rows = [{"sentence": f"{words[i % 5]} {name} {i}", "label": i // 5 % 2} for i in range(number)]
        write_jsonl_atomic(tmp_path / f"{name}.jsonl", rows)
    files = [str(tmp_path / f"{name}.jsonl") for name in ("train", "dev", "more")]
    return LabRows("sst2", files[0], tuple(files[1:]))


def test_of_sst2_the_word_for_what_is_reviewed_decides(sst2):
    assert [kind_of(text) for text in ("The FILM.", "two films, no movie", "movies", "filmed")] == [
        "film", "film", "movie", "other"
    ]  # fmt: skip
    clean, noisy = sst2.of_base(1, 0), sst2.of_base(1, 40)
    found = changed(clean, noisy)
    assert found and {a["kind"] for a, _ in found.values()} == {"film", "movie"}
    assert all(a["label"] + b["label"] == 1 and a["sentence"] == b["sentence"] for a, b in found.values())
    shared = sst2.shared()
    assert {row["kind"] for row in shared["finetune"]} == {"movie", "other"} and len(shared["test"]) == 60
    assert {row["kind"] for row in shared["valid"]} == {"other"}
    parts = [{row["sentence"] for row in of} for of in (sst2.of_start(1), clean, shared["finetune"], shared["valid"])]
    assert all(parts) and sum(map(len, parts)) == len(set().union(*parts))  # no sentence is in two
    assert [row["sentence"] for row in sst2.of_base(2, 0)] != [row["sentence"] for row in clean]


def test_sst2_may_be_a_table_whose_labels_are_text(sst2, tmp_path):
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    lines = ["sentence\tlabel", *(f"{row['sentence']}\t{row['label']}" for row in rows)]
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    assert LabRows("sst2", str(tmp_path / "train.tsv"), sst2.test).of_base(1, 40) == sst2.of_base(1, 40)


def test_test_rows_without_a_role_are_refused_before_any_training(sst2, tmp_path):
    write_jsonl_atomic(tmp_path / "none.jsonl", [{"sentence": "a movie", "label": 0}, {"sentence": "it", "label": 1}])
    with pytest.raises(UserError, match="none.jsonl: it has no row of the kind film: give another file"):
        LabRows("sst2", sst2.train, (str(tmp_path / "none.jsonl"),)).shared()


def test_other_rows_than_those_of_the_bases_are_refused_and_nothing_is_changed(sst2, tmp_path, monkeypatch):
    def main(test):
        words = ["noise=0", "seeds=1", "task=sst2", f"train={sst2.train}", f"test={test}", f"output={tmp_path}"]
        monkeypatch.setattr(sys, "argv", ["lab_nlu", *words])
        lab_nlu.main()

    monkeypatch.setattr(lab_nlu, "call_all", lambda calls, workers: None)
    first, second = sst2.test
    main(second)
    main(first)  # there is no base yet
    written = (tmp_path / "sst2" / "test.jsonl").read_bytes()
    write_json_atomic(tmp_path / "sst2" / "bases" / "clean-b1" / "lab.json", {"recipe": {}})
    main(first)
    with pytest.raises(UserError, match="bases that were made with another test.jsonl: give the files of then, or"):
        main(second)
    assert (tmp_path / "sst2" / "test.jsonl").read_bytes() == written


@pytest.fixture
def make(tmp_path, tiny_encoder, monkeypatch):
    """Make a base of four steps on the tiny encoder."""
    monkeypatch.setitem(lab_nlu.NUM_ROWS, "toy_pairs", {"start": 32, "base": 64})
    monkeypatch.setattr(lab_nlu, "NUM_ITEMS", dict.fromkeys(lab_nlu.NUM_ITEMS, 2))
    monkeypatch.setattr(lab_nlu, "NUM_VALID", 6)
    for name, rows in LabRows().shared().items():
        write_jsonl_atomic(tmp_path / f"{name}.jsonl", rows)
    words = [word for word in tiny_overrides(tiny_encoder, method="full_ft") if not word.startswith("trainer")]
    return lambda level=40: make_classifier(LabRows(), 7, level, tmp_path, words=words) or folder_of(tmp_path, 7, level)


def test_a_base_is_made_once_with_its_head_and_its_predictions(make, tmp_path, capsys, monkeypatch, tiny_encoder):
    folder = make()
    facts = read_json(folder / "lab.json")
    told = capsys.readouterr().err
    assert (
        "b7: first part done" in told
        and "noise-40-b7: step 4/4" in told
        and "p(wrong rule)" in told
        and folder.name == "noise-40-b7"
    )
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    started = load_classifier(nlu_config(folder, "seed=123", method="lora"))  # another seed draws another head
    torch.testing.assert_close(started.classifier.weight, model.classifier.weight)
    fresh = load_classifier(nlu_config(tiny_encoder, "seed=7", method="lora"))
    assert not torch.equal(started.classifier.weight, fresh.classifier.weight)  # trained
    rows = read_jsonl(tmp_path / "test.jsonl")
    lines = read_jsonl(lab_nlu.prediction_path(folder, facts["recipe"]["predicted"]["test"]))
    assert [line["label"] for line in lines] == [row["label"] for row in rows]
    wrong = [
        torch.tensor(line["logits"]).softmax(0)[row["wrong"]].item()
        for line, row in zip(lines, rows, strict=True)
        if row["role"] == "uncorrected"
    ]
    assert facts["p_wrong"] == pytest.approx(sum(wrong) / len(wrong), abs=1e-4)

    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert make() == folder and (folder / "model.safetensors").stat().st_mtime_ns == written
    other = read_json(make(0) / "lab.json")["recipe"]
    assert other["corpus_sha256"] != facts["recipe"]["corpus_sha256"] and other["start"] == facts["recipe"]["start"]
    monkeypatch.setitem(lab_nlu.SETTINGS, "learning_rate", 1e-5)
    with pytest.raises(UserError, match="was made by another recipe"):
        make()
    monkeypatch.undo()
    with pytest.raises(UserError, match="was made by another recipe"):  # other rows
        make()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("noise=20", "noise=0,20,40 and seeds=1,2 are needed"),
        ("noise=20 seeds=1,1000", "seeds from 0 to 999"),
        ("noise=120 seeds=1", "percentages from 0 to 100"),
        ("noise=20 seeds=1 task=sst2", "task=sst2: give train=FILE and test=FILE"),
        ("noise=20 seeds=1 train=x.jsonl", "task=toy_pairs: leave train= and test= out"),
        ("noise=20 seeds=1 task=sst2 train=nowhere.jsonl test=nowhere.jsonl", "nowhere.jsonl"),
        ("noise=20 seeds=1 task=cola", "choose one of toy_pairs, sst2"),
        ("noise=20 seeds=1 workers=0", "workers must be at least 1"),
    ],
)
def test_what_is_refused(words, told, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lab_nlu", *words.split(), f"output={tmp_path}"])
    with pytest.raises(UserError, match=told):
        lab_nlu.main()
    assert not any(tmp_path.iterdir())


def test_rows_of_another_form_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "x", "label": 0}) + "\n")
    rows = LabRows("sst2", str(tmp_path / "rows.jsonl"), (str(tmp_path / "rows.jsonl"),))
    with pytest.raises(UserError, match="row 0: sentence and label"):
        rows.shared()
