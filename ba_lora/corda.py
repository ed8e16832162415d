"""CorDA initialisation (Yang et al. 2024, arXiv 2406.05223), its instruction-previewed mode: as PiSSA, but of W C.

    C = mean of x xᵀ over a layer's inputs x on training rows      (PEFT scales each row's inputs and damps C)
    W C = U S Vᵀ,   B₀ = U_r √S_r,   A₀ = √S_r V_rᵀ C⁻¹,   the base keeps W − B₀A₀

PEFT runs the rows and decomposes (peft.tuners.lora.corda). What comes out goes the way of PiSSA's factors: into a file
of the run, which every process and a resumed run reads, and which the export takes away again (ba_lora/pissa.py).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from torch import nn

from ba_lora.errors import UserError
from ba_lora.pissa import named_adapter_layers, save_factors
from ba_lora.pissa_cache import Components
from ba_lora.processes import on_main_process
from ba_lora.rows import choose_rows

if TYPE_CHECKING:
    from datasets import Dataset

CALIBRATION_ROWS = 256
COVARIANCE_BYTES = 8 * 2**30  # of float32 covariances at a time: LLaMA-2-7B has 28 GB of them, and goes in four passes


def calibration_rows(dataset: "Dataset", seed: int) -> list[list[int]]:
    """Return the token ids of the tokenized training rows that C is taken from, a sample by `seed`."""
    chosen = choose_rows(list(range(len(dataset))), CALIBRATION_ROWS, seed)
    return dataset.select(chosen)["input_ids"][:]


def write_factors(
    model: nn.Module, path: Path, rows: Sequence[list[int]], *, covariance_bytes: int = COVARIANCE_BYTES
) -> None:
    """Write A₀ and B₀ for the LoRA layers of `model`, whose base is untouched; every process calls it.

    The first process runs the token ids of `rows` through the model, once for every group of layers whose covariances
    fit into `covariance_bytes`. Raises UserError for inputs of a layer that are not finite.
    """
    components: dict[str, Components] = {}

    def compute() -> None:
        for layers in _groups(dict(named_adapter_layers(model)), covariance_bytes):
            components.update(_decompose(model, layers, rows))

    on_main_process(PartialState(), compute)
    save_factors(model, path, components)


def _decompose(model: nn.Module, layers: dict[str, nn.Module], rows: Sequence[list[int]]) -> dict[str, Components]:
    """Return U [out, r], S [r] and Vᵀ C⁻¹ [r, in] of each layer."""
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    device = next(model.parameters()).device

    def run_rows() -> None:
        for ids in rows:  # one at a time: PEFT would take padding for tokens
            model(input_ids=torch.tensor([ids], device=device), use_cache=False)

    config = LoraConfig(
        r=next(iter(layers.values())).r["default"],
        target_modules=[f"{name}.base_layer" for name in layers],
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="ipm"),
    )
    try:
        preprocess_corda(model, config, run_rows)
    except ValueError as error:
        raise UserError(f"adapter.init=corda: {str(error).splitlines()[0]} Try model.dtype=float32") from error
    components = {}
    for name, layer in layers.items():
        found = vars(layer.get_base_layer()).pop("eigens")
        parts = (found.U_WC, found.S_WC, found.V_WC.T)
        components[name] = Components(*(part.contiguous().cpu() for part in parts))
    return components


def _groups(layers: dict[str, nn.Module], covariance_bytes: int) -> Iterator[dict[str, nn.Module]]:
    """Yield the layers in groups whose covariances [in, in] fit into the bytes (but one layer at least)."""
    group: dict[str, nn.Module] = {}
    size = 0
    for name, layer in layers.items():
        needed = 4 * layer.in_features**2
        if group and size + needed > covariance_bytes:
            yield group
            group, size = {}, 0
        group[name] = layer
        size += needed
    yield group
