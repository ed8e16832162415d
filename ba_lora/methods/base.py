"""What a method is made of: what is trained (a tuner), from which first factors (an init), by which optimizer.

    adapter.tuner       TUNER in a file of this folder with the tuner's name
    adapter.init        INIT: what stands in LoRA's factors A₀ and B₀ before the first step
    adapter.optimizer   OPTIMIZER: how a step is made of the gradients of A and B

A new one is one file: a subclass that fills the hooks that it needs, bound to that name. No other code asks for a
method's name: build, trainer, reference and export ask the parts. Facts are class attributes with literal values:
the configuration reads them from the source text, without the seconds that torch takes (ba_lora/config/methods.py).
"""

import contextlib
import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ba_lora.config.methods import option_values
from ba_lora.config.registries import parts
from ba_lora.errors import UserError, in_one_line
from ba_lora.models.layers import has_residual_base

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from torch import Tensor, nn

    from ba_lora.config.schema import AdapterConfig, RunConfig

DEFAULT = "default"  # PEFT's name of the trained adapter
METHOD_STATE = "method_state.safetensors"  # `Tuner.state` in a checkpoint, and in adapter/ where a plain LoRA needs it
PLAIN = ("init", "lora")  # A random and B = 0, as the layers are made


class WeightTerm(NamedTuple):
    """A term of the loss that depends on the weights alone: `weight` times `function` of the model."""

    name: str
    weight: float
    function: "Callable[[nn.Module], Tensor]"


class Part:
    """What the three kinds share.

    options: the keys of adapter.options that it takes → (default, range or choices).
    """

    options: ClassVar[dict[str, tuple]] = {}
    option_needs: ClassVar[dict[str, tuple[str, Any]]] = {}  # an option → the value of another one that it counts with
    kinds: ClassVar[tuple[str, ...]] = ("nlg", "nlu")  # of runs that it is for
    limits: ClassVar[str] = "works on whole weights: set model.quantization=none"  # why not for other kinds, or for nf4
    version: ClassVar[int] = 1  # raised where the same settings train another model: above 1 it is part of a run's id
    needs_rows: ClassVar[bool] = False  # runs training rows through the model first
    no_deepspeed: ClassVar[str | None] = None  # why it cannot run under DeepSpeed
    no_zero3: ClassVar[str | None] = None  # why it cannot run under ZeRO-3

    def __init__(self, adapter: "AdapterConfig | None" = None, seed: int = 0) -> None:
        self.adapter, self.seed = adapter, seed
        self.option: dict[str, Any] = option_values(type(self).options, adapter.options if adapter else {})


class Tuner(Part):
    """What is trained. The defaults are those of an adapter by PEFT that needs nothing from a training loop."""

    peft_options: ClassVar[dict[str, tuple]] = {}  # as `options`, handed to PEFT, whose default stands here
    own_weights: ClassVar[bool] = False  # the model's own weights are trained and saved, and no adapter
    has_factors: ClassVar[bool] = False  # LoRA's A and B: takes every init and optimizer, and rslora
    takes_dora: ClassVar[bool] = False
    ignores: ClassVar[tuple[str, ...]] = ()  # of adapter's rank, alpha, target_modules, dtype: refused where typed
    quantizes: ClassVar[bool] = False  # works on an nf4 base
    has_dropout: ClassVar[bool] = True
    takes_half: ClassVar[bool] = True  # trains in a half-precision base's own dtype: adapter.dtype=base
    own_layers: ClassVar[bool] = False  # PEFT loads the adapter only where the method's file is imported
    layer_options: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform", "layers_pattern")  # PEFT's
    plain_lora: ClassVar[str] = "none"  # where a plain LoRA of the trained model is: adapter | lora (folders) | none
    cuts_ranks: ClassVar[bool] = False  # the trained adapter is one at every lower rank, too: export.ranks
    holds_head: ClassVar[bool] = False  # the adapter has a classifier's head, or its first module, of its own
    merges: ClassVar[bool] = True  # into an ordinary model folder
    packs: ClassVar[bool] = True  # takes rows packed into one sequence: data.packing
    recomputes: ClassVar[bool] = True  # takes trainer.gradient_checkpointing
    term_names: ClassVar[tuple[str, ...]] = ()  # of `terms`, all that there may be
    draws: ClassVar[str | None] = "initialisation of the adapter"  # what of its start the seed moves, in words
    draws_in_training: ClassVar[str | None] = None  # what of its steps the seed moves
    names_layers: ClassVar[bool] = False  # PEFT is given whole paths, not what stands in adapter.target_modules
    layer_types: ClassVar[tuple[str, ...]] = ("Linear", "Conv1D")
    bounds_rank: ClassVar[bool] = True  # a layer takes no rank above its smaller size; not asked where rank is ignored

    # ---- build

    def peft_config(self, num_steps: int) -> Any:
        """Return PEFT's configuration, without the layers. `num_steps`: of the optimizer."""
        raise NotImplementedError

    def chosen_layers(self, model: "nn.Module", linear: "dict[str, tuple[int, int]]") -> list[str] | None:
        """Return the paths of the layers where the method itself says which (of all linear ones: path → (in, out)),
        or None for those of adapter.target_modules."""
        return None

    def set_layers(self, peft_config: Any, targets: list[str]) -> None:
        """Say more of the layers than that the adapter is on them."""

    def largest_rank(self, num_in: int, num_out: int) -> int | None:
        """Return the largest rank a layer takes, None where the rank is not bound by it."""
        return min(num_in, num_out) if self.bounds_rank and "rank" not in self.ignores else None

    @property
    def first_rank(self) -> int:
        """The rank at the start."""
        return self.adapter.rank

    def choose_weights(self, model: "nn.Module", path: Path, rows: "TrainingRows | None") -> None:
        """Choose what is trained from the weights, or from `rows`; every process calls it on the built model. `path` is
        the run's file for what could not be found again from the base."""

    def prepare(self, model: "nn.Module") -> None:
        """Make the built model ready to train; the trainer calls it too, for a model that was built elsewhere."""

    @staticmethod
    def recognises(peft_config: Any) -> bool:
        """Whether a model that was made by PEFT alone, with this configuration, needs the hooks of this tuner."""
        return False

    # ---- reference

    def needs_frozen_copy(self, model: "nn.Module") -> bool:
        """Whether disabling the adapter would not give the model as it was at step 0: the base is a residual, or DoRA's
        W m / ‖W‖ is W but for rounding."""
        config = model.peft_config[DEFAULT]
        return has_residual_base(config) or getattr(config, "use_dora", False)

    def check_reference(self) -> None:
        """Raise UserError where there is no way back to the pre-trained model."""

    # ---- training

    def terms(self, model: "nn.Module") -> list[WeightTerm]:
        """Return the terms that the method adds to the loss."""
        return []

    def begin_step(self, model: "nn.Module", step: int) -> None:
        """Called before the first forward pass of optimizer step `step` (from 0)."""

    def before_step(self, model: "nn.Module", step: int) -> None:
        """Called when the gradients of the step are complete, before they are clipped."""

    def after_step(self, model: "nn.Module", step: int, optimizer: "torch.optim.Optimizer") -> None:
        """Called after the optimizer's step, while the gradients are still there."""

    def checkpointing(self, model: "nn.Module") -> contextlib.AbstractContextManager[None]:
        """Return the context in which a checkpoint is written or loaded."""
        return contextlib.nullcontext()

    def state(self, model: "nn.Module") -> "dict[str, Tensor]":
        """Return what a checkpoint must hold beside PEFT's weights, the optimizer and the random states."""
        return {}

    def saved_state(self, model: "nn.Module") -> "dict[str, Tensor]":
        """Return `state` as it is written."""
        return {name: value.detach().cpu().contiguous() for name, value in self.state(model).items()}

    def load_state(self, model: "nn.Module", state: "dict[str, Tensor]") -> None:
        """Take it up again, {} where there was none, on a model with the checkpoint's weights."""

    # ---- export

    def at_rank(self, model: "nn.Module", rank: int) -> contextlib.AbstractContextManager[None]:
        """Return the context in which a PEFT model of the adapter is the trained one at a lower rank (`cuts_ranks`)."""
        raise NotImplementedError

    def before_save(self, model: "nn.Module") -> None:
        """Called before PEFT writes the adapter."""

    def finish_merge(self, model: "nn.Module") -> None:
        """Called after PEFT has merged, before the ordinary model is written."""

    def to_plain_lora(
        self, weights: "dict[str, Tensor]", settings: dict[str, Any], state: "dict[str, Tensor]"
    ) -> "tuple[dict[str, Tensor], dict[str, Any]]":
        """Return weights and settings of the plain LoRA equal to the trained adapter (see `plain_lora`)."""
        return weights, settings


class TrainingRows(NamedTuple):
    """Tokenized training rows for a data-driven init: the data set, and the seed that chooses of them."""

    dataset: "Dataset"
    seed: int


class Init(Part):
    """Where A₀ and B₀ come from. They are written to a file of the run, which every process and a resumed run reads."""

    residual: ClassVar[bool] = True  # the base keeps W − s B₀A₀; else B₀ = 0, or, where it corrects:
    corrects: ClassVar[bool] = False  # s B₀A₀ makes up for the rounding of a 4-bit base
    quantizes: ClassVar[bool] = False
    caches: ClassVar[bool] = False  # keeps an SVD for other runs: adapter.factors_cache and svd_rank count
    rebuilt_by_peft: ClassVar[bool] = False  # PEFT makes the same residual again when it loads the adapter
    draws: ClassVar[str | None] = None  # what of it the seed moves, in words

    def write_factors(self, model: "nn.Module", path: Path, config: "RunConfig", rows: TrainingRows | None) -> None:
        """Write A₀ and B₀ of the LoRA layers, whose base is untouched; every process calls it."""
        raise NotImplementedError

    def load_factors(self, model: "nn.Module", path: Path) -> "nn.Module":
        """Return the model with A₀ and B₀ of the file, and its base without their product where `residual`."""
        raise NotImplementedError


class AdapterOptimizer(Part):
    """How a step is made. The default is trainer.optim's."""

    replaces_adamw: ClassVar[bool] = True  # else it takes the class that trainer.optim names
    reads_gradient: ClassVar[bool] = False  # of W off those of A and B: the layer must be W + s B A in training

    def prepare(self, model: "nn.Module") -> None:
        """Make the model ready, before the optimizer is made: freeze what is not trained."""

    def make(
        self, model: "nn.Module", args: Any, decayed: set[str], default: tuple[type, dict]
    ) -> "torch.optim.Optimizer":
        """Return the optimizer. `decayed`: names of parameters with weight decay; `default`: the class of trainer.optim
        and its arguments."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class TrainingMethod:
    """The parts of one method."""

    tuner: Tuner
    init: Init | None = None
    optimizer: AdapterOptimizer | None = None

    @classmethod
    def of(cls, adapter: "AdapterConfig", *, seed: int) -> "TrainingMethod":
        """Return the parts that a configuration names."""
        named = {"tuner": adapter.tuner, "init": adapter.init.split("_niter_")[0], "optimizer": adapter.optimizer}
        return cls(**{k: find_part(k, name)(adapter, seed) for k, name in named.items() if name and (k, name) != PLAIN})

    @property
    def no_deepspeed(self) -> str | None:
        """Why it cannot run under DeepSpeed."""
        found = (part.no_deepspeed for part in (self.tuner, self.init, self.optimizer) if part is not None)
        return next(filter(None, found), None)


def find_part(kind: str, name: str) -> type:
    """Return the class of a part: kind tuner, init or optimizer."""
    return getattr(importlib.import_module(f"ba_lora.methods.{name}"), kind.upper())


def import_tuners() -> None:
    """Make PEFT know the adapter types of our own methods, which it then loads from their folders."""
    for name in parts("tuner"):
        find_part("tuner", name)


def method_of(model: "nn.Module") -> TrainingMethod:
    """Return the method that a model was built for; of one by PEFT alone, that which its configuration asks for."""
    found = getattr(model, "training_method", None)
    config = getattr(model, "peft_config", {}).get(DEFAULT)
    if found is None and config is not None:
        tuners = (find_part("tuner", name) for name in parts("tuner"))
        found = next((TrainingMethod(tuner()) for tuner in tuners if tuner.recognises(config)), None)
    return found or TrainingMethod(Tuner())


def peft_settings(config_class: type, tuner: Tuner, **settings: Any) -> Any:
    """Return PEFT's configuration of the class; what adapter.options has of PEFT's own goes before `settings`.

    Raises UserError where PEFT refuses a value.
    """
    its_own = {*tuner.layer_options, *tuner.peft_options}
    passed = {name: value for name, value in tuner.adapter.options.items() if name in its_own}
    try:
        return config_class(task_type="CAUSAL_LM", **settings | passed)
    except (TypeError, ValueError) as error:
        raise UserError(f"adapter.options: {in_one_line(error)}") from error


def whole_alpha(adapter: "AdapterConfig") -> float:
    """Return α, the rank where it is left out; a whole number as an int, which PEFT's configurations ask for."""
    alpha = adapter.rank if adapter.alpha is None else adapter.alpha
    return int(alpha) if float(alpha).is_integer() else alpha
