"""A block of response positions in the fused walk: their logits, what the terms share of them, and dL/dz.

The terms of a loss add their parts of the gradient one after the other, as they are written in their equations:

    add_softmax(c)      c · softmax z            add(M, c)       c · M, M [B, V] a buffer of the term's
    add_logits(c)       c · what stands in z     add_at(K, v)    v [B, K] at the tokens K

`gradient` puts them together, in place of the logits. The passes over [B, V] are few and in place: they are what the
walk costs besides its matrix products.

Legend: B positions of the block; V vocabulary; a coefficient c is a number or [B, 1].
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ba_lora.objective.regularizers import TopLogProbs


@dataclass(frozen=True)
class Positions:
    """What is known of N positions besides their logits.

    targets: int64 [N], the tokens they predict. reference: the pre-trained model at the same positions; its logits
    [N, V] where a term reads it, its hidden states [N, D] before the head, what a cache keeps, or None without one.
    """

    targets: Tensor
    reference: Tensor | TopLogProbs | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, rows: slice) -> "Positions":
        """Return some of the positions."""
        return Positions(self.targets[rows], None if self.reference is None else self.reference[rows])


@dataclass(frozen=True)
class Cooled:
    """softmax(z / T): z / T [B, V], its largest value [B], the rest of its log-normaliser [B], the softmax [B, V]."""

    logits: Tensor
    peak: Tensor
    rest: Tensor
    softmax: Tensor


class Block:
    """B positions: `logits` z [B, V], `softmax` p, `peak` and `rest` with peak + rest = log Σ exp z, `positions`."""

    def __init__(self, logits_BV: Tensor, positions: Positions, *, buffer: Callable[[], Tensor]) -> None:
        self.logits = logits_BV
        self.positions = positions
        self.buffer = buffer  # a [B, V] tensor to write into, another one at each call
        self.softmax = buffer()
        self.peak, self.rest = softmax(logits_BV, out=self.softmax)
        self._of_softmax: float | Tensor = 0.0
        self._of_logits: float = 0.0
        self._dense: list[tuple[Tensor, float | Tensor]] = []
        self._sparse: list[tuple[Tensor, Tensor]] = []

    @property
    def vocabulary(self) -> int:
        return self.logits.shape[1]

    def cooled(self, temperature: float) -> Cooled:
        """Return softmax(z / T), at T = 1 the block's own; call it once."""
        if temperature == 1:
            return Cooled(self.logits, self.peak, self.rest, self.softmax)
        logits_BV, softmax_BV = torch.div(self.logits, temperature, out=self.buffer()), self.buffer()
        return Cooled(logits_BV, *softmax(logits_BV, out=softmax_BV), softmax_BV)

    def add_softmax(self, coefficient: float | Tensor) -> None:
        self._of_softmax = self._of_softmax + coefficient

    def add_logits(self, coefficient: float) -> None:
        """For a term that has put something else in place of the logits (PositionTerm.uses_up = 2)."""
        self._of_logits += coefficient

    def add(self, matrix_BV: Tensor, coefficient: float | Tensor) -> None:
        if matrix_BV is self.softmax:
            self.add_softmax(coefficient)
        else:
            self._dense.append((matrix_BV, coefficient))

    def add_at(self, tokens_BK: Tensor, values_BK: Tensor) -> None:
        self._sparse.append((tokens_BK, values_BK))

    def gradient(self) -> Tensor:
        """Return dL/dz [B, V], written over the logits; the block is used up."""
        dz_BV = self.logits
        if self._of_logits:
            torch.add(self.softmax.mul_(self._of_softmax), dz_BV, alpha=self._of_logits, out=dz_BV)
        else:
            torch.mul(self.softmax, self._of_softmax, out=dz_BV)
        for matrix_BV, coefficient in self._dense:
            if isinstance(coefficient, Tensor):
                dz_BV.addcmul_(matrix_BV, coefficient)
            else:
                dz_BV.add_(matrix_BV, alpha=coefficient)
        for tokens_BK, values_BK in self._sparse:
            dz_BV.scatter_add_(1, tokens_BK, values_BK)
        return dz_BV


def softmax(logits_BV: Tensor, *, out: Tensor) -> tuple[Tensor, Tensor]:
    """Write the softmax to `out` and return (m, s) [B], m the largest logit and m + s = log Σ exp z.

    The largest probability is exp(m) / Σ exp z, which gives the sum without another exponential.
    """
    torch.softmax(logits_BV, dim=-1, out=out)
    return logits_BV.amax(-1), -out.amax(-1).log()
