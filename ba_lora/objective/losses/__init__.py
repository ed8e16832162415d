"""The training loss: hidden states and head on one side, named terms and their weighted sum on the other."""

from ba_lora.objective.losses.fused import default_chunk_memory_mb, fused_nlg_loss
from ba_lora.objective.losses.plain import TermWeights, nlg_loss
from ba_lora.objective.losses.svd import head_factor, why_not_frozen_linear

__all__ = [
    "TermWeights",
    "default_chunk_memory_mb",
    "fused_nlg_loss",
    "head_factor",
    "nlg_loss",
    "why_not_frozen_linear",
]
