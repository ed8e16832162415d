"""What is minimised: an objective owns its terms, their reductions, the reference, and the way the loss is computed.

    L = L_task + λ1 L_consistency + λ2 L_diversity + λ3 L_svd + Σ λ · further terms

TokenObjective is a language model's, over the response positions; ClassifierObjective (objective_nlu.py) a
classifier's, over whole rows. The trainer owns counts, the log and checkpoints, and asks for λ(t) and each term's
factor: λ(t) / number of positions of the effective batch, or λ(t) / number of micro-batches.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ba_lora.config.schema import BALoRAConfig
from ba_lora.config.schema_nlg import LossConfig
from ba_lora.errors import UserError
from ba_lora.objective.gradient_shares import squared_norm
from ba_lora.objective.losses.plain import TermSums
from ba_lora.objective.path import LossPath, base_model, choose_path, evaluating, whole
from ba_lora.objective.reference import Reference, build_reference, check_step_zero
from ba_lora.objective.reference_cache.store import NOT_THESE_ROWS, CachedReference
from ba_lora.objective.regularizers import response_mask, response_targets
from ba_lora.objective.schedules import scheduled_weight
from ba_lora.objective.terms import term_class, term_names
from ba_lora.objective.terms.base import BatchTerm, ModelTerm, Outputs, PositionTerm, Term
from ba_lora.objective.terms.block import Positions
from ba_lora.objective.terms.task import CrossEntropy

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset

STEP_ZERO_POSITIONS = 64  # of the first micro-batch, at which tuned model and reference are compared


class Objective:
    """The interface, and what both objectives share. `terms` begin with the task."""

    columns: tuple[str, ...] = ()  # of the data set, which the model does not take
    shifts_labels = True  # whether the label of a position is its next token: Trainer counts by it
    regularizers = BALoRAConfig(gradient_every=None)  # whose gradient shares the trainer measures, or sets λ by

    def __init__(self, terms: Iterable[Term], *, off: dict[str, str] | None = None) -> None:
        self.terms: list[Term] = []
        self.off = off or {}  # term taken out → reason
        self.accelerator: Accelerator | None = None
        self.extend(terms)

    def extend(self, terms: Iterable[Term]) -> None:
        """Add terms. Raises ValueError for a second one of a name."""
        for term in terms:
            if term.name in (known.name for known in self.terms):
                raise ValueError(f"the objective has a term {term.name} already")
            self.terms.append(term)

    def attach(self, accelerator: "Accelerator") -> None:
        """Take the trainer's accelerator; the trainer calls it."""
        self.accelerator = accelerator

    def prepare(self, model: nn.Module, rows: "Dataset", collate: Callable, *, batch_size: int) -> None:
        """Do what must be done on the untrained model; every process calls it before the first step."""

    def count(self, inputs: dict[str, Tensor]) -> int:
        """Return the positions (or rows) of a micro-batch that stands by itself."""
        raise NotImplementedError

    def loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        factors: Mapping[str, float | Tensor],
        *,
        check_reference: bool = False,
        units: Mapping[str, float | Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, TermSums]]:
        """Return (Σ factor · term with its gradient, each term detached) for one micro-batch.

        `check_reference`: the model is still untrained, so raise UserError where the reference differs from it.
        `units`: what each factor would be with λ = 1; where given, each term's squared gradient norm is taken too.
        """
        raise NotImplementedError

    def lambdas(self, step: int, num_steps: int, weights: dict[str, float] | None = None) -> dict[str, float]:
        """Return λ(t) of each term: its weight, or the one given, under its schedule."""
        weights = {term.name: term.weight for term in self.terms} | (weights or {})
        return {
            term.name: scheduled_weight(term.schedule, weights[term.name], step=step, num_steps=num_steps)
            for term in self.terms
        }

    def factors(
        self, lambdas: Mapping[str, float], *, of_position: float | Tensor, of_micro_batch: float
    ) -> dict[str, float | Tensor]:
        """Return what each term of a micro-batch is multiplied with: λ(t) and its share of the optimizer step."""
        return {
            term.name: lambdas[term.name] * (of_position if term.reduction == "mean" else of_micro_batch)
            for term in self.terms
        }

    def step_values(
        self, sums: Mapping[str, TermSums], lambdas: Mapping[str, float], *, number: Tensor | int, micro_batches: int
    ) -> dict[str, Tensor]:
        """Return each term's value and weighted value, as this micro-batch's share of the optimizer step, for the log.

        number: the positions of the step; micro_batches: those of the step on all processes. Nothing waits for the
        device.
        """
        values = {}
        for term in self.terms:
            if (found := sums.get(term.name)) is not None:
                all_of_it = number if term.reduction == "mean" else micro_batches
                values[term.name] = found.value / all_of_it
                values[f"weighted_{term.name}"] = found.weighted / all_of_it * lambdas[term.name]
        return values

    def report(self) -> dict[str, Any]:
        """Return how the loss was computed, for the run's result; {} before the first micro-batch."""
        return {}

    def _outputs(self, model: nn.Module, logits: Callable[[], Tensor], matrix: Callable[[], Tensor]) -> Outputs:
        return Outputs(self.accelerator.unwrap_model(model, keep_torch_compile=False), logits, matrix)

    def _batch_terms(
        self, outputs: Outputs, factors: Mapping[str, float | Tensor], total: Tensor, sums: dict[str, TermSums]
    ) -> Tensor:
        """Add the terms with one value for the whole micro-batch; one that cannot be taken of it is left out."""
        for term in self.terms:
            if isinstance(term, BatchTerm) and (value := term.value(outputs)) is not None:
                total = total + factors[term.name] * value
                sums[term.name] = TermSums(value.detach(), value.detach())
        return total

    def _with_squares(
        self,
        sums: dict[str, TermSums],
        states: Tensor,
        units: Mapping[str, float | Tensor],
        *,
        of_positions: Callable[[PositionTerm], Tensor],
        outputs: Outputs,
    ) -> dict[str, TermSums]:
        """Add each term's squared gradient norm at `states`, which both kinds of terms are taken from again."""
        squares = {}
        for term in self.terms:
            if term.name in sums and not isinstance(term, ModelTerm):
                value = of_positions(term) if isinstance(term, PositionTerm) else term.value(outputs)
                squares[term.name] = squared_norm(value, states, units[term.name])
        return {name: found._replace(square=squares.get(name)) for name, found in sums.items()}

    @property
    def _position_terms(self) -> list[PositionTerm]:
        return [term for term in self.terms if isinstance(term, PositionTerm)]


class TokenObjective(Objective):
    """A causal language model's: from the response positions only.

    `regularizers` are the published terms and those of further files in objective/terms, by their λ; `loss` is how it
    is computed (default: fused); `reference` the frozen pre-trained model, built from the untrained `model` when left
    out, or its cache, which needs the data set's column `row`; `extra_terms` are terms from elsewhere.

    One micro-batch, in order: the reference pass under no_grad (only where the consistency term is in), the tuned pass,
    then the loss on the response positions. Both passes go through the wrapped model's own forward, so that DDP and
    DeepSpeed hooks run; the hidden states are caught on their way into the head.
    """

    def __init__(
        self,
        model: nn.Module,
        regularizers: BALoRAConfig,
        *,
        loss: LossConfig | None = None,
        reference: Reference | CachedReference | None = None,
        extra_terms: Iterable[Term] = (),
    ) -> None:
        if reference is None and regularizers.lambda_consistency > 0:
            reference = build_reference(model)
        if reference is not None:
            reference.check(regularizers)
            self.columns = reference.columns
        classes = {name: term_class(name) for name in term_names() if getattr(regularizers, f"lambda_{name}") > 0}
        if "consistency" in classes:
            classes["consistency"] = reference.consistency
        super().__init__([CrossEntropy(), *(of.from_config(regularizers) for of in classes.values()), *extra_terms])
        self.reference = reference if "consistency" in classes else None
        self.regularizers = regularizers
        self._loss = loss or LossConfig()
        self._path: LossPath | None = None

    def attach(self, accelerator: "Accelerator") -> None:
        super().attach(accelerator)
        if self.reference is not None:
            self.reference.to(accelerator.device)

    def count(self, inputs: dict[str, Tensor]) -> int:
        return response_targets(inputs["labels"]).numel()

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
        labels_BT, rows = inputs.pop("labels"), inputs.pop("row", None)
        mask_BT, targets_N = response_mask(labels_BT), response_targets(labels_BT)
        if self._path is None:
            self._path = self._choose_path(model, inputs)
        path = self._path
        reference, reference_head = None, None
        if self.reference is not None:
            if "row" in self.columns and not model.training:
                raise UserError("the reference cache holds the training rows only: evaluate without regularizers")
            with torch.no_grad(), evaluating(model), self.accelerator.autocast():
                reference, reference_head = self.reference.at(
                    model, rows, states=lambda module: path.states(module, inputs, mask_BT)
                )
                if check_reference and reference_head is not None:
                    states_ND, head = path.states(model, inputs, mask_BT)
                    with whole(reference_head):
                        some = slice(STEP_ZERO_POSITIONS)
                        check_step_zero(head(states_ND[some]), reference_head(reference[some]))
            if len(reference) != len(targets_N):
                raise UserError(NOT_THESE_ROWS)
        states_ND, head = path.states(model, inputs, mask_BT)
        with self.accelerator.autocast(), whole(head):
            positions = Positions(targets_N, reference)
            total, sums = path.loss(
                states_ND, head, positions, self._position_terms, factors, reference_head=reference_head
            )
            outputs = self._outputs(model, lambda: head(states_ND), lambda: path.matrix(states_ND, head))
            total = self._batch_terms(outputs, factors, total, sums)
            if units is not None:
                leaf_ND = states_ND.detach().requires_grad_()
                sums = self._with_squares(
                    sums,
                    leaf_ND,
                    units,
                    of_positions=lambda term: path.loss(
                        leaf_ND, head, positions, [term], {term.name: 1.0}, reference_head=reference_head
                    )[0],
                    outputs=self._outputs(model, lambda: head(leaf_ND), lambda: path.matrix(leaf_ND, head)),
                )
            return total, sums

    def _choose_path(self, model: nn.Module, inputs: dict[str, Tensor]) -> LossPath:
        head = base_model(self.accelerator, model).get_output_embeddings()
        follows = self.reference is not None and self.reference.shares_head
        if follows and any(parameter.requires_grad for parameter in head.parameters()):
            raise UserError("the reference would follow a trained output head: leave it out of the adapter's modules")
        return choose_path(model, inputs, config=self._loss, accelerator=self.accelerator)

    def report(self) -> dict[str, Any]:
        return {} if self._path is None else self._path.report()
