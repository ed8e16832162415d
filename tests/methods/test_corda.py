"""CorDA's factors against PEFT's own initialisation, and what a run with them leaves."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import corda as peft_corda
from peft.tuners.lora.config import CordaConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from ba_lora.config.layers import load_config
from ba_lora.errors import UserError
from ba_lora.experiments.tables import Row, find_table, load_table
from ba_lora.methods import corda
from ba_lora.methods.pissa import load_factors
from ba_lora.models.layers import adapter_layers, factor_parameters
from ba_lora.runs.export import serving_adapter
from ba_lora.training.trainer import BALoRATrainer
from eval.report.sources import Sources, read_paper
from eval.report.spec import table_spec
from tests.support.tiny import tiny_llama, tiny_rows


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64))


def lora_config(model, init, **settings):
    settings = {"r": 4, "lora_alpha": 4, "task_type": "CAUSAL_LM", "target_modules": "all-linear"} | settings
    return LoraConfig(**settings, init_lora_weights=init, fan_in_fan_out=model.config.model_type == "gpt2")


def weights(model):
    """[(A, B, base weight)] of the adapted layers."""
    return [(*factor_parameters(layer, "default"), layer.get_base_layer().weight) for layer in adapter_layers(model)]


@pytest.mark.parametrize("covariance_bytes", [1, corda.COVARIANCE_BYTES], ids=["layer by layer", "together"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("settings", [{}, {"lora_alpha": 8}, {"lora_alpha": 8, "use_rslora": True}])
def test_factors_and_residual_are_pefts(tmp_path, build, settings, covariance_bytes):
    rows = tiny_rows(12)["input_ids"][:]
    theirs = build()
    config = lora_config(theirs, "corda", **settings, corda_config=CordaConfig(corda_method="ipm"))
    config.target_modules = {name for name, module in theirs.named_modules() if is_target(module)}
    peft_corda.preprocess_corda(theirs, config, lambda: [theirs(input_ids=torch.tensor([ids])) for ids in rows])
    theirs = get_peft_model(theirs, config)

    ours = get_peft_model(build(), lora_config(theirs, True, **settings))
    untouched = [weight.clone() for _, _, weight in weights(ours)]
    path = tmp_path / "initial" / "factors.safetensors"
    corda.write_factors(ours, path, rows, covariance_bytes=covariance_bytes)
    assert all(torch.equal(weight, before) for (_, _, weight), before in zip(weights(ours), untouched, strict=True))
    load_factors(ours, path, subtract=True)
    assert len(weights(ours)) in (8, 14)
    for got, want in zip(weights(ours), weights(theirs), strict=True):
        for mine, peers in zip(got, want, strict=True):
            torch.testing.assert_close(mine, peers, rtol=1e-5, atol=1e-6)


def is_target(module):
    return type(module).__name__ in ("Linear", "Conv1D") and module.weight.shape[0] != 64  # all but the head


@pytest.mark.parametrize(
    ("targets", "num_inputs"), [("all-linear", 48), (["q_proj"], 32)], ids=["down_proj's 48 inputs", "q_proj's 32"]
)
def test_there_are_128_tokens_for_each_input_of_the_widest_layer(targets, num_inputs, capsys):
    """However long the rows are: the last one drawn is the one that makes the number full."""
    model = tiny_llama()
    model = get_peft_model(model, lora_config(model, True, target_modules=targets))
    rows = tiny_rows(600)
    first, again, other = (corda.calibration_rows(model, rows, seed) for seed in (1, 1, 2))
    lengths = [len(ids) for ids in first]
    assert sum(lengths[:-1]) < 128 * num_inputs <= sum(lengths)
    assert first == again != other
    known = rows["input_ids"][:]
    assert all(ids in known for ids in first)
    assert f"CorDA: covariances of {sum(lengths):,} tokens in {len(first)} of 600 rows\n" in capsys.readouterr().out


def test_a_data_set_with_too_few_tokens_is_taken_whole_and_said(capsys):
    model = tiny_llama()
    rows = tiny_rows(20)
    taken = corda.calibration_rows(get_peft_model(model, lora_config(model, True)), rows, 1)
    assert sorted(taken) == sorted(rows["input_ids"][:])
    tokens = sum(map(len, taken))
    said = f"CorDA: covariances of {tokens} tokens in 20 of 20 rows, fewer than the 6,144 that 48 inputs ask for\n"
    assert capsys.readouterr().out == said


def embedding_is_nan(model):
    model.model.embed_tokens.weight.data[5] = torch.nan


def last_weight_is_nan(model):
    """Of the one layer whose output no other adapted layer sees."""
    model.model.layers[-1].mlp.down_proj.weight.data[3, 4] = torch.nan


@pytest.mark.parametrize(
    ("damage", "what"), [(embedding_is_nan, "a layer's inputs"), (last_weight_is_nan, "a layer's weight")]
)
def test_what_is_not_finite_is_told_in_one_line(tmp_path, damage, what):
    model = tiny_llama()
    damage(model)
    model = get_peft_model(model, lora_config(model, True))
    with pytest.raises(UserError, match=f"adapter.init=corda: .*{what}.* not all of it is finite: .*float32") as caught:
        corda.write_factors(model, tmp_path / "initial" / "factors", [[5, 6]])
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["U_WC", "S_WC", "V_WC"])
def test_factors_that_are_not_finite_are_refused(tmp_path, monkeypatch, part):
    """As an SVD on a GPU may give them, without a word."""
    decompose = peft_corda.collect_eigens_for_layer

    def damaged(linear, config):
        found = decompose(linear, config)
        getattr(found, part)[..., 0] = torch.nan
        return found

    monkeypatch.setattr(peft_corda, "collect_eigens_for_layer", damaged)
    model = tiny_llama()
    model = get_peft_model(model, lora_config(model, True))
    with pytest.raises(UserError, match=r"the SVD of .*q_proj cannot be used, not all of it is finite"):
        corda.write_factors(model, tmp_path / "initial" / "factors", [[5, 6]])
    assert not list(tmp_path.iterdir())


def test_a_rank_above_a_layers_size_is_told_before_any_row_runs(tmp_path, monkeypatch):
    model = tiny_llama()
    model = get_peft_model(model, lora_config(model, True, r=33))
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(UserError, match=r"adapter.rank=33 is above the size of .*\.q_proj, 32: use a smaller rank"):
        corda.write_factors(model, tmp_path / "initial" / "factors", [[5, 6]])


def test_the_models_own_error_is_not_taken_for_pefts(tmp_path, monkeypatch):
    model = tiny_llama()
    model = get_peft_model(model, lora_config(model, True))

    def complain(*words, **more):
        raise ValueError("too long a row")

    monkeypatch.setattr(model, "forward", complain)
    with pytest.raises(ValueError, match="^too long a row$"):
        corda.write_factors(model, tmp_path / "initial" / "factors", [[5, 6]])


def test_a_run_starts_at_the_pretrained_model_and_exports_a_plain_lora(train, tiny_model):
    run = train("adapter.rank=3", method="corda")
    facts = json.loads((run / "train.json").read_text())
    assert 0 < facts["training"]["step0_max_logit_difference"] < 1e-4
    settings = json.loads((run / "lora" / "adapter_config.json").read_text())
    assert (settings["r"], settings["init_lora_weights"]) == (6, True)
    with pytest.raises(ValueError):  # PEFT could not rebuild the residual
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), run / "adapter")
    assert serving_adapter(run) == run / "lora"


def test_the_terms_see_the_pretrained_model(train):
    """With BA-LoRA's terms on it: the consistency term is 0 before the first step, and not after."""
    run = train("adapter.init=corda", method="ba_lora")
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    consistency = [entry["consistency"] for entry in logged if "consistency" in entry]
    assert consistency[0] == 0 < consistency[-1]


def test_a_killed_run_goes_on_from_its_factors(train, monkeypatch):
    """Stopped at step 2 of 3: the same weights as uninterrupted, and no second decomposition."""
    whole = train(method="corda", name="whole")
    decompositions, steps = [], []
    write_factors, training_step = corda.write_factors, BALoRATrainer.training_step

    def counted(*words, **more):
        decompositions.append(1)
        write_factors(*words, **more)

    def interrupted(*words, **more):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return training_step(*words, **more)

    monkeypatch.setattr(corda, "write_factors", counted)
    with monkeypatch.context() as killed:
        killed.setattr(BALoRATrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(method="corda", name="killed")
    again = train(method="corda", name="killed")
    assert json.loads((again / "train.json").read_text())["training"]["resumed_from"] == "checkpoint-2"
    assert decompositions == [1]
    one, two = (load_file(run / "adapter" / "trained.safetensors") for run in (whole, again))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("kind", "base", "words"), [("nlg", "toy", ["model.quantization=nf4"]), ("nlu", "minilm", ["task=rte"])]
)
def test_where_it_is_not_offered(kind, base, words):
    with pytest.raises(UserError, match="adapter.init=corda runs training rows through a language model"):
        load_config(f"configs/{kind}/{base}.yaml", method="lora", overrides=["adapter.init=corda", *words], kind=kind)


@pytest.mark.parametrize("override", ["adapter.svd_rank=256", "adapter.factors_cache=folder"])
def test_settings_of_pissas_svd_are_refused(override):
    with pytest.raises(UserError, match=f"{override.split('=')[0]} is PiSSA's, .*leave it out"):
        load_config("configs/nlg/toy.yaml", method="corda", overrides=[override])
    load_config("configs/nlg/toy.yaml", method="pissa", overrides=[override])


def test_weights_split_by_zero3_are_refused(train, monkeypatch):
    monkeypatch.setattr("transformers.integrations.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(UserError, match="use ZeRO-2"):
        train(method="corda")


def test_the_papers_corda_plus_plus_stands_beside_it():
    spec = table_spec(load_table(find_table("nlg_iclr2026"), seeds=[42]))
    column = next(column for column in spec.columns if column.name == "gsm8k")
    found = Sources([], read_paper(spec.paper, renamed=spec.names), {}).paper_value(Row("llama-2-7b", "corda"), column)
    assert found.mean == 55.03
    assert "CorDA++" in spec.labels["corda"]
