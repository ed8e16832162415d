"""From the pre-trained model to the model that is trained: PEFT does the adapters, this file chooses and checks.

The first factors of PiSSA (ba_lora/methods/pissa.py) and CorDA (ba_lora/methods/corda.py) are saved with the run: a
resumed run builds the very same residual from them.
"""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ba_lora.config.schema import AdapterConfig, RunConfig
from ba_lora.errors import UserError, in_one_line
from ba_lora.methods import pissa
from ba_lora.methods.adalora import freeze_rank_counts
from ba_lora.models.pretrained import load_base
from ba_lora.paths import resolve_path
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
    (CorDA's initialisation does). Where `run_path` holds the first factors of PiSSA or CorDA, they are used instead of
    a new SVD. Raises UserError for settings that do not fit the model.
    """
    before = {}

    def measure(base: "nn.Module") -> "nn.Module":
        if probe is not None and not is_deepspeed_zero3_enabled():
            before["logits"] = probe_logits(base, probe)
        return base

    from transformers.integrations import is_deepspeed_zero3_enabled

    model = _build(config, run_path, num_steps, measure, rows)
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
        logits = logits[probe["attention_mask"].bool().to(logits.device)]
    return logits.float().cpu()


def _build(
    config: RunConfig,
    run_path: Path,
    num_steps: int,
    measure: Callable[["nn.Module"], "nn.Module"],
    rows: "Dataset | None",
) -> "nn.Module":
    adapter = config.adapter
    if adapter.trains_own_weights:
        if config.model.dtype == "float16":
            raise UserError("this method cannot train float16 weights: use model.dtype=float32 or bfloat16")
        model = measure(_to_device(load_base(config)))
        return _biases_alone(model) if adapter.tuner == "bitfit" else model
    if adapter.dtype == "base" and config.model.dtype == "float16":
        raise UserError("float16 adapters cannot be trained: use adapter.dtype=float32")
    if adapter.init == "lora":
        model = measure(_to_device(load_base(config)))
        return _with_adapter(model, config, num_steps)
    return _build_on_residual(config, run_path, num_steps, measure, rows)


def _to_device(model: "nn.Module") -> "nn.Module":
    """Move the model to this process's GPU before the SVDs, unless ZeRO-3 or quantisation has placed it."""
    from accelerate import PartialState
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled() or getattr(model, "is_quantized", False):
        return model
    return model.to(PartialState().device)


def _build_on_residual(
    config: RunConfig,
    run_path: Path,
    num_steps: int,
    measure: Callable[["nn.Module"], "nn.Module"],
    rows: "Dataset | None",
) -> "nn.Module":
    """CorDA, PiSSA, or QPiSSA: there the residual is made in full precision, in the host's memory, then quantised."""
    from accelerate import PartialState

    adapter, quantized = config.adapter, config.model.quantization != "none"
    factors, residual = pissa.factors_path(run_path), run_path / "residual"
    has_factors = factors.is_file()
    has_residual = has_factors and residual.is_dir()
    PartialState().wait_for_everyone()  # no process may write the files before every process has looked for them
    if not (quantized and has_residual):
        model = load_base(config, quantize=False)
        model = _with_adapter(measure(model if quantized else _to_device(model)), config, num_steps)
        if not has_factors and adapter.init == "corda":
            _write_corda_factors(model, factors, rows, config.seed)
        elif not has_factors:
            cache = adapter.factors_cache and pissa.FactorsCache(resolve_path(adapter.factors_cache))
            pissa.write_factors(model, factors, pissa.requested_svd(adapter), cache=cache)
        pissa.load_factors(model, factors, subtract=True)
    if quantized:
        if not has_residual:
            pissa.save_residual(model, residual)
            del model
        model = _with_adapter(load_base(config, source=str(residual)), config, num_steps)
        pissa.load_factors(model, factors, subtract=False)
    model.peft_config["default"].init_lora_weights = config.adapter.init
    return model


def _write_corda_factors(model: "nn.Module", path: Path, rows: "Dataset", seed: int) -> None:
    from transformers.integrations import is_deepspeed_zero3_enabled

    from ba_lora.methods import corda

    if is_deepspeed_zero3_enabled():
        raise UserError("adapter.init=corda runs rows before training, which ZeRO-3's split weights cannot: use ZeRO-2")
    corda.write_factors(model, path, corda.calibration_rows(model, rows, seed))


def _biases_alone(model: "nn.Module") -> "nn.Module":
    """BitFit (arXiv 2106.10199): train every bias of the pre-trained part, and the new head."""
    from ba_lora.models.classifier import backbone, head_names

    model.requires_grad_(False)
    biases = [p for name, p in backbone(model).named_parameters() if name.rsplit(".", 1)[-1] == "bias"]
    if not biases:
        raise UserError(f"method bitfit trains biases, and this {model.config.model_type} model has none")
    for parameter in [*biases, *(p for name in head_names(model) for p in getattr(model, name).parameters())]:
        parameter.requires_grad_(True)
    return model


def _with_adapter(model: "nn.Module", config: RunConfig, num_steps: int) -> "nn.Module":
    from peft import get_peft_model

    adapter = config.adapter
    targets = _check_targets(model, config)
    peft_config = PEFT_CONFIGS[adapter.tuner](adapter, num_steps)
    if config.kind == "nlu":  # the head is trained whole; `all-linear` would take parts of it for the encoder's
        from ba_lora.models.classifier import head_names

        peft_config.task_type = "SEQ_CLS"  # by which PEFT trains `classifier` and `score` of itself
        peft_config.modules_to_save = [n for n in head_names(model) if n not in ("classifier", "score")] or None
        peft_config.target_modules = set(targets)
    _leave_experts_out(model, peft_config, adapter)
    peft_config.revision = config.model.revision
    model = get_peft_model(model, peft_config, autocast_adapter_dtype=adapter.dtype == "float32")
    if adapter.dtype == "base":
        dtype = next(p.dtype for p in model.parameters() if not p.requires_grad)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    freeze_rank_counts(model)
    if config.trainer.get("gradient_checkpointing"):
        model.enable_input_require_grads()
    return model


def _leave_experts_out(model: "nn.Module", peft_config: Any, adapter: AdapterConfig) -> None:
    """Keep PEFT from training fused experts and routers, which it adds where it finds `all-linear` or their old names.

    PiSSA and CorDA have no factors for those three-dimensional weights, and LoRA is to be compared with them on the
    same layers. Raises UserError where the configuration names such layers itself.
    """
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
    return f"adapter: on {adapted}; the fused experts and the routers stay as they are, in every method"


def _check_targets(model: "nn.Module", config: RunConfig) -> list[str]:
    """Return the paths of the layers to adapt. Raises UserError for targets that match nothing, or are smaller than
    the rank."""
    adapter = config.adapter
    linear = _linear_modules(model, kind=config.kind)
    if adapter.target_modules == "all-linear":
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
        raise UserError(f"no linear layer to adapt was found in this {model.config.model_type} model")
    name, size = min(((path, min(shape)) for path, shape in targets.items()), key=lambda pair: pair[1])
    rank = adalora_first_rank(adapter.rank) if adapter.tuner == "adalora" else adapter.rank
    if rank > size:
        first = f" (adalora starts at {rank})" if adapter.tuner == "adalora" else ""
        raise UserError(f"adapter.rank={adapter.rank}{first} is above the size of {name}, {size}: use a smaller rank")
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


def _peft_options(config_class: type, adapter: AdapterConfig, **settings: Any) -> Any:
    targets = adapter.target_modules
    targets = (
        targets
        if isinstance(targets, str) and targets == "all-linear"
        else list([targets] if isinstance(targets, str) else targets)
    )
    try:
        return config_class(task_type="CAUSAL_LM", target_modules=targets, **settings, **adapter.options)
    except (TypeError, ValueError) as error:
        raise UserError(f"adapter.options: {in_one_line(error)}") from error


def _alpha(adapter: AdapterConfig) -> float:
    alpha = adapter.rank if adapter.alpha is None else adapter.alpha
    return int(alpha) if float(alpha).is_integer() else alpha


def _lora_config(adapter: AdapterConfig, num_steps: int) -> Any:
    from peft import LoraConfig

    return _peft_options(
        LoraConfig,
        adapter,
        r=adapter.rank,
        lora_alpha=_alpha(adapter),
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        init_lora_weights=True,  # the factors of PiSSA and CorDA take their place
    )


def adalora_first_rank(rank: int) -> int:
    """Return the rank that AdaLoRA begins with and prunes to `rank`."""
    return rank * 3 // 2


def _adalora_config(adapter: AdapterConfig, num_steps: int) -> Any:
    """Ranks start at 1.5 × `rank` and are pruned to it between 10 % and 70 % of the steps, unless options say more."""
    from peft import AdaLoraConfig

    if num_steps < 10:
        raise UserError(f"adapter.tuner=adalora prunes over the steps and needs at least 10, this run has {num_steps}")
    schedule = {"tinit": num_steps // 10, "tfinal": num_steps * 3 // 10, "deltaT": max(1, num_steps // 100)}
    chosen = {name: adapter.options.get(name, value) for name, value in schedule.items()}
    options = {name: value for name, value in adapter.options.items() if name not in schedule}
    return _peft_options(
        AdaLoraConfig,
        dataclasses.replace(adapter, options=options),
        init_r=adalora_first_rank(adapter.rank),
        target_r=adapter.rank,
        lora_alpha=_alpha(adapter),
        lora_dropout=adapter.dropout,
        total_step=num_steps,
        **chosen,
    )


def _loha_config(adapter: AdapterConfig, num_steps: int) -> Any:
    from peft import LoHaConfig

    return _peft_options(LoHaConfig, adapter, r=adapter.rank, alpha=_alpha(adapter), module_dropout=adapter.dropout)


# adapter.tuner → PEFT configuration. To add a method: a function here, and a file in configs/methods.
PEFT_CONFIGS = {"lora": _lora_config, "adalora": _adalora_config, "loha": _loha_config}


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
