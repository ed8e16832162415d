"""A regularizer of one's own: one file, one key; the same values and gradients by the fused and the plain loss."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from ba_lora import BALoRAConfig, BALoRATrainer
from ba_lora.config.schema_nlg import LossConfig
from ba_lora.objective import regularizers
from ba_lora.objective.losses.fused import fused_loss
from ba_lora.objective.losses.plain import plain_loss
from ba_lora.objective.terms.base import BatchTerm, PositionTerm
from ba_lora.objective.terms.block import Positions
from ba_lora.objective.terms.consistency import Consistency
from ba_lora.objective.terms.diversity import Diversity
from ba_lora.objective.terms.task import CrossEntropy
from tests.support.pages import example
from tests.support.tiny import arguments, collate, tiny_llama, tiny_peft, tiny_rows


@dataclass(frozen=True, kw_only=True)
class ReverseKL(PositionTerm):
    """KL(p ‖ r): a term that reads the reference's logits, and weighs its positions."""

    name: ClassVar[str] = "reverse_kl"

    def values(self, logits_NV, positions):
        log_p, log_r = logits_NV.log_softmax(-1), positions.reference.log_softmax(-1)
        return (log_p.exp() * (log_p - log_r)).sum(-1)

    def position_weights(self, positions, *, vocabulary):
        return positions.reference.softmax(-1).amax(-1)


@dataclass(frozen=True, kw_only=True)
class HeadNorm(BatchTerm):
    """One value a micro-batch, of the weights."""

    name: ClassVar[str] = "adapter_norm"

    def value(self, outputs):
        return sum(p.square().sum() for p in outputs.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 4])
def test_autograd_in_the_walk_is_autograd_over_all_logits(temperature, top_k):
    """Beside terms with a gradient of their own, which use up the logits after it; chunks of 5 positions."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(13, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    positions = Positions(
        torch.randint(0, 37, (13,), generator=generator), torch.randn(13, 8, generator=generator, dtype=torch.float64)
    )
    head = torch.nn.Linear(8, 37, bias=False).double().requires_grad_(False)
    terms = [CrossEntropy(), Consistency(temperature=temperature), Diversity(top_k=top_k), ReverseKL()]
    factors = {"task": 0.3, "consistency": 0.2, "diversity": 0.7, "reverse_kl": 1.1}
    want, want_sums = plain_loss(hidden, head, positions, terms, factors)
    got, sums = fused_loss(hidden, head, positions, terms, factors, chunk_memory_mb=5.5 * 37 * 2 * 8 / 2**20)
    torch.testing.assert_close(got, want)
    for name, found in sums.items():
        torch.testing.assert_close(found.value, want_sums[name].value)
        torch.testing.assert_close(found.weighted, want_sums[name].weighted)
    assert not torch.equal(sums["reverse_kl"].value, sums["reverse_kl"].weighted)
    torch.testing.assert_close(*(torch.autograd.grad(total, hidden)[0] for total in (got, want)))


@dataclass(frozen=True, kw_only=True)
class Marginal(BatchTerm):
    """−H of the mean distribution of a micro-batch: a value of the logits, not of their singular values."""

    name: ClassVar[str] = "marginal"

    def value(self, outputs):
        mean = outputs.logits().float().softmax(-1).mean(0)
        return (mean * mean.log()).sum()


@pytest.mark.parametrize("implementation", ["fused", "plain"])
def test_a_batch_term_may_look_at_the_logits(tmp_path, implementation):
    """`matrix` has only their singular values where the head allows it."""
    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 0.0}
    trained = BALoRATrainer(
        tiny_peft("pissa"),
        arguments(tmp_path, **settings),
        regularizers=BALoRAConfig(gradient_every=1),
        loss=LossConfig(implementation=implementation),
        extra_terms=[Marginal(weight=0.5)],
        train_dataset=tiny_rows(4),
        data_collator=collate,
    )
    trained.train()
    batch = collate(list(tiny_rows(4)))
    mask = regularizers.response_mask(batch["labels"])
    with torch.no_grad():
        logits = tiny_llama()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[mask]
    mean = logits.softmax(-1).mean(0)
    entry = next(entry for entry in trained.state.log_history if "marginal" in entry)
    assert entry["marginal"] == pytest.approx((mean * mean.log()).sum().item(), rel=1e-4)
    assert entry["gradient_share_marginal"] > 0


@pytest.mark.parametrize("implementation", ["fused", "plain"])
def test_terms_from_outside_the_package_are_trained_and_logged(tmp_path, implementation):
    trained = BALoRATrainer(
        tiny_peft("pissa"),
        arguments(tmp_path, max_steps=2, gradient_accumulation_steps=2),
        regularizers=BALoRAConfig(),
        loss=LossConfig(implementation=implementation),
        extra_terms=[ReverseKL(weight=0.5), HeadNorm(weight=0.1, schedule="two_phase")],
        train_dataset=tiny_rows(16),
        data_collator=collate,
    )
    trained.train()
    entry = next(entry for entry in reversed(trained.state.log_history) if "loss" in entry)
    parts = [entry["task"], *(entry[name] for name in entry if name.startswith("weighted_"))]
    assert sum(parts) == pytest.approx(entry["loss"], rel=1e-4)
    assert entry["reverse_kl"] > 0 and entry["weighted_adapter_norm"] == pytest.approx(0.1 * entry["adapter_norm"])


def test_a_second_term_of_a_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="consistency"):
        BALoRATrainer(
            tiny_peft("pissa"), arguments(tmp_path), regularizers=BALoRAConfig(), extra_terms=[Consistency(weight=1.0)]
        )


def test_one_file_and_one_key_add_a_regularizer(root, tmp_path):
    """As docs/adding.md tells: in a copy of the tree, trained by the fused and the plain loss, shown everywhere."""
    for name in ("ba_lora", "configs", "data", "eval"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "train_nlg.py", tmp_path)
    (tmp_path / "ba_lora" / "objective" / "terms" / "z_loss.py").write_text(
        example("docs/adding.md", "ba_lora/objective/terms/z_loss.py")
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def run(*words):
        return subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    steps = {}
    for implementation in ("fused", "plain"):
        done = run(
            "train_nlg.py", "--config", "configs/nlg/toy.yaml", "--method", "ba_lora",
            "regularizers.lambda_z_loss=0.01",
            f"loss.implementation={implementation}", f"output_dir={tmp_path / implementation}", "trainer.max_steps=3",
            "trainer.logging_steps=1", "data.num_rows=24", "trainer.per_device_train_batch_size=4",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "z_loss " in done.stdout
        lines = (tmp_path / implementation / "log.jsonl").read_text().splitlines()
        steps[implementation] = [entry for entry in map(json.loads, lines) if "loss" in entry]
    assert len(steps["fused"]) == 3
    for fused, plain in zip(steps["fused"], steps["plain"], strict=True):
        assert fused["z_loss"] > 0 and fused["share_z_loss"] > 0
        for name in ("loss", "z_loss", "weighted_z_loss", "grad_norm"):
            assert fused[name] == pytest.approx(plain[name], rel=2e-4)
    results = [json.loads(file.read_text()) for file in (tmp_path / "results").rglob("*.json")]
    assert any("z_loss" in result["training"]["last_log"] for result in results if "last_log" in result["training"])
    wrong = run("train_nlg.py", "--config", "configs/nlg/toy.yaml", "regularizers.lambda_zloss=0.01")
    assert wrong.returncode != 0 and "lambda_z_loss" in wrong.stderr
    names = run("-c", "from ba_lora.training.log import LOGGED_NAMES; print(*LOGGED_NAMES)").stdout.split()
    assert {"z_loss", "weighted_z_loss", "share_z_loss"} <= set(names)  # what a table's figures may name
