"""Bottleneck adapters: a small network behind a sub-layer, h + U f(D h), D [r, width] random, U = 0 at the start.

Houlsby et al. 2019 (arXiv 1902.00751) put one behind the attention's output and one behind the MLP's in each layer,
Pfeiffer et al. 2020 (arXiv 2005.00247) the latter only. As in Houlsby's paper it acts on the sub-layer's projection
before the skip connection; a dropout that an encoder has there comes after it. Layer norms stay frozen (Houlsby trains
them). `adapters`, the library of both papers' successors, wants another transformers. No merging: it is no linear
layer.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ba_lora.errors import UserError
from ba_lora.methods.base import Tuner, peft_settings
from ba_lora.methods.own_layers import OwnConfig, OwnLayer, register_own

# The ends of the paths of the projections that leave a sub-layer, in the architectures of configs/.
ATTENTION = ("self_attn.o_proj", "attention.output.dense", "attn.c_proj", "SelfAttention.o")
MLP = ("mlp.down_proj", "output.dense", "mlp.c_proj", "DenseReluDense.wo")


@dataclass
class BottleneckConfig(OwnConfig):
    """r: the width inside; activation: f."""

    r: int = 64
    activation: str = "relu"


class BottleneckLayer(OwnLayer):
    """D [r, width] and U [width, r] with biases, width the layer's output."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    merges = False

    def allocate(self, adapter: str, config: BottleneckConfig) -> None:
        device = self.base_layer.weight.device
        down = nn.Linear(self.out_features, config.r, device=device)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(down.bias)
        up = nn.Linear(config.r, self.out_features, device=device)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self.bottleneck_down[adapter], self.bottleneck_up[adapter] = down, up
        self.activation = getattr(F, config.activation)

    def adapted(self, adapter: str, x: Tensor) -> Tensor:
        hidden = self.base_layer(x)
        down, up = self.bottleneck_down[adapter], self.bottleneck_up[adapter]
        return hidden + up(self.activation(down(hidden.to(down.weight.dtype)))).to(hidden.dtype)


register_own("bottleneck", BottleneckConfig, BottleneckLayer)


class Bottleneck(Tuner):
    """2 r width + r + width parameters a place."""

    options = {"places": ("both", ("both", "mlp")), "activation": ("relu", ("relu", "gelu", "silu"))}
    layer_options = ()
    ignores = ("alpha", "target_modules")
    bounds_rank = False
    names_layers = True
    has_dropout = False
    own_layers = True
    merges = False

    def chosen_layers(self, model: nn.Module, linear: dict[str, tuple[int, int]]) -> list[str]:
        """Raises UserError for an architecture whose sub-layers are not known."""
        attention = [path for path in linear if path.endswith(ATTENTION)]
        mlp = [path for path in linear if path.endswith(MLP) and path not in attention]
        if not attention or not mlp:
            raise UserError(
                f"adapter.tuner=bottleneck does not know the sub-layers of this {model.config.model_type} model: "
                "choose another method"
            )
        return mlp if self.option["places"] == "mlp" else [*attention, *mlp]

    def peft_config(self, num_steps: int) -> Any:
        return peft_settings(BottleneckConfig, self, r=self.adapter.rank, activation=self.option["activation"])


TUNER = Bottleneck
