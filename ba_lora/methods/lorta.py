"""LoRTA (Hounie et al. 2024, arXiv 2410.04060): one low-rank tensor over layers, heads and matrices.

With A [d, r], B [r, d/H], c_l [L, r], c_h [H, r], c_m [4, r], of which all layers share A and B, block h of the change
of matrix m (q, k, v, o) in layer l is

    ΔW(l, m)_h = s A diag(c_l ⊙ c_h ⊙ c_m) B,   s = α / r,   B = 0 at the start

The blocks stand side by side: heads are on the columns, the inputs, of q, k, v and o alike, as in the authors' code
(ihounie/lorta; the natural reading of the paper would have them on the outputs of q, k, v). So each layer's change is a
plain LoRA of rank r, with lora_B = A and lora_A = [diag(·) B]_h: that is the export. q, k, v and o must be of one size
d (no grouped keys and values). Each layer holds the shared tensors: they are one, in memory and to the optimizer.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ba_lora.errors import UserError
from ba_lora.methods.base import DEFAULT, Tuner, peft_settings, whole_alpha
from ba_lora.methods.own_layers import OwnConfig, OwnLayer, register_own

# The ends of the paths of q, k, v and o, in the architectures of configs/.
MATRICES = (
    ("self_attn.q_proj", "self.query", "self.query_proj", "SelfAttention.q"),
    ("self_attn.k_proj", "self.key", "self.key_proj", "SelfAttention.k"),
    ("self_attn.v_proj", "self.value", "self.value_proj", "SelfAttention.v"),
    ("self_attn.o_proj", "attention.output.dense", "SelfAttention.o"),
)
SHARED = ("lorta_a", "lorta_b", "lorta_layer", "lorta_head", "lorta_matrix")


@dataclass
class LortaConfig(OwnConfig):
    """heads: H; places: layer's path → [l, m]; num_layers: L."""

    r: int = 8
    alpha: float = 8
    heads: int = 1
    num_layers: int = 1
    places: Any = None


class LortaLayer(OwnLayer):
    """One (l, m) of the tensor."""

    adapter_layer_names = SHARED
    tensor_names = SHARED

    def allocate(self, adapter: str, config: LortaConfig) -> None:
        device, (r, d) = self.base_layer.weight.device, (config.r, self.in_features)
        shapes = [(d, r), (r, d // config.heads), (config.num_layers, r), (config.heads, r), (len(MATRICES), r)]
        for name, shape in zip(SHARED, shapes, strict=True):
            tensor = torch.zeros(shape, device=device)
            if name != "lorta_b":
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
            getattr(self, name)[adapter] = nn.Parameter(tensor)
        self.place, self.scaling = config.places[self.path], config.alpha / r

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        return lora_factors([getattr(self, name)[adapter] for name in SHARED], self.place)

    def adapted(self, adapter: str, x: Tensor) -> Tensor:
        first, second = self.factors(adapter)
        result = self.base_layer(x)
        return result + (self.scaling * F.linear(F.linear(x.to(first.dtype), first), second)).to(result.dtype)

    def merged_weights(self, adapter: str) -> tuple[Tensor, Tensor | None]:
        first, second = self.factors(adapter)
        return self.base_layer.weight + self.scaling * second @ first, None


def lora_factors(shared: list[Tensor], place: list[int]) -> tuple[Tensor, Tensor]:
    """Return (lora_A [r, d], lora_B [d, r]) of the LoRA that (l, m) of the tensor is, without s. shared: as SHARED."""
    a, b, c_layer, c_head, c_matrix = shared
    number, matrix = place
    weights_HR = c_layer[number] * c_head * c_matrix[matrix]
    return (weights_HR[:, :, None] * b).transpose(0, 1).flatten(1), a


register_own("lorta", LortaConfig, LortaLayer)


class Lorta(Tuner):
    """r (d + d/H + H + L + 4) parameters in all."""

    ignores = ("target_modules",)
    layer_options = ()
    own_layers = True
    names_layers = True
    has_dropout = False
    layer_types = ("Linear",)
    plain_lora = "lora"
    no_deepspeed = "LoRTA's layers share their tensors, which ZeRO splits: use DDP or one process"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._settings: dict[str, Any] = {}

    def chosen_layers(self, model: nn.Module, linear: dict[str, tuple[int, int]]) -> list[str]:
        """Raises UserError where there are no q, k, v and o of one size."""
        places: dict[str, list[int]] = {}
        for matrix, ends in enumerate(MATRICES):
            for number, path in enumerate(path for path in linear if path.endswith(ends)):
                places[path] = [number, matrix]
        sizes = {size for path in places for size in linear[path]}
        num_layers = len(places) // len(MATRICES)
        if not places or len(sizes) != 1 or len(places) != num_layers * len(MATRICES):
            raise UserError(
                f"adapter.tuner=lorta needs q, k, v and o of one size, which this {model.config.model_type} model has "
                "not (grouped keys and values, or one layer for all three): choose another method"
            )
        heads = model.config.get_text_config().num_attention_heads
        self._settings = {"places": places, "num_layers": num_layers, "heads": heads}
        return list(places)

    def peft_config(self, num_steps: int) -> Any:
        adapter = self.adapter
        return peft_settings(LortaConfig, self, r=adapter.rank, alpha=whole_alpha(adapter), **self._settings)

    def choose_weights(self, model: nn.Module, path: Any, rows: Any) -> None:
        share_tensors(model)

    def to_plain_lora(
        self, weights: dict[str, Tensor], settings: dict[str, Any], state: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        converted, paths = {}, sorted({name.rsplit(".lorta_", 1)[0] for name in weights if ".lorta_" in name})
        for prefix in paths:
            place = settings["places"][prefix.removeprefix("base_model.model.")]
            first, second = lora_factors([weights[f"{prefix}.{name}"].float() for name in SHARED], place)
            converted |= {f"{prefix}.lora_A.weight": first, f"{prefix}.lora_B.weight": second.clone()}
        kept = {name: value for name, value in weights.items() if ".lorta_" not in name}
        own = ("places", "num_layers", "heads", "alpha")
        plain = {name: value for name, value in settings.items() if name not in own}
        return kept | converted, plain | {"peft_type": "LORA", "lora_alpha": settings["alpha"], "bias": "none"}


def share_tensors(model: nn.Module) -> None:
    """Make the first layer's tensors those of all."""
    layers = [module for module in model.modules() if isinstance(module, LortaLayer)]
    for name in SHARED:
        for layer in layers[1:]:
            getattr(layer, name)[DEFAULT] = getattr(layers[0], name)[DEFAULT]


TUNER = Lorta
