"""What a method of our own needs to be one of PEFT's: a type, a configuration, a model and a base for its layers.

PEFT then does for it what it does for its own: it puts the layers in and takes them out, disables, saves, loads and
merges them, and keeps a classifier's head beside. A method is a dataclass with its settings, an `OwnConfig`, and a
layer with `allocate`, `adapted` and, where it can be merged, `merged_weights`. An adapter of such a type is loaded by
PeftModel.from_pretrained wherever the method's file has been imported.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import PeftType, register_peft_method
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass
class OwnConfig(PeftConfig):
    """On which layers it is; `register_own` gives a method's class its type."""

    type_name: ClassVar[str]
    target_modules: Any = None
    exclude_modules: Any = None
    modules_to_save: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.type_name
        self.target_modules = set(self.target_modules) if isinstance(self.target_modules, list) else self.target_modules


class OwnLayer(nn.Module, BaseTunerLayer):
    """A linear layer with the method's parameters in dictionaries by adapter, named in `adapter_layer_names`.

    path: of the layer in the base model.
    """

    merges: ClassVar[bool] = True

    def __init__(self, base_layer: nn.Module, adapter: str, config: PeftConfig, *, path: str) -> None:
        super().__init__()
        self.base_layer, self.path = base_layer, path
        for name in (*self.adapter_layer_names, *self.other_param_names):
            setattr(self, name, nn.ParameterDict() if name in self.tensor_names else nn.ModuleDict())
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        if isinstance(base_layer, Conv1D):
            self.in_features, self.out_features = base_layer.nx, base_layer.nf
        else:
            self.in_features = getattr(base_layer, "in_features", None)
            self.out_features = getattr(base_layer, "out_features", None)
        self._active_adapter = adapter
        self.update_layer(adapter, config)

    tensor_names: ClassVar[tuple[str, ...]] = ()  # of the dictionaries that hold tensors; the others hold modules

    def update_layer(self, adapter: str, config: PeftConfig) -> None:
        """Add an adapter's parameters."""
        self.allocate(adapter, config)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """`allocate` has done it. PEFT's also casts all to the base's dtype, places in a weight among them."""

    def allocate(self, adapter: str, config: PeftConfig) -> None:
        """Make the parameters of an adapter, on the base layer's weight's device, in float32."""
        raise NotImplementedError

    def adapted(self, adapter: str, x: Tensor) -> Tensor:
        """Return the layer's output [..., out] for x [..., in] with the adapter on."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged:
            if self.merged and self.disable_adapters:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        for adapter in self.active_adapters:
            if adapter in getattr(self, self.adapter_layer_names[0]):
                return self.adapted(adapter, x)
        return self.base_layer(x, *args, **kwargs)

    def merged_weights(self, adapter: str) -> tuple[Tensor, Tensor | None]:
        """Return the weight [out, in] and bias [out] of the ordinary layer with the same output."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for adapter in check_adapters_to_merge(self, adapter_names):
            if not self.merges:
                raise ValueError(f"{type(self).__name__} cannot be merged into a linear layer")
            weight, bias = self.merged_weights(adapter)
            if safe_merge and not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
                raise ValueError(f"NaNs detected in the merged weights of adapter {adapter}")
            base = self.base_layer
            self._unmerged = (base.weight.data, None if base.bias is None else base.bias.data)
            base.weight.data = weight.detach().to(base.weight.dtype)
            if bias is not None:
                if base.bias is None:
                    base.bias = nn.Parameter(torch.zeros_like(bias, dtype=base.weight.dtype), requires_grad=False)
                base.bias.data = bias.detach().to(base.weight.dtype)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        if self.merged:
            weight, bias = self._unmerged
            self.base_layer.weight.data = weight
            if bias is None:
                self.base_layer.bias = None
            else:
                self.base_layer.bias.data = bias
            self.merged_adapters.clear()


def register_own(name: str, config_class: type[OwnConfig], layer_class: type[OwnLayer]) -> type[BaseTuner]:
    """Make a method a type of PEFT's, called NAME; parameters' names begin with `name_`. Return its model's class."""
    config_class.type_name = name.upper()

    class OwnModel(BaseTuner):
        prefix = f"{name}_"
        tuner_layer_cls = layer_class
        target_module_mapping: ClassVar[dict] = {}

        def _create_and_replace(
            self,
            config: PeftConfig,
            adapter: str,
            target: nn.Module,
            target_name: str,
            parent: nn.Module,
            current_key: str,
        ) -> None:
            if isinstance(target, layer_class):
                target.update_layer(adapter, config)
                return
            new = layer_class(target, adapter, config, path=current_key)
            if adapter not in self.active_adapters:
                new.requires_grad_(False)
            self._replace_module(parent, target_name, new, target)

    if not hasattr(PeftType, name.upper()):  # an Enum takes no members after its class body: made as Enum makes them
        member = str.__new__(PeftType, name.upper())
        member._name_ = member._value_ = name.upper()
        PeftType._member_names_.append(name.upper())
        PeftType._member_map_[name.upper()] = member
        PeftType._value2member_map_[name.upper()] = member
        type.__setattr__(PeftType, name.upper(), member)
    if PeftType(name.upper()) not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=name, config_cls=config_class, model_cls=OwnModel)
    return OwnModel
