"""PiSSA initialisation (Meng et al. 2024, arXiv 2404.02948): W = U S Vᵀ, B₀ = U_r √S_r, A₀ = √S_r V_rᵀ, the base keeps
W − B₀A₀. (With a LoRA scaling s ≠ 1: S / s in the factors, W − s B₀A₀ in the base, as PEFT has it.)

The SVDs run in float32 on the process's device, those of one shape together: exact, or randomised (`niter` subspace
iterations; Halko et al. 2009, algorithm 5.1, by torch.svd_lowrank, as in PEFT). The first process computes, all of them
read the one file of factors, from which a killed run goes on and the export takes B₀A₀ away again.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch import Tensor, nn

from ba_lora.io import folder_atomic, load_tensors
from ba_lora.methods.base import DEFAULT, Init, TrainingRows
from ba_lora.methods.factors_cache import SKETCH_SEED, SVD, Components, FactorsCache, tensor_sha256
from ba_lora.models.layers import adapter_layers, factor_parameters, gathered
from ba_lora.paths import resolve_path

if TYPE_CHECKING:
    from ba_lora.config.schema import AdapterConfig, RunConfig

FACTORS_FILE = "initial_factors.safetensors"  # A₀ and B₀, by the adapter file's own names
BATCH_BYTES = 2**30  # of float32 weights decomposed at once; an SVD needs about four times as much beside them


class Matrix(NamedTuple):
    """A weight [out, in], or [in, out] where `transposed` (GPT-2's Conv1D); ZeRO-3 may have split it."""

    weight: Tensor
    transposed: bool = False


def requested_svd(config: "AdapterConfig") -> SVD:
    """Return the SVD of `init`, pissa or pissa_niter_N, at `svd_rank`, which is the adapter's own where it is None."""
    niter = None if config.init == "pissa" else int(config.init.removeprefix("pissa_niter_"))
    return SVD(config.svd_rank or config.rank, niter)


def leading_components(weights_NOI: Tensor, svd: SVD) -> tuple[Tensor, Tensor, Tensor]:
    """Return U [N, out, rank], S [N, rank], Vᵀ [N, rank, in] of float32 matrices of one shape.

    A randomised SVD draws one test matrix a shape from a seed of its own: no run's random state, no other matrix and no
    batch size changes the result. (A GPU draws other numbers than a CPU.)
    """
    rank = min(svd.rank, *weights_NOI.shape[1:])
    if svd.niter is None:
        left, values, right = torch.linalg.svd(weights_NOI, full_matrices=False)
        return left[..., :rank], values[..., :rank], right[..., :rank, :]
    devices = [weights_NOI.device] if weights_NOI.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(SKETCH_SEED)
        left, values, right = torch.svd_lowrank(weights_NOI, rank, niter=svd.niter)
    return left, values, right.mT


def decompose(
    matrices: Mapping[str, Matrix],
    svd: SVD,
    *,
    cache: FactorsCache | None = None,
    device: torch.device | str = "cpu",
    batch_bytes: int = BATCH_BYTES,
) -> dict[str, Components]:
    """Return the leading components of each matrix, from `cache` where it has them, else computed on `device`.

    Every process calls it (ZeRO-3 gathers); only the first computes, and the others get {}. Matrices of one shape go
    together, at most `batch_bytes` of float32 at a time. Raises UserError for a damaged or foreign file in the cache.
    """
    main = PartialState().is_main_process
    components = {}
    with cache.locked() if cache is not None and main else contextlib.nullcontext():
        for names in _batches(matrices, batch_bytes):
            missing, digests = {}, {}
            for name in names:
                with gathered([matrices[name].weight], modify=False):
                    if not main:
                        continue
                    weight_OI = _oriented(*matrices[name]).detach()
                    if cache is not None:
                        digests[name] = tensor_sha256(weight_OI)
                        components[name] = cache.read(digests[name], svd, tuple(weight_OI.shape))
                    if components.get(name) is None:
                        missing[name] = weight_OI.to(device, torch.float32, copy=True)
            if missing:
                stacked = leading_components(torch.stack(list(missing.values())), svd)
                for name, *parts in zip(missing, *stacked, strict=True):  # copied: a view would keep all of U and V
                    components[name] = Components(
                        *(part.clone(memory_format=torch.contiguous_format).cpu() for part in parts)
                    )
                    if cache is not None:
                        cache.write(digests[name], svd, components[name])
    return components


def write_factors(model: nn.Module, path: Path, svd: SVD, *, cache: FactorsCache | None = None) -> None:
    """Write A₀ and B₀ for the LoRA layers of `model`, whose base is untouched; every process calls it.

    The names are those of PEFT's adapter file, the dtype is the adapter's.
    """
    matrices = {
        name: Matrix(layer.get_base_layer().weight, layer.fan_in_fan_out) for name, layer in named_adapter_layers(model)
    }
    save_factors(model, path, decompose(matrices, svd, cache=cache, device=PartialState().device))


def save_factors(model: nn.Module, path: Path, components: Mapping[str, Components]) -> None:
    """Write A₀ = √(S/s) Vᵀ and B₀ = U √(S/s) of each LoRA layer's components, s its scaling; every process calls it.

    The first process writes; of the others `components` may be empty.
    """
    pairs = {}
    if PartialState().is_main_process:
        first = dict(named_adapter_layers(model))[next(iter(components))]
        rank, scaling = first.r[DEFAULT], first.scaling[DEFAULT]
        for name, found in components.items():
            left, values, right = found.leading(rank)
            roots = (values / scaling).sqrt()
            pairs[name] = (roots[:, None] * right, left * roots)
    save_pairs(model, path, pairs)


def save_pairs(model: nn.Module, path: Path, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Write (A₀, B₀) of each LoRA layer in the adapter's dtype; every process calls it.

    The first process writes; of the others `pairs` may be empty.
    """
    process = PartialState()
    if process.is_main_process:
        dtype = factor_parameters(named_adapter_layers(model)[0][1], DEFAULT)[0].dtype
        tensors = {}
        for name, (first, second) in pairs.items():
            tensors[f"{name}.lora_A.weight"] = first.to("cpu", dtype).contiguous()
            tensors[f"{name}.lora_B.weight"] = second.to("cpu", dtype).contiguous()
        with folder_atomic(path.parent) as folder:
            save_file(tensors, folder / path.name)
    process.wait_for_everyone()


def save_weight_factors(
    model: nn.Module, path: Path, factors: Callable[[Tensor, int, float], tuple[Tensor, Tensor]]
) -> None:
    """Write what `factors` makes of each weight: (float32 W [out, in], r, s) → (A₀, B₀). Every process calls it."""
    pairs = {}
    for name, layer in named_adapter_layers(model):
        weight = layer.get_base_layer().weight
        with gathered([weight], modify=False):
            if PartialState().is_main_process:
                weight_OI = _oriented(weight.detach(), layer.fan_in_fan_out).to(PartialState().device, torch.float32)
                pairs[name] = tuple(part.cpu() for part in factors(weight_OI, layer.r[DEFAULT], layer.scaling[DEFAULT]))
    save_pairs(model, path, pairs)


def load_factors(model: nn.Module, path: Path, *, subtract: bool) -> None:
    """Put A₀, B₀ of the file into the trained adapter and, with `subtract`, take s B₀A₀ from the base."""
    factors = load_tensors(path)
    for name, layer in named_adapter_layers(model):
        base = layer.get_base_layer()
        parameters = factor_parameters(layer, "default")
        with gathered([*parameters, base.weight]), torch.no_grad():
            for factor, parameter in zip(("lora_A", "lora_B"), parameters, strict=True):
                parameter.data = factors[f"{name}.{factor}.weight"].to(parameter.device)
            if subtract:
                _subtract(base.weight, *parameters, layer.scaling["default"], transposed=layer.fan_in_fan_out)


def save_residual(model: nn.Module, path: Path) -> None:
    """Write the base of a model after `load_factors(subtract=True)` as a folder of safetensors; it loses its adapter.

    The first process writes, every process calls it.
    """
    base = model.unload()
    if PartialState().is_main_process:
        with folder_atomic(path) as folder:
            base.save_pretrained(folder)
    PartialState().wait_for_everyone()


def factors_path(run_path: Path) -> Path:
    """Return where a run keeps PiSSA's first factors."""
    return run_path / "initial" / FACTORS_FILE


def _subtract(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, *, transposed: bool) -> None:
    """W ← W − s B A in W's dtype, layout and place, computed in float32 on the process's device."""
    float_weight, float_a, float_b = (
        tensor.data.to(PartialState().device, torch.float32) for tensor in (weight, lora_a, lora_b)
    )
    residual_OI = _oriented(float_weight, transposed) - scaling * float_b @ float_a
    weight.data = _oriented(residual_OI.to(weight.device, weight.dtype), transposed).contiguous()


def _oriented(weight: Tensor, transposed: bool) -> Tensor:
    return weight.T if transposed else weight


def _batches(matrices: Mapping[str, Matrix], batch_bytes: int) -> Iterator[list[str]]:
    """Yield the names in groups of one shape, at most `batch_bytes` of float32 each (but one matrix at least)."""
    groups: dict[tuple, list[str]] = {}
    for name, (weight, transposed) in matrices.items():
        shape = tuple(getattr(weight, "ds_shape", weight.shape))  # ds_shape: the whole one under ZeRO-3
        groups.setdefault((shape, transposed), []).append(name)
    for (shape, _), names in groups.items():
        size = max(1, batch_bytes // (4 * shape[0] * shape[1]))
        for start in range(0, len(names), size):
            yield names[start : start + size]


def named_adapter_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (name, layer) of the model's PEFT layers."""
    names = {module: name for name, module in model.named_modules()}
    return [(names[layer], layer) for layer in adapter_layers(model)]


class ResidualInit(Init):
    """A₀ and B₀ of whichever kind, and a base that keeps W − s B₀A₀."""

    def load_factors(self, model: nn.Module, path: Path) -> nn.Module:
        load_factors(model, path, subtract=True)
        return model


class Pissa(ResidualInit):
    """The leading components, in both factors alike."""

    quantizes = True
    caches = True
    rebuilt_by_peft = True

    def write_factors(self, model: nn.Module, path: Path, config: "RunConfig", rows: TrainingRows | None) -> None:
        folder = self.adapter.factors_cache
        cache = FactorsCache(resolve_path(folder)) if folder else None
        write_factors(model, path, requested_svd(self.adapter), cache=cache)


INIT = Pissa
