"""The singular-value term: how much of the logits' energy lies in their largest singular values."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ba_lora.objective import regularizers
from ba_lora.objective.terms.base import BatchTerm, Outputs

if TYPE_CHECKING:
    from ba_lora.config.schema import BALoRAConfig


@dataclass(frozen=True, kw_only=True)
class Svd(BatchTerm):
    """−(Σ_{i≤k} σ_i) / N(Z) of the micro-batch's logits Z [N, V] (regularizers.svd)."""

    name: ClassVar[str] = "svd"

    top_k: int
    norm: str

    @classmethod
    def settings(cls, config: "BALoRAConfig") -> dict[str, Any]:
        return {"top_k": config.svd_top_k, "norm": config.svd_norm}

    def value(self, outputs: Outputs) -> Tensor:
        matrix = outputs.matrix()
        return regularizers.svd(matrix, regularizers.every_row(matrix), top_k=self.top_k, norm=self.norm)


TERM = Svd
