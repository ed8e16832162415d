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
    """T² KL(q_T ‖ p_T), q_T = softmax(z_P / T) the reference's and p_T = softmax(z / T) the trained model's.

    Under the adaptive λ1 each position counts by a, its trust in the reference
    (regularizers.adaptive_position_weights).
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

    def emphasis(self, positions: Positions, *, vocabulary: int) -> Tensor | None:
        return self._trust(regularizers.entropy(positions.reference), vocabulary) if self._is_adaptive else None

    def walk(self, block: Block, factor: float) -> tuple[Tensor, Tensor | None]:
        """dz = a T (p_T − q_T)"""
        reference_BV, q_BV = block.positions.reference, block.buffer()
        trust_B = None
        if self._is_adaptive:
            peak_B, rest_B = softmax(reference_BV, out=q_BV)
            # the entropy, log Σ exp (z − m) − Σ q (z − m), m the largest logit
            trust_B = self._trust(rest_B - q_BV.mul_(reference_BV - peak_B[:, None]).sum(-1), block.vocabulary)
        p = block.cooled(self.temperature)
        if self.temperature != 1:
            reference_BV.div_(self.temperature)
        peak_q_B, rest_q_B = softmax(reference_BV, out=q_BV)
        # Σ q (log q − log p); the differences are taken first, so that a small divergence is not lost in rounding.
        divergence_B = reference_BV.sub_(p.logits).mul_(q_BV).sum(-1)
        divergence_B += (p.peak - peak_q_B) + (p.rest - rest_q_B)
        if factor:
            factor_B1 = self._factor(factor, trust_B, divergence_B)
            block.add(p.softmax, factor_B1)
            block.add(q_BV, -factor_B1)
        return divergence_B * self.temperature**2, trust_B

    @property
    def _is_adaptive(self) -> bool:
        return self.schedule == "adaptive"

    @staticmethod
    def _trust(entropy_N: Tensor, vocabulary: int) -> Tensor:
        return regularizers.position_weights_of_entropy(entropy_N, vocabulary=vocabulary, maximum=1.0)

    def _factor(self, factor: float, trust_B: Tensor | None, like_B: Tensor) -> Tensor:
        """Return a T, times the term's own factor, [B, 1]."""
        trust_B = torch.ones_like(like_B) if trust_B is None else trust_B
        return factor * self.temperature * trust_B[:, None]


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

    def emphasis(self, positions: Positions, *, vocabulary: int) -> Tensor | None:
        return self._trust(positions.reference.entropy, vocabulary) if self._is_adaptive else None

    def walk(self, block: Block, factor: float) -> tuple[Tensor, Tensor | None]:
        """dz = a T (p_T − q_T) in K, a T (p_T − q_tail p_T / p_tail) elsewhere"""
        top: TopLogProbs = block.positions.reference
        trust_B = self.emphasis(block.positions, vocabulary=block.vocabulary)
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
            factor_B1 = self._factor(factor, trust_B, divergence_B)
            block.add_at(top.tokens, factor_B1 * (kept_p_BK - top.log_probs.exp()))
            if has_tail:
                block.add(tail_BV, factor_B1 * (1 - (top.log_tail - log_p_tail_B).exp())[:, None])
        return divergence_B * self.temperature**2, trust_B


TERM = Consistency
