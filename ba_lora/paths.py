"""Where things are: the project's root, and what a relative path counts from."""

import os
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parent.parent
LOCAL_SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".tsv")  # of data files; .gz may follow
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's names of its files


def data_suffix(path: Path) -> str:
    """Return which of LOCAL_SUFFIXES a file's name ends in, before a .gz; another ending as it is."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def user_folder() -> Path:
    """Return the folder that the user's relative paths count from: BA_LORA_FOLDER, which scripts and stages set since
    they work in the project's root, else the current one."""
    return Path(os.environ.get("BA_LORA_FOLDER") or Path.cwd())


def stage_environment() -> dict[str, str]:
    """Return the environment of a child process to which relative paths mean what they mean here."""
    return os.environ | {"BA_LORA_FOLDER": str(user_folder())}


def resolve_path(path: str | Path) -> Path:
    """Return `path`, absolute: below the user's folder, or below the project's root where it is not there."""
    path = Path(os.path.expanduser(path))  # a user who is not there is left as it is, and no such file
    own = (user_folder() / path).absolute()
    return own if own.exists() else PROJECT_ROOT / path


def written_path(path: str | Path) -> Path:
    """Return `path`, absolute: below the user's folder. For what is typed to be written to, there or not."""
    return user_folder().absolute() / os.path.expanduser(path)


def resolve_data(data: str) -> str:
    """Return the absolute path (see `resolve_path`) of a data file, which exists or has a data file's suffix; a hub's
    name as it is."""
    path = resolve_path(data)
    return str(path) if path.exists() or data_suffix(path) in LOCAL_SUFFIXES else data


def no_such_file(path: Path) -> str:
    """Return the words for a file that is not there, with both places of `resolve_path` where it looked in both."""
    if path.is_relative_to(PROJECT_ROOT) and not user_folder().samefile(PROJECT_ROOT):
        return f"no such file: {path}, nor {user_folder() / path.relative_to(PROJECT_ROOT)}"
    return f"no such file: {path}"
