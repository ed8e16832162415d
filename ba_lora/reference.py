"""The frozen pre-trained model ("reference"), which the consistency term compares with, without a second model.

The reference is the tuned model as it was at step 0, so the consistency term is exactly 0 there in any dtype:

    PiSSA, CorDA   the base holds the residual W − B₀A₀; a frozen copy of (A₀, B₀) on the same base gives W again.
                   (Disabling the adapter would give the residual alone: not the pre-trained model.)
    LoRA and kin   B = 0 at the start: disabling the adapter gives W.
    full           a frozen copy of all weights.

The switch sets one attribute on each adapter layer. It must be left before `backward`, so that gradient checkpointing
recomputes with the trained adapter; `Reference.use` is a context manager around the no-grad pass alone.
"""

import contextlib
import copy
import functools
from collections.abc import Iterator

import torch
from torch import nn

ADAPTER_NAME = "reference"


class Reference:
    """Runs the model as it was before training. Build it with `build_reference`, before the first step."""

    def __init__(self, layers: list[nn.Module], *, frozen_factors: bool, frozen_model: nn.Module | None = None) -> None:
        self._layers = layers
        self._frozen_factors = frozen_factors
        self.frozen_model = frozen_model

    @contextlib.contextmanager
    def use(self, model: nn.Module) -> Iterator[nn.Module]:
        """Yield the module to call for a reference pass: `model` (possibly wrapped), switched, or the frozen copy."""
        if self.frozen_model is not None:
            yield self.frozen_model
            return
        attribute, value = ("_active_adapter", [ADAPTER_NAME]) if self._frozen_factors else ("_disable_adapters", True)
        before = [getattr(layer, attribute) for layer in self._layers]
        try:
            for layer in self._layers:
                vars(layer)[attribute] = value  # a plain attribute: nn.Module's own setattr costs ten times as much
            yield model
        finally:
            for layer, old in zip(self._layers, before, strict=True):
                vars(layer)[attribute] = old


def build_reference(model: nn.Module) -> Reference:
    """Return the reference of `model`, a PEFT model or a plain one, in its present (untrained) state.

    For PiSSA and CorDA a frozen second adapter is added to the layers, which `model.save_pretrained` leaves out.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        frozen = copy.deepcopy(model).eval().requires_grad_(False)
        return Reference([], frozen_factors=False, frozen_model=frozen)
    layers = adapter_layers(model)
    config = model.peft_config["default"]
    if not str(getattr(config, "init_lora_weights", "")).startswith(("pissa", "corda")):
        return Reference(layers, frozen_factors=False)
    frozen_config = copy.deepcopy(config)
    frozen_config.init_lora_weights = True  # "pissa" would run again, on the residual
    frozen_config.inference_mode = True
    frozen_config.lora_dropout = 0.0
    keeps_dtype = all(p.dtype == torch.float32 for p in factor_parameters(layers[0], "default"))
    with torch.random.fork_rng():
        model.add_adapter(ADAPTER_NAME, frozen_config, autocast_adapter_dtype=keeps_dtype)
    # A checkpoint that also held this adapter would be loaded wrongly: Trainer would skip the trained one silently.
    model.save_pretrained = functools.partial(model.save_pretrained, selected_adapters=["default"])
    for layer in layers:
        trained, frozen = factor_parameters(layer, "default"), factor_parameters(layer, ADAPTER_NAME)
        with gathered([*trained, *frozen]), torch.no_grad():
            for source, target in zip(trained, frozen, strict=True):
                target.data = target.data.to(source.dtype)
                target.copy_(source)
                target.requires_grad_(False)
    return Reference(layers, frozen_factors=True)


def adapter_layers(model: nn.Module) -> list[nn.Module]:
    """Return the model's PEFT layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def factor_parameters(layer: nn.Module, adapter: str) -> list[nn.Parameter]:
    """Return [A, B] of a LoRA layer's adapter: A is [rank, in], B is [out, rank]."""
    return [layer.lora_A[adapter].weight, layer.lora_B[adapter].weight]


@contextlib.contextmanager
def gathered(parameters: list[nn.Parameter], *, modify: bool = True) -> Iterator[None]:
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
