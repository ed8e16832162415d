"""A term of the loss: one object with its name, its weight λ and schedule, its reduction and its function.

    PositionTerm   a value at each response position, from its logits; the mean over the effective batch
    BatchTerm      one value of a whole micro-batch; averaged over all micro-batches of all processes

A new term is one file in this folder: a subclass with a `name` equal to the file's, bound to TERM. The configuration
then has `regularizers.lambda_<name>` and `regularizers.<name>_schedule` for it; log, results and tables show it. A
PositionTerm needs `values` only: the fused loss takes its gradient by autograd, chunk by chunk. A hand-written `walk`
makes it faster, and is proved against `values`.

Legend: N response positions of a micro-batch; B of them in a block of the fused walk; V vocabulary; D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ba_lora.objective.terms.block import Block, Positions

if TYPE_CHECKING:
    from ba_lora.config.schema import BALoRAConfig


@dataclass(frozen=True)
class Outputs:
    """What a BatchTerm may look at.

    model: the trained model, unwrapped. logits: gives Z [N, V]. matrix: gives what the published terms are taken of,
    which is not Z: of a language model a matrix [N, D] or [N, V] of which only the singular values are Z's, of a
    classifier its logits or pooled features (`regularizers.features`).
    """

    model: nn.Module
    logits: Callable[[], Tensor]
    matrix: Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Term:
    """One term of the loss. `weight` is λ before its schedule; λ = 0 takes the term out."""

    name: ClassVar[str]
    reduction: ClassVar[str]  # mean: over the positions (or rows) of the effective batch | micro_batch: see the module

    weight: float = 0.0
    schedule: str = "constant"

    @classmethod
    def from_config(cls, config: "BALoRAConfig") -> "Term":
        """Return the term with the weight and schedule that `regularizers:` gives it."""
        return cls(
            weight=getattr(config, f"lambda_{cls.name}"),
            schedule=getattr(config, f"{cls.name}_schedule"),
            **cls.settings(config),
        )

    @classmethod
    def settings(cls, config: "BALoRAConfig") -> dict[str, Any]:
        """Return the term's further settings, as keywords."""
        return {}


@dataclass(frozen=True, kw_only=True)
class PositionTerm(Term):
    """A term with a value at each response position."""

    reduction: ClassVar[str] = "mean"
    num_buffers: ClassVar[int] = 3  # [B, V] buffers that `walk` takes, to size the chunks by; autograd's are a guess
    # What `walk` overwrites: 0 nothing, 1 the reference's logits, 2 the logits. Terms run in this order.
    uses_up: ClassVar[int] = 0

    def values(self, logits_NV: Tensor, positions: Positions) -> Tensor:
        """Return the term at each position [N], with its gradient; `logits_NV` is at least float32."""
        raise NotImplementedError

    def position_weights(self, positions: Positions, *, vocabulary: int) -> Tensor | None:
        """Return a weight of each position inside the mean [N], without gradient, or None where all count the same."""
        return None

    def walk(self, block: Block, factor: float) -> tuple[Tensor, Tensor | None]:
        """Return the block's (values [B], position weights [B] or None); add factor · d(Σ weight · value)/dz to its
        dL/dz."""
        with torch.enable_grad():
            logits_BV = block.logits.detach().requires_grad_()
            values_B = self.values(logits_BV, block.positions)
            weights_B = self.position_weights(block.positions, vocabulary=logits_BV.shape[1])
            weighted_B = values_B if weights_B is None else values_B * weights_B
            (gradient_BV,) = torch.autograd.grad(weighted_B.sum(), logits_BV)
        block.add(gradient_BV, factor)
        return values_B.detach(), weights_B


@dataclass(frozen=True, kw_only=True)
class BatchTerm(Term):
    """A term with one value for a whole micro-batch."""

    reduction: ClassVar[str] = "micro_batch"

    def value(self, outputs: Outputs) -> Tensor | None:
        """Return the micro-batch's value, a scalar with its gradient; None where it has none."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ModelTerm(BatchTerm):
    """A term of the weights, `function` of the model: what a method adds to the loss."""

    name: str
    function: Callable[[nn.Module], Tensor]

    def value(self, outputs: Outputs) -> Tensor:
        return self.function(outputs.model)
