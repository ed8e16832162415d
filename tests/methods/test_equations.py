"""Methods against numbers worked out by hand, and what papers and codes contradict (docs/findings.md)."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from ba_lora.config.schema import AdapterConfig
from ba_lora.methods.bottleneck import BottleneckConfig, BottleneckLayer
from ba_lora.methods.delta_lora import DeltaLora
from ba_lora.methods.dylora import cut, drawn_rank
from ba_lora.methods.lora_fa import FrozenAAdamW
from ba_lora.methods.lora_ga import lora_ga_factors
from ba_lora.methods.lora_pro import adjusted_gradients
from ba_lora.methods.lorta import Lorta, LortaConfig, LortaLayer, share_tensors
from ba_lora.methods.milora import milora_factors
from ba_lora.methods.monteclora import dirichlet_kl, gaussian_kl, wishart_kl
from ba_lora.methods.olora import olora_factors
from ba_lora.methods.sara import nuclear_norm
from ba_lora.methods.sparse import SparseConfig, SparseLayer
from ba_lora.methods.ssf import SsfConfig, SsfLayer
from tests.support.layers import by_its_tuner, close, linear, tensor


def test_olora():
    first, second = olora_factors(tensor([3, 0], [4, 5]), 1, 1.0)
    close(second @ first, [[3, 2.4], [4, 3.2]])


def test_olora_of_peft_fails_on_conv1d():
    """It builds, and the first forward pass has factors of the other shape."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights="olora", fan_in_fan_out=True)
    model = get_peft_model(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2)), settings)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.arange(5)[None])


def test_milora():
    first, second, largest = milora_factors(tensor([2, 1], [1, 2]), 1, 1.0)
    assert largest.item() == pytest.approx(3)
    close(second @ first, [[0.5, -0.5], [-0.5, 0.5]])
    first, second, _ = milora_factors(tensor([2, 1], [1, 2]), 1, 4.0)
    close(4 * second @ first, [[0.5, -0.5], [-0.5, 0.5]])


def test_milora_tells_of_components_that_cannot_learn(tmp_path, capsys):
    """Three singular values of one matrix are 0, and four are taken of each."""
    from tests.support.methods import built
    from tests.support.tiny import tiny_llama

    model = tiny_llama()
    weight = model.model.layers[1].self_attn.k_proj.weight
    left, values, right = torch.linalg.svd(weight.detach())
    values[-3:] = 0
    weight.data = left @ torch.diag(values) @ right
    model.save_pretrained(tmp_path / "base")
    built("milora", tmp_path / "base", tmp_path / "run")
    told = (
        "MiLoRA: 3 of the components have the singular value 0, in 1 layers: their part of the adapter will not learn"
    )
    assert told in capsys.readouterr().out


def test_lora_ga_has_the_papers_factors_and_not_pefts():
    """Orthogonal rows of length d_out^¼ / √γ, and B is that of the next r components: of no singular value."""
    torch.manual_seed(0)
    gradient = 1e-3 * torch.randn(64, 48)
    first, second = lora_ga_factors(gradient, 4, 16.0)
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    scale = 64**0.25 / 4
    close((first / scale @ right[:4].T).abs(), torch.eye(4), atol=1e-4)
    close((left[:, 4:8].T @ second / scale).abs(), torch.eye(4), atol=1e-4)


def test_lora_ga_of_peft_is_another(tmp_path):
    """Its A has rows of length 1, its B those of the singular values: 0.04 where the paper's are alike."""
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    config = LoraConfig(
        r=4, lora_alpha=4, target_modules=["0"], init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()
    )
    inputs = 0.1 * torch.randn(32, 64)
    preprocess_loraga(model, config, lambda: model(inputs).square().mean().backward())
    layer = get_peft_model(model, config).base_model.model[0]
    lengths = layer.lora_A["default"].weight.norm(dim=1), layer.lora_B["default"].weight.norm(dim=0)
    assert lengths[0].max() / lengths[1].max() > 5
    ours = lora_ga_factors(torch.randn(64, 64), 4, 16.0)
    close(ours[0].norm(dim=1), ours[1].norm(dim=0))


def test_monteclora_kl():
    close(dirichlet_kl(tensor(0.5, 1, 2, 3), torch.ones(4)), 1.37312)
    close(dirichlet_kl(torch.ones(4), torch.full((4,), 0.1)), 3.40593)
    assert dirichlet_kl(torch.full((64,), 2.0), torch.ones(64)).isfinite()
    close(wishart_kl(tensor(4, 4)), 3.22741)
    close(gaussian_kl(tensor(2, 2), 4), 1.22741)


def test_monteclora_kl_of_peft_is_not_one():
    """Its sign of ln Γ is reversed, so it falls below 0; and Γ itself overflows from N of about 20."""
    from peft.tuners.lora.monteclora import MontecloraSampler

    def theirs(posterior, prior):
        sampler = MontecloraSampler(4, 2, len(posterior), dirichlet_prior=prior, buffer_size=1, device="cpu")
        return sampler.dirichlet_kl(posterior)

    close(theirs(tensor(0.5, 1, 2, 3), 1.0), 3.90414)
    close(theirs(torch.ones(4), 0.1), -14.6158, rtol=1e-4)
    assert not theirs(torch.full((64,), 2.0), 1.0).isfinite()


def test_lora_fa():
    first, second = nn.Parameter(tensor([2, 0]), requires_grad=False), nn.Parameter(torch.zeros(2, 1))
    second.grad = tensor([1], [2])
    optimizer = FrozenAAdamW([{"params": [second]}], [(first, second, 2.0)], lr=1e-3)
    optimizer.step()
    close(second.grad, [[1 / 16], [1 / 8]])


@pytest.mark.parametrize(("s", "x_a", "g_b"), [(1.0, [0.5, 2], [0.5, 3]), (2.0, [0.25, 1], [0.25, 1.5])])
def test_lora_pro(s, x_a, g_b):
    first, second, gradient = tensor([1, 0]), tensor([1], [0]), tensor([1, 2], [3, 4])
    g_a, g_b_found = adjusted_gradients(first, second, s * second.T @ gradient, s * gradient @ first.T, s)
    close(g_a, [x_a])
    close(g_b_found[:, 0], g_b)
    close(s * (second @ g_a + g_b_found @ first), [[1, 2], [3, 0]])


def test_lora_pro_comes_nearest_to_the_full_gradient():
    """s (B g_A + g_B A) is the projection of G onto what A and B can do: no other pair is nearer."""
    torch.manual_seed(0)
    first, second, gradient, s = torch.randn(2, 5), torch.randn(6, 2), torch.randn(6, 5), 0.5
    g_a, g_b = adjusted_gradients(first, second, s * second.T @ gradient, s * gradient @ first.T, s)
    rest = gradient - s * (second @ g_a + g_b @ first)
    close(second.T @ rest, torch.zeros(2, 5), atol=1e-4)
    close(rest @ first.T, torch.zeros(6, 2), atol=1e-4)


@pytest.mark.parametrize(("b", "want"), [(1, 8.0), (2, 20.0), (3, 37.3333), (4, 20.0)])
def test_dylora(b, want):
    first, second = tensor([1, 0], [0, 1], [1, 1], [1, -1]), tensor([1, 2, 3, 4])
    hidden = F.linear(tensor([1, 2]), first)
    close((8 / 4) * F.linear(cut(hidden, b), second)[0, 0], want, atol=1e-3)


def test_dylora_draws_every_rank_and_the_same_for_a_step():
    ranks = [drawn_rank(3, step, 4) for step in range(200)]
    assert set(ranks) == {1, 2, 3, 4} and ranks == [drawn_rank(3, step, 4) for step in range(200)]
    assert ranks != [drawn_rank(4, step, 4) for step in range(200)]


def test_adamw_moves_what_has_no_gradient():
    """So a row that is left out of a step of DyLoRA goes on by its momentum."""
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.0)
    for gradient in ([1.0, 1.0], [1.0, 0.0]):
        before = parameter.detach().clone()
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    assert parameter[1] < before[1] - 0.05


def test_ssf():
    layer = SsfLayer(linear(tensor([1, 2], [3, 4]), [1, 1]), "default", SsfConfig(), path="x")
    layer.ssf_scale["default"].data = torch.tensor([2, 0.5])
    layer.ssf_shift["default"].data = torch.tensor([1.0, -1.0])
    close(layer(tensor([1, 1])), [[9, 3]])
    layer.merge(safe_merge=True)
    close(layer.base_layer.weight, [[2, 4], [1.5, 2]])
    close(layer.base_layer.bias, [3, -0.5])
    close(layer(tensor([1, 1])), [[9, 3]])
    layer.unmerge()
    close(layer.base_layer.weight, [[1, 2], [3, 4]])


def test_lorta():
    config = LortaConfig(r=1, alpha=1, heads=2, num_layers=1, places={"x": [0, 0]})
    layer = LortaLayer(linear(torch.zeros(2, 2)), "default", config, path="x")
    for name, value in (
        ("lorta_a", [[1], [2]]), ("lorta_b", [[3]]), ("lorta_layer", [[2]]), ("lorta_head", [[1], [10]]),
        ("lorta_matrix", [[1], [1], [1], [1]]),
    ):  # fmt: skip
        getattr(layer, name)["default"].data = torch.tensor(value, dtype=torch.float32)
    close(layer.merged_weights("default")[0], [[6, 60], [12, 120]])
    close(layer(torch.eye(2)).T, [[6, 60], [12, 120]])


def test_lorta_as_released_has_its_heads_on_the_inputs():
    """Re-enacted: ihounie/lorta, `_compute_weights_from_tensor` sets blocks A diag(c_h c_m c_l) B side by side, for
    q, k, v and o alike. On the outputs, the natural reading, they would stand one below the other."""
    a, b, c_layer, c_head, c_matrix = tensor([1], [2]), tensor([3]), tensor([2]), tensor([1], [10]), torch.ones(4, 1)
    blocks = [a @ torch.diag(c_head[head] * c_matrix[0] * c_layer[0]) @ b for head in range(2)]
    close(torch.cat(blocks, dim=1), [[6, 60], [12, 120]])
    close(torch.cat([block.T for block in blocks]), [[6, 12], [60, 120]])


def test_lortas_parameters_on_roberta_base():
    """4 (768 + 64 + 12 + 12 + 4), as the paper counts them."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    with torch.device("meta"):
        model = RobertaForSequenceClassification(RobertaConfig())
    layers = {name: (m.in_features, m.out_features) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    tuner = Lorta(AdapterConfig(tuner="lorta", rank=4))
    model = by_its_tuner(model, tuner, tuner.chosen_layers(model, layers))
    share_tensors(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3440


def test_sara():
    layer = SparseLayer(linear(tensor([0.5, -0.001], [-0.002, 0.3])), "default", SparseConfig(), path="x")
    layer.choose("default", torch.tensor([1, 2]))
    layer.sparse_values["default"].data = torch.tensor([3.0, -4.0])
    close(layer.change("default"), [[0, 3], [-4, 0]])
    close(nuclear_norm(layer.change("default")), 7)
    close(layer(torch.eye(2)).T, [[0.5, 2.999], [-4.002, 0.3]])
    layer.merge()
    close(layer.base_layer.weight, [[0.5, 2.999], [-4.002, 0.3]])


def test_the_gradient_of_saras_norm_is_0_at_the_start():
    """That of torch.linalg.matrix_norm is 1 in size there, as if it were to shrink what is 0."""
    start = torch.zeros(3, 3, requires_grad=True)
    nuclear_norm(start).backward()
    assert not start.grad.any()
    moved = torch.randn(3, 3, requires_grad=True)
    nuclear_norm(moved).backward()
    theirs = moved.detach().clone().requires_grad_()
    torch.linalg.matrix_norm(theirs, "nuc").backward()
    close(moved.grad, theirs.grad, atol=1e-4)


def test_saras_norm_leaves_singular_values_of_rounding_out():
    """The gradient U₊V₊ᵀ of a matrix of rank 2 has the size √2, whatever its sides are."""
    torch.manual_seed(0)
    low = (torch.randn(64, 2) @ torch.randn(2, 64)).requires_grad_()
    nuclear_norm(low).backward()
    assert low.grad.norm().item() == pytest.approx(2**0.5, rel=1e-4)


# ---- Delta-LoRA: what is written into the base, and what we do instead


def delta(alpha, *, weight, start, written=False, steps=12, lr=0.02, optimizer=torch.optim.Adam):
    """Losses of a small regression by Delta-LoRA: as published, W += λ s (B₊A₊ − BA) (`written`), or as here."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 6), torch.randn(32, 5)
    model = nn.Sequential(nn.Linear(6, 5, bias=False))
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=alpha, target_modules=["0"]))
    layer = model.base_model.model[0]
    method = DeltaLora(AdapterConfig(rank=2, options={"weight": weight, "start": start}))
    if not written:
        method.prepare(model)
    first, second, s = layer.lora_A["default"].weight, layer.lora_B["default"].weight, alpha / 2
    update, losses = optimizer([first, second], lr=lr), []
    for step in range(steps):
        method.begin_step(model, step)
        loss = (model(x) - y).square().mean()
        update.zero_grad()
        loss.backward()
        before = (second @ first).detach()
        update.step()
        if written and step >= start:
            layer.base_layer.weight.data += weight * s * ((second @ first).detach() - before)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("start", [0, 4])
def test_delta_lora_is_the_written_one_without_writing(start):
    assert delta(2, weight=2, start=start) == pytest.approx(delta(2, weight=2, start=start, written=True), abs=2e-6)


def test_delta_lora_from_the_start_is_lora_with_another_alpha_under_adam():
    """K = 0 and Adam: no more than α (1 + λ). Under SGD it differs."""
    assert delta(2, weight=2, start=0) == pytest.approx(delta(6, weight=0, start=0), abs=2e-5)
    sgd = {"optimizer": torch.optim.SGD, "lr": 0.1}
    assert abs(delta(2, weight=2, start=0, **sgd)[-1] - delta(6, weight=0, start=0, **sgd)[-1]) > 1e-3


def test_delta_lora_check_value():
    """1 × 1: W 1, A 1 → 2, B 0 → 0.5, s 2, λ 0.5: the written W is 2 (W + λ s ΔBA = 1 + 0.5 · 2 · 1), y(1) = 4."""
    model = get_peft_model(nn.Sequential(linear(tensor([1.0]))), LoraConfig(r=1, lora_alpha=2, target_modules=["0"]))
    layer = model.base_model.model[0]
    first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    first.data.fill_(1.0)
    method = DeltaLora(AdapterConfig(rank=1, options={"weight": 0.5, "start": 0}))
    method.prepare(model)
    method.begin_step(model, 0)
    first.data.fill_(2.0)
    second.data.fill_(0.5)
    close(model(torch.ones(1, 1))[0, 0], 4.0)
    with model.disable_adapter():
        close(model(torch.ones(1, 1))[0, 0], 1.0)


def test_bottleneck():
    """h + U f(D h) of a layer's output h: W x = (1, −2), D h = (1 − 2, −1), relu (0, 0) or silu."""
    for activation, function in (("relu", F.relu), ("silu", F.silu), ("gelu", F.gelu)):
        config = BottleneckConfig(r=2, activation=activation)
        layer = BottleneckLayer(linear(tensor([1, 0], [0, -2])), "default", config, path="x")
        close(layer(tensor([1, 1])), [[1, -2]])  # U = 0
        down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
        down.weight.data, down.bias.data = tensor([1, 1], [-1, 0]), torch.tensor([0.0, 3.0])
        up.weight.data, up.bias.data = tensor([1, 0], [2, 3]), torch.tensor([0.5, 0.0])
        inside = function(torch.tensor([-1.0, 2.0]))
        close(layer(tensor([1, 1])), [[1.5 + inside[0], -2 + 2 * inside[0] + 3 * inside[1]]])
