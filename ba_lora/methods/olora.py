"""OLoRA (Büyükakyüz 2024, arXiv 2406.01775): W = Q R; B₀ = Q_r, A₀ = R_r, the base keeps W − s B₀A₀, as PEFT has it."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ba_lora.methods.base import TrainingRows
from ba_lora.methods.pissa import ResidualInit, save_weight_factors

if TYPE_CHECKING:
    from ba_lora.config.schema import RunConfig


def olora_factors(weight_OI: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return A₀ [r, in] and B₀ [out, r] with orthonormal columns."""
    q, r = torch.linalg.qr(weight_OI)
    return r[:rank], q[:, :rank]


class OLora(ResidualInit):
    """The QR decomposition runs in float32. (PEFT's own builds on Conv1D layers too, and fails in the first pass.)"""

    def write_factors(self, model: nn.Module, path: Path, config: "RunConfig", rows: TrainingRows | None) -> None:
        save_weight_factors(model, path, olora_factors)


INIT = OLora
