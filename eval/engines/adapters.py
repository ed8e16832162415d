"""PEFT adapter folders: what their settings say, and whether their weights are those of the layers they name.

An engine that is given weights under other names answers with the bare base and says nothing. So both engines ask
`check_adapter` before they load a model.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ba_lora.errors import UserError, in_one_line
from ba_lora.io import is_pickle, read_json
from ba_lora.methods.base import import_tuners
from ba_lora.models.layers import is_residual_init
from ba_lora.models.sizes import load_skeleton
from ba_lora.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS, resolve_path

if TYPE_CHECKING:
    from peft import PeftConfig

    from eval.engines.base import EngineOptions

VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values vLLM takes for max_lora_rank


def read_adapter(path: str | Path) -> dict[str, Any]:
    """Return the adapter_config.json of a PEFT adapter that fits its base as published.

    Raises UserError where there is none, or where the adapter belongs to changed base weights (PiSSA and its kin, whose
    first product was taken out of the base; LoftQ, whose base is in 4 bit).
    """
    path = Path(path)
    settings = _adapter_json(path)
    initialisation = settings.get("init_lora_weights")
    if settings.get("loftq_config"):
        raise UserError(
            f"{path} was trained on a 4-bit base, whose rounding it makes up for (LoftQ), and is wrong on the base as "
            f"published: serve {_sibling(path, 'merged')}"
        )
    if is_residual_init(initialisation):
        raise UserError(
            f"{path} was trained on a changed base (init_lora_weights={initialisation}) and is wrong on the base "
            f"itself: serve {_sibling(path, 'lora')}"
        )
    return settings


def _sibling(path: Path, name: str) -> str:
    """Return how the same training's other export is told: its folder beside the adapter's, or how to make one."""
    folder = path.parent / name
    if folder.is_dir():
        return str(folder)
    if name == "lora":
        return "its plain LoRA, which python -m ba_lora.runs.convert convert makes of it"
    return "the model that it was merged into, in the base as it was trained"


def _adapter_json(path: Path) -> dict[str, Any]:
    settings = read_json(path / ADAPTER_CONFIG)
    if not isinstance(settings, dict):
        raise UserError(f"{path}/{ADAPTER_CONFIG}: a JSON object is needed; copy the adapter again")
    return settings


def adapter_base(path: str | Path) -> str:
    """Return the base that a PEFT adapter folder names. Raises UserError where it names none."""
    base = _adapter_json(Path(path)).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{path}/{ADAPTER_CONFIG} names no base_model_name_or_path: write the base into it")
    local = resolve_path(base)
    return str(local.resolve()) if local.is_dir() else str(base)


def adapter_rank(settings: Mapping[str, Any]) -> int:
    """Return the largest rank of a LoRA adapter's layers."""
    return max([int(settings.get("r", 1)), *map(int, (settings.get("rank_pattern") or {}).values())])


def vllm_lora_rank(rank: int) -> int:
    """Return the smallest max_lora_rank of vLLM that takes adapters of this rank."""
    if rank > VLLM_LORA_RANKS[-1]:
        raise UserError(f"vLLM serves LoRA ranks up to {VLLM_LORA_RANKS[-1]}, not {rank}: serve the merged model")
    return next(allowed for allowed in VLLM_LORA_RANKS if allowed >= rank)


def hot_obstacle(settings: Mapping[str, Any]) -> str | None:
    """Return why an adapter with these settings cannot be served hot by vLLM, or None."""
    if settings.get("peft_type") != "LORA":
        return f"vLLM serves LoRA adapters, not {settings.get('peft_type')}"
    if settings.get("use_dora"):
        return "vLLM does not serve DoRA"
    for name in ("modules_to_save", "target_parameters", "trainable_token_indices", "lora_bias"):
        if settings.get(name):
            return f"vLLM does not serve adapters with {name}"
    if settings.get("bias", "none") != "none":
        return "vLLM does not serve adapters that train biases"
    if adapter_rank(settings) > VLLM_LORA_RANKS[-1]:
        return f"vLLM serves ranks up to {VLLM_LORA_RANKS[-1]}"
    return None


def check_adapter(path: str | Path, base: str, options: "EngineOptions") -> None:
    """Raise UserError unless the adapter's weights are just those of the layers that its settings name on `base`.

    PEFT itself loads them into the base's modules without weights, and so decides by the rules of every method.
    """
    path, name = Path(path), "checked"
    _require_weights(path)
    import_tuners()
    model = load_skeleton(base, revision=options.revision, trust_remote_code=options.trust_remote_code)
    import torch
    from peft import get_peft_model
    from safetensors import SafetensorError

    config = _read_settings(path)
    misfit = f"{path} does not fit the base {base}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(
                model, config, adapter_name=name, autocast_adapter_dtype=False, low_cpu_mem_usage=True
            )
            found = model.load_adapter(path, name, torch_device="cpu", low_cpu_mem_usage=True)
    except SafetensorError as error:
        raise UserError(
            f"{path}/{ADAPTER_WEIGHTS} is damaged or cut short ({error}): copy or export the adapter again"
        ) from error
    except KeyError as error:
        raise UserError(f"{misfit}: {error.args[0]} is missing in {ADAPTER_WEIGHTS}") from error
    except RuntimeError as error:
        told = in_one_line(error).replace(f".{name}.", ".")
        raise UserError(f"{misfit}, it is of another one or of one with added tokens: {told}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{misfit}: {in_one_line(error)}") from error
    if config.is_prompt_learning:  # no layers: PEFT asks for the prompt's weights by name
        return
    missing = [key.replace(f".{name}", "") for key in found.missing_keys]
    unexpected = [key.replace(f".{name}", "") for key in found.unexpected_keys]
    if missing or unexpected:
        told = [f"{len(missing)} of its layers' weights are missing, such as {missing[0]}"] if missing else []
        told += [f"{len(unexpected)} belong to no layer, such as {unexpected[0]}"] if unexpected else []
        raise UserError(
            f"{misfit}: {ADAPTER_WEIGHTS} does not hold the layers that {ADAPTER_CONFIG} names: {'; '.join(told)}; "
            "save the adapter again with PEFT's save_pretrained (of the model before torch.compile)"
        )
    whole = [
        key
        for key, parameter in model.named_parameters()
        if f".{name}" not in key and parameter.device != torch.device("meta")
    ]
    if whole:
        raise UserError(
            f"{path}/{ADAPTER_WEIGHTS} also holds weights of the base itself, such as {whole[0]}, which would change "
            "the base for every model served on it: merge the adapter into its base (merge_and_unload) and serve that"
        )


def _read_settings(path: Path) -> "PeftConfig":
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(path)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}/{ADAPTER_CONFIG} cannot be read by PEFT: {in_one_line(error)}") from error


def _require_weights(path: Path) -> None:
    for name in (ADAPTER_WEIGHTS, "adapter_model.bin", "adapter_model.pt"):
        if (path / name).is_file() and (name != ADAPTER_WEIGHTS or is_pickle(path / name)):
            raise UserError(
                f"{path}/{name} is a pickle, which may run code when it is loaded: save the adapter as "
                f"{ADAPTER_WEIGHTS} (PEFT's save_pretrained does)"
            )
        if (path / name).is_file():
            return
    raise UserError(f"{path} has no {ADAPTER_WEIGHTS}: copy or export the adapter again")
