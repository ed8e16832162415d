"""SAM, second-order approximation (Fu et al. 2022, arXiv 2211.15583): trained are the weights with the largest squared
gradient, (∂L/∂w)², of the loss on training rows; the others stay.

`share` of the weights over all layers, exactly so many; the gradient is the mean over `rows` rows. (Not sharpness-aware
minimisation.)
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch import nn

from ba_lora.errors import UserError
from ba_lora.io import folder_atomic, load_tensors
from ba_lora.methods.base import TrainingRows, Tuner, peft_settings
from ba_lora.methods.rows import batches
from ba_lora.methods.sparse import SparseConfig, choose_places, sparse_layers
from ba_lora.processes import on_main_process


class Sam(Tuner):
    """share · Σ in · out parameters."""

    ignores = ("rank", "alpha")
    options = {"share": (0.01, "(0, 1)"), "rows": (128, "[1, 1000000]")}
    layer_options = ()
    own_layers = True
    names_layers = True
    has_dropout = False
    needs_rows = True
    no_zero3 = "SAM reads the gradients of whole weights, which ZeRO-3 splits: use ZeRO-2, DDP or one process"
    draws = "rows of SAM's gradients"

    def peft_config(self, num_steps: int) -> Any:
        return peft_settings(SparseConfig, self)

    def choose_weights(self, model: nn.Module, path: Path, rows: TrainingRows | None) -> None:
        def compute() -> None:
            with folder_atomic(path.parent) as folder:
                save_file(self._places(model, rows), folder / path.name)

        if not path.is_file():
            PartialState().wait_for_everyone()
            on_main_process(PartialState(), compute)
        choose_places(model, load_tensors(path))

    def _places(self, model: nn.Module, rows: TrainingRows) -> dict[str, torch.Tensor]:
        """Return by layer the places of the chosen weights in the flat W, by rising number."""
        layers = sparse_layers(model)
        weights = {name: layer.base_layer.weight for name, layer in layers.items()}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        with torch.random.fork_rng(), model.disable_adapter():
            for batch in batches(model, rows, num_rows=self.option["rows"], batch_size=1):
                model(**batch).loss.backward()
        number = max(1, round(self.option["share"] * sum(weight.numel() for weight in weights.values())))
        largest, places, total = torch.empty(0), torch.empty(0, dtype=torch.long), 0  # of the layers so far, as one
        for name, weight in weights.items():
            square = squared_gradient(weight, layers[name].path).flatten()
            own = square.topk(min(number, len(square)))
            largest = torch.cat([largest.to(square.device), own.values])
            places = torch.cat([places.to(square.device), own.indices + total])
            largest, order = largest.topk(min(number, len(largest)))
            places, total = places[order], total + len(square)
        for weight in weights.values():
            weight.requires_grad_(False)
            weight.grad = None
        for parameter in trained:
            parameter.requires_grad_(True)
        sizes = torch.tensor([weight.numel() for weight in weights.values()])
        starts, places = sizes.cumsum(0) - sizes, places.sort().values.cpu()
        parts = places.tensor_split(torch.searchsorted(places, starts[1:]))
        return {name: part - start for name, part, start in zip(weights, parts, starts, strict=True)}


def squared_gradient(weight: nn.Parameter, path: str) -> torch.Tensor:
    """Return (∂L/∂w)² in the layout of W, float32. Raises UserError where it is 0 everywhere, or not finite."""
    gradient = weight.grad
    if gradient is None or not gradient.isfinite().all() or not gradient.any():
        raise UserError(
            f"adapter.tuner=sam: the gradient of {path} is 0 or not finite on the training rows: try "
            "model.dtype=float32, or leave the layer out of adapter.target_modules"
        )
    return gradient.float().square()


TUNER = Sam
