"""BALoRATrainer with a ClassifierObjective: λ = 0 is stock fine-tuning, the reference and its heads, reductions, terms
that are off, the log."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer

from ba_lora.config.schema_nlu import NLURegularizersConfig
from ba_lora.errors import UserError
from ba_lora.models.classifier import Head, catch_pooled, live_head, run_head
from ba_lora.models.predict import predict
from ba_lora.objective import regularizers as definitions
from ba_lora.objective.reference_cache.features import CachedFeatures
from ba_lora.objective.reference_nlu import fit_probe
from ba_lora.objective.regularizers_nlu import normalized_mse
from ba_lora.training.log import OFF
from tests.support.tiny import adapter_weights, arguments
from tests.support.tiny_nlu import ARCHITECTURES, classifier_trainer, save_tiny_encoder, tiny_classifier, tiny_pairs

PAPER2024 = NLURegularizersConfig(lambda_consistency=0.5, lambda_diversity=0.3, lambda_svd=0.2, features="pooled")
ICLR2026 = dataclasses.replace(PAPER2024, consistency_form="kl", temperature=2.0)
VERSIONS = pytest.mark.parametrize("regularizers", [PAPER2024, ICLR2026], ids=["paper2024", "iclr2026"])
NONE = NLURegularizersConfig(lambda_consistency=0, lambda_diversity=0, lambda_svd=0)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Without dropout, which would draw other numbers where passes differ."""
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"), dropout=0.0)


@pytest.fixture(scope="module")
def collate(encoder):
    return DataCollatorWithPadding(AutoTokenizer.from_pretrained(encoder))


@pytest.fixture(scope="module")
def rows(encoder):
    return tiny_pairs(encoder, 24)


@pytest.fixture
def build(encoder, rows, collate, tmp_path):
    def make(regularizers=PAPER2024, *, model=None, method="pissa", data=rows, cache=None, **settings):
        settings = {"per_device_train_batch_size": 8, "learning_rate": 1e-2} | settings
        return classifier_trainer(
            tiny_classifier(encoder, method=method) if model is None else model,
            arguments(tmp_path, **settings),
            regularizers=regularizers,
            cache=cache,
            train_dataset=data,
            data_collator=collate,
        )

    return make


def logs(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def batch_of(rows, collate, number=8):
    return collate(rows.select(range(number)).remove_columns("row").to_list())


# ---- the loss ----


@pytest.mark.parametrize("accumulation", [1, 3])
def test_without_weights_it_is_stock_fine_tuning(build, encoder, rows, collate, tmp_path, accumulation):
    """Against Trainer with the model's own loss, 12 steps: loss and weights."""
    settings = {"max_steps": 12, "gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4}
    stock_model = tiny_classifier(encoder)
    stock = Trainer(
        stock_model,
        arguments(tmp_path / "stock", learning_rate=1e-2, **settings),
        train_dataset=rows.remove_columns("row"),
        data_collator=collate,
    )
    stock.model_accepts_loss_kwargs = False  # PEFT's **kwargs would make Trainer add up the micro-batches' means
    stock.train()
    ours = build(NONE, **settings)
    ours.train()
    assert logs(ours, "loss") == pytest.approx(logs(stock, "loss"), rel=1e-5)
    want = adapter_weights(stock_model)
    for name, weight in adapter_weights(ours.model).items():
        torch.testing.assert_close(weight, want[name], rtol=1e-4, atol=1e-5)


@VERSIONS
@pytest.mark.parametrize("method", ["pissa", "lora", "full_ft"])
def test_consistency_is_exactly_zero_at_step_zero(build, regularizers, method):
    trained = build(regularizers, method=method, max_steps=2)
    trained.train()
    assert logs(trained, "consistency")[0] == 0 and logs(trained, "consistency")[1] > 0


@VERSIONS
def test_the_loss_of_one_batch(build, encoder, rows, collate, regularizers):
    """Against the terms of a second, untouched model with the very same head."""
    model = tiny_classifier(encoder)
    built = build(regularizers, model=model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    batch = batch_of(rows, collate)
    got = built.compute_loss(model, dict(batch))
    labels = batch.pop("labels")
    with catch_pooled(model, batch) as caught:
        logits = model(**batch).logits
    reference = tiny_classifier(encoder).eval()(**batch).logits.detach()
    every_row = definitions.every_row(logits)
    consistency = (
        definitions.consistency(logits, reference, every_row, temperature=2.0)
        if regularizers is ICLR2026
        else normalized_mse(logits, reference).mean()
    )
    centred = caught["pooled"] - caught["pooled"].mean(0)
    covariance = centred.T @ centred / 7
    off_diagonal = covariance - torch.diag(covariance.diagonal())
    sigma = torch.linalg.svdvals(caught["pooled"])
    expected = (
        torch.nn.functional.cross_entropy(logits, labels)
        + 0.5 * consistency
        + 0.3 * off_diagonal.square().sum() / 32
        - 0.2 * sigma[:5].sum() / sigma.sum()
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", [name for name in ARCHITECTURES if name not in ("minilm", "roberta-base")])
def test_the_head_run_alone_gives_the_models_logits(base, tmp_path):
    """Every form of head, on padded rows, with and without an adapter around it."""
    folder = save_tiny_encoder(tmp_path, base)
    collate = DataCollatorWithPadding(AutoTokenizer.from_pretrained(folder))
    if collate.tokenizer.pad_token is None:
        collate.tokenizer.pad_token = collate.tokenizer.eos_token
    batch = collate(tiny_pairs_for(folder, collate))
    for method in ("pissa", "full_ft"):
        model = tiny_classifier(folder, "model.attention=eager", method=method).eval()
        with torch.no_grad(), catch_pooled(model, batch) as caught:
            logits = model(**batch).logits
            torch.testing.assert_close(run_head(live_head(model), caught["pooled"]), logits)
            torch.testing.assert_close(Head(live_head(model))(caught["pooled"]), logits)


def tiny_pairs_for(folder, collate):
    texts = (["one", "a longer text"], ["two words", "x"])
    encoded = collate.tokenizer(*texts)
    return [{name: values[i] for name, values in encoded.items()} for i in range(2)]


# ---- reference heads ----


@pytest.mark.parametrize("head", ["initial", "shared", "probe"])
def test_reference_heads(build, encoder, rows, collate, head):
    model = tiny_classifier(encoder)
    built = build(dataclasses.replace(PAPER2024, reference_head=head), model=model)
    built.objective.reference.prepare(model, rows, collate, batch_size=8)
    initial = [parameter.clone() for module in live_head(model) for parameter in module.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    batch = batch_of(rows, collate)
    batch.pop("labels")

    def pooled(module):
        with catch_pooled(module, batch) as caught:
            module(**batch)
        return caught["pooled"]

    got = built.objective.reference(model, None, pooled)
    untouched = tiny_classifier(encoder)
    with torch.no_grad():
        features = pooled(untouched)
        if head == "initial":
            expected = torch.nn.functional.linear(features, *initial)
        elif head == "shared":
            expected = run_head(live_head(model), features)
        else:
            everything = predict(untouched, rows, collate, batch_size=8).pooled
            expected = fit_probe(everything, torch.tensor(rows["labels"]), num_labels=3)(features)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_probe_finds_a_line():
    """Two clouds on either side of a plane."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 6, generator=generator) * torch.tensor([1.0, 10, 0.1, 1, 1, 1]) + 3
    labels = (features[:, 0] + 0.1 * features[:, 1] > 3.3).long()
    probe = fit_probe(features, labels, num_labels=3)  # the third class has no rows
    assert (probe(features).argmax(1) == labels).float().mean() > 0.97 and not probe.weight.requires_grad


@pytest.mark.parametrize("head", ["initial", "shared", "probe"])
def test_the_cache_changes_nothing_and_is_filled_once(build, tmp_path, head):
    """Against a pass in every step: 6 steps over two epochs, then once more from the file, by another method."""
    regularizers = dataclasses.replace(ICLR2026, reference_head=head)
    features = CachedFeatures(tmp_path / "cache", {"encoder": "tiny"})
    histories = []
    for cache in (None, features):
        trained = build(regularizers, max_steps=6, cache=cache)
        trained.train()
        histories.append([logs(trained, name) for name in ("loss", "consistency")])
    for got, want in zip(histories[1], histories[0], strict=True):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-6)
    written = features.path.stat().st_mtime_ns
    again = build(regularizers, method="lora", max_steps=2, cache=features)
    again.train()
    assert features.path.stat().st_mtime_ns == written
    assert (logs(again, "consistency")[0] == pytest.approx(0, abs=1e-6)) == (head != "probe")  # another head from 0 on


@pytest.mark.parametrize("head", ["initial", "shared", "probe"])
@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
def test_every_reference_in_low_precision(build, encoder, tmp_path, precision, head):
    """Bf16 weights, or float32 ones under autocast: the pass in every step and the cache agree, and the pre-trained
    model is at distance 0 from itself."""
    regularizers = dataclasses.replace(PAPER2024, reference_head=head)
    words = ["model.dtype=bfloat16"] if precision == "bfloat16" else []
    histories = []
    for cache in (None, CachedFeatures(tmp_path / "cache", {"encoder": "tiny"})):
        model = tiny_classifier(encoder, *words)
        trained = build(regularizers, model=model, max_steps=2, cache=cache, bf16=precision == "autocast")
        trained.train()
        histories.append(logs(trained, "consistency"))
    assert histories[1] == pytest.approx(histories[0], rel=1e-6)
    assert (histories[0][0] == 0) == (head != "probe") and histories[0][1] > 0


def test_a_cache_has_no_other_rows(build, rows, collate, tmp_path):
    """Rows that it was not filled with, rows without a number, and rows of evaluation, whose numbers mean others."""
    known = rows.select([0, 1, 2, 3, 4, 5, 6, 20])  # the numbers of a sample, or beside held-out rows, have gaps
    trained = build(data=known, cache=CachedFeatures(tmp_path / "cache", {"encoder": "tiny"}))
    trained.objective.reference.prepare(trained.model, known, collate, batch_size=8)

    def loss(data):
        return trained.compute_loss(trained.model, collate(data.to_list()))

    assert loss(known).isfinite()
    for unknown in (rows.select(range(8)), rows.select(range(20, 24)), known.remove_columns("row")):
        with pytest.raises(UserError, match="not those of the reference cache"):
            loss(unknown)
    trained.model.eval()
    with pytest.raises(UserError, match="holds the training rows"):
        loss(known)


def test_a_cached_step_runs_the_encoder_once(build, tmp_path):
    counts = {}
    for name, cache in (("pass", None), ("cache", CachedFeatures(tmp_path / "cache", {"encoder": "tiny"}))):
        trained = build(PAPER2024, max_steps=3, cache=cache)
        trained.objective.reference.prepare(trained.model, trained.train_dataset, trained.data_collator, batch_size=8)
        calls = []
        trained.model.get_base_model().bert.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trained.objective._head_known = True
        trained.train()
        counts[name] = len(calls)
    assert counts == {"pass": 7, "cache": 3}  # one more at step 0, to compare reference and tuned model


# ---- reductions ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("regularizers", "cached"),
    [
        pytest.param(PAPER2024, False, id="paper2024"),
        pytest.param(ICLR2026, False, id="iclr2026", marks=pytest.mark.slow),
        pytest.param(PAPER2024, True, id="paper2024-cached", marks=pytest.mark.slow),
        pytest.param(ICLR2026, True, id="iclr2026-cached", marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_accumulation_two(tmp_path, root, regularizers, cached):
    """2 processes × 4 rows = 1 process × 4 rows × accumulation 2: every term, loss, weights, predictions."""
    words = json.dumps(dataclasses.asdict(dataclasses.replace(regularizers, svd_top_k=2)))
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    worker = str(root / "tests" / "workers" / "train_tiny_nlu.py")
    single, double = tmp_path / "single.pt", tmp_path / "double.pt"
    ends = [[str(tmp_path / name)] if cached else [] for name in ("one", "two")]
    subprocess.run(
        [sys.executable, worker, words, "2", str(single), *ends[0]], env=environment, check=True, timeout=3600
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launch, worker, words, "1", str(double), *ends[1]], env=environment, check=True, timeout=3600)
    one, two = torch.load(single), torch.load(double)
    assert one["processes"] == 1 and two["processes"] == 2
    for name in ("loss", "task", "consistency", "diversity", "svd", "weighted_consistency", "share_svd"):
        assert len(one["logs"][name]) == 6
        assert two["logs"][name] == pytest.approx(one["logs"][name], rel=1e-4, abs=1e-6), name
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(two["logits"], one["logits"], rtol=1e-3, atol=1e-3)


def test_accumulation_does_not_change_terms_of_single_rows(build, encoder, rows):
    """Nor does a last micro-batch of one row count for more than that: 9 rows, alike in micro-batches of 9, 2 and 1."""
    regularizers = dataclasses.replace(PAPER2024, diversity_form="entropy", lambda_svd=0)
    histories = []
    for batch, accumulation in ((9, 1), (1, 9), (2, 5)):
        model = tiny_classifier(encoder)
        torch.manual_seed(0)
        with torch.no_grad():  # an untrained classifier says almost the same of all rows
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        trained = build(
            regularizers,
            model=model,
            data=rows.select(range(9)),
            max_steps=2,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        trained.train()
        histories.append([logs(trained, name) for name in ("loss", "task", "consistency", "diversity")])
    for history in histories[1:]:
        for got, want in zip(history, histories[0], strict=True):
            assert got == pytest.approx(want, rel=2e-5, abs=1e-6)


# ---- what is off ----


def test_constant_terms_are_taken_out_and_logged_as_off(build):
    """Three logits, k = 5: the svd ratio is 1."""
    trained = build(dataclasses.replace(PAPER2024, features="logits"), max_steps=2)
    assert set(trained.objective.off) == {"svd"} and trained.objective.regularizers.lambda_svd == 0
    trained.train()
    assert logs(trained, "svd") == [OFF, OFF] and "weighted_svd" not in trained.state.log_history[0]
    assert all(isinstance(value, float) for value in logs(trained, "diversity"))


def test_micro_batches_without_covariance_are_counted(build, rows):
    """9 rows in micro-batches of 8: the second has one row."""
    regularizers = dataclasses.replace(PAPER2024, lambda_svd=0)
    trained = build(regularizers, data=rows.select(range(9)), max_steps=4)
    trained.train()
    assert logs(trained, "skipped_diversity") == [1, 1]
    assert len(logs(trained, "diversity")) == 2


def test_weighted_terms_add_up_to_the_loss(build):
    trained = build(
        ICLR2026, max_steps=4, logging_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=6
    )
    trained.train()
    entries = [entry for entry in trained.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        weighted = [entry[f"weighted_{term}"] for term in ("consistency", "diversity", "svd")]
        assert entry["loss"] == pytest.approx(entry["task"] + sum(weighted), rel=1e-5)


# ---- predictions ----


def test_predictions_do_not_depend_on_the_batches(build, rows, collate):
    model = build(NONE).model
    one, other = (predict(model, rows, collate, batch_size=size) for size in (1, 7))
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.pooled, other.pooled, rtol=1e-4, atol=1e-5)
    assert one.logits.shape == (24, 3) and one.pooled.shape == (24, 32)
    assert model.training


# ---- diverged runs, a wrong start, evaluation ----


@pytest.mark.parametrize("regularizers", [PAPER2024, NONE], ids=["paper2024", "none"])
def test_a_diverged_training_stops_with_one_line(build, regularizers):
    with pytest.raises(UserError, match=r"^loss is not finite at step [2-6]: lower trainer.learning_rate$"):
        build(regularizers, learning_rate=1e30, max_steps=6).train()


def test_a_model_that_is_no_longer_the_pretrained_one_is_refused_at_step_zero(build, encoder):
    trainer = build(max_steps=1)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B.default" in name:
                parameter.add_(0.1)
    with pytest.raises(UserError, match="at step 0 the model differs from its reference"):
        trainer.train()


def test_evaluation_logs_the_tasks_loss_by_itself(build, rows, collate):
    trainer = build(per_device_eval_batch_size=5)
    metrics = trainer.evaluate(rows)
    batch = batch_of(rows, collate, len(rows))
    labels = batch.pop("labels")
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(trainer.model.eval()(**batch).logits, labels)
    assert metrics["eval_task"] == pytest.approx(expected.item(), rel=1e-4)
    assert metrics["eval_loss"] != pytest.approx(metrics["eval_task"], rel=1e-3)
