"""From the pre-trained model to the model that is trained: the method's parts do it, this file chooses and checks.

The first factors of an init (PiSSA, CorDA, …) are saved with the run: a resumed run builds the very same model from
them.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ba_lora.config.schema import AdapterConfig, RunConfig
from ba_lora.errors import UserError, in_one_line
from ba_lora.methods import pissa
from ba_lora.methods.base import DEFAULT, Init, TrainingMethod, TrainingRows
from ba_lora.models.pretrained import load_base
from ba_lora.words import nearest

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from torch import nn


@dataclasses.dataclass
class StepZero:
    """How far the untrained model stands from the pre-trained one: the largest |Δ logit| on the probe batch.

    The residual of PiSSA and CorDA is rounded to the base's dtype: small there, 0 for methods that do not change it.
    Of a method that starts from the quantised weights themselves (QLoRA) the quantised model is the pre-trained one.
    None where it cannot be measured: weights split by ZeRO-3 cannot run outside the engine, and a resumed QPiSSA run
    no longer loads the unquantised model.
    """

    difference: float | None
    initial_logits: "torch.Tensor | None" = None  # the untrained model's own on the probe

    def __str__(self) -> str:
        if self.difference is None:
            return "distance to the pre-trained model at step 0 not measured"
        return f"largest logit difference to the pre-trained model at step 0: {self.difference:.2g}"


def build_model(
    config: RunConfig,
    *,
    run_path: Path,
    num_steps: int,
    probe: dict | None = None,
    rows: "Dataset | None" = None,
) -> tuple["nn.Module", StepZero]:
    """Load the pre-trained model and return it ready to train (all weights, or a PEFT model) and its `StepZero`.

    `num_steps` is the number of optimizer steps (AdaLoRA's schedule needs it), `rows` are the tokenized training rows
    (data-driven inits need them). Where `run_path` holds the first factors of an init, they are used instead of new
    ones. Raises UserError for settings that do not fit the model.
    """
    before = {}

    def measure(base: "nn.Module") -> "nn.Module":
        if probe is not None and not is_deepspeed_zero3_enabled():
            before["logits"] = probe_logits(base, probe)
        return base

    from transformers.integrations import is_deepspeed_zero3_enabled

    method = TrainingMethod.of(config.adapter, seed=config.seed)
    if is_deepspeed_zero3_enabled() and method.tuner.no_zero3:
        raise UserError(method.tuner.no_zero3)
    model = _build(method, config, run_path, num_steps, measure, rows)
    model.training_method = method
    if "logits" not in before:
        return model, StepZero(None)
    initial = probe_logits(model, probe)
    return model, StepZero((initial - before["logits"]).abs().max().item(), initial)


def probe_logits(model: "nn.Module", probe: dict) -> "torch.Tensor":
    """Return float32 logits on the CPU, in evaluation mode: of the batch `probe` at its real tokens, [tokens, V], or of
    a classifier for its rows, [N, D]."""
    import torch

    device = next(model.parameters()).device
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(**{name: tensor.to(device) for name, tensor in probe.items()}).logits
    model.train(training)
    if logits.ndim == 3:
        mask = probe["attention_mask"].bool().to(logits.device)
        logits = logits[:, -mask.shape[1] :][mask]  # virtual tokens may stand before them
    return logits.float().cpu()


def _build(
    method: TrainingMethod,
    config: RunConfig,
    run_path: Path,
    num_steps: int,
    measure: Callable[["nn.Module"], "nn.Module"],
    rows: "Dataset | None",
) -> "nn.Module":
    adapter, tuner = config.adapter, method.tuner
    if tuner.own_weights:
        if config.model.dtype == "float16":
            raise UserError("this method cannot train float16 weights: use model.dtype=float32 or bfloat16")
        model = measure(_to_device(load_base(config)))
        tuner.choose(model)
        return model
    if adapter.dtype == "base" and config.model.dtype == "float16":
        raise UserError("float16 adapters cannot be trained: use adapter.dtype=float32")
    given = None if rows is None else TrainingRows(rows, config.seed)
    if given is None and any(part is not None and part.needs_rows for part in (tuner, method.init)):
        raise UserError(f"method {config.method} runs training rows first, and none were given to build_model")
    if method.init is not None:
        model = _build_on_factors(method, method.init, config, run_path, num_steps, measure, given)
    else:
        model = _with_adapter(measure(_to_device(load_base(config))), config, num_steps, method)
    tuner.choose_weights(model, pissa.factors_path(run_path), given)
    tuner.prepare(model)
    if method.optimizer is not None:
        method.optimizer.prepare(model)
    return model


def _to_device(model: "nn.Module") -> "nn.Module":
    """Move the model to this process's GPU before the SVDs, unless ZeRO-3 or quantisation has placed it."""
    from accelerate import PartialState
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled() or getattr(model, "is_quantized", False):
        return model
    return model.to(PartialState().device)


def _build_on_factors(
    method: TrainingMethod,
    init: Init,
    config: RunConfig,
    run_path: Path,
    num_steps: int,
    measure: Callable[["nn.Module"], "nn.Module"],
    rows: TrainingRows | None,
) -> "nn.Module":
    """A₀ and B₀ by an init. Of QPiSSA the residual is made in full precision, in the host's memory, then quantised; of
    LoftQ the factors are those of the rounding."""
    from accelerate import PartialState
    from transformers.integrations import is_deepspeed_zero3_enabled

    quantized = config.model.quantization != "none"
    factors, residual = pissa.factors_path(run_path), run_path / "residual"
    has_factors = factors.is_file()
    has_base = has_factors and (residual.is_dir() or not init.residual)
    PartialState().wait_for_everyone()  # no process may write the files before every process has looked for them
    if not (quantized and has_base):
        if init.no_zero3 and not has_factors and is_deepspeed_zero3_enabled():
            raise UserError(init.no_zero3)
        model = load_base(config, quantize=False)
        model = _with_adapter(measure(model if quantized else _to_device(model)), config, num_steps, method)
        if not has_factors:
            init.write_factors(model, factors, config, rows)
        model = init.load_factors(model, factors)
    if quantized:
        if not has_base:
            if init.residual:
                pissa.save_residual(model, residual)
            del model
        source = str(residual) if init.residual else None
        model = _with_adapter(load_base(config, source=source), config, num_steps, method)
        pissa.load_factors(model, factors, subtract=False)
    if init.residual:
        model.peft_config[DEFAULT].init_lora_weights = config.adapter.init
    if init.corrects:  # PEFT's own mark of an adapter that is for a rounded base
        model.peft_config[DEFAULT].loftq_config = {"loftq_bits": 4, "loftq_iter": 1}
    return model


def _with_adapter(model: "nn.Module", config: RunConfig, num_steps: int, method: TrainingMethod) -> "nn.Module":
    from peft import get_peft_model

    adapter = config.adapter
    targets = _check_targets(model, config, method)
    peft_config = method.tuner.peft_config(num_steps)
    if hasattr(peft_config, "target_modules"):
        chosen = adapter.target_modules
        peft_config.target_modules = (
            chosen if chosen == "all-linear" else {chosen} if isinstance(chosen, str) else set(chosen)
        )
        if config.kind == "nlu" or method.tuner.names_layers:
            peft_config.target_modules = set(targets)
        method.tuner.set_layers(peft_config, targets)
        _leave_experts_out(model, peft_config, adapter)
    if config.kind == "nlu":  # the head is trained whole; `all-linear` would take parts of it for the encoder's
        from ba_lora.models.classifier import head_names

        others = head_names(model)
        if method.tuner.holds_head:
            peft_config.task_type, others = None, others[1:]
        else:
            peft_config.task_type = "SEQ_CLS"  # by which PEFT trains `classifier` and `score` of itself
            others = [name for name in others if name not in ("classifier", "score")]
        peft_config.modules_to_save = others or None
    peft_config.revision = config.model.revision
    try:
        model = get_peft_model(model, peft_config, autocast_adapter_dtype=adapter.dtype == "float32")
    except UserError:
        raise
    except ValueError as error:  # no layer is left, for example
        raise UserError(f"adapter.target_modules, adapter.options: {in_one_line(error)}") from error
    if adapter.dtype == "base":  # also after a checkpoint is loaded, which PEFT would make float32
        model.load_adapter = functools.partial(model.load_adapter, autocast_adapter_dtype=False)
        dtype = next(p.dtype for p in model.parameters() if not p.requires_grad)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    if config.trainer.get("gradient_checkpointing"):
        model.enable_input_require_grads()
    return model


def _leave_experts_out(model: "nn.Module", peft_config: Any, adapter: AdapterConfig) -> None:
    """Keep PEFT from training fused experts and routers, which it adds where it finds `all-linear` or their old names.

    PiSSA and CorDA have no factors for those three-dimensional weights, and LoRA is to be compared with them on the
    same layers. Raises UserError where the configuration names such layers itself.
    """
    import peft
    from packaging.version import Version

    if Version(peft.__version__) < Version("0.19"):  # which adds none
        return
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    found = copy.deepcopy(peft_config)
    try:
        convert_peft_config_for_transformers(found, model, None)
    except ValueError as error:
        raise UserError(f"adapter.target_modules: {in_one_line(error)}: leave the experts' layers out") from error
    if not getattr(found, "target_parameters", None):
        return
    if adapter.target_modules != "all-linear":
        taken = ", ".join(sorted(set(peft_config.target_modules) - set(found.target_modules)))
        raise UserError(
            f"adapter.target_modules: PEFT would train the fused experts of this {model.config.model_type} model for "
            f"{taken}, and PiSSA has no factors for them: name other layers, or all-linear, which leaves them out"
        )
    peft_config.target_modules = found.target_modules


def left_out_experts(model: "nn.Module") -> str | None:
    """Return the line that says which layers of a model with fused experts have an adapter; None for other models."""
    settings = getattr(model, "peft_config", {}).get("default")
    experts = [parameter for name, parameter in model.named_parameters() if ".experts." in name and parameter.ndim == 3]
    if settings is None or not experts:
        return None
    adapted = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in settings.target_modules}))
    return (
        f"adapter: on {adapted}; the fused experts and the routers stay as they are, and no load-balancing loss is "
        "added, in every method"
    )


def _check_targets(model: "nn.Module", config: RunConfig, method: TrainingMethod) -> list[str]:
    """Return the paths of the layers to adapt. Raises UserError for targets that match nothing, are smaller than the
    rank, or of a type that the method has no layer for."""
    from transformers.pytorch_utils import Conv1D

    adapter, tuner = config.adapter, method.tuner
    linear = _linear_modules(model, kind=config.kind)
    chosen = tuner.chosen_layers(model, linear)
    if chosen is not None:
        targets = {path: linear.get(path, (0, 0)) for path in chosen}
    elif adapter.target_modules == "all-linear":
        targets = linear
    else:
        wanted = adapter.target_modules
        wanted = [wanted] if isinstance(wanted, str) else list(wanted)
        suffixes = sorted({name.rsplit(".", 1)[-1] for name in linear})
        for name in wanted:
            if not any(path == name or path.endswith(f".{name}") for path in linear):
                raise UserError(
                    f"adapter.target_modules: {name!r} matches no linear layer of this {model.config.model_type} "
                    f"model; it has {', '.join(suffixes)}{nearest(name, suffixes)}"
                )
        targets = {p: m for p, m in linear.items() if any(p == n or p.endswith(f".{n}") for n in wanted)}
    if not targets:
        raise UserError(
            f"no linear layer to adapt was found in this {model.config.model_type} model: choose another model"
        )
    kinds = {"Conv1D" if isinstance(model.get_submodule(path), Conv1D) else "Linear" for path in targets}
    if missing := sorted(kinds - set(tuner.layer_types)):
        raise UserError(
            f"adapter.tuner={adapter.tuner} has no layer for the {', '.join(missing)} layers of this "
            f"{model.config.model_type} model: choose another method"
        )
    for path, shape in targets.items():
        largest = tuner.largest_rank(*shape)
        if largest is not None and tuner.first_rank > largest:
            if largest == 1 and adapter.target_modules == "all-linear":  # a gate, such as Qwen2-MoE's
                others = sorted({path.rsplit(".", 1)[-1] for path, shape in targets.items() if min(shape) > 1})
                raise UserError(
                    f"adapter.target_modules=all-linear takes in {path}, a gate of one output, which no rank above 1 "
                    f"fits: name the other layers, adapter.target_modules=[{','.join(others)}]"
                )
            first = f" ({adapter.tuner} starts at {tuner.first_rank})" if tuner.first_rank != adapter.rank else ""
            raise UserError(
                f"adapter.rank={adapter.rank}{first} is above the size of {path}, {largest}: use a smaller rank"
            )
    return list(targets)


def _linear_modules(model: "nn.Module", *, kind: str) -> dict[str, tuple[int, int]]:
    """Return the linear layers but the head: name → (in, out)."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if kind == "nlu":
        from ba_lora.models.classifier import encoder_linear_names

        allowed = set(encoder_linear_names(model))
    else:
        head = model.get_output_embeddings()
        allowed = {name for name, module in model.named_modules() if module is not head}
    found = {}
    for name, module in model.named_modules():
        if name not in allowed:
            continue
        if isinstance(module, nn.Linear):
            found[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            found[name] = (module.nx, module.nf)
    return found


def parameter_counts(model: "nn.Module") -> tuple[int, int]:
    """Return (trainable, all) parameters; the reference's frozen factors and ZeRO-3's splits are accounted for."""
    from ba_lora.models.layers import REFERENCE_ADAPTER

    trainable = everything = 0
    for name, parameter in model.named_parameters():
        count = getattr(parameter, "ds_numel", parameter.numel())
        if f".{REFERENCE_ADAPTER}." in name:
            continue
        if type(parameter).__name__ == "Params4bit":  # two weights a byte
            count *= 2
        everything += count
        trainable += count if parameter.requires_grad else 0
    return trainable, everything
