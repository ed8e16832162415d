"""4-bit bases for real, on the CPU: QLoRA, QPiSSA and Q-BA-LoRA from config to the exported model."""

import pytest
import torch
from safetensors.torch import load_file

from ba_lora.config.layers import load_config, load_run
from ba_lora.errors import UserError
from ba_lora.io import read_json, read_jsonl
from ba_lora.methods.build import build_model
from ba_lora.models.classifier import load_classifier
from ba_lora.models.load import load_model
from ba_lora.models.pretrained import load_dequantized
from ba_lora.runs.convert import merge_adapter
from eval.engines.requests import weights_state
from eval.engines.serving import plan_serving
from tests.support.tiny import only_result
from tests.support.tiny_nlu import nlu_config

NF4 = "model.quantization=nf4"


def four_bit_layers(model):
    from bitsandbytes.nn import Linear4bit

    return [module for module in model.modules() if isinstance(module, Linear4bit)]


@pytest.mark.parametrize("method", ["lora", "pissa", "ba_lora", "loftq"])
def test_the_merged_model_is_the_one_that_was_trained(train, tmp_path, method):
    run = train(NF4, method=method)
    export = only_result(tmp_path / "results")["export"]
    assert export["max_logit_difference"]["merged"] < 1e-4
    served = "adapter" if method in ("lora", "loftq") else "lora"
    # On the unquantised base the same adapter makes another model, which is told; LoftQ's was not made for it.
    assert export["max_logit_difference"][served] > 1e-3
    assert export.get("unquantized_logit_difference") == (
        None if method == "loftq" else export["max_logit_difference"][served]
    )

    config = load_run(run)
    model, _ = build_model(config, run_path=run, num_steps=3)
    layers = four_bit_layers(model)
    assert len(layers) == len(layers_with_adapter(model)) > 0
    assert all(layer.weight.dtype == torch.uint8 and not layer.weight.requires_grad for layer in layers)
    if method == "ba_lora":  # the reference is the model at step 0, the 4-bit one
        first = read_jsonl(run / "log.jsonl")[0]
        assert first["consistency"] == pytest.approx(0, abs=1e-9) and first["loss"] > 1


def test_on_a_cpu_with_avx512_bf16_the_weights_are_not_packed_anew(tiny_model, tiny_encoder, monkeypatch):
    """As bitsandbytes does there, unless told otherwise, at the first forward pass without a gradient."""
    from bitsandbytes.nn import modules

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    for model in (
        load_model(load_config("toy", overrides=[f"model.name={tiny_model}", NF4]).model),
        load_classifier(nlu_config(tiny_encoder, NF4)),
    ):
        layers = four_bit_layers(model)
        assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)


def layers_with_adapter(model):
    return [module for module in model.modules() if hasattr(module, "lora_A")]


@pytest.mark.parametrize("method", ["lora", "pissa", "ba_lora", "loftq"])
def test_a_resumed_run_has_the_very_weights_of_an_uninterrupted_one(train, monkeypatch, method):
    from ba_lora.training.trainer import BALoRATrainer

    whole = train(NF4, name="whole", method=method)
    real = BALoRATrainer.training_step
    steps = iter(range(1, 100))

    def stop_at_3(self, *args, **kwargs):
        if next(steps) == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BALoRATrainer, "training_step", stop_at_3)
        train(NF4, name="stopped", method=method)
    stopped = train(NF4, name="stopped", method=method)
    assert read_json(stopped / "train.json")["training"]["resumed_from"] == "checkpoint-2"
    exports = (
        "adapter/adapter_model",
        "merged/model",
        *(() if method in ("lora", "loftq") else ("lora/adapter_model",)),
    )
    for name in (f"{export}.safetensors" for export in exports):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()


def test_the_residual_of_qpissa_is_what_is_quantised(train):
    """Its 4-bit weights are those of W − B₀A₀, which the factors make W again but for the rounding of 4 bit."""
    run = train(NF4, "trainer.max_steps=1", method="pissa")
    config = load_run(run)
    base = load_model(config.model, quantize=False)
    residual = load_dequantized(config, source=str(run / "residual"))
    factors = load_file(run / "initial" / "initial_factors.safetensors")
    left = "base_model.model.model.layers.0.self_attn.q_proj"
    product = factors[f"{left}.lora_B.weight"] @ factors[f"{left}.lora_A.weight"]
    weight = base.model.layers[0].self_attn.q_proj.weight.detach()
    rounded = residual.model.layers[0].self_attn.q_proj.weight.detach()
    error = (rounded + product - weight).norm() / (weight - product).norm()
    plain = load_dequantized(config).model.layers[0].self_attn.q_proj.weight.detach()
    assert 0.01 < error < 0.15  # NF4's
    assert (rounded + product - weight).norm() < (plain - weight).norm()  # QPiSSA's claim, of its smaller residual


def test_loftq_makes_up_for_the_rounding_and_its_reference_is_what_it_starts_from(train):
    """Its factors are the best ones of W − Q, Q being the very base that is trained on; the consistency is 0 there."""
    terms = ["regularizers.lambda_consistency=0.5", "regularizers.lambda_diversity=0.1"]
    run = train(*terms, "adapter.rank=8", "adapter.alpha=16", "trainer.max_steps=2", method="loftq")
    config = load_run(run)
    weight = load_model(config.model, quantize=False).model.layers[0].self_attn.q_proj.weight.detach()
    rounded = load_dequantized(config).model.layers[0].self_attn.q_proj.weight.detach()
    factors = load_file(run / "initial" / "initial_factors.safetensors")
    left = "base_model.model.model.layers.0.self_attn.q_proj"
    product = 2 * factors[f"{left}.lora_B.weight"] @ factors[f"{left}.lora_A.weight"]
    error = weight - rounded
    best = torch.linalg.svdvals(error)[8:].square().sum().sqrt()
    assert (error - product).norm() == pytest.approx(best.item(), rel=1e-4) and best < 0.95 * error.norm()
    first, second = read_jsonl(run / "log.jsonl")[:2]
    assert first["consistency"] == pytest.approx(0, abs=1e-9) and second["consistency"] > 1e-9
    assert not (run / "residual").exists() and not (run / "lora").exists()
    assert "NF4" in (run / "adapter" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="was trained on a 4-bit base"):
        plan_serving([str(run / "adapter")])
    (served,) = plan_serving([str(run)])
    assert served.base == str(run / "merged") and weights_state(served)
    with pytest.raises(UserError, match="makes up for the rounding of its 4-bit base"):
        merge_adapter(run / "adapter", run / "elsewhere")


def test_a_resumed_loftq_run_starts_from_its_own_factors(train, monkeypatch):
    whole = train("trainer.max_steps=2", name="whole", method="loftq")
    kept = (whole / "initial" / "initial_factors.safetensors").read_bytes()
    monkeypatch.setattr("ba_lora.methods.loftq.loftq_factors", None)  # not made again
    config = load_run(whole)
    model, step_zero = build_model(config, run_path=whole, num_steps=2)
    assert (whole / "initial" / "initial_factors.safetensors").read_bytes() == kept
    assert len(four_bit_layers(model)) == len(layers_with_adapter(model)) and step_zero.difference is None


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["model.quantization=none"], "makes up for the rounding of a 4-bit base: set model.quantization=nf4"),
        (["regularizers.lambda_consistency=0.1", "reference.cache=x"], "leave reference.cache out"),
        (["adapter.factors_cache=x"], "adapter.factors_cache is PiSSA's"),
        (["adapter.dora=true"], "adapter.init=loftq needs adapter.dora=false"),
    ],
)
def test_where_loftq_cannot_work_it_is_refused(words, match):
    with pytest.raises(UserError, match=match):
        load_config("toy", method="loftq", overrides=words)
    with pytest.raises(UserError, match="adapter.init=loftq is for 4-bit language models"):
        load_config("toy", kind="nlu", method="lora", overrides=["adapter.init=loftq"])


def test_the_pretrained_model_in_4_bit_is_evaluated_as_such(tmp_path, tiny_model, train):
    import json
    import subprocess
    import sys

    from ba_lora.config.schema import to_yaml
    from ba_lora.experiments.spec import untuned_config
    from ba_lora.experiments.stages import evaluation_stages

    config = untuned_config(load_run(train(NF4, "eval.tasks=[toy]", "trainer.max_steps=1", method="lora")))
    run = tmp_path / "untuned"
    config.output_dir = str(run)
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(config))
    done = subprocess.run(
        [sys.executable, "-m", "eval.dequantize"], input=json.dumps(str(run)), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["unquantized_logit_difference"] > 1e-3
    merged = load_model(config.model, source=str(run / "merged"), quantize=False)
    four_bit = load_model(config.model)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert merged(input_ids=ids).logits.allclose(four_bit(input_ids=ids).logits, atol=1e-4)
    (generate, *_) = evaluation_stages([config])
    assert generate.call.options["model"] == [str(run)]
