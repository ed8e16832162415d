"""The training loss: hidden states and head on one side, named terms and their weighted sum on the other."""

from ba_lora.losses.plain import TermWeights, nlg_loss
from ba_lora.losses.svd import head_factor

__all__ = ["TermWeights", "head_factor", "nlg_loss"]
