"""CorDA initialisation (Yang et al. 2024, arXiv 2406.05223), its instruction-previewed mode: as PiSSA, but of W C.

    C = mean of x xᵀ over a layer's inputs x on training rows      (PEFT scales each row's inputs and damps C)
    W C = U S Vᵀ,   B₀ = U_r √S_r,   A₀ = √S_r V_rᵀ C⁻¹,   the base keeps W − B₀A₀

PEFT runs the rows and decomposes (peft.tuners.lora.corda). What comes out goes the way of PiSSA's factors: into a file
of the run, which every process and a resumed run reads, and which the export takes away again
(ba_lora/methods/pissa.py).

How many rows: C [in, in] has at most the rank of the number of tokens it is the mean over, and with few it is noise.
PEFT's rule is 128 tokens for each input (preprocess_corda: rows = hidden size / tokens a row × 128, its 256 rows being
2048 tokens long, for 4096 inputs). Here it holds for the widest of the adapted layers, and for the rows as long as they
are: 1.4 million tokens for LLaMA-2-7B, whose down_proj has 11008 inputs.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from torch import nn

from ba_lora.errors import UserError
from ba_lora.methods.base import TrainingRows
from ba_lora.methods.factors_cache import Components
from ba_lora.methods.pissa import ResidualInit, named_adapter_layers, save_factors
from ba_lora.models.layers import adapter_layers
from ba_lora.processes import on_main_process

if TYPE_CHECKING:
    from datasets import Dataset

    from ba_lora.config.schema import RunConfig

TOKENS_AN_INPUT = 128
COVARIANCE_BYTES = 8 * 2**30  # of float32 covariances at a time: LLaMA-2-7B has 28 GB of them, and goes in four passes


def calibration_rows(model: nn.Module, dataset: "Dataset", seed: int) -> list[list[int]]:
    """Return the token ids of tokenized training rows, drawn by `seed`, from which C of each LoRA layer is taken.

    They hold TOKENS_AN_INPUT tokens for each input of the widest layer; all rows where they hold fewer, which is said.
    """
    num_inputs = max(layer.in_features for layer in adapter_layers(model))
    wanted = TOKENS_AN_INPUT * num_inputs
    input_ids, rows, num_tokens = dataset["input_ids"], [], 0
    for number in random.Random(seed).sample(range(len(dataset)), len(dataset)):
        rows.append(input_ids[number])
        num_tokens += len(rows[-1])
        if num_tokens >= wanted:
            break
    few = f", fewer than the {wanted:,} that {num_inputs} inputs ask for" if num_tokens < wanted else ""
    PartialState().print(f"CorDA: covariances of {num_tokens:,} tokens in {len(rows)} of {len(dataset)} rows{few}")
    return rows


def write_factors(
    model: nn.Module, path: Path, rows: Sequence[list[int]], *, covariance_bytes: int = COVARIANCE_BYTES
) -> None:
    """Write A₀ and B₀ for the LoRA layers of `model`, whose base is untouched; every process calls it.

    The first process runs the token ids of `rows` through the model, once for every group of layers whose covariances
    fit into `covariance_bytes`. Raises UserError for a rank above a layer's size, and for inputs, weights or factors
    that are not finite.
    """
    for name, layer in named_adapter_layers(model):
        rank, size = layer.r["default"], min(layer.in_features, layer.out_features)
        if rank > size:
            raise UserError(f"adapter.rank={rank} is above the size of {name}, {size}: use a smaller rank")
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
        if not str(error).startswith("Invalid value found"):  # the model's own complaint
            raise
        raise _not_finite("a layer's inputs on the training rows, or their covariance,") from error
    except torch.linalg.LinAlgError as error:
        raise _not_finite("the product of a layer's weight and covariance") from error
    components = {}
    for name, layer in layers.items():
        found = vars(layer.get_base_layer()).pop("eigens")
        parts = (found.U_WC, found.S_WC, found.V_WC.T)
        if not all(part.isfinite().all() for part in parts):  # a GPU's SVD does not complain
            raise _not_finite(f"the SVD of {name}")
        components[name] = Components(*(part.contiguous().cpu() for part in parts))
    return components


def _not_finite(what: str) -> UserError:
    fix = "look for damaged weights in model.name, or try model.dtype=float32"
    return UserError(f"adapter.init=corda: {what} cannot be used, not all of it is finite: {fix}")


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


class Corda(ResidualInit):
    """The leading components of W C, C⁻¹ taken back in A₀."""

    kinds = ("nlg",)
    limits = "runs training rows through a language model: not for NLU, nor for nf4"
    needs_rows = True
    no_zero3 = "adapter.init=corda runs rows before training, which ZeRO-3's split weights cannot: use ZeRO-2"
    draws = "rows of CorDA's covariances"

    def write_factors(self, model: nn.Module, path: Path, config: "RunConfig", rows: TrainingRows | None) -> None:
        write_factors(model, path, calibration_rows(model, rows.dataset, rows.seed))


INIT = Corda
