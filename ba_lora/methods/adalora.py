"""What AdaLoRA needs from a training loop (arXiv 2303.10512): pruning after each step, its orthogonality term, and the
ranks of what is saved.

PEFT has the layers and the allocation; it leaves the calls to the loop.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback


class AdaLoraCallback(TrainerCallback):
    """AdaLoRA's pruning after each optimizer step, while the gradients that rank the directions are still there."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        getattr(model, "module", model).base_model.update_and_allocate(state.global_step)


def is_adalora(model: nn.Module) -> bool:
    """Return whether it is a PEFT model with an AdaLoRA adapter."""
    config = getattr(model, "peft_config", {}).get("default")
    return getattr(config, "peft_type", None) == "ADALORA"


def freeze_rank_counts(model: nn.Module) -> None:
    """Keep the optimizer from training AdaLoRA's `ranknum`, a divisor in the forward pass; nothing for other models.

    PEFT freezes it, then casts it to a half-precision base's dtype, which makes a new, trainable parameter, and leaves
    it out of what it saves.
    """
    for name, parameter in model.named_parameters() if is_adalora(model) else ():
        if ".ranknum." in name:
            parameter.requires_grad_(False)


def set_saved_ranks(model: nn.Module) -> None:
    """Let PEFT cut an AdaLoRA adapter that it saves by the weights it has now; nothing for any other model.

    PEFT drops what the last allocation pruned. That is another model where the weights are those of an earlier epoch,
    and between two allocations, when pruned directions move again. A direction whose singular value is 0 adds nothing:
    to drop these only, all of them, leaves the model as it is.
    """
    if not is_adalora(model):
        return
    model.peft_config["default"].rank_pattern = {
        name: (values != 0).flatten().tolist()
        for name, values in model.base_model.model.named_parameters()
        if "lora_E.default" in name
    }


def adalora_orthogonality_weight(model: nn.Module) -> float | None:
    """Return the weight of AdaLoRA's orthogonality term, or None for any other model."""
    return model.peft_config["default"].orth_reg_weight if is_adalora(model) else None


def adalora_orthogonality(model: nn.Module) -> Tensor:
    """Return the mean over all factors of ‖Pᵀ P − I‖_F and ‖Q Qᵀ − I‖_F, a scalar; P [out, r], Q [r, in].

    As PEFT has it: arXiv 2303.10512, eq. 4, takes the sum of the squared norms. PEFT adds the term only to a loss that
    the model computes itself, and once per micro-batch unscaled; so the training loop calls this.
    """
    norms = []
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
            norms.append(torch.linalg.norm(gram - torch.eye(gram.shape[0], device=gram.device, dtype=gram.dtype)))
    return torch.stack(norms).mean()
