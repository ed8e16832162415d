"""LoftQ (Li et al. 2024, arXiv 2310.08659): A₀ and B₀ make up for what the rounding to 4 bit has taken from W.

Q = nf4(W) is the base; s B₀A₀ is the best approximation of W − Q of rank r: of the SVD W − Q = U S Vᵀ it is
B₀ = U_r √(S_r/s), A₀ = √(S_r/s) V_rᵀ. That is one step of the paper's alternation (its T = 1), as PEFT does it for
bitsandbytes (`replace_lora_weights_loftq`, which needs a GPU); more steps would need a base of their own for each rank.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ba_lora.methods.base import Init, TrainingRows
from ba_lora.methods.pissa import load_factors, save_weight_factors
from ba_lora.models.load import torch_dtype

if TYPE_CHECKING:
    from ba_lora.config.schema import RunConfig


def loftq_factors(weight_OI: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return A₀ [r, in] and B₀ [out, r], float32, of a weight in the dtype in which it is rounded."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    # Double quantisation as in models/load.py.
    rounded_OI = dequantize_4bit(*quantize_4bit(weight_OI.contiguous(), quant_type="nf4", compress_statistics=True))
    left, values, right = torch.linalg.svd(weight_OI.float() - rounded_OI.float(), full_matrices=False)
    roots = (values[:rank] / scaling).sqrt()
    return roots[:, None] * right[:rank], left[:, :rank] * roots


class LoftQ(Init):
    """On the 4-bit base as it is: the adapter that is trained is served on that base, too."""

    residual = False
    quantizes = True
    corrects = True
    kinds = ("nlg",)
    limits = "is for 4-bit language models"

    def write_factors(self, model: nn.Module, path: Path, config: "RunConfig", rows: TrainingRows | None) -> None:
        dtype = torch_dtype(config.model.dtype)
        save_weight_factors(model, path, lambda weight_OI, r, s: loftq_factors(weight_OI.to(dtype), r, s))

    def load_factors(self, model: nn.Module, path: Path) -> nn.Module:
        load_factors(model, path, subtract=False)
        return model


INIT = LoftQ
