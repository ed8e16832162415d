"""SaRA (Hu et al. 2024, arXiv 2409.06633): the weights that hardly count, |W| ≤ θ, are trained, and no others.

    W + M ⊙ P,   M = |W| ≤ θ,   loss + λ ‖M ⊙ P‖_* (nuclear norm)

At `reselect` (a share of the steps) what has grown to |W + P| > θ keeps its value from then on, the rest goes on with
new moments of the optimizer. θ is the `share`-quantile of |W| over all layers. The norm is taken of `norm_layers`
layers a step, drawn by the seed, and multiplied up to all L of them, as the paper's sum.

The authors' code (sjtuplayer/SaRA) differs from the paper: the norm is that of M ⊙ W, of one layer, and not multiplied
up, so its λ acts L times less; the small weights start as |w|, so that step 0 is not the pre-trained model; norms and
biases are trained, too. Here linear weights only, and P = 0.
"""

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ba_lora.errors import UserError
from ba_lora.methods.base import DEFAULT, TrainingRows, Tuner, WeightTerm, peft_settings
from ba_lora.methods.sparse import SparseConfig, choose_places, sparse_layers

SAMPLE = 4_000_000  # of |W| at most, evenly spaced, from which θ is taken


class Sara(Tuner):
    """As many parameters as the mask has ones."""

    ignores = ("rank", "alpha")
    options = {
        "share": (0.05, "(0, 1)"),
        "norm_weight": (5e-4, "[0, 1000000]"),
        "norm_layers": (1, "[1, 1000000]"),
        "reselect": (0.5, "(0, 1)"),
    }
    layer_options = ()
    own_layers = True
    names_layers = True
    has_dropout = False
    draws = None
    draws_in_training = "layers of SaRA's norm"
    term_names = ("nuclear_norm",)
    no_deepspeed = "SaRA sets single gradients and moments, which ZeRO splits: use DDP or one process"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._threshold, self._step, self._reselect_at = 0.0, 0, 0
        self._frozen: dict[str, Tensor] = {}  # layer → which of its chosen weights keep their value
        self._before: dict[str, Tensor] = {}

    def peft_config(self, num_steps: int) -> Any:
        self._reselect_at = round(self.option["reselect"] * num_steps)
        if not 0 < self._reselect_at < num_steps:
            raise UserError(
                f"adapter.options.reselect={self.option['reselect']} of {num_steps} steps is step {self._reselect_at}: "
                "it must lie between the first step and the last"
            )
        return peft_settings(SparseConfig, self)

    def choose_weights(self, model: nn.Module, path: Path, rows: TrainingRows | None) -> None:
        layers = sparse_layers(model)
        total = sum(layer.base_layer.weight.numel() for layer in layers.values())
        stride = -(-total // SAMPLE)
        sample = torch.cat(
            [layer.base_layer.weight.detach().abs().flatten()[::stride].float().cpu() for layer in layers.values()]
        )
        self._threshold = sample.kthvalue(max(1, round(self.option["share"] * len(sample)))).values.item()
        choose_places(
            model,
            {
                name: (layer.base_layer.weight.detach().abs().float() <= self._threshold).flatten().nonzero().flatten()
                for name, layer in layers.items()
            },
        )

    def terms(self, model: nn.Module) -> list[WeightTerm]:
        return [WeightTerm("nuclear_norm", self.option["norm_weight"], self._norm)]

    def _norm(self, model: nn.Module) -> Tensor:
        layers = list(sparse_layers(model).values())
        number = min(self.option["norm_layers"], len(layers))
        chosen = random.Random(f"sara {self.seed} {self._step}").sample(layers, number)
        return torch.stack([nuclear_norm(layer.change(DEFAULT)) for layer in chosen]).sum() * (len(layers) / number)

    def begin_step(self, model: nn.Module, step: int) -> None:
        self._step = step

    def before_step(self, model: nn.Module, step: int) -> None:
        for name, layer in sparse_layers(model).items():
            if name in self._frozen:
                values = layer.sparse_values[DEFAULT]
                values.grad[self._frozen[name]] = 0
                self._before[name] = values.detach().clone()

    def after_step(self, model: nn.Module, step: int, optimizer: torch.optim.Optimizer) -> None:
        for name, layer in sparse_layers(model).items():
            values = layer.sparse_values[DEFAULT]
            with torch.no_grad():
                if name in self._before:
                    kept = self._frozen[name]
                    values[kept] = self._before[name][kept]
                if step + 1 == self._reselect_at:
                    places = layer.sparse_places[DEFAULT]
                    now = layer.base_layer.weight.flatten()[places].float() + values.float()
                    self._frozen[name] = now.abs() > self._threshold
                    optimizer.state.pop(values, None)
        self._before = {}

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        return self._frozen

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        device = next(model.parameters()).device
        self._frozen = {name: value.to(device) for name, value in state.items()}


def nuclear_norm(matrix: Tensor) -> Tensor:
    """Return Σ σ of a matrix, with the gradient U₊ V₊ᵀ over its singular values above 0: at 0 it is 0."""
    with torch.no_grad():
        left, values, right = torch.linalg.svd(matrix.float(), full_matrices=False)
        above = values > values[0] * sum(matrix.shape) ** 0.5 * torch.finfo(values.dtype).eps  # as regularizers.svd
        direction = left[:, above] @ right[above]
    return (matrix * direction).sum()


TUNER = Sara
