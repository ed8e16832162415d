"""The terms of a classifier, over whole rows: those of objective/terms where they are the same, and what is NLU's own.

    term          paper2024                     iclr2026                  also
    consistency   NormalizedMSE                 Consistency (KL)
    diversity     Covariance                    Covariance                Diversity (entropy)
    svd           Svd, of logits or features    the same

A row is what a response position is to a language model: logits [N, D] of N rows, D classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from ba_lora.config.schema import EXTRA_TERMS
from ba_lora.config.schema_nlu import NLURegularizersConfig
from ba_lora.objective import regularizers_nlu
from ba_lora.objective.terms import term_class
from ba_lora.objective.terms.base import BatchTerm, Outputs, PositionTerm, Term
from ba_lora.objective.terms.block import Positions
from ba_lora.objective.terms.consistency import Consistency
from ba_lora.objective.terms.diversity import Diversity
from ba_lora.objective.terms.svd import Svd
from ba_lora.objective.terms.task import CrossEntropy


@dataclass(frozen=True, kw_only=True)
class SquaredError(PositionTerm):
    """The task of a regression: (z − y)², one logit a row."""

    name: ClassVar[str] = "task"

    weight: float = 1.0

    def values(self, logits_N1: Tensor, positions: Positions) -> Tensor:
        return F.mse_loss(logits_N1[:, 0], positions.targets.to(logits_N1.dtype), reduction="none")


@dataclass(frozen=True, kw_only=True)
class NormalizedMSE(PositionTerm):
    """regularizers_nlu.normalized_mse of each row."""

    name: ClassVar[str] = "consistency"

    def values(self, logits_ND: Tensor, positions: Positions) -> Tensor:
        return regularizers_nlu.normalized_mse(logits_ND, positions.reference)


@dataclass(frozen=True, kw_only=True)
class Covariance(BatchTerm):
    """regularizers_nlu.covariance of the micro-batch's logits or features; one row has none."""

    name: ClassVar[str] = "diversity"

    def value(self, outputs: Outputs) -> Tensor | None:
        features = outputs.matrix()
        return None if len(features) < 2 else regularizers_nlu.covariance(features)


def classifier_terms(config: NLURegularizersConfig, *, num_labels: int) -> Iterator[Term]:
    """Return the terms whose λ is above 0, the task first."""
    yield SquaredError() if num_labels == 1 else CrossEntropy()
    classes = {
        "consistency": Consistency if config.consistency_form == "kl" else NormalizedMSE,
        "diversity": Diversity if config.diversity_form == "entropy" else Covariance,
        "svd": Svd,
        **{name: term_class(name) for name in EXTRA_TERMS},
    }
    for name, of in classes.items():
        if getattr(config, f"lambda_{name}") > 0:
            yield of.from_config(config)
