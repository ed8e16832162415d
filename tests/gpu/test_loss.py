"""The fused loss and the plain one against their definition in float64, in value and gradient, in each precision."""

import contextlib
import dataclasses

import pytest
import torch

from ba_lora import BALoRAConfig
from ba_lora.objective.losses.fused import _Head
from tests.objective.test_fused import by_definition, fused, gradient_of
from tests.support.losses import TermWeights

pytestmark = pytest.mark.gpu
POSITIONS, HIDDEN, VOCABULARY = 97, 128, 4000  # a prime: no chunks fit evenly
WEIGHTS = TermWeights(task=1 / POSITIONS, consistency=0.5 / POSITIONS, diversity=0.3 / POSITIONS, svd=0.2)
TERMS = BALoRAConfig(lambda_consistency=0.5, lambda_diversity=0.3, lambda_svd=0.2, svd_top_k=5)
# Buffers of so many MiB hold some of the positions only: the last chunk is a smaller one.
SMALL_MB = {"chunk_memory_mb": 0.5}
# Relative errors allowed of value and gradient: a few roundings of the products, to 24, 11 and 8 bits.
ALLOWED = {"float32": (1e-5, 1e-4), "tf32": (2e-3, 2e-2), "bfloat16": (5e-3, 4e-2)}


@contextlib.contextmanager
def tf32(on: bool):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def problem(dtype: torch.dtype, *, device: str = "cpu", computed_in: torch.dtype | None = None):
    """Hidden states, the reference's near them, a frozen head and targets: the same at every call, rounded to `dtype`,
    then put on the device in `computed_in`."""
    torch.manual_seed(0)
    head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False).requires_grad_(False)
    torch.nn.init.normal_(head.weight, std=0.2)
    hidden = torch.randn(POSITIONS, HIDDEN)
    reference = hidden + 0.3 * torch.randn(POSITIONS, HIDDEN)
    targets = torch.randint(0, VOCABULARY, (POSITIONS,))
    placed = [part.to(dtype).to(device, computed_in or dtype) for part in (hidden, reference, head)]
    return placed[0].requires_grad_(), *placed[1:], targets.to(device)


def value_and_gradient(loss, tensors, config, weights, **settings):
    """In float64, on the CPU."""
    total = loss(*tensors, config, weights, **settings)[0]
    return total.detach().double().cpu(), gradient_of(total, tensors[0]).double().cpu()


@pytest.mark.parametrize("terms", ["all", "task", "consistency", "diversity", "svd"])
@pytest.mark.parametrize("precision", ALLOWED)
def test_fused_and_plain_are_the_definition(device, figure, precision, terms, monkeypatch):
    """The fused one with all positions in one chunk, and in several."""
    if precision == "tf32" and device == "cpu":
        pytest.skip("TF32 is CUDA's")
    left_out = [name for name in ("consistency", "diversity", "svd") if terms not in ("all", name)]
    config = dataclasses.replace(TERMS, **{f"lambda_{name}": 0.0 for name in left_out})
    weights = dataclasses.replace(WEIGHTS, **dict.fromkeys(left_out, 0.0))
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    exact = value_and_gradient(by_definition, problem(dtype, computed_in=torch.float64), config, weights)
    chunks, back = [], _Head.back
    monkeypatch.setattr(_Head, "back", lambda head, dz_CV: chunks.append(len(dz_CV)) or back(head, dz_CV))
    with tf32(precision == "tf32"):
        for name, loss, settings in (
            ("plain", by_definition, {}),
            ("fused", fused, {}),
            ("in chunks", fused, SMALL_MB),
        ):
            chunks.clear()
            got = value_and_gradient(loss, problem(dtype, device=device), config, weights, **settings)
            if settings:
                assert sum(chunks) == POSITIONS and len(chunks) > 2 and chunks[-1] < chunks[0]
            elif loss is fused:
                assert chunks == [POSITIONS]
            errors = [((ours - right).norm() / right.norm()).item() for ours, right in zip(got, exact, strict=True)]
            figure("{}: value {:.1e}, gradient {:.1e}".format(name, *errors))
            assert all(error < allowed for error, allowed in zip(errors, ALLOWED[precision], strict=True))
