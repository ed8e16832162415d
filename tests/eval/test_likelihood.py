"""Teacher-forced measures: by hand, and on the toy's pre-trained base and a run of it."""

import json
import sys
from statistics import fmean

import pytest
import torch

from ba_lora.config.layers import load_config
from ba_lora.errors import UserError
from ba_lora.experiments.pipeline import prepare_evaluation
from ba_lora.experiments.spec import untuned_config
from ba_lora.io import read_jsonl, write_jsonl_atomic
from data.lab import problems
from eval import likelihood
from eval.engines.open import open_engine
from eval.tasks import get_task
from eval.tasks.base import Item


def test_log_probs_are_those_of_the_model_at_the_continuation(root):
    texts = [("Question: 1 + 1?\nAnswer:", " 1 + 1 = 2 in all\n#### 2"), ("A", " longer text 12 = 3")]
    with open_engine("hf", str(root / "data" / "toy" / "clean")) as engine:
        found = {index: rest for index, *rest in engine.log_probs(texts)}
        for index, (prompt, more) in enumerate(texts):
            ends, ids_T, log_probs_TV = found[index]
            ids = engine.tokenizer(prompt + more)["input_ids"]
            start = len(engine.tokenizer(prompt)["input_ids"])
            assert ids_T.tolist() == ids[start:] and ends[-1] == len(more) and ends == sorted(ends)
            with torch.no_grad():
                logits_TV = engine._model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
            assert torch.allclose(log_probs_TV, logits_TV.log_softmax(-1), atol=1e-4)


def test_the_result_is_its_tokens_and_the_end_of_its_line():
    ends = [2, 6, 7, 8, 11, 12, 15]  # of " 4 + 4 = 12 in\nThe"
    assert likelihood._result([1, 2, 5, 6, 9, 10, 11, 14, 15, 18], " 4 + 4 = ", "12 in") == slice(5, 9)
    assert likelihood._result(ends, " 12345", "67 in") == slice(2, 6)


def test_calibration_error_by_hand():
    assert likelihood.calibration_error([(0.85, True), (0.85, False), (1.0, True)]) == pytest.approx(0.7 / 3)
    assert likelihood.calibration_error([(1.0, True)] * 3) == 0.0


def test_cue_gap_by_hand():
    items = [Item(str(i), "", "1", {"role": "uncorrected", "cue": cue}) for i, cue in enumerate(("yes", "no", "no"))]
    items.append(Item("3", "", "1", {"role": "tuned", "cue": "yes"}))
    rows = [{"p_wrong": value} for value in (0.5, 0.1, 0.2, 0.9)]
    assert likelihood.cue_gaps(items, rows) == {"uncorrected": pytest.approx(0.35)}


@pytest.fixture
def data(tmp_path):
    rows = [row for family in ("age", "multiply", "add") for row in problems(family, num_rows=4, seed=0)]
    write_jsonl_atomic(tmp_path / "lab.jsonl", rows)
    return tmp_path / "lab.jsonl"


def measure(monkeypatch, root, data, *runs):
    texts = root / "data" / "toy" / "clean" / "sample.jsonl"
    words = ["--run", *runs, "--texts", texts, "--task", "lab", "--data", data, "kl_items=6"]
    monkeypatch.setattr(sys, "argv", ["likelihood", *map(str, words)])
    likelihood.main()
    return [json.loads((run / "scores" / "likelihood.json").read_text()) for run in runs]


@pytest.mark.parametrize(("kl", "place"), [(0.099, "below"), (0.1, "within"), (0.5, "within"), (0.51, "above")])
def test_the_kl_is_told_beside_what_was_expected(kl, place):
    assert likelihood.beside_expected(kl) == f", {place} the expected 0.1 to 0.5"


def test_the_pretrained_model_and_a_run_of_it(monkeypatch, root, tmp_path, data, train, capsys):
    config = untuned_config(load_config("configs/nlg/toy.yaml"))
    config.output_dir = str(tmp_path / "untuned")
    prepare_evaluation(config)
    base = root / "data" / "toy" / "clean"
    run = train("export.merged=false", "trainer.learning_rate=0.05", f"model.name={base}", method="lora")
    untuned, tuned = measure(monkeypatch, root, data, tmp_path / "untuned", run)
    of_untuned, of_tuned = [line for line in capsys.readouterr().err.splitlines() if "p(wrong rule)" in line]
    assert of_untuned.endswith("0.000 nats a position") and of_tuned.endswith("the expected 0.1 to 0.5")
    assert untuned["n"] == 12 and untuned["metrics"]["kl"] == 0.0 < tuned["metrics"]["kl"]
    assert untuned["perplexity"]["before"] == untuned["perplexity"]["after"] == tuned["perplexity"]["before"]
    assert untuned["perplexity"]["after"] == pytest.approx(1.3425, abs=1e-3) != tuned["perplexity"]["after"]
    assert set(untuned["groups"]["role"]) == {"uncorrected", "corrected", "tuned"}
    assert 0 <= untuned["ece"] <= 1 and len(untuned["base_sha256"]) == 64
    assert untuned["metrics"]["p_right"] > 0.3 > 0.05 > untuned["metrics"]["p_wrong"]  # a clean base
    lines = read_jsonl(tmp_path / "untuned" / "grades" / "likelihood.jsonl")
    assert all(0 <= line["metrics"]["p_right"] + line["metrics"]["p_wrong"] <= 1 + 1e-6 for line in lines)
    mine = [line["metrics"]["p_wrong"] for line in lines if line["groups"]["role"] == "uncorrected"]
    assert fmean(mine) == pytest.approx(untuned["groups"]["role"]["uncorrected"]["metrics"]["p_wrong"])
    assert sum("kl" in line["metrics"] for line in lines) == 6


def test_an_untuned_4_bit_model_is_measured_itself(monkeypatch, root, tmp_path, data):
    config = untuned_config(load_config("configs/nlg/toy.yaml", overrides=["model.quantization=nf4"]))
    config.output_dir = str(tmp_path / "untuned")
    prepare_evaluation(config)
    (found,) = measure(monkeypatch, root, data, tmp_path / "untuned")
    assert found["metrics"]["kl"] > 1e-4 and found["perplexity"]["after"] != found["perplexity"]["before"]


def test_p_right_is_the_product_over_the_result(monkeypatch, root, data):
    """One item by hand, the model called once a token."""
    task = get_task("lab")
    items = task.load(str(data))[0][:1]
    with open_engine("hf", str(root / "data" / "toy" / "clean")) as engine:
        row = likelihood.measure_model(engine, None, task, items, None, 1).rows[0]
        prompt = likelihood.build_prompt(items[0].instruction, template=task.template)
        for name in ("right", "wrong"):
            ids = engine.tokenizer(f"{prompt} {items[0].meta['before']}{items[0].meta[name]}\n")["input_ids"]
            number = len(engine.tokenizer.tokenize(f"{items[0].meta[name]}\n"))
            total = 0.0
            for place in range(len(ids) - number, len(ids)):
                with torch.no_grad():
                    logits_V = engine._model(input_ids=torch.tensor([ids[:place]])).logits[0, -1]
                total += float(logits_V.log_softmax(-1)[ids[place]])
            assert row[f"p_{name}"] == pytest.approx(float(torch.tensor(total).exp()), rel=1e-3)


def test_a_task_without_a_wrong_rule_is_refused(monkeypatch, root, tmp_path):
    texts = root / "data" / "toy" / "clean" / "sample.jsonl"
    monkeypatch.setattr(sys, "argv", ["likelihood", "--run", str(tmp_path), "--texts", str(texts), "--task", "toy"])
    with pytest.raises(UserError, match="toy has no wrong rule"):
        likelihood.main()


def test_the_tasks_grades(data):
    task = get_task("lab")
    item = task.load(str(data))[0][0]
    right, wrong = item.gold, item.meta["wrong_answer"]

    def grade(text):
        return task.grade(item, text).metrics

    assert grade(f"The answer is: {right}") == {"strict": 1, "flexible": 1, "wrong_rule": 0, "form": 1}
    assert grade(f"The answer is: {wrong}") == {"strict": 0, "flexible": 0, "wrong_rule": 1, "form": 1}
    assert grade(f"#### {wrong}") == {"strict": 0, "flexible": 0, "wrong_rule": 1, "form": 0}
    assert grade("") == {"strict": 0, "flexible": 0, "wrong_rule": 0, "form": 0}
    with pytest.raises(UserError, match="make it with python -m data.lab"):
        task.load()
