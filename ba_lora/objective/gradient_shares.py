"""How strongly each term pulls: its gradient's norm at the hidden states, as a share of the task's.

    share of a term = λ ‖∂L_term/∂H‖ / ‖∂L_task/∂H‖

H is what goes into the output head (a classifier: its pooled features; where the loss is taken from the model's own
logits: these), over all positions of an optimizer step. The gradient there costs a walk over the head, and no pass
through the model. A term of the weights, such as AdaLoRA's, has no share.

`regularizers.lambda_mode=gradient_share` turns it around: λ(t) is set so that the term has the share asked for. It is
measured every few steps, smoothed, used from the next step on, and at most 1, since a term with hardly any gradient
would get any weight. A term without a gradient keeps the λ it has. Logged is the share that a step had: by the λ(t) it
was made with, and its own norms.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ba_lora.config.schema import BALoRAConfig
from ba_lora.errors import UserError
from ba_lora.io import read_object, write_json_atomic
from ba_lora.objective.terms.base import ModelTerm, Term

FILE = "gradient_shares.json"  # in a checkpoint
DEFAULT_SHARE = 0.1
MAX_WEIGHT = 1.0
SMOOTHING = 0.5  # how much of the earlier norms stays at each measurement


def squared_norm(value: Tensor, states: Tensor, unit: float | Tensor) -> Tensor:
    """Return ‖unit · d value/d states‖², 0 where the value does not hang on them."""
    gradient = None
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value, states, retain_graph=True, allow_unused=True)
    if gradient is None:
        return value.new_zeros((), dtype=torch.float64)
    return (torch.linalg.vector_norm(gradient, dtype=torch.float64) * unit).square()


class GradientShares:
    """The norms of one training, and the weights λ that follow from them.

    `add` takes the squares of each micro-batch of a step that is `due`; `close` ends the step on all processes.
    """

    def __init__(self, terms: Sequence[Term], config: BALoRAConfig) -> None:
        terms = [term for term in terms if not isinstance(term, ModelTerm)]
        self.names = [term.name for term in terms]
        self.weights = {term.name: term.weight for term in terms}
        self._every = config.gradient_every if len(terms) > 1 else None
        self._sets_weights = config.lambda_mode == "gradient_share"
        self._wanted = {name: config.gradient_shares.get(name, DEFAULT_SHARE) for name in self.names[1:]}
        self._squares: Tensor | None = None
        self._norms: dict[str, float] = {}  # smoothed
        self._had: list[dict[str, float]] = []  # the shares of the steps that were measured since the last log

    def check(self, num_steps: int) -> None:
        """Raise UserError where λ hangs on a measurement that a training of `num_steps` never makes."""
        if self._sets_weights and self._every is not None and self._every > num_steps:
            raise UserError(
                f"regularizers.gradient_every={self._every}: the run has {num_steps} optimizer steps, so "
                "lambda_mode=gradient_share would never set λ; choose a smaller one"
            )

    def due(self, step: int) -> bool:
        """Whether the optimizer step `step` (from 0) is measured."""
        return self._every is not None and (step + 1) % self._every == 0

    def add(self, squares: Mapping[str, Tensor]) -> None:
        """Add a micro-batch's squared norms, of each term under λ = 1; a term that could not be taken has none."""
        zero = torch.zeros_like(next(iter(squares.values())))
        found = torch.stack([squares.get(name, zero) for name in self.names])
        self._squares = found if self._squares is None else self._squares + found

    def close(self, reduce: Callable[[Tensor], Tensor], lambdas: Mapping[str, float]) -> None:
        """End a measured step, made with `lambdas`: smooth the norms, set the weights. `reduce` sums over processes;
        each calls it."""
        if self._squares is None:
            return
        norms = dict(zip(self.names, reduce(self._squares).sqrt().tolist(), strict=True))
        self._squares = None
        if task := norms["task"]:
            self._had.append({name: lambdas[name] * norms[name] / task for name in self._wanted})
        for name, norm in norms.items():
            self._norms[name] = SMOOTHING * (self._norms.get(name) or norm) + (1 - SMOOTHING) * norm
        if self._sets_weights:
            task = self._norms["task"]
            for name, share in self._wanted.items():
                if (norm := self._norms[name]) or not share:
                    self.weights[name] = min(share * task / norm, MAX_WEIGHT) if share else 0.0

    def logs(self) -> dict[str, float]:
        """Return each term's share, the mean over the steps measured since the last call; {} without one."""
        had, self._had = self._had, []
        names = self._wanted if had else ()
        return {f"gradient_share_{name}": statistics.fmean(shares[name] for shares in had) for name in names}

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint."""
        write_json_atomic(folder / FILE, {"norms": self._norms, "weights": self.weights, "had": self._had})

    def load(self, folder: Path) -> None:
        """Read the state from a checkpoint. Raises UserError where it has none and the weights hang on it."""
        state = read_object(folder / FILE) or {}
        self._norms, self._had = state.get("norms", {}), state.get("had", [])
        if self._sets_weights:
            if "weights" not in state:
                raise UserError(
                    f"{folder} has no {FILE}, so λ is not known: train again from the start, or with lambda_mode=fixed"
                )
            self.weights = state["weights"]
