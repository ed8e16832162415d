"""The NLU side of the configuration: what differs from an NLG run, in dataclasses of the same shape.

    configs/nlu/<model>.yaml   a base; its `tasks:` map holds each task's own settings, merged over the base
    --task NAME, task=NAME     which of them (or `nlu.task` in the base, a name or a task of your own)

`load_config` merges base, task, method and overrides, in this order.
"""

import functools
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ba_lora.config.ranges import check_range
from ba_lora.config.registries import nlu_metrics
from ba_lora.config.schema import LIKELIHOOD, BALoRAConfig, DataConfig, RunConfig
from ba_lora.errors import UserError
from ba_lora.glue import AUTO, OUT_OF_DOMAIN, TASKS, NLUTask, find_task, plain_label
from ba_lora.paths import data_suffix, resolve_path
from ba_lora.rows import stream_rows
from ba_lora.words import check_choice


@dataclass
class NLURegularizersConfig(BALoRAConfig):
    """The three NLU terms; the defaults are `paper2024`'s. Schedules, temperature and svd settings as for NLG."""

    lambda_diversity: float = 4e-4
    svd_top_k: int = 5
    consistency_form: str = "normalized_mse"  # normalized_mse (paper2024) | kl (iclr2026)
    diversity_form: str = "covariance"  # covariance | entropy (of softmax, as NLG's; the paper compares the two)
    features: str = "logits"  # of the diversity and svd terms: logits [N, D] | pooled [N, hidden]
    reference_head: str = "initial"  # initial | shared | probe: whose logits the consistency term compares with

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("regularizers.consistency_form", self.consistency_form, ("normalized_mse", "kl"))
        check_choice("regularizers.diversity_form", self.diversity_form, ("covariance", "entropy"))
        check_choice("regularizers.features", self.features, ("logits", "pooled"))
        check_choice("regularizers.reference_head", self.reference_head, ("initial", "shared", "probe"))
        if self.consistency_schedule == "adaptive":
            raise UserError("regularizers.consistency_schedule=adaptive weighs response positions: it is for NLG only")
        if self.lambda_mode == "adaptive_kl" and self.consistency_form != "kl":
            raise UserError(
                "regularizers.lambda_mode=adaptive_kl needs a KL, and "
                f"consistency_form={self.consistency_form} is none: set regularizers.consistency_form=kl"
            )


@dataclass
class ToyPairsConfig:
    """Settings of the self-made sentence pairs (data/toy_nlu.py), for the task toy_pairs."""

    label_noise: float = 0.0  # share of training rows with a wrong label
    noisy_labels: list[str] = field(default_factory=list)  # only rows of these labels; empty: all
    imbalance: float = 0.0  # 0: all labels alike; towards 1: `contradiction` grows rare, in training only
    dev_rows: int = 600
    seed: int = 0


@dataclass
class NLUDataConfig(DataConfig):
    """The rows of one task: of GLUE's from the hub, or from local files of the task's columns."""

    max_length: int = 128  # tokens of a sentence or pair
    dev: dict[str, str] = field(default_factory=dict)  # evaluation set → local file
    dev_share: float | None = None  # without a file for it: this share of `source` becomes the dev set, by split_seed
    split_seed: int = 0  # of dev_share, class_shares and the held-out part: the same for all seeds and methods
    class_shares: dict[str, float] = field(default_factory=dict)  # label → share of the training rows
    toy: ToyPairsConfig = field(default_factory=ToyPairsConfig)

    @property
    def is_imbalanced(self) -> bool:
        """Whether the training set has chosen class shares: then the rare class's recall is reported too."""
        return bool(self.class_shares) or self.toy.imbalance > 0


@dataclass
class NLUTaskConfig:
    """The task, and which epoch's model is kept."""

    task: Any = ""  # a name (configs/nlu/tasks), or a mapping that describes one of your own (ba_lora/glue.py)
    selection: str = "paper"  # best epoch by: paper (the dev set, as the papers do) | tuned (a held-out part of TRAIN)
    heldout_share: float = 0.1  # of the training rows, for selection=tuned

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task if isinstance(self.task, str) else str(self.task.get("name"))


@dataclass
class FeaturesConfig:
    """Saving the pooled features of the first dev set during training, for figures."""

    steps: list[int] = field(default_factory=list)  # optimizer steps; 0 is before training
    num_rows: int | None = 1000  # the first rows of the set; None: all


@dataclass
class NLUConfig(RunConfig):
    """One NLU run, resolved."""

    kind: ClassVar[str] = "nlu"
    refused: ClassVar[dict[str, str]] = {
        "loss": "the logits of a few classes need no other way to compute the loss",
        "reference.top_k": "the cache keeps the encoder's features whole",
        "reference.dtype": "the cache keeps the encoder's features in float32",
        "data.name": "the task names the rows: task=NAME",
        "data.packing": "a classifier reads one row at a time",
        "data.heldout_share": "use nlu.selection=tuned, with nlu.heldout_share",
        "early_stopping": "an NLU run is evaluated after every epoch; nlu.selection says which is kept",
        "eval.engine": "transformers runs classifiers",
        "eval.untuned": "a classifier's head is new: there is no pre-trained one to evaluate",
        "eval.options": "they are for generating text",
        "eval.harness": "lm-evaluation-harness asks language models",
    }
    counts_with = (
        RunConfig.counts_with
        | dict.fromkeys(
            ("data.split", "data.sample_seed"),
            (lambda config: config.nlu.task != "toy_pairs" or config.data.source is not None, "data.source or a task"),
        )
        | {
            "data.revision": (
                lambda config: config.data.reads_hub and (config.nlu.task != "toy_pairs" or bool(config.data.sources)),
                "rows of the hub",
            )
        }
        # not toy.dev_rows, which configs/nlu/toy.yaml sets for whoever takes it with another task
        | dict.fromkeys(
            ("data.toy.label_noise", "data.toy.noisy_labels", "data.toy.imbalance", "data.toy.seed"),
            (lambda config: config.nlu.task == "toy_pairs" and config.data.source is None, "task=toy_pairs"),
        )
        | {
            "regularizers.temperature": (
                lambda config: config.regularizers.consistency_form == "kl",
                "regularizers.consistency_form=kl",
            ),
            "regularizers.diversity_top_k": (
                lambda config: config.regularizers.diversity_form == "entropy",
                "regularizers.diversity_form=entropy",
            ),
            "nlu.heldout_share": (lambda config: config.nlu.selection == "tuned", "nlu.selection=tuned"),
            "features.num_rows": (lambda config: bool(config.features.steps), "features.steps"),
        }
    )

    typed_counts_with = RunConfig.typed_counts_with | {
        **dict.fromkeys(
            ("regularizers.consistency_form", "regularizers.reference_head"),
            RunConfig.typed_counts_with["regularizers.temperature"],
        ),
        "regularizers.diversity_form": RunConfig.typed_counts_with["regularizers.diversity_top_k"],
        "data.split": (lambda config: config.data.reads_hub, "rows of the hub"),
        "data.sample_seed": (
            lambda config: config.data.num_rows is not None and not config.data.class_shares,
            "data.num_rows, or beside data.class_shares",
        ),
        "data.split_seed": (
            lambda config: (
                config.data.dev_share is not None or bool(config.data.class_shares) or config.nlu.selection == "tuned"
            ),
            "data.dev_share, data.class_shares or nlu.selection=tuned",
        ),
        "data.toy.noisy_labels": (lambda config: config.data.toy.label_noise > 0, "data.toy.label_noise"),
    }

    regularizers: NLURegularizersConfig = field(default_factory=NLURegularizersConfig)
    data: NLUDataConfig = field(default_factory=NLUDataConfig)
    nlu: NLUTaskConfig = field(default_factory=NLUTaskConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)

    @property
    def run_name(self) -> str:
        return f"{self.name}-{self.nlu.name}-{self.method}"

    @property
    def data_files(self) -> list[str]:
        return [*super().data_files, *self.data.dev.values()]

    @property
    def definition(self) -> NLUTask:
        """The task. Raises UserError where it is none."""
        return find_task(self.nlu.task)


def section_of(layer: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a mapping within a file's; {} where it is absent or null. Raises UserError for anything else."""
    section = layer.get(name) or {}
    if not isinstance(section, dict):
        raise UserError(f"{name}: {section} is no section: give {name}: {{KEY: VALUE}}")
    return section


def task_layer(base: dict[str, Any], task: str | dict[str, Any] | None) -> dict[str, Any]:
    """Take the `tasks:` map out of a base; return the chosen task's settings and its name, as one layer. `task`: a
    name, or a mapping, which replaces one in the base.

    Raises UserError for a task that does not exist, or that a base with such a map has no settings for.
    """
    tasks, section = section_of(base, "tasks"), section_of(base, "nlu")
    any_task = base.pop("tasks", None) is None
    described = task if isinstance(task, dict) else section.get("task")
    if isinstance(task, dict):
        section.pop("task", None)
        task = None
    if isinstance(described, dict) and task in (None, described.get("name")):
        layer = section_of(tasks, described.get("name"))
        return layer | {"nlu": section_of(layer, "nlu") | {"task": described}}
    task = described if task is None else task
    if not task:
        raise UserError(f"which task? add --task NAME: one of {', '.join(tasks or TASKS)}")
    check_choice("task", task, tuple(TASKS))
    if not any_task and task not in tasks:
        raise UserError(f"this base has no settings for the task {task}: it has {', '.join(tasks)}")
    layer = section_of(tasks, task)
    return layer | {"nlu": section_of(layer, "nlu") | {"task": task}}


def check_nlu(config: NLUConfig) -> None:
    """Raise UserError for NLU settings that are unknown, out of range or do not fit the task."""
    if isinstance(config.nlu.task, str):
        check_choice("task", config.nlu.task, tuple(TASKS))
    task = config.definition
    for metric in task.metrics:
        check_choice("nlu.task.metrics", metric, nlu_metrics())
    if task.hub is None and config.data.source is None and task.name != "toy_pairs":
        raise UserError(f"the task {task.name} has no rows of its own: name them, data.source=FILE")
    check_choice("nlu.selection", config.nlu.selection, ("paper", "tuned"))
    data = config.data
    for name in data.dev:
        check_choice("data.dev", name, tuple(task.dev_sets))
    if data.dev_share is not None and (data.dev or data.source is None):
        other = "data.dev names the dev set" if data.dev else f"{task.name} has a dev set of its own"
        raise UserError(f"data.dev_share={data.dev_share:g} would not be used, {other}: leave data.dev_share out")
    for name in data.class_shares:
        if task.is_regression:
            raise UserError(f"data.class_shares needs classes, and {task.name} is a regression")
        check_choice("data.class_shares", name, task.labels)
        check_range(f"data.class_shares.{name}", data.class_shares[name], "[0, 1]")
    for name in (*config.eval.tasks, *config.eval.data):
        if name == LIKELIHOOD:
            if name not in config.eval.data:
                raise UserError(f"eval.tasks: {name} needs the rows it is measured on: eval.data.{name}=FILE")
            if config.eval.limit is not None:
                raise UserError(f"eval.limit has no effect on {name}, which is of all rows: leave it out")
        elif not task.is_own:
            check_choice("eval.tasks", name, OUT_OF_DOMAIN.get(task.name, ()))
        elif name not in config.eval.data:
            raise UserError(f"eval.tasks: {name} is a set of your own: name its file, eval.data.{name}=FILE")
    for name in data.toy.noisy_labels:
        check_choice("data.toy.noisy_labels", name, find_task("toy_pairs").labels)
    if any(step < 0 for step in config.features.steps):
        raise UserError(f"features.steps={config.features.steps}: steps count from 0")
    if config.nlu.task == "toy_pairs" and data.source is None:
        if data.num_rows is None:
            raise UserError(
                "data.num_rows=null means all rows of a set, and the toy's are made on demand: give a number"
            )
        if data.dev:
            raise UserError(f"data.dev={data.dev} has no effect without data.source: toy_pairs makes its own dev set")


MAX_CLASSES = 1000  # more different labels than that are no classes


def with_labels(config: NLUConfig) -> NLUConfig:
    """Replace `labels: auto` in the config's task by the labels of its training file, sorted; return the config.

    From there on the run has them in its config, whatever becomes of the file. Raises UserError for a set of the hub, a
    file without the column, a row without a label or with several, and for more than MAX_CLASSES.
    """
    task = config.nlu.task
    if not (isinstance(task, dict) and task.get("labels") == AUTO):
        return config
    definition = find_task(task)
    files = [resolve_path(source) for source in config.data.sources]
    if not files or not all(file.is_file() or data_suffix(file) for file in files):
        raise UserError("nlu.task.labels=auto reads the labels from local files: name data.source=FILE, or the labels")
    stats = [file.stat() if file.is_file() else None for file in files]
    state = tuple(
        (str(file), stat and (stat.st_mtime_ns, stat.st_size)) for file, stat in zip(files, stats, strict=True)
    )
    labels = _labels_of(state, definition.label, config.data.split)
    config.nlu.task = task | {"labels": list(labels)}
    return config


@functools.lru_cache(maxsize=64)  # a table reads one config hundreds of times; a changed file is read again
def _labels_of(files: tuple[tuple[str, tuple[int, int] | None], ...], column: str, split: str) -> tuple[str, ...]:
    names = [name for name, _ in files]
    rows, source = stream_rows(names, split=split)
    found: set[str] = set()
    for number, row in enumerate(rows):
        where = f"{source.name}, row {number}"
        if column not in row:
            raise UserError(f"{where} has no column {column} for the label; it has {', '.join(sorted(row))}")
        value = row[column]
        if isinstance(value, list | dict):
            raise UserError(f"{where}: several labels a row are not supported: train one task for each label")
        if not plain_label(value):
            raise UserError(f"{where} has no label: take the row out, or name the labels (nlu.task.labels)")
        found.add(plain_label(value))
        if len(found) > MAX_CLASSES:
            raise UserError(
                f"{source.name}: {column} has more than {MAX_CLASSES} different labels: for numbers give "
                "nlu.task.range, else name another column"
            )
    try:
        if all(math.isfinite(float(name)) for name in found):
            return tuple(sorted(found, key=float))
    except ValueError:  # names, which are sorted as text
        pass
    return tuple(sorted(found))
