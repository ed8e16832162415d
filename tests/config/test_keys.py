"""Every key that a configuration may have changes what a run does, or is refused with the reason.

`NLG` and `NLU` have an entry for each key: another value for it, and what that value is seen to change. A new key
without an entry fails.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from accelerate import Accelerator

from ba_lora.config.layers import METHODS_PATH, SCHEMAS, available_methods, config_of_result, load_config
from ba_lora.config.registries import facts, tuners
from ba_lora.config.schema import BALoRAConfig, RunConfig, to_yaml, training_hash
from ba_lora.config.trainer import _RESERVED_ARGUMENTS, _UNSAFE_ARGUMENTS, argument_types
from ba_lora.errors import UserError
from ba_lora.experiments import pipeline
from ba_lora.io import write_jsonl_atomic
from ba_lora.methods.build import build_model
from ba_lora.models.pretrained import load_base
from ba_lora.models.tokenizer import load_tokenizer
from ba_lora.objective.gradient_shares import GradientShares
from ba_lora.objective.kl_control import KLController
from ba_lora.objective.losses.plain import TermSums
from ba_lora.objective.objective import TokenObjective
from ba_lora.objective.objective_nlu import ClassifierObjective
from ba_lora.objective.reference_cache.features import cached_features
from ba_lora.objective.reference_cache.fill import cached_reference
from ba_lora.objective.schedules import scheduled_weight
from ba_lora.objective.terms_nlu import classifier_terms
from ba_lora.runs import export
from ba_lora.runs.folder import claimed_folder
from ba_lora.runs.parity import compare_logits
from ba_lora.training.arguments import build_arguments, early_stopping
from ba_lora.training.epochs import EpochEvaluation
from ba_lora.training.packing import build_collator
from ba_lora.training.trainer import BALoRATrainer
from data.nlg import load_training_data
from data.nlu import load_nlu_data
from tests.support.tiny import collate, tiny_peft, tiny_rows
from tests.support.tiny_nlu import save_tiny_encoder, tiny_overrides, tiny_pairs, write_sst2


class Reached(BaseException):
    """Ends a function at a call that is only to be seen."""


def arguments_of(function: str, run: Callable[[], Any]) -> str:
    """Return what `run` calls the function with, and gets no further."""
    with mock.patch(function, side_effect=Reached) as called, contextlib.suppress(Reached):
        run()
    return repr(called.call_args)


def outcome(run: Callable[[], Any]) -> Any:
    """Return what comes of it, or the error that it ends with."""
    try:
        return run()
    except UserError as error:
        return str(error)


# ---- what is seen: functions of (config, an empty folder)


def loading(config: RunConfig, folder: Path) -> Any:
    """How the pre-trained model is loaded."""
    loader = "AutoModelForCausalLM" if config.kind == "nlg" else "AutoModelForSequenceClassification"
    return outcome(lambda: arguments_of(f"transformers.{loader}.from_pretrained", lambda: load_base(config)))


def hub_loading(config: RunConfig, folder: Path) -> Any:
    """How the model's settings are asked for, which NLU does before it loads the model."""
    if config.kind == "nlg":
        return loading(config, folder)
    return arguments_of("transformers.AutoConfig.from_pretrained", lambda: load_base(config))


def built(config: RunConfig, folder: Path) -> dict[str, Any]:
    """The model that is trained: its weights, what of them is trained, its adapter's settings."""
    model, _ = build_model(config, run_path=folder, num_steps=100)
    found: dict[str, Any] = {
        name: (tuple(p.shape), str(p.dtype), p.requires_grad, round(p.double().abs().sum().item(), 6))
        for name, p in model.named_parameters()
    }
    settings = model.peft_config["default"].to_dict() if hasattr(model, "peft_config") else {}
    return found | {"settings": json.dumps(settings, default=sorted, sort_keys=True)}


def built_optimizer(config: RunConfig, folder: Path) -> list[Any]:
    """The learning rates of A and B."""
    model, _ = build_model(config, run_path=folder, num_steps=100)
    trainer = BALoRATrainer(
        model, build_arguments(config, folder), regularizers=BALoRAConfig(0, 0, 0), train_dataset=tiny_rows(2)
    )
    return sorted({group["lr"] for group in trainer.create_optimizer().param_groups})


def files_of(key: str) -> Callable[[RunConfig, Path], Any]:
    """What building the model leaves in the folder that a key names."""

    def files(config: RunConfig, folder: Path) -> list[str]:
        build_model(config, run_path=folder / "run", num_steps=100)
        place = config.adapter.factors_cache
        return sorted(file.name for file in Path(place).rglob("*")) if place else []

    assert key == "adapter.factors_cache"
    return files


def lambdas(objective: Any, step: int) -> dict[str, float]:
    return {t.name: scheduled_weight(t.schedule, t.weight, step=step, num_steps=10) for t in objective.terms}


def nlg_loss(config: RunConfig, folder: Path) -> list[Any]:
    """The loss and each term of a tuned model at the start, in the middle and at the end of a run, and its path."""
    model = tiny_peft(True)
    objective = TokenObjective(model, config.regularizers, loss=config.loss)
    objective.attach(Accelerator(cpu=True))
    disturb(model)
    batch = collate(tiny_rows(4).to_list())
    batch.pop("row")
    found: list[Any] = []
    for step in (0, 5, 9):
        total, sums = objective.loss(model, batch, lambdas(objective, step))
        found += [round(total.item(), 6), {name: round(float(value.weighted), 6) for name, value in sums.items()}]
    return [*found, objective.report()]


def disturb(model: torch.nn.Module, scale: float = 0.05) -> None:
    """Move every trained weight, as training would."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))


def nlu_loss(config: RunConfig, folder: Path) -> list[Any]:
    model, _ = build_model(config, run_path=folder, num_steps=100)
    rows = tiny_pairs(Path(config.model.name), 12)
    objective = ClassifierObjective(model, config.regularizers, micro_batch=12)
    objective.attach(Accelerator(cpu=True))
    tokenizer = load_tokenizer(config.model, generates=False)

    def pad(some: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return dict(tokenizer.pad(some, return_tensors="pt"))

    objective.prepare(model, rows, pad, batch_size=12)
    disturb(model, 0.5)
    model.eval()
    batch = pad(rows.to_list())
    found: list[Any] = []
    for step in (0, 5, 9):
        total, sums = objective.loss(model, batch, lambdas(objective, step))
        found += [round(total.item(), 5), {name: round(float(value.weighted), 5) for name, value in sums.items()}]
    return found


def gradient_shares(config: RunConfig, folder: Path) -> list[Any]:
    """When the terms' gradients are measured, and the weights that follow where each is as large as the task's."""
    if config.kind == "nlg":
        terms = TokenObjective(tiny_peft(True), config.regularizers).terms
    else:
        terms = list(classifier_terms(config.regularizers, num_labels=3))
    shares = GradientShares(terms, config.regularizers)
    shares.add({name: torch.tensor(1.0) for name in shares.names})
    shares.close(lambda norms: norms, dict.fromkeys(shares.names, 1.0))
    return [[step for step in range(30) if shares.due(step)], shares.weights]


def controlled_lambda(config: RunConfig, folder: Path) -> dict[str, float]:
    """λ after a step with a KL of 0.11."""
    if config.kind == "nlg":
        terms = TokenObjective(tiny_peft(True), config.regularizers).terms
    else:
        terms = list(classifier_terms(config.regularizers, num_labels=3))
    controller = KLController(terms, config.regularizers)
    value = torch.tensor(0.11 * config.regularizers.temperature**2)
    controller.add({"consistency": TermSums(value, value)}, 1)
    controller.close(lambda sums: sums)
    return controller.weights


def reference_files(config: RunConfig, folder: Path) -> list[Any]:
    """What the cache of the reference holds."""
    if not config.uses_reference_cache:
        return []
    if config.kind == "nlu":
        data = load_nlu_data(config, load_tokenizer(config.model, generates=False))
        return [str(cached_features(config, data.train).path.parent)]
    tokenizer = load_tokenizer(config.model)
    data = load_training_data(config.data, tokenizer)
    cached_reference(config, data.dataset, data.report, tokenizer)
    return sorted((file.name, file.stat().st_size) for file in Path(config.reference.cache).rglob("*.safetensors"))


def rows(config: RunConfig, folder: Path) -> Any:
    """The rows that are trained on, those kept out, and those of the dev sets."""
    if config.kind == "nlg":
        data = load_training_data(config.data, load_tokenizer(config.model))
        dev = {}
        train = data.dataset
    else:
        data = load_nlu_data(config, load_tokenizer(config.model, generates=False))
        dev, train = {name: set_["input_ids"][:] for name, set_ in data.dev.items()}, data.train
    held = None if data.heldout is None else data.heldout["input_ids"][:]
    return [train["input_ids"][:], train["labels"][:], held, dev]


def row_loading(config: RunConfig, folder: Path) -> str:
    """How the rows are asked for."""
    if config.kind == "nlg":
        return arguments_of("data.nlg.stream_rows", lambda: rows(config, folder))
    return arguments_of("data.nlu.stream_rows", lambda: rows(config, folder))


def collator(config: RunConfig, folder: Path) -> str:
    return type(build_collator(load_tokenizer(config.model), packing=config.data.packing)).__name__


def arguments(config: RunConfig, folder: Path) -> dict[str, Any]:
    return {
        name: repr(value) for name, value in vars(build_arguments(config, folder)).items() if not name.startswith("_")
    }


def stopping(config: RunConfig, folder: Path) -> list[Any]:
    return [vars(callback) for callback in early_stopping(config)]


def exports(config: RunConfig, folder: Path) -> set[str]:
    """The exports that are written."""
    logits = torch.zeros(2, 3)
    fakes = {"probe_logits": logits, "_with_adapter": mock.DEFAULT, "_load_merged": mock.DEFAULT, "merge": None}
    with contextlib.ExitStack() as stack:
        for name, value in fakes.items():
            stack.enter_context(mock.patch.object(export, name, return_value=value))
        write_rank = stack.enter_context(mock.patch.object(export, "write_rank"))
        exported = set(export.export_run(config, folder, {}, logits))
        return exported | {str(call.args[1]) for call in write_rank.mock_calls}


def parity(config: RunConfig, folder: Path) -> Any:
    """Whether an export that is half a logit off is accepted."""
    (folder / "merged").mkdir()
    exported, trained = torch.full((2, 3), 0.5), torch.zeros(2, 3)
    return outcome(lambda: str(compare_logits("merged", exported, trained, None, config, folder)))


def commands(config: RunConfig, folder: Path) -> list[list[str]]:
    """The commands of the evaluation."""
    stages = [stage.call.command for stage in pipeline.evaluation_stages([config])]
    return [[word.replace(str(config.run_path), "RUN") for word in command] for command in stages]


def pushing(config: RunConfig, folder: Path) -> str:
    return arguments_of("huggingface_hub.HfApi.create_repo", lambda: export.push_to_hub(folder, config))


def whole_run(config: RunConfig, folder: Path) -> list[str]:
    """What is evaluated, and pushed, after the training."""
    done: list[str] = []
    fakes = {
        "train_run": lambda spec: None,
        "check_evaluation": lambda stages: None,
        "working_on": lambda config: contextlib.nullcontext(),
        "evaluate_run": lambda config: done.append(config.method) or {},
        "labelled": lambda results: results,
    }
    with contextlib.ExitStack() as stack:
        for name, value in fakes.items():
            stack.enter_context(mock.patch.object(pipeline, name, value))
        stack.enter_context(
            mock.patch("ba_lora.runs.export.push_to_hub", lambda *_: done.append("pushed") or "address")
        )
        pipeline.run_specs([pipeline.Spec(config, "toy", None)], table=lambda results: "", dry_run=False)
    return done


def places(config: RunConfig, folder: Path) -> tuple[Path, Path]:
    return config.run_path, config.result_path


def run_name(config: RunConfig, folder: Path) -> str:
    return config.run_path.name.removesuffix(training_hash(config))


def what_is_left(config: RunConfig, folder: Path) -> list[str]:
    """What of an earlier run is there after this one has taken its folder."""
    config = dataclasses.replace(config, output_dir=str(folder / "run"), results_dir=str(folder / "results"))
    with claimed_folder(dataclasses.replace(config, overwrite=False)):
        (config.run_path / "log.jsonl").write_text("{}\n")
    with claimed_folder(config):
        return sorted(file.name for file in config.run_path.iterdir())


def features(config: RunConfig, folder: Path) -> list[int]:
    """How many rows' features are saved before training."""
    trainer = mock.Mock()
    trainer.is_world_process_zero.return_value = True
    dev = {"toy_pairs": tiny_pairs(Path(config.model.name), 8)}
    epochs = EpochEvaluation(trainer, config, folder, dev=dev, heldout=None, scorer=lambda *_: {})
    with mock.patch.object(EpochEvaluation, "_predict", return_value=mock.Mock(pooled=torch.zeros(8, 4))):
        epochs.on_train_begin(None, mock.Mock(global_step=0), None)
    from safetensors.torch import load_file

    return [len(load_file(file)["features"]) for file in (folder / "features").glob("*")]


# ---- the keys


@dataclass(frozen=True)
class Key:
    """value: another one than the default or the base's; `beside`: what it needs, `also` with that value only; {files}
    etc. are filled in."""

    value: str
    seen: Callable[[RunConfig, Path], Any]
    beside: tuple[str, ...] = ()
    also: tuple[str, ...] = ()


HUB_TEXT = ("data.name=metamathqa",)
LOCAL = ("data.name=metamathqa", "data.source={here}/rows.jsonl")
TALKS = ("data.source={here}/talks.jsonl", "data.messages=talk", "data.template={here}/one.jinja")
SST2 = ("nlu.task=sst2", "data.source={here}/sst2/train.jsonl", "data.dev.sst2={here}/sst2/dev.jsonl")
CACHED = ("data.num_rows=4", "reference.cache={here}/cache")
CONTROLLED = ("regularizers.lambda_mode=adaptive_kl", "regularizers.kl_target=0.1")
NOISE = "data.toy.label_noise=0.5"

BOTH = {
    "name": Key("other", run_name),
    "method": Key("lora", built),
    "seed": Key("7", arguments),
    "model.revision": Key("main", hub_loading),
    "model.dtype": Key("bfloat16", loading),
    "model.attention": Key("eager", loading),
    "model.quantization": Key("nf4", loading, ("method=lora",)),
    "model.trust_remote_code": Key("true", hub_loading),
    "adapter.tuner": Key("loha", built, ("method=lora",)),
    "adapter.init": Key("pissa", built, ("method=lora",)),
    "adapter.optimizer": Key("lora_plus", built_optimizer),
    "adapter.rank": Key("2", built),
    "adapter.alpha": Key("3", built),
    "adapter.dropout": Key("0.5", built),
    "adapter.dtype": Key("base", built, ("method=lora", "model.dtype=bfloat16")),
    "adapter.svd_rank": Key("8", built, ("adapter.init=pissa_niter_1", "adapter.rank=4")),
    "adapter.factors_cache": Key("{empty}/factors", files_of("adapter.factors_cache")),
    "adapter.rslora": Key("true", built, ("method=lora",)),
    "adapter.dora": Key("true", built, ("method=lora",)),
    "adapter.options": Key("{exclude_modules: [q_proj, query]}", built, ("method=lora",)),
    "data.num_rows": Key("5", rows),
    "trainer": Key("{learning_rate: 0.5}", arguments),
    "export.ranks": Key("[1, 2]", exports, ("method=dylora", "adapter.rank=4")),
    "export.merged": Key("false", exports, ("method=lora",)),
    "export.tolerance": Key("1.0", parity),
    "hub.push": Key("true", whole_run, also=("hub.repo_id=a/b",)),
    "hub.repo_id": Key("c/d", pushing, ("hub.push=true", "hub.repo_id=a/b", "method=full_ft")),
    "hub.private": Key("false", pushing, ("hub.push=true", "hub.repo_id=a/b", "method=full_ft")),
    "output_dir": Key("{empty}/run", places),
    "results_dir": Key("{empty}/results", places),
    "overwrite": Key("true", what_is_left),
}


def regularizers(seen: Callable[[RunConfig, Path], Any]) -> dict[str, Key]:
    return {
        "regularizers.lambda_consistency": Key("0.5", seen),
        "regularizers.lambda_diversity": Key("0.5", seen),
        "regularizers.lambda_svd": Key("0.5", seen),
        "regularizers.temperature": Key("3.0", seen, ("regularizers.lambda_consistency=1",)),
        "regularizers.diversity_top_k": Key("2", seen, ("regularizers.lambda_diversity=1",)),
        "regularizers.svd_top_k": Key("1", seen, ("regularizers.lambda_svd=1",)),
        "regularizers.svd_norm": Key("frobenius", seen, ("regularizers.lambda_svd=1",)),
        "regularizers.consistency_schedule": Key("cosine_to_10_percent", seen, ("regularizers.lambda_consistency=1",)),
        "regularizers.diversity_schedule": Key("two_phase", seen, ("regularizers.lambda_diversity=1",)),
        "regularizers.svd_schedule": Key("two_phase", seen, ("regularizers.lambda_svd=1",)),
        "regularizers.lambda_mode": Key("gradient_share", gradient_shares),
        "regularizers.gradient_shares": Key(
            "{svd: 0.7}", gradient_shares, ("regularizers.lambda_mode=gradient_share",)
        ),
        "regularizers.gradient_every": Key("3", gradient_shares),
        "regularizers.kl_target": Key("0.2", controlled_lambda, CONTROLLED),
        "regularizers.kl_gain": Key("0.2", controlled_lambda, CONTROLLED),
    }


NLG = BOTH | regularizers(nlg_loss) | {
    "model.name": Key("data/toy/noisy", loading),
    "adapter.target_modules": Key("[q_proj]", built, ("method=lora",)),
    "loss.implementation": Key("plain", nlg_loss),
    "loss.chunk_memory_mb": Key("1", nlg_loss),
    "reference.cache": Key("{empty}/cache", reference_files, ("data.num_rows=4",)),
    "reference.top_k": Key("8", reference_files, CACHED),
    "reference.dtype": Key("float32", reference_files, CACHED),
    "data.source": Key("{here}/other.jsonl", rows, LOCAL),
    "data.sample_seed": Key("3", rows, (*LOCAL, "data.num_rows=4")),
    "data.revision": Key("v2", row_loading, HUB_TEXT),
    "data.split": Key("test", row_loading, HUB_TEXT),
    "data.max_length": Key("100", rows),
    "data.name": Key("gsm8k", rows, LOCAL),
    "data.subset": Key("b", row_loading, ("data.source=owner/name", "data.subset=a")),
    "data.columns": Key("{instruction: question, response: answer}", rows, LOCAL),
    "data.messages": Key("other", rows, ("data.source={here}/talks.jsonl", "data.messages=short")),
    "data.exchanges": Key("1", rows, (*TALKS, "data.exchanges=2")),
    "data.template": Key("{here}/other.jinja", rows, TALKS),
    "data.packing": Key("true", collator),
    "data.heldout_share": Key("0.5", rows, ("trainer.eval_strategy=epoch", "data.heldout_share=0.1")),
    "data.toy.label_noise": Key("0.5", rows),
    "data.toy.noisy_families": Key("[age]", rows, (NOISE,)),
    "data.toy.imbalance": Key("0.9", rows),
    "data.toy.families": Key("[age]", rows, ("data.toy.imbalance=0",)),
    "data.toy.seed": Key("1", rows),
    "early_stopping.patience": Key("2", stopping, ("trainer.eval_strategy=epoch", "data.heldout_share=0.1")),
    "early_stopping.threshold": Key(
        "0.5", stopping, ("trainer.eval_strategy=epoch", "data.heldout_share=0.1", "early_stopping.patience=2")
    ),
    "eval.tasks": Key("[gsm8k]", commands),
    "eval.data": Key("{toy: '{here}/rows.jsonl'}", commands),
    "eval.limit": Key("3", commands),
    "eval.engine": Key("vllm", commands),
    "eval.untuned": Key("false", whole_run),
    "eval.options": Key("{max_new_tokens: 7}", commands),
    "eval.harness.shots": Key("0", commands, ("eval.tasks=[harness/bbq]",)),
    "eval.harness.include_path": Key("['{here}']", commands, ("eval.tasks=[harness/bbq]",)),
    "eval.harness.batch_size": Key("4", commands, ("eval.tasks=[harness/bbq]",)),
}  # fmt: skip
NLU = BOTH | regularizers(nlu_loss) | {
    "model.name": Key("{here}/encoder2", loading),
    "adapter.target_modules": Key("[query]", built, ("method=lora",)),
    "regularizers.temperature": Key(
        "3.0", nlu_loss, ("regularizers.lambda_consistency=1", "regularizers.consistency_form=kl")
    ),
    "regularizers.diversity_top_k": Key(
        "2", nlu_loss, ("regularizers.lambda_diversity=1", "regularizers.diversity_form=entropy")
    ),
    "regularizers.svd_top_k": Key("1", nlu_loss, ("regularizers.lambda_svd=1", "regularizers.features=pooled")),
    "regularizers.svd_norm": Key(
        "frobenius", nlu_loss, ("regularizers.lambda_svd=1", "regularizers.features=pooled")
    ),
    "regularizers.lambda_svd": Key("0.5", nlu_loss, ("regularizers.features=pooled",)),
    "regularizers.svd_schedule": Key(
        "two_phase", nlu_loss, ("regularizers.lambda_svd=1", "regularizers.features=pooled")
    ),
    "regularizers.kl_target": Key("0.2", controlled_lambda, (*CONTROLLED, "regularizers.consistency_form=kl")),
    "regularizers.kl_gain": Key("0.2", controlled_lambda, (*CONTROLLED, "regularizers.consistency_form=kl")),
    "regularizers.consistency_form": Key("kl", nlu_loss, ("regularizers.lambda_consistency=1",)),
    "regularizers.diversity_form": Key("entropy", nlu_loss, ("regularizers.lambda_diversity=1",)),
    "regularizers.features": Key("pooled", nlu_loss, ("regularizers.lambda_diversity=1",)),
    "regularizers.reference_head": Key("shared", nlu_loss, ("regularizers.lambda_consistency=1",)),
    "reference.cache": Key("{empty}/cache", reference_files),
    "data.source": Key("{here}/sst2/dev.jsonl", rows, SST2),
    "data.sample_seed": Key("3", rows, (*SST2, "data.num_rows=8")),
    "data.revision": Key("v2", row_loading, ("nlu.task=sst2",)),
    "data.split": Key("test", row_loading, ("nlu.task=sst2",)),
    "data.max_length": Key("20", rows),
    "data.dev": Key("{sst2: '{here}/sst2/train.jsonl'}", rows, SST2),
    "data.dev_share": Key("0.5", rows, (*SST2[:2], "data.dev_share=0.2")),
    "data.split_seed": Key("1", rows, (*SST2[:2], "data.dev_share=0.2")),
    "data.class_shares": Key("{positive: 0.75, negative: 0.25}", rows, (*SST2, "data.num_rows=8")),
    "data.toy.label_noise": Key("0.5", rows),
    "data.toy.noisy_labels": Key("[entailment]", rows, (NOISE,)),
    "data.toy.imbalance": Key("0.9", rows),
    "data.toy.dev_rows": Key("5", rows),
    "data.toy.seed": Key("1", rows),
    "nlu.task": Key("sst2", built),
    "nlu.selection": Key("tuned", rows),
    "nlu.heldout_share": Key("0.4", rows, ("nlu.selection=tuned",)),
    "features.steps": Key("[0]", features),
    "features.num_rows": Key("3", features, ("features.steps=[0]",)),
    "eval.tasks": Key("[imdb]", commands, ("nlu.task=sst2", "eval.tasks=[yelp]")),
    "eval.data": Key("{yelp: '{here}/rows.jsonl'}", commands, ("nlu.task=sst2", "eval.tasks=[yelp]")),
    "eval.limit": Key("3", commands, ("nlu.task=sst2", "eval.tasks=[yelp]")),
}  # fmt: skip
KEYS = {"nlg": NLG, "nlu": NLU}


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder with rows and two tiny encoders."""
    folder = tmp_path_factory.mktemp("keys")
    for name, start in (("rows", 1), ("other", 5)):
        made = [
            {
                "query": f"{i + start} + 1?",
                "response": f"It is {i + start + 1}.",
                "question": f"{i}?",
                "answer": f"#### {i}",
            }
            for i in range(6)
        ]
        write_jsonl_atomic(folder / f"{name}.jsonl", made)
    talk = [{"role": role, "content": "Well."} for role in ("user", "assistant", "user", "assistant")]
    other = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Oh."}]
    write_jsonl_atomic(folder / "talks.jsonl", [{"talk": talk, "short": talk[:2], "other": other}])
    for name, mark in (("one", "#"), ("other", "##")):
        (folder / f"{name}.jinja").write_text(
            f"{{% for m in messages %}}{mark} {{{{ m.content }}}}{{{{ eos_token }}}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{mark} {{% endif %}}"
        )
    write_sst2(folder / "sst2")
    save_tiny_encoder(folder / "encoder")
    save_tiny_encoder(folder / "encoder2")
    return folder


def method_tuner(method: str) -> str | None:
    """Return the tuner of a method file, None of a variant."""
    path = METHODS_PATH / f"{method}.yaml"
    return yaml.safe_load(path.read_text())["adapter"]["tuner"] if path.is_file() else None


def leaves(schema: type, prefix: str = "") -> list[str]:
    """Return each dotted key that is no section."""
    found = []
    for entry in dataclasses.fields(schema):
        section = dataclasses.is_dataclass(entry.type)
        found += leaves(entry.type, f"{prefix}{entry.name}.") if section else [prefix + entry.name]
    return found


@pytest.mark.parametrize("kind", KEYS)
def test_every_key_has_an_entry(kind):
    assert sorted(KEYS[kind]) == sorted(leaves(SCHEMAS[kind]))


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in KEYS.items() for key in keys])
def test_a_key_changes_what_a_run_does(kind, key, here, tmp_path, monkeypatch):
    entry = KEYS[kind][key]
    common = ["data.num_rows=8", "trainer.use_cpu=true"]
    if "method=full_ft" not in entry.beside:
        common.append("adapter.rank=4")
    if kind == "nlu":
        method = "full_ft" if "method=full_ft" in entry.beside else "ba_lora"
        common = [*tiny_overrides(here / "encoder", method=method), "data.num_rows=12"]
    if any(word.startswith(("data.source", "nlu.task")) for word in entry.beside):
        common.append("data.num_rows=null")
    seen = []
    for number, words in enumerate(([], [f"{key}={entry.value}", *entry.also])):
        folder = tmp_path / str(number)
        folder.mkdir()
        filled = [
            w.replace("{here}", str(here)).replace("{empty}", str(tmp_path / "e")) for w in (*entry.beside, *words)
        ]
        cache = [w.replace(str(here / "cache"), str(folder / "cache")) for w in filled]
        seen.append(entry.seen(load_config(f"configs/{kind}/toy.yaml", kind=kind, overrides=[*common, *cache]), folder))
    assert seen[0] != seen[1]


# An argument takes the first of these that it may have and does not have yet, but for those below.
CANDIDATES = [
    "true", "false", "1", "3", "0.5", "no", "epoch", "linear", "sgd", "x", "[x]", "{a: 1}", "error", "task", "random",
    "eager", "sequential", "{non_blocking: true}", "underflow_overflow", "spawn",
]  # fmt: skip
EVALUATED = ("data.heldout_share=0.2", "trainer.eval_strategy=steps")
ARGUMENTS = {
    "dataloader_prefetch_factor": ("3", ["trainer.dataloader_num_workers=2"]),
    "ddp_backend": ("mpi", []),
    "load_best_model_at_end": ("true", [*EVALUATED, "trainer.save_steps=20"]),
    "lr_scheduler_kwargs": ("{num_cycles: 0.3}", []),
    "optim_args": ("a=1", []),
    "report_to": ("wandb", []),
    "use_cpu": ("true", ["trainer.use_cpu=false"]),
    **{name: ("3", [*EVALUATED]) for name in ("eval_steps", "eval_delay")},
    "eval_on_start": ("true", [*EVALUATED]),
    "eval_strategy": ("epoch", [*EVALUATED]),
}
LACKING = {  # here: what the error says
    "fp16": "needs a GPU",
    "tf32": "needs an NVIDIA GPU",
    "deepspeed": "no such file",
    "ddp_backend": "process group",
    "report_to": "needs the package wandb",
}
OF_GPUS = ("dataloader_pin_memory",)  # off on a CPU, whatever is set


@pytest.mark.parametrize(
    "name", sorted(set(argument_types()) - set(_RESERVED_ARGUMENTS) - set(_UNSAFE_ARGUMENTS) - set(OF_GPUS))
)
def test_every_argument_of_the_trainer_reaches_it(name, tmp_path):
    """What the Trainer does with it is transformers' part; an argument that it does not read here is refused."""
    value, beside = ARGUMENTS.get(name, (None, []))
    common = ["trainer.use_cpu=true", *beside]
    usual, errors = arguments(load_config("toy", overrides=common), tmp_path), []
    for candidate in CANDIDATES if value is None else [value]:
        try:
            found = arguments(load_config("toy", overrides=[*common, f"trainer.{name}={candidate}"]), tmp_path)
        except UserError as error:
            errors.append(str(error))
            continue
        if found[name] != usual[name]:
            return
    assert name in LACKING and any(LACKING[name] in error for error in errors), errors


@pytest.mark.parametrize("kind", KEYS)
def test_a_key_without_an_effect_is_refused_with_the_reason(kind):
    for key, reason in SCHEMAS[kind].refused.items():
        with pytest.raises(UserError, match=f"{key} has no effect on a run of {kind.upper()}: {reason}") as error:
            load_config(f"configs/{kind}/toy.yaml", kind=kind, overrides=[f"{key}=1"])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, s in SCHEMAS.items() for key in s.counts_with])
def test_a_key_without_its_partner_is_refused(kind, key):
    more = ["adapter.tuner=loha"] if key.startswith("adapter.") else []
    if key.startswith("data.toy."):
        more = ["data.name=metamathqa"] if kind == "nlg" else ["task=sst2"]
    words = ["method=lora", *more, f"{key}={KEYS[kind][key].value}"]
    with pytest.raises(UserError, match=f"{key}=.* has no effect without {SCHEMAS[kind].counts_with[key][1]}"):
        load_config(f"configs/{kind}/toy.yaml", kind=kind, overrides=words)


@pytest.mark.parametrize("tuner", tuners())
def test_a_key_that_the_method_ignores_is_refused_where_it_is_typed(tuner):
    """Not in a base, whose other methods use it."""
    (method, *_) = [m for m in available_methods("nlu") + available_methods() if method_tuner(m) == tuner]
    kind = "nlg" if method in available_methods() else "nlu"
    usual = load_config("toy", method=method, kind=kind)
    for key, value in {"rank": "2", "alpha": "3", "target_modules": "[x]", "dtype": "base"}.items():
        if key in facts("tuner", tuner)["ignores"]:
            with pytest.raises(
                UserError, match=f"adapter.{key} has no effect with adapter.tuner={tuner}: leave it out"
            ):
                load_config("toy", method=method, kind=kind, overrides=[f"adapter.{key}={value}"])
        else:
            changed = load_config("toy", method=method, kind=kind, overrides=[f"adapter.{key}={value}"])
            assert getattr(changed.adapter, key) != getattr(usual.adapter, key)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nlg", ["method=lora", "regularizers.temperature=3"]),
        ("nlg", ["method=ba_lora_consistency", "regularizers.svd_top_k=9"]),
        ("nlg", ["loss.implementation=plain", "loss.chunk_memory_mb=5"]),
        ("nlg", ["hub.repo_id=a/b"]),
        ("nlg", ["hub.private=false"]),
        ("nlg", ["data.name=gsm8k", "data.source=rows.csv", "data.num_rows=null", "data.sample_seed=3"]),
        ("nlg", ["data.source=rows.csv", "data.columns={instruction: q, response: a}", "data.split=test"]),
        ("nlg", ["data.name=gsm8k", "data.toy.imbalance=0.5"]),
        ("nlg", ["data.toy.noisy_families=[add]"]),
        ("nlu", ["data.dev={toy_pairs: rows.csv}"]),
        ("nlu", ["data.split_seed=5"]),
        ("nlu", ["data.toy.noisy_labels=[neutral]"]),
        ("nlu", ["task=sst2", "data.class_shares={negative: 0.1}", "data.sample_seed=5"]),
        ("nlu", ["task=sst2", "data.source=rows.csv", "data.dev_share=0.1", "data.split=test"]),
        ("nlu", ["method=lora", "regularizers.reference_head=shared"]),
    ],
)
def test_a_typed_key_that_counts_only_beside_another_is_refused_without_it(kind, words):
    *_, key = words
    with pytest.raises(UserError, match=f"^{key.partition('=')[0]}=.* has no effect without"):
        load_config("toy", kind=kind, overrides=words)


def test_a_base_may_have_what_counts_for_others_of_its_methods(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "model: {name: data/toy/clean}\ndata: {name: toy, num_rows: 8, toy: {noisy_families: [add]}}\n"
        "regularizers: {svd_top_k: 9}\nhub: {repo_id: a/b}\nloss: {implementation: plain, chunk_memory_mb: 5}\n"
    )
    assert load_config(tmp_path / "base.yaml", method="lora").regularizers.svd_top_k == 9


def test_a_key_of_the_other_kind_is_told_to_be_that():
    with pytest.raises(UserError, match="regularizers.features is a key of NLU runs, not of NLG"):
        load_config("toy", kind="nlg", overrides=["regularizers.features=pooled"])


@pytest.mark.parametrize("kind", KEYS)
def test_what_was_saved_with_a_key_that_is_refused_now_is_still_read(kind, tmp_path):
    config = load_config(f"configs/{kind}/toy.yaml", kind=kind)
    text = to_yaml(config).replace("eval:\n", "eval:\n  untuned: false\n") if kind == "nlu" else to_yaml(config)
    if kind == "nlu":
        text += "loss: {implementation: fused}\nearly_stopping: {patience: null}\n"
    (tmp_path / "config.yaml").write_text(text)
    assert load_config(tmp_path / "config.yaml") == config
    assert config_of_result(yaml.safe_load(text), kind=kind) == config
