"""Which values a resolved configuration may have, by themselves and together; each complaint is one line with the fix.

Sections that are also made by hand, without a file (`BALoRAConfig`, `LossConfig`), check themselves.
"""

import functools
import re
import tempfile
from pathlib import Path
from typing import Any

from ba_lora.config.heldout import check_heldout
from ba_lora.config.ranges import check_numbers
from ba_lora.config.registries import tuners
from ba_lora.config.schema import ATTENTION, DTYPES, RunConfig, check_choice
from ba_lora.config.schema_nlg import NLGConfig, check_nlg
from ba_lora.config.schema_nlu import NLUConfig, check_nlu
from ba_lora.config.trainer import check_trainer
from ba_lora.errors import UserError
from ba_lora.paths import PROJECT_ROOT, resolve_path
from ba_lora.words import nearest

# adapter.options: what PEFT's config of a tuner takes beyond the keys of `adapter` and what leaves reference, loss and
# export as they are. The rest is refused: PEFT has variants that train other weights, add a loss or change the base.
_LAYERS = ("exclude_modules", "layers_to_transform", "layers_pattern")
_OPTIONS = {
    "lora": _LAYERS,
    "adalora": (*_LAYERS, "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"),
    "loha": (*_LAYERS, "rank_dropout"),
}
_OTHER_WEIGHTS = "it trains weights unknown to reference and export"
_REFUSED_OPTIONS = {
    **dict.fromkeys(
        ("modules_to_save", "bias", "lora_bias", "trainable_token_indices", "target_parameters"), _OTHER_WEIGHTS
    ),
    "monteclora_config": "its KL term would not be in the loss",
    "kasa_config": "it changes the base's weights, which reference and export take for the pre-trained ones",
    **dict.fromkeys(
        ("r", "init_r", "target_r", "alpha", "lora_alpha", "lora_dropout", "module_dropout", "use_rslora", "use_dora",
         "init_lora_weights", "target_modules", "task_type", "peft_type", "revision", "inference_mode", "rank_pattern",
         "alpha_pattern", "total_step"),
        "it is set by the run itself: use the keys of adapter",
    ),
}  # fmt: skip


def check_config(config: RunConfig) -> None:
    """Raise UserError for the first value that is unknown, out of range or does not fit another one."""
    check_numbers(config)
    _check_names(config)
    check_choice("model.dtype", config.model.dtype, DTYPES)
    check_choice("model.attention", config.model.attention, ATTENTION)
    check_choice("model.quantization", config.model.quantization, ("none", "nf4"))
    check_choice("adapter.tuner", config.adapter.tuner, tuners())
    check_choice("adapter.dtype", config.adapter.dtype, ("float32", "base"))
    if not re.fullmatch(r"lora|pissa|pissa_niter_[1-9]\d*|corda", config.adapter.init):
        raise UserError(f"adapter.init={config.adapter.init} is unknown: choose lora, pissa, pissa_niter_N or corda")
    if config.adapter.svd_rank is not None and config.adapter.svd_rank < config.adapter.rank:
        raise UserError(
            f"adapter.svd_rank is {config.adapter.svd_rank}: it must be at least adapter.rank={config.adapter.rank}"
        )
    if config.adapter.init != "lora" and (config.adapter.tuner != "lora" or config.adapter.dora):
        raise UserError(f"adapter.init={config.adapter.init} needs adapter.tuner=lora and adapter.dora=false")
    if config.model.quantization == "nf4" and config.adapter.tuner != "lora":
        raise UserError("model.quantization=nf4 needs adapter.tuner=lora: quantised weights cannot be trained")
    if config.adapter.init == "corda" and (config.kind != "nlg" or config.model.quantization != "none"):
        raise UserError("adapter.init=corda runs training rows through a language model: not for NLU, nor for nf4")
    for name in ("svd_rank", "factors_cache"):
        if config.adapter.init == "corda" and getattr(config.adapter, name) is not None:
            raise UserError(f"adapter.{name} is PiSSA's, CorDA's factors depend on the rows: leave it out (null)")
    _check_options(config.adapter.tuner, config.adapter.options)
    if isinstance(config, NLGConfig):
        check_nlg(config)
    elif isinstance(config, NLUConfig):
        check_nlu(config)
    _check_partners(config)
    if config.hub.push and not config.hub.repo_id:
        raise UserError("hub.push=true needs hub.repo_id=<user>/<name>")
    check_trainer(config.trainer)
    check_heldout(config)


def _check_partners(config: RunConfig) -> None:
    """Raise UserError for a setting that counts only beside another one, which is not there."""
    default = type(config)()
    for key, (is_there, partner) in config.counts_with.items():
        value, usual = (functools.reduce(getattr, key.split("."), one) for one in (config, default))
        if value != usual and not is_there(config):
            without = "null" if usual is None else str(usual).lower() if isinstance(usual, bool) else usual
            raise UserError(f"{key}={value} has no effect without {partner}: set {key}={without}, or that, too")


def _check_options(tuner: str, options: dict[str, Any]) -> None:
    known = _OPTIONS.get(tuner, ())
    for name in options:
        if name in known:
            continue
        if name in _REFUSED_OPTIONS:
            raise UserError(f"adapter.options.{name} is refused: {_REFUSED_OPTIONS[name]}")
        choices = f"choose from {', '.join(known)}{nearest(name, list(known))}" if known else "there is none"
        raise UserError(f"unknown key adapter.options.{name} for adapter.tuner={tuner}: {choices}")


def _check_names(config: RunConfig) -> None:
    """Raise UserError for a name that would become another path or another command than the one meant."""
    if not config.model.name:
        raise UserError("model.name is missing: name a hub id or a folder")
    for key, name in (("model.name", config.model.name), ("model.revision", config.model.revision or "main")):
        if name.startswith("-") or not name.isprintable():
            raise UserError(f"{key}={name!r} is no name: it starts with a dash or holds a control character")
    sources = config.data.source if isinstance(config.data.source, list) else [config.data.source or "-"]
    if not sources or not all(isinstance(source, str) for source in sources):
        raise UserError(f"data.source={config.data.source}: a file, a list of files or a hub set is needed")
    for key in ("name", "method"):  # parts of the run's folder
        value = getattr(config, key)
        if not value.isprintable() or value.startswith((".", "-")) or "/" in value or "\\" in value:
            raise UserError(
                f"{key}={value!r} becomes part of a folder's name: it may hold no slash and no control character, and "
                "must not begin with a dot or dash"
            )
    modules = config.adapter.target_modules
    if not (isinstance(modules, str) or (isinstance(modules, list) and all(isinstance(m, str) for m in modules))):
        raise UserError(f"adapter.target_modules={modules}: it must be all-linear or a list of module names")


def check_places(config: RunConfig) -> None:
    """Raise UserError where the run could not write, now and not after the work. What is tried leaves no trace."""
    path = config.run_path.resolve()
    if path == Path.home() or path in (PROJECT_ROOT, *PROJECT_ROOT.parents):
        raise UserError(f"output_dir={config.output_dir}: {path} is no place for a run; name a folder of its own")
    check_place(path, "output_dir")
    check_place(config.result_path.parent, "results_dir")
    caches = {"reference.cache": config.reference.cache, "adapter.factors_cache": config.adapter.factors_cache}
    for key, folder in caches.items():
        if folder is not None:
            check_place(resolve_path(folder), key)


def check_place(folder: Path, key: str) -> None:
    """Raise UserError unless files can be made in a folder, which itself may still have to be made."""
    there = folder.absolute()
    try:
        while not there.exists():
            there = there.parent
        if not there.is_dir():
            raise UserError(f"{key}: {there} is a file, and a folder is needed")
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"{key}: cannot write in {there}: {error.strerror or error}") from error
