"""Which values a resolved configuration may have, by themselves and together; each complaint is one line with the fix.

Sections that are also made by hand, without a file (`BALoRAConfig`, `LossConfig`), check themselves.
"""

import functools
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ba_lora.config.heldout import check_heldout
from ba_lora.config.methods import check_deepspeed, check_method, check_typed
from ba_lora.config.ranges import check_numbers
from ba_lora.config.registries import inits, optimizers, tuners
from ba_lora.config.schema import ATTENTION, DTYPES, RunConfig
from ba_lora.config.schema_nlg import NLGConfig, check_nlg
from ba_lora.config.schema_nlu import NLUConfig, check_nlu
from ba_lora.config.trainer import check_trainer, deepspeed_settings
from ba_lora.errors import UserError
from ba_lora.paths import PROJECT_ROOT, resolve_path
from ba_lora.words import check_choice


def check_config(config: RunConfig) -> None:
    """Raise UserError for the first value that is unknown, out of range or does not fit another one."""
    check_numbers(config)
    _check_names(config)
    check_choice("model.dtype", config.model.dtype, DTYPES)
    check_choice("model.attention", config.model.attention, ATTENTION)
    check_choice("model.quantization", config.model.quantization, ("none", "nf4"))
    check_choice("adapter.tuner", config.adapter.tuner, tuners())
    check_choice("adapter.dtype", config.adapter.dtype, ("float32", "base"))
    if not re.fullmatch(r"pissa_niter_[1-9]\d*", config.adapter.init):
        check_choice("adapter.init", config.adapter.init, (*inits(), "pissa_niter_N"))
    if config.adapter.optimizer is not None:
        check_choice("adapter.optimizer", config.adapter.optimizer, optimizers())
    if config.adapter.svd_rank is not None and config.adapter.svd_rank < config.adapter.rank:
        raise UserError(
            f"adapter.svd_rank is {config.adapter.svd_rank}: it must be at least adapter.rank={config.adapter.rank}"
        )
    check_method(config)
    if isinstance(config, NLGConfig):
        check_nlg(config)
    elif isinstance(config, NLUConfig):
        check_nlu(config)
    _check_partners(config, config.counts_with)
    if config.hub.push and not config.hub.repo_id:
        raise UserError("hub.push=true needs hub.repo_id=<user>/<name>")
    check_trainer(config.trainer)
    check_deepspeed(config.adapter, deepspeed_settings(config.trainer))
    check_heldout(config)


def check_typed_keys(typed: Mapping[str, Any], config: RunConfig) -> None:
    """Raise UserError for a typed key that has no effect on the run."""
    check_typed(typed, config)
    _check_partners(config, {key: one for key, one in config.typed_counts_with.items() if _is_typed(typed, key)})


def _is_typed(typed: Any, key: str) -> bool:
    name, _, rest = key.partition(".")
    return isinstance(typed, Mapping) and name in typed and (not rest or _is_typed(typed[name], rest))


def _check_partners(config: RunConfig, partners: Mapping[str, tuple[Callable[[Any], bool], str]]) -> None:
    """Raise UserError for a setting that counts only beside another one, which is not there."""
    default = type(config)()
    for key, (is_there, partner) in partners.items():
        value, usual = (functools.reduce(getattr, key.split("."), one) for one in (config, default))
        if value != usual and not is_there(config):
            without = "null" if usual is None else str(usual).lower() if isinstance(usual, bool) else usual
            raise UserError(f"{key}={value} has no effect without {partner}: set {key}={without}, or that, too")


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
            raise UserError(f"{key}: {there} is a file, and a folder is needed: choose another place")
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"{key}: cannot write in {there}: {error.strerror or error}; choose another place") from error
