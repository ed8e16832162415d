"""λ by the KL to the pre-trained model: against the controller's equation, resumed, accumulated, at its target."""

import json
import math

import pytest
import torch

from ba_lora import BALoRAConfig
from ba_lora.config.layers import load_config
from ba_lora.config.schema import LAMBDA_LIMITS, training_hash
from ba_lora.config.schema_nlu import NLURegularizersConfig
from ba_lora.errors import UserError
from ba_lora.objective.kl_control import FILE, KLController
from ba_lora.objective.losses.plain import TermSums
from ba_lora.objective.objective_nlu import ClassifierObjective
from ba_lora.objective.terms.consistency import Consistency
from ba_lora.objective.terms.task import CrossEntropy
from tests.conftest import ROOT
from tests.objective.test_gradient_shares import logs, trained
from tests.support.tiny import adapter_weights
from tests.support.tiny_nlu import save_tiny_encoder, tiny_classifier

WORDS = ("regularizers.lambda_mode=adaptive_kl", "regularizers.kl_target=0.5")


def config(**settings):
    chosen = {"lambda_consistency": 0.1, "lambda_mode": "adaptive_kl", "kl_target": 3e-4, "gradient_every": None}
    return BALoRAConfig(**chosen | settings)


def test_lambda_follows_the_controller(tmp_path):
    """λ of a step is that of the step before times 1 + gain · clip(KL / target − 1, ±0.2); KL is the term over T²."""
    built = trained(tmp_path, config(temperature=2.0, kl_gain=0.5, lambda_diversity=0.0), max_steps=8)
    expected, values, errors = 0.1, logs(built, "consistency"), []
    for value, weighted, found in zip(
        values, logs(built, "weighted_consistency"), logs(built, "lambda_consistency"), strict=True
    ):
        assert weighted == pytest.approx(expected * value, abs=1e-9)  # the λ of the step itself
        errors.append(min(max(value / 4 / 3e-4 - 1, -0.2), 0.2))
        expected *= 1 + 0.5 * errors[-1]
        assert found == pytest.approx(expected, rel=1e-5)
    assert min(errors) == -0.2 and max(errors) > 0  # from far below the target to above it


def test_it_holds_the_target(tmp_path):
    """Without it this training ends at 0.013 nats; with it the last steps' mean is the target, a quarter of that."""
    held = trained(
        tmp_path,
        config(kl_target=0.0033, kl_gain=1.0, lambda_diversity=0.0, lambda_svd=0.0),
        max_steps=100,
        learning_rate=1e-2,
    )
    assert sum(logs(held, "consistency")[-30:]) / 30 == pytest.approx(0.0033, rel=0.25)


def test_a_resumed_training_has_the_lambda_of_the_whole_one(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = trained(tmp_path, config(), **settings)
    resumed = trained(tmp_path, config(), resume=str(tmp_path / "checkpoint-3"), **settings)
    assert resumed._kl.weights == whole._kl.weights
    for name, weight in adapter_weights(whole.model).items():
        assert torch.equal(adapter_weights(resumed.model)[name], weight)
    assert json.loads((tmp_path / "checkpoint-6" / FILE).read_text()) == whole._kl.weights
    (tmp_path / "checkpoint-3" / FILE).unlink()
    with pytest.raises(UserError, match="so λ is not known"):
        trained(tmp_path, config(), resume=str(tmp_path / "checkpoint-3"), **settings)


def test_micro_batches_count_like_one_batch(tmp_path):
    """Two micro-batches of one row each, of different lengths: every position counts the same."""
    one = trained(tmp_path, config(lambda_diversity=0.0, lambda_svd=0.0), max_steps=6)
    two = trained(
        tmp_path,
        config(lambda_diversity=0.0, lambda_svd=0.0),
        max_steps=6,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
    )
    assert logs(two, "lambda_consistency") == pytest.approx(logs(one, "lambda_consistency"), rel=1e-4)
    assert len(set(logs(one, "lambda_consistency"))) == 6


def test_lambda_stays_within_its_limits():
    """However long a target is out of reach."""
    for value, limit in ((1e3, LAMBDA_LIMITS[1]), (0.0, LAMBDA_LIMITS[0])):
        controller = KLController([CrossEntropy(), Consistency(weight=0.1, temperature=1.0)], config(kl_gain=4.0))
        for _ in range(100):
            controller.add({"consistency": TermSums(torch.tensor(value), torch.tensor(value))}, 1)
            controller.close(lambda sums: sums)
        assert controller.weights == {"consistency": limit}


def test_the_keys_are_checked():
    for settings, what in (
        ({"lambda_mode": "fixed"}, "kl_target needs regularizers.lambda_mode=adaptive_kl"),
        ({"lambda_mode": "gradient_share", "gradient_every": 5, "kl_target": None, "kl_gain": 0.2}, "kl_gain needs"),
        ({"kl_target": None}, "set regularizers.kl_target, in nats a position"),
        ({"kl_target": 0.0}, "it must be a number above 0"),
        ({"kl_gain": 5.0}, "and below 5"),
        ({"lambda_consistency": 0.0}, "lambda_consistency=0.0: it must be 1e-06 to 100"),
        ({"consistency_schedule": "cosine_to_10_percent"}, "would work against lambda_mode=adaptive_kl"),
    ):
        with pytest.raises(UserError, match=what) as error:
            config(**settings)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="normalized_mse is none: set regularizers.consistency_form=kl"):
        NLURegularizersConfig(lambda_mode="adaptive_kl", kl_target=0.1)
    NLURegularizersConfig(lambda_mode="adaptive_kl", kl_target=0.1, consistency_form="kl")


def test_a_task_without_a_consistency_term_has_no_controller(tmp_path):
    """A regression's one logit has no distribution."""
    encoder = save_tiny_encoder(tmp_path / "encoder")
    model = tiny_classifier(encoder, "nlu.task=stsb")
    regularizers = NLURegularizersConfig(lambda_mode="adaptive_kl", kl_target=0.1, consistency_form="kl")
    with pytest.raises(UserError, match="off for this task: one logit has no direction and no distribution"):
        ClassifierObjective(model, regularizers, micro_batch=8)
    with pytest.raises(UserError, match="gradient_share has no term here: all are off .consistency: one logit has"):
        ClassifierObjective(model, NLURegularizersConfig(lambda_mode="gradient_share"), micro_batch=8)


def test_run_ids_of_other_modes_stay_and_hang_on_the_target_in_this_one():
    def hashed(*words):
        return training_hash(load_config("configs/nlg/toy.yaml", method="ba_lora", overrides=list(words)))

    by_kl = hashed(*WORDS)
    assert by_kl == hashed(*WORDS, "regularizers.gradient_every=7")
    assert len({hashed(), by_kl, hashed(*WORDS, "regularizers.kl_gain=1"), hashed(WORDS[0], WORDS[1] + "1")}) == 4


@pytest.mark.slow
def test_the_toy_is_held_at_its_target(train):
    """The real tiny Llama at 1 nat a position, a third of what it drifts to without a controller."""
    run = train(
        "trainer.max_steps=120",
        "data.num_rows=1920",
        "trainer.logging_steps=1",
        "export.merged=false",
        "regularizers.lambda_mode=adaptive_kl",
        "regularizers.kl_target=1.0",
        "regularizers.kl_gain=1.0",
        "regularizers.lambda_consistency=0.05",
        "method=ba_lora",
        config_path=ROOT / "configs/nlg/toy.yaml",
    )
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    found = [line["consistency"] for line in lines if "consistency" in line]
    assert math.fsum(found[-30:]) / 30 == pytest.approx(1.0, rel=0.25)
