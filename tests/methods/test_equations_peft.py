"""The layers that PEFT makes for a method, against numbers worked out by hand."""

import math
from types import SimpleNamespace

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ba_lora.config.schema import AdapterConfig
from ba_lora.methods.adalora import AdaLora, adalora_orthogonality
from ba_lora.methods.ia3 import IA3
from ba_lora.methods.vera import Vera
from tests.support.layers import by_its_tuner, close, linear, tensor


def peanut(weight, **settings):
    """A PEANuT layer and its trained matrices, A, B and those of its depth."""
    from peft import PeanutConfig

    model = get_peft_model(nn.Sequential(linear(weight)), PeanutConfig(target_modules=["0"], **settings))
    layer = model.base_model.model[0]
    inner = [*layer.peanut_encoders["default"], *layer.peanut_decoders["default"]]
    return layer, [module.weight for module in (layer.peanut_A["default"], layer.peanut_B["default"], *inner)]


def test_peanut():
    weight = tensor([1, -1], [2, 0])
    layer, (a, b) = peanut(weight, r=1, scaling=1.0, depth=0)
    a.data, b.data = tensor([1, 1]), tensor([1], [2])
    close(layer(torch.eye(2)).T - weight, [[3, 0], [6, 0]])


def test_peanut_as_released_has_two_forms():
    """Re-enacted: yibozhong/peanut. NLU: `peanut_vanilla.forward`, which is given W's transpose; language models:
    `_compute_delta_W` of commonsense&math/peft/src/peft/tuners/peanut.py. PEFT's is the first."""
    weight, a, b = tensor([1, -1], [2, 0]), tensor([1, 1]), tensor([1], [2])
    of_nlu = torch.eye(2) @ (weight.T @ a.T).relu() @ b.T
    close(of_nlu.T, [[3, 0], [6, 0]])
    close((weight @ a.T).relu() @ b.T, [[0, 0], [2, 4]])


def test_peanut_with_depth():
    """Each layer more has two r × r matrices: in with an activation, out with one and what was before added."""
    torch.manual_seed(0)
    weight = torch.randn(5, 6)
    layer, (a, b, *inner) = peanut(weight, r=3, scaling=0.5, depth=2, act_fn="relu")
    assert sum(p.numel() for p in (a, b, *inner)) == 2 * 3 * 5 + 2 * 2 * 3**2
    for parameter in (b, *inner):
        parameter.data = torch.randn_like(parameter)
    first = (weight.T @ a.T).relu()
    second = (first @ inner[0].T).relu()
    third = (second @ inner[1].T).relu()
    third = (third @ inner[2].T).relu() + second
    third = (third @ inner[3].T).relu() + first
    close(layer(torch.eye(6)).T - weight, 0.5 * (third @ b.T).T, atol=1e-4)


def test_vera():
    """ΔW = Λ_b B Λ_d A, of the shared A and B the part that the layer's size takes; at the start d = 0.1, b = 0."""
    torch.manual_seed(0)
    first, second = torch.randn(5, 6), torch.randn(7, 4)
    tuner = Vera(AdapterConfig(tuner="vera", rank=3))
    model = by_its_tuner(nn.Sequential(linear(first), linear(second)), tuner, ["0", "1"]).base_model.model
    for layer, weight in zip(model, (first, second), strict=True):
        scale_d, scale_b = layer.vera_lambda_d["default"], layer.vera_lambda_b["default"]
        close(scale_d, torch.full((3,), 0.1))
        assert not scale_b.any()
        scale_d.data, scale_b.data = torch.tensor([1.0, -2.0, 3.0]), torch.randn(len(weight))
        a, b = layer.vera_A["default"][:, : weight.shape[1]], layer.vera_B["default"][: len(weight)]
        change = torch.diag(scale_b) @ b @ torch.diag(scale_d) @ a
        close(layer(torch.eye(weight.shape[1])).T - weight, change, atol=1e-4)
    assert model[0].vera_A["default"].data_ptr() == model[1].vera_A["default"].data_ptr()


def test_ia3():
    """Outputs are scaled, and of an MLP's last layer the inputs."""
    key, last = (
        nn.ModuleDict({"k_proj": linear(tensor([1, 2], [3, 4]), [1, 1])}),
        linear(tensor([1, 2], [3, 4]), [1, 1]),
    )
    model = nn.ModuleDict({"self_attn": key, "mlp": nn.ModuleDict({"down_proj": last})})
    model = by_its_tuner(model, IA3(AdapterConfig(tuner="ia3")), ["self_attn.k_proj", "mlp.down_proj"]).base_model.model
    for layer, want in ((model["self_attn"]["k_proj"], [8, 0.8]), (model["mlp"]["down_proj"], [3.2, 7.4])):
        close(layer(tensor([1, 1])), [[4, 8]])
        layer.ia3_l["default"].data = torch.tensor([2, 0.1]).view_as(layer.ia3_l["default"])
        close(layer(tensor([1, 1])), [want])


def test_miss():
    from peft import MissConfig

    model = get_peft_model(nn.Sequential(linear(torch.zeros(1, 4))), MissConfig(r=2, target_modules=["0"]))
    layer = model.base_model.model[0]
    next(p for p in layer.parameters() if p.requires_grad).data = tensor([1], [10])
    close(layer(torch.eye(4))[:, 0], [1, 10, 1, 10])


def test_adalora():
    """ΔW = s P Λ Q; PEFT's term is the mean of ‖Pᵀ P − I‖ = 1 and ‖Q Qᵀ − I‖ = 3, the paper's (eq. 4) the sum of their
    squares, 10."""

    class Layers(nn.Sequential):
        def forward(self, x):
            return SimpleNamespace(output=super().forward(x), loss=torch.zeros(()))

    tuner = AdaLora(AdapterConfig(tuner="adalora", rank=1, alpha=4, options={"orth_reg_weight": 0.5}))
    model = by_its_tuner(Layers(linear(torch.zeros(2, 2))), tuner, ["0"])
    layer = model.base_model.model[0]
    layer.lora_A["default"].data, layer.lora_B["default"].data = tensor([2, 0]), tensor([1], [1])
    layer.lora_E["default"].data = tensor([3])
    found = model.base_model(torch.eye(2))
    close(found.output.T, [[24, 0], [24, 0]], rtol=1e-3)
    close(adalora_orthogonality(model), 2.0)
    close(found.loss, 0.5 * 2.0)


def test_adalora_takes_no_gradient_that_is_not_finite_into_its_importances():
    """Of a step that fp16's loss scaler leaves out."""
    tuner = AdaLora(AdapterConfig(tuner="adalora", rank=2))
    model = by_its_tuner(nn.Sequential(linear(torch.eye(4))), tuner, ["0"])
    tuner.prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for step, gradient in enumerate((1.0, math.nan, math.inf, 1.0)):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient) if parameter.requires_grad else None
        tuner.after_step(model, step, optimizer)
    state = tuner.state(model)
    assert state and all(value.isfinite().all() for value in state.values())
    assert any(value.any() for name, value in state.items() if name.startswith("ipt"))


def test_adaloras_parameters():
    """r₀ (Σ in + Σ out + layers), r₀ = 6 of a rank of 4."""
    sizes = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64))
    targets = [name for name, layer in model.model.named_modules() if isinstance(layer, nn.Linear)]
    tuner = AdaLora(AdapterConfig(tuner="adalora", rank=4))
    model = by_its_tuner(model, tuner, targets)
    tuner.prepare(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 6 * (992 + 960 + 14) == 11796


def test_dora():
    model = nn.Sequential(linear(tensor([3, 4])))
    model = get_peft_model(model, LoraConfig(r=1, lora_alpha=1, use_dora=True, target_modules=["0"]))
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = tensor([1, 0]), tensor([-3])
    close(layer(torch.eye(2))[:, 0], [0, 5])
    assert math.isclose(layer.lora_magnitude_vector["default"].weight.item(), 5)
