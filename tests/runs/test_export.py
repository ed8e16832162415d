"""The whole training command on a tiny model, and what it leaves: every export equals the trained model."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from ba_lora import BALoRAConfig, BALoRATrainer, export_lora
from ba_lora.config.layers import available_methods, load_config
from ba_lora.config.schema import ModelConfig
from ba_lora.config.schema_nlg import NLGConfig
from ba_lora.errors import UserError
from ba_lora.io import read_json
from ba_lora.runs import export
from ba_lora.runs.export import serving_adapter
from ba_lora.runs.parity import MAX_SHARE, compare_logits
from ba_lora.training.plain_lora import plain_lora
from tests.support import tiny
from tests.support.tiers import mostly_slow
from tests.support.tiny import only_result, save_tiny_model

TEXT = "Tom has 3 apples and buys 4 more."


def logits(model, folder):
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        return model.eval()(ids).logits


def base(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model)


MERGED = [method for method in available_methods() if load_config("toy", method=method).export.merged]
MERGED.remove("loftq")  # whose base is in 4 bit: test_four_bit.py


@pytest.mark.parametrize("method", mostly_slow(MERGED, ("full_ft", "adalora", "dora", "lora", "ba_lora")))
def test_every_method_trains_and_exports(train, tiny_model, method):
    """merged = adapter on the untouched base, by plain PEFT; and training did change the model."""
    steps = {"adalora": ["trainer.max_steps=12"], "delta_lora": ["adapter.options.start=1"]}.get(method, [])
    run = train(*steps, method=method)
    merged = logits(AutoModelForCausalLM.from_pretrained(run / "merged"), run / "merged")
    assert (merged - logits(base(tiny_model), tiny_model)).abs().max() > 1e-3
    if (run / "adapter").is_dir():  # none of full fine-tuning
        served = logits(PeftModel.from_pretrained(base(tiny_model), serving_adapter(run)), tiny_model)
        torch.testing.assert_close(served, merged, atol=1e-4, rtol=0)
    facts = json.loads((run / "train.json").read_text())
    assert facts["status"] == "ok"
    differences = facts["export"]["max_logit_difference"]
    assert differences and max(differences.values()) < 1e-3
    assert not [path for path in run.rglob("*") if path.suffix in (".bin", ".pt") and "checkpoints" not in path.parts]


def test_pissa_becomes_a_plain_lora_of_twice_the_rank(train, tiny_model):
    run = train(method="pissa")
    settings = json.loads((run / "lora" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["init_lora_weights"]) == (8, 8, True)
    converted = logits(PeftModel.from_pretrained(base(tiny_model), run / "lora"), tiny_model)
    as_trained = logits(PeftModel.from_pretrained(base(tiny_model), run / "adapter"), tiny_model)
    torch.testing.assert_close(converted, as_trained, atol=1e-4, rtol=0)  # exact PiSSA: PEFT rebuilds the residual


def test_lora_is_whole_and_names_its_base_for_every_folder(train, tiny_model, tmp_path, monkeypatch):
    """A base named by a relative path is found from elsewhere; the tokenizer lies beside the adapter."""
    monkeypatch.chdir(tiny_model.parent)
    run = train(f"model.name={tiny_model.name}", method="pissa")
    monkeypatch.chdir(tmp_path)
    for name in ("adapter", "lora"):
        named = json.loads((run / name / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert Path(named).is_absolute() and Path(named).samefile(tiny_model)
        assert (
            AutoTokenizer.from_pretrained(run / name)("abc")["input_ids"]
            == AutoTokenizer.from_pretrained(named)("abc")["input_ids"]
        )


def test_rslora_scaling_survives_the_conversion(train, tiny_model):
    run = train("adapter.rslora=true", "adapter.alpha=8", method="pissa")
    settings = json.loads((run / "lora" / "adapter_config.json").read_text())
    assert settings["use_rslora"] is False and settings["lora_alpha"] / settings["r"] == 8 / 4**0.5
    merged = logits(AutoModelForCausalLM.from_pretrained(run / "merged"), tiny_model)
    converted = logits(PeftModel.from_pretrained(base(tiny_model), run / "lora"), tiny_model)
    torch.testing.assert_close(converted, merged, atol=1e-4, rtol=0)


def test_a_randomised_pissa_adapter_cannot_be_loaded_wrongly(train, tiny_model):
    """PEFT would rebuild another residual without an error: adapter/ has no file that PEFT takes."""
    run = train("adapter.init=pissa_niter_4", method="pissa")
    assert not (run / "adapter" / "adapter_config.json").exists()
    with pytest.raises(ValueError):
        PeftModel.from_pretrained(base(tiny_model), run / "adapter")
    merged = logits(AutoModelForCausalLM.from_pretrained(run / "merged"), tiny_model)
    converted = logits(PeftModel.from_pretrained(base(tiny_model), run / "lora"), tiny_model)
    torch.testing.assert_close(converted, merged, atol=1e-4, rtol=0)


def test_loading_a_pissa_adapter_twice_is_the_trap_that_lora_avoids(train, tiny_model):
    """On the saved residual base PEFT applies PiSSA once more: far off. The plain LoRA does nothing of the kind."""
    run = train(method="pissa")
    merged = logits(AutoModelForCausalLM.from_pretrained(run / "merged"), tiny_model)
    residual = base(tiny_model)
    factors = load_file(run / "initial" / "initial_factors.safetensors")
    for name, module in residual.named_modules():
        key = f"base_model.model.{name}.lora_A.weight"
        if key in factors:
            module.weight.data -= factors[key.replace("lora_A", "lora_B")] @ factors[key]
    twice = logits(PeftModel.from_pretrained(residual, run / "adapter"), tiny_model)
    assert (twice - merged).abs().max() > 0.05


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_bases_export_within_their_tolerance(train, dtype):
    run = train(f"model.dtype={dtype}", "trainer.max_steps=2")
    merged = load_file(run / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {getattr(torch, dtype)}
    for name in ("adapter", "lora"):
        adapter = load_file(run / name / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    shares = json.loads((run / "train.json").read_text())["export"]["share_of_learned_change"]
    assert shares.keys() == {"lora", "merged"} and 0 < max(shares.values()) <= MAX_SHARE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_parity_check_notices_an_export_without_the_training(train, monkeypatch, dtype):
    """lora/ emptied to zeros is the pre-trained model itself."""
    convert = export.convert_to_lora

    def emptied(*arguments, **settings):
        convert(*arguments, **settings)
        file = arguments[2] / "adapter_model.safetensors"
        from safetensors.torch import save_file

        save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}, file)

    monkeypatch.setattr(export, "convert_to_lora", emptied)
    with pytest.raises(UserError, match="differs from the trained model"):
        train(f"model.dtype={dtype}", "trainer.max_steps=6", "trainer.learning_rate=0.02")


def test_mixed_precision_training_of_a_float32_base_exports(train):
    for method in ("ba_lora", "full_ft"):
        run = train("trainer.bf16=true", method=method, name=method)
        assert max(json.loads((run / "train.json").read_text())["export"]["max_logit_difference"].values()) < 1e-3


def test_the_parity_check_fails_above_its_tolerance_and_leaves_nothing(train, tmp_path):
    with pytest.raises(UserError, match="differs from the trained model"):
        train("export.tolerance=1e-12")
    assert not (tmp_path / "run" / "lora").exists() and not (tmp_path / "run" / "merged").exists()
    assert (tmp_path / "run" / "lora.rejected").is_dir()
    facts = json.loads((tmp_path / "run" / "train.json").read_text())
    assert facts["status"] == "failed" and "differs" in facts["error"]
    assert only_result(tmp_path / "results")["status"] == "failed"
    assert not list((tmp_path / "run").glob(".*"))


def test_a_finished_run_is_not_trained_again(train, capsys):
    run = train()
    before = (run / "train.json").read_text()
    train()
    assert "is trained already" in capsys.readouterr().out
    assert (run / "train.json").read_text() == before


def test_a_changed_training_file_is_not_passed_over(train, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "2 + 2?", "response": "The answer is: 4"}\n' * 8)
    run = train("data.name=metamathqa", f"data.source={rows}")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    rows.write_text('{"query": "2 + 3?", "response": "The answer is: 5"}\n' * 8)
    with pytest.raises(UserError, match="rows.jsonl has changed since"):
        train("data.name=metamathqa", f"data.source={rows}", "export.merged=false")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_saved_config_reproduces_the_run_alone(train):
    first = train("trainer.learning_rate=0.02", "adapter.rank=3")
    second = train(config_path=first / "config.yaml", name="again")
    one, two = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (first, second))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert load_config(second / "config.yaml").adapter.rank == 3


def test_a_folder_of_another_config_is_refused_until_overwritten(train):
    run = train()
    with pytest.raises(UserError, match="holds a run of another config"):
        train("adapter.rank=2")
    train("adapter.rank=2", "overwrite=true")
    assert load_config(run / "config.yaml").adapter.rank == 2


def test_a_folder_that_is_no_run_is_never_emptied(train, tmp_path):
    precious = tmp_path / "run" / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("words")
    for overwrite in ("overwrite=false", "overwrite=true"):
        with pytest.raises(UserError, match="no run's folder"):
            train(overwrite)
    assert precious.read_text() == "words"


def test_export_without_merging(train):
    run = train("export.merged=false")
    assert (run / "lora").is_dir() and not (run / "merged").exists()


def test_the_model_card_says_what_it_is(train):
    run = train()
    for name in ("adapter", "lora", "merged"):
        card = (run / name / "README.md").read_text()
        assert "ba_lora" in card and "lambda_consistency: 0.0001" in card and "24 rows of toy" in card
    assert "PeftModel.from_pretrained" in (run / "lora" / "README.md").read_text()
    assert "residual" in (run / "adapter" / "README.md").read_text()


def test_gradient_checkpointing_trains_the_same_adapter(train):
    plain, checkpointed = train(), train("trainer.gradient_checkpointing=true", name="checkpointed")
    one, two = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (plain, checkpointed))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)


def test_pushing_uploads_what_serves_on_the_untouched_base(train, monkeypatch):
    import huggingface_hub

    uploads = []

    class Hub:
        def create_repo(self, repo_id, private, exist_ok):
            assert private and exist_ok
            return f"https://hub/{repo_id}"

        def upload_folder(self, *, repo_id, folder_path, path_in_repo=".", ignore_patterns=()):
            assert (folder_path / "README.md").is_file()
            uploads.append((repo_id, folder_path.name, path_in_repo))
            told.extend(f.read_text() for f in folder_path.glob("*.json") if f.name not in ignore_patterns)

        def upload_file(self, *, repo_id, path_or_fileobj, path_in_repo):
            uploads.append((repo_id, path_in_repo))
            told.append(path_or_fileobj.decode())

    told = []
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    run = train("hub.push=true", "hub.repo_id=me/toy")
    assert uploads == [("me/toy", "lora", "."), ("me/toy", "adapter_config.json"), ("me/toy", "merged", "merged")]
    base = read_json(run / "lora" / "adapter_config.json")["base_model_name_or_path"]
    assert Path(base).is_dir() and not any(str(Path(base).parent) in text for text in told), "no folder of this machine"


def test_a_failed_push_is_one_line_and_trains_nothing_twice(train, monkeypatch, tmp_path):
    import huggingface_hub

    class Hub:
        def create_repo(self, *_args, **_kwargs):
            raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required\nbut not found")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    with pytest.raises(UserError, match="cannot push to me/toy: Token is required; run `hf auth login`"):
        train("hub.push=true", "hub.repo_id=me/toy")
    assert only_result(tmp_path / "results")["status"] == "ok"
    before = (tmp_path / "run" / "train.json").read_text()
    Hub.create_repo = lambda *_args, **_kwargs: "https://hub/me/toy"
    Hub.upload_folder = Hub.upload_file = lambda *_args, **_kwargs: None
    train("hub.push=true", "hub.repo_id=me/toy")
    assert (tmp_path / "run" / "train.json").read_text() == before


@pytest.mark.parametrize("method", ["ba_lora", "full_ft"])
def test_transposed_layers_are_exported_right(train, tmp_path, method):
    """GPT-2 keeps its weights as [in, out] (Conv1D) and ties its head to the embeddings."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 1024}
    untrained = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0))
    folder = save_tiny_model(tmp_path / "gpt2", model=untrained)
    run = train(f"model.name={folder}", method=method)
    merged = logits(AutoModelForCausalLM.from_pretrained(run / "merged"), folder)
    assert (merged - logits(AutoModelForCausalLM.from_pretrained(folder), folder)).abs().max() > 1e-3
    assert max(json.loads((run / "train.json").read_text())["export"]["max_logit_difference"].values()) < 1e-3
    if method == "ba_lora":
        served = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), run / "lora")
        torch.testing.assert_close(logits(served, folder), merged, atol=1e-4, rtol=0)


# ---- what half precision loses of the learned update


@pytest.mark.parametrize("spread", [1e-3, 3e-4])
@pytest.mark.parametrize(
    ("dtype", "hot", "merged"), [(torch.float32, 1e-6, 1e-4), (torch.bfloat16, 4e-3, 0.5)], ids=["float32", "bfloat16"]
)
def test_the_share_of_the_learned_update_that_an_export_loses(spread, dtype, hot, merged):
    """Served hot, factors rounded to `dtype`: 0.23 % in bf16 whatever the size of the update, as for any LoRA. Merged:
    the rounding of W + ΔW, which in bf16 no method is spared. [B, −B₀] [A; A₀] would lose 15 % and more in bf16."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape, scale):
        return scale * torch.randn(*shape, generator=generator)

    def lost(got, want):
        return ((got - want).norm() / want.norm()).item()

    def product(b, a):
        return b.to(dtype).double() @ a.to(dtype).double()

    weight = random(256, 256, scale=0.05).to(dtype)
    left, values, right = torch.linalg.svd(weight.float())
    first_a, first_b = values[:32].sqrt()[:, None] * right[:32], left[:, :32] * values[:32].sqrt()
    lora_a, lora_b = first_a + random(32, 256, scale=spread), first_b + random(256, 32, scale=spread)
    learned = lora_b.double() @ lora_a.double() - first_b.double() @ first_a.double()
    plain = plain_lora({"x.lora_A.weight": lora_a, "x.lora_B.weight": lora_b},
                       {"x.lora_A.weight": first_a, "x.lora_B.weight": first_b})  # fmt: skip
    factors = plain["x.lora_B.weight"], plain["x.lora_A.weight"]
    assert [factor.shape for factor in factors] == [(256, 64), (64, 256)]
    assert lost(factors[0].double() @ factors[1].double(), learned) < 1e-6
    assert lost(product(*factors), learned) < hot
    whole = (weight.double() + learned).to(dtype).double() - weight.double()
    assert lost(whole, learned) < merged
    if dtype == torch.bfloat16:
        naive = torch.cat([lora_b, -first_b], 1), torch.cat([lora_a, first_a])
        assert lost(product(*naive), learned) > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("lost", "passes"), [(0.05, True), (0.2, False)])
def test_an_export_that_loses_more_than_a_tenth_of_the_change_is_refused(tmp_path, dtype, lost, passes):
    """Relative to what training changed, however small that is beside the logits."""
    config = NLGConfig(model=ModelConfig(name="x", dtype=dtype))
    initial = 10 * torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    change = 2e-3 if dtype == "float32" else 2.0  # what is lost is below the absolute limit, or below 4 bf16 ulp of 30
    trained = initial + change * torch.ones_like(initial)
    (tmp_path / "lora").mkdir()
    arguments = ("lora", trained - lost * change, trained, initial, config, tmp_path)
    if passes:
        assert compare_logits(*arguments).share == pytest.approx(lost, rel=1e-2)
        return
    with pytest.raises(UserError, match="20 % of what training changed.* allowed are 10% of that change"):
        compare_logits(*arguments)
    assert (tmp_path / "lora.rejected").is_dir() and not (tmp_path / "lora").exists()


# ---- the library's own export


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_1", "lora_alpha": 8, "use_rslora": True},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "pissa", "use_dora": True},
        {"init_lora_weights": "pissa", "target_modules": ["q_proj", "embed_tokens"]},
        {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 6}},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "lora",
)
@pytest.mark.parametrize("regularized", [True, False])
def test_a_library_user_gets_a_lora_for_the_untouched_base(tmp_path, settings, regularized):
    base = tiny.tiny_llama()
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    weights = {} if regularized else {f"lambda_{term}": 0.0 for term in ("consistency", "diversity", "svd")}
    trainer = BALoRATrainer(
        get_peft_model(base, LoraConfig(**settings)),
        tiny.arguments(tmp_path, max_steps=2, learning_rate=0.02),
        regularizers=BALoRAConfig(**weights),
        train_dataset=tiny.tiny_rows(8),
        data_collator=tiny.collate,
    )
    trainer.train()
    folder = export_lora(trainer, tmp_path / "lora")
    ids = torch.arange(3, 40)[None]
    served = PeftModel.from_pretrained(tiny.tiny_llama(), folder).eval()
    with torch.no_grad():
        trained, pretrained = trainer.model.eval()(ids).logits, tiny.tiny_llama()(ids).logits
        torch.testing.assert_close(served(ids).logits, trained, atol=1e-4, rtol=0)
    assert (trained - pretrained).abs().max() > 0.01
    names = {file.name for file in folder.iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json"}
    assert not list(tmp_path.glob(".*"))
