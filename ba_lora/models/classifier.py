"""A pre-trained encoder (or GPT-2) with a new classification head, and how to look inside it.

Head: every module outside the pre-trained backbone: BERT's `classifier`, RoBERTa's two-layer one, DeBERTa's `pooler`
and `classifier`, GPT-2's `score`. It is drawn at random from the seed, so that all methods of one seed start alike.
Pooled features [N, hidden]: what the last hidden states hand to the head, at [CLS] or (GPT-2) the last token.
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ba_lora.config.schema_nlu import NLUConfig
from ba_lora.errors import UserError
from ba_lora.glue import NLUTask, find_task
from ba_lora.models.load import keep_4bit_layout, quantization_options, torch_dtype, without_load_report
from ba_lora.models.source import hub_errors, model_source
from ba_lora.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def load_classifier(config: NLUConfig, *, source: str | None = None, quantize: bool = True) -> "PreTrainedModel":
    """Return the model with a head for the task, in `model.dtype`, from `source` where given (merged/, say).

    A head that `source` does not hold is drawn from `config.seed`, without touching the global random state.
    Raises UserError where anything but the head is missing.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    import ba_lora.models.t5_encoder as t5  # also registers it with the Auto classes

    settings = config.model
    options = quantization_options(settings, skip=["pooler", "classifier", "score"]) if quantize else {}
    where = source or model_source(settings)
    revision = None if source else settings.revision
    with hub_errors(settings.name, "model"), without_load_report():
        model_config = AutoConfig.from_pretrained(
            where, revision=revision, trust_remote_code=settings.trust_remote_code
        )
        if model_config.model_type == "t5":
            model_config = t5.T5EncoderConfig.from_dict(model_config.to_dict() | {"model_type": "t5_encoder"})
        _set_labels(model_config, find_task(config.nlu.task))
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                where,
                config=model_config,
                revision=revision,
                dtype=torch_dtype(settings.dtype),
                attn_implementation=settings.attention,
                trust_remote_code=settings.trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    keep_4bit_layout(model)
    heads = head_names(model)
    missing = sorted(name for name in report["missing_keys"] if name.split(".")[0] not in heads)
    if missing:
        raise UserError(f"{settings.name} lacks weights of the pre-trained model: {', '.join(missing[:3])}, …")
    if "score" in heads:  # it looks for the last token that is not this one, which is what rows are padded with
        model.config.pad_token_id = load_tokenizer(settings, generates=False).pad_token_id
    return model


def _set_labels(model_config: "PretrainedConfig", task: NLUTask) -> None:
    names = task.labels or ("score",)
    model_config.id2label = dict(enumerate(names))  # also sets num_labels
    model_config.label2id = {name: number for number, name in enumerate(names)}
    model_config.problem_type = "regression" if task.is_regression else "single_label_classification"
    if model_config.pad_token_id is None:  # GPT-2: it looks for the last token that is no padding
        model_config.pad_token_id = model_config.eos_token_id


def backbone(model: nn.Module) -> nn.Module:
    """Return the pre-trained part of a classifier."""
    return getattr(model, model.base_model_prefix)


def head_names(model: nn.Module) -> list[str]:
    """Return the names of the modules outside the pre-trained part that hold weights, in the order they run."""
    pretrained = backbone(model)
    shared = {id(parameter) for parameter in pretrained.parameters()}  # T5 keeps its embedding beside the encoder
    names = [
        name
        for name, module in model.named_children()
        if module is not pretrained and any(id(parameter) not in shared for parameter in module.parameters())
    ]
    if not names:
        raise UserError(f"this {model.config.model_type} model has no classification head to train")
    return names


def encoder_linear_names(model: nn.Module) -> list[str]:
    """Return the linear layers of the pre-trained part but its pooler (BERT's, a part of the head in all but name)."""
    from transformers.pytorch_utils import Conv1D

    inside = {id(module) for module in backbone(model).modules()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) in inside and "pooler" not in name.split(".")
    ]


class Head:
    """A copy of a head's modules that can be run on pooled features, frozen as they were when it was made."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = nn.ModuleList(copy.deepcopy(module).eval().requires_grad_(False) for module in modules)

    def __call__(self, pooled_ND: Tensor) -> Tensor:
        """[N, hidden] → logits [N, D]."""
        return run_head(self.modules, pooled_ND)

    def to(self, device: torch.device | str) -> "Head":
        self.modules.to(device)
        return self


def live_head(model: nn.Module) -> list[nn.Module]:
    """Return the head's modules as they are trained now; PEFT's wrappers taken off."""
    base = unwrapped(model)
    modules = [getattr(base, name) for name in head_names(base)]
    return [
        module.modules_to_save[module.active_adapter] if hasattr(module, "modules_to_save") else module
        for module in modules
    ]


def run_head(modules: list[nn.Module] | nn.ModuleList, pooled_ND: Tensor) -> Tensor:
    """Return the head's logits [N, D] for pooled features [N, hidden].

    Modules that are no plain linear layer (DeBERTa's pooler, RoBERTa's classifier) take a sequence and use its first
    position: they get one of length 1. Features of another dtype than the head's weights (those of a cache, or a bf16
    encoder's under a float32 probe) are cast to it.
    """
    pooled_ND = pooled_ND.to(next(modules[0].parameters()).dtype)
    for number, module in enumerate(modules):
        if isinstance(module, nn.Linear):
            if number and isinstance(modules[number - 1], nn.Linear):  # DistilBERT's two layers have this between
                pooled_ND = pooled_ND.relu()
            pooled_ND = module(pooled_ND)
        else:
            pooled_ND = module(pooled_ND[:, None])
            pooled_ND = pooled_ND[:, 0] if pooled_ND.ndim == 3 else pooled_ND  # ModernBERT's keeps the position
    return pooled_ND


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the transformers model inside DDP's and PEFT's wrappers."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def catch_pooled(model: nn.Module, inputs: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Put `pooled` [N, hidden] into the dictionary it yields when `model` runs on `inputs`: the input of the head.

    In training mode it carries the dropout that the architecture applies before its head.
    """
    base = unwrapped(model)
    caught: dict[str, Tensor] = {}

    def catch(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        hidden = arguments[0]
        if hidden.ndim == 3:  # [N, T, hidden]: the head picks the position itself
            if "score" in head_names(base):  # as GPT-2: at the last real token
                last_N = _last_token(inputs, base.config.pad_token_id)
                hidden = hidden[torch.arange(len(hidden), device=hidden.device), last_N]
            else:
                hidden = hidden[:, 0]
        caught["pooled"] = hidden

    handle = getattr(base, head_names(base)[0]).register_forward_pre_hook(catch)
    try:
        yield caught
    finally:
        handle.remove()


def _last_token(inputs: dict[str, Tensor], pad_token_id: int) -> Tensor:
    """Return the position of each row's rightmost token that is no padding, [N], as GPT-2's head finds it."""
    ids_NT = inputs["input_ids"]
    positions_T = torch.arange(ids_NT.shape[1], device=ids_NT.device)
    return (positions_T * (ids_NT != pad_token_id)).argmax(-1)


def check_head(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Raise UserError where the head, run by itself on the pooled features, does not give the model's own logits.

    `model` is in evaluation mode, and the autocast that it trains under, if any, is on: its own forward brings that
    along, its head by itself does not.
    """
    with torch.no_grad(), catch_pooled(model, inputs) as caught:
        logits = model(**inputs).logits
        ours = run_head(live_head(model), caught["pooled"])
    if ours.shape != logits.shape or not torch.allclose(ours.float(), logits.float(), atol=1e-2, rtol=1e-2):
        kind = unwrapped(model).config.model_type
        raise UserError(f"the classification head of this {kind} model is of an unknown form: BA-LoRA cannot run it")
