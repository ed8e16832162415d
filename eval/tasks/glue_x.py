"""GLUE-X: the sets of another domain on which a model tuned on a GLUE task is evaluated as it is, with the label maps.

Sources: the paper's tables of BERT-large and GPT-2-XL; Yang et al. 2023, GLUE-X, and its released code.
Rules of that release that are kept: Flipkart's neutral reviews count as negative; Amazon's titles are not read; an
equivalent or duplicate pair is an entailment for RTE, whose label order is the other way round, and the reverse; HANS'
and SciTail's second class is not_entailment; of SICK, relatedness − 1 is STS-B's score.
Changed: SICK's relatedness is not rounded to a whole number, which would throw away the order within it. (It is not
stretched from [0, 4] to STS-B's [0, 5] either: correlations do not depend on that.)

Splits: all labelled ones together, as in the release, but the test split only of IMDB, Yelp and Amazon: only then is
SNLI the largest set, as the paper says.

SICK, HANS and SciTail are not pinned: they are read from refs/convert/parquet, a branch that the hub may write again.
The commit that was read is recorded with each score, and a report refuses to mix two. All others are pinned to commits.

Unverified here: the columns of Flipkart on the hub. Grammar test, NewsQA in QNLI's form and Twitter (PIT-2015) are
files of the GLUE-X release and not on the hub.
"""

import dataclasses
from collections.abc import Mapping

from ba_lora.errors import UserError
from ba_lora.glue import find_task, plain_label
from eval.tasks.glue import EvaluationSet, ScoreColumn, class_names, own_sets, set_of

_SENTIMENT = class_names(("negative", "positive"))
_ENTAILMENT = {**class_names(("entailment", "not_entailment")), "non-entailment": "not_entailment"}
_NLI = class_names(("entailment", "neutral", "contradiction"))
_ON_PARQUET_BRANCH = "refs/convert/parquet"  # the hub's conversion of sets whose main branch is a script; it may move

_LABELLED_SPLITS = {"mrpc": "train+validation", "qqp": "train+validation", "rte": "train+validation"}

SETS = {
    of.name: of
    for of in (
        EvaluationSet(
            "imdb",
            (("text",), ("sentence",)),
            _SENTIMENT,
            hub="stanfordnlp/imdb",
            revision="e6281661ce1c48d982bc483cf8a173c1bbeb5d31",
        ),
        EvaluationSet(
            "yelp",
            (("text",), ("sentence",)),
            _SENTIMENT,
            hub="fancyzhx/yelp_polarity",
            revision="bbf1c97a1f0cf005e5aded43839fd814654a1557",
        ),
        EvaluationSet(
            "amazon",
            (("content",), ("sentence",)),
            _SENTIMENT,
            hub="fancyzhx/amazon_polarity",
            revision="9d9c45c18f8c3cf1b23a3c27917b60cbf28f3289",
        ),
        EvaluationSet(
            "flipkart",
            (("Summary",), ("input",), ("sentence",)),
            {name: name for name in ("negative", "neutral", "positive")},
            labels=("Sentiment", "output", "label"),
            hub="KayEe/flipkart_sentiment_analysis",
            revision="7c2b576a31e2fb7016f89e54e67755e37d9ead9e",
            split="train+test",
        ),
        EvaluationSet("grammar_test", (("sentence",),), class_names(("unacceptable", "acceptable"))),
        EvaluationSet(
            "snli",
            (("premise", "hypothesis"), ("sentence1", "sentence2")),
            _NLI,
            labels=("label", "gold_label"),
            hub="stanfordnlp/snli",
            revision="cdb5c3d5eed6ead6e5a341c8e56e669bb666725b",
            split="train+validation+test",
        ),
        EvaluationSet(
            "sick",
            (("sentence_A", "sentence_B"),),
            _NLI,
            labels=("label", "entailment_label"),
            hub="RobZamp/sick",
            revision=_ON_PARQUET_BRANCH,
            split="train+validation+test",
        ),
        EvaluationSet("newsqa", (("question", "sentence"),), _ENTAILMENT),
        EvaluationSet(
            "hans",
            (("premise", "hypothesis"), ("sentence1", "sentence2")),
            _ENTAILMENT,
            labels=("label", "gold_label"),
            hub="jhu-cogsci/hans",
            config="plain_text",
            revision=_ON_PARQUET_BRANCH,
            split="train+validation",
        ),
        EvaluationSet(
            "scitail",
            (("premise", "hypothesis"), ("sentence1", "sentence2")),
            {"entails": "entailment", "entailment": "entailment", "neutral": "not_entailment"},
            labels=("label", "gold_label"),
            hub="allenai/scitail",
            config="tsv_format",
            revision=_ON_PARQUET_BRANCH,
            split="train+validation+test",
        ),
        EvaluationSet(
            "twitter",
            (("Sent_1", "Sent_2"), ("sentence1", "sentence2")),
            class_names(("not_paraphrase", "paraphrase")),
            labels=("Label", "label"),
        ),
    )
}

_SAME_SENTIMENT = {"negative": "negative", "positive": "positive"}
_SAME_NLI = {"entailment": "entailment", "neutral": "neutral", "contradiction": "contradiction"}
_SAME_ENTAILMENT = {"entailment": "entailment", "not_entailment": "not_entailment"}
_ENTAILED_IS_EQUIVALENT = {"entailment": "equivalent", "not_entailment": "not_equivalent"}
_ENTAILED_IS_DUPLICATE = {"entailment": "duplicate", "not_entailment": "not_duplicate"}

# task → its out-of-domain sets → the set's class → the task's class
LABEL_MAPS: dict[str, dict[str, Mapping[str, str]]] = {
    "sst2": {
        "imdb": _SAME_SENTIMENT,
        "yelp": _SAME_SENTIMENT,
        "amazon": _SAME_SENTIMENT,
        "flipkart": {**_SAME_SENTIMENT, "neutral": "negative"},
    },
    "cola": {"grammar_test": {"unacceptable": "unacceptable", "acceptable": "acceptable"}},
    "mnli": {"mnli_mm": _SAME_NLI, "snli": _SAME_NLI, "sick": _SAME_NLI},
    "qnli": {"newsqa": _SAME_ENTAILMENT},
    "rte": {
        "mrpc": {"equivalent": "entailment", "not_equivalent": "not_entailment"},
        "qqp": {"duplicate": "entailment", "not_duplicate": "not_entailment"},
        "hans": _SAME_ENTAILMENT,
        "scitail": _SAME_ENTAILMENT,
    },
    "mrpc": {
        "qqp": {"duplicate": "equivalent", "not_duplicate": "not_equivalent"},
        "rte": _ENTAILED_IS_EQUIVALENT,
        "hans": _ENTAILED_IS_EQUIVALENT,
        "twitter": {"paraphrase": "equivalent", "not_paraphrase": "not_equivalent"},
    },
    "qqp": {
        "mrpc": {"equivalent": "duplicate", "not_equivalent": "not_duplicate"},
        "rte": _ENTAILED_IS_DUPLICATE,
        "hans": _ENTAILED_IS_DUPLICATE,
        "twitter": {"paraphrase": "duplicate", "not_paraphrase": "not_duplicate"},
    },
    "stsb": {"sick": {}},
}
_SCORES = {"sick": ScoreColumn(("relatedness_score",), 1.0, 5.0, offset=-1.0)}


def out_of_domain(task: str) -> list[str]:
    """Return the names of the task's out-of-domain sets; none for WNLI and the self-made task."""
    found = find_task(task)
    return list(found.sets) if found.is_own else list(LABEL_MAPS.get(task, {}))


def find_set(task: str, name: str) -> tuple[EvaluationSet, Mapping[str, str]]:
    """Return the set called `name` and its label map for `task`: the task's own dev sets, or an out-of-domain one.

    Raises UserError for a set that has no label map for this task.
    """
    own, found = own_sets(task), find_task(task)
    if found.is_own:  # a set that the task says nothing of has its own columns and labels
        label_map = found.sets.get(name, {}).get("map") or {label: label for label in found.labels}
        return own.get(name) or set_of(found, name), {plain_label(a): plain_label(b) for a, b in label_map.items()}
    if name in LABEL_MAPS.get(task, {}):
        return _as_out_of_domain(task, name), LABEL_MAPS[task][name]
    if name in own:
        return own[name], {label: label for label in find_task(task).labels}
    known = dict.fromkeys([*own, *out_of_domain(task)])
    raise UserError(
        f"there is no label map from {name} to the classes of {task}: its sets are {', '.join(known)} (a set of other "
        f"labels needs an entry in eval/tasks/glue_x.py)"
    )


def _as_out_of_domain(task: str, name: str) -> EvaluationSet:
    if name in SETS:
        score = _SCORES[name] if find_task(task).is_regression else None
        return dataclasses.replace(SETS[name], score=score)
    owner = "mnli" if name == "mnli_mm" else name
    of = own_sets(owner)[name]
    return dataclasses.replace(of, split=_LABELLED_SPLITS.get(name, of.split))
