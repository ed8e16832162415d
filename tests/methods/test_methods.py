"""Every method on one footing: what it trains, where it starts, and that a run of it can be trusted.

`CASES` has a line for each; a method file without one fails. Long tests take a method of each kind, the slow tier all.
"""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from ba_lora.config.layers import METHODS_PATH, load_config
from ba_lora.config.methods import adapter_loads, tuner_facts, writes_lora
from ba_lora.config.schema import BALoRAConfig
from ba_lora.errors import UserError
from ba_lora.io import folder_atomic
from ba_lora.methods.build import build_model, parameter_counts, probe_logits
from ba_lora.models.pretrained import load_base
from ba_lora.runs import export
from ba_lora.training.trainer import BALoRATrainer
from tests.support.tiers import mostly_slow
from tests.support.tiny import adapter_weights, arguments, collate, tiny_llama, tiny_rows

IN = 2 * (32 * 6 + 48)  # of 2 layers: q, k, v, o, gate, up, down
OUT = 2 * (32 * 4 + 48 * 2 + 32)
LAYERS = 14
WEIGHTS = 2 * (4 * 32 * 32 + 3 * 32 * 48)
OFF = BALoRAConfig(lambda_consistency=0, lambda_diversity=0, lambda_svd=0)


@dataclasses.dataclass(frozen=True)
class Case:
    """count: trained parameters at rank r. step_zero: the largest |Δ logit| of the untrained model. options: of the
    run. draws_in_training: each pass has its own noise, so that no two ways to split a batch are the same."""

    count: Callable[[int], int]
    step_zero: float = 0.0
    options: tuple[str, ...] = ()
    rank: int = 4
    draws_in_training: bool = False
    steps: int = 4


def lora(r: int) -> int:
    return r * (IN + OUT)


RESIDUAL = 2e-5
CASES = {
    "full_ft": Case(lambda r: sum(p.numel() for p in tiny_llama().parameters())),
    "lora": Case(lora),
    "rslora": Case(lora),
    "dora": Case(lambda r: lora(r) + OUT, step_zero=1e-6),
    "adalora": Case(lambda r: lora(6) + 6 * LAYERS, steps=12),
    "loha": Case(lambda r: 2 * lora(r)),
    "pissa": Case(lora, RESIDUAL),
    "corda": Case(lora, 2e-4),
    "olora": Case(lora, RESIDUAL),
    "milora": Case(lora, RESIDUAL),
    "lora_ga": Case(lora, RESIDUAL, ("adapter.options.rows=8",)),
    "eva": Case(lora, 0, ("adapter.options={rows: 16, batch_size: 4, rho: 1}",)),
    "lora_plus": Case(lora),
    "lora_fa": Case(lambda r: r * OUT),
    "lora_pro": Case(lora),
    "monteclora": Case(lambda r: lora(r) + (r + 4) * LAYERS, draws_in_training=True),
    "dylora": Case(lora),
    "delta_lora": Case(lora, 0, ("adapter.options.start=1",)),
    "vera": Case(lambda r: OUT + r * LAYERS, rank=16),
    "ia3": Case(lambda r: OUT - 2 * 32 + 2 * 48),
    "miss": Case(lambda r: r * OUT),
    "peanut": Case(lambda r: 2 * r * OUT),
    "ssf": Case(lambda r: 2 * OUT),
    "sara": Case(lambda r: round(0.05 * WEIGHTS)),
    "sam": Case(lambda r: round(0.01 * WEIGHTS), 0, ("adapter.options.rows=8",)),
    "lorta": Case(lambda r: r * (32 + 16 + 2 + 2 + 4)),
    "houlsby": Case(lambda r: 4 * (2 * r * 32 + r + 32)),
    "pfeiffer": Case(lambda r: 2 * (2 * r * 32 + r + 32)),
    "prompt_tuning": Case(lambda r: 20 * 32, 10),
    "prefix_tuning": Case(lambda r: 20 * 2 * 2 * 32, 10),
    "ba_lora": Case(lora, RESIDUAL),
    "ba_lora_iclr2026": Case(lora, RESIDUAL),
}
ADAPTERS = sorted(CASES.keys() - {"full_ft", "ba_lora", "ba_lora_iclr2026"})
IN_LAYERS = [method for method in ADAPTERS if not method.startswith("pr")]  # no virtual tokens
ONE_OF_EACH_KIND = ("adalora", "dylora", "delta_lora", "eva", "lora_ga", "lora_pro", "monteclora", "ssf")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_llama().save_pretrained(folder)
    return folder


def config_of(method: str, base: Path, *overrides: str):
    case = CASES[method]
    words = [f"model.name={base}", "model.dtype=float32", *case.options, *overrides]
    config = load_config("toy", method=method, overrides=words)
    if "rank" in tuner_facts(config.adapter)["ignores"] or any(word.startswith("adapter.rank=") for word in overrides):
        return config
    return load_config("toy", method=method, overrides=[*words, f"adapter.rank={case.rank}"])


def built(method: str, base: Path, folder: Path, *overrides: str):
    """(config, model ready to train, step zero), from the folder's first factors where there are any."""
    config = config_of(method, base, *overrides)
    torch.manual_seed(1)
    batch = collate(list(tiny_rows(3)))
    probe = {name: batch[name] for name in ("input_ids", "attention_mask")}
    steps = CASES[method].steps
    return config, *build_model(config, run_path=folder, num_steps=steps, probe=probe, rows=tiny_rows(24)), probe


def trainer_of(method: str, base: Path, folder: Path, *overrides: str, regularizers=OFF, resume=False, **settings):
    config, model, _, _ = built(method, base, folder / "run", *overrides)
    chosen = {"max_steps": CASES[method].steps, "learning_rate": 1e-2} | settings
    return BALoRATrainer(
        model,
        arguments(folder, **chosen),
        regularizers=regularizers,
        train_dataset=tiny_rows(48),
        data_collator=collate,
    )


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_every_method_file_has_a_case():
    own = {path.stem for path in METHODS_PATH.glob("*.yaml")} - {"bitfit", "nmtune", "loftq"}  # tests of their own
    assert own == set(CASES)


@pytest.mark.parametrize("method", CASES)
def test_what_is_trained_and_where_it_starts(method, base, tmp_path):
    _, model, step_zero, _ = built(method, base, tmp_path)
    assert parameter_counts(model)[0] == CASES[method].count(CASES[method].rank)
    assert step_zero.difference <= CASES[method].step_zero


@pytest.mark.parametrize("method", mostly_slow(ADAPTERS, ONE_OF_EACH_KIND))
def test_a_resumed_run_is_the_uninterrupted_one_and_its_exports_the_trained_model(method, base, tmp_path):
    """Bit for bit. The exports: the adapter or its plain LoRA on the untouched base, and the merged model."""
    half = CASES[method].steps // 2
    whole = trainer_of(method, base, tmp_path, save_strategy="steps", save_steps=half)
    start = adapter_weights(whole.model)
    whole.train()
    trained = adapter_weights(whole.model)
    assert any(not torch.equal(start[name], trained[name]) for name in start)
    again = trainer_of(method, base, tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{half}"))
    assert equal(adapter_weights(again.model), trained)

    config, _, _, probe = built(method, base, tmp_path / "run")
    config = dataclasses.replace(config, output_dir=str(tmp_path / "run"))
    logits = probe_logits(again.plain_model(), probe)
    change = (logits - probe_logits(load_base(config), probe)).abs().max()
    assert change > 1e-3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "load_tokenizer", lambda *_, **__: copy.copy(NoTokenizer()))
        export.save_trained(again, config, tmp_path / "run")
        parities = export.export_run(config, tmp_path / "run", probe, logits)
    assert set(parities) == {"lora" if writes_lora(config.adapter) else "adapter"} | (
        {"merged"} if config.export.merged else set()
    )
    assert max(parity.difference for parity in parities.values()) <= 2e-3 * change + 2e-6
    if writes_lora(config.adapter):
        settings = json.loads((tmp_path / "run" / "lora" / "adapter_config.json").read_text())
        assert settings["peft_type"] == "LORA" and settings["init_lora_weights"] is True
        assert not any(settings.get(name) for name in ("monteclora_config", "lora_ga_config", "eva_config", "use_dora"))
    if not adapter_loads(config.adapter):
        with pytest.raises(ValueError):
            PeftModel.from_pretrained(load_base(config), tmp_path / "run" / "adapter")


def test_delta_lora_that_would_never_start_is_refused(base, tmp_path):
    with pytest.raises(UserError, match="start=4: the run has 4 optimizer steps"):
        built("delta_lora", base, tmp_path, "adapter.options.start=4")


def test_eva_for_more_directions_than_inputs_is_refused(base, tmp_path):
    with pytest.raises(UserError, match="takes 33 directions .* has 32 inputs"):
        built("eva", base, tmp_path, "adapter.options={rows: 16, batch_size: 16, rho: 8.2}")


@pytest.mark.parametrize("method", ["sam", "peanut"])
def test_whole_weights_are_not_to_be_had_under_zero_3(method, base, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(UserError, match="which ZeRO-3 splits"):
        built(method, base, tmp_path)


@pytest.mark.parametrize("method", mostly_slow(ADAPTERS, ("ia3", "lorta", "miss")))
def test_a_typed_key_changes_what_is_trained_or_is_refused(method, base, tmp_path):
    def of(*words: str) -> tuple[dict[str, tuple], torch.Tensor]:
        """Return the trained weights' shapes, and the logits once each of them is another than at the start."""
        _, model, _, probe = built(method, base, tmp_path / "-".join(words), *words)
        weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        with torch.no_grad():
            for parameter in weights.values():
                parameter += 0.05 * torch.arange(1.0, parameter.numel() + 1).sin().view_as(parameter)
        return {name: tuple(parameter.shape) for name, parameter in weights.items()}, probe_logits(model, probe)

    shapes, logits = of()
    for key, value in (("rank", "3"), ("alpha", "5"), ("target_modules", "[q_proj]")):
        if key in tuner_facts(config_of(method, base).adapter)["ignores"]:
            with pytest.raises(UserError, match=f"adapter.{key} has no effect with adapter.tuner=.*: leave it out"):
                config_of(method, base, f"adapter.{key}={value}")
        else:
            other_shapes, other_logits = of(f"adapter.{key}={value}")
            assert other_shapes != shapes or not torch.equal(other_logits, logits), key


@pytest.mark.parametrize(
    ("options", "count"), [("init_weights: bat", 4 * OUT), ("init_weights: mini, mini_r: 8", 4 * 8 * LAYERS)]
)
def test_the_variants_of_miss(options, count, base, tmp_path):
    """Their parameters, and that the merged model is the trained one."""
    trained = trainer_of("miss", base, tmp_path, f"adapter.options={{{options}}}")
    assert parameter_counts(trained.model)[0] == count
    trained.train()
    probe = collate(list(tiny_rows(3)))
    probe = {name: probe[name] for name in ("input_ids", "attention_mask")}
    before, untrained = probe_logits(trained.plain_model(), probe), probe_logits(tiny_llama(), probe)
    merged = probe_logits(trained.plain_model().merge_and_unload(safe_merge=True), probe)
    assert (before - untrained).abs().max() > 1e-3
    torch.testing.assert_close(merged, before, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("mini_r: 8", "mini_r has no effect without adapter.options.init_weights=mini"),
        ("init_weights: mini, mini_r: 0", "mini_r is 0: it must be"),
        ("init_weights: mini, mini_r: 5", "mini_r=5 does not divide a layer of 32 outputs"),
        ("init_weights: bat", "3 does not divide one of 32 inputs and 32 outputs"),
    ],
)
def test_what_no_variant_of_miss_can_be(options, message, base, tmp_path):
    with pytest.raises(UserError, match=message):
        built("miss", base, tmp_path, "adapter.rank=3", f"adapter.options={{{options}}}")


def test_the_ranks_of_dylora_are_compared_with_the_trained_model_at_that_rank(base, tmp_path, monkeypatch):
    trained = trainer_of("dylora", base, tmp_path)
    trained.train()
    run = tmp_path / "run"
    config, _, _, probe = built("dylora", base, run, "export.ranks=[1,3]", "export.merged=false")
    config = dataclasses.replace(config, output_dir=str(run))
    monkeypatch.setattr(export, "load_tokenizer", lambda *_, **__: copy.copy(NoTokenizer()))
    logits = probe_logits(trained.plain_model(), probe)
    export.save_trained(trained, config, run)
    parities = export.export_run(config, run, probe, logits)
    assert set(parities) == {"adapter", "ranks/1", "ranks/3"}
    assert max(parity.difference for parity in parities.values()) < 1e-5
    of_one = probe_logits(PeftModel.from_pretrained(load_base(config), run / "ranks" / "1"), probe)
    assert (of_one - logits).abs().max() > 1e-3  # rank 1 is another model than the whole
    write = export.write_rank
    monkeypatch.setattr(export, "write_rank", lambda source, to, rank, **kw: write(source, to, 4 - rank, **kw))
    with pytest.raises(UserError, match="the exported ranks/1/ differs from the trained model"):
        export.export_run(config, run, probe, logits)
    assert (run / "ranks" / "1.rejected").is_dir()


class NoTokenizer:
    def save_pretrained(self, folder):
        with folder_atomic(Path(folder) / "nothing"):
            pass


@pytest.mark.parametrize("method", ["delta_lora", "monteclora", "lorta"])
def test_the_library_exports_what_a_method_makes_of_its_adapter(method, base, tmp_path):
    trained = trainer_of(method, base, tmp_path)
    trained.train()
    ids = torch.arange(3, 40)[None]
    folder = export.export_lora(trained, tmp_path / "lora")
    served = PeftModel.from_pretrained(tiny_llama(), folder).eval()
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    with torch.no_grad():
        logits, untrained = trained.plain_model().eval()(ids).logits, tiny_llama()(ids).logits
        torch.testing.assert_close(served(ids).logits, logits, atol=1e-5, rtol=0)
    assert (logits - untrained).abs().max() > 1e-3


def test_the_library_refuses_to_export_what_is_no_lora(base, tmp_path):
    with pytest.raises(UserError, match="no plain LoRA equals an adapter of type IA3"):
        export.export_lora(trainer_of("ia3", base, tmp_path), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("method", mostly_slow(ADAPTERS, ("adalora", "dylora", "lora_pro", "ssf")))
def test_accumulation_changes_nothing(method, base, tmp_path):
    """4 rows at once = 4 micro-batches of one row; where passes draw, the log is that of as many steps."""
    weights = []
    for number, accumulation in ((4, 1), (1, 4)):
        trained = trainer_of(
            method,
            base,
            tmp_path / str(number),
            per_device_train_batch_size=number,
            gradient_accumulation_steps=accumulation,
            learning_rate=1e-3,
        )
        trained.train()
        assert trained.state.global_step == CASES[method].steps
        weights.append(adapter_weights(trained.model))
    if not CASES[method].draws_in_training:
        for name in weights[0]:
            torch.testing.assert_close(weights[1][name], weights[0][name], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("method", mostly_slow(IN_LAYERS, ("monteclora", "dylora", "delta_lora")))
def test_gradient_checkpointing_changes_nothing(method, base, tmp_path):
    weights = []
    for on in (False, True):
        trained = trainer_of(
            method,
            base,
            tmp_path / str(on),
            *(["trainer.gradient_checkpointing=true"] if on else []),
            gradient_checkpointing=on,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
        trained.train()
        weights.append(adapter_weights(trained.model))
    for name in weights[0]:
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", mostly_slow(IN_LAYERS, ("monteclora", "olora", "delta_lora", "ssf", "vera")))
def test_the_terms_of_ba_lora_on_top(method, base, tmp_path):
    """Consistency is 0 at step 0, exactly: the reference is the pre-trained model under the method's own rounding."""
    strong = BALoRAConfig(lambda_consistency=0.5, lambda_diversity=0.3, lambda_svd=0.2)
    trained = trainer_of(method, base, tmp_path, regularizers=strong)
    trained.train()
    consistency = [entry["consistency"] for entry in trained.state.log_history if "consistency" in entry]
    assert consistency[0] == 0 and consistency[-1] > 0


@pytest.mark.slow
def test_two_processes_equal_accumulation_two(base, tmp_path, root):
    """2 processes x 2 rows = 1 process x 2 rows x accumulation 2, for all methods whose passes draw nothing."""
    methods = [method for method in IN_LAYERS if not CASES[method].draws_in_training]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    found = []
    for start, accumulation in (([sys.executable], "2"), (launch, "1")):
        out = tmp_path / f"{accumulation}.pt"
        words = [str(root / "tests/workers/train_method.py"), str(base), str(tmp_path / "runs"), accumulation, str(out)]
        subprocess.run([*start, *words, *methods], env=environment, check=True, timeout=3600)
        found.append(torch.load(out))
    one, two = found
    assert (one["processes"], two["processes"]) == (1, 2)
    for method in methods:
        for name, weight in one["weights"][method].items():
            torch.testing.assert_close(
                two["weights"][method][name], weight, rtol=5e-3, atol=5e-4, msg=f"{method} {name}"
            )
