"""The per-position terms by way of all logits, with autograd: the definition that the fused loss is proved against.

Legend: N = |M|, the response positions of the micro-batch; D hidden size; V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ba_lora.objective.regularizers import TopLogProbs, at_least_float32
from ba_lora.objective.terms.base import PositionTerm
from ba_lora.objective.terms.block import Positions


class TermSums(NamedTuple):
    """A term of one micro-batch, detached: its value, and the value that counts in the loss.

    For a PositionTerm both are sums over the positions, the second with the term's `position_weights`. `square`:
    ‖unit · d weighted/dH‖² where it was asked for (gradient_shares.py).
    """

    value: Tensor
    weighted: Tensor
    square: Tensor | None = None


def plain_loss(
    hidden_ND: Tensor,
    head: Callable[[Tensor], Tensor],
    positions: Positions,
    terms: Sequence[PositionTerm],
    factors: Mapping[str, float | Tensor],
    *,
    reference_head: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, dict[str, TermSums]]:
    """Return (Σ factor · term, each term's sums), the terms summed over the N positions.

    `head` maps hidden states to logits [N, V]. A reference in `positions` is its hidden states [N, D], or what a cache
    keeps. `reference_head` is its own head, where that is not `head` (a trained head would take the reference along).
    """
    logits_NV = at_least_float32(head(hidden_ND))
    if positions.reference is not None and not isinstance(positions.reference, TopLogProbs):
        with torch.no_grad():
            reference_logits_NV = at_least_float32((reference_head or head)(positions.reference))
        positions = Positions(positions.targets, reference_logits_NV)
    total, sums = logits_NV.new_zeros(()), {}
    for term in terms:
        values_N = term.values(logits_NV, positions)
        weights_N = term.position_weights(positions, vocabulary=logits_NV.shape[-1])
        weighted = (values_N if weights_N is None else values_N * weights_N).sum()
        total = total + factors[term.name] * weighted
        sums[term.name] = TermSums(values_N.detach().sum(), weighted.detach())
    return total, sums
