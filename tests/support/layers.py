"""Linear layers with written-out weights."""

import torch
from peft import get_peft_model
from torch import nn


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def linear(weight, bias=None):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data = weight.clone()
    if bias is not None:
        layer.bias.data = torch.tensor(bias, dtype=torch.float32)
    return layer.requires_grad_(False)


def close(got, want, **tolerance):
    torch.testing.assert_close(
        got, torch.as_tensor(want, dtype=got.dtype), **({"atol": 1e-5, "rtol": 1e-5} | tolerance)
    )


def by_its_tuner(model, tuner, targets):
    """The model with the adapter that a method's tuner asks PEFT for."""
    settings = tuner.peft_config(10)
    settings.task_type, settings.target_modules = None, set(targets)
    tuner.set_layers(settings, targets)
    return get_peft_model(model, settings)
