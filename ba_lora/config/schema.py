"""Configuration: what a run's settings are, as typed dataclasses, and how they are hashed and saved.

How they are read, from base, method and `key=value`: layers.py; which values go together: checks.py; what only one kind
of run has: schema_nlg.py, schema_nlu.py. The resolved configuration is saved with every run and is enough to repeat
it: `python train_nlg.py --config outputs/<run_id>/config.yaml` needs no method file.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from omegaconf import OmegaConf

from ba_lora.config.methods import tuner_facts, versions
from ba_lora.config.ranges import check_numbers, check_range
from ba_lora.config.registries import schedules
from ba_lora.errors import UserError
from ba_lora.paths import PROJECT_ROOT, resolve_data, written_path
from ba_lora.words import check_choice

DTYPES = ("float32", "bfloat16", "float16")
ATTENTION = ("sdpa", "eager", "flash_attention_2")
LOSS_IMPLEMENTATIONS = ("fused", "plain")
LAMBDA_MODES = ("fixed", "gradient_share", "adaptive_kl")
LAMBDA_LIMITS = (1e-6, 100.0)  # of λ under adaptive_kl
# What eval.options may hold: settings of eval.generate that change no other part of the run, and choices of the tasks.
GENERATION_OPTIONS = (
    "max_new_tokens", "temperature", "top_p", "num_samples", "seed", "template", "batch_size", "dtype", "max_model_len",
    "attention", "tensor_parallel_size", "gpu_memory_utilization", "serve", "thinking", "protocol", "subset",
)  # fmt: skip
LIKELIHOOD = "likelihood"
RUN_MEASURES = ("inheritance", LIKELIHOOD)  # measured on the run itself, not on completions: eval/<name>.py
HARNESS = "harness/"  # before the name of a task of lm-evaluation-harness: eval/harness.py
PUBLISHED_TERMS = ("consistency", "diversity", "svd")
# Each further file in objective/terms that binds TERM has a weight `lambda_<name>` and a `<name>_schedule` of its own.
EXTRA_TERMS = tuple(
    sorted(
        file.stem
        for file in (PROJECT_ROOT / "ba_lora" / "objective" / "terms").glob("*.py")
        if file.stem not in PUBLISHED_TERMS
        and re.search(r"^TERM\b.* = ", file.read_text(encoding="utf-8"), re.MULTILINE)
    )
)
RESULTS_PATH = PROJECT_ROOT / "results" / "runs"
UNTUNED = "untuned"  # the method name of the pre-trained model itself


@dataclass
class ModelConfig:
    """The pre-trained model."""

    name: str = ""  # hub id or folder
    revision: str | None = None  # hub commit or tag; None: the newest
    dtype: str = "bfloat16"  # of the base's weights
    attention: str = "sdpa"
    quantization: str = "none"  # none | nf4 (4 bit, by bitsandbytes)
    trust_remote_code: bool = False  # runs the model repository's own Python code; counts only when it is typed


@dataclass
class AdapterConfig:
    """What is trained: an adapter, the biases only (`tuner=bitfit`), or everything (`tuner=full`).

    tuner, init and optimizer are files of ba_lora/methods.
    """

    tuner: str = "lora"
    init: str = "lora"  # of LoRA's factors: lora (A random, B = 0) | pissa | pissa_niter_N | corda | …
    optimizer: str | None = None  # that knows A and B; None: trainer.optim as it is
    rank: int = 128
    alpha: float | None = None  # None: equal to the rank, as PiSSA needs for a scaling of 1
    dropout: float = 0.0
    target_modules: Any = "all-linear"  # PEFT's `all-linear` leaves the head out; or a list of module names
    dtype: str = "float32"  # float32 | base (the base's dtype)
    svd_rank: int | None = None  # of PiSSA's SVD, whose leading components are taken; None: the rank
    factors_cache: str | None = None  # folder where these components are kept for other ranks, seeds and methods
    rslora: bool = False
    dora: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # the method's own settings, checked by name

    @property
    def trains_own_weights(self) -> bool:
        """Whether the model's own weights are trained and saved, and no adapter."""
        return tuner_facts(self)["own_weights"]


def with_extra_terms(config_class: type) -> type:
    """Give a dataclass of regularizers the keys of EXTRA_TERMS: λ = 0, a term that is out, unless the user sets it."""
    keys: list[tuple] = [(f"lambda_{name}", float, field(default=0.0)) for name in EXTRA_TERMS]
    keys += [(f"{name}_schedule", str, field(default="constant")) for name in EXTRA_TERMS]
    if not keys:
        return config_class
    kept = {"__module__": config_class.__module__, "__doc__": config_class.__doc__}
    return dataclasses.make_dataclass(config_class.__name__, keys, bases=(config_class,), namespace=kept)


@with_extra_terms
@dataclass
class BALoRAConfig:
    """The three regularizers. λ = 0 takes a term out of the loss (and out of the step's cost).

    The defaults are `paper2024`'s NLG values; configs/methods/ba_lora_iclr2026.yaml holds the other version.
    """

    lambda_consistency: float = 1e-4
    lambda_diversity: float = 3e-4
    lambda_svd: float = 1e-4
    temperature: float = 1.0  # T of the consistency term, T² KL(softmax(z_P / T) ‖ softmax(z_F / T))
    diversity_top_k: int | None = None  # None: entropy over the whole vocabulary
    svd_top_k: int = 3
    svd_norm: str = "nuclear"  # nuclear: Σ_j σ_j | frobenius: ‖Z‖_F
    consistency_schedule: str = "constant"
    diversity_schedule: str = "constant"
    svd_schedule: str = "constant"
    # fixed: λ as above | gradient_share: λ(t) by gradient_shares; λ > 0 says what is in | adaptive_kl: λ(t) of
    # consistency by kl_target, from lambda_consistency on
    lambda_mode: str = "fixed"
    gradient_shares: dict[str, float] = field(default_factory=dict)  # term → gradient over the task's; else 0.1 each
    gradient_every: int | None = 50  # steps between two measurements of the shares; None: they are not logged
    kl_target: float | None = None  # nats a position, between the pre-trained model and the trained one
    kl_gain: float = 0.1  # of the controller: λ changes by at most a fifth of it in a step

    def __post_init__(self) -> None:
        check_numbers(self, "regularizers.")
        check_choice("regularizers.lambda_mode", self.lambda_mode, LAMBDA_MODES)
        self._check_shares()
        self._check_kl()
        check_choice("regularizers.svd_norm", self.svd_norm, ("nuclear", "frobenius"))
        for term in (*PUBLISHED_TERMS, *EXTRA_TERMS):
            known = [name for name in schedules() if name != "adaptive" or term == "consistency"]  # by position
            check_choice(f"regularizers.{term}_schedule", getattr(self, f"{term}_schedule"), known)

    def _check_shares(self) -> None:
        if self.lambda_mode == "gradient_share":
            if self.gradient_every is None:
                raise UserError("regularizers.lambda_mode=gradient_share measures: set regularizers.gradient_every")
            if not any(getattr(self, f"lambda_{name}") for name in (*PUBLISHED_TERMS, *EXTRA_TERMS)):
                raise UserError("regularizers.lambda_mode=gradient_share has no effect without a term: set a λ above 0")
        elif self.gradient_shares:
            raise UserError("regularizers.gradient_shares needs regularizers.lambda_mode=gradient_share")
        for name, share in self.gradient_shares.items():
            check_choice("regularizers.gradient_shares", name, (*PUBLISHED_TERMS, *EXTRA_TERMS))
            if getattr(self, f"lambda_{name}") == 0:
                raise UserError(
                    f"regularizers.gradient_shares.{name} has no effect: lambda_{name}=0 takes the term out"
                )
            check_range(f"regularizers.gradient_shares.{name}", share, "[0, 1000000]")

    def _check_kl(self) -> None:
        mode = "regularizers.lambda_mode=adaptive_kl"
        if self.lambda_mode != "adaptive_kl":
            for name in ("kl_target", "kl_gain"):
                if getattr(self, name) != getattr(type(self), name):
                    raise UserError(f"regularizers.{name} needs {mode}")
            return
        if self.kl_target is None:
            raise UserError(f"{mode} holds the KL at a target: set regularizers.kl_target, in nats a position")
        low, high = LAMBDA_LIMITS
        if not low <= self.lambda_consistency <= high:
            raise UserError(
                f"{mode} starts at regularizers.lambda_consistency={self.lambda_consistency}: it must be {low:g} to "
                f"{high:g}"
            )
        if self.consistency_schedule not in ("constant", "adaptive"):
            raise UserError(
                f"regularizers.consistency_schedule={self.consistency_schedule} would work against "
                "lambda_mode=adaptive_kl: set it to constant"
            )


@dataclass
class ReferenceConfig:
    """Where the pre-trained model's outputs come from: a pass in every step, or a cache on disk."""

    cache: str | None = None  # folder, filled where it is not full yet; None: a reference pass in every step


@dataclass
class DataConfig:
    """The training rows."""

    source: Any = None  # hub id or local file, or a list of files; None: the set's own place on the hub
    revision: str | None = None
    split: str = "train"
    num_rows: int | None = None  # None: all
    sample_seed: int | None = None  # None: the first rows; else a seeded sample
    max_length: int = 512  # tokens of a row; longer ones are cut

    @property
    def sources(self) -> list[str]:
        """`source` as a list."""
        return [] if self.source is None else [self.source] if isinstance(self.source, str) else list(self.source)

    @property
    def reads_hub(self) -> bool:
        """Whether some rows are not of files."""
        return not self.sources or not all(Path(resolve_data(name)).is_absolute() for name in self.sources)

    @property
    def files(self) -> list[str]:
        """What else the rows depend on: local files that the configuration names."""
        return []


@dataclass
class ExportConfig:
    """What is written after training besides the adapter."""

    merged: bool = True
    ranks: list[int] = field(
        default_factory=list
    )  # of a method for every rank (DyLoRA): a plain LoRA of each, ranks/<b>
    tolerance: float | None = None  # largest |Δ logit| allowed between trained and exported; None: by dtype


@dataclass
class EvalConfig:
    """What `scripts/ba-lora.sh` and `nlu.sh` evaluate after training."""

    tasks: list[str] = field(default_factory=list)
    data: dict[str, str] = field(default_factory=dict)  # task → local data file; absent: the task's hub set
    limit: int | None = None  # only the first rows of each task


@dataclass
class HubConfig:
    """Pushing the exported adapter and merged model to the Hugging Face hub."""

    push: bool = False
    repo_id: str | None = None
    private: bool = True


def _with_term(term: str) -> tuple[Callable[[Any], bool], str]:
    """Return, as `counts_with` has it, whether a term is in the loss."""
    return lambda config: getattr(config.regularizers, f"lambda_{term}") > 0, f"regularizers.lambda_{term}"


@dataclass
class RunConfig:
    """What a run of either kind has, resolved; NLGConfig (schema_nlg.py) and NLUConfig (schema_nlu.py) add their own.

    Every key has an effect; `refused` has the keys that a run of this kind has no use for, and why.
    """

    kind: ClassVar[str]
    refused: ClassVar[dict[str, str]] = {}
    # settings that count only beside another one → whether that is there, and how it is set
    counts_with: ClassVar[dict[str, tuple[Callable[[Any], bool], str]]] = {
        "adapter.rslora": (lambda config: tuner_facts(config.adapter)["has_factors"], "adapter.tuner=lora"),
        "adapter.dora": (lambda config: tuner_facts(config.adapter)["takes_dora"], "adapter.tuner=lora"),
    }
    # the same of settings that a base may have for others of its methods or data: refused where they are typed. Not
    # reference.cache, which is typed for whole tables
    typed_counts_with: ClassVar[dict[str, tuple[Callable[[Any], bool], str]]] = {
        "regularizers.temperature": _with_term("consistency"),
        "regularizers.diversity_top_k": _with_term("diversity"),
        **dict.fromkeys(("regularizers.svd_top_k", "regularizers.svd_norm"), _with_term("svd")),
        **{f"regularizers.{name}_schedule": _with_term(name) for name in (*PUBLISHED_TERMS, *EXTRA_TERMS)},
        "data.sample_seed": (lambda config: config.data.num_rows is not None, "data.num_rows"),
        **dict.fromkeys(("hub.repo_id", "hub.private"), (lambda config: config.hub.push, "hub.push=true")),
    }

    name: str = ""  # the base's name, the file's stem
    method: str = ""
    seed: int = 42
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    regularizers: BALoRAConfig = field(default_factory=BALoRAConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: dict[str, Any] = field(default_factory=dict)  # TrainingArguments by name
    export: ExportConfig = field(default_factory=ExportConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    output_dir: str | None = None  # None: outputs/<run_id>
    results_dir: str | None = None  # None: the repository's results/runs
    overwrite: bool = False  # counts only when it is typed

    @property
    def uses_reference_cache(self) -> bool:
        """Whether the consistency term is in and takes its reference from disk."""
        return self.reference.cache is not None and self.regularizers.lambda_consistency > 0

    @property
    def run_id(self) -> str:
        """`<base>-<method>-s<seed>-<hash>`; the hash is over everything that changes the trained weights."""
        return self.__dict__.get("_run_id") or f"{self.run_name}-s{self.seed}-{training_hash(self)}"

    @property
    def run_name(self) -> str:
        """How the ids of the run and of its other seeds begin."""
        return f"{self.name}-{self.method}"

    def keep_run_id(self) -> Self:
        """Return this configuration, of which no value changes any more: a table asks for its id some twenty times."""
        self.__dict__["_run_id"] = self.run_id
        return self

    @property
    def run_path(self) -> Path:
        """The run's folder."""
        return written_path(self.output_dir) if self.output_dir else PROJECT_ROOT / "outputs" / self.run_id

    @property
    def result_path(self) -> Path:
        """The run's result JSON: named by the run's id, wherever its folder is. A folder that is named by the id and a
        suffix (a table's rows of their own), or of the pre-trained model itself, gives its own name."""
        folder = self.run_path.name
        name = folder if self.method == UNTUNED or folder.startswith(self.run_id) else self.run_id
        return (written_path(self.results_dir) if self.results_dir else RESULTS_PATH) / f"{name}.json"

    @property
    def data_files(self) -> list[str]:
        """What the run reads its rows from, where the configuration names it."""
        return [*self.data.sources, *self.data.files]


# What a run's weights do not depend on (on `loss` by rounding only): these may change without training again.
NOT_TRAINING = ("loss", "export", "eval", "hub", "output_dir", "results_dir", "overwrite")
# TrainingArguments that change no weight.
_COSMETIC_ARGUMENTS = (
    "logging_steps", "logging_first_step", "logging_strategy", "report_to", "project", "trackio_space_id",
    "trackio_bucket_id", "trackio_static_space_id", "disable_tqdm", "log_level", "dataloader_num_workers",
    "dataloader_pin_memory",
)  # fmt: skip
# Keys that came later, with the values at which the weights are what they were without the key.
_SINCE_ADDED: dict[str, dict[str, tuple[Any, ...]]] = {
    "data": {
        "packing": (False, None), "heldout_share": (None,), "columns": ({}, None), "messages": (None,),
        "exchanges": (None,), "subset": (None,), "template": ("alpaca", None),
    },
    "regularizers": {},
}  # fmt: skip
_SAVING_ARGUMENTS = ("save_steps", "save_strategy", "save_total_limit")  # nor these, unless the best is exported


def public(value: Any) -> Any:
    """Return plain values whose paths that are absolute or lead upwards, also those after a `name=`, are told without
    this machine's folders: from the project's root for what lies there, else by the last part."""
    if isinstance(value, dict):
        return {key: public(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [public(entry) for entry in value]
    if not isinstance(value, str):
        return value
    path = Path(os.path.expanduser(value))
    if not path.is_absolute() and ".." not in path.parts:
        name, equals, rest = value.partition("=")
        return f"{name}={public(rest)}" if equals else value
    path = Path(os.path.normpath(path))
    return path.relative_to(PROJECT_ROOT).as_posix() if path.is_relative_to(PROJECT_ROOT) else path.name


def to_yaml(config: RunConfig, *, for_others: bool = False) -> str:
    """Return the resolved configuration as YAML, without what is not the run's own or counts only when it is typed.

    for_others: without the folders of this machine, for a model card.
    """
    plain = dataclasses.asdict(config)
    for key in ("output_dir", "overwrite", "results_dir"):
        plain.pop(key)
    plain["model"].pop("trust_remote_code")
    return OmegaConf.to_yaml(OmegaConf.create(public(plain) if for_others else plain))


def training_settings(config: RunConfig) -> dict[str, Any]:
    """Return everything the trained weights depend on, as plain values."""
    plain = _as_plain(config)
    for key in NOT_TRAINING:
        plain.pop(key, None)
    reference = plain.pop("reference")
    if config.uses_reference_cache:  # where it lies changes no weight, what it keeps does
        del reference["cache"]
        # NLU's run ids were made with these two, which NLU has no use for
        plain["reference"] = {"top_k": 64, "dtype": "float16"} | reference
    for name in EXTRA_TERMS:  # a term that is out changes no weight
        if plain["regularizers"][f"lambda_{name}"] == 0:
            del plain["regularizers"][f"lambda_{name}"], plain["regularizers"][f"{name}_schedule"]
    mode = config.regularizers.lambda_mode  # without gradient_share the shares are only logged
    by_share, by_kl = ("gradient_shares", "gradient_every"), ("kl_target", "kl_gain")
    unused = {"fixed": ("lambda_mode", *by_share, *by_kl), "gradient_share": by_kl, "adaptive_kl": by_share}
    for name in unused[mode]:
        del plain["regularizers"][name]
    saving = () if plain["trainer"].get("load_best_model_at_end") else _SAVING_ARGUMENTS
    plain["trainer"] = {k: v for k, v in plain["trainer"].items() if k not in (*_COSMETIC_ARGUMENTS, *saving)}
    plain["model"]["trust_remote_code"] = False  # who trusts the code gets the same weights
    plain["adapter"].pop("factors_cache")
    if found := versions(config.adapter):
        plain["adapter"]["versions"] = found
    if config.adapter.optimizer is None:  # run ids were made without the key
        del plain["adapter"]["optimizer"]
    svd_rank = plain["adapter"].pop("svd_rank") or config.adapter.rank
    if config.adapter.init.startswith("pissa_niter"):  # an exact SVD has the same leading components at any rank
        plain["adapter"]["svd_rank"] = svd_rank
    for room, keys in _SINCE_ADDED.items():  # packed, dropout draws other numbers; held-out rows are not trained on
        for key, usual in keys.items():
            if key in plain[room] and plain[room][key] in usual:
                del plain[room][key]
    if not plain["data"].get("toy", {}).get("families", True):  # as above
        del plain["data"]["toy"]["families"]
    if plain.get("early_stopping", {}).get("patience") is None:
        plain.pop("early_stopping", None)
    return plain


def _as_plain(value: Any) -> Any:
    """Return what dataclasses.asdict does of values that YAML has, in a tenth of its time: it copies each of them."""
    if dataclasses.is_dataclass(value):
        return {one.name: _as_plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _as_plain(entry) for key, entry in value.items()}
    return [_as_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def training_hash(config: RunConfig) -> str:
    """Return 10 hex digits over `training_settings`."""
    text = json.dumps(training_settings(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def setting_differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Return `key old → new` for each dotted key whose value differs between two settings of plain values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [
            change
            for key in keys
            for change in setting_differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [] if old == new else [f"{prefix} {old} → {new}"]
