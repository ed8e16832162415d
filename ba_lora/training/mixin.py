"""BALoRALoss: BA-LoRA's loss in a trainer of somebody else's.

    class OurTrainer(BALoRALoss, TheirTrainer): ...
    trainer = OurTrainer(model, arguments, regularizers=BALoRAConfig(), train_dataset=…)

TRL's SFTTrainer under it is BALoRASFTTrainer: sft.py.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ba_lora.config.schema import BALoRAConfig
from ba_lora.config.schema_nlg import LossConfig
from ba_lora.errors import UserError
from ba_lora.methods.base import Tuner, method_of
from ba_lora.objective.objective import TokenObjective
from ba_lora.objective.terms.base import Term
from ba_lora.training.log import TermMeter
from ba_lora.training.plain_lora import initial_factors

STEP_HOOKS = ("begin_step", "before_step", "after_step")  # of a tuner, which only BALoRATrainer calls


class BALoRALoss:
    """A mixin over transformers' Trainer, or any subclass of it for a causal language model: its loss is BA-LoRA's,
    L = L_task + λ1 L_consistency + λ2 L_diversity + λ3 L_svd. It stands before that trainer in the list of bases.

    Arguments beyond the trainer's own: `regularizers`, the terms and their weights; `loss`, how it is computed;
    `extra_terms`. With all λ = 0 the trainer's own compute_loss is left alone.
    The labels that the trainer's collator makes say which positions count: completion and assistant masks, and rows
    packed with position_ids, work as they do there. Logs: each term unweighted (`task`, `consistency`, …).
    Raises UserError for what BALoRATrainer is needed for (an adapter with a term of its own, or with a part in the
    optimizer's step; other `lambda_mode`s), several GPUs in one process, and a trainer with another task loss.
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
        objective.attach(self.accelerator)
        self.model_accepts_loss_kwargs = True  # makes Trainer count the response positions of the effective batch
        self._term_meter = TermMeter([term.name for term in objective.terms])

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
        number = num_items_in_batch if num_items_in_batch is not None else max(objective.count(inputs), 1)
        step = self.state.global_step
        lambdas = objective.lambdas(step, max(self.state.max_steps, 1))
        shared = num_items_in_batch is not None and self.args.average_tokens_across_devices
        mean = (self.accelerator.num_processes if shared else 1) / number
        micro_batches = self.current_gradient_accumulation_steps
        factors = objective.factors(lambdas, of_position=mean, of_micro_batch=1 / micro_batches)
        total, sums = objective.loss(model, inputs, factors, check_reference=step == 0 and not self._has_begun)
        self._has_begun = True
        micro_batches_of_step = micro_batches * self.accelerator.num_processes
        values = objective.step_values(sums, lambdas, number=number, micro_batches=micro_batches_of_step)
        self._term_meter.add(values, steps=1 / micro_batches)
        return (total, {"loss": total.detach()}) if return_outputs else total

    def plain_model(self) -> nn.Module:
        """Return the model without the wrappers of distributed training, for exports (`export_lora`)."""
        return self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False, keep_torch_compile=False)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms, averaged over the optimizer steps since the last log and summed over all processes."""
        if "loss" in logs and self.objective is not None:
            logs |= self._term_meter.read(lambda tensor: self.accelerator.reduce(tensor, reduction="sum"))
        super().log(logs, start_time)
