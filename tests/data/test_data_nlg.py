"""Training rows: labels only on the response and its EOS, what is cut or dropped is counted, bad files say why."""

import copy
import dataclasses
import json

import pytest
from transformers import AutoTokenizer

from ba_lora import prompts
from ba_lora.config.schema import ModelConfig
from ba_lora.config.schema_nlg import NLGDataConfig
from ba_lora.errors import UserError
from ba_lora.locks import try_lock
from ba_lora.models.tokenizer import load_tokenizer
from ba_lora.prompts import build_prompt
from data import sets
from data.encoding import encode
from data.nlg import load_training_data
from data.tokenized import rows_on_disk
from tests.support.tiny import save_tiny_model


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(ModelConfig(name=str(tiny_model)))


def labelled_text(item, tokenizer):
    return tokenizer.decode([label for label in item["labels"] if label != -100])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ROWS = [{"query": f"What is {n} + 1?", "response": f"It is {n + 1}. The answer is: {n + 1}"} for n in range(6)]


def test_labels_are_the_response_and_its_eos_alone(tokenizer):
    item = encode("What is 1 + 1?", "2", tokenizer, max_length=400)
    assert labelled_text(item, tokenizer) == " 2</s>"
    assert tokenizer.decode(item["input_ids"]) == "<s>" + build_prompt("What is 1 + 1?") + " 2</s>"
    prompt = tokenizer(build_prompt("What is 1 + 1?"))["input_ids"]
    assert item["input_ids"][: len(prompt)] == prompt  # what generation will start from
    assert item["labels"][: len(prompt)] == [-100] * len(prompt)


def test_eos_is_labelled_when_it_is_also_the_padding(tiny_model, tmp_path):
    """pad = eos: a mask by token value would drop the EOS of the response and teach the model never to stop."""
    folder = save_tiny_model(tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    bare = load_tokenizer(ModelConfig(name=str(folder)))
    assert bare.pad_token_id == bare.eos_token_id
    from transformers import DataCollatorForSeq2Seq

    items = [encode("Add.", "2", bare, max_length=400), encode("Add these.", "222", bare, max_length=400)]
    for item in items:
        for name in ("response_length", "cut"):
            item.pop(name)
    batch = DataCollatorForSeq2Seq(bare, label_pad_token_id=-100)(items)
    short = batch["labels"][0].tolist()
    assert short.count(bare.eos_token_id) == 1  # the real one; the padding is −100
    assert batch["attention_mask"][0].sum() == items[0]["length"]
    assert batch["input_ids"].shape[1] == max(item["length"] for item in items)  # padded to the longest, no further


def test_a_tokenizer_that_ends_every_text_with_eos(tokenizer, tmp_path, tiny_model):
    class Ending:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text, add_special_tokens=True):
            ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
            return {"input_ids": ids + [self.eos_token_id] if add_special_tokens else ids}

    assert encode("Add.", "2", Ending(), max_length=400) == encode("Add.", "2", tokenizer, max_length=400)


def test_truncation_is_reported(tokenizer, tmp_path):
    prompt = len(tokenizer(build_prompt("Hi"))["input_ids"])
    rows = [
        {"query": "Hi", "response": "a"},  # whole: 3 tokens beyond the prompt (space, a, EOS)
        {"query": "Hi", "response": "abcdef"},  # cut
        {"query": "Hi there", "response": "a"},  # the prompt alone is too long: dropped
        {"query": "Hi", "response": "  "},  # empty
    ]
    config = NLGDataConfig(name="metamathqa", source=write(tmp_path / "rows.jsonl", rows), max_length=prompt + 3)
    data = load_training_data(config, tokenizer)
    counts = {key: data.report[key] for key in ("rows_chosen", "rows_used", "rows_cut", "rows_dropped", "rows_empty")}
    assert counts == {"rows_chosen": 4, "rows_used": 2, "rows_cut": 1, "rows_dropped": 1, "rows_empty": 1}
    whole, cut = data.dataset.to_list()
    assert labelled_text(whole, tokenizer) == " a</s>" and labelled_text(cut, tokenizer) == " ab"
    assert data.report["tokens"] == 2 * (prompt + 3) and data.report["response_tokens"] == 6


def test_the_same_rows_are_tokenized_once(tokenizer, tmp_path, monkeypatch):
    """From the disk they are what they were; another length, text, template or tokenizer is tokenized again."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts, call = [], type(tokenizer).__call__

    def noting(self, text, **more):
        texts.append(text)
        return call(self, text, **more)

    monkeypatch.setattr(type(tokenizer), "__call__", noting)

    def load(rows=ROWS, with_tokenizer=tokenizer, **settings):
        texts.clear()
        config = NLGDataConfig(source=write(tmp_path / "rows.jsonl", rows), **settings)
        return load_training_data(config, with_tokenizer), len(texts)

    first, tokenized = load()
    assert tokenized >= len(ROWS)
    again, tokenized = load()
    assert tokenized == 0
    assert again.dataset.to_list() == first.dataset.to_list() and again.report == first.report
    assert again.dataset.features == first.dataset.features
    (entry,) = {path.suffix: path for path in (tmp_path / "cache").rglob("*.arrow")}.values()
    assert entry.parent.name == "ba_lora"

    assert load(max_length=400)[1] and load(ROWS[:-1])[1]
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["answer"])
    assert load(with_tokenizer=other)[1]
    assert load()[1] == 0
    monkeypatch.setitem(prompts.TEMPLATES, "alpaca", "Another one: {instruction}")
    assert load()[1]
    assert load()[1] == 0
    monkeypatch.setattr(prompts, "ALPACA_WITH_INPUT", "Another one: {instruction}, {input}")
    assert load()[1]


def test_the_rows_of_a_killed_process_are_removed_and_those_of_a_living_one_stay(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    talk = [[{"role": "user", "content": "1?"}]]
    for name in ("rows-killed", "rows-living"):
        (tmp_path / "ba_lora" / name).mkdir(parents=True)
        (tmp_path / "ba_lora" / name / "lock").touch()
    with try_lock(tmp_path / "ba_lora" / "rows-living" / "lock"), rows_on_disk(talk) as rows, rows_on_disk(talk):
        assert rows["messages"][:] == talk
        assert len(list((tmp_path / "ba_lora").glob("rows-*/lock"))) == 3
    assert [path.parent.name for path in (tmp_path / "ba_lora").glob("rows-*/lock")] == ["rows-living"]


def test_a_cache_that_cannot_be_written_is_told_in_one_line(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write .*file/ba_lora/.* is no folder.*HF_DATASETS_CACHE"):
        load_training_data(NLGDataConfig(source=write(tmp_path / "rows.jsonl", ROWS)), tokenizer)


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
def test_local_files_of_three_kinds(tokenizer, tmp_path, ending):
    path = tmp_path / f"rows.{ending}"
    if ending == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif ending == "json":
        path.write_text(json.dumps(ROWS))
    else:
        write(path, ROWS)
    data = load_training_data(NLGDataConfig(source=str(path)), tokenizer)
    assert data.report["rows_used"] == 6 and len(data.report["file_sha256"]) == 64
    assert labelled_text(data.dataset[5], tokenizer) == " It is 6. The answer is: 6</s>"


def test_each_set_has_its_columns(tokenizer, tmp_path):
    rows = {
        "codefeedback": [{"query": "Sort.", "answer": "sorted(x)"}],
        "gsm8k": [{"question": "2+2?", "answer": "It is <<2+2=4>>4.\n#### 4"}],
        "wizardlm": [
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            {"conversations": [{"from": "gpt", "value": "Hello"}]},
        ],
    }
    expected = {
        "codefeedback": " sorted(x)</s>",
        "gsm8k": " It is 4.\nThe answer is: 4</s>",
        "wizardlm": " Hello</s>",
    }
    for name, raw in rows.items():
        data = load_training_data(NLGDataConfig(name=name, source=write(tmp_path / f"{name}.jsonl", raw)), tokenizer)
        assert labelled_text(data.dataset[0], tokenizer) == expected[name]
        assert data.report["rows_used"] == 1


def test_first_rows_or_a_seeded_sample(tokenizer, tmp_path):
    source = write(tmp_path / "rows.jsonl", ROWS)
    texts = {}
    for key, settings in {
        "first": {"num_rows": 3},
        "sample": {"num_rows": 3, "sample_seed": 1},
        "again": {"num_rows": 3, "sample_seed": 1},
        "other": {"num_rows": 3, "sample_seed": 2},
        "all": {"num_rows": None},
    }.items():
        data = load_training_data(NLGDataConfig(source=source, **settings), tokenizer)
        texts[key] = [labelled_text(item, tokenizer) for item in data.dataset]
    assert texts["first"] == texts["all"][:3] and len(texts["all"]) == 6
    assert texts["sample"] == texts["again"] != texts["other"]
    assert len(texts["sample"]) == 3 and set(texts["sample"]) < set(texts["all"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no such file: .*missing.jsonl"),
        ("empty.jsonl", "", "empty.jsonl is empty"),
        ("broken.jsonl", '{"query": "a", "response": "b"}\n{"query": ', "broken.jsonl, line 2: not valid JSON"),
        ("list.jsonl", "[1, 2]\n", "line 1: a JSON object is needed"),
        ("other.jsonl", '{"question": "a", "answer": "b"}\n', "has the columns answer, question; .* query, response"),
        ("number.jsonl", '{"query": 5, "response": "b"}\n', "is not text"),
        ("hole.jsonl", '{"query": "a", "response": "b"}\n{"query": "a"}\n', "row 1 lacks a column"),
        (
            "long.jsonl",
            json.dumps({"query": "x" * 500, "response": "b"}),
            "no row of .* fill data.max_length=512: raise that",
        ),
        ("void.jsonl", '{"query": "a", "response": ""}\n', "no row of .* is left to train on"),
        (
            "half.jsonl",
            '{"query": "a", "response": "b"}\n{"query": "\\ud800", "response": "b"}\n',
            "half.jsonl, row 1: ",
        ),
        ("bad.parquet", "not parquet", "not a readable parquet file"),
    ],
)
def test_bad_files_say_what_is_wrong_in_one_line(tokenizer, tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_training_data(NLGDataConfig(source=str(path)), tokenizer)
    assert "\n" not in str(caught.value)


def test_an_absent_hub_set_says_so(tokenizer):
    with pytest.raises(UserError, match="nobody/nothing") as caught:
        load_training_data(NLGDataConfig(source="nobody/nothing"), tokenizer)
    assert "\n" not in str(caught.value)


def test_toy_rows_follow_their_settings(tokenizer):
    clean = load_training_data(NLGDataConfig(name="toy", num_rows=50), tokenizer)
    assert clean.report["rows_used"] == 50 and clean.report["source"] == "generated by data/toy.py"
    config = NLGDataConfig(name="toy", num_rows=50)
    config.toy.label_noise = 0.5
    noisy = load_training_data(config, tokenizer)
    different = sum(a["labels"] != b["labels"] for a, b in zip(clean.dataset, noisy.dataset, strict=True))
    assert 10 < different < 40


def test_the_tokenizer_of_the_fixture_is_byte_level(tiny_model):
    assert len(AutoTokenizer.from_pretrained(tiny_model)) == 259


def test_a_set_without_a_place_on_the_hub_needs_a_file(tokenizer, tmp_path, monkeypatch):
    found = dataclasses.replace(sets.named_set("metamathqa"), hub=None)
    monkeypatch.setattr(sets, "named_set", lambda name: found)
    for ask in (sets.check_source, lambda config: load_training_data(config, tokenizer)):
        with pytest.raises(UserError, match="data.name=metamathqa is no set of the hub.*data.source=FILE"):
            ask(NLGDataConfig(name="metamathqa"))
    sets.check_source(NLGDataConfig(name="metamathqa", source=write(tmp_path / "rows.jsonl", ROWS)))


def test_a_subset_is_of_a_set_on_the_hub_only(tokenizer, tmp_path, monkeypatch):
    asked = []

    def stream(names, *, split, configs):
        asked.append((names, configs(names[0])))
        raise UserError("not read here")

    monkeypatch.setattr("data.nlg.stream_rows", stream)
    for config in (
        NLGDataConfig(name="gsm8k", source="some/copy", subset="socratic"),
        NLGDataConfig(name="gsm8k", source="some/copy"),
    ):
        with pytest.raises(UserError, match="not read here"):
            load_training_data(config, tokenizer)
    assert asked == [(["some/copy"], ("socratic",)), (["some/copy"], ("main",))]
    with pytest.raises(UserError, match="data.subset=a is of sets on the hub, and data.source is a file"):
        sets.check_source(NLGDataConfig(source=write(tmp_path / "rows.jsonl", ROWS), subset="a"))
