"""The diversity term: the negative entropy of the next token's distribution."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ba_lora.objective.regularizers import entropy
from ba_lora.objective.terms.base import PositionTerm
from ba_lora.objective.terms.block import Block, Positions

if TYPE_CHECKING:
    from ba_lora.config.schema import BALoRAConfig


@dataclass(frozen=True, kw_only=True)
class Diversity(PositionTerm):
    """−H(softmax z), over the whole vocabulary (paper2024) or over the `top_k` largest logits (iclr2026)."""

    name: ClassVar[str] = "diversity"
    num_buffers: ClassVar[int] = 0
    uses_up: ClassVar[int] = 2

    top_k: int | None = None

    @classmethod
    def settings(cls, config: "BALoRAConfig") -> dict[str, Any]:
        return {"top_k": config.diversity_top_k}

    def values(self, logits_NV: Tensor, positions: Positions) -> Tensor:
        return -entropy(logits_NV, top_k=self.top_k)

    def walk(self, block: Block, factor: float) -> tuple[Tensor, None]:
        """n = Σ p log p, dz = p (log p − n); of the top k only n = Σ s log s, dz = s (log s − n) at those k."""
        if self.top_k is None or self.top_k >= block.logits.shape[1]:
            p_log_p_BV = block.logits.sub_(block.peak[:, None]).sub_(block.rest[:, None]).mul_(block.softmax)
            values_B = p_log_p_BV.sum(-1)
            block.add_softmax(-factor * values_B[:, None])
            block.add_logits(factor)
            return values_B, None
        top_BK, tokens_BK = block.logits.topk(self.top_k, dim=-1)
        log_s_BK = top_BK.log_softmax(-1)
        s_BK = log_s_BK.exp()
        values_B = (s_BK * log_s_BK).sum(-1)
        block.add_at(tokens_BK, factor * s_BK * (log_s_BK - values_B[:, None]))
        return values_B, None


TERM = Diversity
