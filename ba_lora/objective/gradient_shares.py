"""How strongly each term pulls: its gradient's norm at the hidden states, as a share of the task's.

    share of a term = λ ‖∂L_term/∂H‖ / ‖∂L_task/∂H‖

H is what goes into the output head (a classifier: its pooled features), over all positions of an optimizer step. The
gradient there costs a walk over the head, and no pass through the model. A term of the weights only has no share.

`regularizers.lambda_mode=gradient_share` turns it around: λ(t) is set so that the term has the share asked for. It is
measured every few steps, smoothed, used from the next step on, and at most 1, since a term that has no gradient yet
(consistency at step 0) would get any weight.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ba_lora.config.schema import BALoRAConfig
from ba_lora.objective.terms.base import ModelTerm, Term

FILE = "gradient_shares.json"  # in a checkpoint
DEFAULT_SHARE = 0.1
MAX_WEIGHT = 1.0
SMOOTHING = 0.5  # how much of the earlier norms stays at each measurement


def squared_norm(value: Tensor, states: Tensor, unit: float | Tensor) -> Tensor:
    """Return ‖unit · d value/d states‖², 0 where the value does not hang on them."""
    if not (value.requires_grad and states.requires_grad):
        return value.new_zeros((), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(value, states, retain_graph=True, allow_unused=True)
    return value.new_zeros((), dtype=torch.float64) if gradient is None else (gradient.double() * unit).square().sum()


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
        self._norms: dict[str, float] = {}

    def due(self, step: int) -> bool:
        """Whether the optimizer step `step` (from 0) is measured."""
        return self._every is not None and step % self._every == 0

    def add(self, squares: Mapping[str, Tensor]) -> None:
        """Add a micro-batch's squared norms, of each term under λ = 1; a term that could not be taken has none."""
        zero = torch.zeros_like(next(iter(squares.values())))
        found = torch.stack([squares.get(name, zero) for name in self.names])
        self._squares = found if self._squares is None else self._squares + found

    def close(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """End a measured step: smooth the norms, set the weights. `reduce` sums over all processes; each calls it."""
        if self._squares is None:
            return
        norms = reduce(self._squares).sqrt().tolist()
        self._squares = None
        for name, norm in zip(self.names, norms, strict=True):
            self._norms[name] = SMOOTHING * self._norms.get(name, norm) + (1 - SMOOTHING) * norm
        if self._sets_weights:
            task, *_ = self._norms.values()
            for name, share in self._wanted.items():
                norm = self._norms[name]
                self.weights[name] = min(share * task / norm, MAX_WEIGHT) if norm else MAX_WEIGHT

    def logs(self, lambdas: Mapping[str, float]) -> dict[str, float]:
        """Return each term's share under λ(t), and λ(t) where it is set by the shares; {} before a measurement."""
        task = self._norms.get("task")
        if not task:
            return {}
        shares = {f"gradient_share_{name}": lambdas[name] * self._norms[name] / task for name in self._wanted}
        weights = {f"lambda_{name}": lambdas[name] for name in self._wanted} if self._sets_weights else {}
        return shares | weights

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint."""
        (folder / FILE).write_text(json.dumps({"norms": self._norms, "weights": self.weights}))

    def load(self, folder: Path) -> None:
        """Read the state from a checkpoint, where it has one."""
        if (folder / FILE).is_file():
            state = json.loads((folder / FILE).read_text())
            self._norms, self.weights = state["norms"], state["weights"]
