"""Each NLU term against values by hand, by gradcheck, and where it is constant."""

import math

import pytest
import torch

from ba_lora.config.schema_nlu import NLURegularizersConfig
from ba_lora.objective import regularizers
from ba_lora.objective.regularizers import every_row
from ba_lora.objective.regularizers_nlu import constant_terms, covariance, normalized_mse
from tests.support.losses import TermWeights, nlu_loss

PAPER2024 = NLURegularizersConfig()
ICLR2026 = NLURegularizersConfig(
    lambda_consistency=0.15, lambda_diversity=0.03, lambda_svd=0.03, temperature=2.0, consistency_form="kl"
)


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def kl(logits, reference, temperature=1.0):
    return regularizers.consistency(logits, reference, every_row(logits), temperature=temperature)


# ---- by hand ----


def test_normalized_mse_by_hand():
    """[3, 4] → [0.6, 0.8], [0, 2] → [0, 1]: (0.36 + 0.04) / 2 = 0.2; equal directions give 0."""
    logits, reference = tensor([3, 4], [1, 1]), tensor([0, 2], [5, 5])
    assert normalized_mse(logits, reference).tolist() == pytest.approx([0.2, 0])


def test_a_row_of_zero_logits_has_no_direction_and_no_gradient():
    """A head that starts at zero: (0 − ẑ_P)² = 1 over D = 2 columns, and no gradient of 1 / 1e-12."""
    logits = tensor([0, 0], [3, 4]).float().requires_grad_()
    distance = normalized_mse(logits, tensor([0, 2], [0, 2])).sum()
    assert distance.item() == pytest.approx(0.5 + 0.2)
    (gradient,) = torch.autograd.grad(distance, logits)
    assert torch.equal(gradient[0], torch.zeros(2)) and 0 < gradient[1].abs().max() < 1
    assert not normalized_mse(logits.detach(), logits).any()


def test_kl_by_hand():
    """softmax([0, 0]) = ½, ½ against softmax([ln 3, 0]) = ¾, ¼: ½ ln(½ / ¾) + ½ ln(½ / ¼); at T = 2 times 4."""
    logits, reference = tensor([math.log(3), 0]), tensor([0, 0])
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert kl(logits, reference).item() == pytest.approx(expected)
    assert kl(2 * logits, 2 * reference, temperature=2).item() == pytest.approx(4 * expected)


def test_covariance_by_hand():
    """Columns (1, −1, 0) and (2, 0, −2): C_01 = (2 + 0 + 0) / 2 = 1, once above, once below the diagonal, over D = 2;
    a shift of a column changes nothing."""
    features = tensor([1, 2], [-1, 0], [0, -2])
    assert covariance(features).item() == pytest.approx(1.0)
    assert covariance(features + tensor([10, -3])).item() == pytest.approx(1.0)


def test_covariance_needs_two_rows():
    with pytest.raises(ValueError, match="at least 2 rows"):
        covariance(tensor([1, 2]))


def test_svd_by_hand():
    """Singular values 3, 2, 1 and k = 1: −3 / 6; with k ≥ D the ratio is −1 whatever the logits."""
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    assert regularizers.svd(matrix, every_row(matrix), top_k=1).item() == pytest.approx(-0.5)
    logits = random(8, 3).requires_grad_()
    value = regularizers.svd(logits, every_row(logits), top_k=5)
    value.backward()
    assert value.item() == pytest.approx(-1) and logits.grad.abs().max() < 1e-12


# ---- gradients ----


@pytest.mark.parametrize("config", [PAPER2024, ICLR2026], ids=["paper2024", "iclr2026"])
@pytest.mark.parametrize("features", ["logits", "pooled"])
@pytest.mark.parametrize("diversity", ["covariance", "entropy"])
def test_gradcheck(config, features, diversity):
    import dataclasses

    config = dataclasses.replace(config, features=features, diversity_form=diversity, svd_top_k=2)
    logits, pooled = random(6, 3).requires_grad_(), random(6, 4, seed=1).requires_grad_()
    reference, labels = random(6, 3, seed=2), torch.tensor([0, 1, 2, 0, 1, 2])
    weights = TermWeights(task=0.3, consistency=2.0, diversity=0.7, svd=1.3)

    def total(logits, pooled):
        return nlu_loss(logits, reference, pooled, labels, weights=weights, config=config)[0]

    assert torch.autograd.gradcheck(total, (logits, pooled))


def test_the_reference_receives_no_gradient():
    logits, reference = random(4, 3).requires_grad_(), random(4, 3, seed=1).requires_grad_()
    (normalized_mse(logits, reference).sum() + kl(logits, reference)).backward()
    assert logits.grad is not None and reference.grad is None


# ---- the loss ----


def test_the_total_is_the_weighted_sum_of_the_terms():
    logits, pooled, reference = random(5, 3), random(5, 8, seed=1), random(5, 3, seed=2)
    labels = torch.tensor([0, 1, 2, 1, 0])
    config = NLURegularizersConfig(svd_top_k=1)
    weights = TermWeights(task=0.2, consistency=3.0, diversity=5.0, svd=7.0)
    total, terms = nlu_loss(logits, reference, pooled, labels, weights=weights, config=config)
    expected = {
        "task": torch.nn.functional.cross_entropy(logits, labels, reduction="sum"),
        "consistency": normalized_mse(logits, reference).sum(),
        "diversity": covariance(logits),
        "svd": regularizers.svd(logits, every_row(logits), top_k=1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    torch.testing.assert_close(total, sum(getattr(weights, name) * value for name, value in expected.items()))


def test_features_choose_what_diversity_and_svd_see():
    logits, pooled = random(5, 3), random(5, 8, seed=1)
    config = NLURegularizersConfig(lambda_consistency=0, features="pooled", svd_top_k=2)
    weights = TermWeights(task=1.0, diversity=1.0, svd=1.0)
    _, terms = nlu_loss(logits, None, pooled, torch.zeros(5, dtype=torch.long), weights=weights, config=config)
    torch.testing.assert_close(terms["diversity"], covariance(pooled))
    torch.testing.assert_close(terms["svd"], regularizers.svd(pooled, every_row(pooled), top_k=2))


def test_regression_is_the_squared_error():
    config = NLURegularizersConfig(lambda_consistency=0, lambda_diversity=0, lambda_svd=0)
    logits, labels = tensor([1.0], [4.0]), torch.tensor([2.0, 2.5])
    total, terms = nlu_loss(logits, None, None, labels, weights=TermWeights(task=0.5), config=config)
    assert terms["task"].item() == pytest.approx(1 + 2.25) and total.item() == pytest.approx(0.5 * 3.25)
    assert set(terms) == {"task"}


def test_one_row_has_no_covariance_but_every_other_term():
    config = NLURegularizersConfig(svd_top_k=1)
    weights = TermWeights(task=1.0, consistency=1.0, diversity=1.0, svd=1.0)
    _, terms = nlu_loss(random(1, 3), random(1, 3, seed=1), None, torch.tensor([1]), weights=weights, config=config)
    assert set(terms) == {"task", "consistency", "weighted_consistency", "svd"}


# ---- constant by construction ----


@pytest.mark.parametrize(
    ("num_logits", "features", "micro_batch", "norm", "off"),
    [
        (1, "logits", 16, "nuclear", {"consistency", "diversity", "svd"}),
        (1, "logits", 16, "frobenius", {"consistency", "diversity", "svd"}),
        (1, "pooled", 16, "nuclear", {"consistency"}),
        (2, "logits", 16, "nuclear", {"svd"}),
        (2, "logits", 16, "frobenius", set()),
        (3, "logits", 16, "nuclear", {"svd"}),
        (6, "logits", 16, "nuclear", set()),
        (3, "pooled", 16, "nuclear", set()),
        (3, "pooled", 5, "nuclear", {"svd"}),  # 5 rows have 5 singular values
        (3, "pooled", 5, "frobenius", set()),
    ],
)
def test_constant_terms(num_logits, features, micro_batch, norm, off):
    """And what is named has no gradient, what is not named has one."""
    constant = constant_terms(
        num_logits, features=features, hidden_size=32, micro_batch=micro_batch, svd_top_k=5, svd_norm=norm
    )
    assert set(constant) == off and all(constant.values())
    logits = random(micro_batch, num_logits).requires_grad_()
    seen = logits if features == "logits" else random(micro_batch, 32, seed=1).requires_grad_()
    values = {
        "consistency": normalized_mse(logits, random(micro_batch, num_logits, seed=2)).mean(),
        "diversity": covariance(seen),
        "svd": regularizers.svd(seen, every_row(seen), top_k=5, norm=norm),
    }
    for name, value in values.items():
        source = logits if name == "consistency" else seen
        (gradient,) = torch.autograd.grad(value, source)
        assert (gradient.abs().max() < 1e-12) == (name in off), name
