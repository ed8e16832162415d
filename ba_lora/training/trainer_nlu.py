"""NLUTrainer: BALoRATrainer for classifiers.

The reference, λ(t), the log and the checkpoints are BALoRATrainer's; the loss is on logits [N, D] of whole rows. Task,
consistency and the diversity's entropy form are means over the rows of the effective batch; a covariance and svd are
values of a micro-batch, averaged over all micro-batches of all processes. So 2 processes × b equals 1 process × b ×
accumulation 2.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from ba_lora.config.schema_nlu import NLURegularizersConfig
from ba_lora.errors import UserError
from ba_lora.models.classifier import catch_pooled, check_head, head_names, unwrapped
from ba_lora.objective.losses.nlu import nlu_loss
from ba_lora.objective.reference import Reference, build_reference, check_step_zero
from ba_lora.objective.reference_cache.features import CachedFeatures
from ba_lora.objective.reference_nlu import ReferenceLogits
from ba_lora.objective.regularizers_nlu import constant_terms
from ba_lora.training.log import TERMS
from ba_lora.training.trainer import BALoRATrainer

OFF = "off"  # what the log says of a term that was taken out of the loss


class NLUTrainer(BALoRATrainer):
    """Trainer for a sequence classifier (PEFT or plain) under BA-LoRA's NLU loss.

    Args beyond BALoRATrainer's: `cache`, the features of `train_dataset` on disk (reference_cache_nlu.py), None for a
    reference pass in every step. Rows hold what the tokenizer made, `labels` and, for the cache, `row`, a number of
    their own.
    Terms that are constant by construction are taken out of the loss: `terms_off` maps them to the reason.
    """

    mean_terms = ("task", "consistency")

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        regularizers: NLURegularizersConfig,
        cache: CachedFeatures | None = None,
        **kwargs: Any,
    ) -> None:
        base = unwrapped(model)
        constant = constant_terms(
            base.config.num_labels,
            features=regularizers.features,
            hidden_size=base.config.hidden_size,
            micro_batch=args.per_device_train_batch_size,
            svd_top_k=regularizers.svd_top_k,
            svd_norm=regularizers.svd_norm,
        )
        if regularizers.diversity_form == "entropy" and base.config.num_labels == 1:
            constant["diversity"] = "one logit has no distribution"
        self.terms_off = {
            term: reason for term, reason in constant.items() if getattr(regularizers, f"lambda_{term}") > 0
        }
        regularizers = dataclasses.replace(regularizers, **{f"lambda_{term}": 0.0 for term in self.terms_off})
        super().__init__(model, args, regularizers=regularizers, **kwargs)
        if regularizers.diversity_form == "entropy":
            self.mean_terms = (*self.mean_terms, "diversity")
        self._loss_shifts_labels = False  # rows are counted, not tokens: a row's label stands alone
        self._head_known = False
        self.reference_logits: ReferenceLogits | None = None
        if self.reference is not None:
            self.reference_logits = ReferenceLogits(
                model,
                self.reference,
                head=regularizers.reference_head,
                cache=cache,
            )

    def _build_reference(self, model: nn.Module) -> Reference:
        return build_reference(model, trained_apart=head_names(unwrapped(model)))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Prepare the reference on the untrained model, then train."""
        if self.reference_logits is not None:
            with self.accelerator.autocast():  # which the model's own forward brings along only once it is prepared
                self.reference_logits.prepare(
                    self.model, self.train_dataset, self.data_collator, batch_size=self.args.per_device_eval_batch_size
                )
        return super().train(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the micro-batch's share of the effective batch's loss.

        `num_items_in_batch` is the number of rows of the effective batch; without it the micro-batch stands alone.
        """
        inputs = dict(inputs)
        labels_N, rows_N = inputs.pop("labels"), inputs.pop("row", None)
        settings = self.regularizers
        reference_logits_ND = self._reference_of(model, inputs, rows_N)
        with catch_pooled(model, inputs) as caught:
            logits_ND = model(**inputs).logits

        training = model.training and num_items_in_batch is not None
        rows = num_items_in_batch if training else len(labels_N)
        weights, lambdas = self._weights(rows, training=training)
        with self.accelerator.autocast():
            total, terms = nlu_loss(
                logits_ND, reference_logits_ND, caught["pooled"], labels_N, weights=weights, config=settings
            )
        total = total + self._orthogonality(model, terms, lambdas, training=training)
        if training:
            skipped = settings.lambda_diversity > 0 and "diversity" not in terms
            self._record(terms, lambdas, rows, covariances_skipped=torch.tensor(float(skipped), device=total.device))
        elif not model.training:
            self._record_evaluation(terms, len(labels_N))
        return (total, {"loss": total}) if return_outputs else total

    def _reference_of(self, model: nn.Module, inputs: dict[str, Tensor], rows_N: Tensor | None) -> Tensor | None:
        """Return the micro-batch's Z_P [N, D], None while the consistency term is out."""
        if self.regularizers.lambda_consistency == 0:
            return None
        if self.reference_logits.is_cached and not model.training:
            raise UserError("the reference cache holds the training rows alone: evaluate without regularizers")
        with self._without_dropout(model), self.accelerator.autocast():
            if not self._head_known:
                check_head(model, inputs)
                self._head_known = True
            frozen: list[Tensor] = []  # the reference's features, unless a cache has them

            def run(module: nn.Module) -> Tensor:
                frozen.append(_pooled(module, inputs))
                return frozen[0]

            logits_ND = self.reference_logits(model, rows_N, run)
            if self._begins and frozen:
                with torch.no_grad():
                    check_step_zero(_pooled(model, inputs), frozen[0])
            return logits_ND

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Name the terms that were taken out."""
        if "loss" in logs:
            for term in TERMS:
                if term in self.terms_off:
                    logs[term] = OFF
        super().log(logs, start_time)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "row" not in self._signature_columns:
            self._signature_columns += ["row"]


def _pooled(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with catch_pooled(module, inputs) as caught:
        module(**inputs)
    return caught["pooled"]
