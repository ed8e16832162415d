"""LoRA-FA (Zhang et al. 2023, arXiv 2308.03303): A is frozen; B's gradient is that which comes nearest to W's own,

    g_B = ∇B (A Aᵀ)⁻¹ / s²,

on which AdamW goes on. Pairs are found by name, so that a second, frozen adapter in the layers is left alone
(peft.optimizers takes parameters two by two in their order, and works in bf16). Gradients are clipped before.
"""

from typing import Any

import torch
from torch import nn

from ba_lora.methods.base import DEFAULT, AdapterOptimizer
from ba_lora.models.layers import adapter_layers, factor_parameters

DAMPING = 1e-8  # added to the diagonal of A Aᵀ


def factor_pairs(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter, float]]:
    """Return (A [r, in], B [out, r], s) of each layer's trained adapter."""
    layers = [layer for layer in adapter_layers(model) if DEFAULT in getattr(layer, "lora_A", {})]
    return [(*factor_parameters(layer, DEFAULT), layer.scaling[DEFAULT]) for layer in layers]


def decay_groups(model: nn.Module, args: Any, decayed: set[str]) -> list[dict[str, Any]]:
    """Return the trained parameters in groups with and without weight decay."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return [
        {"params": [p for name, p in trained.items() if name in decayed], "weight_decay": args.weight_decay},
        {"params": [p for name, p in trained.items() if name not in decayed], "weight_decay": 0.0},
    ]


def adam_settings(default: tuple[type, dict]) -> dict[str, Any]:
    """Return learning rate, betas and ε of the default's arguments."""
    return {name: default[1][name] for name in ("lr", "betas", "eps")}


class FrozenAAdamW(torch.optim.AdamW):
    """AdamW on g_B; what is not a pair's B is treated as ever."""

    def __init__(self, groups: list[dict], pairs: list[tuple[nn.Parameter, nn.Parameter, float]], **settings: Any):
        super().__init__(groups, **settings)
        self._pairs = pairs

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for first, second, scaling in self._pairs:
            if second.grad is not None:
                gram = first.double() @ first.double().T
                gram.diagonal().add_(DAMPING)
                second.grad = (torch.linalg.solve(gram, second.grad.double(), left=False) / scaling**2).to(second.dtype)
        return super().step(closure)


class LoraFA(AdapterOptimizer):
    """Half of LoRA's parameters, and no activations kept for A."""

    reads_gradient = True
    no_deepspeed = "LoRA-FA needs the factors of a layer together, which ZeRO splits: use DDP or one process"

    def prepare(self, model: nn.Module) -> None:
        for first, _, _ in factor_pairs(model):
            first.requires_grad_(False)

    def make(self, model: nn.Module, args: Any, decayed: set[str], default: tuple[type, dict]) -> torch.optim.Optimizer:
        return FrozenAAdamW(decay_groups(model, args, decayed), factor_pairs(model), **adam_settings(default))


OPTIMIZER = LoraFA
