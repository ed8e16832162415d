"""SSF (Lian et al. 2022, arXiv 2210.08823): each layer's output is scaled and shifted, y = γ ⊙ (W x + b) + β.

γ = 1 and β = 0 at the start; the authors' code draws both around these values, so that its step 0 is not the
pre-trained model. They act after norms, too; here on linear layers only. Merged: γ W and γ b + β, which needs a bias: a
Llama without any is written with `attention_bias` and `mlp_bias`; other architectures without a place for it need
`shift: false`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ba_lora.errors import UserError
from ba_lora.methods.base import Tuner, peft_settings
from ba_lora.methods.own_layers import OwnConfig, OwnLayer, register_own

BIAS_KEYS = ("attention_bias", "mlp_bias")  # of a Llama's configuration


@dataclass
class SsfConfig(OwnConfig):
    """shift: β is trained beside γ."""

    shift: bool = True


class SsfLayer(OwnLayer):
    """γ and β [out]."""

    adapter_layer_names = ("ssf_scale", "ssf_shift")
    tensor_names = adapter_layer_names

    def allocate(self, adapter: str, config: SsfConfig) -> None:
        device = self.base_layer.weight.device
        self.ssf_scale[adapter] = nn.Parameter(torch.ones(self.out_features, device=device))
        if config.shift:
            self.ssf_shift[adapter] = nn.Parameter(torch.zeros(self.out_features, device=device))

    def adapted(self, adapter: str, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        scaled = self.ssf_scale[adapter] * result
        if adapter in self.ssf_shift:
            scaled = scaled + self.ssf_shift[adapter]
        return scaled.to(result.dtype)

    def merged_weights(self, adapter: str) -> tuple[Tensor, Tensor | None]:
        scale, base = self.ssf_scale[adapter], self.base_layer
        bias = None if base.bias is None else scale * base.bias
        if adapter in self.ssf_shift:
            bias = self.ssf_shift[adapter] if bias is None else bias + self.ssf_shift[adapter]
        return scale[:, None] * base.weight, bias


register_own("ssf", SsfConfig, SsfLayer)


class Ssf(Tuner):
    """2 out parameters a layer, out without the shift."""

    ignores = ("rank", "alpha")
    options = {"shift": (True, (True, False))}
    layer_options = ()
    layer_types = ("Linear",)
    has_dropout = False
    draws = None
    own_layers = True
    names_layers = True

    def peft_config(self, num_steps: int) -> Any:
        return peft_settings(SsfConfig, self, **self.option)

    def prepare(self, model: nn.Module) -> None:
        """Raises UserError where a shift could not be merged."""
        without = [layer for layer in model.modules() if isinstance(layer, SsfLayer) and layer.base_layer.bias is None]
        if without and self.option.get("shift") and not all(hasattr(model.config, name) for name in BIAS_KEYS):
            raise UserError(
                f"adapter.options.shift=true needs layers with a bias, and {len(without)} of this "
                f"{model.config.model_type} model have none: a merged model could not hold the shift; use shift=false"
            )

    def finish_merge(self, model: nn.Module) -> None:
        """Give a Llama that had no biases the others that its configuration then asks for, all 0."""
        if not self.option["shift"] or not all(hasattr(model.config, name) for name in BIAS_KEYS):
            return
        for module in model.modules():
            if isinstance(module, nn.Linear) and module is not model.get_output_embeddings() and module.bias is None:
                module.bias = nn.Parameter(torch.zeros(module.out_features, dtype=module.weight.dtype))
        for name in BIAS_KEYS:
            setattr(model.config, name, True)


TUNER = Ssf
