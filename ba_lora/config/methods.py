"""What the configuration knows of methods, from the facts that each states in its own file (ba_lora/methods/base.py).

`adapter` is an AdapterConfig, `config` a RunConfig (schema.py, which asks here).
"""

import re
from collections.abc import Mapping
from typing import Any

from ba_lora.config.ranges import check_range
from ba_lora.config.registries import facts, tuners
from ba_lora.errors import UserError
from ba_lora.words import nearest

LAYER_OPTIONS = {"exclude_modules": str, "layers_to_transform": int, "layers_pattern": str}  # one, or a list of them
# What PEFT's configurations would take, and no run may ask for.
_OTHER_WEIGHTS = "it trains weights unknown to reference and export"
_REFUSED_OPTIONS = {
    **dict.fromkeys(
        ("modules_to_save", "bias", "lora_bias", "trainable_token_indices", "target_parameters"), _OTHER_WEIGHTS
    ),
    "monteclora_config": "adapter.tuner=monteclora has its KL term in the loss",
    "kasa_config": "it changes the base's weights, which reference and export take for the pre-trained ones",
    **dict.fromkeys(
        ("r", "init_r", "target_r", "alpha", "lora_alpha", "lora_dropout", "module_dropout", "use_rslora", "use_dora",
         "init_lora_weights", "target_modules", "task_type", "peft_type", "revision", "inference_mode", "rank_pattern",
         "alpha_pattern", "total_step"),
        "it is set by the run itself: use the keys of adapter",
    ),
}  # fmt: skip


def tuner_facts(adapter: Any) -> dict[str, Any]:
    return facts("tuner", adapter.tuner)


def init_facts(adapter: Any) -> dict[str, Any]:
    """Return the facts of `init`, {} for LoRA's own random A and B = 0."""
    name = adapter.init.split("_niter_")[0]
    return {} if name == "lora" else facts("init", name)


def optimizer_facts(adapter: Any) -> dict[str, Any]:
    return facts("optimizer", adapter.optimizer) if adapter.optimizer else {}


def plain_lora_folder(adapter: Any) -> str:
    """Return which folder of a run is a plain LoRA on the untouched base: adapter, lora, or none."""
    tuner = tuner_facts(adapter)
    if adapter.dora or tuner["plain_lora"] == "none":
        return "none"
    return "lora" if init_facts(adapter).get("residual") else tuner["plain_lora"]


def writes_lora(adapter: Any) -> bool:
    """Whether the export writes lora/ beside adapter/."""
    return plain_lora_folder(adapter) == "lora"


def adapter_loads(adapter: Any) -> bool:
    """Whether PEFT makes the trained model of adapter/ and the base: of a residual init only where it can repeat it."""
    init = init_facts(adapter)
    if init.get("residual"):
        return init["rebuilt_by_peft"] and "_niter_" not in adapter.init
    return tuner_facts(adapter)["plain_lora"] != "lora"


def versions(adapter: Any) -> dict[str, int]:
    """Return the version of each part that has had another before: runs made with that are other runs."""
    named = {"tuner": tuner_facts(adapter), "init": init_facts(adapter), "optimizer": optimizer_facts(adapter)}
    return {kind: found["version"] for kind, found in named.items() if found.get("version", 1) > 1}


def option_values(options: Mapping[str, tuple], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part's own options, chosen or default."""
    return {name: chosen.get(name, default) for name, (default, _) in options.items()}


def check_method(config: Any) -> None:
    """Raise UserError for parts that do not go together or with the run."""
    adapter = config.adapter
    tuner, init, optimizer = tuner_facts(adapter), init_facts(adapter), optimizer_facts(adapter)
    named = [("tuner", adapter.tuner, tuner), ("init", adapter.init, init), ("optimizer", adapter.optimizer, optimizer)]
    if init and (not tuner["has_factors"] or adapter.dora):
        fitting = ", ".join(name for name in tuners() if facts("tuner", name)["has_factors"])
        raise UserError(f"adapter.init={adapter.init} needs adapter.dora=false and an adapter.tuner of {fitting}")
    if optimizer and not tuner["has_factors"]:
        raise UserError(
            f"adapter.optimizer={adapter.optimizer} is for LoRA's A and B: adapter.tuner={adapter.tuner} has none"
        )
    if optimizer.get("reads_gradient") and (adapter.dora or tuner["draws_in_training"]):
        cause = "adapter.dora=true" if adapter.dora else f"adapter.tuner={adapter.tuner}"
        raise UserError(
            f"adapter.optimizer={adapter.optimizer} needs layers W + s B A, which {cause} makes others in training: "
            "use adapter.tuner=lora without adapter.dora"
        )
    for key, name, found in named:
        if found and config.kind not in found["kinds"]:
            raise UserError(f"adapter.{key}={name} {found['limits']}")
    if config.model.quantization != "none":
        for key, name, found in named[:2]:
            if found and not found["quantizes"]:
                raise UserError(
                    f"model.quantization={config.model.quantization} needs another adapter.{key}, such as lora: "
                    f"adapter.{key}={name} {found['limits']}"
                )
    if init.get("corrects"):
        if config.model.quantization == "none":
            raise UserError(
                f"adapter.init={adapter.init} makes up for the rounding of a 4-bit base: set model.quantization=nf4"
            )
        if config.uses_reference_cache:
            raise UserError(
                f"adapter.init={adapter.init}: the reference is base and first adapter together, and reference.cache "
                "keeps the base's: leave reference.cache out (null)"
            )
    if adapter.dropout and not tuner["has_dropout"]:
        raise UserError(f"adapter.dropout has no effect with adapter.tuner={adapter.tuner}: set it to 0")
    if adapter.dtype == "base" and config.model.dtype != "float32" and not tuner["takes_half"]:
        raise UserError(
            f"adapter.dtype=base with model.dtype={config.model.dtype}: adapter.tuner={adapter.tuner} trains in "
            "float32 only, set adapter.dtype=float32"
        )
    if not tuner["packs"] and getattr(config.data, "packing", False):
        raise UserError(f"adapter.tuner={adapter.tuner} puts its tokens before each row: set data.packing=false")
    if not tuner["recomputes"] and config.trainer.get("gradient_checkpointing"):
        raise UserError(
            f"adapter.tuner={adapter.tuner} does not go with trainer.gradient_checkpointing: set it to false"
        )
    if not tuner["merges"] and config.export.merged:
        raise UserError(f"adapter.tuner={adapter.tuner} cannot be merged into the model: set export.merged=false")
    if config.export.ranks and not tuner["cuts_ranks"]:
        raise UserError("export.ranks is for methods that train every rank, such as dylora: leave it out")
    if config.export.ranks and config.model.quantization != "none":
        raise UserError("export.ranks are adapters on the base as published, not on a 4-bit one: leave it out")
    for rank in config.export.ranks:
        if not 1 <= rank <= adapter.rank:
            raise UserError(f"export.ranks={rank}: it must be at least 1 and at most adapter.rank={adapter.rank}")
    for name in ("svd_rank", "factors_cache"):
        if init and not init["caches"] and getattr(adapter, name) is not None:
            raise UserError(f"adapter.{name} is PiSSA's, which {adapter.init} has no use for: leave it out (null)")
    if optimizer and optimizer["replaces_adamw"]:
        chosen = config.trainer.get("optim", "adamw_torch")
        if chosen not in ("adamw_torch", "adamw_torch_fused"):
            raise UserError(
                f"adapter.optimizer={adapter.optimizer} is built on AdamW: trainer.optim={chosen} does not go with it, "
                "set adamw_torch"
            )
    _check_options(config, named)


def check_deepspeed(adapter: Any, settings: dict[str, Any]) -> None:
    """Raise UserError for a part that cannot run under DeepSpeed, or ZeRO-3, by trainer.deepspeed's settings ({}: out).
    What `accelerate launch` asks for is known, and refused, in the training only."""
    zero = settings.get("zero_optimization")
    splits = isinstance(zero, dict) and zero.get("stage") == 3
    for found in (tuner_facts(adapter), init_facts(adapter), optimizer_facts(adapter)) if settings else ():
        if why := found.get("no_deepspeed") or (splits and found.get("no_zero3")):
            raise UserError(why)


def check_typed(typed: Mapping[str, Any], config: Any) -> None:
    """Raise UserError for a key of adapter that was typed and has no effect with the tuner. A base may have it: its
    other methods use it."""
    adapter = typed.get("adapter")
    ignored = tuner_facts(config.adapter)["ignores"]
    for name in adapter if isinstance(adapter, Mapping) else ():
        if name in ignored:
            raise UserError(f"adapter.{name} has no effect with adapter.tuner={config.adapter.tuner}: leave it out")


def _check_options(config: Any, named: list[tuple[str, Any, dict[str, Any]]]) -> None:
    adapter, tuner = config.adapter, named[0][2]
    known = dict.fromkeys(tuner["layer_options"], (None, None)) | tuner["peft_options"]
    for _, _, found in named:
        known |= found.get("options", {})
    for name, value in adapter.options.items():
        if name in LAYER_OPTIONS and name in known:
            _check_layer_option(config, tuner["names_layers"], name)
            continue
        if name not in known:
            if name in _REFUSED_OPTIONS:
                raise UserError(f"adapter.options.{name} is refused: {_REFUSED_OPTIONS[name]}")
            choices = f"choose from {', '.join(known)}{nearest(name, list(known))}" if known else "there is none"
            raise UserError(f"unknown key adapter.options.{name} for adapter.tuner={adapter.tuner}: {choices}")
        default, allowed = known[name]
        other, needed = tuner["option_needs"].get(name, (None, None))
        if other is not None and adapter.options.get(other, known[other][0]) != needed:
            raise UserError(
                f"adapter.options.{name} has no effect without adapter.options.{other}={needed}: leave it out"
            )
        if isinstance(allowed, str):
            check_range(f"adapter.options.{name}", value, allowed)
            if isinstance(default, int) and not isinstance(value, int):
                raise UserError(f"adapter.options.{name}={value}: it must be a whole number")
        elif value not in allowed:
            raise UserError(f"adapter.options.{name}={value} is unknown: choose one of {', '.join(map(str, allowed))}")


def _check_layer_option(config: Any, names_layers: bool, name: str) -> None:
    value, kind = config.adapter.options[name], LAYER_OPTIONS[name]
    if name != "exclude_modules" and (config.kind == "nlu" or names_layers):
        raise UserError(
            f"adapter.options.{name} has no effect here, where PEFT is given whole paths: leave layers out by "
            "adapter.target_modules or adapter.options.exclude_modules"
        )
    if name != "exclude_modules" and config.adapter.target_modules == "all-linear":
        raise UserError(
            f"adapter.options.{name} has no effect with adapter.target_modules=all-linear, of which PEFT makes whole "
            "paths: name the kinds of layers, such as adapter.target_modules=[q_proj,v_proj]"
        )
    if name == "layers_pattern" and "layers_to_transform" not in config.adapter.options:
        raise UserError("adapter.options.layers_pattern has no effect without adapter.options.layers_to_transform")
    entries = value if isinstance(value, list) else [value]
    try:
        right = entries and all(type(one) is kind and (re.compile(one) if kind is str else one >= 0) for one in entries)
    except re.error:
        right = False
    if not right:
        word = "a name or a regular expression" if kind is str else "a whole number of at least 0"
        raise UserError(f"adapter.options.{name}={value}: it must be {word}, or a list of such")
