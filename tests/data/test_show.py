"""data.show prints what the training sees, and counts as it counts."""

import json
import re
import sys

import pytest

from ba_lora.config.schema import ModelConfig
from ba_lora.errors import UserError
from ba_lora.models.tokenizer import load_tokenizer
from ba_lora.prompts import build_prompt
from data import show
from tests.support.tiny_nlu import tiny_overrides


@pytest.fixture
def run_show(monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["show", *words])
        assert show.main() == 0
        return capsys.readouterr().out

    return run


def test_it_counts_as_the_training_does(tiny_model, tmp_path, train, run_show, monkeypatch):
    rows = [{"q": f"{n}?", "a": "ja " * n} for n in range(12)] + [{"q": "1?", "a": "ja"}, {"q": "x" * 500, "a": "y"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    length = len(load_tokenizer(ModelConfig(name=str(tiny_model)))(build_prompt("1?"))["input_ids"]) + 20
    words = [
        f"data.source={tmp_path / 'rows.jsonl'}",
        "data.columns={instruction: q, response: a}",
        f"data.max_length={length}",
        "data.num_rows=null",
    ]
    report = json.loads((train(*words, method="lora") / "train.json").read_text())["data"]
    text = run_show(str(tmp_path / "base.yaml"), *words, "--rows", "2")
    counts = dict(reversed(pair.split(" ", 1)) for pair in re.search("rows: (.*)", text)[1].split(", "))
    names = {"held out": "heldout", "repeated": "duplicate"}
    assert {f"rows_{names.get(name, name)}": int(n) for name, n in counts.items()} == {
        key: report[key] for key in report if key.startswith("rows_")
    }
    assert report["rows_empty"] == report["rows_dropped"] == report["rows_duplicate"] == 1 and report["rows_cut"] > 0
    assert f"tokens: {report['tokens']}, labelled {report['response_tokens']};" in text
    assert "empty (no question with an answer, left out): row 0" in text and "left out): row 13" in text
    assert "row 1: " in text and "### Response:⟦ ja</s>⟧" in text and text.count("⟦") == 2 and "\033" not in text
    total = sum(int(line.split()[-1]) for line in text.splitlines() if re.match(r" +\d+ to \d+ ", line))
    assert total == report["rows_used"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "\033[1;32m ja</s>\033[0m" in run_show(str(tmp_path / "base.yaml"), *words)


def test_shortened_conversations_are_counted_and_named(tiny_model, tmp_path, train, run_show):
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows = [talk, [*talk, talk[0]], [talk[1], *talk], talk[:1]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"talk": row}) + "\n" for row in rows))
    words = [f"data.source={tmp_path / 'rows.jsonl'}", "data.messages=talk", "data.num_rows=null"]
    text = run_show(str(tmp_path / "base.yaml"), *words)
    assert "3 used, 0 held out, 0 cut, 0 dropped, 1 empty, 2 shortened, 2 repeated" in text
    assert re.search(r"shortened \(turns before .* are left out\): row 1, 2$", text, re.MULTILINE)
    assert "empty (no question with an answer before the first empty turn, left out): row 3" in text


def test_no_row_steers_the_terminal(tiny_model):
    tokenizer = load_tokenizer(ModelConfig(name=str(tiny_model)))
    ids = tokenizer("a\x1b[2Jb", add_special_tokens=False)["input_ids"]
    item = {"input_ids": ids, "labels": [-100, *ids[1:]]}
    assert "a⟦⟨U+001B⟩[2Jb⟧" in show._marked(item, tokenizer, show.PLAIN)


def test_nothing_labelled_is_an_error(tmp_path, train, run_show):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"query": "?", "response": ""}) + "\n")
    with pytest.raises(UserError, match="no row of .* is left to train on"):
        run_show(str(tmp_path / "base.yaml"), "data.name=metamathqa", f"data.source={tmp_path / 'rows.jsonl'}")


def test_a_classifiers_rows(tiny_encoder, run_show):
    text = run_show("configs/nlu/toy.yaml", "--task", "toy_pairs", *tiny_overrides(tiny_encoder))
    assert "columns premise, hypothesis, label" in text and "dev set toy_pairs from generated" in text
    assert re.search(r"classes: entailment \d+, neutral \d+, contradiction \d+", text) and "label entailment" in text


def test_the_histogram_holds_every_length():
    lines = show.histogram([1, 5, 5, 99, 100, 1000])
    assert len(lines) <= show.BINS + 1 and sum(int(line.split()[-1]) for line in lines) == 6
