"""Every method on one footing: what it trains, where it starts, and that a run of it can be trusted.

`CASES` has a line for each; a method file without one fails. Long tests take a method of each kind, the slow tier all.
"""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from ba_lora.config.layers import METHODS_PATH
from ba_lora.config.methods import adapter_loads, tuner_facts, writes_lora
from ba_lora.config.schema import BALoRAConfig
from ba_lora.errors import UserError
from ba_lora.io import folder_atomic
from ba_lora.methods.base import method_of
from ba_lora.methods.build import parameter_counts, probe_logits
from ba_lora.models.pretrained import load_base
from ba_lora.runs import export
from ba_lora.training.log import LOGGED_NAMES
from tests.support.methods import (
    ADAPTERS,
    CASES,
    IN_LAYERS,
    LAYERS,
    OUT,
    built,
    check_checkpointing,
    check_two_processes,
    config_of,
    equal,
    fixed_draws,
    sized_steps,
    trainer_of,
)
from tests.support.tiers import mostly_slow
from tests.support.tiny import adapter_weights, collate, tiny_llama, tiny_rows

ONE_OF_EACH_KIND = ("adalora", "dylora", "delta_lora", "eva", "lora_ga", "lora_pro", "monteclora", "ssf")


def test_every_method_file_has_a_case():
    """bitfit and nmtune: test_methods_nlu.py; loftq, which needs a 4-bit base: tests/runs/test_four_bit.py."""
    own = {path.stem for path in METHODS_PATH.glob("*.yaml")} - {"bitfit", "nmtune", "loftq"}
    assert own == {case.method or name for name, case in CASES.items()}


@pytest.mark.parametrize("method", CASES)
def test_what_is_trained_and_where_it_starts(method, base, tmp_path):
    config, model, step_zero, probe = built(method, base, tmp_path)
    case = CASES[method]
    if case.count is not None:
        assert parameter_counts(model)[0] == case.count(case.rank)
    terms = {term.name for term in method_of(model).tuner.terms(model)}
    assert terms <= set(tuner_facts(config.adapter)["term_names"]) <= set(LOGGED_NAMES)
    if case.step_zero is not None:
        assert step_zero.difference <= case.step_zero
        return
    assert step_zero.difference > 1e-3  # virtual tokens: seen from the start, and away with the adapter off
    with model.disable_adapter():
        assert torch.equal(probe_logits(model, probe), probe_logits(load_base(config), probe))


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


def test_delta_lora_is_not_merged_without_what_it_has_moved(base, tmp_path):
    """PEFT's merge knows A and B only. Before step K that is the whole model."""
    trained = trainer_of("delta_lora", base, tmp_path)
    trained.model.merge_adapter()
    trained.model.unmerge_adapter()
    trained.train()
    with pytest.raises(UserError, match="would leave out how far Delta-LoRA has moved the base"):
        trained.model.merge_and_unload()


@pytest.mark.parametrize("method", sorted(ADAPTERS))
def test_the_bases_own_dtype_is_that_of_all_that_is_trained(method, base, tmp_path):
    if method.startswith("monteclora"):
        pytest.skip("refused: test_refusals.py")
    _, model, _, _ = built(method, base, tmp_path, "model.dtype=bfloat16", "adapter.dtype=base")
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.bfloat16}


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
    """4 rows at once = 4 micro-batches of one row, at the same draws."""
    words = ["adapter.options.norm_weight=0.05"] if method == "sara" else []  # a norm that is seen
    settings = sized_steps(config_of(method, base))
    weights = []
    for number, accumulation in ((4, 1), (1, 4)):
        with fixed_draws():
            trained = trainer_of(
                method,
                base,
                tmp_path / str(number),
                *words,
                per_device_train_batch_size=number,
                gradient_accumulation_steps=accumulation,
                max_grad_norm=0,
                **settings,
            )
            start = adapter_weights(trained.model)
            trained.train()
        weights.append(adapter_weights(trained.model))
    filled = [name for name in start if start[name].numel()]  # SAM may train nothing of a layer
    moved = {name: (weights[0][name] - start[name]).abs().max().item() for name in filled}
    assert max(moved.values()) > 1e-4
    for name, far in moved.items():
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=0, atol=1e-2 * far + 1e-6)


def test_monteclora_has_its_terms_once_a_step_under_accumulation(base, tmp_path):
    """Seen by plain gradient descent, of which a term that counts for each micro-batch makes another step."""
    weights, logs = [], []
    for number, accumulation in ((4, 1), (1, 4)):
        with fixed_draws():
            trained = trainer_of(
                "monteclora",
                base,
                tmp_path / str(number),
                "adapter.options.kl_loss_weight=0.1",
                per_device_train_batch_size=number,
                gradient_accumulation_steps=accumulation,
                optim="sgd",
                max_steps=2,
                learning_rate=0.05,
                max_grad_norm=0,
            )
            start = adapter_weights(trained.model)
            trained.train()
        weights.append(adapter_weights(trained.model))
        logs.append([entry for entry in trained.state.log_history if "variational_kl" in entry])
    for name in start:
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=1e-4, atol=1e-5)
    spread = next(name for name in start if "std_prior" in name)
    assert (weights[0][spread] - start[spread]).abs().max() > 1e-3  # which the KL moves
    for one, two in zip(*logs, strict=True):
        for name in ("loss", "task", "variational_kl", "weighted_variational_kl", "expert_concentration"):
            assert two[name] == pytest.approx(one[name], rel=1e-4), name


@pytest.mark.parametrize(
    "method", mostly_slow([*IN_LAYERS, "full_ft"], ("monteclora", "dylora", "delta_lora", "full_ft"))
)
def test_gradient_checkpointing_changes_nothing(method, base, tmp_path):
    check_checkpointing(trainer_of, method, base, tmp_path)


PARTS_APART = ("lora_fa_on_pissa", "lora_pro_on_pissa", "monteclora_on_pissa")


@pytest.mark.parametrize(
    "method",
    mostly_slow([*IN_LAYERS, "full_ft"], ("monteclora", "olora", "delta_lora", "ssf", "vera", "full_ft", *PARTS_APART)),
)
def test_the_terms_of_ba_lora_on_top(method, base, tmp_path):
    """Consistency is 0 at step 0, exactly: the reference is the pre-trained model under the method's own rounding."""

    def consistency(*words: str, **settings: int) -> list[float]:
        strong = BALoRAConfig(lambda_consistency=0.5, lambda_diversity=0.3, lambda_svd=0.2)
        trained = trainer_of(method, base, tmp_path, *words, regularizers=strong, **settings)
        trained.train()
        return [entry["consistency"] for entry in trained.state.log_history if "consistency" in entry]

    values = consistency()
    assert values[-1] > 0
    if CASES[method].noisy_start:
        assert values[0] > 0
        assert abs(consistency("adapter.options.sample_scaler=1.0e-12", max_steps=1)[0]) < 1e-8
    else:
        assert values[0] == 0


@pytest.mark.slow
def test_two_processes_equal_accumulation_two(base, tmp_path, root):
    """2 processes x 2 rows = 1 process x 2 rows x accumulation 2, at the same draws."""
    check_two_processes("train_method.py", [str(base), str(tmp_path / "runs")], ADAPTERS, tmp_path, root)
