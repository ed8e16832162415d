"""BA-LoRA's NLG regularizers in plain PyTorch: the definition that every faster path is proved against.

Two published versions share these formulas and differ in their settings (configs/methods):

    term          paper2024                        iclr2026
    consistency   temperature 1                    temperature 2
    diversity     entropy over the vocabulary      entropy over the top 20 logits
    svd           Σ_{i≤3} σ_i / Σ_j σ_j            Σ_{i≤10} σ_i / ‖Z‖_F

Shapes: `logits` is [..., V], `mask` is [...] and True at the positions M that predict a response token: the shifted
mask of the task loss (`response_mask`), never prompt or padding. All reductions are done in float32 (float64 inputs
stay float64). `reduction` is "mean" over M, "sum" for callers that divide by the count of a larger batch, or "none" for
the value at each position of M. An empty M gives 0 with a zero gradient.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def response_mask(labels_BT: Tensor) -> Tensor:
    """Return the mask M, bool [B, T]: position t is in M if the NEXT token t + 1 is a labelled response token.

    The last position of a row predicts nothing and is never in M.
    """
    mask_BT = torch.zeros_like(labels_BT, dtype=torch.bool)
    mask_BT[:, :-1] = labels_BT[:, 1:] != IGNORE_INDEX
    return mask_BT


def response_targets(labels_BT: Tensor) -> Tensor:
    """Return the tokens that the positions of M predict, int64 [|M|], in the order of `tensor[mask]`."""
    return labels_BT[:, 1:][labels_BT[:, 1:] != IGNORE_INDEX]


def consistency(
    logits: Tensor,
    reference_logits: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    position_weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """T² KL(softmax(Z_P / T) ‖ softmax(Z_F / T)) over M: stay near the pre-trained model.

    `reference_logits` [..., V] are Z_P and receive no gradient. `position_weights` [|M|] (the adaptive λ1) weigh the
    positions inside the mean. At T = 1 this is paper2024's KL(P_P ‖ P_F).
    """
    selected, reference = _select(logits, mask), _select(reference_logits.detach(), mask)
    log_p_tuned = F.log_softmax(selected / temperature, dim=-1)
    log_p_reference = F.log_softmax(reference / temperature, dim=-1)
    divergence_M = (log_p_reference.exp() * (log_p_reference - log_p_tuned)).sum(-1) * temperature**2
    if position_weights is not None:
        divergence_M = divergence_M * position_weights
    return _reduce(divergence_M, reduction)


@dataclass(frozen=True)
class TopLogProbs:
    """What is kept of the reference's distribution r = softmax(Z_P / T) at N positions, without the rest of V.

    tokens: int64 [N, K], its K likeliest tokens, likeliest first; log_probs: [N, K], log r of each;
    log_tail: [N], log of the mass of all other tokens (−∞ where K = V: there are none);
    entropy: [N], H(softmax Z_P) in nats, over all of V and at T = 1, for the adaptive λ1.
    """

    tokens: Tensor
    log_probs: Tensor
    log_tail: Tensor
    entropy: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, positions: slice) -> "TopLogProbs":
        """Return some of the positions."""
        return TopLogProbs(
            self.tokens[positions], self.log_probs[positions], self.log_tail[positions], self.entropy[positions]
        )


def top_log_probs(logits_NV: Tensor, *, top_k: int, temperature: float = 1.0) -> TopLogProbs:
    """Return the `top_k` likeliest tokens of softmax(logits / T), the tail's mass and the entropy."""
    logits_NV = at_least_float32(logits_NV)
    log_r_NV = F.log_softmax(logits_NV / temperature, dim=-1)
    log_probs_NK, tokens_NK = log_r_NV.topk(top_k, dim=-1)
    return TopLogProbs(tokens_NK, log_probs_NK, _log_tail(log_r_NV, tokens_NK), entropy(logits_NV))


def cached_consistency(
    logits: Tensor,
    reference: TopLogProbs,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    position_weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """T² KL over K + 1 outcomes, the reference's K likeliest tokens and one for all others, over M:

        T² [ Σ_{k∈K} r_k log(r_k / p_k) + r_tail log(r_tail / p_tail) ],   r = softmax(Z_P / T), p = softmax(Z_F / T),

    with r_tail and p_tail the masses that r and p give to the tokens outside K. Merging outcomes can only lower a KL
    (the data-processing inequality), so this is a lower bound of `consistency`; what is missing is exactly
    T² r_tail KL(r ‖ p, both within the tail). With K = V nothing is. Its gradient with respect to Z_F is

        T (p_v − r_v) for v in K,   T (p_v − r_tail p_v / p_tail) elsewhere.

    `reference`, at the same temperature, is in the order of `logits[mask]`. Arguments else as in `consistency`.
    """
    log_p_MV = F.log_softmax(_select(logits, mask) / temperature, dim=-1)
    log_r_MK, log_p_MK = reference.log_probs, log_p_MV.gather(-1, reference.tokens)
    divergence_M = (log_r_MK.exp() * (log_r_MK - log_p_MK)).sum(-1)
    if log_r_MK.shape[-1] < log_p_MV.shape[-1]:
        log_p_tail_M = _log_tail(log_p_MV, reference.tokens)
        divergence_M = divergence_M + reference.log_tail.exp() * (reference.log_tail - log_p_tail_M)
    divergence_M = divergence_M * temperature**2
    if position_weights is not None:
        divergence_M = divergence_M * position_weights
    return _reduce(divergence_M, reduction)


def _log_tail(log_p_NV: Tensor, tokens_NK: Tensor) -> Tensor:
    """Return the log of the mass outside `tokens`, [N]: a sum of what is there, since 1 − Σ_K p would cancel."""
    return log_p_NV.scatter(-1, tokens_NK, -math.inf).logsumexp(-1)


def diversity(logits: Tensor, mask: Tensor, *, top_k: int | None = None, reduction: str = "mean") -> Tensor:
    """−H(softmax(Z_F)) over M, the negative entropy: minimising it spreads the next-token distribution.

    `top_k` keeps the k largest logits and renormalises (iclr2026); None, or k ≥ V, takes the whole vocabulary.
    """
    return -_reduce(entropy(_select(logits, mask), top_k=top_k), reduction)


def svd(logits: Tensor, mask: Tensor, *, top_k: int, norm: str = "nuclear") -> Tensor:
    """−(Σ_{i≤k} σ_i) / N(Z), with σ the singular values of Z = Z_F[M], one matrix [|M|, V] of the whole micro-batch.

    `norm` N: "nuclear", Σ_j σ_j (paper2024), or "frobenius", ‖Z‖_F (iclr2026). As published, the Frobenius form is
    largest for k EQUAL singular values, and neither form ignores a shift of a row's logits.

    With the nuclear norm the ratio is −1 with a zero gradient while |M| ≤ k. Singular values at rounding level, below
    √(|M| + V) ε σ₁, carry arbitrary directions and are left out of the sum, so that the gradient of the norm is U₊ V₊ᵀ.
    """
    matrix_MV = _select(logits, mask)
    if matrix_MV.shape[0] == 0:
        return matrix_MV.sum()
    if not bool(matrix_MV.isfinite().all()):  # of a diverged model: LAPACK would raise an error of its own
        return matrix_MV.sum() * math.nan
    sigma = torch.linalg.svdvals(matrix_MV)  # descending; its backward is stable for repeated values
    # Rounding grows with the root of the sides. The longer side itself, as in numpy's matrix_rank, would be 1.5 % of σ₁
    # at V = 128,000 in float32, and a common offset of the logits leaves real singular values below that.
    smallest = sigma[0].detach() * sum(matrix_MV.shape) ** 0.5 * torch.finfo(sigma.dtype).eps
    sigma = sigma[sigma > smallest]
    if sigma.numel() == 0:  # all logits 0: no direction to favour
        return matrix_MV.sum() * 0
    total = sigma.sum() if norm == "nuclear" else sigma.square().sum().sqrt()
    return -sigma[:top_k].sum() / total


def entropy(logits_NV: Tensor, *, top_k: int | None = None) -> Tensor:
    """Return the entropy in nats of softmax over the last axis, [N]; over the `top_k` largest logits where given."""
    if top_k is not None and top_k < logits_NV.shape[-1]:
        logits_NV = logits_NV.topk(top_k, dim=-1).values
    log_p = F.log_softmax(at_least_float32(logits_NV), dim=-1)
    return -(log_p.exp() * log_p).sum(-1)


def adaptive_position_weights(reference_logits: Tensor, mask: Tensor, *, maximum: float) -> Tensor:
    """Return the adaptive λ1 at each position of M, [|M|]: λmin + (λmax − λmin)(1 − H(P_P) / ln V), λmin = 0.1 λmax.

    Where the pre-trained model is sure of the next token it is trusted most. The paper gives the formula; that it acts
    per position, inside the mean and at T = 1, is our choice.
    """
    reference = _select(reference_logits.detach(), mask)
    return position_weights_of_entropy(entropy(reference), vocabulary=reference.shape[-1], maximum=maximum)


def position_weights_of_entropy(entropy_M: Tensor, *, vocabulary: int, maximum: float) -> Tensor:
    """Return the adaptive λ1 [|M|] of positions whose H(P_P), in nats, is known already."""
    return maximum * (0.1 + 0.9 * (1 - entropy_M / math.log(vocabulary)))


def _select(logits: Tensor, mask: Tensor) -> Tensor:
    return at_least_float32(logits[mask])


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or as it is in float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _reduce(values_M: Tensor, reduction: str) -> Tensor:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}: choose mean, sum or none")
    if reduction == "none":
        return values_M
    return values_M.sum() / max(values_M.numel(), 1) if reduction == "mean" else values_M.sum()


def every_row(logits_NV: Tensor) -> Tensor:
    """Return the mask of all N rows."""
    return torch.ones(len(logits_NV), dtype=torch.bool, device=logits_NV.device)
