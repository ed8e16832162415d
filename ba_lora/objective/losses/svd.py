"""The svd term without the vocabulary: exact, and cheaper by the factor V / D.

With the head W = Q R (Q orthonormal, [V, D]; R [D, D]), the logits are Z = H Wᵀ = (H Rᵀ) Qᵀ, and Qᵀ changes no singular
value: Z [N, V] and X = H Rᵀ [N, D] have the same ones. R is computed once, for a head that is frozen and linear.
"""

import torch
from torch import Tensor, nn

from ba_lora.objective.regularizers import at_least_float32


def why_not_frozen_linear(head: object) -> str | None:
    """Return what keeps logits = H Wᵀ with a constant W from holding for this head, or None where it holds."""
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return f"the head is no plain linear layer ({type(head).__name__})"
    if head.bias is not None:
        return "the head has a bias"
    if head.weight.requires_grad:
        return "the head is trained"
    if not head.weight.is_floating_point():
        return "the head is quantised"
    return None


def head_factor(head: object) -> Tensor | None:
    """Return R [D, D] of the head's weight, at least float32; None where X would not have the logits' singular values.

    Under ZeRO-3 call it while the head's weight is gathered.
    """
    if why_not_frozen_linear(head) is not None:
        return None
    return torch.linalg.qr(at_least_float32(head.weight.detach()), mode="r").R


def same_singular_values(hidden_ND: Tensor, head_factor_DD: Tensor) -> Tensor:
    """Return X = H Rᵀ [N, D], at least float32, which has the singular values of the logits H Wᵀ."""
    with torch.autocast(hidden_ND.device.type, enabled=False):  # which would round the product to bf16
        return at_least_float32(hidden_ND) @ head_factor_DD.T
