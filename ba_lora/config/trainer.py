"""The section `trainer` of a configuration: the names, types and ranges of transformers' TrainingArguments.

They are read from transformers' source text, which is not imported: a mistyped name is told at once, and not after the
seconds that torch takes. What only the class itself can tell follows in ba_lora/training/arguments.py.
"""

import ast
import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

from ba_lora.config.ranges import check_trainer_numbers
from ba_lora.errors import UserError
from ba_lora.io import read_json
from ba_lora.paths import resolve_path
from ba_lora.words import nearest

# TrainingArguments under which the method or a resumed run would silently be another one: the safe values, and why.
_UNSAFE_ARGUMENTS = {
    "train_sampling_strategy": (
        ["random", "sequential", "group_by_length"],
        "choose random, sequential or group_by_length (batch_rebalance has an order that no seed moves)",
    ),
    "save_on_each_node": ([False], "the nodes share one folder, and would write the same files"),
    "ddp_static_graph": ([None, False], "its first step would not be averaged over the processes"),
    "auto_find_batch_size": ([False], "the micro-batch is part of the method: set trainer.per_device_train_batch_size"),
    "average_tokens_across_devices": ([True], "the terms are means over the positions of all processes"),
    "label_smoothing_factor": ([0], "the loss has no label smoothing"),
    "save_only_model": ([False], "a killed run could not go on with its optimizer's state"),
    "ignore_data_skip": ([False], "a resumed run would see other rows"),
    "fsdp": ([None, "", []], "FSDP is not supported: use DDP or DeepSpeed"),
    "fsdp_config": ([None], "FSDP is not supported: use DDP or DeepSpeed"),
    "liger_kernel_config": ([None], "the loss is this project's own"),
    "parallelism_config": ([None], "only DDP and DeepSpeed are supported"),
    "use_liger_kernel": ([False], "the loss is this project's own: loss.implementation=fused saves the memory, too"),
}
# TrainingArguments that the run itself sets.
_RESERVED_ARGUMENTS = {
    "output_dir": "use output_dir",
    "run_name": "tracked runs have the run's id, which begins with name",
    "seed": "use seed",
    "data_seed": "use seed",
    "push_to_hub": "use hub.push",
    "hub_model_id": "use hub.repo_id",
    "hub_token": "use the environment's HF_TOKEN, or `hf auth login` (a token in a config would be published with it)",
    "local_rank": "the launcher says it; leave it out",
    "resume_from_checkpoint": "resuming is automatic; leave it out",
    "prediction_loss_only": "held-out rows have no predictions, only a loss; leave it out",
    "label_names": "the run makes the rows; leave it out",
    "remove_unused_columns": "the run makes the rows; leave it out",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "the Trainer does not read it; leave it out"),
    **dict.fromkeys(
        ("hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
        "it is for Trainer's own pushes, and the exports are pushed by hub.push",
    ),
    **dict.fromkeys(
        ("include_for_metrics", "batch_eval_metrics", "eval_do_concat_batches", "eval_accumulation_steps"),
        "it is for predictions, and an evaluation inside the training gives a loss only",
    ),
}
# What people type for a TrainingArguments name.
ALIASES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "micro_batch": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "accumulation_steps": "gradient_accumulation_steps",
    "grad_accum": "gradient_accumulation_steps",
    "warmup": "warmup_steps",
    "warmup_ratio": "warmup_steps",
    "scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "evaluation_strategy": "eval_strategy",
}
# What report_to may name → the package that it needs.
_REPORTERS = {name: name for name in ("clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "kubeflow", "mlflow")}
_REPORTERS |= {name: name for name in ("neptune", "swanlab", "tensorboard", "trackio", "wandb")}
_REPORTERS |= {"azure_ml": "azureml", "flyte": "flytekit"}
_EXTRAS = {name: f"-e '.[{name}]'" for name in ("tensorboard", "trackio", "wandb")}  # of pyproject.toml
PROJECT = "ba-lora"  # of tracked runs, where trainer.project does not say it


@functools.cache
def argument_types() -> dict[str, ast.expr]:
    """Return each TrainingArguments name with its annotation, in their order."""
    fields = next(node for node in _source("training_args") if getattr(node, "name", None) == "TrainingArguments").body
    return {
        node.target.id: node.annotation
        for node in fields
        if isinstance(node, ast.AnnAssign) and not (node.target.id.startswith("_") or "init=False" in ast.unparse(node))
    }


@functools.cache
def _choices() -> dict[str, tuple[str, ...]]:
    """Return the words of each enumeration that annotations name."""
    return {
        node.name: tuple(
            entry.value.value
            for entry in node.body
            if isinstance(entry, ast.Assign) and isinstance(entry.value, ast.Constant)
        )
        for module in ("training_args", "trainer_utils", "debug_utils")
        for node in _source(module)
        if isinstance(node, ast.ClassDef) and [getattr(base, "id", None) for base in node.bases] == ["ExplicitEnum"]
    }


@functools.cache
def _source(module: str) -> list[ast.stmt]:
    package = importlib.util.find_spec("transformers")
    if package is None or package.origin is None:
        raise UserError("transformers is not installed: run sh scripts/setup.sh")
    return ast.parse(Path(package.origin).with_name(f"{module}.py").read_text(encoding="utf-8")).body


def normalized(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with the word `no`, which YAML reads as false, where an enumeration has it."""
    return {name: "no" if value is False and name in _no_is_a_word() else value for name, value in arguments.items()}


@functools.cache
def _no_is_a_word() -> set[str]:
    return {
        name
        for name, annotation in argument_types().items()
        if any("no" in _choices().get(kind, ()) for kind in _kinds(annotation))
    }


def check_trainer(arguments: dict[str, Any]) -> None:
    """Raise UserError for a name that TrainingArguments lacks or the run sets, and for a value that it cannot have."""
    types = argument_types()
    for name, value in arguments.items():
        if name in _RESERVED_ARGUMENTS:
            raise UserError(f"trainer.{name} is set by the run itself: {_RESERVED_ARGUMENTS[name]}")
        if name not in types:
            raise UserError(f"unknown key trainer.{name}{nearest_argument(name)} (transformers.TrainingArguments)")
        if name == "accelerator_config" and isinstance(value, dict) and value.get("split_batches"):
            raise UserError("trainer.accelerator_config.split_batches=true is refused: the batch sizes are per process")
        if name == "accelerator_config" and isinstance(value, dict) and not value.get("even_batches", True):
            raise UserError("trainer.accelerator_config.even_batches=false is refused: processes would wait for others")
        safe, reason = _UNSAFE_ARGUMENTS.get(name, ([value], ""))
        if value not in safe:
            raise UserError(f"trainer.{name}={value} is refused: {reason}")
        _check_type(name, value, types[name])
    check_trainer_numbers(arguments)
    if arguments.get("save_total_limit") == 1:
        raise UserError(
            "trainer.save_total_limit=1 leaves nothing to fall back to if the last checkpoint is damaged: use 2"
        )
    _check_report_to(arguments)


def nearest_argument(name: str) -> str:
    """Return ` (nearest: trainer.a, …)`, or nothing: what is meant by a word that people use comes first."""
    if name in ALIASES or name in argument_types():
        return f" (nearest: trainer.{ALIASES.get(name, name)})"
    return nearest(f"trainer.{name}", [f"trainer.{known}" for known in argument_types()])


def _kinds(annotation: ast.expr) -> list[str]:
    """Return the members of a union as text, such as ["dict[str, Any]", "str", "None"]."""
    if isinstance(annotation, ast.BinOp):
        return [*_kinds(annotation.left), *_kinds(annotation.right)]
    return [ast.unparse(annotation)]


def _check_type(name: str, value: object, annotation: ast.expr) -> None:
    kinds = _kinds(annotation)
    words = [word for kind in kinds for word in _choices().get(kind, ())]
    if words:  # `SchedulerType | str`: any of the words
        if value not in words:
            raise UserError(
                f"trainer.{name}={value} is unknown: choose one of {', '.join(words)}{nearest(str(value), words)}"
            )
        return
    if any(_is_of(value, kind) for kind in kinds):
        return
    raise UserError(f"trainer.{name}={value}: it must be {' or '.join(dict.fromkeys(map(_described, kinds)))}")


def _described(kind: str) -> str:
    words = {"int": "a whole number", "float": "a finite number", "bool": "true or false", "str": "text"}
    words |= {"dict": "a mapping", "list": "a list", "None": "null"}
    return words.get(kind.partition("[")[0], kind)


def _is_of(value: object, kind: str) -> bool:
    if kind.startswith("list"):
        return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    if kind.startswith("dict"):
        return isinstance(value, dict)
    if kind.startswith("Literal"):
        return repr(value) in kind
    if kind == "float":
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, {"bool": bool, "str": str, "None": type(None)}.get(kind, ()))


def deepspeed_settings(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return what trainer.deepspeed holds or names, {} where it is left out; UserError for a file that is none."""
    settings = arguments.get("deepspeed")
    if not isinstance(settings, str):
        return settings or {}
    file = resolve_path(settings)
    try:
        found = read_json(file)
    except UserError as error:
        raise UserError(f"trainer.deepspeed: {error}; configs/deepspeed has files of its kind") from error
    if not isinstance(found, dict):
        raise UserError(f"trainer.deepspeed: {file} holds no JSON object; configs/deepspeed has files of its kind")
    return found


def reporters(arguments: dict[str, Any]) -> list[str]:
    """Return what report_to asks for, by name; `all` is all that are installed."""
    asked = arguments.get("report_to")
    names = [asked] if isinstance(asked, str) else asked or []
    if "all" in names:
        names = [*names, *(name for name, package in _REPORTERS.items() if importlib.util.find_spec(package))]
    return [name for name in dict.fromkeys(names) if name not in ("none", "all")]


def _check_report_to(arguments: dict[str, Any]) -> None:
    for name in reporters(arguments):
        if name not in _REPORTERS:
            known = sorted(["none", *_REPORTERS])
            raise UserError(f"trainer.report_to={name} is unknown: choose of {', '.join(known)}{nearest(name, known)}")
        package = _REPORTERS[name]
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"trainer.report_to={name} needs the package {package}, which is not installed: run .venv/bin/pip "
                f"install {_EXTRAS.get(name, package)}, or leave report_to out"
            )
