"""BALoRATrainer: transformers' Trainer under an objective: λ(t), counts, named terms in the log, checkpoints to trust.

Reductions: a term of the kind `mean` is a sum divided by the number of response positions (or rows) of the whole
effective batch (all micro-batches, all processes); one of the kind `micro_batch` is one value per micro-batch, averaged
over all micro-batches of all processes. So 2 processes × b equals 1 process × b × accumulation 2, term by term; but for
an epoch's last batch where the rows run out: several processes fill it with the epoch's first rows (accelerate), one
leaves it short.
"""

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState
from transformers.utils import logging

from ba_lora.config.schema import BALoRAConfig
from ba_lora.config.schema_nlg import LossConfig
from ba_lora.errors import UserError
from ba_lora.io import disk_errors, load_tensors
from ba_lora.methods.base import METHOD_STATE, method_of
from ba_lora.models.layers import gathered
from ba_lora.objective.gradient_shares import GradientShares
from ba_lora.objective.kl_control import KLController
from ba_lora.objective.objective import Objective, TokenObjective
from ba_lora.objective.reference import Reference
from ba_lora.objective.reference_cache.store import CachedReference
from ba_lora.objective.regularizers import IGNORE_INDEX
from ba_lora.objective.terms.base import ModelTerm, Term
from ba_lora.training.checkpoints import (
    clear_checkpoints,
    find_checkpoint,
    rotate_checkpoints,
    step_of,
    stopped_early,
    write_checkpoint_manifest,
)
from ba_lora.training.log import OFF, TermsCallback, TokenMeter
from ba_lora.training.plain_lora import check_initial_factors, initial_factors, write_fingerprint
from ba_lora.training.sampler import SeededLengthGroupedSampler, reachable_sampler
from ba_lora.training.step_loss import StepLoss

logger = logging.get_logger(__name__)


class AfterStep(TrainerCallback):
    """Calls the method after each optimizer step, while the gradients are still there."""

    def __init__(self, trainer: "BALoRATrainer") -> None:
        self._trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        trainer.method.tuner.after_step(trainer._bare_model(), state.global_step, trainer.optimizer)


class BALoRATrainer(StepLoss, Trainer):
    """Trainer under BA-LoRA's loss, L = L_task + λ1 L_consistency + λ2 L_diversity + λ3 L_svd.

    Args beyond Trainer's: `objective`, what is minimised. Instead of it, for a causal language model: `regularizers`,
    the terms and their weights (all λ = 0 is plain fine-tuning, for PiSSA, LoRA or full alike), with TokenObjective's
    `loss`, `reference` and `extra_terms`. Reference and tuned model are compared once, at step 0: UserError where they
    differ.
    Logs per logging step, averaged over its optimizer steps: the task and each further term (unweighted), `weighted_*`
    (times λ(t)) and `share_*` (|weighted| / Σ |weighted|); `lambda_*`, λ(t) of the next step; and `tokens_per_second`,
    `padding_share`.
    Evaluation logs `eval_loss`, the whole loss under the λ of that step (Trainer's mean over batches, by rows), and
    `eval_task`, the task's loss by itself (the mean over all response positions): compare methods by the latter.
    L_task has no load-balancing loss, also where a model with experts would add one (output_router_logits).
    A loss that is inf or NaN, or weights that are after the last step, end the training with a UserError.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the whole effective batch itself

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        objective: Objective | None = None,
        regularizers: BALoRAConfig | None = None,
        loss: LossConfig | None = None,
        reference: Reference | CachedReference | None = None,
        extra_terms: Iterable[Term] = (),
        **kwargs: Any,
    ) -> None:
        if (objective is None) == (regularizers is None):
            raise ValueError("give BALoRATrainer either an objective or regularizers")
        self.method = method_of(model)
        self.method.tuner.prepare(model)
        self.initial_factors = initial_factors(model)
        if objective is None:
            objective = TokenObjective(model, regularizers, loss=loss, reference=reference, extra_terms=extra_terms)
        if is_deepspeed_zero3_enabled() and getattr(objective.reference, "frozen_model", None) is not None:
            raise UserError("full fine-tuning with the consistency term cannot run under ZeRO-3: use ZeRO-2")
        if args.n_gpu > 1:
            raise UserError("several GPUs in one process are not supported: use accelerate launch or torchrun")
        super().__init__(model=model, args=args, **kwargs)
        if self.is_deepspeed_enabled and self.method.no_deepspeed:
            raise UserError(self.method.no_deepspeed)
        objective.extend(ModelTerm(**term._asdict()) for term in self.method.tuner.terms(model))
        self._minimise(objective)
        self._num_items: tuple[Tensor | int | None, Tensor | int | None] = (None, None)  # on the device, on the host
        self._evaluated: Tensor | int = 0  # [the task's loss, its positions], summed over an evaluation
        self._step_begun: int | None = None  # the optimizer step whose first micro-batch has come
        self._begins = False  # whether this is the training's very first micro-batch, on every process alike
        self.add_callback(AfterStep(self))
        self._token_meter = TokenMeter()
        self._shares = GradientShares(objective.terms, objective.regularizers)
        self._kl = KLController(objective.terms, objective.regularizers)
        for callback in (ProgressCallback, PrinterCallback):  # one line of loss terms instead of a dictionary
            if self.pop_callback(callback) is not None:
                self.add_callback(TermsCallback(show_bar=callback is ProgressCallback))

    # ---- the loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the micro-batch's share of the effective batch's loss.

        `num_items_in_batch` is the number of response positions (or rows) of the effective batch; without it
        (evaluation, or direct calls) the micro-batch counts by itself.
        """
        training = model.training and num_items_in_batch is not None
        if not model.training:
            inputs = self._without_repeats(inputs)
        counts = self._kl.weights or not training  # counting waits for the device
        own = self.objective.count(inputs) if counts else 0
        number = self._on_host(num_items_in_batch) if training else max(own, 1)
        lambdas = self._lambdas()
        factors = self._factors(lambdas, number, training=training)
        measured = training and self._shares.due(self.state.global_step)
        units = self._factors(dict.fromkeys(lambdas, 1.0), number, training=True) if measured else None
        total, sums = self.objective.loss(model, inputs, factors, check_reference=self._begins, units=units)
        if measured:
            self._shares.add({name: found.square for name, found in sums.items() if found.square is not None})
        if training:
            self._kl.add(sums, own)
            self._record(sums, lambdas, number)
        elif not model.training:
            task = sums["task"].value
            self._evaluated = self._evaluated + torch.stack([task, task.new_tensor(own)]).double()
        return (total, {"loss": total}) if return_outputs else total

    def _on_host(self, num_items: Tensor | int) -> Tensor | int:
        """Return the count of the effective batch without a wait for the device in every micro-batch: it is fetched
        once an optimizer step. At least 1: a batch without a label changes nothing."""
        if self._num_items[0] is not num_items:
            on_host = num_items.cpu().clamp(min=1) if isinstance(num_items, Tensor) else max(num_items, 1)
            self._num_items = (num_items, on_host)
        return self._num_items[1]

    def _lambdas(self) -> dict[str, float]:
        """Return λ(t) of each term."""
        weights = self._shares.weights | self._kl.weights
        return self.objective.lambdas(self.state.global_step, self.state.max_steps, weights)

    def _without_repeats(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return an evaluation's micro-batch in which rows that accelerate repeats have no labels: it fills the last
        batches of several processes with the first rows."""
        state, labels = self.accelerator.gradient_state, inputs.get("labels")
        if not (self.objective.shifts_labels and state.end_of_dataloader and state.remainder > 0):
            return inputs
        borders = inputs.get("cu_seq_lens_q")  # of packed rows: one after another in a single one
        rows = len(labels) if borders is None else len(borders) - 1
        num_real = max(state.remainder - self.accelerator.process_index * rows, 0)
        if num_real >= rows:
            return inputs
        labels = labels.clone()
        if borders is None:
            labels[num_real:] = IGNORE_INDEX
        else:
            labels[:, borders[num_real] :] = IGNORE_INDEX
        return inputs | {"labels": labels}

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that the objective reads; Trainer drops what the model does not take."""
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in self.objective.columns if name not in self._signature_columns]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Trainer's own, but for grouping by length: there an epoch's order depends on seed and epoch only."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        return SeededLengthGroupedSampler(
            self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            lengths=[len(ids) for ids in (train_dataset or self.train_dataset)["input_ids"]],
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
        )

    def get_train_dataloader(self) -> DataLoader:
        return reachable_sampler(super().get_train_dataloader())

    # ---- a diverged run ----

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *arguments: Any, **settings: Any) -> Tensor:
        """Trainer's, after which a loss of inf or NaN ends the training (Trainer would keep it out of the log)."""
        self._begins = self.state.global_step == 0 and not self._token_meter.has_begun
        if self._begins:
            self._shares.check(self.state.max_steps)
        self._token_meter.add(inputs)
        if self.state.global_step != self._step_begun:
            self._step_begun = self.state.global_step
            self.method.tuner.begin_step(self._bare_model(), self._step_begun)
        loss = super().training_step(model, inputs, *arguments, **settings)
        self._begins = False
        if self.accelerator.sync_gradients:
            self._shares.close(self._summed, self._lambdas())
            self._kl.close(self._summed)
            self.method.tuner.before_step(self._bare_model(), self.state.global_step)
        if not bool(loss.isfinite()):  # no further wait for the device: Trainer asks the same
            self._stop_diverged("loss is", self.state.global_step + 1)
        return loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, after the objective has prepared itself on the model.

        Raises UserError where the weights are inf or NaN after the last step.
        """
        self.objective.prepare(
            self.model, self.train_dataset, self.data_collator, batch_size=self.args.per_device_eval_batch_size
        )
        output = super().train(*args, **kwargs)
        self._check_weights()
        return output

    def _check_weights(self) -> None:
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                with gathered([parameter], modify=False):
                    is_finite = bool(parameter.isfinite().all())
                if not is_finite:
                    self._stop_diverged("the weights are", self.state.global_step)

    def _stop_diverged(self, what: str, step: int) -> NoReturn:
        remedy = "lower trainer.learning_rate"
        if step <= 1 and what == "loss is":  # nothing has been learned yet
            remedy = "look at adapter.alpha, the weights of regularizers and the data (nothing was updated yet)"
        raise UserError(f"{what} not finite at step {step}: {remedy}")

    # ---- the log ----

    def throughput(self) -> dict[str, float]:
        """Return `tokens_per_second` and `padding_share` of the whole training; {} where no step was taken here.

        Real tokens, over all processes, which all call it.
        """
        return self._token_meter.overall(self._summed)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with the task's loss by itself beside the loss; every process calls it."""
        self._evaluated = 0
        output = super().evaluation_loop(*args, **kwargs)
        loss_name = next((name for name in output.metrics or {} if name.endswith("_loss")), None)
        if loss_name is not None and isinstance(self._evaluated, Tensor):
            total, positions = self._summed(self._evaluated).tolist()
            output.metrics[loss_name.removesuffix("loss") + "task"] = total / max(positions, 1)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms, averaged over the optimizer steps since the last log and summed over all processes."""
        if "loss" in logs:
            if terms := self._term_meter.read(self._summed):
                lambdas = self._lambdas()
                logs |= terms | self._shares.logs() | self._token_meter.read(self._summed)
                logs |= {f"lambda_{name}": value for name, value in lambdas.items() if name != "task"}
            logs |= dict.fromkeys(self.objective.off, OFF)
        super().log(logs, start_time)

    # ---- checkpoints ----

    def plain_model(self) -> nn.Module:
        """Return the model to compare exports with: without autocast, but with the engine that ZeRO-3 needs."""
        if is_deepspeed_zero3_enabled():
            return self.model_wrapped
        return self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False, keep_torch_compile=False)

    def train_or_resume(self, checkpoints: Path, *, num_steps: int) -> Path | None:
        """Train to step `num_steps`, from the newest whole checkpoint below `checkpoints` if there is one; return it.

        A checkpoint of the last step, or of the one at which early stopping ended the training, is only loaded: Trainer
        would go on and take one step more when the last step lies inside an epoch. DeepSpeed cannot load without its
        engine, and repeats the steps since the one before.
        """
        before = num_steps if self.is_deepspeed_enabled else None
        checkpoint = find_checkpoint(checkpoints, before=before)
        if checkpoint is not None and self.is_deepspeed_enabled and stopped_early(checkpoint):
            checkpoint = find_checkpoint(checkpoints, before=step_of(checkpoint))
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            clear_checkpoints(checkpoints, newest=checkpoint)
            if checkpoint is not None:
                print(f"resumed from step {step_of(checkpoint)} of {num_steps} ({checkpoint})", flush=True)
        self.accelerator.wait_for_everyone()
        if checkpoint is not None and (step_of(checkpoint) >= num_steps or stopped_early(checkpoint)):
            check_initial_factors(self.initial_factors, checkpoint)
            self._load_from_checkpoint(str(checkpoint))
            self._load_method_state(checkpoint)
            self._check_weights()
            self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            if self.args.load_best_model_at_end and self.best_step() is not None:
                self._load_best_model()
        else:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if self.args.load_best_model_at_end and self.state.best_metric is not None and self.best_step() is None:
            raise UserError(f"{checkpoints} lacks the best checkpoint: overwrite=true trains again")
        return checkpoint

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's, on the way of every resumed training, DeepSpeed's too; see `check_initial_factors`."""
        if checkpoint is not None:
            check_initial_factors(self.initial_factors, Path(checkpoint))
            self._shares.load(Path(checkpoint))
            self._kl.load(Path(checkpoint))
            self._load_method_state(Path(checkpoint))
        super()._load_optimizer_and_scheduler(checkpoint)

    def _bare_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _save_method_state(self, folder: Path) -> None:
        if state := self.method.tuner.saved_state(self._bare_model()):
            save_file(state, folder / METHOD_STATE)

    def _load_method_state(self, checkpoint: Path) -> None:
        path = checkpoint / METHOD_STATE
        self.method.tuner.load_state(self._bare_model(), load_tensors(path) if path.is_file() else {})

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.method.tuner.checkpointing(self._bare_model()):
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        with self.method.tuner.checkpointing(self._bare_model()):
            super()._load_best_model()
        self._load_method_state(Path(self.state.best_model_checkpoint))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's, or that of the method."""
        if self.optimizer is None and self.method.optimizer is not None:
            made_for = self.model if model is None else model
            self.method.optimizer.prepare(made_for)
            decayed = set(self.get_decay_parameter_names(made_for))
            default = self.get_optimizer_cls_and_kwargs(self.args, made_for)
            self.optimizer = self.method.optimizer.make(made_for, self.args, decayed, default)
            return self.optimizer
        return super().create_optimizer(*([] if model is None else [model]))

    def best_step(self) -> int | None:
        """Return the step of the best checkpoint by `metric_for_best_model`; None where there is none (any more)."""
        best = self.state.best_model_checkpoint
        return step_of(Path(best)) if best is not None and Path(best).is_dir() else None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        with disk_errors(folder):
            if folder.exists() and self.args.should_save:  # left half-written by a killed run
                shutil.rmtree(folder)
            self.accelerator.wait_for_everyone()
            limit, self.args.save_total_limit = self.args.save_total_limit, None
            try:
                with self.method.tuner.checkpointing(self._bare_model()):
                    super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self._save_method_state(folder)
                    write_fingerprint(self.initial_factors, folder)
                    self._shares.save(folder)
                    self._kl.save(folder)
                    write_checkpoint_manifest(folder)
            except Exception:  # a full disk: half a checkpoint helps nobody, and the record of the failure needs room
                if self.args.should_save:
                    shutil.rmtree(folder, ignore_errors=True)
                raise
            finally:
                self.args.save_total_limit = limit
        if self.args.should_save and limit:  # this one is whole, whatever becomes of the older ones
            try:
                rotate_checkpoints(folder.parent, limit=limit, best=self.state.best_model_checkpoint)
            except OSError as error:
                print(f"warning: an old checkpoint cannot be removed: {error}", file=sys.stderr)
