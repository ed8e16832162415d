"""ClassifierObjective: BA-LoRA's NLU loss, on the logits [N, D] of whole rows.

Task, consistency and the diversity's entropy form are means over the rows of the effective batch; a covariance and svd
are values of a micro-batch, averaged over all micro-batches of all processes. So 2 processes × b equals 1 process × b ×
accumulation 2.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ba_lora.config.schema_nlu import NLURegularizersConfig
from ba_lora.errors import UserError
from ba_lora.models.classifier import catch_pooled, check_head, head_names, live_head, run_head, unwrapped
from ba_lora.objective.losses.plain import TermSums, plain_loss
from ba_lora.objective.objective import Objective
from ba_lora.objective.path import evaluating, identity
from ba_lora.objective.reference import build_reference, check_step_zero
from ba_lora.objective.reference_cache.features import CachedFeatures
from ba_lora.objective.reference_nlu import ReferenceLogits
from ba_lora.objective.regularizers import at_least_float32
from ba_lora.objective.regularizers_nlu import constant_terms
from ba_lora.objective.terms import term_names
from ba_lora.objective.terms.base import Term
from ba_lora.objective.terms.block import Positions
from ba_lora.objective.terms_nlu import classifier_terms

if TYPE_CHECKING:
    from datasets import Dataset


class ClassifierObjective(Objective):
    """A sequence classifier's (PEFT or plain).

    `cache`: the features of the training rows on disk (reference_cache/features.py), None for a reference pass in every
    step. Rows hold what the tokenizer made, `labels` and, for the cache, `row`, a number of their own.
    Terms that are constant by construction are taken out of the loss: `off` maps them to the reason.
    """

    columns = ("row",)
    shifts_labels = False  # rows are counted, not tokens: a row's label is not shifted

    def __init__(
        self,
        model: nn.Module,
        regularizers: NLURegularizersConfig,
        *,
        micro_batch: int,
        cache: CachedFeatures | None = None,
        extra_terms: Iterable[Term] = (),
    ) -> None:
        num_labels = unwrapped(model).config.num_labels
        constant = constant_terms(
            num_labels,
            features=regularizers.features,
            hidden_size=unwrapped(model).config.hidden_size,
            micro_batch=micro_batch,
            svd_top_k=regularizers.svd_top_k,
            svd_norm=regularizers.svd_norm,
        )
        if regularizers.diversity_form == "entropy" and num_labels == 1:
            constant["diversity"] = "one logit has no distribution"
        off = {term: reason for term, reason in constant.items() if getattr(regularizers, f"lambda_{term}") > 0}
        if "consistency" in off and regularizers.lambda_mode == "adaptive_kl":
            raise UserError(
                "regularizers.lambda_mode=adaptive_kl needs the consistency term, which is off for this task: "
                f"{off['consistency']}"
            )
        weighted = [term for term in term_names() if getattr(regularizers, f"lambda_{term}") > 0]
        if weighted and regularizers.lambda_mode == "gradient_share" and all(term in off for term in weighted):
            told = "; ".join(f"{term}: {off[term]}" for term in weighted)
            raise UserError(f"regularizers.lambda_mode=gradient_share has no term here: all are off ({told})")
        shares = {term: share for term, share in regularizers.gradient_shares.items() if term not in off}
        self.regularizers = dataclasses.replace(
            regularizers, gradient_shares=shares, **{f"lambda_{term}": 0.0 for term in off}
        )
        super().__init__([*classifier_terms(self.regularizers, num_labels=num_labels), *extra_terms], off=off)
        self.reference: ReferenceLogits | None = None
        if self.regularizers.lambda_consistency > 0:
            frozen = build_reference(model, trained_apart=head_names(unwrapped(model)))
            self.reference = ReferenceLogits(model, frozen, head=regularizers.reference_head, cache=cache)
        self._head_known = False

    def prepare(self, model: nn.Module, rows: "Dataset", collate: Callable, *, batch_size: int) -> None:
        """Prepare the reference: its probe, its cache."""
        if self.reference is not None:
            with self.accelerator.autocast():  # which the model's own forward brings along only once it is prepared
                self.reference.prepare(model, rows, collate, batch_size=batch_size)

    def count(self, inputs: dict[str, Tensor]) -> int:
        return len(inputs["labels"])

    def loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        factors: Mapping[str, float | Tensor],
        *,
        check_reference: bool = False,
        units: Mapping[str, float | Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, TermSums]]:
        inputs = dict(inputs)
        labels_N, rows_N = inputs.pop("labels"), inputs.pop("row", None)
        reference_ND = None
        if self.reference is not None:
            reference_ND = self._reference_logits(model, inputs, rows_N, check=check_reference)
        with catch_pooled(model, inputs) as caught:
            logits_ND = at_least_float32(model(**inputs).logits)
        features = logits_ND if self.regularizers.features == "logits" else caught["pooled"]
        with self.accelerator.autocast():
            positions = Positions(labels_N, reference_ND)
            total, sums = plain_loss(logits_ND, identity, positions, self._position_terms, factors)
            with torch.autocast(logits_ND.device.type, enabled=False):  # which would round the products to bf16
                outputs = self._outputs(model, lambda: logits_ND, lambda: features)
                total = self._batch_terms(outputs, factors, total, sums)
                if units is not None:
                    sums = self._measured(model, caught["pooled"], positions, sums, units)
                return total, sums

    def _measured(
        self,
        model: nn.Module,
        pooled: Tensor,
        positions: Positions,
        sums: dict[str, TermSums],
        units: Mapping[str, float | Tensor],
    ) -> dict[str, TermSums]:
        """Add each term's squared gradient norm at the pooled features, from a pass of the head without dropout.

        The features are cut off from the model's pass, whose backward hooks (DDP's, DeepSpeed's) must not run here.
        """
        pooled = pooled.detach().requires_grad_()
        head = nn.ModuleList(live_head(model))
        with evaluating(head):
            logits_ND = at_least_float32(run_head(head, pooled))
        features = logits_ND if self.regularizers.features == "logits" else pooled
        return self._with_squares(
            sums,
            pooled,
            units,
            of_positions=lambda term: plain_loss(logits_ND, identity, positions, [term], {term.name: 1.0})[0],
            outputs=self._outputs(model, lambda: logits_ND, lambda: features),
        )

    def _reference_logits(
        self, model: nn.Module, inputs: dict[str, Tensor], rows_N: Tensor | None, *, check: bool
    ) -> Tensor:
        """Return the micro-batch's Z_P [N, D]."""
        if self.reference.is_cached and not model.training:
            raise UserError("the reference cache holds the training rows only: evaluate without regularizers")
        with evaluating(model), self.accelerator.autocast():
            if not self._head_known:
                check_head(model, inputs)
                self._head_known = True
            frozen: list[Tensor] = []  # the reference's features, unless a cache has them

            def run(module: nn.Module) -> Tensor:
                frozen.append(_pooled(module, inputs))
                return frozen[0]

            logits_ND = self.reference(model, rows_N, run)
            if check and frozen:
                with torch.no_grad():
                    check_step_zero(_pooled(model, inputs), frozen[0])
            return logits_ND


def _pooled(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with catch_pooled(module, inputs) as caught:
        module(**inputs)
    return caught["pooled"]
