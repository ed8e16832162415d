"""The frozen pre-trained model ("reference"), which the consistency term compares with, without a second model.

The reference is the tuned model as it was at step 0, so the consistency term is exactly 0 there in any dtype:

    PiSSA and kin   the base holds the residual W − B₀A₀; a frozen copy of (A₀, B₀) on the same base gives W again.
                    (Disabling the adapter would give the residual only: not the pre-trained model.)
    DoRA            a frozen copy of factors and magnitude: W m / ‖W‖ is W but for rounding.
    LoftQ           a frozen copy of (A₀, B₀) on the 4-bit base: the pre-trained model as near as it gets there.
    LoRA and kin    B A = 0 at the start: disabling the adapter gives W.
    full            a frozen copy of all weights.

That holds where nothing but the adapter is trained and its initialisation is one of these; anything else is refused
here, and the trainer compares reference and tuned model once, at step 0.

The switch sets one attribute on each adapter layer. It must be left before `backward`, so that gradient checkpointing
recomputes with the trained adapter; `Reference.use` is a context manager around the no-grad pass only.
"""

import contextlib
import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ba_lora.config.schema import BALoRAConfig
from ba_lora.errors import UserError
from ba_lora.methods.base import method_of
from ba_lora.models.layers import REFERENCE_ADAPTER, adapter_layers, adapter_parameters, gathered, has_residual_base
from ba_lora.objective.terms.consistency import Consistency

ZERO_INITS = ("True", "gaussian", "eva", "mica")  # the base stays as it is, and B₀A₀ = 0
LARGEST_DIFFERENCE = {4: 1e-3, 2: 0.03}  # at step 0, by bytes a number, as a share of the largest logit


class Reference:
    """Runs the model as it was before training. Build it with `build_reference`, before the first step."""

    consistency = Consistency  # the term that compares with it
    columns: tuple[str, ...] = ()  # of the data set, which it needs

    def __init__(self, layers: list[nn.Module], *, frozen_factors: bool, frozen_model: nn.Module | None = None) -> None:
        self._layers = layers
        self._frozen_factors = frozen_factors
        self.frozen_model = frozen_model

    @property
    def shares_head(self) -> bool:
        """Whether a trained output head would be the reference's, too."""
        return self.frozen_model is None

    def check(self, regularizers: BALoRAConfig) -> None:
        """Any regularizers go with it."""

    def to(self, device: torch.device) -> None:
        """Move the frozen copy of full fine-tuning; an adapter's reference is the model itself."""
        if self.frozen_model is not None:
            self.frozen_model.to(device)

    def at(
        self, model: nn.Module, rows: Tensor | None, *, states: Callable[[nn.Module], tuple[Tensor, Any]]
    ) -> tuple[Tensor, Any]:
        """Return what `states` gives for the reference: its hidden states [N, D] and the head that they go into, which
        under full fine-tuning is not the trained one."""
        with self.use(model) as module:
            return states(module)

    @contextlib.contextmanager
    def use(self, model: nn.Module) -> Iterator[nn.Module]:
        """Yield the module to call for a reference pass: `model` (possibly wrapped), switched, or the frozen copy."""
        if self.frozen_model is not None:
            yield self.frozen_model
            return
        attribute, value = "_disable_adapters", True
        if self._frozen_factors:
            attribute, value = "_active_adapter", [REFERENCE_ADAPTER]
        before = [getattr(layer, attribute) for layer in self._layers]
        try:
            for layer in self._layers:
                vars(layer)[attribute] = value  # a plain attribute: nn.Module's own setattr costs ten times as much
            yield model
        finally:
            for layer, old in zip(self._layers, before, strict=True):
                vars(layer)[attribute] = old


def build_reference(model: nn.Module, *, trained_apart: Iterable[str] = ()) -> Reference:
    """Return the reference of `model`, a PEFT model or a plain one, in its present (untrained) state.

    `trained_apart` names modules that are trained beside the adapter and that the reference does not need to hold (a
    classifier's new head). For PiSSA and kin, and DoRA, a frozen second adapter is added to the layers, which
    `model.save_pretrained` leaves out. Raises UserError where the reference would not be the pre-trained model.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        frozen = copy.deepcopy(model).eval().requires_grad_(False)
        return Reference([], frozen_factors=False, frozen_model=frozen)
    layers = adapter_layers(model)
    if set(model.peft_config) != {"default"}:
        raise UserError(f"one adapter is needed, called default; this model has {', '.join(model.peft_config)}")
    config = model.peft_config["default"]
    tuner, init = method_of(model).tuner, method_of(model).init
    tuner.check_reference()
    _check_trained(model, layers, trained_apart)
    if not hasattr(model, "training_method"):  # PEFT alone has made the model
        _check_init(config, variant_is_known=tuner.recognises(config))
    if not (tuner.needs_frozen_copy(model) or (init is not None and init.corrects)):
        return Reference(layers, frozen_factors=False)
    frozen_config = copy.deepcopy(config)
    frozen_config.init_lora_weights = True  # "pissa" would run again, on the residual
    frozen_config.inference_mode = True
    frozen_config.lora_dropout = 0.0
    for entry in dataclasses.fields(frozen_config):  # what such a variant adds is not there at step 0
        if entry.metadata.get("is_lora_variant") and entry.name != "use_dora":
            setattr(frozen_config, entry.name, None)
    keeps_dtype = all(p.dtype == torch.float32 for p in adapter_parameters(layers[0], "default"))
    options = {"autocast_adapter_dtype": keeps_dtype}
    if "autocast_adapter_dtype" not in inspect.signature(model.add_adapter).parameters:  # PEFT before 0.19
        options = {}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.random.fork_rng():
        model.add_adapter(REFERENCE_ADAPTER, frozen_config, **options)
    for parameter in trainable:  # which PEFT before 0.19 freezes along with the new adapter
        parameter.requires_grad_(True)
    # A checkpoint that also held this adapter would be loaded wrongly: Trainer would skip the trained one silently.
    model.save_pretrained = functools.partial(model.save_pretrained, selected_adapters=["default"])
    for layer in layers:
        frozen = adapter_parameters(layer, REFERENCE_ADAPTER)
        trained = adapter_parameters(layer, "default", beside=REFERENCE_ADAPTER)
        with gathered([*trained, *frozen]), torch.no_grad():
            for source, target in zip(trained, frozen, strict=True):
                target.data = target.data.to(source.dtype)
                target.copy_(source)
                target.requires_grad_(False)
    return Reference(layers, frozen_factors=True)


def _check_trained(model: nn.Module, layers: list[nn.Module], trained_apart: Iterable[str]) -> None:
    """Raise UserError where a trained parameter is not the adapter's own: the reference would follow it."""
    own = {id(parameter) for layer in layers for parameter in adapter_parameters(layer, "default")}
    apart = [f".{name}." for name in trained_apart]
    others = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in own and not any(part in f".{name}" for part in apart)
    ]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UserError(
            f"the reference would follow {others[0]}{more}, trained beside the adapter: leave modules_to_save and bias "
            "out of the adapter's config, or set lambda_consistency=0"
        )


def _check_init(config: object, *, variant_is_known: bool) -> None:
    """Raise UserError for an adapter of which it is not known how to get the pre-trained model back."""
    remedy = "use init_lora_weights=True or 'pissa', or set lambda_consistency=0"
    for entry in dataclasses.fields(config):
        is_variant = entry.metadata.get("is_lora_variant") and entry.name != "use_dora"
        if is_variant and getattr(config, entry.name) and not variant_is_known:
            raise UserError(f"the reference of an adapter with {entry.name} is not known: leave it out")
    init = getattr(config, "init_lora_weights", True)
    if not has_residual_base(config) and str(init) not in ZERO_INITS:
        raise UserError(f"the reference of an adapter with init_lora_weights={init!r} is not known: {remedy}")


def check_step_zero(tuned: Tensor, reference: Tensor) -> None:
    """Raise UserError where logits (or a classifier's features) of the untrained model are not the reference's."""
    if not tuned.numel():
        return
    share = LARGEST_DIFFERENCE[min(4, tuned.dtype.itemsize, reference.dtype.itemsize)]
    difference = (tuned.float() - reference.float()).abs().max()
    if difference > share * reference.abs().max().clamp(min=1.0):
        raise UserError(
            f"at step 0 the model differs from its reference by {difference.item():.2g}: it is not the pre-trained "
            "model any more. Give the trainer an adapter as get_peft_model made it; resume by resume_from_checkpoint"
        )
