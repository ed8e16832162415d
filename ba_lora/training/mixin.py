"""BALoRALoss: BA-LoRA's loss in a trainer of somebody else's.

    class OurTrainer(BALoRALoss, TheirTrainer): ...
    trainer = OurTrainer(model, arguments, regularizers=BALoRAConfig(), train_dataset=…)

TRL's SFTTrainer under it is BALoRASFTTrainer: sft.py.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ba_lora.config.schema import BALoRAConfig
from ba_lora.config.schema_nlg import LossConfig
from ba_lora.errors import UserError
from ba_lora.methods.base import Tuner, method_of
from ba_lora.objective.objective import TokenObjective
from ba_lora.objective.terms.base import Term
from ba_lora.training.plain_lora import check_initial_factors, initial_factors, write_fingerprint
from ba_lora.training.step_loss import StepLoss

STEP_HOOKS = ("begin_step", "before_step", "after_step")  # of a tuner, which only BALoRATrainer calls


class BALoRALoss(StepLoss):
    """A mixin over transformers' Trainer, or any subclass of it for a causal language model: its loss is BA-LoRA's,
    L = L_task + λ1 L_consistency + λ2 L_diversity + λ3 L_svd. It stands before that trainer in the list of bases.

    Arguments beyond the trainer's own: `regularizers`, the terms and their weights; `loss`, how it is computed;
    `extra_terms`. With all λ = 0 the trainer's own compute_loss is left alone.
    The labels that the trainer's collator makes say which positions count: completion and assistant masks, and rows
    packed with position_ids, work as they do there. Logs: each term unweighted (`task`, `consistency`, …).
    Raises UserError for what BALoRATrainer is needed for (an adapter with a term of its own, or with a part in the
    optimizer's step; other `lambda_mode`s), several GPUs in one process, a trainer with another task loss, and a
    checkpoint of another residual base.
    """

    def __init__(
        self,
        *args: Any,
        regularizers: BALoRAConfig | None = None,
        loss: LossConfig | None = None,
        extra_terms: Iterable[Term] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.method = method_of(self.model)  # for export_lora
        if list(self.method.tuner.terms(self.model)):
            raise UserError("this adapter adds a term to the loss, which BALoRATrainer knows: use BALoRATrainer")
        hooks = [name for name in STEP_HOOKS if getattr(type(self.method.tuner), name) is not getattr(Tuner, name)]
        if self.method.optimizer is not None or hooks:
            raise UserError(
                "this method has a part in each optimizer step, which BALoRATrainer knows: use BALoRATrainer"
            )
        self.initial_factors = initial_factors(self.model)
        self._has_begun = False
        regularizers = regularizers or BALoRAConfig()
        if regularizers.lambda_mode != "fixed":
            raise UserError(
                f"regularizers.lambda_mode={regularizers.lambda_mode} is BALoRATrainer's: use lambda_mode=fixed here"
            )
        if self.args.n_gpu > 1:
            raise UserError("several GPUs in one process are not supported: use accelerate launch or torchrun")
        objective = TokenObjective(self.model, regularizers, loss=loss, extra_terms=extra_terms)
        self.objective = objective if len(objective.terms) > 1 else None  # the task alone is the trainer's own loss
        if self.objective is None:
            return
        if getattr(self.args, "use_liger_kernel", False):
            raise UserError("use_liger_kernel computes the loss inside the model: leave it off, ours is fused already")
        if getattr(self, "aux_loss_enabled", False):
            raise UserError(
                "SFTTrainer adds the load-balancing loss of a model with experts, which BA-LoRA's loss leaves out: say "
                "so by SFTConfig(router_aux_loss_coef=0.0)"
            )
        if getattr(self.args, "loss_type", "nll") != "nll" or self.compute_loss_func or self.label_smoother:
            raise UserError("another task loss than L_task: leave loss_type, compute_loss_func and label smoothing out")
        self._minimise(objective)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the micro-batch's share of the effective batch's loss, as BALoRATrainer does."""
        if self.objective is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        objective = self.objective
        inputs = {name: value for name, value in inputs.items() if name != "use_cache"}  # which the objective sets
        is_counted = num_items_in_batch is not None
        number = num_items_in_batch if is_counted else objective.count(inputs)
        number = number.clamp(min=1) if isinstance(number, Tensor) else max(number, 1)
        step = self.state.global_step
        lambdas = objective.lambdas(step, max(self.state.max_steps, 1))
        factors = self._factors(lambdas, number, training=is_counted)
        total, sums = objective.loss(model, inputs, factors, check_reference=step == 0 and not self._has_begun)
        self._has_begun = True
        self._record(sums, lambdas, number)
        return (total, {"loss": total.detach()}) if return_outputs else total

    def plain_model(self) -> nn.Module:
        """Return the model without the wrappers of distributed training, for exports (`export_lora`)."""
        return self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False, keep_torch_compile=False)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms, averaged over the optimizer steps since the last log and summed over all processes."""
        if "loss" in logs and self.objective is not None:
            logs |= self._term_meter.read(self._summed)
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The trainer's own, with the fingerprint of the residual base that the adapter belongs to."""
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            write_fingerprint(self.initial_factors, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The trainer's own, on the way of every resumed training; see `check_initial_factors`."""
        if checkpoint is not None:
            check_initial_factors(self.initial_factors, Path(checkpoint))
        super()._load_optimizer_and_scheduler(checkpoint)
