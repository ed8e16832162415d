"""BALoRATrainer: transformers' Trainer with BA-LoRA's loss, named terms in the log, checkpoints that can be trusted.

One micro-batch, in order: the reference pass under no_grad (only where the consistency term is in), the tuned pass,
then the loss on the response positions alone. Both passes go through the wrapped model's own forward, so that DDP and
DeepSpeed hooks run; the hidden states are caught on their way into the head.

Reductions: the task, consistency and diversity terms are sums divided by the number of response positions of the
whole effective batch (all micro-batches, all processes); the svd term is one value per micro-batch, averaged over all
micro-batches of all processes. So 2 processes × b equals 1 process × b × accumulation 2, term by term; but for an
epoch's last batch where the rows run out: several processes fill it with the epoch's first rows (accelerate), one
leaves it short.
"""

import contextlib
import inspect
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState
from transformers.utils import logging

from ba_lora.config.schema import BALoRAConfig, LossConfig
from ba_lora.errors import UserError
from ba_lora.io import disk_errors
from ba_lora.methods.adalora import (
    AdaLoraCallback,
    adalora_orthogonality,
    adalora_orthogonality_weight,
    freeze_rank_counts,
)
from ba_lora.objective.losses import (
    TermWeights,
    default_chunk_memory_mb,
    fused_nlg_loss,
    head_factor,
    nlg_loss,
    why_not_frozen_linear,
)
from ba_lora.objective.reference import Reference, build_reference, check_step_zero, gathered
from ba_lora.objective.reference_cache.store import CachedReference
from ba_lora.objective.regularizers import TopLogProbs, response_mask, response_targets
from ba_lora.objective.schedules import scheduled_weight
from ba_lora.training.checkpoints import (
    clear_checkpoints,
    find_checkpoint,
    rotate_checkpoints,
    step_of,
    stopped_early,
    write_checkpoint_manifest,
)
from ba_lora.training.log import LOGGED_TERMS, TERMS, TermMeter, TermsCallback, TokenMeter
from ba_lora.training.plain_lora import check_initial_factors, initial_factors, write_fingerprint
from ba_lora.training.sampler import SeededLengthGroupedSampler, reachable_sampler

logger = logging.get_logger(__name__)

_NOT_YET = object()
STEP_ZERO_POSITIONS = 64  # of the first micro-batch, at which tuned model and reference are compared


class BALoRATrainer(Trainer):
    """Trainer for causal language models under BA-LoRA's loss.

    L = L_task + λ1 L_consistency + λ2 L_diversity + λ3 L_svd, from the response positions only.

    Args beyond Trainer's: `regularizers`, the terms and their weights (all λ = 0 is plain fine-tuning, for PiSSA, LoRA
    or full alike); `loss`, how it is computed (default: fused); `reference`, the frozen pre-trained model, built here
    from the untrained `model` when left out, or its cache, which needs the data set's column `row`. Reference and tuned
    model are compared once, at step 0: UserError where they differ.
    Logs per logging step, averaged over its optimizer steps: `task`, `consistency`, `diversity`, `svd` (unweighted),
    `weighted_*` (times λ(t)) and `share_*` (|weighted| / Σ |weighted|); and `tokens_per_second`, `padding_share`.
    Evaluation logs `eval_loss`, the whole loss under the λ of that step (Trainer's mean over batches, by rows), and
    `eval_task`, the task's loss by itself (the mean over all response positions): compare methods by the latter.
    A loss that is inf or NaN, or weights that are after the last step, end the training with a UserError.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the whole effective batch itself
    # Terms that are means over the effective batch; the others are values of a micro-batch, averaged over all of them.
    mean_terms = ("task", "consistency", "diversity")

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        regularizers: BALoRAConfig,
        loss: LossConfig | None = None,
        reference: Reference | CachedReference | None = None,
        **kwargs: Any,
    ) -> None:
        freeze_rank_counts(model)
        self.initial_factors = initial_factors(model)  # before the reference's frozen ones lie beside them
        if reference is None and regularizers.lambda_consistency > 0:
            reference = self._build_reference(model)
        frozen_model = reference.frozen_model if isinstance(reference, Reference) else None
        if is_deepspeed_zero3_enabled() and frozen_model is not None:
            raise UserError("full fine-tuning with the consistency term cannot run under ZeRO-3: use ZeRO-2")
        if args.n_gpu > 1:
            raise UserError("several GPUs in one process are not supported: use accelerate launch or torchrun")
        super().__init__(model=model, args=args, **kwargs)
        self.regularizers = regularizers
        self.reference = reference
        if frozen_model is not None:
            frozen_model.to(self.args.device)
        if isinstance(reference, CachedReference):
            reference.check(regularizers)
        self.model_accepts_loss_kwargs = True  # makes Trainer count the response positions of the effective batch
        self.loss_config = loss or LossConfig()
        self._num_items: tuple[Tensor | int | None, Tensor | int | None] = (None, None)  # on the device, on the host
        self._term_meter, self._token_meter = TermMeter(), TokenMeter()
        self._svd_factor: Tensor | None | object = _NOT_YET
        self._evaluated: Tensor | int = 0  # [the task's loss, its positions], summed over an evaluation
        self._begins = False  # whether this is the training's very first micro-batch, on every process alike
        self._head_checked = self._changes_logits = False
        self._why_plain: str | None | object = _NOT_YET
        self._spares_logits: bool | None = None
        self._orthogonality_weight = adalora_orthogonality_weight(model)
        if self._orthogonality_weight is not None:
            if self.is_deepspeed_enabled:
                raise UserError("AdaLoRA ranks directions by gradients that DeepSpeed hides: use DDP or one process")
            self.add_callback(AdaLoraCallback())
        for callback in (ProgressCallback, PrinterCallback):  # one line of loss terms instead of a dictionary
            if self.pop_callback(callback) is not None:
                self.add_callback(TermsCallback(show_bar=callback is ProgressCallback))

    def _build_reference(self, model: nn.Module) -> Reference:
        return build_reference(model)

    # ---- the loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the micro-batch's share of the effective batch's loss.

        `num_items_in_batch` is the number of response positions of the effective batch; without it (evaluation, or
        direct calls) the micro-batch stands alone.
        """
        if self._why_plain is _NOT_YET:
            self._choose_loss(self._unwrap(model).get_output_embeddings())
        inputs = dict(inputs)
        labels_BT = inputs.pop("labels")
        mask_BT, targets_N = response_mask(labels_BT), response_targets(labels_BT)
        rows = inputs.pop("row", None)
        reference, reference_head = self._reference_at(model, inputs, mask_BT, rows, num_positions=targets_N.numel())
        hidden_ND, head = self._hidden(model, inputs, mask_BT)

        training = model.training and num_items_in_batch is not None
        positions = self._on_host(num_items_in_batch) if training else max(targets_N.numel(), 1)
        weights, lambdas = self._weights(positions, training=training)
        with self.accelerator.autocast(), self._whole(head):
            inputs_of_loss = (hidden_ND, reference, head, targets_N)
            settings = {"weights": weights, "config": self.regularizers, "head_factor_DD": self._head_factor(head)}
            if self._why_plain is None:
                settings["chunk_memory_mb"] = self.loss_config.chunk_memory_mb
                total, terms = fused_nlg_loss(*inputs_of_loss, **settings)
            else:
                total, terms = nlg_loss(*inputs_of_loss, **settings, reference_head=reference_head)
        total = total + self._orthogonality(model, terms, lambdas, training=training)
        if training:
            self._record(terms, lambdas, positions)
        elif not model.training:
            self._record_evaluation(terms, targets_N.numel())
        return (total, {"loss": total}) if return_outputs else total

    def _reference_at(
        self, model: nn.Module, inputs: dict[str, Tensor], mask_BT: Tensor, rows: Tensor | None, *, num_positions: int
    ) -> tuple[Tensor | TopLogProbs | None, Callable[[Tensor], Tensor] | None]:
        """Return the reference at the positions of the mask, its hidden states [N, D] and the head that they go into
        (under full fine-tuning not the trained one), or what the cache keeps of its distributions in the batch's
        `rows`, without a head; (None, None) while the consistency term is out."""
        if self.regularizers.lambda_consistency == 0:
            return None, None
        if isinstance(self.reference, CachedReference):
            if not model.training:
                raise UserError("the reference cache holds the training rows alone: evaluate without regularizers")
            top = None if rows is None else self.reference.lookup(rows.tolist(), device=mask_BT.device)
            if top is None or len(top.tokens) != num_positions:
                raise UserError(
                    "the training rows are not those of the reference cache: give it that data set as it is"
                )
            return top, None
        with (
            torch.no_grad(),
            self._without_dropout(model),
            self.accelerator.autocast(),  # which a frozen copy, unlike the prepared model, does not bring along
        ):
            with self.reference.use(model) as module:
                found = self._hidden(module, inputs, mask_BT)
            if self._begins:
                tuned, reference = self._hidden(model, inputs, mask_BT), found
                with self._whole(reference[1]):
                    check_step_zero(*(head(states[:STEP_ZERO_POSITIONS]) for states, head in (tuned, reference)))
            return found

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the column that says where a row's reference lies; Trainer drops what the model does not take."""
        super()._set_signature_columns_if_needed()
        if isinstance(self.reference, CachedReference) and "row" not in self._signature_columns:
            self._signature_columns.append("row")

    def _orthogonality(
        self, model: nn.Module, terms: dict[str, Tensor], lambdas: dict[str, float], *, training: bool
    ) -> Tensor | float:
        """Return the micro-batch's share of AdaLoRA's orthogonality term and name it among the terms; 0 for every
        other method."""
        if self._orthogonality_weight is None:
            return 0.0
        micro_batches = self.current_gradient_accumulation_steps if training else 1
        orthogonality = adalora_orthogonality(model)
        terms["orthogonality"], lambdas["orthogonality"] = orthogonality.detach(), self._orthogonality_weight
        return self._orthogonality_weight / micro_batches * orthogonality

    def _on_host(self, num_items: Tensor | int) -> Tensor | int:
        """Return the count of the effective batch without a wait for the device in every micro-batch: it is fetched
        once an optimizer step."""
        if self._num_items[0] is not num_items:
            self._num_items = (num_items, num_items.cpu() if isinstance(num_items, Tensor) else num_items)
        return self._num_items[1]

    def _weights(self, positions: Tensor | int, *, training: bool) -> tuple[TermWeights, dict[str, float]]:
        """Return the factors of the terms and λ(t). DDP and DeepSpeed average gradients over the processes, hence
        their number in the per-position factors."""
        settings = self.regularizers
        lambdas = {
            term: scheduled_weight(
                getattr(settings, f"{term}_schedule"),
                getattr(settings, f"lambda_{term}"),
                step=self.state.global_step,
                num_steps=self.state.max_steps,
            )
            for term in TERMS[1:]
        }
        shared = training and self.args.average_tokens_across_devices
        scale = (self.accelerator.num_processes if shared else 1) / positions
        micro_batches = self.current_gradient_accumulation_steps if training else 1
        factors = {term: scale if term in self.mean_terms else 1 / micro_batches for term in TERMS}
        return TermWeights(task=scale, **{term: value * factors[term] for term, value in lambdas.items()}), lambdas

    def _hidden(
        self, module: nn.Module, inputs: dict[str, Tensor], mask_BT: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return what goes into the head at the positions of the mask, [N, D], and the head itself.

        Architectures that change the logits after the head (soft-capping, scaling; checked once) are taken by their
        logits, with the identity as head. So is the plain loss under ZeRO-3, which frees the head's weight between
        forward and backward.
        """
        base = self._unwrap(module)
        head = base.get_output_embeddings()
        if self._changes_logits or (is_deepspeed_zero3_enabled() and self._why_plain is not None):
            return module(**inputs, use_cache=False).logits[mask_BT], _identity
        caught = {}

        def catch(_module: nn.Module, _args: tuple, output: Any) -> None:
            caught["hidden"] = output[0] if isinstance(output, tuple) else output.last_hidden_state

        handle = base.get_decoder().register_forward_hook(catch)
        try:
            outputs = module(**inputs, use_cache=False, **self._last_logits_only(base))
        finally:
            handle.remove()
        if not self._head_checked:
            self._check_head(base, caught["hidden"], outputs.logits)
        if self._changes_logits:
            return module(**inputs, use_cache=False).logits[mask_BT], _identity
        return caught["hidden"][mask_BT], head

    def _choose_loss(self, head: nn.Module) -> None:
        """Set why the loss is the plain one: None where it is the fused one."""
        if self.loss_config.implementation == "plain":
            self._why_plain = "loss.implementation=plain"
        else:
            self._why_plain = why_not_frozen_linear(head)
            if self._why_plain is not None:
                logger.warning(f"the loss is taken from all logits, at their price: {self._why_plain}")
        if (
            isinstance(self.reference, Reference)
            and self.reference.frozen_model is None
            and self.regularizers.lambda_consistency > 0
            and any(parameter.requires_grad for parameter in head.parameters())
        ):
            raise UserError("the reference would follow a trained output head: leave it out of the adapter's modules")

    def loss_report(self) -> dict[str, Any]:
        """Return how the loss was computed, for the run's result; {} before the first micro-batch."""
        if self._why_plain is _NOT_YET:
            return {}
        if self._why_plain is not None:
            return {"implementation": "plain", "why_plain": self._why_plain}
        memory_mb = self.loss_config.chunk_memory_mb or default_chunk_memory_mb(self.args.device.type)
        return {"implementation": "fused", "chunk_memory_mb": memory_mb}

    def _last_logits_only(self, base: nn.Module) -> dict[str, int]:
        """Return the argument that spares the model's own logits, where the architecture knows it."""
        if self._spares_logits is None:
            self._spares_logits = "logits_to_keep" in inspect.signature(base.forward).parameters
        return {"logits_to_keep": 1} if self._spares_logits else {}

    def _check_head(self, base: nn.Module, hidden_BTD: Tensor, logits_BTV: Tensor) -> None:
        """Compare the head's output with the model's own last logits, once: is nothing done to them in between?

        Soft-capping is asked for by name too: it hardly changes small logits.
        """
        head = base.get_output_embeddings()
        with torch.no_grad(), self.accelerator.autocast(), self._whole(head):
            ours, theirs = head(hidden_BTD[:, -1]), logits_BTV[:, -1].float()
        tolerance = (1e-4 if ours.dtype.itemsize >= 4 else 0.02) * theirs.abs().max().clamp(min=1.0)
        capped = getattr(base.config.get_text_config(), "final_logit_softcapping", None) is not None
        self._changes_logits = capped or not bool((ours.float() - theirs).abs().max() <= tolerance)
        self._head_checked = True
        if self._changes_logits:
            self._why_plain = "this architecture changes its logits after the head"
            logger.warning(f"the loss is taken from all logits, at their price: {self._why_plain}")

    def _whole(self, head: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Hold the head's weight together while the fused loss reads it, where ZeRO-3 has split it."""
        return gathered(list(head.parameters()) if isinstance(head, nn.Module) else [], modify=False)

    def _head_factor(self, head: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Return the head's factor for the svd term, computed at the first call; None where the logits must serve."""
        if self.regularizers.lambda_svd > 0 and self._svd_factor is _NOT_YET:
            with torch.autocast(self.args.device.type, enabled=False):
                self._svd_factor = head_factor(head)
            if self._svd_factor is None:
                logger.warning("the svd term is taken from the logits: no whole, frozen, linear head is at hand")
        return self._svd_factor if self.regularizers.lambda_svd > 0 else None

    def _unwrap(self, module: nn.Module) -> nn.Module:
        module = self.accelerator.unwrap_model(module, keep_torch_compile=False)
        return module.get_base_model() if hasattr(module, "get_base_model") else module

    @contextlib.contextmanager
    def _without_dropout(self, model: nn.Module) -> Iterator[None]:
        """Run the reference pass in evaluation mode: dropout, of modules or inside attention, would be noise in it."""
        training = model.training
        model.eval()
        try:
            yield
        finally:
            model.train(training)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Trainer's own, but for grouping by length: there an epoch's order depends on seed and epoch alone."""
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
        self._token_meter.add(inputs)
        loss = super().training_step(model, inputs, *arguments, **settings)
        self._begins = False
        if not bool(loss.isfinite()):  # no further wait for the device: Trainer asks the same
            self._stop_diverged("loss is", self.state.global_step + 1)
        return loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; raises UserError where the weights are inf or NaN after the last step."""
        output = super().train(*args, **kwargs)
        self._check_weights()
        return output

    def _check_weights(self) -> None:
        if not all(bool(p.isfinite().all()) for p in self.model.parameters() if p.requires_grad):
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

    def _summed(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    def _record(
        self, terms: dict[str, Tensor], lambdas: dict[str, float], positions: Tensor | int, **counts: Tensor
    ) -> None:
        """Give the micro-batch's share of each term's value to the log (on the device, no synchronisation)."""
        micro_batches = self.current_gradient_accumulation_steps * self.accelerator.num_processes
        values = dict(counts)
        for term in LOGGED_TERMS:
            if term not in terms:
                continue
            share = terms[term] / (positions if term in self.mean_terms else micro_batches)
            if term == "consistency":  # the adaptive λ1 is no plain factor; undo the process count of `_weights`
                weighted = terms["weighted_consistency"]
                if self.args.average_tokens_across_devices:
                    weighted = weighted / self.accelerator.num_processes
            else:
                weighted = share * lambdas.get(term, 1.0)
            values |= {term: share, f"weighted_{term}": weighted}
        self._term_meter.add(values, steps=1 / self.current_gradient_accumulation_steps)

    def _record_evaluation(self, terms: dict[str, Tensor], positions: int) -> None:
        self._evaluated = self._evaluated + torch.stack([terms["task"], terms["task"].new_tensor(positions)]).double()

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
        if "loss" in logs and (terms := self._term_meter.read(self._summed)):
            logs |= terms | self._token_meter.read(self._summed)
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
        if checkpoint is not None and self._orthogonality_weight is not None:
            logger.warning("AdaLoRA keeps the importance of its directions in no checkpoint: training starts over")
            checkpoint = None
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
        super()._load_optimizer_and_scheduler(checkpoint)

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
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    write_fingerprint(self.initial_factors, folder)
                    write_checkpoint_manifest(folder)
                    if limit:
                        rotate_checkpoints(folder.parent, limit=limit, best=self.state.best_model_checkpoint)
            except Exception:  # a full disk: half a checkpoint helps nobody, and the record of the failure needs room
                if self.args.should_save:
                    shutil.rmtree(folder, ignore_errors=True)
                raise
            finally:
                self.args.save_total_limit = limit


def _identity(tensor: Tensor) -> Tensor:
    return tensor
