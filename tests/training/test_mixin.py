"""BALoRALoss over trainers that are not ours: transformers' own, and a subclass with its own way of things."""

import pytest
import torch
from transformers import Trainer

from ba_lora import BALoRAConfig, BALoRALoss, BALoRATrainer, export_lora
from ba_lora.errors import UserError
from tests.support.tiny import arguments, collate, tiny_peft, tiny_rows

STRONG = BALoRAConfig(lambda_consistency=0.5, lambda_diversity=0.3, lambda_svd=0.2, svd_schedule="two_phase")
OFF = BALoRAConfig(lambda_consistency=0, lambda_diversity=0, lambda_svd=0)
TASK_ONLY = BALoRAConfig(lambda_consistency=0, lambda_diversity=1e-30, lambda_svd=0)  # through our loss


class Mixed(BALoRALoss, Trainer):
    pass


class Theirs(Trainer):
    """A trainer with a step and a log of its own."""

    def training_step(self, *args, **kwargs):
        self.steps = getattr(self, "steps", 0) + 1
        return super().training_step(*args, **kwargs)

    def log(self, logs, *args, **kwargs):
        super().log(logs | {"theirs": 1.0}, *args, **kwargs)


class OverTheirs(BALoRALoss, Theirs):
    pass


def trained(kind, folder, regularizers=None, model=None, **settings):
    """Return the trainer after three optimizer steps of two micro-batches."""
    more = {} if regularizers is None else {"regularizers": regularizers}
    trainer = kind(
        model or tiny_peft("pissa"),
        arguments(folder, max_steps=3, learning_rate=1e-2, gradient_accumulation_steps=2, **settings),
        train_dataset=tiny_rows(16),
        data_collator=collate,
        **more,
    )
    trainer.train()
    return trainer


def logged(trainer, *names):
    return [[entry[name] for name in names] for entry in trainer.state.log_history if set(names) <= set(entry)]


def test_it_trains_as_ba_lora_trainer_does(tmp_path):
    terms = ("loss", "task", "consistency", "diversity", "svd")
    ours, plain, over = (trained(kind, tmp_path, STRONG) for kind in (BALoRATrainer, Mixed, OverTheirs))
    wanted = logged(ours, *terms)
    assert len(wanted) == 3 and wanted[-1][2] > 0
    for trainer in (plain, over):
        assert torch.tensor(logged(trainer, *terms)).allclose(torch.tensor(wanted), rtol=1e-5, atol=1e-7)
    assert over.steps == 6 and logged(over, "theirs", "svd") and not logged(plain, "theirs")
    folder = export_lora(plain, tmp_path / "lora")
    assert (folder / "adapter_model.safetensors").is_file()


def test_without_terms_it_is_the_trainer_below(tmp_path):
    losses = [
        logged(trained(kind, tmp_path, of), "loss") for kind, of in ((Trainer, None), (Mixed, OFF), (Mixed, TASK_ONLY))
    ]
    assert len(losses[0]) == 3 and losses[1] == losses[0]
    assert torch.tensor(losses[2]).allclose(torch.tensor(losses[0]), rtol=1e-5)


def test_another_task_loss_is_refused(tmp_path):
    with pytest.raises(UserError, match="another task loss than L_task"):
        trained(Mixed, tmp_path, STRONG, label_smoothing_factor=0.1)
