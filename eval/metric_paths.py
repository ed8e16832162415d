"""Which metrics a score can hold, so that a mistyped one is told before a run is trained for it.

A table's column names a metric of a task's `metrics`, or a dotted path in the task's score (eval/report/columns.py),
such as groups.family.age.metrics.strict; `{a,b}` in it stands for each of the two.
"""

import re
from collections.abc import Sequence

from ba_lora.config.schema import HARNESS
from ba_lora.errors import UserError
from ba_lora.glue import TASKS as GLUE_TASKS
from ba_lora.words import nearest
from eval import inheritance, likelihood, likelihood_nlu
from eval.nlu_scores import CLASS_METRICS
from eval.tasks import TASKS
from eval.tasks.glue import own_sets
from eval.tasks.glue_x import out_of_domain

COUNTS = ("n", "invalid", "num_completions", "num_truncated", "num_prompt_too_long", "num_missing", "timeouts")


def patterns(kind: str, task: str) -> list[tuple[str, str]]:
    """Return (how a metric of the task may be written, what matches it), in a table of a kind (nlg or nlu).

    Raises UserError for an unknown task.
    """
    if task.startswith(HARNESS):  # whose metrics are the harness's
        return [("<metric>", r"[\w.]+")]
    if task == inheritance.NAME:
        names = [*(f"distinct_{n}" for n in (1, 2, 3)), "answer_entropy", "perplexity.before", "perplexity.after"]
        groups: tuple[str, ...] = ()
    elif task == likelihood.NAME:
        names, groups = ["p_right", "p_wrong", "nll", "kl", "ece"], likelihood.GROUPS
        if kind == "nlu":
            names, groups = [*names, "p_wrong_before", "accuracy"], likelihood_nlu.GROUPS
        else:
            names += ["perplexity.before", "perplexity.after"]
            names += [f"cue_gap.{role}" for role in ("corrected", "uncorrected", "tuned", "unseen")]
    elif task in TASKS:
        names, groups = list(TASKS[task].metrics), TASKS[task].groups
    else:
        of_set = [name for name in GLUE_TASKS if task in (*own_sets(name), *out_of_domain(name))]
        if not of_set:
            known = [*TASKS, inheritance.NAME, likelihood.NAME, *(one for name in GLUE_TASKS for one in own_sets(name))]
            raise UserError(f"task {task} is unknown{nearest(task, known)}")
        names = [*dict.fromkeys(metric for name in of_set for metric in GLUE_TASKS[name].metrics), "in_domain", "drop"]
        if labels := dict.fromkeys(label for name in of_set for label in GLUE_TASKS[name].labels):  # no regression
            names += ["nll", *CLASS_METRICS, *(f"per_class.{name}" for name in CLASS_METRICS)]
            names += [f"per_class.recall.{label}" for label in labels]
        groups = ()
    found = [(name, re.escape(name)) for name in (*names, *COUNTS)]
    of_names = "|".join(map(re.escape, names))
    found += [(f"groups.{group}.<member>.metrics.<metric>", rf"groups\.{group}\.[^.]+\.metrics\.({of_names})")
              for group in groups]  # fmt: skip
    found += [("metrics.<metric>", rf"metrics\.({of_names})")]
    if task in TASKS and TASKS[task].judged:
        found.append(("ratings.<name>", r"ratings\.[\w.]+"))
    return found


def check(arguments: Sequence[str]) -> None:
    """Raise UserError where the score will have no such metric; arguments: a table's kind, a task, a metric of it."""
    kind, task, metric = arguments
    known = patterns(kind, task)
    for path in _alternatives(metric):
        if not any(re.fullmatch(pattern, path) for _, pattern in known):
            names = [name for name, _ in known if name not in COUNTS]
            raise UserError(f"metric {metric}: {task} has {', '.join(names)}{nearest(path, names)}")


def _alternatives(path: str) -> list[str]:
    """Return the paths that one with `{a,b}` stands for."""
    found = re.search(r"\{([^}]*)\}", path)
    if found is None:
        return [path]
    return [
        one
        for word in found[1].split(",")
        for one in _alternatives(f"{path[: found.start()]}{word.strip()}{path[found.end() :]}")
    ]
