"""USR1 in the middle of a training: it saves and ends with its own status, and the same command ends as without it."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from ba_lora.training.stop import STOPPED
from ba_lora.training.trainer import BALoRATrainer


def test_a_training_that_is_told_to_stop_goes_on_to_the_very_same_weights(train, tmp_path, monkeypatch, capsys):
    words = ["trainer.max_steps=6", "trainer.save_steps=100", "adapter.dropout=0.1", "export.merged=false"]
    step = BALoRATrainer.training_step

    def told(self, *arguments, **settings):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(BALoRATrainer, "training_step", told)
        with pytest.raises(SystemExit) as left:
            train(*words, name="stopped")
    assert left.value.code == STOPPED and "told to stop (USR1): saved at step 3 of 6" in capsys.readouterr().out
    assert not (tmp_path / "stopped" / "train.json").exists()  # neither failed nor cancelled
    stopped, whole = train(*words, name="stopped"), train(*words, name="whole")
    assert "resumed from step 3 of 6" in capsys.readouterr().out
    assert json.loads((stopped / "train.json").read_text())["training"]["resumed_from"] == "checkpoint-3"
    weights = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (stopped, whole)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
