"""A classifier's task of one's own: a mapping in the configuration, from the file's columns to a trained head."""

import collections
import json
import math

import pytest
import yaml

from ba_lora.config.layers import load_config
from ba_lora.errors import UserError
from ba_lora.experiments.evaluation_state import dev_sources
from ba_lora.glue import TASKS, find_task, hub_source
from ba_lora.models.tokenizer import load_tokenizer
from ba_lora.rows import Source
from data import nlu
from data.nlu import load_nlu_data
from eval.tasks.glue import to_examples
from eval.tasks.glue_x import find_set
from tests.support.tiny_nlu import tiny_overrides

TASS = {
    "name": "tass",
    "text": ["tweet"],
    "label": "polarity",
    "labels": ["N", "NEU", "P"],
    "metrics": ["macro_f1", "accuracy"],
}
WORDS = {"N": "malo", "NEU": "normal", "P": "bueno"}


def tweets(number=30):
    return [
        {"tweet_id": str(i), "tweet": f"muy {WORDS[label]} {i}", "polarity": label}
        for i, label in zip(range(number), "N NEU P P P".split() * number, strict=False)
    ]


def write_tsv(path, rows):
    lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def load(tiny_encoder, tmp_path):
    """Return a config whose task is a mapping, on a file of rows; `words` are typed."""

    def make(task, rows, *words, ending="jsonl", **data):
        source = tmp_path / f"rows.{ending}"
        if ending == "tsv":
            write_tsv(source, rows)
        else:
            source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        base = {
            "model": {"name": str(tiny_encoder), "dtype": "float32"},
            "nlu": {"task": task},
            "data": {"source": str(source), "dev_share": 0.2, "max_length": 64} | data,
        }
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(base))
        return load_config(tmp_path / "own.yaml", kind="nlu", overrides=[*words])

    return make


def rows_of(config):
    return load_nlu_data(config, load_tokenizer(config.model, generates=False))


def test_named_tasks_are_files():
    assert {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "toy_pairs"} == set(TASKS)
    mnli, stsb = find_task("mnli"), find_task("stsb")
    assert mnli.labels == ("entailment", "neutral", "contradiction") and list(mnli.dev_sets) == ["mnli", "mnli_mm"]
    assert stsb.is_regression and stsb.score_range == (0.0, 5.0) and stsb.num_labels == 1
    assert find_task(json.dumps(TASS)) == find_task(TASS) and find_task(TASS).is_own and not mnli.is_own


def test_a_task_may_be_typed_and_replaces_that_of_the_config(load):
    typed = "nlu.task={name: mood, text: [tweet], label: polarity, labels: [P, N, NEU]}"
    config = load(TASS | {"sets": {"other": {"label": "x"}}}, tweets(), typed)
    assert config.definition.labels == ("P", "N", "NEU") and config.definition.sets == {}
    assert rows_of(config).report["name"] == "mood"
    with pytest.raises(UserError, match="cannot read the overrides task={name: mood"):
        load(TASS, tweets(), "nlu.task={name: mood")


def test_the_hub_of_an_own_task_is_read(load, monkeypatch):
    asked = []

    def stream_rows(names, *, split, configs):
        asked.append((*names, split, configs(names[0].split("@")[0])))
        return iter(tweets()), Source(names[0], fingerprint="f")

    monkeypatch.setattr(nlu, "stream_rows", stream_rows)
    where = {"hub": "owner/tass", "subset": "es", "dev": {"tass": "test"}}
    config = load(TASS | where, tweets(), "data.source=null", "data.dev_share=null", "data.revision=abc")
    assert rows_of(config).report["source"] == "owner/tass@abc"
    assert asked == [("owner/tass@abc", split, ("es",)) for split in ("train", "test")]
    assert dev_sources(config) == {"tass": "owner/tass@abc"} and find_task("rte").hub_rows() == hub_source()
    with pytest.raises(UserError, match="hub is OWNER/NAME, and subset one of its configurations"):
        load(TASS | {"subset": "es"}, tweets())


@pytest.mark.parametrize("form", ["names", "ids", "text ids"])
def test_labels_are_names_or_ids(load, form):
    rows = tweets()
    for row in rows:
        number = TASS["labels"].index(row["polarity"])
        row["polarity"] = {"names": row["polarity"], "ids": number, "text ids": str(number)}[form]
    config = load(TASS, rows)
    assert config.run_id.startswith("own-tass-ba_lora-s42-")
    data = rows_of(config)
    assert data.report["dev"]["tass"]["rows"] == 6 and data.report["rows_used"] == 24
    assert data.report["classes"] == {"N": 5, "NEU": 5, "P": 14}
    assert data.report["dev"]["tass"]["classes"] == {"N": 1, "NEU": 1, "P": 4}


@pytest.mark.parametrize("seed", [0, 1])
def test_a_dev_share_has_the_classes_in_like_shares(load, seed):
    data = rows_of(load(TASS, tweets(100), f"data.split_seed={seed}"))
    assert data.report["classes"] == {"N": 16, "NEU": 16, "P": 48}
    assert data.report["dev"]["tass"]["classes"] == {"N": 4, "NEU": 4, "P": 12}


@pytest.mark.parametrize(
    ("labels", "raw", "name"),
    [
        ([1, 2, 3, 4, 5], "1.0", "1"),
        ([1, 2, 3, 4, 5], 5.0, "5"),
        ([1, 2, 3, 4, 5], "0", None),
        ([0, 2, 4], "1", None),
        ([0, 2, 4], 2, "2"),
        ([0.5, 1.5], "1.50", "1.5"),
        ([0.5, 1.5], 1, None),
        ([-1, 1], "-1", "-1"),
        (["-", "+"], "-", "-"),
        (["N", "P"], "1.0", "P"),
        (["N", "P"], "-1", None),
        (["false", "true"], True, "true"),
        (["False", "True"], False, "False"),
        (["no", "yes"], True, None),
    ],
)
def test_a_label_means_the_same_in_training_and_evaluation(labels, raw, name):
    task = find_task(TASS | {"labels": labels})
    found = task.label_id(raw)
    assert (None if found is None else task.labels[found]) == name
    of, label_map = find_set(json.dumps(task.definition), "tass")
    rows = [{"tweet": "x", "polarity": value} for value in (labels[0], raw, None, "", float("nan"))]
    if name is None:
        with pytest.raises(UserError, match="is no label of tass"):
            to_examples(rows, of, task=task, label_map=label_map, source="rows")
    else:
        read = to_examples(rows, of, task=task, label_map=label_map, source="rows")
        assert read.examples[1].label == name and read.num_unlabelled == 3


def test_a_missing_label_is_no_class():
    """Its text would be one's name."""
    task = find_task(TASS | {"labels": ["nan", "None"]})
    assert [task.label_id(value) for value in (None, math.nan, "None")] == [None, None, 1]


def test_auto_labels_are_sorted_and_kept_in_the_config(load, tmp_path):
    config = load(TASS | {"labels": "auto"}, tweets(), ending="tsv")
    assert config.nlu.task["labels"] == ["N", "NEU", "P"]
    stars = [{"tweet": f"{i}", "polarity": value} for i, value in enumerate([10, 2, 1.0, 2, 10, 1] * 5)]
    config = load(TASS | {"labels": "auto"}, stars)
    assert config.nlu.task["labels"] == ["1", "2", "10"], "numbers by their size"
    data = rows_of(config)
    names = [config.definition.labels[label] for label in data.train["labels"]]
    assert names == [str(int(stars[row]["polarity"])) for row in data.train["row"]], "a name, and no id"
    with pytest.raises(UserError, match="row 3 has no label: take the row out"):
        load(TASS | {"labels": "auto"}, [*stars[:3], {"tweet": "?", "polarity": math.nan}])


def test_a_pair_and_a_regression(load):
    rows = [{"a": f"eins {i}", "b": f"zwei {i}", "score": i % 6} for i in range(30)]
    task = {"name": "nah", "text": ["a", "b"], "label": "score", "range": [0, 5]}
    data = rows_of(load(task, rows))
    assert data.report["classes"] is None and max(data.train["labels"]) == 5.0
    rows[7]["score"] = 6
    with pytest.raises(UserError, match="row 7: label 6 is no score from 0 to 5"):
        rows_of(load(task, rows))
    for no_number in (True, "0_5"):
        rows[7]["score"] = no_number
        with pytest.raises(UserError, match=f"row 7: label {no_number!r} is no score from 0 to 5"):
            rows_of(load(task, rows))
    rows[7]["score"] = "-1"
    data = rows_of(load(task | {"range": [-5, 5]}, rows))
    assert -1 in [*data.train["labels"], *data.dev["nah"]["labels"]]
    own = find_task(task | {"range": [-5, 5]})
    of, label_map = find_set(json.dumps(own.definition), "nah")
    read = to_examples(rows, of, task=own, label_map=label_map, source="rows")
    assert len(read.examples) == 30 and read.examples[7].label == -1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": ["a", "b", "c"]}, "text must name the column of the text, or the two columns"),
        ({"label": ["a", "b"]}, "several labels a row are not supported"),
        ({"labels": ["N"]}, "at least two classes"),
        ({"labels": ["N", "n"]}, "alike but for capitals"),
        ({"labels": ["1", "1.0"]}, "two of them are the same number"),
        ({"labels": None}, "give labels .* or range"),
        ({"labels": None, "range": [5, 0]}, "two numbers, the lower first"),
        ({"metrics": ["accurcy"]}, "nlu.task.metrics=accurcy is unknown.*nearest: accuracy"),
        ({"metrics": ["pearson"]}, "pearson and spearman are a regression's"),
        ({"metrics": ["f1"]}, "f1 is of two classes, and there are 3"),
        ({"name": "sst2"}, "is the name of a task of configs/nlu/tasks"),
        ({"name": "a/b"}, "a word of letters"),
        ({"labls": []}, "unknown key labls.*nearest: labels"),
        ({"sets": {"other": {"map": [1]}}}, "sets.other.map=.1.: .their label: ours. is needed"),
        ({"sets": {"other": {"map": {"good": "X"}}}}, "sets.other.map leads to X"),
        ({"sets": {"other": {"map": {}}}}, "sets.other.map=.*their label: ours"),
        ({"sets": {"other": {"text": 5}}}, "sets.other.text=5: as many columns as text has are needed, 1"),
        ({"sets": {"other": {"text": ["a", "b"]}}}, "sets.other.text=.*: as many columns as text has are needed, 1"),
        ({"sets": {"other": {"label": ["a"]}}}, "sets.other.label=.*the name of one column"),
        ({"sets": {"../other": {}}}, "sets=.*a word of letters"),
        ({"dev": {"../tass": "test"}}, "dev=.*a word of letters"),
        ({"dev": {"tass": 5}}, "each name leads to a split"),
        ({"labels": [True, False]}, "labels=.True, False.: YAML reads yes, no, on and off as true .* in quotes"),
        ({"sets": {"other": {"map": {False: "N"}}}}, "YAML reads yes, no"),
        ({"name": False}, "name=False: YAML reads yes, no"),
        ({"text": [True]}, "text=.True.: YAML reads yes, no"),
        ({"labels": ["", "P"]}, "one of them is empty"),
        ({"label": "tweet"}, "label=tweet is a column of the text"),
        ({"text": ["a", "a"]}, "text names the column a twice"),
        ({"labels": None, "range": [0, float("inf")]}, "two numbers, the lower first"),
        ({"labels": None, "range": [0, 1], "metrics": None, "sets": {"o": {"map": {"a": "b"}}}}, "no labels to map"),
    ],
)
def test_a_wrong_task_is_told_before_anything_is_read(load, change, message):
    with pytest.raises(UserError, match=message) as error:
        load(TASS | change, tweets())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"polarity": "X"}, "row 3: label 'X' is out of range: labels are 0 .N., 1 .NEU., 2 .P."),
        ({"polarity": ["N", "P"]}, "row 3: several labels a row are not supported"),
        ({"polarity": None}, "row 3: label None is out of range"),
        ({"tweet": 5}, "row 3: tweet must be text"),
    ],
)
def test_a_wrong_row_is_named(load, change, message):
    rows = tweets()
    rows[3] |= change
    with pytest.raises(UserError, match=message):
        rows_of(load(TASS, rows))


def test_a_column_a_class_and_a_file_that_are_not_there(load, tmp_path):
    with pytest.raises(UserError, match="the task tass needs text, polarity: name them in nlu.task"):
        rows_of(load(TASS | {"text": "text"}, tweets()))
    with pytest.raises(UserError, match="no training row .* is of class MIX: take it out of nlu.task.labels"):
        rows_of(load(TASS | {"labels": ["N", "NEU", "P", "MIX"]}, tweets()))
    with pytest.raises(UserError, match="has no column polarity for the label; it has text"):
        load(TASS | {"labels": "auto"}, [{"text": "x"}])
    with pytest.raises(UserError, match="labels=auto reads the labels from local files"):
        load(TASS | {"labels": "auto"}, tweets(), "data.source=owner/set")
    with pytest.raises(UserError, match="has no rows of its own: name them, data.source=FILE"):
        load(TASS, tweets(), "data.source=null")
    with pytest.raises(UserError, match="other is a set of your own: name its file, eval.data.other=FILE"):
        load(TASS, tweets(), "eval.tasks=[other]")


def test_a_task_of_ones_own_is_trained_and_evaluated_elsewhere(load, train_nlu, tmp_path, tiny_encoder):
    """train_nlu.py, then eval.nlu on a set in the same columns and on one in its own."""
    from eval import nlu as eval_nlu

    config = load(
        TASS | {"labels": "auto", "sets": {"stars": {"text": "review", "label": "note", "map": {1: "N", 5: "P"}}}},
        tweets(40),
        ending="tsv",
    )
    assert config.nlu.name == "tass"
    words = [word for word in tiny_overrides(tiny_encoder) if not word.startswith("data.")]
    run = train_nlu(*words, config_path=tmp_path / "own.yaml", task=None, method="lora")
    score = json.loads((run / "scores" / "tass.json").read_text())
    assert list(score["metrics"]) == ["macro_f1", "accuracy"] and score["n"] == 8
    merged = json.loads((run / "merged" / "config.json").read_text())
    assert merged["id2label"] == {"0": "N", "1": "NEU", "2": "P"}
    alike = write_tsv(tmp_path / "alike.tsv", [row | {"polarity": row["polarity"].lower()} for row in tweets(9)])
    stars = tmp_path / "stars.jsonl"
    stars.write_text("".join(json.dumps({"review": "bueno", "note": note}) + "\n" for note in (1, 5, 5)))
    eval_nlu.main(
        ["--model", str(run), "--task", "tass", "alike", "stars", "--data", f"alike={alike}", f"stars={stars}"]
    )
    found = {name: json.loads((run / "scores" / f"{name}.json").read_text()) for name in ("alike", "stars")}
    assert found["alike"]["n"] == 9 and found["stars"]["n"] == 3 and "drop" in found["stars"]
    assert found["stars"]["label_map"] == {"1": "N", "5": "P"} and found["stars"]["of_task"] == "tass"
    lines = [json.loads(line) for line in (run / "predictions" / "stars.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [0, 2, 2]
    expected = collections.Counter(TASS["labels"].index(row["polarity"]) for row in tweets(9))
    labels = [json.loads(line)["label"] for line in (run / "predictions" / "alike.jsonl").read_text().splitlines()]
    assert collections.Counter(labels) == expected
