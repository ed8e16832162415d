"""MiLoRA (Wang et al. 2024, arXiv 2406.09044): PiSSA with the smallest singular components instead of the largest.

W = U S Vᵀ; B₀ = U_{−r} √(S_{−r}/s), A₀ = √(S_{−r}/s) V_{−r}ᵀ, the base keeps W − s B₀A₀. A component of singular value
0 gives a row of A and a column of B that are both 0, and never learn: that is told.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from torch import Tensor, nn

from ba_lora.methods.base import TrainingRows
from ba_lora.methods.pissa import ResidualInit, save_weight_factors

if TYPE_CHECKING:
    from ba_lora.config.schema import RunConfig

DEAD = 1e-6  # of the largest singular value: what is below is 0 but for rounding


def milora_factors(weight_OI: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return A₀ [r, in], B₀ [out, r] and the largest singular value."""
    left, values, right = torch.linalg.svd(weight_OI, full_matrices=False)
    roots = (values[-rank:] / scaling).sqrt()
    return roots[:, None] * right[-rank:], left[:, -rank:] * roots, values[0]


class MiLora(ResidualInit):
    """Needs the whole SVD of each weight."""

    def write_factors(self, model: nn.Module, path: Path, config: "RunConfig", rows: TrainingRows | None) -> None:
        dead = []

        def factors(weight_OI: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
            first, second, largest = milora_factors(weight_OI, rank, scaling)
            least = DEAD * largest / scaling
            dead.append(int((first.norm(dim=1) ** 2 <= least).sum()))
            return first, second

        save_weight_factors(model, path, factors)
        if any(dead):
            PartialState().print(
                f"MiLoRA: {sum(dead)} of the components have the singular value 0, in {sum(map(bool, dead))} layers: "
                "their part of the adapter will not learn"
            )


INIT = MiLora
