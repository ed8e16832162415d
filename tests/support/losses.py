"""The loss of one micro-batch as one call, with a weight for each term: what an objective puts together."""

from dataclasses import dataclass

import torch

from ba_lora.objective.losses.fused import fused_loss
from ba_lora.objective.losses.plain import plain_loss
from ba_lora.objective.losses.svd import same_singular_values
from ba_lora.objective.regularizers import TopLogProbs, at_least_float32
from ba_lora.objective.terms import term_class, term_names
from ba_lora.objective.terms.base import BatchTerm, Outputs, PositionTerm
from ba_lora.objective.terms.block import Positions
from ba_lora.objective.terms.consistency import CachedConsistency
from ba_lora.objective.terms.task import CrossEntropy
from ba_lora.objective.terms_nlu import classifier_terms


@dataclass(frozen=True)
class TermWeights:
    """What each term is multiplied with: sums over positions, but for svd (and a covariance), one value."""

    task: float | torch.Tensor
    consistency: float | torch.Tensor = 0.0
    diversity: float | torch.Tensor = 0.0
    svd: float | torch.Tensor = 0.0


def token_terms(config, reference=None):
    """The terms of a configuration whose λ is above 0."""
    classes = {name: term_class(name) for name in term_names() if getattr(config, f"lambda_{name}") > 0}
    if "consistency" in classes and isinstance(reference, TopLogProbs):
        classes["consistency"] = CachedConsistency
    return [CrossEntropy(), *(of.from_config(config) for of in classes.values())]


def whole_loss(position_loss, terms, matrix, weights):
    """(total, terms by name, detached; weighted_consistency as it counts in the total)"""
    factors = {term.name: getattr(weights, term.name, 0.0) for term in terms}
    total, sums = position_loss([term for term in terms if isinstance(term, PositionTerm)], factors)
    values = {name: found.value for name, found in sums.items()}
    if "consistency" in sums:
        values["weighted_consistency"] = factors["consistency"] * sums["consistency"].weighted
    for term in terms:
        if isinstance(term, BatchTerm):
            value = term.value(Outputs(model=None, logits=matrix, matrix=matrix))
            if value is not None:
                total, values[term.name] = total + factors[term.name] * value, value.detach()
    return total, values


def nlg_loss(hidden, reference, head, targets, *, weights, config, head_factor_DD=None, reference_head=None):
    """The plain loss."""
    reference = reference if config.lambda_consistency > 0 else None

    def position_loss(terms, factors):
        return plain_loss(hidden, head, Positions(targets, reference), terms, factors, reference_head=reference_head)

    def matrix():
        return head(hidden) if head_factor_DD is None else same_singular_values(hidden, head_factor_DD)

    return whole_loss(position_loss, token_terms(config, reference), matrix, weights)


def fused_nlg_loss(hidden, reference, head, targets, *, weights, config, head_factor_DD=None, chunk_memory_mb=None):
    """The fused loss."""
    reference = reference if config.lambda_consistency > 0 else None

    def position_loss(terms, factors):
        positions = Positions(targets, reference)
        return fused_loss(hidden, head, positions, terms, factors, chunk_memory_mb=chunk_memory_mb)

    return whole_loss(
        position_loss, token_terms(config, reference), lambda: same_singular_values(hidden, head_factor_DD), weights
    )


def nlu_loss(logits, reference_logits, pooled, labels, *, weights, config):
    """A classifier's loss."""
    terms = list(classifier_terms(config, num_labels=logits.shape[1]))
    features = at_least_float32(logits) if config.features == "logits" else pooled

    def position_loss(terms, factors):
        return plain_loss(logits, lambda tensor: tensor, Positions(labels, reference_logits), terms, factors)

    return whole_loss(position_loss, terms, lambda: features, weights)
