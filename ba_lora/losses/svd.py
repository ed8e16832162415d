"""The svd term without the vocabulary: exact, and cheaper by the factor V / D.

With the head W = Q R (Q orthonormal, [V, D]; R [D, D]), the logits are Z = H Wᵀ = (H Rᵀ) Qᵀ, and Qᵀ changes no singular
value: Z [N, V] and X = H Rᵀ [N, D] have the same ones. R is computed once, for a head that is frozen and linear.
"""

import torch
from torch import Tensor, nn


def head_factor(head: object) -> Tensor | None:
    """Return R [D, D] of the head's weight in float32, or None where X would not have the logits' singular values.

    None for a head with bias, with trainable weights, split by ZeRO-3, or that is no linear layer.
    """
    if not isinstance(head, nn.Linear) or head.bias is not None or hasattr(head.weight, "ds_id"):
        return None
    if head.weight.requires_grad or not head.weight.is_floating_point():
        return None
    return torch.linalg.qr(head.weight.detach().float(), mode="r").R


def same_singular_values(hidden_ND: Tensor, head_factor_DD: Tensor) -> Tensor:
    """Return X = H Rᵀ [N, D] in float32, which has the singular values of the logits H Wᵀ."""
    with torch.autocast(hidden_ND.device.type, enabled=False):  # which would round the product to bf16
        return hidden_ND.float() @ head_factor_DD.T
