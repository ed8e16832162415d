"""λ of the consistency term by a controller that holds the KL to the pre-trained model at a target.

    e(t) = clip(KL(t) / target − 1, −0.2, 0.2)
    λ(t + 1) = λ(t) (1 + gain e(t))

`regularizers.lambda_mode=adaptive_kl`: the controller of RLHF (Ziegler et al. 2019, arXiv 1909.08593, section 2.2; gain
0.1). KL(t) is the mean over the response positions (a classifier: the rows) of optimizer step t, in nats, from the
pre-trained model to the trained one at the term's temperature: the term without its T². Theirs goes the other way, over
samples of the trained model. With a reference cache of K tokens it is over K + 1 outcomes, a lower bound. λ starts at
lambda_consistency, and stays within LAMBDA_LIMITS, so that a target that is out of reach does not carry it away.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ba_lora.config.schema import LAMBDA_LIMITS, BALoRAConfig
from ba_lora.errors import UserError
from ba_lora.io import read_object, write_json_atomic
from ba_lora.objective.losses.plain import TermSums
from ba_lora.objective.terms.base import Term

FILE = "kl_control.json"  # in a checkpoint
CLIP = 0.2
TERM = "consistency"


class KLController:
    """The controller of one training; in another mode it does nothing, and `weights` is empty.

    `add` takes each micro-batch; `close` ends an optimizer step on all processes.
    """

    def __init__(self, terms: Sequence[Term], config: BALoRAConfig) -> None:
        self.weights: dict[str, float] = {}  # λ of the term from the next step on, before its schedule
        self._config = config
        self._sums: Tensor | None = None  # [Σ T² KL, positions]
        if config.lambda_mode == "adaptive_kl":
            self.weights = {term.name: term.weight for term in terms if term.name == TERM}

    def add(self, sums: Mapping[str, TermSums], positions: int) -> None:
        """Add a micro-batch of so many positions (or rows)."""
        if self.weights:
            value = sums[TERM].value.double()
            found = torch.stack([value, value.new_tensor(positions)])
            self._sums = found if self._sums is None else self._sums + found

    def close(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """End a step: set λ for the next. `reduce` sums over all processes; each calls it."""
        if self._sums is None:
            return
        total, positions = reduce(self._sums).tolist()
        self._sums = None
        divergence = total / max(positions, 1) / self._config.temperature**2
        error = min(max(divergence / self._config.kl_target - 1, -CLIP), CLIP)
        low, high = LAMBDA_LIMITS
        self.weights[TERM] = min(max(self.weights[TERM] * (1 + self._config.kl_gain * error), low), high)

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint."""
        if self.weights:
            write_json_atomic(folder / FILE, self.weights)

    def load(self, folder: Path) -> None:
        """Read the state from a checkpoint. Raises UserError where it has none and λ hangs on it."""
        if self.weights:
            state = read_object(folder / FILE) or {}
            if TERM not in state:
                raise UserError(
                    f"{folder} has no {FILE}, so λ is not known: train again from the start, or with lambda_mode=fixed"
                )
            self.weights = state
