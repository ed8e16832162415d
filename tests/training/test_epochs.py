"""What an NLU run leaves of its epochs: the kept one, the last one, scores, features; and an interrupted run's."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import f1_score, recall_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import train_nlu as script
from ba_lora.errors import UserError
from ba_lora.io import read_json, read_jsonl, write_jsonl_atomic
from ba_lora.models.classifier import catch_pooled, load_classifier
from ba_lora.models.predict import Predictions
from ba_lora.runs.results_nlu import run_table, seeds_table
from ba_lora.training import epochs
from ba_lora.training.trainer import BALoRATrainer
from data.toy_nlu import generate_pairs
from eval.metrics import Scores
from tests.conftest import ROOT
from tests.runs.test_resume import killed
from tests.support.tiny import only_result
from tests.support.tiny_nlu import nlu_config, save_tiny_encoder, tiny_overrides, write_sst2

MINILM = ROOT / "configs" / "nlu" / "minilm.yaml"


@pytest.fixture
def sst2(train_nlu, tmp_path):
    """`sst2("key=value", …)`: train on a made-up SST-2 of 24 + 24 rows → the run's folder."""
    files = write_sst2(tmp_path / "data")

    def run(*overrides, **more):
        words = [f"data.source={files[0]}", f"data.dev.sst2={files[1]}", *overrides]
        return train_nlu(*words, config_path=MINILM, task="sst2", **more)

    return run


def merged_logits(run, texts):
    batch = AutoTokenizer.from_pretrained(run / "merged")(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return AutoModelForSequenceClassification.from_pretrained(run / "merged").eval()(**batch).logits


def lines_of(run, which):
    return read_jsonl(run / "predictions" / f"{which}.jsonl")


def test_the_exported_model_is_the_best_epochs(sst2, tmp_path, monkeypatch):
    """Accuracies made up to fall from epoch to epoch: the first one is kept, the third one is the last."""
    accuracies = iter((0.9, 0.5, 0.4))
    monkeypatch.setattr(script, "glue_scores", lambda *_: Scores({"accuracy": next(accuracies)}))
    run = sst2("trainer.num_train_epochs=3")
    selection = read_json(run / "train.json")["training"]["selection"]
    assert (selection["protocol"], selection["chosen_by"]) == ("paper", "accuracy on the dev set")
    assert [epoch["metrics"]["sst2"]["accuracy"] for epoch in selection["epochs"]] == [0.9, 0.5, 0.4]
    assert (selection["best"]["epoch"], selection["best"]["step"]) == (1, 3)
    assert (selection["last"]["epoch"], selection["last"]["step"]) == (3, 9)
    best, last = (torch.tensor([line["logits"] for line in lines_of(run, which)]) for which in ("best", "last"))
    texts = [row["sentence"] for row in read_jsonl(tmp_path / "data" / "dev.jsonl")]
    torch.testing.assert_close(merged_logits(run, texts), best, atol=1e-4, rtol=0)
    assert (best - last).abs().max() > 1e-2
    assert not (run / "epochs").exists()


@pytest.mark.parametrize(
    ("schedule", "accuracies", "epoch"),
    [
        (["adapter.options.tinit=4"], (0.9, 0.5, 0.4, 0.3), 1),  # 3 steps an epoch: nothing is pruned before the fifth
        (["adapter.options.deltaT=4"], (0.5, 0.9, 0.4, 0.3), 2),  # pruned at step 4, and once more at 8
    ],
    ids=["before the first allocation", "between two allocations"],
)
def test_adalora_exports_the_ranks_of_the_best_epoch(sst2, tmp_path, monkeypatch, schedule, accuracies, epoch):
    """The last allocation is another one, and would cut directions that the kept weights use."""
    values = iter(accuracies)
    monkeypatch.setattr(script, "glue_scores", lambda *_: Scores({"accuracy": next(values)}))
    run = sst2("trainer.num_train_epochs=4", "trainer.learning_rate=0.05", *schedule, method="adalora")
    facts = read_json(run / "train.json")
    assert facts["training"]["selection"]["best"]["epoch"] == epoch
    assert max(facts["export"]["max_logit_difference"].values()) < 1e-5
    best = torch.tensor([line["logits"] for line in lines_of(run, "best")])
    texts = [row["sentence"] for row in read_jsonl(tmp_path / "data" / "dev.jsonl")]
    torch.testing.assert_close(merged_logits(run, texts), best, atol=1e-5, rtol=0)


def test_scores_are_those_of_the_predictions(sst2, tmp_path):
    run = sst2("data.class_shares.positive=0.25", "data.num_rows=16")
    lines = lines_of(run, "best")
    labels, predictions = ([line[name] for line in lines] for name in ("label", "prediction"))
    assert labels == [row["label"] for row in read_jsonl(tmp_path / "data" / "dev.jsonl")]
    score = read_json(run / "scores" / "sst2.json")
    assert (score["task"], score["n"], score["invalid"]) == ("sst2", 24, 0)
    recall = recall_score(labels, predictions, average=None, labels=[0, 1])
    assert score["metrics"] == {
        "accuracy": pytest.approx(np.mean(np.equal(labels, predictions))),
        "macro_f1": pytest.approx(f1_score(labels, predictions, average="macro")),
        "minority_recall": pytest.approx(recall[1]),
    }
    assert score["per_class"]["recall"] == pytest.approx({"negative": recall[0], "positive": recall[1]})
    assert score["per_class"]["minority"] == "positive" and score["per_class"]["n"] == {"negative": 12, "positive": 12}
    result = only_result(tmp_path / "results")
    assert result["evaluation"]["sst2"].items() >= score.items() and result["data"]["classes"] == {
        "negative": 12,
        "positive": 4,
    }
    for table in (run_table([result]), seeds_table([result])):
        assert "minority_recall" in table and f"{100 * score['metrics']['accuracy']:.2f}" in table


def test_tuned_selection_looks_at_held_out_training_rows_alone(sst2, monkeypatch):
    """The dev set would choose the last epoch, the held-out rows choose the first."""
    made_up = iter((0.1, 0.9, 0.2, 0.8))  # epoch 1: dev, held out; epoch 2: dev, held out
    monkeypatch.setattr(script, "glue_scores", lambda *_: Scores({"accuracy": next(made_up)}))
    run = sst2("nlu.selection=tuned", "nlu.heldout_share=0.25")
    selection = read_json(run / "train.json")["training"]["selection"]
    assert selection["protocol"] == "tuned" and "held-out training rows" in selection["chosen_by"]
    assert selection["best"]["metrics"] == {"sst2": {"accuracy": 0.1}, "heldout": {"accuracy": 0.9}}
    assert selection["last"]["metrics"]["sst2"]["accuracy"] == 0.2
    assert {line["task_id"].split("/")[0] for line in lines_of(run, "best")} == {"sst2"}


def test_features_are_saved_at_the_chosen_steps(sst2, tmp_path, tiny_encoder):
    run = sst2("features.steps=[0,2,3]", "features.num_rows=10", "trainer.per_device_eval_batch_size=5")
    saved = {path.name: load_file(path) for path in (run / "features").iterdir()}
    assert set(saved) == {"step-0.safetensors", "step-2.safetensors", "step-3.safetensors"}
    rows = read_jsonl(tmp_path / "data" / "dev.jsonl")[:10]
    for tensors in saved.values():
        assert tensors["features"].shape == (10, 32) and tensors["features"].dtype == torch.float32
        assert tensors["labels"].tolist() == [row["label"] for row in rows]
    untrained = load_classifier(nlu_config(tiny_encoder)).eval()
    batch = AutoTokenizer.from_pretrained(tiny_encoder)(
        [row["sentence"] for row in rows], padding=True, return_tensors="pt"
    )
    with torch.no_grad(), catch_pooled(untrained, batch) as caught:
        untrained(**batch)
    torch.testing.assert_close(saved["step-0.safetensors"]["features"], caught["pooled"], atol=1e-4, rtol=0)
    assert (saved["step-3.safetensors"]["features"] - caught["pooled"]).abs().max() > 1e-3


@pytest.mark.parametrize(("features", "off"), [("logits", 3), ("pooled", 1)])
def test_regression(train_nlu, tmp_path, capsys, features, off):
    file = tmp_path / "stsb.jsonl"
    rows = [{"sentence1": "a" * n, "sentence2": "b" * (n % 4), "label": n % 6 * 1.0} for n in range(1, 25)]
    write_jsonl_atomic(file, rows)
    run = train_nlu(
        f"data.source={file}", f"data.dev.stsb={file}", f"regularizers.features={features}",
        config_path=MINILM, task="stsb",
    )  # fmt: skip
    facts = read_json(run / "train.json")["training"]
    assert len(facts["terms_off"]) == off and capsys.readouterr().out.count(" is off: ") == off
    assert [facts["last_log"].get(term) == "off" for term in ("consistency", "diversity", "svd")].count(True) == off
    score = read_json(run / "scores" / "stsb.json")
    assert set(score["metrics"]) == {"pearson", "spearman"} and "per_class" not in score
    texts = [[row[name] for row in rows] for name in ("sentence1", "sentence2")]
    batch = AutoTokenizer.from_pretrained(run / "merged")(*texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = AutoModelForSequenceClassification.from_pretrained(run / "merged").eval()(**batch).logits
    predictions = torch.tensor([line["prediction"] for line in lines_of(run, "best")])
    torch.testing.assert_close(logits[:, 0], predictions, atol=1e-3, rtol=1e-4)


def test_a_dev_set_of_one_class_leaves_matthews_undefined(train_nlu, tmp_path, capsys):
    train, dev = write_sst2(tmp_path / "two"), write_sst2(tmp_path / "one", labels=(1,))
    run = train_nlu(f"data.source={train[0]}", f"data.dev.cola={dev[1]}", config_path=MINILM, task="cola")
    assert read_json(run / "scores" / "cola.json")["metrics"] == {"matthews": None}
    assert "cola matthews undefined" in capsys.readouterr().out
    assert "undefined" in run_table([only_result(tmp_path / "results")])


def test_predictions_that_are_not_finite_are_an_error_and_no_score(sst2, tmp_path, monkeypatch):
    """Weights can be finite and logits not."""
    real = epochs.predict
    monkeypatch.setattr(
        epochs, "predict", lambda *args, **kwargs: Predictions(real(*args, **kwargs).logits * float("nan"), None)
    )
    with pytest.raises(UserError, match="NaN or infinite.*lower") as error:
        sst2(method="full_ft")
    assert "\n" not in str(error.value)
    assert only_result(tmp_path / "results")["status"] == "failed"
    assert not (tmp_path / "run" / "scores").exists()


# ---- an interrupted run ----


def write_nlu_config(folder, tiny_encoder):
    """3 steps an epoch, 9 in all, checkpoints at epochs: the weights of the best epoch must survive, too."""
    import yaml

    config = nlu_config(tiny_encoder)
    settings = {
        "model": {"name": config.model.name, "dtype": "float32"},
        "adapter": {"rank": 4, "dropout": 0.1},
        "nlu": {"task": "toy_pairs"},
        "data": {"num_rows": 24, "max_length": 200, "toy": {"dev_rows": 12}},
        "regularizers": {"features": "pooled"},
        "trainer": dict(word.removeprefix("trainer.").split("=") for word in tiny_overrides(tiny_encoder)
                        if word.startswith("trainer.")),
    }  # fmt: skip
    settings["trainer"] = {name: yaml.safe_load(value) for name, value in settings["trainer"].items()} | {
        "num_train_epochs": 3,
        "save_strategy": "epoch",
        "train_sampling_strategy": "group_by_length",
    }
    path = folder / "kill.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def check_killed(report):
    whole = report["whole"]
    assert whole["status"] == "ok" and whole["steps"] == list(range(1, 10)) and not whole["leftovers"]
    assert whole["scores"]["toy_pairs"]["accuracy"] > 0
    for attempt in report["attempts"]:
        for key in ("files", "status", "scores", "steps", "leftovers"):
            assert attempt[key] == whole[key], attempt["point"]
        assert attempt["signal"] == signal.SIGKILL or ":" not in attempt["point"], attempt["point"]


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(train_nlu, tmp_path, tiny_encoder, monkeypatch):
    """Stopped in the third epoch: weights, predictions and every epoch's scores of the uninterrupted run."""
    config = write_nlu_config(tmp_path, tiny_encoder).rename(tmp_path / "config.yaml")  # not given the tiny overrides
    whole = train_nlu(config_path=config, name="whole")
    steps = iter(range(1, 100))
    real = BALoRATrainer.training_step

    def stop_at_8(self, *args, **kwargs):
        if next(steps) == 8:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BALoRATrainer, "training_step", stop_at_8)
        train_nlu(config_path=config, name="stopped")
    assert read_json(tmp_path / "stopped" / "train.json")["status"] == "cancelled"
    stopped = train_nlu(config_path=config, name="stopped")
    assert read_json(stopped / "train.json")["training"]["resumed_from"] == "checkpoint-6"
    weights = ("adapter/adapter_model.safetensors", "merged/model.safetensors")
    for name in (*weights, "predictions/best.jsonl", "predictions/last.jsonl", "dev_texts.jsonl"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()
    made = generate_pairs(num_rows=12, seed=0, split="test")
    kept = {line["task_id"]: line["texts"] for line in read_jsonl(whole / "dev_texts.jsonl")}
    assert kept == {f"toy_pairs/{n}": [pair["premise"], pair["hypothesis"]] for n, pair in enumerate(made)}
    assert kept.keys() == {line["task_id"] for line in lines_of(whole, "best")}
    selections = [read_json(run / "train.json")["training"]["selection"] for run in (whole, stopped)]
    assert selections[0] == selections[1] and len(selections[0]["epochs"]) == 3


@pytest.mark.slow
def test_resume_after_kill(tmp_path, tiny_encoder, root):
    """Inside a checkpoint after the second epoch, and inside the export: the uninterrupted run's files, bit for bit."""
    config = write_nlu_config(tmp_path, tiny_encoder)
    check_killed(killed(config, tmp_path / "runs", 0, ["torch.save:5", "safetensors.torch.serialize_file:8"], root))


@pytest.mark.slow
def test_resume_after_kill_at_10_instants(tmp_path, tiny_encoder, root):
    config = write_nlu_config(tmp_path, tiny_encoder)
    points = ["torch.save:3", "os.replace:3", "os.replace:6", "os.replace:9", "safetensors.torch.serialize_file:3"]
    check_killed(killed(config, tmp_path / "runs", 5, points, root))


def test_a_finished_run_is_not_trained_again(sst2, capsys):
    run = sst2()
    written = (run / "train.json").stat().st_mtime_ns
    assert not (run / "dev_texts.jsonl").exists()  # they stand in the file of the dev set
    sst2()
    assert "is trained already" in capsys.readouterr().out and (run / "train.json").stat().st_mtime_ns == written


def test_the_saved_config_alone_repeats_the_run(sst2, train_nlu, tmp_path):
    first = sst2("regularizers.features=pooled")
    again = train_nlu(config_path=first / "config.yaml", name="again")
    assert json.dumps(lines_of(first, "best")) == json.dumps(lines_of(again, "best"))


@pytest.mark.slow
def test_the_command_on_two_processes_equals_accumulation_two(tmp_path, root):
    """Scores, predictions and features of 2 processes × 4 rows and of 1 process × 4 rows × accumulation 2."""
    encoder = save_tiny_encoder(tmp_path / "encoder", dropout=0.0)  # which would draw other numbers
    config = write_nlu_config(tmp_path, encoder)
    words = [
        "train_nlu.py", "--config", str(config), "adapter.dropout=0", "trainer.per_device_train_batch_size=4",
        "features.steps=[0,4]", "trainer.train_sampling_strategy=random", f"results_dir={tmp_path / 'results'}",
    ]  # fmt: skip
    launch = {
        "one": ([sys.executable], ["trainer.gradient_accumulation_steps=2"]),
        "two": ([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"], []),
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for name, (launcher, more) in launch.items():
        command = [*launcher, *words, *more, f"output_dir={tmp_path / name}"]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=3600)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (read_json(tmp_path / name / "train.json") for name in launch)
    assert (one["training"]["num_processes"], two["training"]["num_processes"]) == (1, 2)
    peaks = [facts["training"]["total_peak_memory_mb"] / facts["training"]["peak_memory_mb"] for facts in (one, two)]
    assert peaks[0] == pytest.approx(1, rel=0.01) and 1.5 < peaks[1] < 2.5
    for which in ("best", "last"):
        first, second = (torch.tensor([line["logits"] for line in lines_of(tmp_path / n, which)]) for n in launch)
        torch.testing.assert_close(first, second, atol=5e-3, rtol=1e-2)
    for step in (0, 4):
        first, second = (load_file(tmp_path / n / "features" / f"step-{step}.safetensors") for n in launch)
        torch.testing.assert_close(first, second, atol=5e-3, rtol=1e-2)
