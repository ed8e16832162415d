"""LoRA-GA (Wang et al. 2024, arXiv 2407.05000): the first step of LoRA goes where full fine-tuning's would.

G = mean gradient of W over training rows = U S Vᵀ, then with c = d_out^¼ / √γ

    A₀ = c V_{1…r}ᵀ,   B₀ = c U_{r+1…2r},   the base keeps W − s B₀A₀

as in the paper and its code (Outsider565/LoRA-GA). PEFT's own `lora_ga` differs: it puts the singular values into B and
leaves c out of A. PEFT collects the gradients; the factors are made here. The plain LoRA of rank 2r is the only export
that another program can load: PEFT, given the adapter and the base, would draw other factors and say nothing.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from torch import Tensor, nn

from ba_lora.errors import UserError
from ba_lora.methods.base import TrainingRows
from ba_lora.methods.pissa import ResidualInit, named_adapter_layers, save_pairs
from ba_lora.methods.rows import batches
from ba_lora.processes import on_main_process

if TYPE_CHECKING:
    from ba_lora.config.schema import RunConfig


def lora_ga_factors(gradient_OI: Tensor, rank: int, gamma: float) -> tuple[Tensor, Tensor]:
    """Return A₀ [r, in] and B₀ [out, r] of a mean gradient [out, in]. Raises UserError where it has fewer than 2r
    singular values."""
    if 2 * rank > min(gradient_OI.shape):
        raise UserError(
            f"adapter.init=lora_ga takes 2r components of each gradient: adapter.rank={rank} is above half the size of "
            f"a layer, {min(gradient_OI.shape)}"
        )
    left, _, right = torch.linalg.svd(gradient_OI.float(), full_matrices=False)
    scale = gradient_OI.shape[0] ** 0.25 / gamma**0.5
    return scale * right[:rank], scale * left[:, rank : 2 * rank]


class LoraGA(ResidualInit):
    """128 rows and γ = 16, as theirs; the loss is the model's own, without regularizers."""

    options = {"rows": (128, "[1, 1000000]"), "gamma": (16.0, "(0, 1000000]")}
    needs_rows = True
    no_zero3 = "adapter.init=lora_ga runs rows before training, which ZeRO-3's split weights cannot: use ZeRO-2"
    draws = "rows of LoRA-GA's gradients"

    def write_factors(self, model: nn.Module, path: Path, config: "RunConfig", rows: TrainingRows | None) -> None:
        pairs = {}

        def compute() -> None:
            layers = dict(named_adapter_layers(model))
            for name, gradient_OI in weight_gradients(model, rows, self.option["rows"]).items():
                rank = layers[name].r["default"]
                pairs[name] = tuple(part.cpu() for part in lora_ga_factors(gradient_OI, rank, self.option["gamma"]))

        on_main_process(PartialState(), compute)
        save_pairs(model, path, pairs)


def weight_gradients(model: nn.Module, rows: TrainingRows, num_rows: int) -> dict[str, Tensor]:
    """Return the gradient [out, in] of each adapted layer's weight, the mean over rows, by PEFT's LoRA-GA."""
    from peft import LoraConfig
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    layers = dict(named_adapter_layers(model))
    config = LoraConfig(
        target_modules=[f"{name}.base_layer" for name in layers],
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
    )
    given = batches(model, rows, num_rows=num_rows, batch_size=1)  # by itself, each row counts the same

    def train_step() -> None:
        with torch.random.fork_rng():  # dropout
            for batch in given:
                model(**batch).loss.backward()

    preprocess_loraga(model, config, train_step)
    model.train()
    found = {}
    for name, layer in layers.items():
        gradient = vars(layer.get_base_layer()).pop("_peft_loraga_grad")
        if not gradient.isfinite().all() or not gradient.any():
            raise UserError(f"adapter.init=lora_ga: the gradient of {name} is 0 or not finite: try model.dtype=float32")
        found[name] = gradient.T if layer.fan_in_fan_out else gradient
    return found


INIT = LoraGA
