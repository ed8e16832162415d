"""Evaluation inside an NLG training: held-out rows, the best checkpoint, early stopping, and all of it resumed."""

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from ba_lora.config.layers import load_config
from ba_lora.config.schema import training_hash
from ba_lora.config.schema_nlg import NLGDataConfig
from ba_lora.errors import UserError
from ba_lora.io import read_json, read_jsonl
from ba_lora.training.arguments import build_arguments
from ba_lora.training.checkpoints import checkpoint_fault, stopped_early, write_checkpoint_manifest
from ba_lora.training.log import evaluation_line
from data.nlg import load_training_data

EVALUATED = ("trainer.eval_strategy=steps", "trainer.eval_steps=2", "data.heldout_share=0.25", "trainer.max_steps=8")
STOPS_AT_6 = (*EVALUATED, "early_stopping.patience=2", "early_stopping.threshold=100")  # of the third evaluation
KEEPS_BEST = (*EVALUATED, "trainer.load_best_model_at_end=true")


@pytest.fixture
def keeps_worst(monkeypatch):
    """The worst checkpoint counts as the best, so that the kept one is not the last: the loss falls."""

    def build(*words):
        arguments = build_arguments(*words)
        arguments.greater_is_better = True
        return arguments

    monkeypatch.setattr("ba_lora.runs.shell.build_arguments", build)


def facts(run):
    return read_json(run / "train.json")["training"]


def evaluations(run):
    return {entry["step"]: entry["eval_loss"] for entry in read_jsonl(run / "log.jsonl") if "eval_loss" in entry}


def test_the_heldout_rows_are_a_part_and_the_same_for_every_seed(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    whole = load_training_data(NLGDataConfig(name="toy", num_rows=40, max_length=400), tokenizer)
    parted = load_training_data(NLGDataConfig(name="toy", num_rows=40, max_length=400, heldout_share=0.2), tokenizer)
    assert whole.heldout is None and whole.report["rows_heldout"] == 0
    assert (len(parted.dataset), len(parted.heldout), parted.report["rows_heldout"]) == (32, 8, 8)
    assert (parted.report["rows_used"], parted.report["rows_dropped"]) == (32, 0)
    rows = [json.dumps(row["input_ids"]) for part in (parted.dataset, parted.heldout) for row in part]
    assert sorted(rows) == sorted(json.dumps(row["input_ids"]) for row in whole.dataset)
    assert parted.dataset["row"] == list(range(32)) and parted.report["tokens"] == sum(parted.dataset["length"])


def test_only_runs_that_hold_rows_out_have_another_name():
    """Those of before, whose results are committed, keep theirs."""
    plain = load_config("configs/nlg/toy.yaml")
    held = load_config("configs/nlg/toy.yaml", overrides=list(EVALUATED[:3]))
    assert plain.data.heldout_share is None and training_hash(plain) != training_hash(held)
    assert (
        plain.run_id
        == load_config(
            "configs/nlg/toy.yaml", overrides=["data.heldout_share=null", "early_stopping.patience=null"]
        ).run_id
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.eval_strategy=epoch"], "an NLU run is evaluated after every epoch"),
        (["early_stopping.patience=3"], "an NLU run is evaluated after every epoch"),
    ],
)
def test_nlu_has_its_own_evaluation(words, message):
    with pytest.raises(UserError, match=message):
        load_config("configs/nlu/toy.yaml", task="toy_pairs", overrides=words, kind="nlu")


def test_the_best_needs_a_checkpoint_of_every_evaluation():
    """Of evaluations at 50, 100, 150, … and checkpoints at 100, 200, … another than the best would be exported."""
    words = [*EVALUATED[:3], "trainer.load_best_model_at_end=true", "trainer.eval_steps=50"]
    with pytest.raises(UserError, match="needs a checkpoint of every evaluation: set trainer.save_steps=50, or"):
        load_config("configs/nlg/toy.yaml", overrides=words)
    right = [load_config("configs/nlg/toy.yaml", overrides=[*words, f"trainer.{word}"])
             for word in ("save_steps=50", "save_strategy=best")]  # fmt: skip
    assert len({config.run_id for config in right}) == 2, "they may export other weights"
    unsaid = right[0]
    del unsaid.trainer["save_steps"]
    assert build_arguments(unsaid, Path("none")).save_steps == 50


def test_saving_names_no_run_that_exports_the_last_weights():
    plain = load_config("configs/nlg/toy.yaml")
    assert load_config("configs/nlg/toy.yaml", overrides=["trainer.save_steps=7"]).run_id == plain.run_id


def test_the_line_of_an_evaluation():
    line = evaluation_line({"eval_loss": 1.5, "eval_task": 1.25, "eval_runtime": 3.0}, step=2, num_steps=8)
    assert line == "step 2/8 | held-out rows: loss 1.5000 | task 1.2500"


@pytest.mark.parametrize("method", ["ba_lora", "full_ft"])
@pytest.mark.usefixtures("keeps_worst")
def test_the_best_checkpoint_is_exported(train, capsys, method):
    run = train(*KEEPS_BEST, "trainer.save_total_limit=2", method=method)
    found = evaluations(run)
    assert list(found) == [2, 4, 6, 8] and found[2] == max(found.values()) and len(set(found.values())) == 4
    assert (facts(run)["best_step"], facts(run)["best_metric"], facts(run)["steps"]) == (2, found[2], 8)
    assert facts(run)["last_evaluation"]["step"] == 8 and facts(run)["last_evaluation"]["eval_task"] > 0
    assert "step 2/8 | held-out rows: loss " in capsys.readouterr().out
    name = "merged/model.safetensors" if method == "full_ft" else "adapter/adapter_model.safetensors"
    exported = load_file(run / name)
    best = load_file(run / "checkpoints" / "checkpoint-2" / name.split("/")[1])
    last = load_file(run / "checkpoints" / "checkpoint-8" / name.split("/")[1])
    assert all(exported[key].equal(best[key]) for key in exported)
    assert not all(exported[key].equal(last[key]) for key in exported)
    (run / "train.json").unlink()  # killed in the export
    again = load_file(train(*KEEPS_BEST, "trainer.save_total_limit=2", method=method) / name)
    assert facts(run)["best_step"] == 2 and all(exported[key].equal(again[key]) for key in exported)


def test_early_stopping_ends_the_training_and_a_resumed_one_alike(train, monkeypatch, capsys):
    from ba_lora.training.trainer import BALoRATrainer

    weights = "adapter/adapter_model.safetensors"
    whole = train(*STOPS_AT_6, name="whole")
    assert facts(whole)["steps"] == 6 and list(evaluations(whole)) == [2, 4, 6]
    assert stopped_early(whole / "checkpoints" / "checkpoint-6")
    assert not stopped_early(whole / "checkpoints" / "checkpoint-4")

    steps, real = iter(range(1, 100)), BALoRATrainer.training_step

    def stop_at_5(self, *args, **kwargs):
        if next(steps) == 5:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BALoRATrainer, "training_step", stop_at_5)
        train(*STOPS_AT_6, name="stopped")
    capsys.readouterr()
    stopped = train(*STOPS_AT_6, name="stopped")
    assert "resumed from step 4 of 8" in capsys.readouterr().out
    assert facts(stopped)["steps"] == 6, "the evaluations before the interruption count"
    assert evaluations(stopped) == evaluations(whole)
    assert (stopped / weights).read_bytes() == (whole / weights).read_bytes()

    (whole / "train.json").unlink()  # killed in the export: not a step more
    train(*STOPS_AT_6, name="whole")
    assert facts(whole)["steps"] == 6 and (stopped / weights).read_bytes() == (whole / weights).read_bytes()


def test_what_trainer_has_written_is_read_with_values_that_are_not_finite(tmp_path):
    """An overflow under fp16 has an infinite gradient, a metric may be undefined."""
    attributes = {"args": {"early_stopping_patience": 2}, "attributes": {"early_stopping_patience_counter": 2}}
    state = {"global_step": 6, "log_history": [{"grad_norm": math.inf, "eval_cola_matthews": math.nan}]}
    checkpoint = tmp_path / "checkpoint-6"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text(
        json.dumps(state | {"stateful_callbacks": {"EarlyStoppingCallback": attributes}})
    )
    write_checkpoint_manifest(checkpoint)
    assert stopped_early(checkpoint) and checkpoint_fault(checkpoint) is None
    assert checkpoint_fault(checkpoint.rename(tmp_path / "checkpoint-9")) == "it is of step 6"


@pytest.mark.usefixtures("keeps_worst")
def test_a_best_checkpoint_that_is_gone_is_told(train):
    import shutil

    run = train(*KEEPS_BEST)
    (run / "train.json").unlink()
    shutil.rmtree(run / "checkpoints" / "checkpoint-2")
    with pytest.raises(UserError, match="lacks the best checkpoint: overwrite=true trains again"):
        train(*KEEPS_BEST)
