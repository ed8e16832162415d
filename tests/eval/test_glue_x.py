"""eval/tasks/glue.py, glue_x.py: label maps row by row, columns of each published form, and what is refused."""

import json

import pytest

from ba_lora.errors import UserError
from ba_lora.glue import OUT_OF_DOMAIN, TASKS, find_task
from ba_lora.io import read_jsonl
from ba_lora.rows import load_rows
from eval.tasks.glue import Examples, own_sets, to_examples
from eval.tasks.glue_x import LABEL_MAPS, SETS, find_set, out_of_domain

PAIRS = [(task, name) for task, maps in LABEL_MAPS.items() for name in maps]


def examples(task: str, name: str, rows: list[dict]) -> Examples:
    of, label_map = find_set(task, name)
    return to_examples(rows, of, task=find_task(task), label_map=label_map, source="rows.jsonl")


def golds(task: str, name: str, rows: list[dict]) -> list:
    return [example.label for example in examples(task, name, rows).examples]


def pair(label: object, *, columns: tuple[str, str] = ("sentence1", "sentence2"), name: str = "label") -> dict:
    return {columns[0]: "a", columns[1]: "b", name: label}


def test_the_pairs_are_the_paper_s() -> None:
    assert {task: tuple(maps) for task, maps in LABEL_MAPS.items()} == OUT_OF_DOMAIN  # what a config may name
    assert {task: out_of_domain(task) for task in LABEL_MAPS} == {
        "sst2": ["imdb", "yelp", "amazon", "flipkart"],
        "cola": ["grammar_test"],
        "mnli": ["mnli_mm", "snli", "sick"],
        "qnli": ["newsqa"],
        "rte": ["mrpc", "qqp", "hans", "scitail"],
        "mrpc": ["qqp", "rte", "hans", "twitter"],
        "qqp": ["mrpc", "rte", "hans", "twitter"],
        "stsb": ["sick"],
    }
    assert out_of_domain("wnli") == []


PREMISE = ("premise", "hypothesis")
SICK = ("sentence_A", "sentence_B")
QUESTIONS = ("question1", "question2")


@pytest.mark.parametrize(
    ("task", "name", "rows", "expected"),
    [
        ("sst2", "imdb", [{"text": "x", "label": 0}, {"text": "x", "label": 1}], ["negative", "positive"]),
        ("sst2", "yelp", [{"text": "x", "label": 1}, {"sentence": "x", "text": "x", "label": 0}], "pn"),
        ("sst2", "amazon", [{"title": "no", "content": "x", "label": 0}], ["negative"]),
        (
            "sst2",
            "flipkart",
            [{"Summary": "x", "Sentiment": text} for text in ("positive", "neutral", "negative", " Neutral ")],
            ["positive", "negative", "negative", "negative"],
        ),
        ("sst2", "flipkart", [{"instruction": "-", "input": "x", "output": "Positive"}], ["positive"]),
        ("cola", "grammar_test", [{"sentence": "x", "label": 1}, {"sentence": "x", "label": 0}], "au"),
        ("mnli", "mnli_mm", [pair(label, columns=PREMISE) for label in (0, 1, 2)], "enc"),
        ("mnli", "snli", [pair(label, columns=PREMISE) for label in (2, 1, 0)], "cne"),
        ("mnli", "snli", [pair("contradiction", name="gold_label"), pair("-", name="gold_label")], "c"),
        ("mnli", "sick", [pair(label, columns=SICK) for label in (0, 1, 2)], "enc"),
        ("mnli", "sick", [pair("NEUTRAL", columns=SICK, name="entailment_label")], ["neutral"]),
        ("qnli", "newsqa", [{"question": "q", "sentence": "s", "label": "not_entailment"}], ["not_entailment"]),
        ("qnli", "newsqa", [{"question": "q", "sentence": "s", "label": 0}], ["entailment"]),
        ("rte", "mrpc", [pair(1), pair(0)], ["entailment", "not_entailment"]),  # label order flipped
        ("rte", "qqp", [pair(1, columns=QUESTIONS), pair(0, columns=QUESTIONS)], ["entailment", "not_entailment"]),
        ("rte", "hans", [pair(0, columns=PREMISE), pair(1, columns=PREMISE)], ["entailment", "not_entailment"]),
        ("rte", "hans", [pair("non-entailment", columns=PREMISE)], ["not_entailment"]),
        ("rte", "scitail", [pair(label, columns=PREMISE) for label in ("entails", "neutral")], "en"),
        ("mrpc", "qqp", [pair(1, columns=QUESTIONS), pair(0, columns=QUESTIONS)], ["equivalent", "not_equivalent"]),
        ("mrpc", "rte", [pair(0), pair(1)], ["equivalent", "not_equivalent"]),  # label order flipped
        ("mrpc", "hans", [pair(0, columns=PREMISE), pair(1, columns=PREMISE)], ["equivalent", "not_equivalent"]),
        ("mrpc", "twitter", [{"Sent_1": "a", "Sent_2": "b", "Label": 1}], ["equivalent"]),
        ("mrpc", "twitter", [pair("0")], ["not_equivalent"]),
        ("qqp", "mrpc", [pair(1), pair(0)], ["duplicate", "not_duplicate"]),
        ("qqp", "rte", [pair(0), pair(1)], ["duplicate", "not_duplicate"]),
        ("qqp", "hans", [pair(0, columns=PREMISE), pair(1, columns=PREMISE)], ["duplicate", "not_duplicate"]),
        ("qqp", "twitter", [pair(1), pair(0)], ["duplicate", "not_duplicate"]),
        ("stsb", "sick", [pair(3.3, columns=SICK, name="relatedness_score")], [2.3]),
        ("stsb", "sick", [pair(value, columns=SICK, name="relatedness_score") for value in (1, "5.0")], [0.0, 4.0]),
    ],
)
def test_label_maps_row_by_row(task: str, name: str, rows: list[dict], expected: list | str) -> None:
    found = golds(task, name, rows)
    if isinstance(expected, str):  # first letters
        assert [label[0] for label in found] == list(expected)
    else:
        assert found == pytest.approx(expected) if task == "stsb" else found == expected


def test_every_pair_of_the_table_has_a_row_above() -> None:
    marks = [mark for mark in test_label_maps_row_by_row.pytestmark if mark.name == "parametrize"]
    assert {(task, name) for task, name, *_ in marks[0].args[1]} == set(PAIRS)


@pytest.mark.parametrize(("task", "name"), PAIRS)
def test_maps_are_total_and_end_in_the_task_s_classes(task: str, name: str) -> None:
    of, label_map = find_set(task, name)
    if find_task(task).is_regression:
        assert of.score is not None
        return
    assert set(label_map) == set(of.classes.values())
    assert set(label_map.values()) == set(find_task(task).labels)


@pytest.mark.parametrize("task", [task for task in TASKS if task != "toy_pairs"])
def test_own_sets(task: str) -> None:
    for name, of in own_sets(task).items():
        labels = [2.5] if find_task(task).is_regression else range(len(find_task(task).labels))
        texts = {column: "x" for column in find_task(task).columns}
        found = golds(task, name, [{**texts, "label": label} for label in labels])
        assert found == ([2.5] if find_task(task).is_regression else list(find_task(task).labels))
        assert of.hub == "nyu-mll/glue" and of.split == find_task(task).dev_sets[name]


def test_ids_and_texts() -> None:
    rows = [{"premise": "p0", "hypothesis": "h0", "label": -1}, {"premise": "p1", "hypothesis": "h1", "label": 2}]
    found = examples("mnli", "snli", rows)
    assert [(example.task_id, example.texts) for example in found.examples] == [("snli/1", ("p1", "h1"))]
    assert found.num_unlabelled == 1


def test_empty_texts_are_counted_and_kept() -> None:
    rows = [{"sentence": "", "label": 1}, {"sentence": None, "label": 0}, {"sentence": "x", "label": 0}]
    found = examples("sst2", "imdb", rows)
    assert len(found.examples) == 3 and found.num_empty == 2 and found.examples[1].texts == ("",)


@pytest.mark.parametrize(
    ("task", "name", "rows", "message"),
    [
        ("sst2", "imdb", [{"text": "x", "label": 2}], "rows.jsonl, row 0: 2 is no label of imdb; its labels are 0, 1"),
        ("sst2", "imdb", [{"text": "x", "label": 0.5}], "0.5 is no label"),
        ("sst2", "imdb", [{"text": "x", "label": True}], "'true' is no label"),
        ("sst2", "imdb", [{"text": "x", "label": [1]}], "no label of imdb"),
        ("sst2", "flipkart", [{"Summary": "x", "Sentiment": "mixed"}], "'mixed' is no label of flipkart"),
        (
            "sst2",
            "imdb",
            [{"review": "x", "label": 1}],
            "imdb needs the columns text or sentence; found: review, label",
        ),
        ("sst2", "imdb", [{"text": "x"}], "imdb needs a label column called label; found: text"),
        ("sst2", "imdb", [{"text": "x", "label": 1}, {"text": "x"}], "row 1: the column label is missing"),
        ("sst2", "imdb", [{"text": 7, "label": 1}], "row 0: column text must be text, found 7"),
        ("mnli", "mnli_mm", [pair(-1, columns=PREMISE)] * 3, "none of the 3 rows has a label"),
        ("stsb", "stsb", [pair(5.5)], "5.5 is no score: a number from 0 to 5"),
        ("stsb", "sick", [pair(0.5, columns=SICK, name="relatedness_score")], "a number from 1 to 5"),
        ("stsb", "sick", [pair("high", columns=SICK, name="relatedness_score")], "'high' is no score"),
        ("stsb", "sick", [pair(1, columns=SICK)], "label column called relatedness_score"),
        ("sst2", "sick", [pair(1)], "no label map from sick to the classes of sst2: its sets are sst2, imdb, yelp"),
        ("wnli", "rte", [pair(1)], "no label map from rte"),
    ],
)
def test_refused_in_one_line(task: str, name: str, rows: list[dict], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        examples(task, name, rows)
    assert "\n" not in str(error.value)


def test_a_set_without_a_place_on_the_hub_asks_for_a_file() -> None:
    with pytest.raises(UserError, match="newsqa has no place on the hub: .*--data newsqa=FILE"):
        SETS["newsqa"].load()


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".csv", ".tsv"])
def test_the_same_rows_from_every_kind_of_file(tmp_path, suffix: str) -> None:
    import pandas

    rows = [
        {"premise": 'He said "no", twice.', "hypothesis": "Größe, é", "label": 0},
        {"premise": "it's 5 o'clock", "hypothesis": "", "label": 2},
    ]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == ".parquet":
        pandas.DataFrame(rows).to_parquet(path)
    elif suffix == ".csv":
        pandas.DataFrame(rows).to_csv(path, index=False)
    else:
        path.write_text("\n".join("\t".join(map(str, row)) for row in [rows[0], *(r.values() for r in rows)]))
    of, label_map = find_set("mnli", "snli")
    loaded, source = of.load(str(path))
    found = to_examples(loaded, of, task=find_task("mnli"), label_map=label_map, source=source.name)
    assert [(e.texts, e.label) for e in found.examples] == [
        (('He said "no", twice.', "Größe, é"), "entailment"),
        (("it's 5 o'clock", ""), "contradiction"),
    ]
    assert found.num_empty == 1 and len(source.sha256) == 64


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "a\tb\n1\t2\n1\n", "a.tsv, line 3: 1 values under a header of 2 columns"),
        ("a.csv", 'a,b\n1,"2"x\n', "a.csv, line 2: not a valid table"),
        ("a.csv", "", "a.csv is empty"),
        ("a.csv", "a,b\n", "a.csv is empty"),
        ("a.csv", b"a,b\n\xff\xfe,1\n", "a.csv is not UTF-8"),
        ("missing.csv", None, "no such file"),
    ],
)
def test_damaged_tables(tmp_path, name: str, content: str | bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        load_rows(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_the_manifest_tells_the_same_places() -> None:
    from data import manifest

    known = manifest.load()
    for name, of in SETS.items():
        entry = known[name]
        assert (entry["hub"], entry.get("config"), entry.get("revision")) == (of.hub, of.config, of.revision), name


@pytest.mark.real
@pytest.mark.parametrize(
    ("task", "name", "file", "expected"),
    [
        ("sst2", "imdb", "glue_x/imdb/test.jsonl", {"negative": 500, "positive": 500}),
        ("sst2", "yelp", "glue_x/yelp/test.jsonl", {"negative": 500, "positive": 500}),
        ("sst2", "amazon", "glue_x/amazon/test.jsonl", {"negative": 500, "positive": 501}),
        ("mnli", "sick", "glue_x/sick/test.jsonl", {"entailment": 1414, "neutral": 2793, "contradiction": 720}),
        ("rte", "mrpc", "glue/mrpc/test.jsonl", {"entailment": 1147, "not_entailment": 578}),
        ("qqp", "mrpc", "glue/mrpc/test.jsonl", {"duplicate": 1147, "not_duplicate": 578}),
        ("cola", "cola", "glue/cola/validation.jsonl", {"unacceptable": 324, "acceptable": 719}),
    ],
)
def test_real_files(real_data, task: str, name: str, file: str, expected: dict) -> None:
    rows = read_jsonl(real_data / file)
    found = examples(task, name, rows)
    counts = {label: sum(example.label == label for example in found.examples) for label in expected}
    assert counts == expected and sum(counts.values()) == len(rows)
    for row, example in zip(rows, found.examples, strict=True):
        assert example.texts[0] == row.get("sentence", row.get("sentence_A", row.get("sentence1")))


@pytest.mark.real
def test_real_sick_relatedness(real_data) -> None:
    rows = read_jsonl(real_data / "glue_x" / "sick" / "test.jsonl")
    found = golds("stsb", "sick", rows)
    assert len(found) == 4927 and min(found) == 0.0 and max(found) == 4.0
    assert found == [row["relatedness_score"] - 1 for row in rows]
