"""DyLoRA (Valipour et al. 2022, arXiv 2210.07558): LoRA that works at every rank up to r.

Each optimizer step draws b of 1 … r, the same for all layers: y = W x + (α/b) B[:, :b] A[:b] x. With `frozen`, as in
the code (huawei-noah/Efficient-NLP), only row b of A and column b of B learn in that step. b follows from seed and
step, so that it is one on all processes, micro-batches and recomputed passes, and in a resumed run.

AdamW also moves (by its momentum) and decays the rows that do not learn in a step, as in their code. `restore` puts
these rows back. Their momentum is then lost, and they learn much less (docs/findings.md). After training,
`export.ranks` writes the plain LoRA of each rank asked for.
"""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ba_lora.methods.base import DEFAULT
from ba_lora.methods.lora import Lora
from ba_lora.methods.lora_fa import factor_pairs
from ba_lora.models.layers import adapter_layers


class DyLora(Lora):
    """A rank a step."""

    options = {"frozen": (True, (True, False)), "restore": (False, (True, False))}
    has_factors = False  # no other inits and optimizers: a rank below r would be a share of them only
    takes_dora = False
    cuts_ranks = True
    draws_in_training = "rank of each step"
    no_deepspeed = "DyLoRA sets gradients of single rows, which ZeRO splits: use DDP or one process"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._rank, self._before = 0, []

    def prepare(self, model: nn.Module) -> None:
        """Put a hook behind each A that takes the rows above b away and sets the scaling to α/b."""
        if getattr(model, "_dylora_hooked", False):
            return
        model._dylora_hooked = True
        for layer in adapter_layers(model):
            first = layer.lora_A[DEFAULT]
            first.register_forward_hook(lambda module, inputs, output: self._cut(module, output))

    def _cut(self, module: nn.Module, output: Tensor) -> Tensor:
        """Return A x with zeros from b on, times r/b; the whole of it outside training steps."""
        if not module.training or not self._rank:
            return output
        return cut(output, self._rank)

    def begin_step(self, model: nn.Module, step: int) -> None:
        self._rank = drawn_rank(self.seed, step, self.adapter.rank)

    def before_step(self, model: nn.Module, step: int) -> None:
        kept = self._learning()
        self._before = []
        for first, second, _ in factor_pairs(model):
            if self.option["restore"]:
                self._before.append((first.detach().clone(), second.detach().clone()))
            mask = torch.zeros(first.shape[0], dtype=first.dtype, device=first.device)
            mask[kept] = 1
            first.grad.mul_(mask[:, None])
            second.grad.mul_(mask)

    def after_step(self, model: nn.Module, step: int, optimizer: torch.optim.Optimizer) -> None:
        if not self.option["restore"]:
            return
        kept = self._learning()
        with torch.no_grad():
            for (first, second, _), (old_first, old_second) in zip(factor_pairs(model), self._before, strict=True):
                old_first[kept] = first[kept]
                old_second[:, kept] = second[:, kept]
                first.copy_(old_first)
                second.copy_(old_second)
        self._before = []

    @contextlib.contextmanager
    def at_rank(self, model: nn.Module, rank: int) -> Iterator[None]:
        layers = [layer.lora_A[DEFAULT] for layer in adapter_layers(model)]
        hooks = [first.register_forward_hook(lambda module, inputs, output: cut(output, rank)) for first in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _learning(self) -> slice:
        return slice(self._rank - 1 if self.option["frozen"] else 0, self._rank)


def drawn_rank(seed: int, step: int, rank: int) -> int:
    """Return b of an optimizer step, 1 … rank."""
    return random.Random(f"dylora {seed} {step}").randint(1, rank)


def cut(hidden: Tensor, rank: int) -> Tensor:
    """Return A x [..., r] with zeros from `rank` on, times r / rank."""
    mask = torch.zeros(hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
    mask[:rank] = hidden.shape[-1] / rank
    return hidden * mask


TUNER = DyLora
