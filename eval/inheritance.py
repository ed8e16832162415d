"""What a run has kept of its pre-trained model, and what it has lost: drift and diversity.

    python -m eval.inheritance --run RUN [RUN …] --texts FILE.jsonl --task toy [--data FILE] [key=value …]

drift      perplexity on texts of the pre-training distribution (FILE.jsonl: {"text"} a line), of the pre-trained model
           (`before`) and of the tuned one (`after`): exp of the mean negative log-likelihood a token, BOS left out
diversity  `num_samples` completions of each of the task's first `num_prompts` items, drawn at `temperature`:
           distinct-n, the share of different n-grams of words among all n-grams of an item's samples (Li et al. 2016),
           and the entropy in nats of an item's extracted answers, in whatever form they come (those that cannot be read
           count as one answer); each is a mean over items. `n` counts items, `invalid` samples without an answer

Of a quantised base `before` is the unquantised model's, `after` that of merged/, which is the model that was trained:
the two differ by the quantisation and by the training.

Runs of one base share one start of the model (transformers, whatever engine scored the run: vLLM gives no
likelihoods). Each run gets RUN/scores/inheritance.json and, for paired tests, RUN/grades/inheritance.jsonl with the
measures of each item and inheritance_texts.jsonl with {"task_id", "nll", "num_tokens"} of each text.
Keys: num_prompts (48), num_samples (6), temperature (1.0), seed, trust_remote_code.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ba_lora.config.layers import load_run
from ba_lora.config.schema_nlg import NLGConfig
from ba_lora.config.structured import read_typed
from ba_lora.errors import CommandParser, UserError, run_entry_point
from ba_lora.io import read_jsonl, sha256_file, write_json_atomic, write_jsonl_atomic
from ba_lora.paths import resolve_data, resolve_path
from ba_lora.prompts import build_prompt, prompt_hash
from ba_lora.runs.card import refresh_run
from eval.engines.base import Engine
from eval.options import split_options
from eval.run_models import open_models
from eval.tasks import get_task
from eval.tasks.base import Item, Task

NAME = "inheritance"
VERSION = "1"  # bumped whenever a value changes
MAX_EXPONENT = math.log(sys.float_info.max)


@dataclass(frozen=True)
class InheritanceOptions:
    """What `key=value` can set."""

    num_prompts: int = 48
    num_samples: int = 6
    temperature: float = 1.0
    seed: int = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.num_prompts < 1 or self.num_samples < 2 or self.temperature <= 0:
            raise UserError("num_prompts must be at least 1, num_samples at least 2, temperature above 0")


@dataclass(frozen=True)
class Material:
    """What runs are measured with: texts of the pre-training distribution, and a task's items."""

    texts: list[str]
    task: Task
    items: list[Item]
    data_sha256: list[object]


@dataclass(frozen=True)
class Measures:
    """What is measured of a run: its score, and the lines of its items and texts."""

    score: dict[str, Any]
    items: list[dict[str, Any]]
    texts: list[dict[str, Any]]


def distinct_n(samples: Sequence[str], n: int) -> float:
    """Return the share of different n-grams of words among all n-grams of the samples; 0 where there is none."""
    grams: Counter[tuple[str, ...]] = Counter()
    for sample in samples:
        words = sample.split()
        grams.update(tuple(words[start : start + n]) for start in range(len(words) - n + 1))
    return len(grams) / grams.total() if grams else 0.0


def answer_entropy(answers: Sequence[str | None]) -> float:
    """Return the entropy of the answers' empirical distribution in nats."""
    shares = [count / len(answers) for count in Counter(answers).values()]
    return -sum(share * math.log(share) for share in shares)


def load_texts(path: Path) -> list[str]:
    """Read the texts of a jsonl file. Raises UserError for a file that is missing, or has no texts."""
    rows = read_jsonl(path)
    if not all(isinstance(row.get("text"), str) and row["text"] for row in rows):
        raise UserError(f'{path}: every line must be {{"text": "…"}}')
    return [row["text"] for row in rows]


def load_material(texts_path: Path, task_name: str, data: str | None, options: InheritanceOptions) -> Material:
    """Read texts and items. Raises UserError for a file that is missing, or has no texts."""
    texts = load_texts(texts_path)
    task = get_task(task_name)
    items, source = task.load(data)
    return Material(
        texts=texts,
        task=task,
        items=task.select(items)[: options.num_prompts],
        data_sha256=[sha256_file(texts_path), source.as_result()],
    )


def measure_runs(
    run_paths: Sequence[Path], material: Material, options: InheritanceOptions
) -> Iterator[tuple[Path, Measures]]:
    """Yield (run folder, measures) as they are done; see `open_models`."""
    before = None
    for one in open_models(run_paths, seed=options.seed, trust_remote_code=options.trust_remote_code):
        if one.path is None:
            before = text_perplexity(one.engine.nll(material.texts))
        else:
            yield one.path, _measure(one.engine, one.adapter, one.config, before, material, options)


def text_perplexity(nll: Sequence[tuple[float, int]]) -> float | None:
    """Return exp of the mean over all texts' tokens; None where a diverged model has no finite one."""
    mean = math.fsum(total for total, _ in nll) / sum(count for _, count in nll)
    return math.exp(mean) if mean < MAX_EXPONENT else None


def _measure(
    engine: Engine,
    adapter: str | None,
    config: NLGConfig,
    before: float | None,
    material: Material,
    options: InheritanceOptions,
) -> Measures:
    task = material.task
    sampling = {name: value for name, value in vars(options).items() if name != "trust_remote_code"}
    nll = engine.nll(material.texts, adapter=adapter)
    completions = engine.generate(
        [build_prompt(item.instruction, template=task.template) for item in material.items],
        adapter=adapter,
        max_new_tokens=task.max_new_tokens,
        stop=tuple(task.stop),
        temperature=options.temperature,
        num_samples=options.num_samples,
        seed=options.seed,
    )
    samples = [[completion.text for completion in one] for one in completions]
    grades = [[task.grade(item, text) for text in texts] for item, texts in zip(material.items, samples, strict=True)]
    answers = [[grade.extracted.get("flexible", grade.extracted.get("strict")) for grade in one] for one in grades]
    of_items = [
        {f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3)} | {"answer_entropy": answer_entropy(one)}
        for texts, one in zip(samples, answers, strict=True)
    ]
    means = {name: sum(measures[name] for measures in of_items) / len(of_items) for name in of_items[0]}
    score = {
        "task": NAME,
        "version": VERSION,
        "n": len(samples),
        "invalid": sum(answer is None for one in answers for answer in one),
        "answer_entropy": means.pop("answer_entropy"),
        "metrics": means,
        "perplexity": {"before": before, "after": text_perplexity(nll), "num_tokens": sum(count for _, count in nll)},
        "data_sha256": material.data_sha256,
        "prompt_hash": prompt_hash(template=task.template),
        "generation": {
            "engine": engine.kind,
            "engine_version": engine.version,
            "dtype": engine.dtype,
            "template": task.template,
            "sampling": {**sampling, "max_new_tokens": task.max_new_tokens, "items_of": task.name},
        },
    }
    items = [
        {"task_id": item.task_id, "metrics": measures} for item, measures in zip(material.items, of_items, strict=True)
    ]
    texts = [
        {"task_id": f"text/{index}", "nll": total if math.isfinite(total) else None, "num_tokens": count}
        for index, (total, count) in enumerate(nll)
    ]
    return Measures(score, items, texts)


def main() -> None:
    parser = CommandParser(
        prog="python -m eval.inheritance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", nargs="+", required=True, help="run folders")
    parser.add_argument("--texts", required=True, type=Path, help='jsonl of {"text"}: the pre-training distribution')
    parser.add_argument("--task", required=True, help="whose items are sampled")
    parser.add_argument("--data", help="the task's data; default: its own")
    parser.add_argument("options", nargs="*", metavar="key=value")
    parsed = parser.parse_intermixed_args()
    (runs,), moved = split_options(parsed.run)
    options, _ = read_typed(InheritanceOptions, [*parsed.options, *moved])
    run_paths = [Path(run) for run in runs]
    data = resolve_data(parsed.data) if parsed.data else None
    material = load_material(resolve_path(parsed.texts), parsed.task, data, options)
    for path, measures in measure_runs(run_paths, material, options):
        score = measures.score
        write_jsonl_atomic(path / "grades" / f"{NAME}.jsonl", measures.items)
        write_jsonl_atomic(path / "grades" / f"{NAME}_texts.jsonl", measures.texts)
        write_json_atomic(path / "scores" / f"{NAME}.json", score)
        refresh_run(path, load_run(path))
        before, after = (_shown(score["perplexity"][name]) for name in ("before", "after"))
        print(
            f"{path.name}: perplexity {before} → {after}, distinct-2 {score['metrics']['distinct_2']:.3f}, "
            f"answer entropy {score['answer_entropy']:.3f}",
            file=sys.stderr,
        )


def _shown(perplexity: float | None) -> str:
    return "not finite" if perplexity is None else f"{perplexity:.3f}"


if __name__ == "__main__":
    run_entry_point(main)
