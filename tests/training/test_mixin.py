"""BALoRALoss over trainers that are not ours: transformers' own, and a subclass with its own way of things."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from ba_lora import BALoRAConfig, BALoRALoss, BALoRATrainer, export_lora
from ba_lora.errors import UserError
from tests.support.tiny import VOCABULARY, arguments, collate, tiny_peft, tiny_rows

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


def trained(kind, folder, regularizers=None, model=None, rows=None, **settings):
    """Return the trainer after three optimizer steps of two micro-batches."""
    more = {} if regularizers is None else {"regularizers": regularizers}
    trainer = kind(
        model or tiny_peft("pissa"),
        arguments(folder, max_steps=3, learning_rate=1e-2, gradient_accumulation_steps=2, **settings),
        train_dataset=rows or tiny_rows(16),
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


def test_it_counts_the_positions_of_a_model_that_transformers_does_not_know_to_shift(tmp_path):
    """GPT-2's rows of plain text: the first label is no target, and counts for nothing."""
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **size, **no_dropout))
    rows = tiny_rows(16).map(lambda row: {"labels": row["input_ids"]})
    batch = collate([{**row, "labels": row["input_ids"]} for row in rows.select(range(4))])  # the first step's
    targets = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:].flatten()
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets).item()
    for kind in (BALoRATrainer, Mixed):
        found = logged(trained(kind, tmp_path, STRONG, copy.deepcopy(model), rows), "task")
        assert found[0][0] == pytest.approx(expected, rel=1e-3)


def test_a_resumed_adapter_stays_on_its_residual_base(tmp_path):
    trained(Mixed, tmp_path, STRONG, save_strategy="steps", save_steps=2)
    checkpoint, settings = tmp_path / "checkpoint-2", {"train_dataset": tiny_rows(16), "data_collator": collate}
    again = arguments(tmp_path, max_steps=3, learning_rate=1e-2, gradient_accumulation_steps=2)
    Mixed(tiny_peft("pissa"), again, regularizers=STRONG, **settings).train(resume_from_checkpoint=str(checkpoint))
    torch.manual_seed(5)
    other = Mixed(tiny_peft("pissa_niter_1"), again, regularizers=STRONG, **settings)
    with pytest.raises(UserError, match="checkpoint-2 was trained on another residual base"):
        other.train(resume_from_checkpoint=str(checkpoint))


def test_another_task_loss_is_refused(tmp_path):
    with pytest.raises(UserError, match="another task loss than L_task"):
        trained(Mixed, tmp_path, STRONG, label_smoothing_factor=0.1)
