"""The real vLLM against transformers: the same greedy completions, limits, stops and adapters. One engine start.

vLLM lives in a process of its own (this file run as a script), which is ended with all its children.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 540


def model_and_questions(real_data: Path | None) -> tuple[Path, list[str]]:
    """Return the pre-trained toy model where it is, else the tiny real Llama, and real questions for it."""
    toy = ROOT / "data" / "toy" / "clean"
    questions = []
    test = ROOT / "data" / "toy" / "test.jsonl"
    if test.is_file():
        questions += [json.loads(line)["query"] for line in test.read_text().splitlines()[:10]]
    if real_data is not None:
        lines = (real_data / "gsm8k" / "test.jsonl").read_text().splitlines()[:10]
        questions += [json.loads(line)["question"] for line in lines]
    if (toy / "config.json").is_file():
        return toy, questions
    if real_data is None:
        pytest.skip("neither data/toy/clean nor BA_LORA_REAL_DATA is there")
    return real_data / "tiny_lm" / "stories260k_hd32", questions


def probe(folder: Path) -> None:
    """Answer `folder`/request.json with both engines; write `folder`/answer.json: variant → engine → completions.

    request: model, prompts, long_prompts, max_model_len, and where they are not float32 with an adapter, dtype and hot.
    """
    import dataclasses

    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from eval.engines.base import EngineOptions
    from eval.engines.open import open_engine

    request = json.loads((folder / "request.json").read_text())
    base, prompts = request["model"], request["prompts"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    spec = LoraConfig(r=6, lora_alpha=3, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, spec).save_pretrained(folder / "adapter")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload().save_pretrained(folder / "merged")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "merged")

    dtype, is_hot = request.get("dtype", "float32"), request.get("hot", True)
    options, answer = EngineOptions(max_model_len=request["max_model_len"], dtype=dtype), {}
    adapters = {"one": folder / "adapter"} if is_hot else {}
    with open_engine("hf", folder / "merged", options=options) as engine:
        answer["merged"] = engine.generate(prompts, max_new_tokens=40)
    for kind in ("hf", "vllm"):
        with open_engine(kind, base, adapters=adapters, options=options) as engine:
            free = engine.generate(prompts, max_new_tokens=40)
            stop = next(samples[0].text[9:12] for samples in free if len(samples[0].text) > 12)
            answer[kind] = {
                "free": free,
                "stop": engine.generate(prompts, max_new_tokens=40, stop=(stop, "never there")),
                "clamped": engine.generate(request["long_prompts"], max_new_tokens=10_000),
                "adapter": engine.generate(prompts, adapter="one", max_new_tokens=40) if is_hot else [],
                "sampled": engine.generate(prompts[:2], max_new_tokens=8, temperature=1.0, num_samples=3, seed=5),
            }
            answer[f"{kind}_again"] = engine.generate(
                prompts[:2], max_new_tokens=8, temperature=1.0, num_samples=3, seed=5
            )
            answer[f"{kind}_startup_seconds"] = engine.startup_seconds
    (folder / "answer.json").write_text(json.dumps(answer, default=dataclasses.asdict))


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> dict:
    pytest.importorskip("vllm", reason="vLLM is not installed (BA_LORA_NO_VLLM=1, or no build for this machine)")
    real = Path(os.environ.get("BA_LORA_REAL_DATA", ROOT.parent / "shared" / "data"))
    model, questions = model_and_questions(real if real.is_dir() else None)
    from ba_lora.prompts import build_prompt
    from eval.engines.base import context_length, encode_prompts, load_base_config, load_base_tokenizer

    prompts = [build_prompt(question) for question in questions] + ["Once upon a time", "Tom has 3 red balls."]
    lengths = [len(ids) for ids in encode_prompts(load_base_tokenizer(str(model)), prompts)]
    # A short context, so that texts reach its end quickly; the longest prompts do not fit into it.
    context = min(context_length(load_base_config(str(model))), max(lengths))
    prompts.append("word " * context)
    by_length = [prompt for _, prompt in sorted(zip(lengths, prompts, strict=False))]

    folder = tmp_path_factory.mktemp("vllm")
    request = {"model": str(model), "prompts": prompts, "max_model_len": context}
    request["long_prompts"] = [*by_length[-6:], prompts[-1]]
    (folder / "request.json").write_text(json.dumps(request))
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environ,
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=TIMEOUT_S)
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # whatever of the engine is left
            except ProcessLookupError:
                pass
            process.wait()
    assert status == 0, (folder / "log").read_text()[-4000:]
    return json.loads((folder / "answer.json").read_text()) | request


pytestmark = pytest.mark.real


@pytest.mark.parametrize("variant", ["free", "stop", "clamped", "adapter"])
def test_greedy_completions_are_those_of_transformers(answer: dict, variant: str) -> None:
    ours, theirs = answer["vllm"][variant], answer["hf"][variant]
    assert len(ours) == len(answer["long_prompts" if variant == "clamped" else "prompts"]) >= 7
    different = [index for index, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]]
    assert not different, [(ours[index], theirs[index]) for index in different[:3]]


def test_the_variants_are_what_they_are_meant_to_be(answer: dict) -> None:
    hf = {name: [samples[0] for samples in answer["hf"][name]] for name in ("free", "stop", "clamped", "adapter")}
    assert len({sample["text"] for sample in hf["free"]}) > 5
    assert any(sample["finish_reason"] == "stop" for sample in hf["stop"])
    assert any(sample["clamped"] and sample["num_tokens"] > 0 for sample in hf["clamped"])
    for samples in hf.values():
        assert samples[-1]["finish_reason"] == "prompt_too_long" and samples[-1]["text"] == ""
    assert [s["text"] for s in hf["adapter"]] != [s["text"] for s in hf["free"]]


def test_a_hot_adapter_answers_as_the_merged_model(answer: dict) -> None:
    assert answer["vllm"]["adapter"] == answer["merged"]


def test_samples_follow_the_seed(answer: dict) -> None:
    assert answer["vllm_again"] == answer["vllm"]["sampled"]
    assert all(len({sample["text"] for sample in samples}) > 1 for samples in answer["vllm"]["sampled"])


if __name__ == "__main__":
    probe(Path(sys.argv[1]))
