"""The terms against numbers worked out by hand, loops, numerical gradients and their limits."""

import math

import pytest
import torch

from ba_lora.config.schema import BALoRAConfig
from ba_lora.objective import regularizers as reg
from tests.support.losses import TermWeights, nlg_loss

EVERY2 = torch.ones(2, dtype=torch.bool)


def log_of(*rows):
    """Logits whose softmax is the given probabilities."""
    return torch.tensor(rows, dtype=torch.float64).log()


# ---- positions


def test_mask_is_the_shifted_mask_of_the_task_loss():
    labels = torch.tensor([[-100, -100, 5, 6, -100], [7, -100, -100, 8, 9]])
    expected = [[False, True, True, False, False], [False, False, True, True, False]]
    assert reg.response_mask(labels).tolist() == expected
    assert reg.response_targets(labels).tolist() == [5, 6, 8, 9]


def test_mask_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 9, (7, 13), generator=generator)
    labels[torch.rand(7, 13, generator=generator) < 0.5] = -100
    labels[3] = -100
    mask, targets = reg.response_mask(labels), []
    for row in range(7):
        for position in range(13):
            predicts = position + 1 < 13 and labels[row, position + 1] != -100
            assert mask[row, position] == predicts
            if predicts:
                targets.append(int(labels[row, position + 1]))
    assert reg.response_targets(labels).tolist() == targets
    assert int(mask.sum()) == len(targets)


# ---- values by hand


def test_consistency_by_hand():
    tuned, reference = log_of([0.5, 0.5], [0.9, 0.1]), log_of([0.25, 0.75], [0.9, 0.1])
    first = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)  # KL(P_P ‖ P_F), reference first
    assert reg.consistency(tuned, reference, EVERY2).item() == pytest.approx(first / 2, abs=1e-12)
    assert reg.consistency(tuned, reference, EVERY2, reduction="sum").item() == pytest.approx(first, abs=1e-12)


def test_consistency_with_temperature_by_hand():
    tuned, reference = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    p = 1 / (1 + math.exp(-1))  # softmax([2, 0] / 2)
    expected = 4 * (p - (1 - p)) * math.log(p / (1 - p))  # T² Σ q log(q / p) for mirrored distributions
    value = reg.consistency(tuned, reference, EVERY2[:1], temperature=2.0)
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_diversity_by_hand():
    logits = log_of([0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3])
    expected = -(1.5 * math.log(2) + math.log(3)) / 2
    assert reg.diversity(logits, EVERY2).item() == pytest.approx(expected, abs=1e-12)


def test_diversity_of_the_top_k_by_hand():
    logits = log_of([0.5, 0.25, 0.25 - 1e-9, 1e-9])
    expected = -(2 / 3 * math.log(3 / 2) + 1 / 3 * math.log(3))  # 0.5 and 0.25 renormalised
    assert reg.diversity(logits, EVERY2[:1], top_k=2).item() == pytest.approx(expected, abs=1e-7)
    whole = reg.diversity(logits, EVERY2[:1])
    assert reg.diversity(logits, EVERY2[:1], top_k=4).item() == whole.item()
    assert reg.diversity(logits, EVERY2[:1], top_k=99).item() == whole.item()


def test_svd_by_hand():
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0, 4.0], dtype=torch.float64))
    mask = torch.ones(4, dtype=torch.bool)
    assert reg.svd(matrix, mask, top_k=2).item() == pytest.approx(-7 / 10)
    assert reg.svd(matrix, mask, top_k=2, norm="frobenius").item() == pytest.approx(-7 / math.sqrt(30))
    assert reg.svd(matrix, mask, top_k=9).item() == pytest.approx(-1)


def test_adaptive_weights_by_hand():
    reference = log_of([0.5, 0.5], [1 - 1e-12, 1e-12])
    weights = reg.adaptive_position_weights(reference, EVERY2, maximum=2.0)
    assert weights.tolist() == pytest.approx([0.2, 2.0], abs=1e-9)  # unsure: λmin = 0.1 λmax; sure: λmax


# ---- masks, dtypes, gradients


def test_prompt_and_padding_positions_never_count():
    generator = torch.Generator().manual_seed(1)
    tuned, reference = torch.randn(2, 3, 6, 11, generator=generator).unbind(0)
    mask = torch.rand(3, 6, generator=generator) < 0.5
    spoiled, spoiled_reference = tuned.clone(), reference.clone()
    spoiled[~mask], spoiled_reference[~mask] = 1e4, -1e4
    for clean, dirty in (
        (reg.consistency(tuned, reference, mask), reg.consistency(spoiled, spoiled_reference, mask)),
        (reg.diversity(tuned, mask, top_k=5), reg.diversity(spoiled, mask, top_k=5)),
        (reg.svd(tuned, mask, top_k=3), reg.svd(spoiled, mask, top_k=3)),
    ):
        assert clean.item() == dirty.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reductions_are_float32(dtype):
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(2)).to(dtype)
    mask = torch.ones(5, dtype=torch.bool)
    for value in (reg.consistency(logits, logits, mask), reg.diversity(logits, mask), reg.svd(logits, mask, top_k=2)):
        assert value.dtype == torch.float32
    assert reg.consistency(logits, logits, mask).item() == 0


@pytest.mark.parametrize("num_positions", [0, 1, 2])
def test_few_positions_give_finite_values_and_gradients(num_positions):
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(3), requires_grad=True)
    mask = torch.arange(4) < num_positions
    for norm in ("nuclear", "frobenius"):
        total = (
            reg.consistency(logits, logits.detach() + 1, mask)
            + reg.diversity(logits, mask)
            + reg.svd(logits, mask, top_k=3, norm=norm)
        )
        (gradient,) = torch.autograd.grad(total, logits)
        assert torch.isfinite(total) and torch.isfinite(gradient).all()
        if num_positions == 0:
            assert total.item() == 0 and not gradient.any()


@pytest.mark.parametrize("term", ["consistency", "consistency_t2", "weighted", "diversity", "topk", "svd", "frobenius"])
def test_gradcheck(term):
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 4, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    reference = torch.randn(2, 4, 7, dtype=torch.float64, generator=generator)
    mask = torch.tensor([[True, False, True, True], [False, True, True, False]])
    weights = torch.rand(5, dtype=torch.float64, generator=generator)
    functions = {
        "consistency": lambda z: reg.consistency(z, reference, mask),
        "consistency_t2": lambda z: reg.consistency(z, reference, mask, temperature=2.0),
        "weighted": lambda z: reg.consistency(z, reference, mask, position_weights=weights),
        "diversity": lambda z: reg.diversity(z, mask),
        "topk": lambda z: reg.diversity(z, mask, top_k=3),
        "svd": lambda z: reg.svd(z, mask, top_k=2),
        "frobenius": lambda z: reg.svd(z, mask, top_k=2, norm="frobenius"),
    }
    assert torch.autograd.gradcheck(functions[term], (logits,))


def test_the_reference_gets_no_gradient():
    logits, reference = torch.randn(2, 3, 5, requires_grad=True).unbind(0)
    reference = reference.detach().requires_grad_()
    reg.consistency(logits, reference, torch.ones(3, dtype=torch.bool)).backward()
    assert reference.grad is None


def test_svd_gradient_of_a_rank_deficient_matrix_stays_in_its_row_and_column_space():
    """Duplicate rows: the gradient of Σσ is U₊V₊ᵀ, with nothing in the directions of the zero singular values."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(3, 8, dtype=torch.float64, generator=generator)
    matrix = rows[[0, 1, 2, 0, 1]].clone().requires_grad_()
    mask = torch.ones(5, dtype=torch.bool)
    (gradient,) = torch.autograd.grad(reg.svd(matrix, mask, top_k=1), matrix)
    u, s, vh = torch.linalg.svd(matrix.detach(), full_matrices=False)
    kept = s > 1e-9
    assert int(kept.sum()) == 3
    total = s[kept].sum()
    expected = -(torch.outer(u[:, 0], vh[0]) / total - s[0] / total**2 * u[:, kept] @ vh[kept])
    assert torch.allclose(gradient, expected, atol=1e-12)


def test_svd_is_safe_for_equal_singular_values():
    matrix = torch.eye(4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(reg.svd(matrix, torch.ones(4, dtype=torch.bool), top_k=2), matrix)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("norm", ["nuclear", "frobenius"])
def test_svd_gradient_is_exact_for_equal_singular_values_within_the_top(norm):
    """σ = 3, 3, 3, 2, 1 and k = 3: which vectors belong to the equal values is arbitrary, their sum's gradient not."""
    generator = torch.Generator().manual_seed(8)
    u, v = (torch.linalg.qr(torch.randn(n, 5, dtype=torch.float64, generator=generator)).Q for n in (6, 9))
    sigma = torch.tensor([3.0, 3.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    matrix = (u * sigma @ v.T).requires_grad_()
    value = reg.svd(matrix, torch.ones(6, dtype=torch.bool), top_k=3, norm=norm)
    (gradient,) = torch.autograd.grad(value, matrix)
    top, total = u[:, :3] @ v[:, :3].T, 12.0
    if norm == "nuclear":
        expected = -(top / total - 9 / total**2 * u @ v.T)
    else:
        total = math.sqrt(32)
        expected = -(top / total - 9 / total**3 * matrix.detach())
    assert value.item() == pytest.approx(-9 / total, rel=1e-12)
    assert torch.allclose(gradient, expected, atol=1e-12)


def test_frobenius_form_prefers_equal_singular_values():
    """A property of the published formula, noted in REPRODUCTION.md: k equal values score √k, a single one scores 1."""
    mask = torch.ones(4, dtype=torch.bool)
    equal = reg.svd(torch.diag(torch.tensor([2.0, 2.0, 0.0, 0.0])), mask, top_k=2, norm="frobenius")
    single = reg.svd(torch.diag(torch.tensor([2.0, 0.0, 0.0, 0.0])), mask, top_k=2, norm="frobenius")
    assert equal.item() == pytest.approx(-math.sqrt(2)) and single.item() == pytest.approx(-1)


def test_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="mean, sum or none"):
        reg.diversity(torch.zeros(1, 2), EVERY2[:1], reduction="max")


# ---- put together


@pytest.mark.parametrize("schedule", ["constant", "adaptive"])
@pytest.mark.parametrize("norm", ["nuclear", "frobenius"])
def test_nlg_loss_is_the_weighted_sum_of_the_terms(schedule, norm):
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(6, 5, generator=generator, requires_grad=True)
    reference = torch.randn(6, 5, generator=generator)
    head = torch.nn.Linear(5, 12, bias=False).requires_grad_(False)
    targets = torch.randint(0, 12, (6,), generator=generator)
    config = BALoRAConfig(
        lambda_consistency=0.3,
        lambda_diversity=0.2,
        lambda_svd=0.1,
        temperature=2.0,
        diversity_top_k=4,
        svd_top_k=2,
        svd_norm=norm,
        consistency_schedule=schedule,
    )
    weights = TermWeights(task=1 / 6, consistency=0.3 / 6, diversity=0.2 / 6, svd=0.1)
    total, terms = nlg_loss(hidden, reference, head, targets, weights=weights, config=config)

    logits, reference_logits = head(hidden), head(reference)
    mask = torch.ones(6, dtype=torch.bool)
    position_weights = None
    if schedule == "adaptive":
        position_weights = reg.adaptive_position_weights(reference_logits, mask, maximum=1.0)
    expected = (
        torch.nn.functional.cross_entropy(logits, targets)
        + 0.3 * reg.consistency(logits, reference_logits, mask, temperature=2.0, position_weights=position_weights)
        + 0.2 * reg.diversity(logits, mask, top_k=4)
        + 0.1 * reg.svd(logits, mask, top_k=2, norm=norm)
    )
    torch.testing.assert_close(total, expected)
    got, want = torch.autograd.grad(total, hidden)[0], torch.autograd.grad(expected, hidden)[0]
    torch.testing.assert_close(got, want)
    assert set(terms) == {"task", "consistency", "weighted_consistency", "diversity", "svd"}


def test_a_term_with_lambda_zero_is_absent():
    config = BALoRAConfig(lambda_consistency=0, lambda_diversity=0, lambda_svd=0)
    head = torch.nn.Linear(5, 12)
    _, terms = nlg_loss(
        torch.randn(3, 5), None, head, torch.tensor([1, 2, 3]), weights=TermWeights(task=1), config=config
    )
    assert set(terms) == {"task"}


# ---- the svd term without the vocabulary


@pytest.mark.parametrize("norm", ["nuclear", "frobenius"])
@pytest.mark.parametrize(("positions", "vocabulary"), [(3, 50), (20, 50), (20, 6), (1, 50)])
def test_svd_from_hidden_states_is_the_svd_of_the_logits(norm, positions, vocabulary):
    from ba_lora.objective.losses.svd import head_factor, same_singular_values

    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(positions, 8, generator=generator)
    if positions == 20:
        hidden[10:] = hidden[:10]  # duplicate rows: rank-deficient
    hidden.requires_grad_()
    head = torch.nn.Linear(8, vocabulary, bias=False).requires_grad_(False)
    mask = torch.ones(positions, dtype=torch.bool)
    plain = 3.0 * reg.svd(head(hidden), mask, top_k=2, norm=norm)
    fast = 3.0 * reg.svd(same_singular_values(hidden, head_factor(head)), mask, top_k=2, norm=norm)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-6)
    (got,), (want,) = torch.autograd.grad(fast, hidden), torch.autograd.grad(plain, hidden)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("norm", ["nuclear", "frobenius"])
@pytest.mark.parametrize("offset", [5.0, 30.0])
def test_svd_of_a_large_vocabulary_keeps_the_small_singular_values(norm, offset):
    """A common offset of the logits makes one singular value dominant; the others are far above rounding, and count.

    Half of the rows stand twice: what float32 makes of their zero singular values must not count.
    """
    logits = torch.randn(64, 50_000, generator=torch.Generator().manual_seed(1)) + offset
    logits[32:] = logits[:32]
    mask = torch.ones(64, dtype=torch.bool)
    values, gradients = [], []
    for dtype in (torch.float32, torch.float64):
        leaf = logits.to(dtype).requires_grad_()
        values.append(reg.svd(leaf, mask, top_k=3, norm=norm))
        gradients.append(torch.autograd.grad(values[-1], leaf)[0].double())
    torch.testing.assert_close(values[0].double(), values[1], rtol=1e-5, atol=0)
    assert (gradients[0] - gradients[1]).norm() < 1e-2 * gradients[1].norm()


def test_heads_that_must_use_their_logits():
    from ba_lora.objective.losses.svd import head_factor

    assert head_factor(torch.nn.Linear(4, 9)) is None  # bias
    assert head_factor(torch.nn.Linear(4, 9, bias=False)) is None  # trainable
    assert head_factor(lambda hidden: hidden) is None
    assert head_factor(torch.nn.Linear(4, 9, bias=False).requires_grad_(False)).shape == (4, 4)
