"""LoRA-Pro (Wang et al. 2024, arXiv 2407.18242): A and B move such that s (B g_A + g_B A) comes nearest to W's
gradient.

    g_A = (BᵀB)⁻¹ ∇A / s² + X A
    g_B = (I − B (BᵀB)⁻¹ Bᵀ) ∇B (AAᵀ)⁻¹ / s² − B X
    BᵀB X + X AAᵀ = −(BᵀB)⁻¹ ∇A Aᵀ / s²

full        the paper's: Adam's moments are those of the equivalent gradient s (B g_A + g_B A), [out, in], 2 numbers a
            weight as in full fine-tuning; what Adam makes of it is brought back to A and B by the same equations
efficient   AdamW on g_A and g_B

Gradients are clipped before. What is not a pair (a head) has AdamW.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ba_lora.methods.base import AdapterOptimizer
from ba_lora.methods.lora_fa import DAMPING, adam_settings, decay_groups, factor_pairs


def adjusted_gradients(
    first: Tensor, second: Tensor, first_gradient: Tensor, second_gradient: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return (g_A [r, in], g_B [out, r]) for A [r, in], B [out, r], their gradients and s; computed in float64.

    With B = 0 it is (∇A, ∇B (AAᵀ)⁻¹ / s²).
    """
    a, b, da, db = (tensor.double() for tensor in (first, second, first_gradient, second_gradient))
    eye = DAMPING * torch.eye(len(a), dtype=a.dtype, device=a.device)
    aa, bb = a @ a.T + eye, b.T @ b + eye
    right = torch.linalg.solve(aa, db, left=False) / scaling**2
    if not b.any():
        return da.to(first.dtype), right.to(first.dtype)
    left = torch.linalg.solve(bb, da) / scaling**2
    values_b, vectors_b = torch.linalg.eigh(bb)
    values_a, vectors_a = torch.linalg.eigh(aa)
    target = vectors_b.T @ (-left @ a.T) @ vectors_a
    x = vectors_b @ (target / (values_b[:, None] + values_a[None])) @ vectors_a.T
    g_b = right - b @ torch.linalg.solve(bb, b.T @ right) - b @ x
    return (left + x @ a).to(first.dtype), g_b.to(second.dtype)


class ProAdamW(torch.optim.AdamW):
    """AdamW under LoRA-Pro's gradients; `full`: the moments are those of the equivalent gradient."""

    def __init__(
        self, groups: list[dict], pairs: list[tuple[nn.Parameter, nn.Parameter, float]], *, full: bool, **settings: Any
    ):
        super().__init__(groups, **settings)
        self._pairs, self._full = pairs, full

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        for first, second, scaling in self._pairs:
            if first.grad is None or second.grad is None:
                continue
            first.grad, second.grad = adjusted_gradients(first, second, first.grad, second.grad, scaling)
            if self._full:
                self._full_step(first, second, scaling, group_of)
        return super().step(closure)  # which leaves parameters without a gradient alone

    def _full_step(self, first: Tensor, second: Tensor, scaling: float, group_of: dict[int, dict]) -> None:
        group, state = group_of[id(first)], self.state[first]
        gradient = scaling * (second @ first.grad + second.grad @ first)
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        steps = state["step"].item()
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        spread = (state["exp_avg_sq"] / (1 - beta2**steps)).sqrt_().add_(group["eps"])
        normalised = state["exp_avg"] / (1 - beta1**steps) / spread
        moves = adjusted_gradients(
            first, second, scaling * second.T @ normalised, scaling * normalised @ first.T, scaling
        )
        for parameter, move in zip((first, second), moves, strict=True):
            own = group_of[id(parameter)]
            parameter.mul_(1 - own["lr"] * own["weight_decay"]).sub_(own["lr"] * move)
            parameter.grad = None


class LoraPro(AdapterOptimizer):
    """Costs two small eigenvalue problems a layer and step."""

    options = {"form": ("full", ("full", "efficient"))}
    reads_gradient = True
    no_deepspeed = "LoRA-Pro needs the factors of a layer together, which ZeRO splits: use DDP or one process"

    def make(self, model: nn.Module, args: Any, decayed: set[str], default: tuple[type, dict]) -> torch.optim.Optimizer:
        groups = decay_groups(model, args, decayed)
        full = self.option["form"] == "full"
        return ProAdamW(groups, factor_pairs(model), full=full, **adam_settings(default))


OPTIMIZER = LoraPro
