"""Shares of the terms' gradients at the hidden states: against plain autograd, as λ(t), and over a resumed training."""

import dataclasses

import pytest
import torch
from transformers import AutoTokenizer, DataCollatorWithPadding

from ba_lora import BALoRAConfig, BALoRATrainer
from ba_lora.config.layers import load_config
from ba_lora.config.schema import training_hash
from ba_lora.config.schema_nlg import LossConfig
from ba_lora.config.schema_nlu import NLURegularizersConfig
from ba_lora.errors import UserError
from ba_lora.models.classifier import unwrapped
from ba_lora.objective import regularizers as reg
from ba_lora.objective.gradient_shares import DEFAULT_SHARE, FILE, MAX_WEIGHT, GradientShares
from ba_lora.objective.terms.svd import Svd
from ba_lora.objective.terms.task import CrossEntropy
from tests.support.tiny import adapter_weights, arguments, collate, tiny_llama, tiny_peft, tiny_rows
from tests.support.tiny_nlu import classifier_trainer, save_tiny_encoder, tiny_classifier, tiny_pairs

LAMBDAS = {"lambda_consistency": 0.5, "lambda_diversity": 0.3, "lambda_svd": 0.2}
TERMS = ("consistency", "diversity", "svd")


def config(**settings):
    return BALoRAConfig(**{**LAMBDAS, "gradient_every": 1, **settings})


def trained(folder, regularizers, *, loss="fused", model=None, resume=None, **settings):
    built = BALoRATrainer(
        model or tiny_peft("pissa"),
        arguments(folder, **{"learning_rate": 1e-2, "lr_scheduler_type": "constant", **settings}),
        regularizers=regularizers,
        loss=LossConfig(implementation=loss),
        train_dataset=tiny_rows(16),
        data_collator=collate,
    )
    built.train(resume_from_checkpoint=resume)
    return built


def logs(built, name):
    return [entry[name] for entry in built.state.log_history if name in entry]


def norms_by_hand(model, rows):
    """Return ‖∂ term/∂H‖ of each term of one batch, from all logits."""
    batch = collate(rows)
    labels = batch.pop("labels")
    mask, targets = reg.response_mask(labels), reg.response_targets(labels)
    with torch.no_grad():
        hidden = model.get_base_model().get_decoder()(**{k: v for k, v in batch.items() if k != "row"})
        reference = tiny_llama()(**{k: v for k, v in batch.items() if k != "row"}).logits[mask]
    states = hidden.last_hidden_state[mask].requires_grad_()
    logits = states @ model.get_base_model().get_output_embeddings().weight.T
    every = reg.every_row(logits)
    values = {
        "task": torch.nn.functional.cross_entropy(logits, targets),
        "consistency": reg.consistency(logits, reference, every),
        "diversity": reg.diversity(logits, every),
        "svd": reg.svd(logits, every, top_k=3),
    }
    return {name: torch.autograd.grad(v, states, retain_graph=True)[0].norm().item() for name, v in values.items()}


@pytest.mark.parametrize("loss", ["fused", "plain"])
def test_the_logged_shares_are_those_of_autograd(tmp_path, loss):
    before = trained(tmp_path, config(), loss=loss, max_steps=3)
    assert logs(before, "gradient_share_consistency")[0] < 1e-6  # the untrained model is its own reference
    expected = norms_by_hand(before.model.eval(), [tiny_rows(16)[row] for row in (6, 7)])
    after = trained(tmp_path, config(gradient_every=4), loss=loss, max_steps=4)  # measured at the last step, 3
    shares = after._shares
    for term in ("task", *TERMS):
        assert shares._norms[term] == pytest.approx(expected[term], rel=1e-3), term
    for term in TERMS:
        had = LAMBDAS[f"lambda_{term}"] * expected[term] / expected["task"]
        assert logs(after, f"gradient_share_{term}") == [pytest.approx(had, rel=2e-3)]


def test_micro_batches_count_like_one_batch(tmp_path):
    """Two micro-batches of one row each: the means' norms are those of one batch of two."""
    one = trained(tmp_path, config(), max_steps=1)
    two = trained(tmp_path, config(), max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    for term in ("task", "diversity"):
        assert two._shares._norms[term] == pytest.approx(one._shares._norms[term], rel=1e-4)


def test_the_weights_follow_the_shares(tmp_path):
    """λ of a step is share · ‖task‖ / ‖term‖ of the smoothed norms before it, and at most 1."""
    wanted = {"diversity": 0.3}
    built = trained(tmp_path, config(lambda_mode="gradient_share", gradient_shares=wanted), max_steps=8)
    norms = built._shares._norms
    for term in TERMS:
        share = wanted.get(term, DEFAULT_SHARE)
        expected = min(share * norms["task"] / norms[term], MAX_WEIGHT)
        assert logs(built, f"lambda_{term}")[-1] == built._shares.weights[term] == pytest.approx(expected)
    last = built.state.log_history[-2]  # the line before the summary's
    assert last["weighted_svd"] != pytest.approx(0.2 * last["svd"], rel=1e-3)


def test_the_logged_share_is_what_a_step_had_and_not_what_was_asked_for(tmp_path):
    """λ(t) of a step follows from the steps before it; and until the first measurement it is the config's."""
    settings = {"lambda_mode": "gradient_share", "gradient_every": 2}
    whole = trained(tmp_path, config(**settings), max_steps=4)
    short = trained(tmp_path, config(**settings), max_steps=3)  # with the λ that step 4 was made with
    expected = norms_by_hand(short.model.eval(), [tiny_rows(16)[row] for row in (6, 7)])
    for term in ("diversity", "svd"):
        first, second = logs(whole, f"gradient_share_{term}")
        had = logs(short, f"lambda_{term}")[-1] * expected[term] / expected["task"]
        assert second == pytest.approx(had, rel=2e-3) and second != pytest.approx(DEFAULT_SHARE, rel=0.02)
        assert logs(short, f"gradient_share_{term}") == [first] != [DEFAULT_SHARE]


def test_a_log_tells_the_mean_of_the_steps_that_were_measured_since_the_last(tmp_path):
    each = logs(trained(tmp_path, config(), max_steps=4), "gradient_share_svd")
    pairs = logs(trained(tmp_path, config(), max_steps=4, logging_steps=2), "gradient_share_svd")
    assert pairs == [pytest.approx(sum(each[:2]) / 2), pytest.approx(sum(each[2:]) / 2)]
    saved = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 2}
    trained(tmp_path, config(), max_steps=4, **saved)
    resumed = trained(tmp_path, config(), max_steps=4, resume=str(tmp_path / "checkpoint-3"), **saved)
    assert logs(resumed, "gradient_share_svd") == [pytest.approx(pairs[0]), pytest.approx(pairs[1])]


def test_a_training_that_would_never_set_the_weights_is_refused(tmp_path):
    shares = config(lambda_mode="gradient_share", gradient_every=4)
    with pytest.raises(UserError, match="gradient_every=4: the run has 3 optimizer steps"):
        trained(tmp_path, shares, max_steps=3)
    trained(tmp_path, config(gradient_every=4), max_steps=3)  # which only logs it


def test_measuring_changes_no_weight(tmp_path):
    measured = adapter_weights(trained(tmp_path, config()).model)
    unmeasured = adapter_weights(trained(tmp_path, config(gradient_every=None)).model)
    assert all(torch.equal(measured[name], unmeasured[name]) for name in measured)


def test_a_resumed_training_has_the_weights_of_the_whole_one(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    shares = config(lambda_mode="gradient_share", gradient_every=2)
    whole = trained(tmp_path, shares, **settings)
    resumed = trained(tmp_path, shares, resume=str(tmp_path / "checkpoint-3"), **settings)
    assert resumed._shares.weights == whole._shares.weights
    for name, weight in adapter_weights(whole.model).items():
        assert torch.equal(adapter_weights(resumed.model)[name], weight)


def test_without_a_gradient_the_weight_stays(tmp_path):
    shares = GradientShares([CrossEntropy(), Svd(weight=0.5, top_k=3, norm="nuclear")], config())
    shares._sets_weights = True
    lambdas = {"task": 1.0, "svd": 0.5}
    shares.add({"task": torch.tensor(4.0), "svd": torch.tensor(0.0)})
    shares.close(lambda squares: squares, lambdas)
    assert shares.weights["svd"] == 0.5 and shares.logs() == {"gradient_share_svd": 0}
    shares.add({"task": torch.tensor(4.0), "svd": torch.tensor(1.0)})
    shares.close(lambda squares: squares, lambdas)
    assert shares.weights["svd"] == pytest.approx(0.1 * 2 / 1)  # smoothed from its first norm on
    assert shares.logs() == {"gradient_share_svd": 0.5 * 1 / 2} and shares.logs() == {}


def test_a_checkpoint_of_fixed_weights_gives_none(tmp_path):
    fixed = trained(tmp_path, config(), save_strategy="steps", save_steps=2, max_steps=2)
    assert fixed._shares.weights == {"task": 1.0, "consistency": 0.5, "diversity": 0.3, "svd": 0.2}
    resume = {"resume": str(tmp_path / "checkpoint-2"), "max_steps": 4}
    other = trained(tmp_path, config(lambda_svd=0.4), **resume)
    assert other._shares.weights["svd"] == 0.4
    (tmp_path / "checkpoint-2" / FILE).unlink()
    with pytest.raises(UserError, match="so λ is not known"):
        trained(tmp_path, config(lambda_mode="gradient_share"), **resume)


@pytest.mark.parametrize("features", ["logits", "pooled"])
@pytest.mark.parametrize("base", ["toy", "roberta-large", "deberta-v3-base", "gpt2-xl"])
def test_a_classifier_has_shares_too(tmp_path, base, features):
    """Of each form of head: on pooled features, or on a sequence of which it takes a position itself."""
    encoder = save_tiny_encoder(tmp_path / "encoder", base, dropout=0.0)
    collate = DataCollatorWithPadding(AutoTokenizer.from_pretrained(encoder))
    model = tiny_classifier(encoder, "model.attention=eager")
    if collate.tokenizer.pad_token is None:
        collate.tokenizer.pad_token = collate.tokenizer.eos_token
        unwrapped(model).config.pad_token_id = collate.tokenizer.pad_token_id
    built = classifier_trainer(
        model,
        arguments(tmp_path, learning_rate=1e-2, per_device_train_batch_size=8),
        regularizers=NLURegularizersConfig(
            **LAMBDAS, features=features, lambda_mode="gradient_share", gradient_every=1
        ),
        train_dataset=tiny_pairs(encoder, 24),
        data_collator=collate,
    )
    built.train()
    terms = [term.name for term in built.objective.terms[1:]]
    assert "consistency" in terms and "diversity" in terms
    for term in terms:
        assert 0 < built._shares.weights[term] <= MAX_WEIGHT
        assert logs(built, f"gradient_share_{term}")[-1] > 0


def test_the_keys_are_checked_and_stay_out_of_the_hash_where_they_change_nothing():
    with pytest.raises(UserError, match="needs regularizers.lambda_mode=gradient_share"):
        BALoRAConfig(gradient_shares={"svd": 0.1})
    with pytest.raises(UserError, match="set regularizers.gradient_every"):
        BALoRAConfig(lambda_mode="gradient_share", gradient_every=None)
    with pytest.raises(UserError, match="lambda_svd=0 takes the term out"):
        BALoRAConfig(lambda_svd=0, lambda_mode="gradient_share", gradient_shares={"svd": 0.1})
    with pytest.raises(UserError, match="it must be a number of at least 0"):
        BALoRAConfig(lambda_mode="gradient_share", gradient_shares={"svd": -0.1})
    with pytest.raises(UserError, match="no effect without a term"):
        BALoRAConfig(lambda_consistency=0, lambda_diversity=0, lambda_svd=0, lambda_mode="gradient_share")
    with pytest.raises(UserError, match="lambda_mode"):
        BALoRAConfig(lambda_mode="auto")

    def hashed(*words):
        return training_hash(load_config("configs/nlg/toy.yaml", method="ba_lora", overrides=list(words)))

    assert hashed() == hashed("regularizers.gradient_every=7")
    by_share = "regularizers.lambda_mode=gradient_share"
    assert len({hashed(), hashed(by_share), hashed(by_share, "regularizers.gradient_every=7")}) == 3
    shared = load_config(
        "configs/nlg/toy.yaml", method="ba_lora", overrides=[by_share, "regularizers.gradient_shares.svd=0.2"]
    )
    assert shared.regularizers.gradient_shares == {"svd": 0.2}
    assert dataclasses.asdict(shared.regularizers)["lambda_mode"] == "gradient_share"
