"""BA-LoRA's NLU regularizers in plain PyTorch, on the outputs of a classifier.

    term          paper2024                               iclr2026
    consistency   mean of (ẑ_F − ẑ_P)², rows of length 1   T² KL(softmax(Z_P / T) ‖ softmax(Z_F / T))
    diversity     (1 / D) Σ_{i≠j} C_ij²                    the same
    svd           −(Σ_{i≤k} σ_i) / (Σ_j σ_j), k = 5        the same

Shapes: logits are [N, D], N rows of the micro-batch; diversity and svd also take pooled features [N, hidden]. All
reductions are done in float32 (float64 inputs stay float64). The KL, the svd term and the entropy form of the diversity
are `regularizers.consistency`, `svd` and `diversity`, with every row in their mask.
"""

from torch import Tensor

from ba_lora.objective import regularizers

SHORTEST_ROW = 1e-6  # a row of logits below this norm has no direction


def normalized_mse(logits_ND: Tensor, reference_logits_ND: Tensor) -> Tensor:
    """Return of each row the mean over its columns of (ẑ_F − ẑ_P)², rows divided by their L2 norms, [N]: `paper2024`'s
    consistency.

    The reference receives no gradient, nor does a tuned row of length 0 (under a head that starts at zero): it has no
    direction, and what F.normalize does there is a gradient of 1e11.
    """
    tuned = _directions(regularizers.at_least_float32(logits_ND))
    reference = _directions(regularizers.at_least_float32(reference_logits_ND.detach()))
    return (tuned - reference).square().mean(-1)


def _directions(rows_ND: Tensor) -> Tensor:
    """Return each row divided by its L2 norm, or 0 for a row that is too short."""
    length_N1 = rows_ND.norm(dim=-1, keepdim=True)
    is_short_N1 = length_N1 < SHORTEST_ROW
    return (rows_ND / length_N1.masked_fill(is_short_N1, 1.0)).masked_fill(is_short_N1, 0.0)


def covariance(features_ND: Tensor) -> Tensor:
    """(1 / D) Σ_{i≠j} C_ij², C = Z_cᵀ Z_c / (N − 1), Z_c the features minus their column means: decorrelation.

    Raises ValueError for fewer than two rows, which have no covariance.
    """
    if len(features_ND) < 2:
        raise ValueError(f"a covariance needs at least 2 rows, found {len(features_ND)}")
    features_ND = regularizers.at_least_float32(features_ND)
    centred_ND = features_ND - features_ND.mean(0)
    covariance_DD = centred_ND.T @ centred_ND / (len(features_ND) - 1)
    return (covariance_DD.square().sum() - covariance_DD.diagonal().square().sum()) / features_ND.shape[1]


def constant_terms(
    num_logits: int, *, features: str, hidden_size: int, micro_batch: int, svd_top_k: int, svd_norm: str
) -> dict[str, str]:
    """Return the terms that are constant whatever the model does, with the reason: they have no gradient.

    One logit (regression): normalised rows are ±1, softmax over one logit is 1, one feature has no off-diagonal. The
    svd ratio is 1 under the nuclear norm as soon as there are at most k singular values, min(N, D) ≤ k; under the
    Frobenius norm, where Σσ / ‖σ‖ lies between 1 and √min(N, D), only if there is but one.
    """
    width = num_logits if features == "logits" else hidden_size
    constant = {}
    if num_logits == 1:
        constant["consistency"] = "one logit has no direction and no distribution"
    if width == 1:
        constant["diversity"] = "one logit has no off-diagonal covariance"
    what = f"{'logits' if features == 'logits' else 'pooled features'} of shape [{micro_batch}, {width}]"
    if min(width, micro_batch) == 1:
        constant["svd"] = f"{what} have one singular value: the ratio is 1"
    elif svd_norm == "nuclear" and min(width, micro_batch) <= svd_top_k:
        number = min(width, micro_batch)
        constant["svd"] = f"{what} have {number} singular values, and svd_top_k={svd_top_k} takes all: the ratio is 1"
    return constant
