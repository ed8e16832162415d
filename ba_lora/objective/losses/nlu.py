"""BA-LoRA's NLU loss on one micro-batch, from the logits (and pooled features) of a classifier."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ba_lora.config.schema_nlu import NLURegularizersConfig
from ba_lora.objective import regularizers, regularizers_nlu
from ba_lora.objective.losses.plain import TermWeights


def nlu_loss(
    logits_ND: Tensor,
    reference_logits_ND: Tensor | None,
    pooled_NH: Tensor | None,
    labels_N: Tensor,
    *,
    weights: TermWeights,
    config: NLURegularizersConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (total, terms): the weighted sum with its gradient, and each term unweighted and detached.

    The task is cross-entropy, or with one logit the squared error. `reference_logits_ND` may be None while the
    consistency term is out, `pooled_NH` while `config.features` is logits. Terms: task, consistency and the diversity's
    entropy form as sums over the rows, its covariance form and svd as the micro-batch's values, and
    `weighted_consistency`. A term whose λ is 0 in `config` is absent; so is the covariance of fewer than two rows.
    """
    logits_ND = regularizers.at_least_float32(logits_ND)
    if logits_ND.shape[1] == 1:
        task = F.mse_loss(logits_ND[:, 0], labels_N.to(logits_ND.dtype), reduction="sum")
    else:
        task = F.cross_entropy(logits_ND, labels_N, reduction="sum")
    total = task * weights.task
    terms = {"task": task.detach()}
    if config.lambda_consistency > 0:
        if config.consistency_form == "kl":
            distance = regularizers_nlu.kl(
                logits_ND, reference_logits_ND, temperature=config.temperature, reduction="sum"
            )
        else:
            distance = regularizers_nlu.normalized_mse(logits_ND, reference_logits_ND, reduction="sum")
        weighted = weights.consistency * distance
        total = total + weighted
        terms["consistency"], terms["weighted_consistency"] = distance.detach(), weighted.detach()
    features = logits_ND if config.features == "logits" else pooled_NH
    with torch.autocast(logits_ND.device.type, enabled=False):  # which would round the products to bf16
        if config.lambda_diversity > 0 and (config.diversity_form == "entropy" or len(features) > 1):
            if config.diversity_form == "entropy":
                spread = regularizers.diversity(logits_ND, regularizers_nlu.every_row(logits_ND), reduction="sum")
            else:
                spread = regularizers_nlu.covariance(features)
            total = total + weights.diversity * spread
            terms["diversity"] = spread.detach()
        if config.lambda_svd > 0:
            every_N = regularizers_nlu.every_row(features)
            ratio = regularizers.svd(features, every_N, top_k=config.svd_top_k, norm=config.svd_norm)
            total = total + weights.svd * ratio
            terms["svd"] = ratio.detach()
    return total, terms
