"""Delta-LoRA (Zi et al. 2023, arXiv 2309.02411): from step K on the base moves, too: W += λ s (B₊A₊ − BA) after each.

The sum telescopes: after T steps the base has changed by λ s (B_T A_T − B_K A_K). So nothing is written into it:

    y = W x + s B A x + λ s (BA − B_K A_K) x,   the last term without a gradient for A and B

is the same model at each step. So the base may be quantised, disabling the adapter gives the pre-trained model, and a
plain LoRA of rank 2r is the export: [B, −B_K] [(1 + λ) A; λ A_K]. No official code; λ = 2 and K = 500 are the paper's
as a third party quotes them. With K = 0 and Adam it is LoRA with α (1 + λ): Adam does not see the size of a gradient.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ba_lora.errors import UserError
from ba_lora.methods.base import DEFAULT
from ba_lora.methods.lora import Lora
from ba_lora.methods.pissa import named_adapter_layers
from ba_lora.models.layers import factor_parameters


class DeltaLora(Lora):
    """`weight` is λ; `start` is K, the number of optimizer steps before, fewer than the run has."""

    options = {"weight": (2.0, "[0, 1000000]"), "start": (500, "[0, 1000000000]")}
    has_factors = False
    takes_dora = False
    has_dropout = False  # with it W's change would not be that of BA
    plain_lora = "lora"
    no_deepspeed = "Delta-LoRA reads the factors of a layer between steps, which ZeRO splits: use DDP or one process"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._start: dict[str, tuple[Tensor, Tensor]] = {}  # layer → (A_K, B_K), once step K is reached

    def peft_config(self, num_steps: int, **settings: Any) -> Any:
        if self.option["start"] >= num_steps:
            raise UserError(
                f"adapter.options.start={self.option['start']}: the run has {num_steps} optimizer steps and would be "
                "LoRA; set a smaller adapter.options.start"
            )
        return super().peft_config(num_steps, **settings)

    def prepare(self, model: nn.Module) -> None:
        if getattr(model, "_delta_lora_hooked", False):
            return
        model._delta_lora_hooked = True
        for name, layer in named_adapter_layers(model):
            layer.register_forward_hook(self._hook(name))
            layer.merge = functools.partial(self._merge, layer.merge)

    def _merge(self, merge: Callable[..., None], *arguments: Any, **settings: Any) -> None:
        """PEFT's `merge` of a layer, as long as W has not moved. Raises UserError from step K on."""
        if self._start:
            raise UserError(
                "PEFT's merge would leave out how far Delta-LoRA has moved the base: export_lora writes a plain LoRA, "
                "load that and merge it"
            )
        merge(*arguments, **settings)

    def _hook(self, name: str) -> Any:
        def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if layer.disable_adapters or DEFAULT not in layer.active_adapters or name not in self._start:
                return output
            first, second = (parameter.detach() for parameter in factor_parameters(layer, DEFAULT))
            x = inputs[0].to(first.dtype)
            old_first, old_second = (tensor.to(x.device) for tensor in self._start[name])
            change = F.linear(F.linear(x, first), second) - F.linear(F.linear(x, old_first), old_second)
            return output + (self.option["weight"] * layer.scaling[DEFAULT] * change).to(output.dtype)

        return add

    def begin_step(self, model: nn.Module, step: int) -> None:
        if step >= self.option["start"] and not self._start:
            for name, layer in named_adapter_layers(model):
                first, second = factor_parameters(layer, DEFAULT)
                self._start[name] = (first.detach().clone(), second.detach().clone())

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        return {
            f"{name}.{kind}.weight": factor
            for name, pair in self._start.items()
            for kind, factor in zip(("lora_A", "lora_B"), pair, strict=True)
        }

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """{} is the state of a step before K."""
        device = next(model.parameters()).device
        self._start = state and {
            name: (state[f"{name}.lora_A.weight"].to(device), state[f"{name}.lora_B.weight"].to(device))
            for name, _ in named_adapter_layers(model)
        }

    def to_plain_lora(
        self, weights: dict[str, Tensor], settings: dict[str, Any], state: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Before step K it is the adapter itself."""
        if not state:
            return weights, settings
        weight, converted = self.option["weight"], dict(weights)
        for name in state:
            if ".lora_A." not in name:
                continue
            other = name.replace(".lora_A.", ".lora_B.")
            first, second = weights[name].float(), weights[other].float()
            converted[name] = torch.cat([(1 + weight) * first, weight * state[name].float()])
            converted[other] = torch.cat([second, -state[other].float()], dim=1)
        return converted, settings | {"r": 2 * settings["r"], "lora_alpha": 2 * settings["lora_alpha"]}


TUNER = DeltaLora
