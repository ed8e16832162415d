"""Where a grid's commands run: an executor is a file of this folder that sets `EXECUTOR`, its settings are a file of
configs/executors.

A file of configs/executors names the executor, `executor: slurm`, and has its settings beside that word.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ba_lora.config.layers import read_yaml
from ba_lora.config.structured import read_mapping
from ba_lora.errors import UserError
from ba_lora.experiments.executors.base import Executor
from ba_lora.paths import PROJECT_ROOT, resolve_path
from ba_lora.words import nearest

EXECUTORS_PATH = PROJECT_ROOT / "configs" / "executors"


def open_executor(
    name: str, typed: Mapping[str, Any], *, folder: Path, gpus: int, workers: int | None = None
) -> Executor:
    """Return the executor of a file in configs/executors, by its name or path, with the `typed` settings over it.

    Raises UserError for a file, an executor or a setting that is not there, and for one that cannot be used here.
    """
    executor, settings = find_executor(name, typed)
    return executor.open(settings, folder=folder, gpus=gpus, workers=workers)


def find_executor(name: str, typed: Mapping[str, Any]) -> tuple[type[Executor], Any]:
    """Return the class and the settings. Raises UserError for a file, an executor or a setting that is not there."""
    path = resolve_path(name) if name.endswith((".yaml", ".yml")) else EXECUTORS_PATH / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in EXECUTORS_PATH.glob("*.yaml"))
        raise UserError(f"executor={name}: no such file: {path}{nearest(name, known)}; there are {', '.join(known)}")
    settings = {**read_yaml(path), **typed}
    kind = settings.pop("executor", None)
    files = Path(__file__).parent.glob("*.py")
    kinds = sorted(file.stem for file in files if "\nEXECUTOR = " in file.read_text(encoding="utf-8"))
    if kind not in kinds:
        raise UserError(f"{path}: executor: {kind} is unknown{nearest(kind, kinds)}; there are {', '.join(kinds)}")
    executor = importlib.import_module(f"{__name__}.{kind}").EXECUTOR
    return executor, read_mapping(executor.settings_kind, settings, where=path)
