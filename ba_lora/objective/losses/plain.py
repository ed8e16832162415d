"""The NLG loss from hidden states and head, by way of the logits: `regularizers.py` put together.

Legend: N = |M|, the response positions of the micro-batch; D hidden size; V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ba_lora.config.schema import BALoRAConfig
from ba_lora.objective import regularizers
from ba_lora.objective.losses.svd import same_singular_values
from ba_lora.objective.regularizers import TopLogProbs


@dataclass(frozen=True)
class TermWeights:
    """What each term is multiplied with in the total of one micro-batch.

    `task`, `consistency`, `diversity` multiply a SUM over positions (so they hold λ / number of positions of the whole
    effective batch); `svd` multiplies the micro-batch's own value (λ / number of micro-batches).
    """

    task: float | Tensor
    consistency: float | Tensor = 0.0
    diversity: float | Tensor = 0.0
    svd: float | Tensor = 0.0


def nlg_loss(
    hidden_ND: Tensor,
    reference: Tensor | TopLogProbs | None,
    head: Callable[[Tensor], Tensor],
    targets_N: Tensor,
    *,
    weights: TermWeights,
    config: BALoRAConfig,
    head_factor_DD: Tensor | None = None,
    reference_head: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (total, terms): the weighted sum with its gradient, and each term unweighted and detached.

    `head` maps hidden states to logits [N, V]. `reference` is the reference's hidden states [N, D], or what a cache
    keeps of its distributions at the N positions, or None while the consistency term is out. `reference_head` is its
    own head, where that is not `head` (a trained head would take the reference along).
    `head_factor_DD` (`losses.svd.head_factor`) takes the vocabulary out of the svd term; without it the logits serve.
    Terms: task, consistency and diversity as sums over the N positions, svd as the micro-batch's value, and
    `weighted_consistency`, which the adaptive λ1 makes more than a product. A term whose λ is 0 in `config` is absent.
    L = L_task + λ1 L_consistency + λ2 L_diversity + λ3 L_svd.
    """
    logits_NV = head(hidden_ND)
    every_N = torch.ones(logits_NV.shape[0], dtype=torch.bool, device=logits_NV.device)
    precise_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    task = F.cross_entropy(precise_NV, targets_N, reduction="sum")
    total = task * weights.task
    terms = {"task": task.detach()}
    if config.lambda_consistency > 0:
        divergence, weighted = _consistency(logits_NV, reference, reference_head or head, every_N, config)
        weighted = weights.consistency * weighted
        total = total + weighted
        terms["consistency"] = divergence.detach()
        terms["weighted_consistency"] = weighted.detach()
    if config.lambda_diversity > 0:
        negative_entropy = regularizers.diversity(logits_NV, every_N, top_k=config.diversity_top_k, reduction="sum")
        total = total + weights.diversity * negative_entropy
        terms["diversity"] = negative_entropy.detach()
    if config.lambda_svd > 0:
        matrix = logits_NV if head_factor_DD is None else same_singular_values(hidden_ND, head_factor_DD)
        ratio = regularizers.svd(matrix, every_N, top_k=config.svd_top_k, norm=config.svd_norm)
        total = total + weights.svd * ratio
        terms["svd"] = ratio.detach()
    return total, terms


def _consistency(
    logits_NV: Tensor,
    reference: Tensor | TopLogProbs,
    reference_head: Callable[[Tensor], Tensor],
    every_N: Tensor,
    config: BALoRAConfig,
) -> tuple[Tensor, Tensor]:
    """Return the consistency term's sum over the positions, and the same under the adaptive λ1 (1 without it)."""
    if isinstance(reference, TopLogProbs):
        term, entropy_N = regularizers.cached_consistency, reference.entropy
    else:
        with torch.no_grad():
            reference = reference_head(reference)
        term, entropy_N = regularizers.consistency, None
    settings = {"temperature": config.temperature, "reduction": "sum"}
    divergence = term(logits_NV, reference, every_N, **settings)
    if config.consistency_schedule != "adaptive":
        return divergence, divergence
    if entropy_N is None:
        position_weights_N = regularizers.adaptive_position_weights(reference, every_N, maximum=1.0)
    else:
        position_weights_N = regularizers.position_weights_of_entropy(
            entropy_N, vocabulary=logits_NV.shape[-1], maximum=1.0
        )
    return divergence, term(logits_NV, reference, every_N, position_weights=position_weights_N, **settings)
