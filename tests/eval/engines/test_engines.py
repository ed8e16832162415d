"""eval/engines/open.py with transformers: order, limits, stops and adapters on a random tiny Llama. (vLLM:
tests/real.)"""

import json
import random
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ba_lora.errors import UserError
from eval.engines import open as engines
from eval.engines.base import Completion, EngineOptions, Sampling, cut_completion, decode_after
from eval.engines.open import open_engine

CONTEXT = 96
LETTERS = "abcdefghijklmnopqrstuvwxyz.,?#:'0123456789"


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Write a tokenizer of single letters with SentencePiece's blank (▁) and a BOS of its own."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "▁", *LETTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    fast.save_pretrained(folder)
    return fast


def save_model(folder: Path, *, seed: int = 0, context: int = CONTEXT) -> Path:
    """Write a random Llama whose greedy texts wander (wide weights), with its tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(save_tokenizer(folder)),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.25,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, *, seed: int, init: object = False, rank: int = 4) -> Path:
    """Write a LoRA adapter on `base` that changes its output (init False: B is random, too)."""
    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=rank, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=init),
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    generator = random.Random(0)
    return ["".join(generator.choices(LETTERS + "  ", k=generator.randint(3, 40))) + "x" for _ in range(11)]


def texts(results: list[list[Completion]]) -> list[str]:
    return [samples[0].text for samples in results]


def test_batches_answer_as_single_prompts_and_as_plain_generate(base: Path, prompts: list[str]) -> None:
    with open_engine("hf", base, options=EngineOptions(batch_size=4)) as engine:
        together = engine.generate(prompts, max_new_tokens=20)
        single = [engine.generate([prompt], max_new_tokens=20)[0] for prompt in prompts]
        tokenizer = engine.tokenizer
    assert together == single
    assert len(set(texts(together))) > 5, "the texts must differ, or their order is not tested"

    model = AutoModelForCausalLM.from_pretrained(base)
    for prompt, samples in zip(prompts, together, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        stock = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)[0]
        whole = tokenizer.decode(stock, skip_special_tokens=True)
        assert whole == tokenizer.decode(ids[0], skip_special_tokens=True) + samples[0].text


def test_stop_string_ends_the_text_early_and_stays_out_of_it(base: Path, prompts: list[str]) -> None:
    with open_engine("hf", base) as engine:
        free = engine.generate(prompts, max_new_tokens=24)
        stop = free[0][0].text[6:9]
        stopped = engine.generate(prompts, max_new_tokens=24, stop=(stop, "never there"))
    assert len(stop) == 3
    for (before,), (after,) in zip(free, stopped, strict=True):
        if stop in before.text:
            assert after.text == before.text[: before.text.index(stop)]
            assert after.finish_reason == "stop"
            # one letter, one token; special tokens, which a random model writes too, are not in the text
            assert len(after.text) + len(stop) <= after.num_tokens < before.num_tokens
        else:
            assert after == before
    assert stopped[0][0].finish_reason == "stop"


def test_any_end_token_of_generation_config_ends_the_text(tmp_path: Path, base: Path, prompts: list[str]) -> None:
    with open_engine("hf", base) as engine:
        free = engine.generate(prompts, max_new_tokens=24)
        letter = free[0][0].text[10]
        token = engine.tokenizer.convert_tokens_to_ids(letter)
    folder = save_model(tmp_path / "model")
    defaults = {"eos_token_id": [2, token], "do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    with open_engine("hf", folder) as engine:
        assert engine.ends == [2, token]
        ended = engine.generate(prompts, max_new_tokens=24)
    for (before,), (after,) in zip(free, ended, strict=True):  # equal up to the end: the sampling defaults are not used
        assert after.text == before.text.split(letter)[0]
        assert after.finish_reason == ("stop" if letter in before.text else before.finish_reason)


@pytest.mark.parametrize("may_idle", [True, False])
def test_long_prompts_are_counted_and_new_tokens_clamped(base: Path, may_idle: bool) -> None:
    lengths = [10, CONTEXT - 1, CONTEXT - 2, CONTEXT, 3 * CONTEXT, 60, 80]  # with BOS and ▁
    prompts = ["a" * (length - 2) for length in lengths]
    with open_engine("hf", base) as engine:
        assert engine._may_idle
        engine._may_idle = may_idle
        results = engine.generate(prompts, max_new_tokens=40)
        alone = [engine.generate([prompt], max_new_tokens=40)[0] for prompt in prompts]
    assert results == alone
    assert [samples[0].num_tokens for samples in results] == [40, 1, 2, 0, 0, 36, 16]
    assert [samples[0].clamped for samples in results] == [False, True, True, False, False, True, True]
    assert [samples[0].finish_reason for samples in results] == [
        "length", "length", "length", "prompt_too_long", "prompt_too_long", "length", "length",
    ]  # fmt: skip
    with open_engine("hf", base, options=EngineOptions(max_model_len=50)) as engine:
        assert engine.generate([prompts[5]], max_new_tokens=4)[0][0].finish_reason == "prompt_too_long"


def test_hot_adapters_answer_as_merged_models(tmp_path: Path, base: Path, prompts: list[str]) -> None:
    adapters = {name: save_adapter(tmp_path / name, base, seed=seed) for seed, name in enumerate(["one", "two"])}
    with open_engine("hf", base, adapters=adapters) as engine:
        hot = {name: texts(engine.generate(prompts, adapter=name, max_new_tokens=12)) for name in ["two", "one", "two"]}
        bare = texts(engine.generate(prompts, max_new_tokens=12))
        with pytest.raises(UserError, match="unknown adapter 'three'.*one, two"):
            engine.generate(prompts, adapter="three", max_new_tokens=12)
    with open_engine("hf", base) as engine:
        assert bare == texts(engine.generate(prompts, max_new_tokens=12))
    assert hot["one"] != bare and hot["two"] != bare and hot["one"] != hot["two"]
    for name, folder in adapters.items():
        merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).merge_and_unload()
        target = tmp_path / f"merged_{name}"
        merged.save_pretrained(target)
        save_tokenizer(target)
        with open_engine("hf", target) as engine:
            assert texts(engine.generate(prompts, max_new_tokens=12)) == hot[name]


def test_out_of_memory_halves_the_batch(
    base: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with open_engine("hf", base) as engine:
        expected = engine.generate(prompts, max_new_tokens=8)
        generate, sizes, largest = engine._model.generate, [], 2

        def limited(*, input_ids: torch.Tensor, **settings: object) -> torch.Tensor:
            sizes.append(len(input_ids))
            if len(input_ids) > largest:
                raise torch.OutOfMemoryError("no memory")
            return generate(input_ids=input_ids, **settings)

        monkeypatch.setattr(engine._model, "generate", limited)
        assert engine.generate(prompts, max_new_tokens=8) == expected
        assert sizes[:3] == [11, 5, 2] and set(sizes[2:]) == {2, 1}
        assert "out of memory: going on with batch_size=2" in capsys.readouterr().err
        largest = 0
        with pytest.raises(UserError, match="out of memory with one text"):
            engine.generate(prompts, max_new_tokens=8)


def test_samples_follow_the_seed_and_greedy_samples_are_refused(base: Path, prompts: list[str]) -> None:
    with open_engine("hf", base) as engine:
        draw = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.95, "num_samples": 3}
        first = engine.generate(prompts[:3], seed=1, **draw)
        assert first == engine.generate(prompts[:3], seed=1, **draw)
        assert first != engine.generate(prompts[:3], seed=2, **draw)
        assert all(len(samples) == 3 and len({sample.text for sample in samples}) > 1 for samples in first)
        with pytest.raises(UserError, match="temperature above 0"):
            engine.generate(prompts, max_new_tokens=4, num_samples=2)
        assert engine.generate([], max_new_tokens=4) == []


@pytest.mark.parametrize("settings", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"num_samples": 0}])
def test_impossible_sampling_is_refused(settings: dict) -> None:
    with pytest.raises(UserError):
        Sampling(max_new_tokens=4, **settings)
    with pytest.raises(UserError):
        Sampling(max_new_tokens=0)


def test_finish_by_hand(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    prompt, answer = tokenizer("say:")["input_ids"], tokenizer.convert_tokens_to_ids(list("▁a.#b"))
    assert decode_after(tokenizer, prompt, answer) == " a.#b"  # decoded alone it would lose the blank
    whole = cut_completion(tokenizer, prompt, answer, stop=(), ends=[2], clamped=False)
    assert (whole.text, whole.finish_reason, whole.num_tokens) == (" a.#b", "length", 5)
    ended = cut_completion(tokenizer, prompt, [*answer, 2, *answer], stop=("##",), ends=[2], clamped=True)
    assert (ended.text, ended.finish_reason, ended.num_tokens, ended.clamped) == (" a.#b", "stop", 6, True)
    cut = cut_completion(tokenizer, prompt, answer, stop=("b", ".#"), ends=[2], clamped=False)
    assert (cut.text, cut.finish_reason) == (" a", "stop")


def test_adapters_of_a_changed_base_are_refused(tmp_path: Path, base: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", base, seed=0, init="pissa")
    with (
        pytest.raises(UserError, match="init_lora_weights=pissa.*lora"),
        open_engine("hf", base, adapters={"a": folder}),
    ):
        pass


def test_engine_choice(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    name = str(base)  # in float32
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: name)
    for cuda, dtype, chosen in (
        (False, "auto", "hf"),
        (False, "bfloat16", "hf"),
        (True, "auto", "hf"),
        (True, "float32", "hf"),
        (True, "bfloat16", "vllm"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        assert engines.choose_engine("auto", name, EngineOptions(dtype=dtype)) == chosen, (cuda, dtype)
    assert engines.choose_engine("vllm", name) == "vllm"
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    assert engines.choose_engine("auto", name, EngineOptions(dtype="bfloat16")) == "hf"
    assert engines.choose_engine("hf", name) == "hf"
    with pytest.raises(UserError, match="setup.sh"):
        engines.choose_engine("vllm", name)
    with pytest.raises(UserError, match="auto, vllm, hf"):
        engines.choose_engine("tgi", name)


def test_on_a_gpu_vllm_is_not_started_on_adapters_in_float32(
    monkeypatch: pytest.MonkeyPatch, base: Path, tmp_path: Path
) -> None:
    from eval.engines.vllm import VLLMEngine

    adapter = save_adapter(tmp_path / "adapter", base, seed=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="serves adapters in 16 bits only, .* serve=merged"):
        VLLMEngine(str(base), {"a": str(adapter)}, EngineOptions())


def test_only_engines_imports_vllm(root: Path) -> None:
    files = [path for part in ("ba_lora", "data", "eval", "scripts") for path in (root / part).rglob("*.py")]
    files += root.glob("*.py")
    assert len(files) > 10
    found = [p.name for p in files if any(s in p.read_text() for s in ("import vllm", "from vllm"))]
    assert found == ["vllm.py"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no/such/folder", "no such model folder"),
        ("/no/such", "no such model folder"),
        ("nobody/nothing", "not found on the hub"),
        ("FILE", "is a file"),
        ("FOLDER", "config.json is missing"),
    ],
)
def test_missing_models_give_one_line(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").touch()
    name = {"FILE": str(tmp_path / "file"), "FOLDER": str(tmp_path)}.get(name, name)
    with pytest.raises(UserError, match=message) as error, open_engine("hf", name):
        pass
    assert "\n" not in str(error.value)
