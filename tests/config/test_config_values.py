"""Every value of a configuration: of its type, in its range, no path where a name is meant, and told at once."""

import ast
import dataclasses
import os
import re
import subprocess
import sys
import types
import typing

import pytest
import yaml

from ba_lora.config import schema
from ba_lora.config.checks import check_place, check_places
from ba_lora.config.layers import find_config, load_config, read_yaml
from ba_lora.config.ranges import RANGES, TRAINER_RANGES, check_range
from ba_lora.config.registries import facts, parts
from ba_lora.config.schema import GENERATION_OPTIONS, RunConfig, public, to_yaml, training_hash
from ba_lora.config.schema_nlg import NLGConfig
from ba_lora.config.schema_nlu import NLUConfig
from ba_lora.config.trainer import _RESERVED_ARGUMENTS, argument_types
from ba_lora.errors import UserError
from ba_lora.experiments.options import read_grid_options
from ba_lora.experiments.tables import load_table
from ba_lora.paths import resolve_data, resolve_path
from ba_lora.rows import load_rows
from ba_lora.training.arguments import build_arguments

TOY, TOY_NLU = "configs/nlg/toy.yaml", "configs/nlu/toy.yaml"


def toy(*overrides: str) -> RunConfig:
    return load_config(TOY, overrides=overrides)


def refused(*overrides: str, match: str, config: str = TOY, **more: str) -> None:
    with pytest.raises(UserError, match=match) as error:
        load_config(config, overrides=overrides, **more)
    assert "\n" not in str(error.value)


# ---- numbers


def numbers_of(schema: type, prefix: str = "") -> dict[str, type]:
    found = {}
    for entry in dataclasses.fields(schema):
        kinds = typing.get_args(entry.type) if isinstance(entry.type, types.UnionType) else (entry.type,)
        if dataclasses.is_dataclass(entry.type):
            found |= numbers_of(entry.type, f"{prefix}{entry.name}.")
        elif int in kinds or float in kinds:
            found[prefix + entry.name] = int if int in kinds else float
    return found


NLG, NLU = numbers_of(NLGConfig), numbers_of(NLUConfig)


def test_every_number_has_a_range() -> None:
    of_further_terms = {f"regularizers.lambda_{name}" for name in schema.EXTRA_TERMS}
    assert set(NLG) | set(NLU) == set(RANGES) | of_further_terms
    assert set(TRAINER_RANGES) <= set(argument_types())


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "1e30", "abc"])
@pytest.mark.parametrize("key", sorted(NLG | NLU))
def test_no_number_is_out_of_its_range_or_type(key: str, value: str) -> None:
    config, more = (TOY, {}) if key in NLG else (TOY_NLU, {"task": "toy_pairs"})
    refused(f"{key}={value}", config=config, match=key.replace(".", r"\."), **more)


@pytest.mark.parametrize("key", sorted(key for key, kind in NLG.items() if kind is int))
def test_a_whole_number_is_asked_for(key: str) -> None:
    refused(f"{key}=1.5", match=key)


def test_the_bounds_of_a_range() -> None:
    for value in (0, 0.5, 1):
        check_range("key", value, "[0, 1]")
    check_range("key", 0.5, "(0, 1)")
    for value, limits in (
        (0, "(0, 1]"),
        (1, "[0, 1)"),
        (2, "[0, 1]"),
        (True, "[0, 1]"),
        ("0", "[0, 1]"),
        (None, "[0, 1]"),
    ):
        with pytest.raises(UserError, match="key is"):
            check_range("key", value, limits)


@pytest.mark.parametrize("override", ["data.max_length=1000000000000", "data.toy.seed=-1", "data.sample_seed=-1"])
def test_what_was_once_accepted_is_refused(override: str) -> None:
    refused(override, match="it must be a number of at least")


def test_a_number_of_400_digits_is_one_line() -> None:
    for key in ("seed", "trainer.max_steps", "trainer.learning_rate", "trainer.length_column_name"):
        refused(f"{key}={'9' * 400}", match=key)


@pytest.mark.parametrize(
    ("config", "words", "match"),
    [
        (TOY, ["data.toy.imbalance=1"], "below 1"),
        (TOY, ["data.toy.noisy_families=[nosuch]"], "data.toy.noisy_families=nosuch is unknown"),
        (TOY, ["data.toy.families=[nosuch]", "data.toy.imbalance=0"], "data.toy.families=nosuch is unknown"),
        (TOY, ["data.toy.families=[add]"], "data.toy.families are alike, .* set it to 0"),
        (TOY_NLU, ["data.toy.imbalance=1"], "below 1"),
        (TOY_NLU, ["data.toy.noisy_labels=[maybe]"], "data.toy.noisy_labels=maybe is unknown"),
    ],
)
def test_toy_settings_that_make_no_rows_are_told_before_the_run(config: str, words: list[str], match: str) -> None:
    refused("data.toy.label_noise=0.1", *words, config=config, match=match)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("model: {name: a}\nmodel: {name: b}", "line 2: found duplicate key model"),
        ("model:\n\tname: x", "line 2: found character"),
    ],
)
def test_what_is_wrong_in_a_yaml_file_is_told_with_its_line(text: str, match: str, tmp_path) -> None:
    (tmp_path / "base.yaml").write_text(text)
    refused(config=str(tmp_path / "base.yaml"), match=match)


# ---- TrainingArguments

TYPED_WRONG = ["nan", "abc", "-1", "1.5", "[1]", "{a: 1}", "true", "1e30", "''", "null"]


def test_the_arguments_are_transformers_own() -> None:
    from transformers import TrainingArguments

    assert list(argument_types()) == [entry.name for entry in dataclasses.fields(TrainingArguments) if entry.init]


@pytest.mark.parametrize("name", sorted(set(argument_types()) - set(_RESERVED_ARGUMENTS)))
def test_any_value_of_any_argument_is_taken_or_one_line(name: str, tmp_path) -> None:
    """Whatever passes can be built; nothing ends in a traceback, and no folder is made."""
    for value in TYPED_WRONG:
        try:
            config = toy(f"trainer.{name}={value}", "trainer.use_cpu=true")
            build_arguments(config, tmp_path / "run")
        except UserError as error:
            assert "\n" not in str(error) and name in str(error) or str(error).startswith("trainer: "), value
    assert not (tmp_path / "run").exists()


def test_deepspeed_does_not_train_float32_weights_in_16_bits(tmp_path, monkeypatch):
    """It casts the weights themselves, and the export would be the float32 base's."""

    def plug_in(arguments):
        arguments.deepspeed_plugin = object()

    monkeypatch.setattr("ba_lora.training.arguments._try_optimizer", plug_in)  # the last that sees the arguments
    words = ["trainer.bf16=true"]
    with pytest.raises(UserError, match="DeepSpeed would train it in bfloat16.*set model.dtype=bfloat16, or"):
        build_arguments(load_config("toy", overrides=words), tmp_path / "run")
    build_arguments(load_config("toy", overrides=[*words, "model.dtype=bfloat16"]), tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate=nan", "must be a finite number"),
        ("learning_rate=abc", "must be a finite number"),
        ("max_steps=1.5", "must be a whole number"),
        ("max_steps=0", "max_steps is 0"),
        ("num_train_epochs=0", "num_train_epochs is 0"),
        ("num_train_epochs=-1", "num_train_epochs is -1"),
        ("deepspeed=NOFILE", "trainer.deepspeed: no such file: /.*/NOFILE"),
        ("deepspeed=README.md", "trainer.deepspeed: /.*/README.md, line 1: not valid JSON"),
        ("dataloader_num_workers=-1", "dataloader_num_workers is -1"),
        ("lr_scheduler_kwargs=5", "must be a mapping or text or null"),
        ("lr_scheduler_type=cosin", "nearest: cosine"),
        ("optim=adam", "optim=adam is unknown: choose one of adamw_torch,"),
        ("parallelism_config={tp_size: 2}", "only DDP and DeepSpeed"),
        ("use_liger_kernel=true", "use_liger_kernel=True is refused"),
        ("save_on_each_node=true", "the nodes share one folder"),
        ("ddp_static_graph=true", "its first step would not be averaged"),
        ("train_sampling_strategy=batch_rebalance", "choose random, sequential or group_by_length"),
        ("train_sampling_strategy=group_by_lenght", "choose random, sequential or group_by_length"),
        ("accelerator_config={even_batches: false}", "processes would wait for others"),
        ("hub_token=hf_secret", "use the environment's HF_TOKEN"),
        ("local_rank=1", "set by the run itself: the launcher says it; leave it out"),
        ("push_to_hub=true", "set by the run itself: use hub.push"),
        ("metric_for_best_model=accuracy", "choose one of loss, task, eval_loss, eval_task"),
        ("greater_is_better=true", "the least loss is the best; leave it out"),
        ("report_to=wandbb", "nearest: wandb"),
        ("bf16=1", "must be true or false"),
    ],
)
def test_arguments_that_are_refused(override: str, message: str) -> None:
    refused(f"trainer.{override}", match=message)


@pytest.mark.parametrize(
    ("method", "override", "message"),
    [
        ("prompt_tuning", "data.packing=true", "puts its tokens before each row: set data.packing=false"),
        ("prefix_tuning", "data.packing=true", "puts its tokens before each row: set data.packing=false"),
        ("prompt_tuning", "trainer.gradient_checkpointing=true", "does not go with trainer.gradient_checkpointing"),
        ("prefix_tuning", "trainer.gradient_checkpointing=true", "does not go with trainer.gradient_checkpointing"),
        ("eva", "adapter.options.tau=1.0", "adapter.options.tau is 1.0"),
        ("miss", "adapter.options.init_weights=bta", "init_weights=bta is unknown: choose one of True, bat, mini"),
        ("miss", "adapter.options.init_weights=false", "init_weights=False is unknown"),
        ("lora_pro", "adapter.dora=true", "needs layers W . s B A, which adapter.dora=true makes others"),
        ("lora_fa", "adapter.dora=true", "needs layers W . s B A, which adapter.dora=true makes others"),
        ("monteclora", "adapter.optimizer=lora_pro", "which adapter.tuner=monteclora makes others in training"),
        ("monteclora", "adapter.optimizer=lora_fa", "which adapter.tuner=monteclora makes others in training"),
        ("lora_pro", "trainer.optim=adamw_torch_8bit", "is built on AdamW: .* set adamw_torch"),
    ],
)
def test_what_a_method_has_no_use_for_is_refused(method: str, override: str, message: str) -> None:
    refused(override, match=message, method=method)


def test_layers_by_number_are_refused_where_peft_is_given_paths() -> None:
    layers, kinds = "adapter.options.layers_to_transform=[0]", "adapter.target_modules=[q_proj]"
    refused(layers, match="layers_to_transform has no effect here", config=TOY_NLU, method="lora")
    refused(layers, match="layers_to_transform has no effect here", method="ia3")
    for method in ("lora", "vera"):
        refused(layers, match="layers_to_transform has no effect with adapter.target_modules=all-linear", method=method)
    refused("adapter.options.layers_pattern=h", kinds, match="layers_pattern has no effect without", method="lora")
    assert load_config(TOY, method="lora", overrides=[layers, kinds]).adapter.options == {"layers_to_transform": [0]}


BAD_OPTIONS = [
    ("adalora", "tinit", ["-5"]),
    ("adalora", "tfinal", ["0.5"]),
    ("adalora", "deltaT", ["0", "1.5"]),
    ("adalora", "beta1", ["abc", "5", "0"]),
    ("adalora", "beta2", ["1", "true"]),
    ("adalora", "orth_reg_weight", ["-1"]),
    ("peanut", "scaling", ["abc", "0"]),
    ("peanut", "depth", ["1.5", "-1", "true"]),
    ("peanut", "act_fn", ["rlu", "[relu]"]),
    ("vera", "d_initial", ["abc", "nan"]),
    ("vera", "projection_prng_key", ["abc", "-1"]),
    ("vera", "exclude_modules", ["q_proj"]),
    ("loha", "rank_dropout", ["7", "1", "null"]),
    ("ia3", "exclude_modules", ["5", "'('"]),
    ("lora", "exclude_modules", ["5", "[]", "[[q_proj]]", "{q_proj: 1}", "'('"]),
    ("lora", "layers_to_transform", ["abc", "-1", "[0.5]", "true"]),
    ("lora", "layers_pattern", ["1"]),
]


@pytest.mark.parametrize(("method", "option", "value"), [(m, o, v) for m, o, values in BAD_OPTIONS for v in values])
def test_what_is_handed_to_peft_has_a_range_or_choices(method: str, option: str, value: str) -> None:
    words = [f"adapter.options.{option}={value}", *(["adapter.target_modules=[q_proj]"] if method == "lora" else [])]
    refused(*words, match=rf"adapter\.options\.{option}", method=method)


def test_the_options_that_are_handed_to_peft_are_its_own() -> None:
    import peft
    from transformers.activations import ACT2FN

    configs = {"adalora": "AdaLoraConfig", "peanut": "PeanutConfig", "vera": "VeraConfig", "loha": "LoHaConfig"}
    found = {name: facts("tuner", name)["peft_options"] for name in parts("tuner")}
    assert {name for name in found if found[name]} == configs.keys()
    for name, config in configs.items():
        default = {entry.name: entry.default for entry in dataclasses.fields(getattr(peft, config))}
        assert {option: value for option, (value, _) in found[name].items()}.items() <= default.items()
    assert set(found["peanut"]["act_fn"][1]) <= set(ACT2FN)


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_reporter_needs_its_package(name: str, monkeypatch) -> None:
    find_spec = __import__("importlib.util").util.find_spec
    for found, error in ((None, True), (object(), False)):
        monkeypatch.setattr("importlib.util.find_spec", lambda word, f=found: f if word == name else find_spec(word))
        if error:
            refused(f"trainer.report_to={name}", match=f"report_to={name} needs the package {name}")
        else:
            toy(f"trainer.report_to=[{name}]")


def test_no_is_a_word_and_not_false() -> None:
    config = toy("trainer.save_strategy=no", "trainer.logging_strategy=no", "trainer.bf16=no")
    assert (config.trainer["save_strategy"], config.trainer["logging_strategy"]) == ("no", "no")
    assert config.trainer["bf16"] is False
    assert build_arguments(config, resolve_path("outputs/none")).save_strategy == "no"


# ---- what a file may not say


def written(folder, **content: object):
    path = folder / "base.yaml"
    plain = read_yaml(resolve_path(TOY)) | content
    path.write_text(yaml.safe_dump(plain))
    return path


def test_interpolations_are_refused_everywhere(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SECRET", "hf_token")
    for content in ({"method": "lora", "name": "${oc.env:SECRET}"}, {"eval": {"tasks": ["${oc.env:SECRET}"]}}):
        refused(config=written(tmp_path, **content), match=r"\$\{…\} is not read in configs")
    refused("data.source=${oc.env:SECRET}", match=r"\$\{…\} is not read")
    table = tmp_path / "table.yaml"
    table.write_text("title: ${oc.env:SECRET}\n")
    with pytest.raises(UserError, match=r"\$\{…\} is not read"):
        load_table(table)


def test_trust_and_overwrite_count_only_when_they_are_typed(tmp_path) -> None:
    model = read_yaml(resolve_path(TOY))["model"]
    trusting = {"model": model | {"trust_remote_code": True}}
    for key, content in (("model.trust_remote_code", trusting), ("overwrite", {"overwrite": True})):
        path = written(tmp_path, **content)
        refused(config=path, match=f"{key} in {path} counts only when it is typed")
        section, _, name = key.rpartition(".")
        for word in (f"{key}=true", f"{section}={{{name}: true}}" if section else f"{key}=true"):
            assert load_config(path, overrides=[word]).run_id == load_config(TOY, overrides=["name=base"]).run_id
        saved = load_config(
            written(tmp_path, method="lora", name="toy", **content)
        )  # a run's own config, or so it says
        assert not saved.overwrite and not saved.model.trust_remote_code
    typed = toy("model.trust_remote_code=true", "overwrite=true")
    assert typed.model.trust_remote_code and typed.overwrite
    assert "trust_remote_code" not in to_yaml(typed) and "overwrite" not in to_yaml(typed)
    assert training_hash(typed) == training_hash(toy())


def test_a_field_that_came_later_is_no_part_of_the_hash_at_its_usual_value(monkeypatch) -> None:
    """Only at this one: null may mean something else."""

    def hashes():
        return {value: training_hash(toy(f"regularizers.diversity_top_k={value}")) for value in ("20", "30", "null")}

    before = hashes()
    added = schema._SINCE_ADDED.get("regularizers", {})
    monkeypatch.setitem(schema._SINCE_ADDED, "regularizers", {**added, "diversity_top_k": (20,)})
    after = hashes()
    assert {value for value in before if before[value] != after[value]} == {"20"} and len({*after.values()}) == 3


def test_a_task_of_a_base_cannot_trust_either(tmp_path) -> None:
    plain = read_yaml(resolve_path(TOY_NLU))
    plain["tasks"] = {"toy_pairs": {"model": {"trust_remote_code": True}}}
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(plain))
    refused(config=path, task="toy_pairs", match="counts only when it is typed")


@pytest.mark.parametrize("word", ["model.trust_remote_code=true", "overwrite=true", "model={trust_remote_code: true}"])
def test_a_table_cannot_trust_either(word: str, tmp_path) -> None:
    plain = read_yaml(resolve_path("configs/tables/toy.yaml")) | {"overrides": [word]}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(plain))
    with pytest.raises(UserError, match=f"{re.escape(word)} counts only when it is typed"):
        load_table(tmp_path / "table.yaml")


@pytest.mark.parametrize("key", ["name", "method"])
@pytest.mark.parametrize("value", ["/etc/cron.d/x", "../../x", "a/b", "..", ".hidden", "-x", "a\nb", "a\\b"])
def test_names_are_no_paths(key: str, value: str, tmp_path) -> None:
    path = written(tmp_path, **({"name": "toy", "method": "lora"} | {key: value}))
    refused(config=path, match="becomes part of a folder's name")


@pytest.mark.parametrize("value", ["--help", "a\nb", "-m"])
def test_a_model_is_no_option_of_a_command(value: str, tmp_path) -> None:
    refused(config=written(tmp_path, model={"name": value}), match="model.name=.* is no name")


def test_eval_options_reach_generation_by_known_names(tmp_path) -> None:
    from eval.engines.requests import GenerateOptions
    from eval.tasks import TASKS

    settings = {entry.name for entry in dataclasses.fields(GenerateOptions)}
    choices = {key for task in TASKS.values() for key in task.choices}
    assert set(GENERATION_OPTIONS) == settings - {"limit", "revision", "trust_remote_code", "overwrite"} | choices
    for key in ("trust_remote_code", "overwrite", "output", "max_new_token", "--output"):
        path = written(tmp_path, eval={"options": {key: True}})
        refused(config=path, match=f"unknown key eval.options.{key}")
    refused(config=written(tmp_path, eval={"options": {"serve": ["hot", "merged"]}}), match="a single value")


# ---- places


def test_every_place_is_tried_before_the_work(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    for key in ("output_dir", "results_dir", "reference.cache", "adapter.factors_cache"):
        with pytest.raises(UserError, match=f"{key}: {tmp_path}/file is a file, and a folder is needed"):
            check_places(toy(f"{key}={tmp_path}/file/x"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("/", str(resolve_path(".")), str(resolve_path(".").parent), "~/", str(tmp_path)):
        with pytest.raises(UserError, match="is no place for a run"):
            check_places(toy(f"output_dir={folder}"))
    with pytest.raises(UserError, match="cannot write in /proc"):
        check_place(resolve_path("/proc/nothing/here"), "output_dir")
    check_places(toy(f"output_dir={tmp_path}/a/b/run", f"results_dir={tmp_path}/c"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_relative_paths_count_from_the_users_folder_then_from_the_roots(root, tmp_path, monkeypatch) -> None:
    """In the user's folder and in a child process that works in another one."""
    (tmp_path / "mine.jsonl").write_text("{}\n")
    (tmp_path / "README.md").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BA_LORA_FOLDER", raising=False)

    def check() -> None:
        assert resolve_path("mine.jsonl") == tmp_path / "mine.jsonl"
        assert resolve_path("README.md") == tmp_path / "README.md"
        assert resolve_path("configs/nlg/toy.yaml") == root / "configs/nlg/toy.yaml"
        assert resolve_path("nothing/here") == root / "nothing/here"

    check()
    assert resolve_data("gone.jsonl") == str(root / "gone.jsonl") and resolve_data("owner/set") == "owner/set"
    with pytest.raises(UserError, match=f"no such file: {root}/gone.jsonl, nor {tmp_path}/gone.jsonl; check the path"):
        load_rows(resolve_data("gone.jsonl"))
    with pytest.raises(UserError, match=f"no such file: {tmp_path}/gone.jsonl; check the path"):
        load_rows(f"{tmp_path}/gone.jsonl")
    from ba_lora.paths import stage_environment

    monkeypatch.setenv("BA_LORA_FOLDER", stage_environment()["BA_LORA_FOLDER"])
    monkeypatch.chdir(root)
    check()


def test_the_home_of_a_user_who_is_not_there_is_no_traceback(tmp_path) -> None:
    refused("data.template=~nosuch/x.jinja", match="~nosuch/x.jinja")
    refused("reference.cache=~nosuch/x", "data.source=~nosuch/x.csv", "seed=-1", match="seed is -1")
    assert public("~nosuch/x") == "~nosuch/x"
    command = [sys.executable, "-m", "data.toy", "--split", "test", "--num-rows", "1", "--output", "~/x.jsonl"]
    subprocess.run(command, env=os.environ | {"HOME": str(tmp_path)}, check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "x.jsonl").is_file()


def test_what_is_typed_for_writing_counts_from_the_users_folder(root, tmp_path, monkeypatch) -> None:
    """The defaults are the repository's, whatever the user's folder has."""
    monkeypatch.delenv("BA_LORA_FOLDER", raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("results/runs", "outputs"):
        (tmp_path / name).mkdir(parents=True)
    plain = toy()
    assert (plain.run_path, plain.result_path.parent) == (root / "outputs" / plain.run_id, root / "results" / "runs")
    typed = toy("output_dir=outputs/mine", "results_dir=there")
    assert (typed.run_path, typed.result_path.parent) == (tmp_path / "outputs/mine", tmp_path / "there")
    with pytest.raises(UserError, match=f"output: {tmp_path}/file is a file"):
        (tmp_path / "file").write_text("")
        read_grid_options(["output=file"])


def test_a_config_is_found_by_its_name(root, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy").mkdir()
    assert find_config("toy", kind="nlg") == root / "configs/nlg/toy.yaml"
    assert find_config("toy.yaml", kind="nlu") == root / "configs/nlu/toy.yaml"
    assert load_config("toy", kind="nlg", method="lora").run_id == load_config(TOY, method="lora").run_id
    refused(config="minilm", kind="nlg", match="configs/nlu/minilm.yaml is an NLU config: use sh scripts/nlu.sh")
    refused(config="llama-2-7b", kind="nlu", match="configs/nlg/llama-2-7b.yaml is an NLG config")
    refused(config="tooy", kind="nlg", match=r"no such config: /.*tooy \(nearest: toy")


def test_cards_hold_no_folders_of_this_machine(root, tmp_path) -> None:
    config = toy(f"model.name={tmp_path}/base", f"data.source={tmp_path}/rows.jsonl", "data.name=metamathqa")
    config.eval.data["toy"] = str(root / "data/toy/test.jsonl")
    text = to_yaml(config, for_others=True)
    assert str(tmp_path) not in text and str(root) not in text
    assert "name: base" in text and "rows.jsonl" in text and "data/toy/test.jsonl" in text
    assert str(tmp_path) in to_yaml(config)
    assert public({"a": ["/x/y", "owner/model", 3, None]}) == {"a": ["y", "owner/model", 3, None]}
    told = {"../../home/me/x": "x", "toy=/home/me/x.jsonl": "toy=x.jsonl", "a=b": "a=b", "~/x": "x"}
    assert {path: public(path) for path in told} == told
    assert (public(f"{root}/data/../data/toy"), public(f"{root}/../me/x")) == ("data/toy", "x")


# ---- the command lines

MODULES = {
    "train_nlg": "python train_nlg.py",
    "train_nlu": "python train_nlu.py",
    "data.toy.pretrain": "python data/toy/pretrain.py",
    "scripts.bench": "python scripts/bench.py",
    "scripts.bench_page": "python scripts/bench_page.py",
    "scripts.bench_pissa": "python scripts/bench_pissa.py",
    "eval.harness": "sh scripts/harness.sh",
    "eval.report.__main__": "python -m eval.report",
}


def modules_with_a_main(root) -> list[str]:
    """Return the modules that `python -m` runs as a command: those that call run_entry_point."""
    files = [
        *root.glob("*.py"),
        *(file for name in ("ba_lora", "data", "eval", "scripts") for file in (root / name).rglob("*.py")),
    ]
    found = []
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if (
                isinstance(node, ast.If)
                and "__name__ == '__main__'" in ast.unparse(node.test)
                and "run_entry" in ast.unparse(node)
            ):
                found.append(".".join(file.relative_to(root).with_suffix("").parts))
    return sorted(set(found))


def test_every_command_explains_itself(root) -> None:
    """--help of every module with a main names the command, says what it is for, and costs no import of torch."""
    modules = modules_with_a_main(root)
    assert {"eval.check", "eval.generate", "ba_lora.experiments.grid", *MODULES} <= set(modules) and len(modules) >= 17
    program = (
        "import contextlib, io, json, runpy, sys\n"
        "told = {}\n"
        "for module in sys.argv[1].split(','):\n"
        "    sys.argv = [module, '--help']\n"
        "    for name in [n for n in sys.modules if n == module]: del sys.modules[name]\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        try: runpy.run_module(module, run_name='__main__', alter_sys=True); status = 'went on'\n"
        "        except SystemExit as left: status = left.code or 0\n"
        "    told[module] = [status, out.getvalue()]\n"
        "assert not {'torch', 'transformers', 'accelerate'} & set(sys.modules)\n"
        "print(json.dumps(told))\n"
    )
    heavy = [name for name in modules if name.startswith("scripts.") or name == "data.toy.pretrain"]
    light = [name for name in modules if name not in heavy]
    done = run(root, sys.executable, "-c", program, ",".join(light))
    told = yaml.safe_load(done.stdout)
    for name in heavy:
        one = run(root, sys.executable, f"{name.replace('.', '/')}.py", "--help")
        told[name] = [one.returncode, one.stdout]
    for module, (status, text) in told.items():
        command = MODULES.get(module, f"python -m {module}")
        assert status == 0 and text.startswith(f"usage: {command} "), (module, status, text[:200])
        assert len(text.splitlines()) > 5, module


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train_nlg.py", "--config", TOY, "adapter.rnk=4"], "unknown key adapter.rnk (nearest: adapter.rank"),
        (["train_nlu.py", "--config", TOY_NLU, "--task", "sst2", "lr=4"], "(nearest: trainer.learning_rate)"),
        (["-m", "ba_lora.experiments.pipeline", "toy", "trainer.max_steps=1.5"], "it must be a whole number"),
        (["-m", "ba_lora.experiments.pipeline", "minilm"], "is an NLU config"),
        (
            ["-m", "ba_lora.experiments.pipeline", "--method", "lora", "method=pissa"],
            "method=pissa beside --method lora: give one",
        ),
        (["-m", "ba_lora.experiments.pipeline_nlu", "llama-2-7b"], "is an NLG config"),
        (["-m", "ba_lora.experiments.grid", "toy", "adapter.rnk=4"], "unknown key adapter.rnk"),
        (["-m", "ba_lora.experiments.grid", "toy", "workers=1000000"], "a whole number from 1 to 1024 is needed"),
        (
            ["-m", "ba_lora.experiments.grid", "toy", "output=README.md/x"],
            "README.md is a file, and a folder is needed",
        ),
        (["-m", "eval.report", "toy", "output=README.md/x"], "README.md is a file, and a folder is needed"),
        (["-m", "eval.report", "toy", "adapter.rnk=4"], "unknown key adapter.rnk"),
        (["-m", "eval.generate", "--model", "x", "--task", "toy", "max_new_token=4"], "max_new_tokens"),
        (["-m", "eval.score", "--task", "toy", "--completions", "x", "workers=1000000"], "at most 1024"),
        (["-m", "eval.nlu", "--model", "x", "--max-rows", "0"], "at least 1 is needed"),
    ],
)
def test_a_mistake_is_told_before_torch_is_imported(words: list[str], message: str, root) -> None:
    """As the modules that are loaded at the end show; importing torch takes seconds."""
    start = (
        "import runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "try:\n"
        "    if sys.argv[0] != '-m': runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "    del sys.argv[0]\n"
        "    runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
        "finally: print(*sorted({'torch', 'transformers', 'accelerate'} & set(sys.modules)))\n"
    )
    done = run(root, sys.executable, "-c", start, *words)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "\n") and line.startswith("error: ") and message in line, line


def run(root, *words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True)
