"""The switch between the trained model and the frozen one: it moves nothing, and gradients never see it."""

import inspect
import json
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import config as lora_config

from ba_lora import BALoRAConfig, BALoRATrainer
from ba_lora.errors import UserError
from ba_lora.models.layers import adapter_layers
from ba_lora.objective.reference import build_reference
from tests.support.tiny import adapter_weights, arguments, collate, tiny_llama, tiny_peft, tiny_rows

STRONG = {"lambda_consistency": 0.5, "lambda_diversity": 0.3, "lambda_svd": 0.2, "temperature": 2.0}


def changed(model):
    """Move the trained adapter away from its start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def snapshot(model):
    """What surgery on the model would change."""
    return {
        "modules": [name for name, _ in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "switches": [(layer._active_adapter, layer._disable_adapters) for layer in adapter_layers(model)],
    }


@pytest.mark.parametrize("init", [True, "pissa"])
def test_the_switch_moves_nothing_and_is_undone_after_an_error_too(init):
    model = tiny_peft(init)
    reference = build_reference(model)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="inside"), reference.use(model):
        inside = snapshot(model)
        raise RuntimeError("inside")
    assert inside["modules"] == before["modules"] and inside["parameters"] == before["parameters"]
    assert inside["switches"] != before["switches"]
    assert snapshot(model) == before


@pytest.mark.parametrize("init", [True, "pissa"])
def test_there_is_one_base(init):
    """The reference of an adapter adds at most the frozen factors, none of them trainable."""
    model = tiny_peft(init)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    before = sum(p.numel() for p in model.parameters())
    build_reference(model)
    assert sum(p.numel() for p in model.parameters()) - before == (trainable if init == "pissa" else 0)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("init", [True, "pissa"])
def test_checkpointing_recomputes_with_the_trained_adapter(init, use_reentrant):
    """Reference pass, trained pass, backward; the recomputation inside backward must not meet the frozen factors."""
    batch = collate(list(tiny_rows(3)))
    del batch["row"]
    pretrained = tiny_llama()(**batch).logits.detach()
    gradients = []
    for checkpointing in (False, True):
        model = tiny_peft(init)
        reference = build_reference(model)
        changed(model).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        with torch.no_grad(), reference.use(model) as module:
            frozen = module(**batch).logits
        torch.testing.assert_close(frozen, pretrained, rtol=0, atol=1e-4)
        outputs = model(**batch)
        assert (outputs.logits - frozen).abs().max() > 0.01
        (outputs.loss + (outputs.logits - frozen).square().mean()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-8)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "cached"), [("zero3", True), ("zero2", False), ("zero2", True)])
def test_two_deepspeed_processes_are_one_process(tmp_path, root, stage, cached):
    """Every term and the gradient's norm, with the switch and with a cache that the split model filled.

    ZeRO-3 with the switch: tests/objective/test_fused.py.
    """
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"  # DeepSpeed builds with ninja
    worker, settings = str(root / "tests" / "workers" / "train_tiny.py"), json.dumps(STRONG)
    single, double = tmp_path / "single.pt", tmp_path / "double.pt"
    subprocess.run([sys.executable, worker, settings, "2", str(single)], env=environment, check=True, timeout=3600)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [worker, settings, "1", str(double), stage, *([str(tmp_path / "cache")] if cached else [])]
    subprocess.run([*launch, *words], env=environment, cwd=root, check=True, timeout=3600)
    one, two = torch.load(single), torch.load(double)
    assert one["processes"] == 1 and two["processes"] == 2
    for name in ("loss", "task", "consistency", "weighted_consistency", "diversity", "svd", "grad_norm"):
        assert len(one["logs"][name]) == 6
        assert two["logs"][name] == pytest.approx(one["logs"][name], rel=1e-3, abs=1e-6), name
    assert one["logs"]["consistency"][-1] > 1e-4


# ---- what a library's user may bring


def of_later_peft(kind, **settings):
    """A part of LoraConfig that the oldest PEFT lacks; its cases are skipped there."""
    return getattr(lora_config, kind)(**settings) if hasattr(lora_config, kind) else kind


def adapted(dtype=torch.float32, **settings):
    """The tiny Llama with a LoRA adapter of these settings."""
    skip_without(settings)
    base = tiny_llama(dtype=dtype)
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    return get_peft_model(base, LoraConfig(**settings))


def trained(model, folder, **settings):
    built = BALoRATrainer(
        model,
        arguments(folder, **{"max_steps": 3, "learning_rate": 1e-2} | settings),
        regularizers=BALoRAConfig(**STRONG),
        train_dataset=tiny_rows(16),
        data_collator=collate,
    )
    built.train()
    return built


def skip_without(settings):
    """Skip a case of a newer PEFT than this one."""
    words = [value for value in settings.values() if isinstance(value, str)]
    if missing := [word for word in words if word in ("mica", "KasaConfig", "MontecloraConfig")
                   and word not in inspect.getsource(lora_config)]:  # fmt: skip
        pytest.skip(f"this PEFT has no {missing[0]}")


KNOWN = {
    "lora": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "mica": {"init_lora_weights": "mica"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "dora": {"use_dora": True},
    "monteclora": {"monteclora_config": of_later_peft("MontecloraConfig", buffer_size=2)},
    "pissa+dora": {"init_lora_weights": "pissa", "use_dora": True},
    "embedding": {"init_lora_weights": "pissa", "target_modules": ["q_proj", "embed_tokens"]},
    "ranks": {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 6}},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", KNOWN)
def test_the_reference_is_the_pretrained_model_at_step_zero_and_ever_after(tmp_path, name, dtype):
    """Exactly the tuned model at step 0 in any dtype; after training still the pre-trained one."""
    built = trained(adapted(dtype, **KNOWN[name]), tmp_path)
    values = [entry["consistency"] for entry in built.state.log_history if "consistency" in entry]
    assert values[0] == 0 and values[-1] > 0
    batch = collate(list(tiny_rows(2)))
    batch = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    pretrained = tiny_llama(dtype=dtype)(**batch).logits
    with torch.no_grad(), built.objective.reference.use(built.model.eval()) as module:
        frozen = module(**batch).logits
    torch.testing.assert_close(frozen, pretrained, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.05)
    assert (built.model(**batch).logits - pretrained).abs().max() > 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_save": ["embed_tokens"]}, "would follow .*embed_tokens"),
        ({"modules_to_save": ["lm_head"], "init_lora_weights": "pissa"}, "would follow .*lm_head"),
        ({"bias": "all"}, "would follow .*bias"),
        ({"bias": "lora_only", "init_lora_weights": "pissa"}, "would follow .*bias"),
        ({"init_lora_weights": False}, "init_lora_weights=False is not known"),
        ({"init_lora_weights": "orthogonal"}, "init_lora_weights='orthogonal' is not known"),
        (
            {"monteclora_config": of_later_peft("MontecloraConfig"), "init_lora_weights": False},
            "init_lora_weights=False is not known",
        ),
        ({"kasa_config": of_later_peft("KasaConfig")}, "with kasa_config is not known"),
    ],
)
def test_an_adapter_whose_reference_is_not_known_is_refused(settings, message):
    skip_without(settings)
    base = tiny_llama(attention_bias=True)
    config = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | settings
    with pytest.raises(UserError, match=message):
        build_reference(get_peft_model(base, LoraConfig(**config)))


@pytest.mark.parametrize("init", [True, "olora"])
def test_a_model_that_is_no_longer_the_pretrained_one_is_refused_at_step_zero(tmp_path, init):
    model = adapted(init_lora_weights=init)
    reference = build_reference(model)
    built = BALoRATrainer(
        changed(model),
        arguments(tmp_path),
        regularizers=BALoRAConfig(**STRONG),
        reference=reference,
        train_dataset=tiny_rows(8),
        data_collator=collate,
    )
    with pytest.raises(UserError, match="at step 0 the model differs from its reference"):
        built.train()


def test_a_randomised_residual_drawn_anew_does_not_take_up_a_checkpoint(tmp_path):
    def build(seed):
        base = tiny_llama()
        torch.manual_seed(seed)
        return get_peft_model(base, LoraConfig(r=4, lora_alpha=4, init_lora_weights="pissa_niter_1"))

    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trained(build(1), tmp_path, **settings)
    checkpoint = str(tmp_path / "checkpoint-2")
    for seed, weights in ((1, adapter_weights(whole.model)), (2, None)):
        again = BALoRATrainer(
            build(seed),
            arguments(tmp_path / "again", learning_rate=1e-2, **settings),
            regularizers=BALoRAConfig(**STRONG),
            train_dataset=tiny_rows(16),
            data_collator=collate,
        )
        if weights is None:
            with pytest.raises(UserError, match="was trained on another residual base"):
                again.train(resume_from_checkpoint=checkpoint)
            continue
        again.train(resume_from_checkpoint=checkpoint)
        for name, weight in adapter_weights(again.model).items():
            torch.testing.assert_close(weight, weights[name], rtol=1e-5, atol=1e-6)
