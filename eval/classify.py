"""A trained classifier's logits for the examples of a set."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ba_lora.config.schema import ModelConfig
from ba_lora.errors import UserError
from ba_lora.glue import NLUTask
from ba_lora.paths import ADAPTER_CONFIG

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MAX_LENGTH = 512


@dataclass(frozen=True)
class Classifier:
    """A model with its tokenizer. order: for each class of the task, in its order, the model's output for it."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    order: list[int]
    max_length: int


def open_classifier(folder: Path, task: NLUTask, *, max_length: int | None = None) -> Classifier:
    """Return the trained classifier in `folder`, on the GPU where there is one, else in float32 on the CPU.

    max_length: tokens at most of a text or pair; None: 512, or what the model takes if that is less. Raises UserError
    for a folder that is no classifier, whose head is not trained, or whose classes are not the task's.
    """
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    import ba_lora.models.t5_encoder  # noqa: F401  makes the Auto classes know the T5 encoder
    from ba_lora.models.tokenizer import load_tokenizer

    if (folder / ADAPTER_CONFIG).is_file():
        return _open_adapter(folder, task, max_length=max_length)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no model: give a run's folder with merged/, or a model folder")
    on_gpu = torch.cuda.is_available()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a missing head is reported below, in one line
    try:
        tokenizer = load_tokenizer(ModelConfig(name=str(folder)), generates=False)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype="auto" if on_gpu else torch.float32, use_safetensors=True, output_loading_info=True
        )
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no model for sequence classification: {str(error).splitlines()[0]}") from error
    finally:
        logging.set_verbosity(verbosity)
    if report["missing_keys"]:
        raise UserError(f"{folder} has no trained head: {', '.join(sorted(report['missing_keys']))} are missing")
    return _ready(model, tokenizer, folder, task, max_length=max_length)


def _open_adapter(folder: Path, task: NLUTask, *, max_length: int | None) -> Classifier:
    """Return the classifier of a run whose method cannot be merged: adapter/ on its base."""
    from peft import PeftModel

    from ba_lora.config.layers import load_run
    from ba_lora.methods.base import import_tuners
    from ba_lora.models.pretrained import load_base
    from ba_lora.models.tokenizer import load_tokenizer

    config = load_run(folder.parent)
    import_tuners()
    model = PeftModel.from_pretrained(load_base(config, quantize=False), folder)
    tokenizer = load_tokenizer(config.model, generates=False)
    return _ready(model, tokenizer, folder, task, max_length=max_length)


def _ready(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    task: NLUTask,
    *,
    max_length: int | None,
) -> Classifier:
    import torch

    order = _class_order(model.config.id2label, task, folder)
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", DEFAULT_MAX_LENGTH))
    limit = min(max_length or DEFAULT_MAX_LENGTH, longest)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Classifier(model.eval().to(device), tokenizer, order, limit)


def _class_order(id2label: dict[int, str], task: NLUTask, folder: Path) -> list[int]:
    names = [id2label[index] for index in range(len(id2label))]
    if len(names) != task.num_labels:
        raise UserError(
            f"{folder} has {len(names)} outputs ({', '.join(names)}) and the task needs {task.num_labels}: "
            "was it trained on another task?"
        )
    if task.is_regression or names == [f"LABEL_{index}" for index in range(len(names))]:  # unnamed: in GLUE's order
        return list(range(len(names)))
    if set(names) != set(task.labels):
        raise UserError(f"{folder} predicts {', '.join(names)}; the task's classes are {', '.join(task.labels)}")
    return [names.index(name) for name in task.labels]


def classify(classifier: Classifier, texts: Sequence[tuple[str, ...]], *, batch_size: int = 64) -> tuple["Tensor", int]:
    """Return logits [N, D] in the task's order of classes, and how many texts or pairs were cut (the longer first)."""
    from datasets import Dataset
    from transformers import DataCollatorWithPadding

    from ba_lora.models.predict import predict
    from ba_lora.models.tokenizer import encode_texts

    columns, num_cut = encode_texts(classifier.tokenizer, texts, max_length=classifier.max_length)
    found = predict(
        classifier.model,
        Dataset.from_dict(columns),
        DataCollatorWithPadding(classifier.tokenizer),
        batch_size=batch_size,
        pooled=False,
    )
    return found.logits[:, classifier.order], num_cut
