"""A training tells its evaluations as it makes them, and stops when it is asked to."""

import json

import pytest

from ba_lora.io import read_jsonl
from ba_lora.training.evaluations import EVALUATIONS, STOP, read_evaluations
from ba_lora.training.watch import WatchedTraining

HELDOUT = ("data.heldout_share=0.25", "trainer.eval_strategy=steps", "trainer.eval_steps=1")


def test_the_evaluations_of_a_training_are_on_disk(train):
    run = train(*HELDOUT, name="run")
    logged = [entry for entry in read_jsonl(run / "log.jsonl") if "eval_task" in entry]
    told = read_evaluations(run)
    assert [entry["step"] for entry in told] == [1, 2, 3] and {entry["max_steps"] for entry in told} == {3}
    assert [entry["eval_task"] for entry in told] == [entry["eval_task"] for entry in logged]


def test_a_training_that_is_asked_to_stop_ends_at_its_next_step_as_cancelled(train, monkeypatch, tmp_path, capsys):
    on_log = WatchedTraining.on_log

    def asked(self, args, state, control, logs=None, **kwargs):
        on_log(self, args, state, control, logs=logs, **kwargs)
        if "eval_task" in logs:
            (self._run_path / STOP).touch()

    monkeypatch.setattr(WatchedTraining, "on_log", asked)
    with pytest.raises(KeyboardInterrupt):
        train(*HELDOUT)
    assert "stopped at step 2: " in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "train.json").read_text())["status"] == "cancelled"
    assert [entry["step"] for entry in read_evaluations(tmp_path / "run")] == [1]


def test_of_a_resumed_training_the_last_evaluation_of_a_step_counts(tmp_path):
    assert read_evaluations(tmp_path) == []
    lines = [{"step": 2, "eval_task": 5.0}, {"step": 4, "eval_task": 4.0}, {"step": 2, "eval_task": 3.0}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / EVALUATIONS).write_text(text + '{"step": 6, "eval')  # which is still being written
    assert [(entry["step"], entry["eval_task"]) for entry in read_evaluations(tmp_path)] == [(2, 3.0), (4, 4.0)]
