"""BALoRASFTTrainer: TRL's SFTTrainer under the same loss."""

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

OFF = BALoRAConfig(lambda_consistency=0, lambda_diversity=0, lambda_svd=0)


def test_without_trl_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "ba_lora.training.sft", raising=False)
    with pytest.raises(UserError, match=r"needs TRL: pip install 'ba-lora\[trl\]'"):
        import ba_lora.training.sft  # noqa: F401


@pytest.fixture
def sft(tiny_model, tmp_path):
    """Train 20 steps of two rows: `sft(regularizers, …)` → (trainer, the logged losses)."""
    trl = pytest.importorskip("trl")
    from ba_lora import BALoRASFTTrainer

    def run(regularizers=None, *, init="pissa", rows=None, tokenizer=None, steps=20, model=None, **settings):
        torch.manual_seed(0)
        rows = rows or [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(40)]
        arguments = trl.SFTConfig(
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
            **settings,
        )
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
            else LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights=init),
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
    strong = BALoRAConfig(lambda_consistency=0.1, lambda_diversity=0.1, lambda_svd=0.01)
    rows = [{"messages": turns}] * 12
    trainer, _ = sft(strong, rows=rows, tokenizer=tokenizer, steps=3, model=model, assistant_only_loss=True)
    entry = next(entry for entry in trainer.state.log_history if "consistency" in entry)
    assert {"task", "consistency", "diversity", "svd"} <= set(entry)
    ids = torch.arange(3, 15)[None]
    trained = trainer.plain_model().eval()(ids).logits
    folder = export_lora(trainer, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder)
    torch.testing.assert_close(loaded.eval()(ids).logits, trained, atol=1e-4, rtol=1e-4)


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
