"""The GLUE tasks, and the self-made one of the same shape: columns, labels, evaluation sets, metrics.

Shared by training data (data/nlu.py), the model's head and the evaluation, so that a label means one thing everywhere.
Label names stand in the order of the ids of `nyu-mll/glue`.
"""

from dataclasses import dataclass

from ba_lora.errors import UserError

HUB = "nyu-mll/glue"
HUB_REVISION = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"


def hub_source(revision: str | None = None) -> str:
    """Return GLUE's name on the hub with the commit that is read: `revision`, else the pinned one."""
    return f"{HUB}@{revision or HUB_REVISION}"


@dataclass(frozen=True)
class GlueTask:
    """One task.

    columns: the text columns, one for single sentences, two for pairs.
    labels: label names by id; empty for regression.
    metrics: names of what is reported, the first one chooses the best epoch.
    dev_sets: name of each evaluation set → its split on the hub; the first one chooses the best epoch.
    score_range: of a regression's labels.
    """

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    dev_sets: dict[str, str]
    score_range: tuple[float, float] | None = None

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def num_labels(self) -> int:
        """The number D of logits: one a class, or one for regression."""
        return max(len(self.labels), 1)


_PAIR = ("sentence1", "sentence2")
TASKS = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), ("matthews",), {"cola": "validation"}),
    "sst2": GlueTask(("sentence",), ("negative", "positive"), ("accuracy",), {"sst2": "validation"}),
    "mrpc": GlueTask(_PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1"), {"mrpc": "validation"}),
    "stsb": GlueTask(_PAIR, (), ("pearson", "spearman"), {"stsb": "validation"}, (0.0, 5.0)),
    "qqp": GlueTask(
        ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1"), {"qqp": "validation"}
    ),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        {"mnli": "validation_matched", "mnli_mm": "validation_mismatched"},
    ),
    "qnli": GlueTask(("question", "sentence"), ("entailment", "not_entailment"), ("accuracy",), {"qnli": "validation"}),
    "rte": GlueTask(_PAIR, ("entailment", "not_entailment"), ("accuracy",), {"rte": "validation"}),
    "wnli": GlueTask(_PAIR, ("not_entailment", "entailment"), ("accuracy",), {"wnli": "validation"}),
    # Not of GLUE: made by data/toy_nlu.py, in MNLI's columns and labels.
    "toy_pairs": GlueTask(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        {"toy_pairs": "test"},
    ),
}


# Task → the sets of GLUE-X on which a model tuned on it is evaluated as it is (eval/tasks/glue_x.py knows how).
OUT_OF_DOMAIN = {
    "sst2": ("imdb", "yelp", "amazon", "flipkart"),
    "cola": ("grammar_test",),
    "mnli": ("mnli_mm", "snli", "sick"),
    "qnli": ("newsqa",),
    "rte": ("mrpc", "qqp", "hans", "scitail"),
    "mrpc": ("qqp", "rte", "hans", "twitter"),
    "qqp": ("mrpc", "rte", "hans", "twitter"),
    "stsb": ("sick",),
}


def find_task(name: str) -> GlueTask:
    """Return the task called `name`. Raises UserError naming the tasks there are."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    return TASKS[name]
