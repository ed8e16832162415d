"""LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns with `lr_ratio` times the learning rate of A.

All else, a classifier's head too, has A's. (peft.optimizers gives a head's bias, but not its weight, the rate of B.)
"""

from typing import Any

import torch
from torch import nn

from ba_lora.errors import UserError
from ba_lora.methods.base import AdapterOptimizer


class LoraPlus(AdapterOptimizer):
    """Any optimizer of trainer.optim with two learning rates."""

    options = {"lr_ratio": (16.0, "[1, 1000000]")}
    replaces_adamw = False

    def make(self, model: nn.Module, args: Any, decayed: set[str], default: tuple[type, dict]) -> torch.optim.Optimizer:
        """Raises UserError for an optimizer that groups the parameters itself."""
        optimizer_class, settings = default
        if settings.keys() & {"params", "model", "optimizer_dict"}:
            raise UserError(f"adapter.optimizer=lora_plus cannot group the parameters of trainer.optim={args.optim}")
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                rate = settings["lr"] * (self.option["lr_ratio"] if ".lora_B." in name else 1)
                decay = args.weight_decay if name in decayed else 0.0
                groups.setdefault((rate, decay), []).append(parameter)
        return optimizer_class(
            [{"params": found, "lr": rate, "weight_decay": decay} for (rate, decay), found in groups.items()],
            **settings,
        )


OPTIMIZER = LoraPlus
