"""The NLG loss fused with the head: the values and dL/dH of `plain.nlg_loss`, without ever holding all logits.

A frozen head W makes the logits' only use the loss, so dL/dH can be formed as soon as they are there. The positions are
walked over in chunks: logits z = H Wᵀ and the reference's, the three per-position terms, dL/dz in place of z, and
dL/dH = (dL/dz) W into an [N, D] buffer, which the backward pass multiplies with the upstream gradient. With
p = softmax z, p_T = softmax(z / T), q_T the reference's, a the adaptive λ1's weight of the position (1 without it):

    task          −log p_y                       dz = p − onehot(y)
    consistency   a T² KL(q_T ‖ p_T)             dz = a T (p_T − q_T)
      cached      the same over K + 1 outcomes   dz = a T (p_T − q_T) in K, a T (p_T − q_tail p_T / p_tail) else
    diversity     n = Σ p log p                  dz = p (log p − n)
      top-k       n = Σ s log s, s of the top k  dz = s (log s − n) at those k

The svd term goes its own way through `svd.same_singular_values`, by autograd.

Precision: the product with W has the dtype that the model's own head would have (autocast's, else the weight's), so
that the logits are rounded as in the plain path; all else is float32 (float64 for a float64 head).

Cost: the matrix products, three a chunk (two without reference), are most of it, and the larger the chunk the better
they run; elementwise work goes over blocks of rows small enough for the processor's cache, in buffers that all chunks
share. On 2 CPU cores, D = 512 and 704 positions, the products of all chunks take 380 ms at V = 32,000 in one chunk and
460 ms in chunks of 176; the rest about 40 ms. Plain PyTorch on every device: a compiled kernel was not tried on CUDA.

Legend: N = |M|, the response positions of the micro-batch; C of them in a chunk, B in a block; D hidden size;
V vocabulary; K top-k.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ba_lora.config.schema import BALoRAConfig
from ba_lora.objective import regularizers
from ba_lora.objective.losses.plain import TermWeights
from ba_lora.objective.losses.svd import same_singular_values
from ba_lora.objective.regularizers import TopLogProbs

BLOCK_BYTES = 2 * 2**20  # of one buffer: the handful of them stay in a CPU's cache


def default_chunk_memory_mb(device_type: str) -> int:
    """Return the memory for a chunk's buffers in MiB.

    On a CPU twice as much would save 2 % of a step at V = 128,000, by the times of the products. On a GPU, where none
    was at hand to measure, some hundred positions are needed before a product costs more than reading W.
    """
    return 256 if device_type == "cpu" else 1024


def fused_nlg_loss(
    hidden_ND: Tensor,
    reference: Tensor | TopLogProbs | None,
    head: nn.Linear,
    targets_N: Tensor,
    *,
    weights: TermWeights,
    config: BALoRAConfig,
    head_factor_DD: Tensor | None = None,
    chunk_memory_mb: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (total, terms) as `plain.nlg_loss` does, for a head that `svd.why_not_frozen_linear` has nothing against.

    `head_factor_DD` is needed for the svd term. The chunks' buffers take at most `chunk_memory_mb` MiB, or what one
    position needs. Gradients flow to `hidden_ND` alone; under ZeRO-3 the weight must be gathered for this call only.
    """
    total, task, consistency, weighted_consistency, diversity = _FusedHead.apply(
        hidden_ND,
        reference if config.lambda_consistency > 0 else None,
        head.weight.detach(),
        targets_N,
        weights,
        config,
        chunk_memory_mb or default_chunk_memory_mb(hidden_ND.device.type),
    )
    terms = {"task": task}
    if config.lambda_consistency > 0:
        terms |= {"consistency": consistency, "weighted_consistency": weighted_consistency}
    if config.lambda_diversity > 0:
        terms["diversity"] = diversity
    if config.lambda_svd > 0:
        matrix_ND = same_singular_values(hidden_ND, head_factor_DD)
        every_N = torch.ones(matrix_ND.shape[0], dtype=torch.bool, device=matrix_ND.device)
        ratio = regularizers.svd(matrix_ND, every_N, top_k=config.svd_top_k, norm=config.svd_norm)
        total = total + weights.svd * ratio
        terms["svd"] = ratio.detach()
    return total, terms


class _FusedHead(torch.autograd.Function):
    """(total of the per-position terms, and each term's sum) with dL/dH formed on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        reference: Tensor | TopLogProbs | None,
        weight_VD: Tensor,
        targets_N: Tensor,
        weights: TermWeights,
        config: BALoRAConfig,
        chunk_memory_mb: float,
    ) -> tuple[Tensor, ...]:
        factors = tuple(float(weight) for weight in (weights.task, weights.consistency, weights.diversity))
        product_dtype = _product_dtype(weight_VD)
        # λ / number of positions would underflow in a float16 product, and a loss scaler comes too late to help.
        scale = (max(factors) or 1.0) if product_dtype == torch.float16 else 1.0
        with torch.autocast(hidden_ND.device.type, enabled=False):
            values, gradient_ND = _walk(
                hidden_ND,
                reference,
                weight_VD.to(product_dtype),
                targets_N,
                factors=tuple(factor / scale for factor in factors),
                config=config,
                chunk_bytes=int(chunk_memory_mb * 2**20),
                with_gradient=ctx.needs_input_grad[0],
            )
        task, consistency, weighted, diversity = values.sum(dim=1)
        weighted = weighted * weights.consistency
        total = task * weights.task + weighted + diversity * weights.diversity
        if gradient_ND is not None:
            ctx.save_for_backward(gradient_ND.mul_(scale))
        ctx.hidden_dtype = hidden_ND.dtype
        terms = task, consistency, weighted, diversity
        ctx.mark_non_differentiable(*terms)
        return total, *terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_ND,) = ctx.saved_tensors
        return (gradient_ND * upstream).to(ctx.hidden_dtype), *[None] * 6


def _product_dtype(weight_VD: Tensor) -> torch.dtype:
    """Return the dtype in which the model's own head would multiply here and now."""
    device = weight_VD.device.type
    if torch.is_autocast_enabled(device) and weight_VD.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight_VD.dtype


def _walk(
    hidden_ND: Tensor,
    reference: Tensor | TopLogProbs | None,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    factors: tuple[float, float, float],
    config: BALoRAConfig,
    chunk_bytes: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the terms at each position, [4, N] (task, consistency, a · consistency, diversity; 0 for a term that is
    out), and dL/dH [N, D] for L = Σ factor · term, or None without gradient."""
    num_positions, vocabulary = hidden_ND.shape[0], weight_VD.shape[0]
    precision = torch.promote_types(weight_VD.dtype, torch.float32)
    top = reference if isinstance(reference, TopLogProbs) else None
    sides_ND = [hidden_ND] if reference is top else [hidden_ND, reference]  # whose logits are computed
    sides = len(sides_ND)
    softmaxes = sides + (0 if reference is None or config.temperature == 1 else 2)

    on_cpu = weight_VD.device.type == "cpu"
    narrow = weight_VD.dtype != precision
    row_bytes = precision.itemsize * (sides if on_cpu else sides + softmaxes) + weight_VD.dtype.itemsize * narrow
    chunk = min(max(chunk_bytes // (row_bytes * vocabulary), 1), max(num_positions, 1))
    chunk = math.ceil(num_positions / math.ceil(num_positions / chunk)) if num_positions else 0  # all about equal
    block = min(chunk, max(BLOCK_BYTES // (precision.itemsize * vocabulary), 1)) if on_cpu else chunk

    buffers = [weight_VD.new_empty(chunk, vocabulary, dtype=precision) for _ in range(sides)]
    scratch = [weight_VD.new_empty(block, vocabulary, dtype=precision) for _ in range(softmaxes)]
    product_CV = weight_VD.new_empty(chunk, vocabulary) if narrow else None
    values = torch.zeros(4, num_positions, dtype=precision, device=weight_VD.device)
    gradient_ND = torch.empty(hidden_ND.shape, dtype=precision, device=weight_VD.device) if with_gradient else None
    for start in range(0, num_positions, chunk or 1):
        positions = slice(start, min(start + chunk, num_positions))
        logits = [
            _logits(side_ND[positions], weight_VD, buffer_CV, product_CV)
            for side_ND, buffer_CV in zip(sides_ND, buffers, strict=True)
        ]
        for first in range(0, len(logits[0]), block):
            rows = slice(start + first, min(start + first + block, positions.stop))
            values[:, rows] = _terms_and_gradient(
                *(side_CV[first : first + block] for side_CV in logits),
                top=None if top is None else top[rows],
                targets_B=targets_N[rows],
                scratch=[buffer_BV[: rows.stop - rows.start] for buffer_BV in scratch],
                factors=factors,
                config=config,
                with_gradient=with_gradient,
            )
        if with_gradient:
            dz_CV = logits[0] if product_CV is None else product_CV[: len(logits[0])].copy_(logits[0])
            gradient_ND[positions] = dz_CV @ weight_VD
    return values, gradient_ND


def _logits(hidden_CD: Tensor, weight_VD: Tensor, buffer_CV: Tensor, product_CV: Tensor | None) -> Tensor:
    """Return H Wᵀ [C, V] in the buffer, rounded as the product's dtype rounds it."""
    logits_CV = buffer_CV[: len(hidden_CD)]
    product_CV = logits_CV if product_CV is None else product_CV[: len(hidden_CD)]
    torch.mm(hidden_CD.to(weight_VD.dtype), weight_VD.T, out=product_CV)
    return logits_CV if product_CV is logits_CV else logits_CV.copy_(product_CV)


def _terms_and_gradient(
    z_BV: Tensor,
    reference_BV: Tensor | None = None,
    *,
    top: TopLogProbs | None,
    targets_B: Tensor,
    scratch: list[Tensor],
    factors: tuple[float, float, float],
    config: BALoRAConfig,
    with_gradient: bool,
) -> Tensor:
    """Return the terms at each position, [4, B]; turn the logits z into dL/dz in place; use up the reference's.

    The reference is given by its logits, by what a cache keeps (`top`), or not at all.
    The passes over [B, V] are few and in place: they are what the walk costs besides its products.
    """
    task_factor, consistency_factor, diversity_factor = factors
    temperature, vocabulary = config.temperature, z_BV.shape[1]
    p_BV, *spare = scratch
    peak_B, rest_B = _softmax(z_BV, out=p_BV)
    values = z_BV.new_zeros(4, len(z_BV))
    values[0] = (peak_B - z_BV.gather(1, targets_B[:, None]).squeeze(1)) + rest_B
    p_factor: float | Tensor = task_factor  # dz gathers as p · p_factor + the rest

    has_reference = reference_BV is not None or top is not None
    if has_reference:
        if reference_BV is not None:
            q_BV, *spare = spare
        trust_B = torch.ones_like(peak_B)
        if config.consistency_schedule == "adaptive":
            entropy_B = top.entropy if reference_BV is None else _entropy(reference_BV, scratch=q_BV)
            trust_B = regularizers.position_weights_of_entropy(entropy_B, vocabulary=vocabulary, maximum=1.0)
        consistency_B1 = consistency_factor * temperature * trust_B[:, None]  # the factor of p_T − q_T in dz
        if temperature == 1:
            cooled_BV, p_T_BV, peak_T_B, rest_T_B = z_BV, p_BV, peak_B, rest_B
        else:
            cooled_BV, p_T_BV = torch.div(z_BV, temperature, out=spare[0]), spare[1]
            peak_T_B, rest_T_B = _softmax(cooled_BV, out=p_T_BV)
    if top is not None:
        kept_log_p_BK = (cooled_BV.gather(1, top.tokens) - peak_T_B[:, None]) - rest_T_B[:, None]
    elif has_reference:
        if temperature != 1:
            reference_BV.div_(temperature)
        peak_q_B, rest_q_B = _softmax(reference_BV, out=q_BV)
        # Σ q (log q − log p); the differences are taken first, so that a small divergence is not lost in rounding.
        divergence_B = reference_BV.sub_(cooled_BV).mul_(q_BV).sum(-1)
        divergence_B += (peak_T_B - peak_q_B) + (rest_T_B - rest_q_B)
        if temperature == 1:
            p_factor = p_factor + consistency_B1

    top_k = config.diversity_top_k
    whole = config.lambda_diversity > 0 and (top_k is None or top_k >= vocabulary)
    if whole:
        # Σ p (z − m), m the largest logit; z is p (z − m) from here on. Without − m a large common offset would cancel.
        expected_B = z_BV.sub_(peak_B[:, None]).mul_(p_BV).sum(-1)
        values[3] = expected_B - rest_B
        p_factor = p_factor - diversity_factor * expected_B[:, None]
    elif config.lambda_diversity > 0:
        top_BK, indices_BK = z_BV.topk(top_k, dim=-1)
        log_s_BK = top_BK.log_softmax(-1)
        s_BK = log_s_BK.exp()
        values[3] = (s_BK * log_s_BK).sum(-1)

    if top is not None:
        divergence_B, kept_p_BK, excess_B = _split_at_top(p_T_BV, kept_log_p_BK, top)
        kept_dz_BK = consistency_B1 * (kept_p_BK - top.log_probs.exp())
        if temperature == 1:  # p, too, is 0 at the kept tokens now
            kept_dz_BK += kept_p_BK * p_factor
            p_factor = p_factor + consistency_B1 * excess_B[:, None]
    if has_reference:
        values[1] = divergence_B * temperature**2
        values[2] = values[1] * trust_B

    if not with_gradient:
        return values
    if whole and diversity_factor:
        torch.add(p_BV.mul_(p_factor), z_BV, alpha=diversity_factor, out=z_BV)
    else:
        torch.mul(p_BV, p_factor, out=z_BV)
    if top is not None:
        if temperature != 1:
            z_BV.add_(p_T_BV.mul_(consistency_B1 * excess_B[:, None]))
        z_BV.scatter_add_(1, top.tokens, kept_dz_BK)
    elif has_reference and consistency_factor:
        if temperature != 1:
            z_BV.addcmul_(p_T_BV, consistency_B1)
        z_BV.addcmul_(q_BV, consistency_B1, value=-1)
    if config.lambda_diversity > 0 and not whole:
        z_BV.scatter_add_(1, indices_BK, diversity_factor * s_BK * (log_s_BK - values[3][:, None]))
    z_BV.scatter_add_(1, targets_B[:, None], z_BV.new_full((len(z_BV), 1), -task_factor))
    return values


def _split_at_top(p_BV: Tensor, kept_log_p_BK: Tensor, top: TopLogProbs) -> tuple[Tensor, Tensor, Tensor]:
    """Return KL(q ‖ p) over K + 1 outcomes [B], p at the kept tokens [B, K], and 1 − q_tail / p_tail [B], by which p
    counts in the tail's gradient. p is set to 0 at the kept tokens: its sum is then the tail's mass without the
    cancellation of 1 − Σ p, good down to the smallest float.
    """
    kept_p_BK = p_BV.gather(1, top.tokens)
    divergence_B = (top.log_probs.exp() * (top.log_probs - kept_log_p_BK)).sum(-1)
    p_BV.scatter_(1, top.tokens, 0.0)
    if top.tokens.shape[1] == p_BV.shape[1]:  # no tail
        return divergence_B, kept_p_BK, torch.zeros_like(divergence_B)
    log_p_tail_B = p_BV.sum(-1).clamp_(min=torch.finfo(p_BV.dtype).tiny).log_()
    ratio_B = (top.log_tail - log_p_tail_B).exp()
    divergence_B += top.log_tail.exp() * (top.log_tail - log_p_tail_B)
    return divergence_B, kept_p_BK, 1 - ratio_B


def _entropy(logits_BV: Tensor, *, scratch: Tensor) -> Tensor:
    """Return the entropy of softmax z [B], in nats: log Σ exp (z − m) − Σ p (z − m), m the largest logit."""
    peak_B, rest_B = _softmax(logits_BV, out=scratch)
    return rest_B - scratch.mul_(logits_BV - peak_B[:, None]).sum(-1)


def _softmax(logits_BV: Tensor, *, out: Tensor) -> tuple[Tensor, Tensor]:
    """Write the softmax to `out` and return (m, s) [B], m the largest logit and m + s = log Σ exp z.

    The largest probability is exp(m) / Σ exp z, which gives the sum without another exponential.
    """
    torch.softmax(logits_BV, dim=-1, out=out)
    return logits_BV.amax(-1), -out.amax(-1).log()
