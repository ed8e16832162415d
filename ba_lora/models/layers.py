"""The adapter layers that PEFT puts into a model, their parameters, and parameters that DeepSpeed ZeRO-3 has split."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ba_lora.config.registries import residual_inits

if TYPE_CHECKING:
    from torch import nn

REFERENCE_ADAPTER = "reference"  # the frozen adapter beside the trained one (objective/reference.py)


def is_residual_init(init: object) -> bool:
    """Whether an adapter with this `init_lora_weights` stands on W − s B₀A₀."""
    return str(init).lower().split("_niter_")[0] in residual_inits()


def has_residual_base(config: object) -> bool:
    """Return whether the adapter's first product was taken from the base when it was made."""
    return is_residual_init(getattr(config, "init_lora_weights", None))


def adapter_layers(model: "nn.Module") -> "list[nn.Module]":
    """Return the model's PEFT layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def adapter_parameters(layer: "nn.Module", adapter: str, *, beside: str | None = None) -> "list[nn.Parameter]":
    """Return all parameters of one adapter in a PEFT layer: factors (an embedding's too), DoRA's magnitude, …

    beside: only those of which another adapter has its own, too.
    """
    found = []
    for name in dict.fromkeys(layer.adapter_layer_names):  # PEFT lists DoRA's magnitude twice
        entries = getattr(layer, name, {})
        if adapter in entries and (beside or adapter) in entries:
            entry = entries[adapter]
            found += list(entry.parameters()) if hasattr(entry, "parameters") else [entry]
    return found


def factor_parameters(layer: "nn.Module", adapter: str) -> "list[nn.Parameter]":
    """Return [A, B] of a LoRA layer's adapter: A is [rank, in], B is [out, rank]."""
    return [layer.lora_A[adapter].weight, layer.lora_B[adapter].weight]


@contextlib.contextmanager
def gathered(parameters: "list[nn.Parameter]", *, modify: bool = True) -> Iterator[None]:
    """Give the whole tensors of parameters that DeepSpeed ZeRO-3 has split; else do nothing.

    With `modify` what rank 0 writes into them is kept, on every rank; without, they are only read, which is cheaper.
    """
    split = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split, modifier_rank=0 if modify else None):
        yield
