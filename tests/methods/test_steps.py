"""What a method does with gradients, weights and moments around an optimizer's step, against steps written out."""

import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import MontecloraConfig
from torch import nn
from transformers import PretrainedConfig, TrainerCallback

from ba_lora.config.schema import AdapterConfig
from ba_lora.config.schema_nlu import NLURegularizersConfig
from ba_lora.errors import UserError
from ba_lora.methods import dylora
from ba_lora.methods.base import TrainingRows
from ba_lora.methods.lora_fa import factor_pairs
from ba_lora.methods.lora_pro import ProAdamW
from ba_lora.methods.nmtune import feature_consistency, feature_covariance, feature_dominance
from ba_lora.methods.sam import Sam
from ba_lora.methods.sara import Sara, nuclear_norm
from ba_lora.methods.sparse import SparseConfig, choose_places, sparse_layers
from tests.support.methods import trainer_of
from tests.support.tiny import adapter_weights, arguments
from tests.support.tiny_nlu import classifier_trainer, tiny_classifier

# ---- DyLoRA


class Recorder(TrainerCallback):
    """Keeps the trained weights after each step."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.weights = model, [adapter_weights(model)]

    def on_step_end(self, *_, **__) -> None:
        self.weights.append(adapter_weights(self.model))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("restore", [True, False])
def test_dylora_moves_the_rows_of_the_steps_rank(frozen, restore, base, tmp_path, monkeypatch):
    """Row b alone, or the first b. Restored, all others are the same to the bit, under momentum and weight decay. Else
    those of earlier steps go on, and A, which is not 0 at the start, decays as a whole."""
    drawn = []
    monkeypatch.setattr(dylora, "drawn_rank", lambda *of: drawn.append(of) or (4, 2, 4, 2)[of[1]])
    options = f"adapter.options={{frozen: {frozen}, restore: {restore}}}"
    trained = trainer_of("dylora", base, tmp_path, "seed=5", options, weight_decay=0.1)
    recorder = Recorder(trained.model)
    trained.add_callback(recorder)
    trained.train()
    assert drawn == [(5, step, 4) for step in range(4)]
    seen: set[int] = set()
    for b, before, after in zip((4, 2, 4, 2), recorder.weights[:-1], recorder.weights[1:], strict=True):
        learning = {b - 1} if frozen else set(range(b))
        seen |= learning
        for name in before:
            moved = (before[name] != after[name]).any(dim=1 if "lora_A" in name else 0)
            expected = learning if restore else set(range(4)) if "lora_A" in name else seen
            assert set(moved.nonzero().flatten().tolist()) == expected, name
    for name, parameter in trained.model.named_parameters():
        if frozen and parameter.requires_grad:  # nor do gradients of other rows reach the optimizer, or the clipping
            moments = trained.optimizer.state[parameter]["exp_avg"]
            assert (moments if "lora_A" in name else moments.T)[[0, 2]].abs().max() == 0


# ---- SaRA


def sparse_model(*weights: list[list[float]]) -> nn.Module:
    layers = [nn.Linear(len(weight[0]), len(weight), bias=False) for weight in weights]
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.data = torch.tensor(weight)
    targets = [str(number) for number in range(len(layers))]
    return get_peft_model(nn.Sequential(*layers), SparseConfig(target_modules=targets))


def sara(num_steps: int = 4, **options: float) -> Sara:
    tuner = Sara(AdapterConfig(tuner="sara", options=options))
    tuner.peft_config(num_steps)
    return tuner


SMALL = [[0.5, -0.001], [-0.002, 0.3]]


def test_sara_trains_the_smallest_weights_over_all_layers(tmp_path):
    """θ between 0.002 and 0.3 gives M = [[0, 1], [1, 0]]; a second layer has its own share of the same θ."""
    model = sparse_model(SMALL, [[1.0, 1.0], [1.0, 0.0005]])
    sara(share=3 / 8).choose_weights(model, tmp_path / "nothing", None)
    first, second = sparse_layers(model).values()
    assert first.sparse_places["default"].tolist() == [1, 2] and second.sparse_places["default"].tolist() == [3]
    assert not first.sparse_values["default"].any() and first.sparse_values["default"].requires_grad
    assert model.peft_config["default"].counts == {"0": 2, "1": 1}


def test_sara_freezes_what_has_grown_and_lets_the_rest_begin_again(tmp_path):
    """At half of the steps. P₀ goes to 0.2 > θ = 0.002 and stays there; P₁ = 0 so far, and has new moments."""
    model, tuner = sparse_model(SMALL), sara(share=0.5, reselect=0.5)
    tuner.choose_weights(model, tmp_path / "nothing", None)
    (values,) = (layer.sparse_values["default"] for layer in sparse_layers(model).values())
    optimizer = torch.optim.AdamW([values], lr=0.1, weight_decay=0.1)
    seen = []
    for step, gradient in enumerate(([-1.0, 0.0], [-1.0, 0.0], [-1.0, -1.0], [-1.0, -1.0])):
        tuner.begin_step(model, step)
        values.grad = torch.tensor(gradient)
        tuner.before_step(model, step)
        optimizer.step()
        tuner.after_step(model, step, optimizer)
        seen.append(values.detach().clone())
    assert seen[1][0] > 0.19 and seen[1][1] == 0
    assert torch.equal(seen[2][0], seen[1][0]) and torch.equal(seen[3][0], seen[1][0])
    torch.testing.assert_close(seen[2][1], torch.tensor(0.1))  # the first step of a new AdamW: the learning rate
    assert optimizer.state[values]["step"] == 2 and optimizer.state[values]["exp_avg"][0] == 0
    assert {name: kept.tolist() for name, kept in tuner.state(model).items()} == {"base_model.model.0": [True, False]}


def test_saras_norm_is_that_of_all_layers_or_of_drawn_ones_multiplied_up():
    model = sparse_model(SMALL, SMALL)
    choose_places(model, dict.fromkeys(sparse_layers(model), torch.tensor([1, 2])))
    for layer, values in zip(sparse_layers(model).values(), ([3.0, -4.0], [1.0, 0.0]), strict=True):
        layer.sparse_values["default"].data = torch.tensor(values)  # nuclear norms 7 and 1
    (term,) = sara(norm_layers=2, norm_weight=0.25).terms(model)
    assert term.weight == 0.25
    torch.testing.assert_close(term.function(model), torch.tensor(8.0))
    tuner, drawn = sara(norm_layers=1), []
    (term,) = tuner.terms(model)
    for step in range(20):
        tuner.begin_step(model, step)
        drawn.append(round(term.function(model).item(), 4))
    assert set(drawn) == {14.0, 2.0}
    assert nuclear_norm(torch.eye(3)) == pytest.approx(3)


# ---- SAM


class Given(nn.Module):
    """Linear layers whose loss is Σ G ⊙ W, so that the gradients are the given G; one without G is not run."""

    config = PretrainedConfig(pad_token_id=0)

    def __init__(self, *gradients: list[list[float]] | None) -> None:
        super().__init__()
        self.gradients = gradients
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in gradients)

    def forward(self, input_ids: torch.Tensor, **_: torch.Tensor) -> SimpleNamespace:
        run = [(layer, torch.tensor(g)) for layer, g in zip(self.layers, self.gradients, strict=True) if g is not None]
        return SimpleNamespace(loss=sum((g * layer(torch.eye(2)).T).sum() for layer, g in run) * input_ids[0, 0])


ROWS = TrainingRows(Dataset.from_list([{"input_ids": [1], "labels": [1]}, {"input_ids": [2], "labels": [2]}]), 0)


def sam_places(*gradients: list[list[float]] | None, share: float, folder) -> tuple[list[list[int]], nn.Module]:
    model = get_peft_model(Given(*gradients), SparseConfig(target_modules=["0", "1"]))
    Sam(AdapterConfig(tuner="sam", options={"share": share})).choose_weights(model, folder / "run" / "places", ROWS)
    return [layer.sparse_places["default"].tolist() for layer in sparse_layers(model).values()], model


LOUD = [[1.0, -8.0], [2.0, 0.0]]


def test_sam_trains_the_weights_of_the_largest_squared_gradients_over_all_layers(tmp_path):
    places, model = sam_places(LOUD, [[0.5, 4.0], [-3.0, 0.1]], share=3 / 8, folder=tmp_path)
    assert places == [[1], [1, 2]]
    assert (tmp_path / "run" / "places").is_file()
    for layer in sparse_layers(model).values():
        assert not layer.base_layer.weight.requires_grad and layer.base_layer.weight.grad is None
        assert layer.sparse_values["default"].requires_grad


def test_sam_trains_no_more_than_its_share_where_gradients_are_equal(tmp_path):
    """Two of eight are not 0: the third of three is one of the others, and not all of them."""
    places, _ = sam_places([[0.0, 5.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 7.0]], share=3 / 8, folder=tmp_path)
    assert 1 in places[0] and 3 in places[1] and len(places[0]) + len(places[1]) == 3


@pytest.mark.parametrize(
    "other", [None, [[0.0, 0.0], [0.0, 0.0]], [[1.0, math.nan], [1.0, 1.0]], [[math.inf, 0], [0, 0]]]
)
def test_sam_refuses_a_layer_without_a_gradient(other, tmp_path):
    with pytest.raises(UserError, match="the gradient of layers.1 is 0 or not finite on the training rows") as error:
        sam_places(LOUD, other, share=0.5, folder=tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "run" / "places").exists()


# ---- optimizers


def test_lora_plus_gives_b_another_learning_rate_and_nothing_else(tiny_encoder, tmp_path):
    model = tiny_classifier(tiny_encoder, "adapter.options.lr_ratio=8", method="lora_plus")
    off = NLURegularizersConfig(lambda_consistency=0, lambda_diversity=0, lambda_svd=0)
    trainer = classifier_trainer(model, arguments(tmp_path, weight_decay=0.1), regularizers=off)
    groups = trainer.create_optimizer().param_groups
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    trained = {name: found.pop(id(p)) for name, p in model.named_parameters() if p.requires_grad}
    assert not found
    kinds = {"lora_A": (1e-3, 0.1), "lora_B": (8e-3, 0.1), "classifier": (1e-3, 0.1)}
    for name, chosen in trained.items():
        expected = next(value for kind, value in kinds.items() if kind in name)
        assert chosen == pytest.approx((expected[0], 0.0) if name.endswith("bias") else expected), name
    assert {kind for kind in kinds if any(kind in name for name in trained)} == set(kinds)
    assert any(name.endswith("classifier.modules_to_save.default.bias") for name in trained)


def test_what_lora_fa_and_lora_pro_read_the_gradient_off():
    """∇A = s Bᵀ G and ∇B = s G Aᵀ, G of the weight that the layer has: so in LoRA, not in DoRA and MonteCLoRA."""

    def distances(**settings):
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Linear(256, 256, bias=False))
        model = get_peft_model(layer, LoraConfig(r=8, lora_alpha=8, target_modules=["0"], **settings)).train()
        x, y, ((a, b, s),) = torch.randn(64, 256), torch.randn(64, 256), factor_pairs(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(21):  # the gradients of the last step are those of weights that have moved
            first, second = a.detach().clone(), b.detach().clone()
            optimizer.zero_grad()
            output = model(x)
            output.retain_grad()
            (output - y).square().mean().backward()
            optimizer.step()
        gradient = output.grad.T @ x
        wanted = ((a.grad, s * second.T @ gradient), (b.grad, s * gradient @ first.T))
        return [((found - want).norm() / found.norm()).item() for found, want in wanted]

    draws = MontecloraConfig(num_samples=4, sample_scaler=5e-3, buffer_size=1)
    dora, noisy = distances(use_dora=True), distances(monteclora_config=draws)
    print(f"away from LoRA's ∇A and ∇B: DoRA {dora}, MonteCLoRA {noisy}")
    assert max(distances()) < 1e-5 and min(dora) > 0.5
    assert noisy[0] < 1e-5 and noisy[1] > 0.1


def pair_of(a, b, gradient, s):
    """g_A and g_B by the paper's equations, its equation for X as one linear system."""
    aa, bb, da, db = a @ a.T, b.T @ b, s * b.T @ gradient, s * gradient @ a.T
    right = db @ torch.linalg.inv(aa) / s**2
    if not b.any():
        return da, right
    left, eye = torch.linalg.inv(bb) @ da / s**2, torch.eye(len(a), dtype=a.dtype)
    system = torch.kron(bb, eye) + torch.kron(eye, aa)  # of X by rows
    x = torch.linalg.solve(system, (-left @ a.T).flatten()).view(aa.shape)
    return left + x @ a, right - b @ torch.linalg.inv(bb) @ b.T @ right - b @ x


@pytest.mark.parametrize("form", ["full", "efficient"])
def test_lora_pro_steps_as_written_out(form):
    """Three steps from B = 0 on ½ ‖W + s BA − T‖², whose gradient of the whole weight is W + s BA − T."""
    torch.manual_seed(0)
    s, lr, decay, beta1, beta2, eps = 0.5, 0.1, 0.1, 0.9, 0.99, 1e-8
    distance = torch.randn(6, 5, dtype=torch.double)
    first, second = nn.Parameter(torch.randn(2, 5).double()), nn.Parameter(torch.zeros(6, 2).double())
    groups = [{"params": [first, second], "weight_decay": decay}]
    settings = {"lr": lr, "betas": (beta1, beta2), "eps": eps}
    optimizer = ProAdamW(groups, [(first, second, s)], full=form == "full", **settings)
    a, b, moments = first.detach().clone(), second.detach().clone(), {}

    def normalised(name: str, gradient: torch.Tensor, step: int) -> torch.Tensor:
        mean, square = moments.get(name, (torch.zeros_like(gradient), torch.zeros_like(gradient)))
        moments[name] = mean, square = (
            beta1 * mean + (1 - beta1) * gradient,
            beta2 * square + (1 - beta2) * gradient**2,
        )
        return mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + eps)

    for step in (1, 2, 3):
        optimizer.zero_grad()
        (0.5 * (distance + s * second @ first).square().sum()).backward()
        optimizer.step()
        g_a, g_b = pair_of(a, b, distance + s * b @ a, s)
        if form == "full":
            g_a, g_b = pair_of(a, b, normalised("W", s * (b @ g_a + g_b @ a), step), s)
        else:
            g_a, g_b = normalised("A", g_a, step), normalised("B", g_b, step)
        a, b = (1 - lr * decay) * a - lr * g_a, (1 - lr * decay) * b - lr * g_b
        torch.testing.assert_close(first.detach(), a, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(second.detach(), b, rtol=1e-4, atol=1e-5)
    assert b.abs().max() > 0.05


# ---- NMTune


def test_the_terms_of_nmtune():
    """F = [[3, 4], [1, 0]], Z = [[3, 0], [0, 1]]: unit rows (.6, .8), (1, 0) and (1, 0), (0, 1);
    C = [[4.5, −1.5], [−1.5, .5]]; σ = 3, 1."""
    pretrained, mapped = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    assert feature_consistency(pretrained, mapped).item() == pytest.approx((0.4**2 + 0.8**2 + 2) / 2)
    assert feature_covariance(pretrained, mapped).item() == pytest.approx(2 * 1.5**2 / 2)
    assert feature_dominance(pretrained, mapped).item() == pytest.approx(-0.75)
    assert feature_covariance(pretrained[:1], mapped[:1]) == 0
