"""The methods that are for classifiers only, asked for the same as the others (test_methods.py).

Their exports: tests/runs/test_train_nlu.py.
"""

from pathlib import Path

import pytest
import torch
from torch import nn

from ba_lora.config.registries import facts
from ba_lora.config.schema_nlu import NLURegularizersConfig
from ba_lora.methods.base import method_of
from ba_lora.methods.build import build_model, parameter_counts
from tests.support.methods import CLASSIFIERS, check_checkpointing, check_two_processes, equal, nlu_trainer_of
from tests.support.tiny import adapter_weights
from tests.support.tiny_nlu import nlu_config, save_tiny_encoder, tiny_pairs


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT without dropout, which would draw for each way to split a batch anew."""
    return save_tiny_encoder(tmp_path_factory.mktemp("encoders") / "bert", dropout=0.0)


def frozen_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def test_what_is_trained_and_where_it_starts(encoder, tmp_path):
    """BitFit begins at the pre-trained model, NMTune, whose MLP is drawn at random, at another one."""
    probe = {"input_ids": torch.arange(3, 13).view(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    found = {}
    for method, count in CLASSIFIERS.items():
        model, found[method] = build_model(
            nlu_config(encoder, method=method), run_path=tmp_path / method, num_steps=4, probe=probe
        )
        assert parameter_counts(model)[0] == count, method
        assert tuple(term.name for term in method_of(model).tuner.terms(model)) == facts("tuner", method)["term_names"]
    assert found["bitfit"].difference == 0
    assert found["nmtune"].difference > 1e-3


@pytest.mark.parametrize("method", CLASSIFIERS)
def test_a_resumed_run_is_the_uninterrupted_one_and_the_encoder_stays(method, encoder, tmp_path):
    """Bit for bit. Of a BitFit run the biases and the head move, of NMTune's what stands before the head, and it."""
    whole = nlu_trainer_of(method, encoder, tmp_path, save_strategy="steps", save_steps=2)
    start, frozen = adapter_weights(whole.model), frozen_weights(whole.model)
    whole.train()
    trained = adapter_weights(whole.model)
    assert equal(frozen_weights(whole.model), frozen)
    stayed = [name for name in start if torch.equal(start[name], trained[name])]
    assert all(name.endswith("self.key.bias") for name in stayed)  # whose gradient is 0 but for rounding
    again = nlu_trainer_of(method, encoder, tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert equal(adapter_weights(again.model), trained)


@pytest.mark.parametrize("method", CLASSIFIERS)
def test_gradient_checkpointing_changes_nothing(method, encoder, tmp_path):
    check_checkpointing(nlu_trainer_of, method, encoder, tmp_path)


def test_the_terms_of_ba_lora_on_top_of_bitfit(encoder, tmp_path):
    """Consistency is 0 at step 0, exactly, and counts from then on."""
    strong = NLURegularizersConfig(lambda_consistency=0.5, lambda_diversity=0.3, lambda_svd=0)
    trained = nlu_trainer_of("bitfit", encoder, tmp_path, regularizers=strong)
    trained.train()
    values = [entry["consistency"] for entry in trained.state.log_history if "consistency" in entry]
    assert values[0] == 0 and values[-1] > 0


def test_accumulation_changes_nothing_with_bitfit(encoder, tmp_path):
    weights = []
    for number, accumulation in ((4, 1), (1, 4)):
        trained = nlu_trainer_of(
            "bitfit",
            encoder,
            tmp_path / str(number),
            per_device_train_batch_size=number,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
        )
        trained.train()
        weights.append(adapter_weights(trained.model))
    for name in weights[0]:
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=1e-4, atol=1e-5)


def test_nmtunes_terms_are_means_over_micro_batches(encoder, tmp_path):
    """Two equal micro-batches are one of them, by plain gradient descent; the terms count, and are in the log."""
    pairs = tiny_pairs(encoder, 8)
    twice = pairs.select([row for start in range(0, 8, 2) for row in (start, start + 1) * 2])
    weights, logs = [], []
    for rows, accumulation, words in ((pairs, 1, ()), (twice, 2, ()), (pairs, 1, ("adapter.options.weight=0",))):
        trained = nlu_trainer_of(
            "nmtune",
            encoder,
            tmp_path / str(len(weights)),
            *(words or ("adapter.options.weight=0.5",)),
            rows=rows,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            max_steps=2,
            learning_rate=0.1,
            max_grad_norm=0,
        )
        trained.train()
        weights.append(adapter_weights(trained.model))
        logs.append([entry for entry in trained.state.log_history if "loss" in entry])
    for name in weights[0]:
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=1e-4, atol=1e-5)
    assert not all(torch.allclose(weights[2][name], weights[0][name], atol=1e-3) for name in weights[0])
    for one, two in zip(*logs[:2], strict=True):
        for name in ("loss", "nmtune_consistency", "nmtune_covariance", "nmtune_dominance"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name


@pytest.mark.slow
def test_two_processes_equal_accumulation_two(encoder, tmp_path, root):
    """2 processes x 2 rows = 1 process x 2 rows x accumulation 2."""
    check_two_processes("train_method.py", [str(encoder), str(tmp_path / "runs")], CLASSIFIERS, tmp_path, root)
