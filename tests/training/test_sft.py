"""BALoRASFTTrainer: TRL's SFTTrainer under the same loss."""

import importlib
import sys

import pytest
import torch
from datasets import Dataset
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ba_lora import BALoRAConfig, export_lora
from ba_lora.errors import UserError
from ba_lora.methods.base import AdapterOptimizer, TrainingMethod, Tuner
from tests.support.chat_templates import chat_tokenizer
from tests.support.tiny import tiny_moe

OFF = BALoRAConfig(lambda_consistency=0, lambda_diversity=0, lambda_svd=0)


def test_without_trl_it_says_how_to_get_it_and_the_mixin_is_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    for name in ("sft", "mixin"):
        monkeypatch.delitem(sys.modules, f"ba_lora.training.{name}", raising=False)
    assert importlib.import_module("ba_lora.training.mixin").BALoRALoss
    with pytest.raises(UserError, match=r"needs TRL: pip install -e '\.\[trl\]' in"):
        import ba_lora.training.sft  # noqa: F401


@pytest.fixture
def sft(tiny_model, tmp_path):
    """Train 20 steps of two rows: `sft(regularizers, …)` → (trainer, the logged losses)."""
    trl = pytest.importorskip("trl")
    from ba_lora import BALoRASFTTrainer

    def run(
        regularizers=None,
        *,
        init="pissa",
        targets="all-linear",
        rows=None,
        tokenizer=None,
        steps=20,
        model=None,
        **settings,
    ):
        torch.manual_seed(0)
        rows = rows or [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(40)]
        usual = dict(
            output_dir=str(tmp_path / "sft"),
            max_steps=steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            seed=3,
        )
        arguments = trl.SFTConfig(**usual | settings)
        kind, more = (
            (trl.SFTTrainer, {}) if regularizers is None else (BALoRASFTTrainer, {"regularizers": regularizers})
        )
        trainer = kind(
            model=model or AutoModelForCausalLM.from_pretrained(tiny_model),
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer or AutoTokenizer.from_pretrained(tiny_model),
            peft_config=None
            if hasattr(model, "peft_config")
            else LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=init),
            **more,
        )
        trainer.train()
        return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    return run


@pytest.mark.slow
def test_without_terms_it_is_sfttrainer(sft):
    _, own = sft()
    _, ours = sft(OFF)
    assert len(own) == 20 and ours == pytest.approx(own, abs=1e-6)
    tiny = BALoRAConfig(lambda_consistency=0, lambda_diversity=1e-30, lambda_svd=0)
    trainer, by_our_loss = sft(tiny)
    assert trainer.objective is not None and by_our_loss == pytest.approx(own, abs=1e-5), "the task's loss is the same"


@pytest.mark.slow
def test_it_trains_chat_packing_and_all_terms_and_exports(sft, tiny_model, tmp_path):
    tokenizer = chat_tokenizer(tiny_model, "chatml_with_mask")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "base")
    rows = [{"messages": turns}] * 12
    trainer, _ = sft(STRONG, rows=rows, tokenizer=tokenizer, steps=3, model=model, assistant_only_loss=True)
    entry = next(entry for entry in trainer.state.log_history if "consistency" in entry)
    assert {"task", "consistency", "diversity", "svd"} <= set(entry)
    ids = torch.arange(3, 15)[None]
    trained = trainer.plain_model().eval()(ids).logits
    folder = export_lora(trainer, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder)
    torch.testing.assert_close(loaded.eval()(ids).logits, trained, atol=1e-4, rtol=1e-4)


STRONG = BALoRAConfig(lambda_consistency=0.1, lambda_diversity=0.1, lambda_svd=0.01)
BY_ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_length": 512}


@pytest.mark.slow
def test_packed_rows_have_the_terms_of_rows_by_themselves(sft):
    """Eight rows in one batch, padded or in one row behind each other; two steps, so that all terms have a value."""
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]
    settings = BY_ONE | {"lr_scheduler_type": "constant"}
    by_rows, _ = sft(STRONG, rows=rows, steps=2, **settings | {"per_device_train_batch_size": 8})
    packed, _ = sft(STRONG, rows=rows, steps=2, packing=True, **settings)
    assert len(packed.train_dataset) == 1
    for ours, theirs in zip(packed.state.log_history[:2], by_rows.state.log_history[:2], strict=True):
        for name in ("loss", "task", "consistency", "diversity", "svd"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6), name
    assert packed.state.log_history[1]["consistency"] > 0


@pytest.mark.slow
def test_packing_without_terms_is_sfttrainers(sft):
    settings = BY_ONE | {"packing": True, "max_length": 128, "steps": 6}
    _, own = sft(**settings)
    _, ours = sft(OFF, **settings)
    _, by_our_loss = sft(BALoRAConfig(lambda_consistency=0, lambda_diversity=1e-30, lambda_svd=0), **settings)
    assert ours == pytest.approx(own, abs=1e-6) and by_our_loss == pytest.approx(own, abs=1e-5)


@pytest.mark.slow
def test_the_loss_of_experts_is_left_out_only_when_asked(sft):
    """SFTTrainer adds a model's own load-balancing loss."""
    with pytest.raises(UserError, match="router_aux_loss_coef=0.0"):
        sft(STRONG, model=tiny_moe(), targets=["q_proj", "v_proj"], steps=1)
    trainer, _ = sft(STRONG, model=tiny_moe(), targets=["q_proj", "v_proj"], steps=1, router_aux_loss_coef=0.0)
    assert "consistency" in trainer.state.log_history[0]


@pytest.mark.slow
def test_another_task_loss_is_refused(sft):
    with pytest.raises(UserError, match="another task loss than L_task"):
        sft(BALoRAConfig(), loss_type="dft", steps=1)
    with pytest.raises(UserError, match="gradient_share is BALoRATrainer's"):
        sft(BALoRAConfig(lambda_mode="gradient_share"), steps=1)


def test_a_method_that_acts_in_each_step_is_refused(sft, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    settings = AdaLoraConfig(init_r=4, target_r=2, total_step=20, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="use BALoRATrainer"):
        sft(OFF, model=get_peft_model(model, settings))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.training_method = TrainingMethod(Tuner(), optimizer=AdapterOptimizer())
    with pytest.raises(UserError, match="use BALoRATrainer"):
        sft(OFF, model=model)
