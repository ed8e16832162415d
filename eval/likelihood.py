"""How likely a run holds the right result and the wrong rule's, teacher-forced: sharper than greedy answers.

    python -m eval.likelihood --run RUN [RUN …] --texts FILE.jsonl --task lab [--data FILE] [key=value …]

Of each item, after the prompt and the right worked lines up to the last result:

p_right     probability of the right result, to the end of its line
p_wrong     the same of the result that the wrong rule of the pre-training corpus gives (data/lab.py)
nll         of the whole right response, in nats a token
kl          KL(pre-trained ‖ run) of the distributions at the right response's positions, in nats a position; of
            every so manieth item, `kl_items` of them at most

They are means over items, also by role, family and cue. Of all items together:

ece         expected calibration error (Guo et al. 2017) of the right result's tokens: their most likely token's
            probability against how often it is the right one, in 10 bins
cue_gap     p_wrong with the cue minus without it, by role
perplexity  of FILE.jsonl's texts, `before` and `after` the run

Runs of one base share one start of the model (transformers). Each run gets RUN/scores/likelihood.json and the values
of each item in RUN/grades/likelihood.jsonl. Keys: kl_items (192), trust_remote_code.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ba_lora.config.layers import load_run
from ba_lora.config.schema import UNTUNED
from ba_lora.config.structured import read_typed
from ba_lora.errors import CommandParser, UserError, run_entry_point
from ba_lora.io import sha256_file, write_json_atomic, write_jsonl_atomic
from ba_lora.paths import resolve_data, resolve_path
from ba_lora.prompts import build_prompt, prompt_hash
from ba_lora.runs.card import refresh_run
from eval.inheritance import load_texts, text_perplexity
from eval.options import split_options
from eval.run_models import open_models
from eval.tasks import get_task
from eval.tasks.base import Item, Task, summarise

if TYPE_CHECKING:
    import torch

    from eval.engines.hf import HFEngine

NAME = "likelihood"
VERSION = "1"  # bumped whenever a value changes, of a classifier's likelihood, too
GROUPS = ("role", "family", "cue")
NUM_BINS = 10
EXPECTED_KL = (0.1, 0.5)  # of a tuned model, declared in docs/inheritance.md


@dataclass(frozen=True)
class LikelihoodOptions:
    """What `key=value` can set."""

    kl_items: int = 192
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.kl_items < 1:
            raise UserError("kl_items must be at least 1")


@dataclass
class TeacherForced:
    """What one model gives: of each item its values; of the right results' tokens (confidence, is it right); of the
    items chosen for it the log-probabilities [T, V] at the right response."""

    rows: list[dict[str, float]]
    tokens: list[tuple[float, bool]]
    log_probs: dict[int, "torch.Tensor"]


def measure_model(
    engine: "HFEngine",
    adapter: str | None,
    task: Task,
    items: Sequence[Item],
    reference: TeacherForced | None,
    num_kl: int,
) -> TeacherForced:
    """Measure one model; reference: the pre-trained one, None where this is it."""
    prompts = [build_prompt(item.instruction, template=task.template) for item in items]
    befores = [f" {item.meta['before']}" for item in items]
    chosen = set(range(0, len(items), -(-len(items) // num_kl)))
    found = TeacherForced([{} for _ in items], [], {})
    tokens: dict[int, list[tuple[float, bool]]] = {}
    right = [(prompt, f" {item.meta['response']}") for prompt, item in zip(prompts, items, strict=True)]
    for index, ends, ids_T, log_probs_TV in engine.log_probs(right, adapter=adapter):
        result = _result(ends, befores[index], items[index].meta["right"])
        of_ids_T = log_probs_TV.gather(1, ids_T[:, None])[:, 0].double()
        found.rows[index] = {"p_right": math.exp(of_ids_T[result].sum()), "nll": -float(of_ids_T.mean())}
        confidence_T, best_T = log_probs_TV[result].max(-1)
        is_right_T = best_T == ids_T[result]
        tokens[index] = list(zip(confidence_T.exp().tolist(), is_right_T.tolist(), strict=True))
        if index in chosen:
            kept_TV = found.log_probs[index] = log_probs_TV.clone()
            before_TV = kept_TV if reference is None else reference.log_probs[index]
            found.rows[index]["kl"] = float((before_TV.exp() * (before_TV - kept_TV)).sum(-1).mean())
    found.tokens = [pair for index in sorted(tokens) for pair in tokens[index]]
    wrong = [
        (prompt, f"{before}{item.meta['wrong']}\n")
        for prompt, before, item in zip(prompts, befores, items, strict=True)
    ]
    for index, ends, ids_T, log_probs_TV in engine.log_probs(wrong, adapter=adapter):
        result = _result(ends, befores[index], items[index].meta["wrong"])
        of_ids_T = log_probs_TV.gather(1, ids_T[:, None])[:, 0].double()
        found.rows[index]["p_wrong"] = math.exp(of_ids_T[result].sum())
    return found


def _result(ends: Sequence[int], before: str, result: str) -> slice:
    """Return the tokens of a result and of the line's end after it: those that end behind `before`."""
    line_end = len(before) + len(result) + 1
    first = next(t for t, end in enumerate(ends) if end > len(before))
    last = next((t for t, end in enumerate(ends) if end >= line_end), len(ends) - 1)
    return slice(first, last + 1)


def calibration_error(tokens: Sequence[tuple[float, bool]]) -> float:
    """Return the expected calibration error of (confidence, is right) pairs, in NUM_BINS bins of equal width."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for pair in tokens:
        bins.setdefault(min(int(pair[0] * NUM_BINS), NUM_BINS - 1), []).append(pair)
    gaps = [abs(sum(confidence - is_right for confidence, is_right in members)) for members in bins.values()]
    return sum(gaps) / len(tokens)


def cue_gaps(items: Sequence[Item], rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return role → mean p_wrong of its items with the cue minus that of those without."""
    found: dict[str, dict[str, list[float]]] = {}
    for item, row in zip(items, rows, strict=True):
        found.setdefault(item.meta["role"], {"yes": [], "no": []})[item.meta["cue"]].append(row["p_wrong"])
    means = {role: {cue: sum(of) / len(of) for cue, of in by.items() if of} for role, by in found.items()}
    return {role: of["yes"] - of["no"] for role, of in means.items() if len(of) == 2}


def main() -> None:
    parser = CommandParser(
        prog="python -m eval.likelihood", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", nargs="+", required=True, help="run folders")
    parser.add_argument("--texts", required=True, type=Path, help='jsonl of {"text"}, for perplexity')
    parser.add_argument("--task", required=True, help="lab")
    parser.add_argument("--data", help="the task's data")
    parser.add_argument("options", nargs="*", metavar="key=value")
    parsed = parser.parse_intermixed_args()
    (runs,), moved = split_options(parsed.run)
    options, _ = read_typed(LikelihoodOptions, [*parsed.options, *moved])
    texts_path, task = resolve_path(parsed.texts), get_task(parsed.task)
    texts = load_texts(texts_path)
    items, source = task.load(resolve_data(parsed.data) if parsed.data else None)
    if any("before" not in item.meta for item in items):
        raise UserError(f"{task.name} has no wrong rule: its items must tell before, right and wrong, as lab's do")
    sha256 = [sha256_file(texts_path), source.as_result()]
    for one in open_models([Path(run) for run in runs], seed=0, trust_remote_code=options.trust_remote_code):
        if one.path is None:
            reference = measure_model(one.engine, None, task, items, None, options.kl_items)
            before = text_perplexity(one.engine.nll(texts))
            continue
        is_reference = one.config.method == UNTUNED and one.config.model.quantization == "none"
        found = reference if is_reference else measure_model(
            one.engine, one.adapter, task, items, reference, options.kl_items
        )  # fmt: skip
        after = before if is_reference else text_perplexity(one.engine.nll(texts, adapter=one.adapter))
        score: dict[str, Any] = {
            "task": NAME,
            "version": VERSION,
            "n": len(items),
            "invalid": 0,
            **summarise(items, found.rows, groups=GROUPS),
            "ece": calibration_error(found.tokens),
            "cue_gap": cue_gaps(items, found.rows),
            "perplexity": {"before": before, "after": after},
            "base_sha256": base_hash(one.config.model.name),
            "data_sha256": sha256,
            "prompt_hash": prompt_hash(template=task.template),
            "generation": {"engine": one.engine.kind, "engine_version": one.engine.version, "dtype": one.engine.dtype},
        }
        lines = [
            {"task_id": item.task_id, "metrics": row, "groups": {key: item.meta[key] for key in GROUPS}}
            for item, row in zip(items, found.rows, strict=True)
        ]
        write_jsonl_atomic(one.path / "grades" / f"{NAME}.jsonl", lines)
        write_json_atomic(one.path / "scores" / f"{NAME}.json", score)
        refresh_run(one.path, load_run(one.path))
        means, roles = score["metrics"], score["groups"]["role"]
        wrong = ", ".join(f"{role} {100 * of['metrics']['p_wrong']:.1f} %" for role, of in roles.items())
        told = f"{means['kl']:.3f} nats a position{'' if is_reference else beside_expected(means['kl'])}"
        print(
            f"{one.path.name}: p(wrong rule) {wrong}; p(right) {100 * means['p_right']:.1f} %; KL to the pre-trained "
            f"model {told}",
            file=sys.stderr,
        )


def beside_expected(kl: float) -> str:
    """Return where the KL of a tuned model lies beside what was expected, to be appended."""
    low, high = EXPECTED_KL
    place = "below" if kl < low else "above" if kl > high else "within"
    return f", {place} the expected {low:g} to {high:g}"


def base_hash(name: str) -> str | None:
    """Return the sha256 of a pre-trained model's weights where it is a folder with one file of them."""
    weights = resolve_path(name) / "model.safetensors"
    return sha256_file(weights) if weights.is_file() else None


if __name__ == "__main__":
    run_entry_point(main)
