"""The switch between the trained model and the frozen one: it moves nothing, and gradients never see it."""

import json
import os
import subprocess
import sys

import pytest
import torch

from ba_lora.reference import adapter_layers, build_reference
from tests.tiny import collate, tiny_llama, tiny_peft, tiny_rows

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

    ZeRO-3 with the switch: tests/test_fused.py.
    """
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"  # DeepSpeed builds with ninja
    worker, settings = str(root / "tests" / "workers" / "train_tiny.py"), json.dumps(STRONG)
    single, double = tmp_path / "single.pt", tmp_path / "double.pt"
    subprocess.run([sys.executable, worker, settings, "2", str(single)], env=environment, check=True, timeout=300)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [worker, settings, "1", str(double), stage, *([str(tmp_path / "cache")] if cached else [])]
    subprocess.run([*launch, *words], env=environment, cwd=root, check=True, timeout=600)
    one, two = torch.load(single), torch.load(double)
    assert one["processes"] == 1 and two["processes"] == 2
    for name in ("loss", "task", "consistency", "weighted_consistency", "diversity", "svd", "grad_norm"):
        assert len(one["logs"][name]) == 6
        assert two["logs"][name] == pytest.approx(one["logs"][name], rel=1e-3, abs=1e-6), name
    assert one["logs"]["consistency"][-1] > 1e-4
