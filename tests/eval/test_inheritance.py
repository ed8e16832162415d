"""Drift and diversity: by hand, and on the toy's pre-trained base."""

import json
import math
import sys
from statistics import fmean

import pytest
import torch

from ba_lora.config.layers import load_config
from ba_lora.errors import UserError
from ba_lora.experiments.pipeline import prepare_evaluation
from ba_lora.experiments.spec import untuned_config
from ba_lora.io import read_jsonl
from eval import inheritance, run_models
from eval.engines.base import EngineOptions
from eval.engines.open import open_engine


def test_distinct_n_by_hand():
    assert inheritance.distinct_n(["a b a", "a b"], 1) == pytest.approx(2 / 5)
    assert inheritance.distinct_n(["a b a", "a b"], 2) == pytest.approx(2 / 3)  # ab, ba, ab
    assert inheritance.distinct_n(["a", ""], 2) == 0.0


def test_entropy_by_hand():
    assert inheritance.answer_entropy(["7", "7", "7"]) == 0.0
    assert inheritance.answer_entropy(["7", "8", None, "7"]) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4))


def test_likelihood_equals_one_text_at_a_time(tiny_model):
    """Padding and batching change nothing; the sum is over every token but the first, EOS included."""
    texts = ["short", "a much longer text than the other", "middle one"]
    with open_engine("hf", tiny_model) as engine:
        found = engine.nll(texts)
        for text, (total, count) in zip(texts, found, strict=True):
            ids = torch.tensor([[*engine.tokenizer(text)["input_ids"], engine.tokenizer.eos_token_id]])
            with torch.no_grad():
                alone = engine._model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            assert count == len(text) + 1  # one token a byte, after BOS, and EOS
            assert total == pytest.approx(alone, rel=1e-5)


def test_a_text_beyond_the_context_is_cut_to_it_and_told(tiny_model, capsys):
    texts = ["short", "a much longer text"]
    with open_engine("hf", tiny_model, options=EngineOptions(max_model_len=8)) as engine:
        (_, whole), (_, cut) = engine.nll(texts)
    assert (whole, cut) == (len("short") + 1, 7)
    assert "1 of 2 texts are cut to the context of 8 tokens" in capsys.readouterr().err


def test_a_diverged_model_has_no_perplexity():
    assert inheritance.text_perplexity([(2 * math.log(5.0), 1), (math.log(5.0), 2)]) == pytest.approx(5.0)
    assert inheritance.text_perplexity([(math.nan, 3)]) is None
    assert inheritance.text_perplexity([(2e3, 2)]) is None  # above every float


def run_main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["inheritance", *map(str, words)])
    inheritance.main()


SMALL = ("num_prompts=3", "num_samples=2")


def test_the_pretrained_model_has_not_drifted(monkeypatch, root, tmp_path):
    config = untuned_config(load_config("configs/nlg/toy.yaml"))
    config.output_dir = str(tmp_path / "run")
    prepare_evaluation(config)
    texts = root / "data" / "toy" / "clean" / "sample.jsonl"
    run_main(monkeypatch, "--run", tmp_path / "run", "--texts", texts, "--task", "toy", *SMALL)
    score = json.loads((tmp_path / "run" / "scores" / "inheritance.json").read_text())
    assert score["perplexity"]["before"] == score["perplexity"]["after"] == pytest.approx(1.3425, abs=1e-3)
    assert score["n"] == 3 and set(score["metrics"]) == {"distinct_1", "distinct_2", "distinct_3"}
    grades = tmp_path / "run" / "grades"
    lines = read_jsonl(grades / "inheritance.jsonl")
    assert [line["task_id"] for line in lines] == ["toy/0", "toy/1", "toy/2"]
    for name, value in (score["metrics"] | {"answer_entropy": score["answer_entropy"]}).items():
        assert fmean(line["metrics"][name] for line in lines) == pytest.approx(value)
    lines = read_jsonl(grades / "inheritance_texts.jsonl")
    nll, tokens = (sum(line[name] for line in lines) for name in ("nll", "num_tokens"))
    assert tokens == score["perplexity"]["num_tokens"]
    assert math.exp(nll / tokens) == pytest.approx(score["perplexity"]["after"])


def test_tuned_runs_share_one_base(monkeypatch, root, tmp_path, train):
    """An adapter that was moved far drifts; an adapter and a merged model of one run measure alike."""
    hot = train("export.merged=false", "trainer.learning_rate=0.05", method="lora", name="hot")
    merged = train("trainer.learning_rate=0.05", method="lora", name="merged")
    texts = root / "data" / "toy" / "clean" / "sample.jsonl"
    starts, done = [], []
    opened = run_models.open_engine

    def open_and_look(*words, **options):
        starts.append(words[1])
        done.append((hot / "scores" / "inheritance.json").is_file())
        return opened(*words, **options)

    monkeypatch.setattr(run_models, "open_engine", open_and_look)
    run_main(monkeypatch, "--run", hot, merged, "--texts", texts, "--task", "toy", *SMALL)
    first, second = (json.loads((run / "scores" / "inheritance.json").read_text()) for run in (hot, merged))
    assert len(starts) == 2  # the base with one adapter on it, and the merged model
    assert done == [False, True]  # each run's measures are written as they are made
    used = first["generation"]
    assert (used["engine"], used["template"], used["sampling"]["num_samples"]) == ("hf", "alpaca", 2)
    assert first["perplexity"]["before"] == second["perplexity"]["before"]
    assert first["perplexity"]["after"] == pytest.approx(second["perplexity"]["after"], rel=1e-3)
    assert abs(first["perplexity"]["after"] / first["perplexity"]["before"] - 1) > 0.01


def test_bad_input(monkeypatch, tmp_path, root):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"words": "x"}\n')
    words = ["--run", tmp_path, "--texts", texts, "--task", "toy"]
    with pytest.raises(UserError, match='every line must be {"text"'):
        run_main(monkeypatch, *words)
    with pytest.raises(UserError, match="unknown option 'samples=3'"):
        run_main(monkeypatch, *words, "samples=3")
    with pytest.raises(UserError, match="num_samples at least 2"):
        run_main(monkeypatch, *words, "num_samples=1")
