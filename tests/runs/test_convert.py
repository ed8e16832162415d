"""convert, merge and compare, on adapters that PEFT has trained elsewhere and on a run's."""

import json
import shutil
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ba_lora.errors import UserError
from ba_lora.runs import convert


@pytest.fixture
def peft_adapter(tiny_model, tmp_path):
    """An adapter as PEFT's user has it: trained (by a push), saved plainly, with what it was before in initial_own."""

    def make(init):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        base.config._name_or_path = str(tiny_model)
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights=init))
        model.save_pretrained(tmp_path / "before")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter += 0.02 * torch.randn_like(parameter)
        model.peft_config["default"].init_lora_weights = init
        model.save_pretrained(tmp_path / "adapter")
        settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        settings |= {"base_model_name_or_path": str(tiny_model), "init_lora_weights": init}
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
        merged = model.merge_and_unload()
        merged.save_pretrained(tmp_path / "wanted")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_model / name, tmp_path / "wanted")
        return tmp_path / "adapter"

    return make


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, words)])
    return convert.main()


@pytest.mark.parametrize(
    ("init", "initial"),
    [("pissa", False), *(pytest.param(init, True, marks=pytest.mark.slow) for init in ("pissa", "pissa_niter_4"))],
)
def test_pissa_trained_elsewhere_becomes_a_plain_lora_and_a_model(
    peft_adapter, tmp_path, monkeypatch, capsys, init, initial
):
    adapter = peft_adapter(init)
    more = ["--initial", tmp_path / "before"] if initial else []
    assert run(monkeypatch, "convert", adapter, "--output", tmp_path / "lora", *more) == 0
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert settings["r"] == 8 and settings["init_lora_weights"] is True
    assert run(monkeypatch, "compare", tmp_path / "wanted", tmp_path / "lora") == 0
    if init == "pissa" and not initial:
        assert run(monkeypatch, "compare", tmp_path / "wanted", adapter) == 0, "PEFT takes it from the base again"
    assert run(monkeypatch, "merge", tmp_path / "lora", "--output", tmp_path / "merged") == 0
    assert run(monkeypatch, "compare", tmp_path / "wanted", tmp_path / "merged", "--tolerance", "1e-4") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["max_difference"] < 1e-4 and found["same_token"] == 1 and found["positions"] > 20
    assert run(monkeypatch, "compare", tmp_path / "wanted", settings["base_model_name_or_path"]) == 1, "it has learned"


def test_what_cannot_be_done_is_told(peft_adapter, tmp_path, tiny_model, monkeypatch):
    adapter = peft_adapter("pissa_niter_4")
    for words, message in (
        (("convert", adapter, "--output", tmp_path / "x"), "first factors of pissa_niter_4 are random .* --initial"),
        (("merge", adapter, "--output", tmp_path / "x"), "belongs to a changed base"),
        (("convert", tmp_path / "before", "--output", adapter), "is not empty: name a new folder"),
        (("convert", adapter, "--output", tiny_model / "config.json"), "config.json is a file: name a new folder"),
        (("compare", tiny_model, adapter), "a base that pissa_niter_4 changed, which cannot be made again: .* convert"),
        (("compare", adapter / "README.md", tiny_model), "README.md"),
        (("convert", tiny_model, "--output", tmp_path / "x"), "holds no adapter"),
        (("merge", tmp_path / "before"), "--output"),
    ):
        with pytest.raises(UserError, match=message) as error:
            run(monkeypatch, *words)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "x").exists()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    for init in ("lora_ga", "milora"):
        (adapter / "adapter_config.json").write_text(json.dumps(settings | {"init_lora_weights": init}))
        with pytest.raises(UserError, match=f"first factors of {init} are random"):
            run(monkeypatch, "convert", adapter, "--output", tmp_path / "x")
        with pytest.raises(UserError, match="belongs to a changed base"):
            run(monkeypatch, "merge", adapter, "--output", tmp_path / "x")
        with pytest.raises(UserError, match=f"a base that {init} changed"):
            run(monkeypatch, "compare", adapter, tiny_model)
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"init_lora_weights": True}))
    with pytest.raises(UserError, match="it is a plain LoRA already"):
        run(monkeypatch, "convert", adapter, "--output", tmp_path / "x")


def test_the_base_and_its_tokenizer_are_read_at_the_adapters_revision(peft_adapter, tmp_path, tiny_model, monkeypatch):
    adapter = peft_adapter(True)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings |= {"base_model_name_or_path": "owner/base", "revision": "v2"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    asked = []
    for kind in (AutoModelForCausalLM, AutoTokenizer):

        def read(source, *, revision=None, read=kind.from_pretrained, **more):
            asked.append((source, revision))
            return read(tiny_model if source == "owner/base" else source, **more)

        monkeypatch.setattr(kind, "from_pretrained", read)
    assert run(monkeypatch, "compare", tmp_path / "wanted", adapter) == 0
    assert run(monkeypatch, "merge", adapter, "--output", tmp_path / "merged") == 0
    assert [pair for pair in asked if pair[0] == "owner/base"] == [("owner/base", "v2")] * 4
    wide = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model, intermediate_size=40))
    wide.save_pretrained(tmp_path / "wide")
    settings |= {"base_model_name_or_path": str(tmp_path / "wide"), "revision": None}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="does not fit the base .*wide"):
        run(monkeypatch, "compare", tmp_path / "wanted", adapter)


@pytest.mark.parametrize(("difference", "status"), [(0.0, 0), (1.0, 1), (float("nan"), 1)])
def test_compare_fails_above_the_tolerance_and_where_a_logit_is_no_number(monkeypatch, difference, status):
    monkeypatch.setattr(convert, "compare_models", lambda *models, texts: {"max_difference": difference})
    assert run(monkeypatch, "compare", "a", "b") == status
