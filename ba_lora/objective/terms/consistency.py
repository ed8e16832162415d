"""The consistency term: stay near the pre-trained model's distribution of the next token.

Two forms of one term, by what the reference gives (reference.py chooses): its logits, or what a cache on disk keeps.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ba_lora.objective import regularizers
from ba_lora.objective.regularizers import TopLogProbs
from ba_lora.objective.terms.base import PositionTerm
from ba_lora.objective.terms.block import Block, Positions, softmax

if TYPE_CHECKING:
    from ba_lora.config.schema import BALoRAConfig


@dataclass(frozen=True, kw_only=True)
class Consistency(PositionTerm):
    """T² KL(r_T ‖ p_T), r_T = softmax(z_P / T) the reference's and p_T = softmax(z / T) the trained model's.

    Under the adaptive λ1 each position has a weight a (regularizers.adaptive_position_weights).
    """

    name: ClassVar[str] = "consistency"
    uses_up: ClassVar[int] = 1

    temperature: float = 1.0

    @classmethod
    def settings(cls, config: "BALoRAConfig") -> dict[str, Any]:
        return {"temperature": config.temperature}

    @property
    def num_buffers(self) -> int:
        return 1 if self.temperature == 1 else 3

    def values(self, logits_NV: Tensor, positions: Positions) -> Tensor:
        return regularizers.consistency(
            logits_NV,
            positions.reference,
            regularizers.every_row(logits_NV),
            temperature=self.temperature,
            reduction="none",
        )

    def position_weights(self, positions: Positions, *, vocabulary: int) -> Tensor | None:
        return self._weights(regularizers.entropy(positions.reference), vocabulary) if self._is_adaptive else None

    def walk(self, block: Block, factor: float) -> tuple[Tensor, Tensor | None]:
        """dz = a T (p_T − r_T)"""
        reference_BV, r_BV = block.positions.reference, block.buffer()
        weights_B = None
        if self._is_adaptive:
            peak_B, rest_B = softmax(reference_BV, out=r_BV)
            # the entropy, log Σ exp (z − m) − Σ r (z − m), m the largest logit
            weights_B = self._weights(rest_B - r_BV.mul_(reference_BV - peak_B[:, None]).sum(-1), block.vocabulary)
        p = block.cooled(self.temperature)
        if self.temperature != 1:
            reference_BV.div_(self.temperature)
        peak_r_B, rest_r_B = softmax(reference_BV, out=r_BV)
        # Σ r (log r − log p); the differences are taken first, so that a small divergence is not lost in rounding.
        divergence_B = reference_BV.sub_(p.logits).mul_(r_BV).sum(-1)
        divergence_B += (p.peak - peak_r_B) + (p.rest - rest_r_B)
        if factor:
            factor_B1 = self._factor(factor, weights_B, divergence_B)
            block.add(p.softmax, factor_B1)
            block.add(r_BV, -factor_B1)
        return divergence_B * self.temperature**2, weights_B

    @property
    def _is_adaptive(self) -> bool:
        return self.schedule == "adaptive"

    @staticmethod
    def _weights(entropy_N: Tensor, vocabulary: int) -> Tensor:
        return regularizers.position_weights_of_entropy(entropy_N, vocabulary=vocabulary, maximum=1.0)

    def _factor(self, factor: float, weights_B: Tensor | None, like_B: Tensor) -> Tensor:
        """Return a T, times the term's own factor, [B, 1]."""
        weights_B = torch.ones_like(like_B) if weights_B is None else weights_B
        return factor * self.temperature * weights_B[:, None]


@dataclass(frozen=True, kw_only=True)
class CachedConsistency(Consistency):
    """The same over K + 1 outcomes: the reference's K likeliest tokens, and all others as one
    (regularizers.cached_consistency)."""

    @property
    def num_buffers(self) -> int:
        return 1 if self.temperature == 1 else 2

    def values(self, logits_NV: Tensor, positions: Positions) -> Tensor:
        return regularizers.cached_consistency(
            logits_NV,
            positions.reference,
            regularizers.every_row(logits_NV),
            temperature=self.temperature,
            reduction="none",
        )

    def position_weights(self, positions: Positions, *, vocabulary: int) -> Tensor | None:
        return self._weights(positions.reference.entropy, vocabulary) if self._is_adaptive else None

    def walk(self, block: Block, factor: float) -> tuple[Tensor, Tensor | None]:
        """dz = a T (p_T − r_T) in K, a T (p_T − r_tail p_T / p_tail) elsewhere"""
        top: TopLogProbs = block.positions.reference
        weights_B = self.position_weights(block.positions, vocabulary=block.vocabulary)
        p = block.cooled(self.temperature)
        kept_log_p_BK = (p.logits.gather(1, top.tokens) - p.peak[:, None]) - p.rest[:, None]
        tail_BV = block.buffer().copy_(p.softmax) if p.softmax is block.softmax else p.softmax
        kept_p_BK = tail_BV.gather(1, top.tokens)
        # p is set to 0 in K: its sum is then the tail's mass, good down to the smallest float, where 1 − Σ p cancels.
        tail_BV.scatter_(1, top.tokens, 0.0)
        divergence_B = (top.log_probs.exp() * (top.log_probs - kept_log_p_BK)).sum(-1)
        if has_tail := top.tokens.shape[1] < block.vocabulary:
            log_p_tail_B = tail_BV.sum(-1).clamp_(min=torch.finfo(tail_BV.dtype).tiny).log_()
            divergence_B += top.log_tail.exp() * (top.log_tail - log_p_tail_B)
        if factor:
            factor_B1 = self._factor(factor, weights_B, divergence_B)
            block.add_at(top.tokens, factor_B1 * (kept_p_BK - top.log_probs.exp()))
            if has_tail:
                block.add(tail_BV, factor_B1 * (1 - (top.log_tail - log_p_tail_B).exp())[:, None])
        return divergence_B * self.temperature**2, weights_B


TERM = Consistency
