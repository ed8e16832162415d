"""The NLG side of the configuration: the settings that only a language model's run has."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ba_lora.chat import is_chat, read_template
from ba_lora.config.ranges import check_numbers, check_range
from ba_lora.config.registries import data_sets, tasks, toy_families
from ba_lora.config.schema import (
    GENERATION_OPTIONS,
    HARNESS,
    LOSS_IMPLEMENTATIONS,
    RUN_MEASURES,
    DataConfig,
    EvalConfig,
    ReferenceConfig,
    RunConfig,
    check_choice,
)
from ba_lora.errors import UserError
from ba_lora.words import nearest

FRAMES = ("alpaca", "chat")  # what data.template may be besides a file


@dataclass
class LossConfig:
    """How the loss is computed: the same values, but for rounding, at different costs."""

    implementation: str = "fused"  # fused: in chunks of positions, no logits kept | plain: by way of all logits
    chunk_memory_mb: float | None = None  # of the fused loss's buffers; None: 256 on a CPU, 1024 on a GPU

    def __post_init__(self) -> None:
        check_choice("loss.implementation", self.implementation, LOSS_IMPLEMENTATIONS)
        check_numbers(self, "loss.")


@dataclass
class NLGReferenceConfig(ReferenceConfig):
    """The cache belongs to one base, one set of rows and one temperature; methods, seeds and ranks share it."""

    top_k: int = 64  # tokens kept a position; the size of the vocabulary: exact
    dtype: str = "float16"  # float16 | float32, of the log-probabilities on disk


@dataclass
class ToyConfig:
    """Settings of the self-made word problems (data/toy.py), for `data.name=toy`."""

    label_noise: float = 0.0
    noisy_families: list[str] = field(default_factory=list)
    imbalance: float = 0.0
    families: list[str] = field(default_factory=list)  # only these, alike, without imbalance; empty: all ten
    seed: int = 0


@dataclass
class NLGDataConfig(DataConfig):
    """The rows of one data set: a named one (configs/data), or your own by `columns` or `messages`."""

    name: str = "metamathqa"
    subset: str | None = None  # of `source`, where that is a hub set of several configurations
    columns: dict[str, str] = field(default_factory=dict)  # instruction, response and, if need be, input → column
    messages: str | None = None  # or the column with a list of turns: {role, content} or {from, value}
    exchanges: int | None = None  # only the first questions and answers of each list of turns; None: all
    template: str = "alpaca"  # alpaca | chat: the tokenizer's own chat template | a Jinja file
    num_rows: int | None = 100_000  # None: all
    packing: bool = False  # a micro-batch's rows in one sequence without padding (ba_lora/training/packing.py)
    heldout_share: float | None = None  # of the rows, the same for every seed: kept for trainer.eval_strategy
    toy: ToyConfig = field(default_factory=ToyConfig)

    @property
    def has_own_form(self) -> bool:
        """Whether the configuration itself says how a row becomes a conversation."""
        return bool(self.columns) or self.messages is not None

    @property
    def files(self) -> list[str]:
        return [self.template] if self.template not in FRAMES else []


@dataclass
class EarlyStoppingConfig:
    """transformers' EarlyStoppingCallback, for runs with `trainer.eval_strategy`."""

    patience: int | None = None  # evaluations without a better trainer.metric_for_best_model; None: no early stopping
    threshold: float = 0.0  # what an evaluation must be better by


@dataclass
class HarnessConfig:
    """How lm-evaluation-harness asks the tasks of `eval.tasks` that begin with `harness/`."""

    shots: Any = None  # examples before a question: a number, or {harness/TASK: number}; None: each task's own
    include_path: list[str] = field(default_factory=list)  # folders of task files of your own
    batch_size: int = 16

    def shots_of(self, task: str) -> int | None:
        """Return the examples that a task of `eval.tasks` is to show; None: as many as it says itself."""
        return self.shots.get(task) if isinstance(self.shots, dict) else self.shots


def scoring_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the `eval` section, as plain values, without those of its harness that are at their defaults or change no
    score: folders and scores were named before there were such keys."""
    usual = HarnessConfig()
    asked = {
        key: value
        for key, value in (settings.get("harness") or {}).items()
        if key != "batch_size" and value != getattr(usual, key, None)
    }
    rest = {key: value for key, value in settings.items() if key != "harness"}
    return rest | ({"harness": asked} if asked else {})


@dataclass
class NLGEvalConfig(EvalConfig):
    """How completions are generated."""

    engine: str = "auto"  # vllm | hf | auto
    untuned: bool = False  # evaluate the pre-trained model too, once for all runs of it
    options: dict[str, Any] = field(default_factory=dict)  # passed to eval.generate as key=value
    harness: HarnessConfig = field(default_factory=HarnessConfig)


@dataclass
class NLGConfig(RunConfig):
    """One NLG run, resolved."""

    kind: ClassVar[str] = "nlg"
    counts_with = (
        RunConfig.counts_with
        | dict.fromkeys(
            ("data.split", "data.sample_seed"),
            (lambda config: config.data.name != "toy" or config.data.source is not None, "data.source or a data.name"),
        )
        | {
            "data.revision": (
                lambda config: config.data.reads_hub and (config.data.name != "toy" or config.data.source is not None),
                "rows of the hub",
            )
        }
        # not toy.imbalance, which configs/nlg/toy.yaml sets for whoever takes it with another data set
        | dict.fromkeys(
            ("data.toy.label_noise", "data.toy.noisy_families", "data.toy.families", "data.toy.seed"),
            (lambda config: config.data.name == "toy" and config.data.source is None, "data.name=toy"),
        )
        | {
            "reference.top_k": (lambda config: config.reference.cache is not None, "reference.cache"),
            "reference.dtype": (lambda config: config.reference.cache is not None, "reference.cache"),
            "data.subset": (lambda config: config.data.source is not None, "data.source"),
            "data.columns": (lambda config: config.data.source is not None, "data.source"),
            "data.messages": (lambda config: config.data.source is not None, "data.source"),
            "early_stopping.threshold": (
                lambda config: config.early_stopping.patience is not None,
                "early_stopping.patience",
            ),
        }
    )

    typed_counts_with = RunConfig.typed_counts_with | {
        "loss.chunk_memory_mb": (lambda config: config.loss.implementation == "fused", "loss.implementation=fused"),
        # of a file of a named set it chooses what data/manifest.yaml compares
        "data.split": (lambda config: config.data.reads_hub or not config.data.has_own_form, "rows of the hub"),
        "data.toy.imbalance": (
            lambda config: config.data.name == "toy" and config.data.source is None,
            "data.name=toy",
        ),
        "data.toy.noisy_families": (lambda config: config.data.toy.label_noise > 0, "data.toy.label_noise"),
    }

    loss: LossConfig = field(default_factory=LossConfig)
    reference: NLGReferenceConfig = field(default_factory=NLGReferenceConfig)
    data: NLGDataConfig = field(default_factory=NLGDataConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    eval: NLGEvalConfig = field(default_factory=NLGEvalConfig)


PARTS = ("instruction", "input", "response")


def check_row_form(section: str, columns: dict[str, str], messages: str | None, exchanges: int | None) -> None:
    """Raise UserError where `columns`, `messages` and `exchanges` do not fit each other. section: before each key."""
    if columns and messages:
        raise UserError(f"{section}columns: columns and messages are two forms of a row: keep one")
    for part in columns:
        check_choice(f"{section}columns", part, PARTS)
    if len(set(columns.values())) < len(columns):
        raise UserError(f"{section}columns: instruction, input and response are columns of their own")
    for part in ("instruction", "response"):
        if columns and part not in columns:
            raise UserError(f"{section}columns has no {part}: add {part}: COLUMN")
    if exchanges is not None and columns:
        raise UserError(f"{section}exchanges has no effect on columns, which are one exchange: leave it out")


def check_nlg(config: NLGConfig) -> None:
    """Raise UserError for NLG settings that are unknown or do not fit each other."""
    check_choice("reference.dtype", config.reference.dtype, ("float16", "float32"))
    check_choice("data.name", config.data.name, data_sets())
    data = config.data
    check_row_form("data.", data.columns, data.messages, data.exchanges)
    if data.template not in FRAMES and not is_chat(data.template):
        raise UserError(
            f"data.template={data.template} is unknown: choose alpaca, chat or a Jinja file (FILE.jinja)"
            f"{nearest(data.template, FRAMES)}"
        )
    if data.template not in FRAMES:
        read_template(data.template)
    if config.data.num_rows is None and config.data.name == "toy" and config.data.source is None:
        raise UserError("data.num_rows=null means all rows of a set, the toy's are made on demand: give a number")
    for key in ("families", "noisy_families"):
        for name in getattr(data.toy, key):
            check_choice(f"data.toy.{key}", name, toy_families())
    if data.name == "toy" and data.source is None and data.toy.families and data.toy.imbalance:
        raise UserError("data.toy.families are alike, and data.toy.imbalance would make some rare: set it to 0")
    for task in (*config.eval.tasks, *config.eval.data):
        if not task.startswith(HARNESS):  # the harness knows its own names, and is asked before the training
            check_choice("eval.tasks", task, (*tasks(), *RUN_MEASURES))
        if task in RUN_MEASURES and is_chat(data.template):
            raise UserError(
                f"eval.tasks: {task} asks in the Alpaca frame, and the run is trained in {data.template}: leave {task} "
                "out, or train with data.template=alpaca"
            )
    _check_shots(config.eval.harness.shots)
    check_choice("eval.engine", config.eval.engine, ("auto", "vllm", "hf"))
    for key, value in config.eval.options.items():
        if key not in GENERATION_OPTIONS:
            raise UserError(
                f"unknown key eval.options.{key}{nearest(str(key), GENERATION_OPTIONS)}; there are "
                f"{', '.join(GENERATION_OPTIONS)}"
            )
        if not isinstance(value, str | int | float | bool | None):
            raise UserError(f"eval.options.{key}={value}: a single value is needed")


def _check_shots(shots: Any) -> None:
    """Raise UserError where `eval.harness.shots` is neither a number of examples nor one for each task."""
    if shots is None:
        return
    for task, number in shots.items() if isinstance(shots, dict) else [("", shots)]:
        if task and not task.startswith(HARNESS):
            raise UserError(f"eval.harness.shots.{task}: name the task as eval.tasks does, {HARNESS}{task}")
        if not isinstance(number, int) or isinstance(number, bool):
            name = f"eval.harness.shots{task and '.'}{task}"
            raise UserError(f"{name}={number}: a whole number is needed, or {{{HARNESS}TASK: NUMBER}}")
        check_range(f"eval.harness.shots{task and '.'}{task}", number, "[0, 1000]")
