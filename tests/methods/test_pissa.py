"""PiSSA's factors against PEFT's own initialisation, the residual on disk, and the cache that a table shares."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from ba_lora.config.layers import load_config
from ba_lora.config.schema import AdapterConfig, ModelConfig, training_hash
from ba_lora.config.schema_nlg import NLGConfig
from ba_lora.errors import UserError
from ba_lora.methods import build as methods
from ba_lora.methods import factors_cache as pissa_cache
from ba_lora.methods import pissa
from ba_lora.methods.factors_cache import SKETCH_SEED, SVD, FactorsCache, tensor_sha256
from ba_lora.methods.pissa import Matrix, decompose, load_factors, requested_svd, write_factors
from ba_lora.models.layers import adapter_layers, factor_parameters
from tests.support.pissa_helpers import random_matrices, weights_sha256
from tests.support.tiny import save_tiny_model, tiny_llama, tiny_rows


@pytest.fixture(autouse=True)
def on_the_cpu():
    """Compute where PEFT does here, also on a machine with a GPU, whose SVDs differ in the last bits."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def tiny_gpt2(dtype=torch.float32):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64)).to(dtype)


def with_lora(model, init, *, rank=4, alpha=4, rslora=False):
    settings = {"r": rank, "lora_alpha": alpha, "use_rslora": rslora, "task_type": "CAUSAL_LM"}
    conv1d = model.config.model_type == "gpt2"
    config = LoraConfig(**settings, target_modules="all-linear", init_lora_weights=init, fan_in_fan_out=conv1d)
    return get_peft_model(model, config)


def ours(model, folder, *, init="pissa", cache=None, svd_rank=None, **settings):
    model = with_lora(model, True, **settings)
    svd = requested_svd(AdapterConfig(init=init, rank=settings.get("rank", 4), svd_rank=svd_rank))
    write_factors(model, folder / "initial" / "factors.safetensors", svd, cache=cache)
    load_factors(model, folder / "initial" / "factors.safetensors", subtract=True)
    return model


def layers(model):
    """name → (A, B, base weight as [out, in], scaling)"""
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            lora_a, lora_b = factor_parameters(layer, "default")
            weight = layer.get_base_layer().weight
            weight = weight.T if layer.fan_in_fan_out else weight
            found[name] = (*(p.detach().float() for p in (lora_a, lora_b, weight)), layer.scaling["default"])
    assert len(found) in (8, 14)
    return found


def same(left, right):
    """Whether the first three tensors are equal bit for bit."""
    return all(torch.equal(*pair) for pair in zip(left[:3], right[:3], strict=True))


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


# ---- against PEFT


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("settings", [{}, {"alpha": 8}, {"alpha": 8, "rslora": True}, {"rank": 32, "alpha": 32}])
def test_exact_factors_and_residual_are_pefts_bit_for_bit(tmp_path, build, settings):
    want, got = layers(with_lora(build(), "pissa", **settings)), layers(ours(build(), tmp_path, **settings))
    for name, tensors in want.items():
        for mine, theirs in zip(got[name], tensors, strict=True):
            assert torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs)), name


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
def test_half_precision_bases(tmp_path, build, init):
    """PEFT rounds its factors to bf16, ours stay float32 in a float32 adapter: the same to bf16's rounding, and the
    residual is the exact one rounded once."""
    dtype = torch.bfloat16
    before = {name: weight for name, (_, _, weight, _) in layers(with_lora(build(dtype=dtype), True)).items()}
    want, got = layers(with_lora(build(dtype=dtype), init)), layers(ours(build(dtype=dtype), tmp_path, init=init))
    for name, (lora_a, lora_b, residual, scaling) in got.items():
        product = scaling * lora_b @ lora_a
        assert torch.equal(residual, (before[name] - product).bfloat16().float())
        if init == "pissa":
            assert relative(product, want[name][1] @ want[name][0]) < 0.02
            assert relative(residual, want[name][2]) < 0.01
    adapter = ours(build(dtype=dtype), tmp_path)
    assert {p.dtype for p in adapter.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("settings", [{}, {"alpha": 8}, {"alpha": 8, "rslora": True}])
@pytest.mark.parametrize("niter", [1, 16])
def test_randomised_factors_and_residual_are_pefts_from_the_same_seed(tmp_path, build, settings, niter):
    """PEFT goes on with the run's random numbers from layer to layer: here it begins each layer with our seed."""
    init = f"pissa_niter_{niter}"
    peft_model = with_lora(build(), True, **settings)
    for layer in adapter_layers(peft_model):
        torch.manual_seed(SKETCH_SEED)
        layer.pissa_init("default", init)
    mine = layers(ours(build(), tmp_path, init=init, **settings))
    for name, (lora_a, lora_b, residual, scaling) in layers(peft_model).items():
        got_a, got_b, got_residual, _ = mine[name]
        assert torch.allclose(scaling * got_b @ got_a, scaling * lora_b @ lora_a, atol=1e-6), name
        assert torch.allclose(got_residual, residual, atol=1e-6), name


@pytest.mark.parametrize("niter", [None, 4])
def test_neither_batches_nor_random_state_nor_company_change_the_result(niter):
    generator = torch.Generator().manual_seed(0)
    matrices = {str(i): Matrix(torch.randn(24, 16, generator=generator)) for i in range(5)}
    matrices["wide"] = Matrix(torch.randn(16, 24, generator=generator), transposed=True)
    svd = SVD(4, niter)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    together = decompose(matrices, svd)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    for batch_bytes in (1, 2 * 24 * 16 * 4):
        batched = decompose(matrices, svd, batch_bytes=batch_bytes)
        assert all(same(batched[name], components) for name, components in together.items())
    assert same(decompose({"3": matrices["3"]}, svd)["3"], together["3"])
    assert together["wide"].left.shape == (24, 4) and together["wide"].right.shape == (4, 16)


def test_no_more_is_in_memory_than_a_batch_and_what_was_asked_for(monkeypatch):
    sizes = []
    leading_components = pissa.leading_components

    def noting(weights_NOI, svd):
        sizes.append(weights_NOI.numel() * 4)
        return leading_components(weights_NOI, svd)

    monkeypatch.setattr(pissa, "leading_components", noting)
    found = decompose({str(i): Matrix(torch.randn(8, 8)) for i in range(7)}, SVD(2), batch_bytes=3 * 256)
    assert sizes == [768, 768, 256]
    assert all(part.untyped_storage().nbytes() == part.numel() * 4 for parts in found.values() for part in parts)


# ---- the quantised base's residual


def run_config(folder, *, init="pissa", **adapter):
    return NLGConfig(
        model=ModelConfig(name=str(folder), dtype="float32"), adapter=AdapterConfig(init=init, rank=4, **adapter)
    )


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def test_four_bit_trains_on_the_residual_from_disk(tmp_path, monkeypatch, build):
    """QPiSSA's way through the files; quantising itself is left out here, so that the weights can be compared."""
    source = save_tiny_model(tmp_path / "model", model=build())
    plain, _ = methods.build_model(run_config(source), run_path=tmp_path / "plain", num_steps=1)
    loads = []

    def load_unquantised(config, *, source=None, quantize=True):
        loads.append((source, quantize))
        return load_base(run_config(config.model.name), source=source)

    load_base = methods.load_base
    monkeypatch.setattr(methods, "load_base", load_unquantised)
    config = run_config(source)
    config.model.quantization = "nf4"
    run = tmp_path / "run"
    whole, quantised = (None, False), (str(run / "residual"), True)
    for lost, wanted in ((None, [whole, quantised]), (None, [quantised]), ("residual", [whole, quantised])):
        if lost:  # killed between factors and residual
            shutil.rmtree(run / lost)
        loads.clear()
        model, _ = methods.build_model(config, run_path=run, num_steps=1)
        assert loads == wanted
        assert [file.suffix for file in (run / "residual").glob("model*")] == [".safetensors"]
        for (name, got), (_, want) in zip(layers(model).items(), layers(plain).items(), strict=True):
            assert same(got, want), name


# ---- several processes


def launch(root, *words, processes=1):
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"  # DeepSpeed builds with ninja
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.Popen(
        [*command, *map(str, words)],
        env=environment,
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process):
    output, errors = process.communicate(timeout=3600)
    assert process.returncode == 0, errors[-3000:]
    return output


@pytest.mark.parametrize(
    ("init", "stage"),
    [
        ("pissa_niter_4", None),
        pytest.param("pissa_niter_4", "zero3", marks=pytest.mark.slow),
        pytest.param("corda", None, marks=pytest.mark.slow),
    ],
)
def test_all_processes_start_from_the_weights_of_one(root, tmp_path, init, stage):
    """The first computes, the second reads; ZeRO-3 has split the base between them."""
    source = save_tiny_model(tmp_path / "model")
    config = run_config(source, init=init)
    alone, _ = methods.build_model(config, run_path=tmp_path / "alone", num_steps=1, rows=tiny_rows(8))
    words = [source, init, tmp_path / "run", *([stage] if stage else [])]
    printed = outcome(launch(root, root / "tests" / "workers" / "build_pissa.py", *words, processes=2))
    facts = [json.loads(line.removeprefix("facts ")) for line in printed.splitlines() if line.startswith("facts ")]
    first, second = sorted(facts, key=lambda entry: entry["rank"])
    assert first["weights"] == second["weights"] == weights_sha256(alone)
    assert first["svds"] > 0 == second["svds"]
    assert bool(first["split"]) == (stage == "zero3")


# ---- the cache


@pytest.fixture
def svds(monkeypatch):
    """The ranks of the SVDs computed so far."""
    done = []
    leading_components = pissa.leading_components

    def noting(weights_NOI, svd):
        done.extend([svd.rank] * len(weights_NOI))
        return leading_components(weights_NOI, svd)

    monkeypatch.setattr(pissa, "leading_components", noting)
    return done


def test_one_exact_svd_serves_a_sweep(tmp_path, svds):
    alone = {r: layers(ours(tiny_llama(), tmp_path / "alone", rank=r, alpha=r)) for r in (2, 4, 8, 16)}
    cache = FactorsCache(tmp_path / "cache")
    # svd_rank given: one SVD whatever the order. Not given: one whenever the rank grows.
    for rank, svd_rank, computed in (
        (4, 8, 8),
        (2, 8, None),
        (8, 8, None),
        (8, None, None),
        (16, None, 16),
        (2, 8, None),
    ):
        svds.clear()
        model = ours(tiny_llama(), tmp_path / "run", rank=rank, alpha=rank, svd_rank=svd_rank, cache=cache)
        assert svds == ([computed] * 14 if computed else [])
        shared = layers(model)
        assert all(same(shared[name], tensors) for name, tensors in alone[rank].items())
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 14


def test_one_randomised_svd_serves_a_sweep_and_its_slices_are_what_no_cache_gives(tmp_path, svds):
    def build(rank, svd_rank, cache=None):
        svds.clear()
        settings = {"init": "pissa_niter_4", "rank": rank, "alpha": rank, "svd_rank": svd_rank}
        return layers(ours(tiny_llama(), tmp_path / "run", cache=cache, **settings))

    cache = FactorsCache(tmp_path / "cache")
    exact = layers(ours(tiny_llama(), tmp_path / "exact"))
    own, sliced = build(4, None), build(4, 16)
    for rank, computed in ((2, [16] * 14), (16, []), (4, [])):  # smallest first: the order does not matter
        shared = build(rank, 16, cache)
        assert svds == computed
    assert all(same(shared[name], sliced[name]) and not same(sliced[name], own[name]) for name in own)

    def error(found):
        return sum(relative(b @ a, exact[name][1] @ exact[name][0]) for name, (a, b, _, _) in found.items())

    assert error(sliced) < error(own)
    build(4, None, cache)
    assert svds == [4] * 14  # its own rank is another SVD, in files of its own
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 28


def test_an_svd_rank_above_a_matrix_is_its_size(tmp_path):
    wide = ours(tiny_llama(), tmp_path, init="pissa_niter_2", svd_rank=1000)
    assert all(torch.isfinite(a).all() and len(a) == 4 for a, _, _, _ in layers(wide).values())


def test_other_matrices_dtypes_and_svds_have_files_of_their_own(tmp_path, svds, monkeypatch):
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    cache = FactorsCache(tmp_path)
    for other in (weight, weight.float(), weight.T.contiguous(), weight + 1):
        decompose({"w": Matrix(other)}, SVD(2), cache=cache)
    for svd in (SVD(2, 2), SVD(2, 3), SVD(3, 2)):
        decompose({"w": Matrix(weight)}, svd, cache=cache)
    monkeypatch.setattr(pissa_cache, "SKETCH_SEED", SKETCH_SEED + 1)
    decompose({"w": Matrix(weight)}, SVD(2, 2), cache=cache)
    assert len(svds) == 8 == len(list(tmp_path.glob("*.safetensors")))
    decompose({"w": Matrix(weight.T, transposed=True)}, SVD(2), cache=cache)  # the same matrix, stored otherwise
    decompose({"v": Matrix(weight)}, SVD(1), cache=cache)
    assert len(svds) == 8


def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path):
    cache = FactorsCache(tmp_path)
    weights = [torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    for weight in weights:
        decompose({"w": Matrix(weight)}, SVD(3), cache=cache)
    decompose({"w": Matrix(weights[0])}, SVD(3, 1), cache=cache)
    file, other = (cache.file(tensor_sha256(weight), SVD(3)) for weight in weights)
    whole = file.read_bytes()
    changed = whole[:-1] + bytes([whole[-1] ^ 1])
    plain = tmp_path / "plain.safetensors"
    save_file({"left": torch.ones(8, 3), "values": torch.ones(3), "right": torch.ones(3, 6)}, plain)
    for content, message in (
        (whole[: len(whole) // 2], "is damaged"),
        (b"", "is damaged"),
        (changed, "other contents than were written"),
        (other.read_bytes(), "belongs to another matrix"),
        (cache.file(tensor_sha256(weights[0]), SVD(3, 1)).read_bytes(), "belongs to another matrix or SVD"),
        (plain.read_bytes(), "belongs to another matrix"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            decompose({"w": Matrix(weights[0])}, SVD(3), cache=cache)
        assert "\n" not in str(caught.value) and str(file) in str(caught.value)
        assert file.read_bytes() == content


def test_a_killed_process_leaves_whole_files_and_a_free_lock(root, tmp_path, svds):
    worker, path = root / "tests" / "workers" / "fill_factors.py", tmp_path / "cache"
    killed = launch(root, worker, path, tmp_path / "killed.safetensors", "die_after", 6)
    killed.communicate(timeout=3600)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(path.glob("*.safetensors"))) == 5 and len(list(path.glob(".*.tmp"))) == 1
    again = decompose(random_matrices(), SVD(4), cache=FactorsCache(path))
    assert len(svds) == len(again) - 5 and not list(path.glob(".*.tmp"))
    alone = decompose(random_matrices(), SVD(4))
    assert all(same(again[name], components) for name, components in alone.items())


def test_two_processes_at_once_share_the_work(root, tmp_path):
    worker = root / "tests" / "workers" / "fill_factors.py"
    outputs = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    both = [launch(root, worker, tmp_path / "cache", output, "slow") for output in outputs]
    counts = sorted(json.loads(outcome(process))["svds"] for process in both)
    assert counts == [0, len(random_matrices())]
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


# ---- runs


def test_runs_share_the_cache_and_train_alike(train, tmp_path, svds):
    sweep = ["adapter.svd_rank=8", f"adapter.factors_cache={tmp_path / 'cache'}"]
    for name, words, computed in (
        ("narrow", sweep, True),
        ("seeded", [*sweep, "seed=7"], False),
        ("alone", [], True),
    ):
        svds.clear()
        run = train(*words, method="pissa", name=name)
        assert bool(svds) == computed
        facts = json.loads((run / "train.json").read_text())
        assert max(facts["export"]["max_logit_difference"].values()) < 1e-3
    for file in ("initial/initial_factors.safetensors", "merged/model.safetensors"):
        narrow, alone = (load_file(tmp_path / name / file) for name in ("narrow", "alone"))
        assert all(torch.equal(narrow[name], alone[name]) for name in alone)


def test_a_randomised_svd_is_the_same_for_every_seed(train, tmp_path):
    runs = [train("adapter.init=pissa_niter_4", f"seed={seed}", method="pissa", name=str(seed)) for seed in (1, 2)]
    first, second = (load_file(run / "initial" / "initial_factors.safetensors") for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_svds_rank_is_part_of_the_hash_only_where_it_changes_the_weights(root):
    def hashed(*overrides):
        return training_hash(load_config(root / "configs" / "nlg" / "toy.yaml", overrides=overrides))

    sweep = ("adapter.factors_cache=a", "adapter.svd_rank=32")
    assert hashed() == hashed(*sweep)
    assert hashed("method=lora") == hashed("method=lora", *sweep)
    niter = ("adapter.init=pissa_niter_4", "adapter.rank=8")
    assert hashed(*niter) == hashed(*niter, "adapter.factors_cache=a") == hashed(*niter, "adapter.svd_rank=8")
    assert hashed(*niter) != hashed(*niter, "adapter.svd_rank=32")
    with pytest.raises(UserError, match="adapter.svd_rank is 4: it must be at least adapter.rank=8"):
        hashed(*niter, "adapter.svd_rank=4")
