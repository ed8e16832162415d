"""The reference cache: its term against the exact one, training with it, and every way in which it must refuse."""

import copy
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from ba_lora import BALoRAConfig, BALoRATrainer
from ba_lora.config.layers import load_config
from ba_lora.config.schema_nlg import LossConfig
from ba_lora.errors import UserError
from ba_lora.objective import regularizers as reg
from ba_lora.objective.reference_cache import store as reference_cache
from ba_lora.objective.reference_cache.fill import FileLocks, cache_key, claim, fill
from ba_lora.objective.reference_cache.store import Rows, open_cache
from ba_lora.objective.regularizers import TopLogProbs, top_log_probs
from tests.support.losses import TermWeights, fused_nlg_loss, nlg_loss
from tests.support.tiers import mostly_slow
from tests.support.tiny import (
    VOCABULARY,
    adapter_weights,
    arguments,
    collate,
    tiny_cache,
    tiny_llama,
    tiny_peft,
    tiny_rows,
)

STRONG = {"lambda_consistency": 0.5, "lambda_diversity": 0.3, "lambda_svd": 0.2}
EVERY = torch.ones(5, dtype=torch.bool)


def random_logits(seed, *, positions=5, vocabulary=12, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(positions, vocabulary, generator=generator, dtype=torch.float64)


def one_line(caught):
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


# ---- the term


def test_by_hand():
    reference = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    tuned = torch.tensor([[0.2, 0.4, 0.4]], dtype=torch.float64).log()
    value = reg.cached_consistency(tuned, top_log_probs(reference, top_k=1), EVERY[:1])
    assert value.item() == pytest.approx(0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8), abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_with_every_token_it_is_the_exact_term(temperature, weighted):
    tuned, reference = random_logits(0).requires_grad_(), random_logits(1)
    settings = {"temperature": temperature, "position_weights": torch.rand(5) if weighted else None}
    exact = reg.consistency(tuned, reference, EVERY, **settings)
    cached = reg.cached_consistency(
        tuned, top_log_probs(reference, top_k=12, temperature=temperature), EVERY, **settings
    )
    torch.testing.assert_close(cached, exact, rtol=1e-12, atol=1e-12)
    (got,), (want,) = torch.autograd.grad(cached, tuned), torch.autograd.grad(exact, tuned)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("top_k", [1, 4, 11])
def test_what_is_missing_is_the_divergence_within_the_tail(top_k, temperature):
    tuned, reference = random_logits(2), random_logits(3)
    top = top_log_probs(reference, top_k=top_k, temperature=temperature)
    exact = reg.consistency(tuned, reference, EVERY, temperature=temperature)
    cached = reg.cached_consistency(tuned, top, EVERY, temperature=temperature)
    missing = 0.0
    for position in range(5):
        tail = sorted(set(range(12)) - set(top.tokens[position].tolist()))
        r, p = (side[position].div(temperature).softmax(-1)[tail] for side in (reference, tuned))
        missing += temperature**2 * (r * ((r / r.sum()) / (p / p.sum())).log()).sum().item() / 5
    assert cached < exact or top_k == 11  # with one token in the tail nothing is missing
    assert exact.item() - cached.item() == pytest.approx(missing, abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("top_k", [1, 4, 11, 12])
def test_the_gradient_is_the_stated_one(top_k, temperature):
    tuned, reference = random_logits(4).requires_grad_(), random_logits(5)
    top = top_log_probs(reference, top_k=top_k, temperature=temperature)
    (got,) = torch.autograd.grad(
        reg.cached_consistency(tuned, top, EVERY, temperature=temperature, reduction="sum"), tuned
    )
    r, p = (side.detach().div(temperature).softmax(-1) for side in (reference, tuned))
    kept = torch.zeros(5, 12, dtype=torch.bool).scatter(1, top.tokens, True)
    r_tail, p_tail = ((side * ~kept).sum(-1, keepdim=True) for side in (r, p))
    want = temperature * torch.where(kept, p - r, p - r_tail * p / p_tail.clamp(min=1e-300))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_a_tiny_tail_is_not_lost_in_rounding():
    """1 − Σ p over the top tokens would be 0 in float32 here, and the divergence infinite."""
    tuned, reference = torch.zeros(5, 12), torch.zeros(5, 12)
    tuned[:, 0], reference[:, 0] = 40.0, 3.0
    top = top_log_probs(reference, top_k=1)
    exact = reg.consistency(tuned.double(), reference.double(), EVERY)  # the tail is uniform on both sides
    assert reg.cached_consistency(tuned, top, EVERY).item() == pytest.approx(exact.item(), rel=1e-6)


# ---- the fused loss


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("num_positions", [0, 1, 13])
@pytest.mark.parametrize("top_k", [1, 7, 36, 37])
def test_the_fused_loss_is_the_plain_one(dtype, tolerance, num_positions, top_k):
    """In values and gradients, over several chunks, for both temperatures, with and without adaptive weights."""
    generator = torch.Generator().manual_seed(7)
    head = torch.nn.Linear(16, 37, bias=False).requires_grad_(False)
    head.weight.copy_(torch.randn(37, 16, generator=generator))
    hidden = torch.randn(num_positions, 16, generator=generator)
    reference_logits = head(hidden + 0.3 * torch.randn(num_positions, 16, generator=generator)).double()
    hidden, head = hidden.to(dtype).requires_grad_(), head.to(dtype)
    targets = torch.randint(0, 37, (num_positions,), generator=generator)
    for temperature, diversity_top_k, schedule in itertools.product((1.0, 2.0), (None, 5), ("constant", "adaptive")):
        config = BALoRAConfig(
            **STRONG | {"lambda_svd": 0},
            temperature=temperature,
            diversity_top_k=diversity_top_k,
            consistency_schedule=schedule,
        )
        settings = {"weights": TermWeights(task=0.1, consistency=0.05, diversity=0.03), "config": config}
        top = top_log_probs(reference_logits, top_k=top_k, temperature=temperature)
        if dtype != torch.float64:
            top = TopLogProbs(top.tokens, top.log_probs.float(), top.log_tail.float(), top.entropy.float())
        want, want_terms = nlg_loss(hidden, top, head, targets, **settings)
        got, terms = fused_nlg_loss(hidden, top, head, targets, **settings, chunk_memory_mb=5.5 * 37 * 4 / 2**20)
        torch.testing.assert_close(got, want, rtol=min(tolerance, 5e-6), atol=min(tolerance, 5e-6))
        for name, value in want_terms.items():
            torch.testing.assert_close(terms[name], value, rtol=min(tolerance, 1e-5), atol=min(tolerance, 1e-5))
        (gradient,), (want_gradient,) = torch.autograd.grad(got, hidden), torch.autograd.grad(want, hidden)
        size = want_gradient.abs().max().item() if num_positions else 0.0
        torch.testing.assert_close(gradient, want_gradient, rtol=tolerance, atol=tolerance * size)


def test_the_fused_loss_keeps_a_tiny_tail():
    """A tuned model far surer than the reference: the tail's mass is 1e-15, its gradient is not small."""
    head = torch.nn.Linear(12, 12, bias=False).requires_grad_(False)
    head.weight.copy_(torch.eye(12))
    hidden = torch.zeros(1, 12)
    hidden[0, 0] = 37.0
    hidden.requires_grad_()
    reference = torch.zeros(1, 12)
    reference[0, 0] = 3.0
    config = BALoRAConfig(lambda_consistency=1.0, lambda_diversity=0.0, lambda_svd=0.0)
    weights = TermWeights(task=0.0, consistency=1.0)
    top = top_log_probs(reference, top_k=1)
    got, _ = fused_nlg_loss(hidden, top, head, torch.tensor([0]), weights=weights, config=config)
    exact = reg.consistency(hidden.double(), reference.double(), EVERY[:1])
    assert got.item() == pytest.approx(exact.item(), rel=1e-6)
    (gradient,), (want,) = torch.autograd.grad(got, hidden), torch.autograd.grad(exact, hidden)
    torch.testing.assert_close(gradient, want, rtol=1e-5, atol=1e-7)


# ---- what is stored


def test_lookup_gives_the_models_distributions_in_the_order_of_the_batch(tmp_path):
    rows = tiny_rows(9)
    cache = tiny_cache(tmp_path / "cache", rows, top_k=8, temperature=2.0)
    batch = collate([rows[number] for number in (4, 0, 7)])
    mask = reg.response_mask(batch.pop("labels"))
    numbers = batch.pop("row").tolist()
    logits = tiny_llama()(**batch).logits[mask].detach()
    want, got = top_log_probs(logits, top_k=8, temperature=2.0), cache.lookup(numbers)
    assert torch.equal(got.tokens, want.tokens)
    for name in ("log_probs", "log_tail", "entropy"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(want.entropy, reg.entropy(logits))  # at T = 1, over the whole vocabulary


def test_half_precision_is_read_as_a_distribution(tmp_path):
    cache = tiny_cache(tmp_path / "cache", tiny_rows(9), top_k=8, dtype="float16")
    top = cache.lookup(range(9))
    torch.testing.assert_close(top.log_probs.exp().sum(-1) + top.log_tail.exp(), torch.ones(len(top.tokens)))
    exact = tiny_cache(tmp_path / "exact", tiny_rows(9), top_k=8).lookup(range(9))
    assert 0 < (top.log_probs - exact.log_probs).abs().max() < 5e-3


# ---- training


VERSIONS = {
    "paper2024": BALoRAConfig(**STRONG),
    "iclr2026": BALoRAConfig(**STRONG, temperature=2.0, diversity_top_k=20, svd_norm="frobenius"),
    "adaptive": BALoRAConfig(**STRONG, temperature=2.0, consistency_schedule="adaptive"),
}


@pytest.mark.parametrize("implementation", mostly_slow(("fused", "plain"), ("fused",)))
@pytest.mark.parametrize("version", VERSIONS)
def test_training_with_every_token_is_training_without_a_cache(tmp_path, version, implementation):
    """20 steps over shuffled rows: the same terms and weights; the model carries no second adapter."""
    rows, histories, weights = tiny_rows(24), [], []
    for cached in (False, True):
        model = tiny_peft("pissa")
        cache = None
        if cached:
            cache = tiny_cache(tmp_path / "cache", rows, temperature=VERSIONS[version].temperature)
        trained = BALoRATrainer(
            model,
            arguments(tmp_path, max_steps=20, train_sampling_strategy="random", gradient_accumulation_steps=2),
            regularizers=VERSIONS[version],
            loss=LossConfig(implementation=implementation),
            reference=cache,
            train_dataset=rows,
            data_collator=collate,
        )
        trained.train()
        assert cached != any(".reference." in name for name, _ in model.named_parameters())
        histories.append([entry for entry in trained.state.log_history if "loss" in entry])
        weights.append(adapter_weights(model))
    assert len(histories[0]) == 20
    for live, cached in zip(*histories, strict=True):
        for name in ("loss", "task", "consistency", "weighted_consistency", "diversity", "svd"):
            assert cached[name] == pytest.approx(live[name], rel=1e-4, abs=1e-5), name
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_with_a_cache_are_accumulation_two_without(tmp_path, root):
    """Both processes fill the cache and read it, packed; the terms are those of the live reference in one, padded."""
    settings = json.dumps(vars(VERSIONS["adaptive"]))
    worker = str(root / "tests" / "workers" / "train_tiny.py")
    single, double = tmp_path / "single.pt", tmp_path / "double.pt"
    subprocess.run(
        [sys.executable, worker, settings, "2", str(single)], env=environment(root), check=True, timeout=3600
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [worker, settings, "1", str(double), "packed", str(tmp_path / "cache")]
    subprocess.run([*launch, *words], env=environment(root), check=True, timeout=3600)
    one, two = torch.load(single), torch.load(double)
    assert one["processes"] == 1 and two["processes"] == 2
    for name in ("loss", "task", "consistency", "weighted_consistency", "diversity", "svd"):
        assert len(one["logs"][name]) == 6
        assert two["logs"][name] == pytest.approx(one["logs"][name], rel=1e-4, abs=1e-5), name
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-3, atol=1e-4)


def test_a_run_fills_the_cache_reports_its_error_and_the_next_run_reads_it(train, tmp_path, capsys):
    folder = tmp_path / "cache"
    words = (f"reference.cache={folder}", "regularizers.lambda_consistency=0.1")
    first = train(*words, "reference.top_k=16")
    printed = capsys.readouterr().out
    assert "top 16 of 259 tokens" in printed and "MB to be computed" in printed
    report = json.loads((first / "train.json").read_text())["training"]["reference_cache"]
    for name in ("uniform", "trained"):
        assert 0 < report[name]["cached"] < report[name]["exact"]
    assert 0 < report["tail_mass"]["mean"] <= report["tail_mass"]["max"] < 1

    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    train(*words, "reference.top_k=16", "adapter.rank=2", "seed=7", name="second")  # another cell of the table
    assert "to be computed" not in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents
    with pytest.raises(UserError, match="reference.top_k is 16 there, 8 here") as caught:
        train(*words, "reference.top_k=8", name="third")
    one_line(caught)
    train(f"reference.cache={tmp_path / 'unused'}", method="pissa", name="fourth")
    assert not (tmp_path / "unused").exists()  # no consistency term, no cache


def test_the_run_id_tells_that_a_cache_is_used_but_not_where(root):
    base = root / "configs/nlg/toy.yaml"

    def run_id(*overrides, method="ba_lora"):
        return load_config(base, method=method, overrides=overrides).run_id

    assert run_id("reference.cache=a") == run_id("reference.cache=b") != run_id()
    assert run_id("reference.cache=a", "reference.top_k=32") != run_id("reference.cache=a")
    assert run_id("reference.cache=a", "reference.dtype=float32") != run_id("reference.cache=a")
    with pytest.raises(UserError, match="no effect without reference.cache"):
        run_id("reference.top_k=32")
    assert run_id("reference.cache=a", method="pissa") == run_id(method="pissa")


# ---- killed, and several at once


def environment(root):
    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def fill_command(root, folder, *points):
    return [sys.executable, str(root / "tests" / "workers" / "fill_cache.py"), str(folder), *points]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """A cache written without interruption."""
    folder = tmp_path_factory.mktemp("cache") / "whole"
    subprocess.run(fill_command(root, folder), env=environment(root), check=True, timeout=3600)
    assert len(contents(folder)) > 10
    return contents(folder)


@pytest.mark.slow
def test_a_killed_writer_goes_on_to_the_same_bytes(whole, root, tmp_path):
    """Killed after the key, the sample or a shard was written, and with half a sample or half a shard on disk."""
    save = "ba_lora.objective.reference_cache.files.save_file"
    points = ["os.replace:1", "os.replace:2", "os.replace:6", f"{save}:1", f"{save}:5"]
    command = fill_command(root, tmp_path / "killed", *points)
    done = subprocess.run(command, env=environment(root), capture_output=True, text=True, check=True, timeout=3600)
    assert json.loads(done.stdout.splitlines()[-1]) == [signal.SIGKILL] * len(points)
    for number in range(len(points)):
        assert contents(tmp_path / "killed" / str(number)) == whole


@pytest.mark.slow
def test_several_writers_share_the_work(whole, root, tmp_path):
    """Every file is computed once, and nobody leaves before all are there."""
    folder = tmp_path / "cache"
    writers = [
        subprocess.Popen(fill_command(root, folder), env=environment(root), stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    computed = [int(writer.communicate(timeout=3600)[0].splitlines()[-1]) for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert sum(computed) == len(whole) - 1  # all but the key
    assert contents(folder) == whole


def test_a_writer_waits_for_a_file_that_another_holds(whole, root, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    held = next(name for name in whole if name.startswith("rows-00000000"))
    locks = FileLocks(folder)
    assert locks.acquire(folder / held, wait=False)
    writer = subprocess.Popen(fill_command(root, folder), env=environment(root), stdout=subprocess.PIPE, text=True)
    lines = [writer.stdout.readline() for _ in range(2)]
    assert "waiting for 1 files" in lines[1]
    assert sorted([*contents(folder), held]) == sorted(whole)  # it has done all else meanwhile
    locks.close()
    writer.communicate(timeout=3600)
    assert writer.returncode == 0 and contents(folder) == whole


# ---- refusals


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_cache, "SHARD_BYTES", 2048)
    cache = tiny_cache(tmp_path / "cache", tiny_rows(20), top_k=8)
    cache.verify()
    assert cache.num_shards > 3
    return cache


def test_a_truncated_file_is_refused_and_mended_by_deleting_it(small):
    file = small.shard_path(1)
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(UserError, match="rows-.*damaged.*delete it and run again") as caught:
        small.verify()
    one_line(caught)
    file.unlink()
    with pytest.raises(UserError, match="missing"):
        small.verify()
    fill(small, tiny_llama)
    small.verify()
    assert file.read_bytes() == whole


def test_a_changed_byte_is_refused(small):
    file = small.shard_path(2)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="other contents than were written"):
        small.verify()


def test_files_of_others_are_refused(small, tmp_path):
    other = tiny_cache(tmp_path / "other", tiny_rows(20), top_k=8, temperature=2.0)
    small.shard_path(0).write_bytes(other.shard_path(0).read_bytes())
    with pytest.raises(UserError, match="no file of this reference cache"):
        small.verify()
    small.shard_path(0).write_bytes(small.shard_path(1).read_bytes())  # its own, at another's place
    with pytest.raises(UserError, match="no file of this reference cache"):
        small.verify()
    small.shard_path(0).write_bytes(b"not a cache")
    with pytest.raises(UserError, match="damaged"):
        small.verify()


def test_folders_of_others_are_refused(small, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("…")
    for path, message in ((tmp_path / "thesis", "not empty"), (small.shard_path(0), "is a file")):
        with pytest.raises(UserError, match=message):
            open_cache(path, small.key, small.rows)
    (small.path / "key.json").write_text("[]")
    with pytest.raises(UserError, match="no key of a reference cache"):
        open_cache(small.path, small.key, small.rows)


@pytest.fixture(scope="module")
def full_key(root):
    from transformers import AutoTokenizer

    config = load_config(root / "configs/nlg/toy.yaml")
    report = {"file_sha256": None, "source": "made", "revision": None, "sha256": "0" * 64}
    tokenizer = AutoTokenizer.from_pretrained(root / "data/toy/clean")
    return cache_key(config, Rows.of(tiny_rows(20)), report, tokenizer)


KEY_ENTRIES = [
    "format", "model", "model.revision", "model.sha256", "vocabulary", "model.dtype", "model.quantization", "tokenizer",
    "prompt", "data.name", "data.source", "data.revision", "data.split", "data.num_rows", "data.sample_seed",
    "data.max_length", "data.toy", "data.sha256", "rows", "rows.sha256", "reference.top_k", "reference.dtype",
    "regularizers.temperature",
]  # fmt: skip


def test_the_list_of_key_entries_is_whole(full_key):
    assert sorted(KEY_ENTRIES) == sorted(full_key)


@pytest.mark.parametrize("entry", KEY_ENTRIES)
def test_another_key_is_an_error_that_names_the_entry(full_key, tmp_path, entry):
    rows = Rows.of(tiny_rows(20))
    claim(open_cache(tmp_path / "cache", full_key, rows))
    open_cache(tmp_path / "cache", full_key, rows)
    other = copy.deepcopy(full_key) | {entry: 1 if entry != "rows" else 21}
    other[entry] = {"reference.dtype": "float32", "format": 0}.get(entry, other[entry])
    other[entry] = 2.0 if entry == "regularizers.temperature" else other[entry]
    with pytest.raises(UserError, match=rf"\({entry} is \S.* there, \S.* here\): set reference.cache") as caught:
        open_cache(tmp_path / "cache", other, rows)
    one_line(caught)


def test_another_model_is_another_key(root, tmp_path, tiny_model, full_key):
    """A folder's weights count, not its name."""
    from tests.support.tiny import save_tiny_model

    keys = []
    for folder in (tiny_model, save_tiny_model(tmp_path / "same"), save_tiny_model(tmp_path / "other")):
        if folder.name == "other":
            weights = (folder / "model.safetensors").read_bytes()
            (folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
        config = load_config(root / "configs/nlg/toy.yaml", overrides=[f"model.name={folder}"])
        report = {"file_sha256": None, "source": "made", "revision": None, "sha256": "0" * 64}
        from transformers import AutoTokenizer

        keys.append(cache_key(config, Rows.of(tiny_rows(3)), report, AutoTokenizer.from_pretrained(folder)))
    assert keys[0] == keys[1]
    assert {name for name in keys[0] if keys[0][name] != keys[2][name]} == {"model.sha256"}


def test_a_disk_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(UserError, match="needs .* MB more and .* has 0.0 MB free") as caught:
        tiny_cache(tmp_path / "cache", tiny_rows(20))
    one_line(caught)
    assert not (tmp_path / "cache").exists()


def test_more_tokens_than_there_are_is_refused(tmp_path):
    with pytest.raises(UserError, match=f"above the vocabulary, {VOCABULARY}"):
        tiny_cache(tmp_path / "cache", tiny_rows(3), top_k=VOCABULARY + 1)


def test_the_trainer_refuses_what_the_cache_does_not_fit(tmp_path):
    cache = tiny_cache(tmp_path / "cache", tiny_rows(8), top_k=8)

    def trainer(rows, **settings):
        return BALoRATrainer(
            tiny_peft("pissa"),
            arguments(tmp_path),
            regularizers=BALoRAConfig(**settings),
            reference=cache,
            train_dataset=rows,
            data_collator=collate,
        )

    with pytest.raises(UserError, match="made at temperature 1.0, regularizers.temperature is 2.0"):
        trainer(tiny_rows(8), temperature=2.0)
    for rows in (tiny_rows(8).remove_columns("row"), tiny_rows(8, seed=1)):
        with pytest.raises(UserError, match="not those of the reference cache"):
            trainer(rows).train()
    with pytest.raises(UserError, match="training rows only"):
        trainer(tiny_rows(8)).evaluate(tiny_rows(8))
    with pytest.raises(UserError, match="column `row`"):
        Rows.of(tiny_rows(8).select([1, 0]))


def test_a_model_without_numbers_is_refused(tmp_path):
    rows = Rows.of(tiny_rows(4))
    key = tiny_cache(tmp_path / "good", tiny_rows(4)).key
    cache = open_cache(tmp_path / "cache", key, rows)
    claim(cache)
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(UserError, match="NaN or infinite logits in float32"):
        fill(cache, lambda: model)
    assert not cache.shard_path(0).exists()


def test_top_log_probs_can_be_sliced():
    top = top_log_probs(random_logits(6), top_k=3)
    part = top[1:3]
    assert isinstance(part, TopLogProbs)
    for name in ("tokens", "log_probs", "log_tail", "entropy"):
        assert torch.equal(getattr(part, name), getattr(top, name)[1:3])
