"""The task: cross-entropy of the response tokens. Its weight is 1."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from ba_lora.objective.terms.base import PositionTerm
from ba_lora.objective.terms.block import Block, Positions


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(PositionTerm):
    """−log p_y, y the token that the position predicts."""

    name: ClassVar[str] = "task"
    num_buffers: ClassVar[int] = 0

    weight: float = 1.0

    def values(self, logits_NV: Tensor, positions: Positions) -> Tensor:
        return F.cross_entropy(logits_NV, positions.targets, reduction="none")

    def walk(self, block: Block, factor: float) -> tuple[Tensor, None]:
        """dz = p − onehot(y)"""
        targets_B1 = block.positions.targets[:, None]
        values_B = (block.peak - block.logits.gather(1, targets_B1).squeeze(1)) + block.rest
        block.add_softmax(factor)
        block.add_at(targets_B1, values_B.new_full(targets_B1.shape, -factor))
        return values_B, None
