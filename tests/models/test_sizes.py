"""ba_lora/models/sizes.py: tokens and lengths that a model has no room for are one line, before training and
generation."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTModel,
    RobertaConfig,
    RobertaModel,
)

from ba_lora.config.layers import load_config
from ba_lora.errors import UserError
from ba_lora.models.sizes import check_sizes, check_tokens, load_skeleton, position_limit
from eval.engines.open import open_engine
from eval.generate import main
from tests.support.tiny import save_tiny_model

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def save_llama(folder: Path, *, rows: int) -> Path:
    """Write a model whose embedding has `rows` rows, with the tokenizer of 259 tokens."""
    torch.manual_seed(0)
    return save_tiny_model(folder, model=LlamaForCausalLM(LlamaConfig(vocab_size=rows, **SMALL)))


def save_gpt2(folder: Path, *, positions: int) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_embd=32, n_layer=1, n_head=2, n_positions=positions, eos_token_id=2)
    return save_tiny_model(folder, model=GPT2LMHeadModel(config))


def add_token(folder: Path, text: str, *, pad: bool = False) -> Path:
    """Give a saved tokenizer one token more, as many fine-tuning scripts do, without a row for it in the model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": text} if pad else {"additional_special_tokens": [text]})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model", "limit"),
    [
        (BertModel(BertConfig(**SMALL, max_position_embeddings=40)), 40),
        (RobertaModel(RobertaConfig(**SMALL, max_position_embeddings=42)), 40),  # counts from the padding's row
        (OPTModel(OPTConfig(ffn_dim=32, word_embed_proj_dim=32, max_position_embeddings=40, **SMALL)), 40),
        (GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=40)), 40),
        (LlamaForCausalLM(LlamaConfig(max_position_embeddings=40, **SMALL)), None),
    ],
    ids=lambda value: getattr(getattr(value, "config", None), "model_type", value),
)
def test_the_limit_is_where_the_model_itself_fails(model: torch.nn.Module, limit: int | None) -> None:
    assert position_limit(model) == limit
    ids = torch.full((1, 41), 5)
    with torch.no_grad():
        model(input_ids=ids[:, :40])
        if limit is not None:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=ids)


def test_a_skeleton_has_names_and_shapes_only(tiny_model: Path) -> None:
    before = torch.get_rng_state()
    skeleton = load_skeleton(str(tiny_model))
    assert torch.equal(torch.get_rng_state(), before), "a run's numbers do not depend on the check"
    assert skeleton.get_input_embeddings().weight.shape == (259, 64)
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}


def test_a_token_that_no_text_uses_is_allowed(tmp_path: Path) -> None:
    """gemma-3-1b's tokenizer has one token for images more than the embedding has rows."""
    tokenizer = AutoTokenizer.from_pretrained(add_token(save_llama(tmp_path, rows=259), "<image>"))
    check_tokens(tokenizer, 259, "gemma", tokenizer(["two cats", ""])["input_ids"])
    with pytest.raises(UserError, match="'<image>' has id 259, but the embedding has 259 rows"):
        check_tokens(tokenizer, 259, "gemma", tokenizer(["two <image> cats"])["input_ids"])


@pytest.mark.parametrize(
    ("rows", "pad", "message"),
    [(259, "<pad2>", "padding token '<pad2>' has id 259"), (200, None, "larger than .*the embedding has 200 rows")],
)
def test_training_on_tokens_without_a_row_is_refused(train, tmp_path: Path, rows: int, pad: str | None, message: str):  # noqa: ANN001, ANN201
    model = save_llama(tmp_path / "model", rows=rows)
    if pad:
        add_token(model, pad, pad=True)
    with pytest.raises(UserError, match=message):
        train(f"model.name={model}")
    assert not (tmp_path / "run" / "initial").exists(), "told before the model's SVDs"


def test_training_rows_longer_than_the_table_are_refused(train, tmp_path: Path) -> None:  # noqa: ANN001
    model = save_gpt2(tmp_path / "model", positions=300)
    with pytest.raises(UserError, match="table of 300 positions: set data.max_length=300"):
        train(f"model.name={model}", "data.max_length=400")


def test_the_rows_of_an_evaluation_count_too(tmp_path: Path) -> None:
    model = save_gpt2(tmp_path, positions=30)
    config = load_config("configs/nlg/toy.yaml", overrides=[f"model.name={model}"])
    tokenizer = AutoTokenizer.from_pretrained(model)
    short, long = ({"input_ids": [[5] * length]} for length in (30, 31))
    check_sizes(config, tokenizer, short, None)
    with pytest.raises(UserError, match="a row has 31 tokens"):
        check_sizes(config, tokenizer, short, None, long)
    roomy = load_config("configs/nlg/toy.yaml", overrides=[f"model.name={save_llama(tmp_path / 'roomy', rows=300)}"])
    check_sizes(roomy, tokenizer, {})  # its rows, which may be a million, are not read


def test_generation_with_tokens_without_a_row_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "gsm8k.jsonl"
    data.write_text('{"question": "two cats?", "answer": "#### 2"}\n')
    model = save_llama(tmp_path / "model", rows=200)
    arguments = ["--model", str(model), "--task", "gsm8k", "--engine", "hf", "--data", str(data)]
    with pytest.raises(UserError, match="the embedding has 200 rows"):
        main([*arguments, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    padded = add_token(save_llama(tmp_path / "padded", rows=259), "<pad2>", pad=True)
    with pytest.raises(UserError, match="padding token '<pad2>'"), open_engine("hf", padded):
        pass


def test_generation_stops_at_the_end_of_the_table(tmp_path: Path) -> None:
    model = save_gpt2(tmp_path, positions=30)
    with open_engine("hf", model) as engine:
        lengths = [len(ids) for ids in engine.tokenizer(["a" * 20, "a" * 28, "a" * 40])["input_ids"]]
        found = engine.generate(["a" * 20, "a" * 28, "a" * 40], max_new_tokens=64)
    assert lengths == [21, 29, 41]
    assert found[2][0].finish_reason == "prompt_too_long"
    assert [samples[0].num_tokens <= 30 - n for samples, n in zip(found[:2], lengths[:2], strict=True)] == [True] * 2
