"""A layer of which chosen weights are trained, and no others: W + M ⊙ P, M a fixed mask, P = 0 at the start.

Kept are the places of M (`sparse_places`, flat, by rising number) and P there (`sparse_values`). SaRA and SAM
(sara.py, sam.py) differ in the mask. W + M ⊙ P is made in every pass, and autograd keeps it until the layer's backward
pass: in training that is a second copy of all adapted weights. It has the base's dtype: in bfloat16 a change of W below
half a unit of its last place (1/512 of W) shows in no output, though P keeps it.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ba_lora.methods.base import DEFAULT
from ba_lora.methods.own_layers import OwnConfig, OwnLayer, register_own


@dataclass
class SparseConfig(OwnConfig):
    """counts: layer's path → number of its chosen weights, so that a reloaded layer has room for them."""

    counts: Any = None


class SparseLayer(OwnLayer):
    """`choose` must follow: as allocated no weight is trained."""

    adapter_layer_names = ("sparse_values",)
    other_param_names = ("sparse_places",)
    tensor_names = ("sparse_values", "sparse_places")

    def allocate(self, adapter: str, config: SparseConfig) -> None:
        self.choose(adapter, torch.zeros((config.counts or {}).get(self.path, 0), dtype=torch.long))

    def choose(self, adapter: str, places: Tensor) -> None:
        """Train the weights at these places of the flat W [out · in], in the dtype of the values that were there."""
        device = self.base_layer.weight.device
        dtype = self.sparse_values[adapter].dtype if adapter in self.sparse_values else torch.float32
        self.sparse_places[adapter] = nn.Parameter(places.to(device), requires_grad=False)
        self.sparse_values[adapter] = nn.Parameter(torch.zeros(len(places), dtype=dtype, device=device))

    def change(self, adapter: str) -> Tensor:
        """Return M ⊙ P in the layout of W, float32, with its gradient."""
        weight = self.base_layer.weight
        flat = torch.zeros(weight.numel(), dtype=torch.float32, device=weight.device)
        return flat.index_add(0, self.sparse_places[adapter], self.sparse_values[adapter].float()).view(weight.shape)

    def adapted(self, adapter: str, x: Tensor) -> Tensor:
        weight, _ = self.merged_weights(adapter)
        weight = weight.to(x.dtype)
        if isinstance(self.base_layer, Conv1D):
            return F.linear(x, weight.T, self.base_layer.bias)
        return F.linear(x, weight, self.base_layer.bias)

    def merged_weights(self, adapter: str) -> tuple[Tensor, Tensor | None]:
        weight = self.base_layer.weight
        return (weight + self.change(adapter)).to(weight.dtype), None


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """Return path → layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLayer)}


def choose_places(model: nn.Module, places: dict[str, Tensor]) -> None:
    """Train these weights, by layer, and let the configuration say how many there are of each."""
    layers = sparse_layers(model)
    for name, layer in layers.items():
        layer.choose(DEFAULT, places[name])
    model.peft_config[DEFAULT].counts = {layer.path: len(places[name]) for name, layer in layers.items()}


register_own("sparse", SparseConfig, SparseLayer)
