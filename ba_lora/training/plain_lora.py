"""A trained adapter as a plain LoRA on the untouched base, and the first factors that this needs.

PiSSA and kin train on the residual base W − s B₀A₀. On W the same model is a plain LoRA of twice the rank,

    s [B − B₀, B₀] [A; A − A₀] = s (BA − B₀A₀).

Each of its two products is small where the learned update is small, so that rounding the factors to half precision (as
an engine does that serves them) costs a fixed share of the update, 0.2 % in bfloat16. [B, −B₀] [A; A₀] is the same
matrix, but the difference of two large products: rounded, it loses 10 % and more of a small update.

A residual belongs to its factors: each checkpoint carries a fingerprint of A₀ and B₀, and a model on another residual
(a randomised PiSSA drawn again, another base) does not take it up.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch import Tensor, nn

from ba_lora.errors import UserError
from ba_lora.io import load_tensors
from ba_lora.models.layers import adapter_layers, gathered, has_residual_base
from ba_lora.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS

FINGERPRINT = "initial_fingerprint.safetensors"
FINGERPRINT_TOLERANCE = 1e-3  # relative: an exact SVD differs by far less between machines


def initial_factors(model: nn.Module) -> dict[str, Tensor]:
    """Return A₀ and B₀ of an untrained PEFT model on a residual base, by the adapter file's names, on the CPU.

    {} for any other model. Every process calls it (ZeRO-3 gathers); only the first gets them, the others {}.
    """
    config = getattr(model, "peft_config", {}).get("default")
    if config is None or not has_residual_base(config):
        return {}
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for layer in adapter_layers(model):
        for kind in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            if "default" not in getattr(layer, kind, {}):
                continue
            entry = getattr(layer, kind)["default"]
            parameter, suffix = (entry.weight, ".weight") if isinstance(entry, nn.Module) else (entry, "")
            with gathered([parameter], modify=False):
                if PartialState().is_main_process:
                    found[f"{names[layer]}.{kind}{suffix}"] = parameter.detach().to("cpu", copy=True)
    return found


def plain_lora(trained: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return [A; A − A₀] and [B − B₀, B₀] in float32; what is no factor (a head, DoRA's magnitude) stays as it is."""
    converted = dict(trained)
    for name, first in initial.items():
        factor, first = trained[name].float(), first.float()
        change = factor - first
        parts, axis = ([factor, change], 0) if _is_first(name) else ([change, first], 1)
        converted[name] = torch.cat(parts, dim=axis).contiguous()
    return converted


def plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return adapter_config.json of the plain LoRA: twice every rank, the same scaling, nothing to be initialised."""
    patterns = {name: settings.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    if settings.get("use_rslora") and any(patterns.values()):
        raise UserError("rsLoRA with rank_pattern or alpha_pattern cannot be written as a plain LoRA: merge it instead")
    rank = settings["r"]
    alpha = 2 * settings["lora_alpha"] * (rank**0.5 if settings.get("use_rslora") else 1)
    return {
        **settings,
        "r": 2 * rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        **{name: {layers: 2 * value for layers, value in pattern.items()} for name, pattern in patterns.items()},
        "use_rslora": False,
        "init_lora_weights": True,
    }


def write_plain_lora(
    folder: Path, weights: Mapping[str, Tensor], initial: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> None:
    """Write weights and settings of the plain LoRA into `folder`; `weights` are the trained adapter's.

    `initial` is {} where the base was left whole. Raises UserError where they are not of the same layers.
    """
    factors = [name for name in weights if "lora_A" in name or "lora_B" in name or "lora_embedding" in name]
    if initial and sorted(initial) != sorted(name for name in factors if not name.endswith(".bias")):
        raise UserError(f"the adapter for {folder} and the first factors are of different layers: of different runs")
    weights = plain_lora(weights, initial) if initial else {name: value.contiguous() for name, value in weights.items()}
    settings = plain_settings(settings) if initial else {**settings, "init_lora_weights": True}
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


# ---- checkpoints ----


def write_fingerprint(initial: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Put the fingerprint of the first factors, where there are any, into a checkpoint."""
    if initial:
        save_file(_fingerprint(initial), checkpoint / FINGERPRINT)


def check_initial_factors(initial: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Raise UserError where a checkpoint's adapter belongs to another residual than one of these first factors."""
    path = checkpoint / FINGERPRINT
    if not initial or not path.is_file():
        return
    mine, theirs = _fingerprint(initial), load_tensors(path)
    for name in sorted(mine.keys() | theirs.keys()):
        if name in mine and name in theirs and mine[name].shape == theirs[name].shape:
            if (mine[name] - theirs[name]).norm() <= FINGERPRINT_TOLERANCE * theirs[name].norm():
                continue
        raise UserError(
            f"{checkpoint} was trained on another residual base (first in {name}): build the model as it was built "
            "then, from the same base and, for a randomised PiSSA, under the same torch.manual_seed"
        )


def _fingerprint(initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return B₀ (A₀ x) of each layer for a fixed random x, [out]."""
    found = {}
    for name, first in initial.items():
        if _is_first(name):
            second = initial[name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")]
            x = torch.randn(first.shape[1], generator=torch.Generator().manual_seed(0))
            layer = name.removesuffix(".weight").rpartition(".")[0]
            found[layer] = second.float() @ (first.float() @ x)
    return found


def _is_first(name: str) -> bool:
    return ".lora_A." in name or name.endswith(".lora_embedding_A")
