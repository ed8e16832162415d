"""The per-position terms fused with the head: the values and dL/dH of `plain_loss`, without ever holding all logits.

A frozen head W makes the logits' only use the loss, so dL/dH can be formed as soon as they are there. The positions are
walked over in chunks: logits z = H Wᵀ and the reference's; each term's values and its part of dL/dz (objective/terms,
where the equations are); dL/dH = (dL/dz) W into an [N, D] buffer, which the backward pass multiplies with the upstream
gradient.

Precision: the product with W has the dtype that the model's own head would have (autocast's, else the weight's), so
that the logits are rounded as in the plain path; all else is float32 (float64 for a float64 head).

Cost: the matrix products, three a chunk (two without reference), are most of it, and the larger the chunk the better
they run; elementwise work goes over blocks of rows small enough for the processor's cache, in buffers that all chunks
share. On 2 CPU cores, D = 512 and 704 positions, the products of all chunks take 380 ms at V = 32,000 in one chunk and
460 ms in chunks of 176; the rest about 40 ms. Plain PyTorch on every device: a compiled kernel was not tried on CUDA.

Legend: N = |M|, the response positions of the micro-batch; C of them in a chunk, B in a block; D hidden size;
V vocabulary.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ba_lora.objective.losses.plain import TermSums
from ba_lora.objective.regularizers import TopLogProbs
from ba_lora.objective.terms.base import PositionTerm
from ba_lora.objective.terms.block import Block, Positions

BLOCK_BYTES = 2 * 2**20  # of one buffer: the handful of them stay in a CPU's cache


def default_chunk_memory_mb(device_type: str) -> int:
    """Return the memory for a chunk's buffers in MiB.

    On a CPU twice as much would save 2 % of a step at V = 128,000, by the times of the products. On a GPU, where none
    was at hand to measure, some hundred positions are needed before a product costs more than reading W.
    """
    return 256 if device_type == "cpu" else 1024


def fused_loss(
    hidden_ND: Tensor,
    head: nn.Linear,
    positions: Positions,
    terms: Sequence[PositionTerm],
    factors: Mapping[str, float | Tensor],
    *,
    chunk_memory_mb: float | None = None,
) -> tuple[Tensor, dict[str, TermSums]]:
    """Return (Σ factor · term, each term's sums) as `plain.plain_loss` does, for a frozen linear head without bias.

    A reference in `positions` is its hidden states [N, D], which go into the same head, or what a cache keeps.
    The chunks' buffers take at most `chunk_memory_mb` MiB, or what one position needs. Gradients flow to `hidden_ND`
    only; under ZeRO-3 the weight must be gathered for this call only.
    """
    memory_mb = chunk_memory_mb or default_chunk_memory_mb(hidden_ND.device.type)
    walk = _Walk(
        head.weight.detach(),
        positions,
        tuple(sorted(terms, key=lambda term: term.uses_up)),
        {term.name: float(factors[term.name]) for term in terms},
        int(memory_mb * 2**20),
        _product_dtype(head.weight),
    )
    total, sums = _FusedHead.apply(hidden_ND, walk)
    rows = {term.name: sums[row] for row, term in enumerate(walk.terms)}
    return total, {term.name: TermSums(*rows[term.name].unbind()) for term in terms}


class _FusedHead(torch.autograd.Function):
    """(Σ factor · weighted sum, the sums of each term [terms, 2]) with dL/dH formed on the way."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, walk: "_Walk") -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden_ND.device.type, enabled=False):
            sums, gradient_ND = walk(hidden_ND, with_gradient=ctx.needs_input_grad[0])
        total = sum(sums[row, 1] * walk.factors[term.name] for row, term in enumerate(walk.terms))
        if gradient_ND is not None:
            ctx.save_for_backward(gradient_ND)
        ctx.hidden_dtype = hidden_ND.dtype
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor, None]:
        (gradient_ND,) = ctx.saved_tensors
        return (gradient_ND * upstream).to(ctx.hidden_dtype), None


@dataclass(frozen=True)
class _Walk:
    """The walk over the positions in chunks of at most `chunk_bytes`; a head's weight [V, D] multiplies in `dtype`."""

    weight_VD: Tensor
    positions: Positions
    terms: tuple[PositionTerm, ...]
    factors: dict[str, float]
    chunk_bytes: int
    dtype: torch.dtype

    def __call__(self, hidden_ND: Tensor, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Return each term's sum, without and with its position weights, [terms, 2], and dL/dH [N, D], None without
        gradient."""
        dtype = self.dtype
        weight_VD = self.weight_VD.to(dtype)
        precision = torch.promote_types(dtype, torch.float32)
        # λ / number of positions would underflow in a float16 product, and a loss scaler comes too late to help.
        scale = (max(map(abs, self.factors.values())) or 1.0) if dtype == torch.float16 else 1.0

        reference = self.positions.reference
        has_logits = reference is not None and not isinstance(reference, TopLogProbs)
        chunk, block = self._sizes(weight_VD, precision, sides=1 + has_logits)
        head = _Head(weight_VD, chunk, precision)
        z_buffer_CV, *reference_buffer_CV = weight_VD.new_empty(1 + has_logits, chunk, len(weight_VD), dtype=precision)
        buffers: list[Tensor] = []  # what the blocks share

        values = torch.zeros(len(self.terms), 2, len(self.positions), dtype=precision, device=weight_VD.device)
        gradient_ND = torch.empty(hidden_ND.shape, dtype=precision, device=weight_VD.device) if with_gradient else None
        for start in range(0, len(self.positions), chunk or 1):
            inside = slice(start, start + chunk)
            chunk_positions = self.positions[inside]
            z_CV = head.logits(hidden_ND[inside], z_buffer_CV)
            if has_logits:
                reference_CV = head.logits(reference[inside], *reference_buffer_CV)
                chunk_positions = Positions(chunk_positions.targets, reference_CV)
            for first in range(0, len(z_CV), block):
                rows = slice(first, min(first + block, len(z_CV)))
                part = Block(z_CV[rows], chunk_positions[rows], buffer=_taken_from(buffers, z_CV[rows], block))
                for row, term in enumerate(self.terms):
                    values_B, weights_B = term.walk(part, self.factors[term.name] / scale)
                    where = slice(start + first, start + rows.stop)
                    values[row, 0, where] = values_B
                    values[row, 1, where] = values_B if weights_B is None else values_B * weights_B
                if with_gradient:
                    part.gradient()  # over z
            if with_gradient:
                gradient_ND[inside] = head.back(z_CV)
        return values.sum(-1), None if gradient_ND is None else gradient_ND.mul_(scale)

    def _sizes(self, weight_VD: Tensor, precision: torch.dtype, *, sides: int) -> tuple[int, int]:
        """Return how many positions a chunk and a block have."""
        num_positions, vocabulary = len(self.positions), len(weight_VD)
        on_cpu = weight_VD.device.type == "cpu"
        buffers = sides if on_cpu else sides + 1 + sum(term.num_buffers for term in self.terms)
        narrow = weight_VD.dtype != precision
        row_bytes = (precision.itemsize * buffers + weight_VD.dtype.itemsize * narrow) * vocabulary
        chunk = min(max(self.chunk_bytes // row_bytes, 1), max(num_positions, 1))
        chunk = math.ceil(num_positions / math.ceil(num_positions / chunk)) if num_positions else 0  # all about equal
        block = min(chunk, max(BLOCK_BYTES // (precision.itemsize * vocabulary), 1)) if on_cpu else chunk
        return chunk, block


class _Head:
    """The head's two products: logits H Wᵀ [C, V] and dL/dH = (dL/dz) W [C, D], both in the weight's dtype."""

    def __init__(self, weight_VD: Tensor, chunk: int, precision: torch.dtype) -> None:
        self.weight_VD = weight_VD
        self._narrow_CV = None if weight_VD.dtype == precision else weight_VD.new_empty(chunk, len(weight_VD))

    def logits(self, hidden_CD: Tensor, out_CV: Tensor) -> Tensor:
        """Write the logits into the buffer, rounded as the weight's dtype rounds them."""
        size = len(hidden_CD)
        product_CV = out_CV[:size] if self._narrow_CV is None else self._narrow_CV[:size]
        torch.mm(hidden_CD.to(self.weight_VD.dtype), self.weight_VD.T, out=product_CV)
        return product_CV if self._narrow_CV is None else out_CV[:size].copy_(product_CV)

    def back(self, dz_CV: Tensor) -> Tensor:
        """Return dL/dH of a chunk."""
        return (dz_CV if self._narrow_CV is None else self._narrow_CV[: len(dz_CV)].copy_(dz_CV)) @ self.weight_VD


def _taken_from(buffers: list[Tensor], like_BV: Tensor, block: int) -> Any:
    """Return a function that gives one [B, V] buffer after the other; all blocks share them."""
    number = itertools.count()

    def take() -> Tensor:
        index = next(number)
        if index == len(buffers):
            buffers.append(like_BV.new_empty(block, like_BV.shape[1]))
        return buffers[index][: len(like_BV)]

    return take


def _product_dtype(weight_VD: Tensor) -> torch.dtype:
    """Return the dtype in which the model's own head would multiply here and now."""
    device = weight_VD.device.type
    if torch.is_autocast_enabled(device) and weight_VD.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight_VD.dtype
