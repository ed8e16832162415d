"""USR1 in the middle of a training: it saves and ends with its own status, and the same command ends as without it."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from ba_lora.io import read_jsonl
from ba_lora.runs.shell import TrainingRun
from ba_lora.training.stop import STOPPED, StopOnSignal
from ba_lora.training.trainer import BALoRATrainer


@pytest.fixture
def told(train, monkeypatch, capsys):
    """Train, and give USR1 after so many steps: `told(2, *words, name=…)` → what was printed."""
    step = BALoRATrainer.training_step

    def run(after, *words, **settings):
        def with_signal(self, *arguments, **others):
            if self.state.global_step == after:
                os.kill(os.getpid(), signal.SIGUSR1)
            return step(self, *arguments, **others)

        with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
            patch.setattr(BALoRATrainer, "training_step", with_signal)
            train(*words, **settings)
        assert left.value.code == STOPPED
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("more", [[], ["model.dtype=bfloat16", "adapter.dtype=base"]], ids=["float32", "bfloat16"])
def test_a_training_that_is_told_to_stop_goes_on_to_the_very_same_weights(train, told, tmp_path, capsys, more):
    words = ["trainer.max_steps=6", "trainer.save_steps=100", "adapter.dropout=0.1", "export.merged=false", *more]
    assert "told to stop (USR1): saved at step 3 of 6" in told(2, *words, name="stopped")
    assert not (tmp_path / "stopped" / "train.json").exists()  # neither failed nor cancelled
    stopped, whole = train(*words, name="stopped"), train(*words, name="whole")
    assert "resumed from step 3 of 6" in capsys.readouterr().out
    assert json.loads((stopped / "train.json").read_text())["training"]["resumed_from"] == "checkpoint-3"
    weights = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (stopped, whole)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert {weight.dtype for weight in weights[0].values()} == {torch.bfloat16 if more else torch.float32}


def test_no_process_leaves_before_all_have_saved():
    """A launcher ends all when one leaves, and the main process may still write its checkpoint's list of files."""
    waited = []
    run = object.__new__(TrainingRun)
    run.arguments = SimpleNamespace(
        per_device_train_batch_size=1, gradient_accumulation_steps=1, world_size=2, report_to=[]
    )
    run.process = SimpleNamespace(wait_for_everyone=lambda: waited.append(True))
    run.print, run.run_path, run.num_steps, run.stop = lambda line: None, Path("run"), 6, StopOnSignal()

    def train_or_resume(folder, num_steps):
        run.stop.stopped = True

    state = SimpleNamespace(global_step=3)
    trainer = SimpleNamespace(add_callback=lambda one: None, train_or_resume=train_or_resume, state=state)
    with pytest.raises(SystemExit) as left:
        run.fit(trainer)
    assert left.value.code == STOPPED and waited


OF_EPOCHS = (  # 6 steps an epoch
    "data.num_rows=32", "data.heldout_share=0.25", "trainer.max_steps=-1", "trainer.num_train_epochs=3",
    "trainer.eval_strategy=epoch", "trainer.save_strategy=epoch", "trainer.load_best_model_at_end=true",
    "export.merged=false",
)  # fmt: skip


def evaluations(run):
    return [(entry["step"], entry["eval_loss"]) for entry in read_jsonl(run / "log.jsonl") if "eval_loss" in entry]


@pytest.mark.parametrize(("after", "saved"), [(7, 8), (5, 6)], ids=["in an epoch's middle", "at its end"])
def test_what_belongs_to_an_epochs_end_comes_when_it_is_over(train, told, after, saved):
    """An evaluation in the middle would count for early stopping and for the best checkpoint."""
    whole = train(*OF_EPOCHS, name="whole")
    assert [step for step, _ in evaluations(whole)] == [6, 12, 18]
    assert f"saved at step {saved} of 18" in told(after, *OF_EPOCHS, name="stopped")
    assert evaluations(train(*OF_EPOCHS, name="stopped")) == evaluations(whole)


def test_where_an_evaluation_decides_on_saving_the_next_step_is_the_last(train, told):
    words = [word for word in OF_EPOCHS if "strategy" not in word and "best" not in word]
    words += ["trainer.eval_strategy=steps", "trainer.eval_steps=3", "trainer.save_strategy=best"]
    words += ["trainer.load_best_model_at_end=true", "trainer.learning_rate=1.0e-9"]
    assert "saved at step 7 of 18" in told(5, *words, name="stopped")
    assert [step for step, _ in evaluations(train(*words, name="stopped"))] == [3, 6, 9, 12, 15, 18]
