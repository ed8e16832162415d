"""Runs whose answers are known, in the files that training, generation, scoring and judging really leave.

The words of `HOSTILE` would do something in a page that parsed them; each is a completion of some run.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ba_lora.config.layers import load_config
from ba_lora.config.schema import to_yaml
from ba_lora.io import write_json_atomic, write_jsonl_atomic, write_text_atomic
from ba_lora.prompts import build_conversation, build_prompt
from eval.judge.store import short_sha256
from eval.scoring import ScoreOptions, score_file
from eval.tasks import get_task
from tests.conftest import ROOT

SEEDS = (1, 2)
ITEMS = 40
STOLEN = "document.documentElement.dataset.stolen = 'yes'"
HOSTILE = (
    f"<script>{STOLEN}</script>",
    f'<img src=x onerror="{STOLEN}">',
    f"<svg/onload={STOLEN}>",
    f'</pre></div><iframe srcdoc="<script>parent.{STOLEN}</script>"></iframe>',
    f'<a href="javascript:{STOLEN}">click</a>',
    f"'); {STOLEN}; ('",
    f"\\'); {STOLEN}; //",
    f"`${{{STOLEN}}}`",
    "{{ 7 * 7 }} {% raw %} ${7*7} <%= 7*7 %>",
    "\u202eright to left\u202c \u2066isolated\u2069 \u200bzero\ufeff width",
    "\x00\x01\x1b[31mred\x1b[0m\x07 \x7f \x85 \u2028line\u2029paragraph",
    "</script><script>take('page', '{}')</script>",
    "]]><!--",
    '{"__proto__": {"stolen": "yes"}}',
    "é́́ Ω ü 漢字 🙂 👩‍👩‍👧 \ud800",
    "x" * 1_000_000,
    "",
)


def write_run(folder: Path, *overrides: str, method: str, base: str = "nlg/toy", task: str | None = None) -> Path:
    """Write the config, log and train.json of a finished run into `folder`."""
    config = load_config(ROOT / f"configs/{base}.yaml", method=method, task=task, overrides=list(overrides))
    write_text_atomic(folder / "config.yaml", to_yaml(config))
    log = [
        {
            "step": step,
            "loss": 2.0 / step + config.seed / 10,
            "task": 1.9 / step,
            "consistency": 0.1,
            "share_consistency": 0.05,
            "share_svd": 0.02 * step / 10,
            "learning_rate": 1e-3,
            "epoch": 1,
        }
        for step in range(1, 11)
    ]
    write_jsonl_atomic(folder / "log.jsonl", log)
    training = {"seconds": 60.0 + config.seed, "tokens_per_second": 5000.0, "steps": 10, "peak_memory_mb": 700.0}
    environment = {
        "command": f"train_nlg.py --config configs/{base}.yaml --method {method} seed={config.seed}",
        "python": "3.11.7",
        "packages": {"torch": "2.13.0"},
        "git": {"commit": "c0ffee", "dirty": True},
        "hardware": {"gpu": None},
        "num_threads": 2,
    }
    facts = {"status": "ok", "error": None, "finished_at": "2026-01-01T00:00:00+00:00"}
    facts |= {"model": {"name": "tiny", "revision": None}, "data": {"sha256": "d1", "rows_used": 100}}
    write_json_atomic(folder / "train.json", facts | {"training": training, "environment": environment})
    return folder


def answer(
    folder: Path, task: str, lines: Sequence[dict], *, data: str | None = None, template: str = "alpaca"
) -> None:
    """Write completions and what made them."""
    meta = {"task": task, "template": template, "engine": "hf", "prompt_hash": "p1"} | ({"data": data} if data else {})
    path = folder / "completions" / f"{task}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))  # escaped: lone surrogates come from there
    write_json_atomic(folder / "completions" / f"{task}.meta.json", meta)


def toy_run(
    folder: Path,
    method: str,
    seed: int,
    *,
    completion: Callable[[int, str], str],
    items: int = ITEMS,
    overrides: Sequence[str] = (),
) -> Path:
    """A run whose answer to a toy item with the gold G is completion(place, G), scored by eval.score."""
    write_run(folder, f"seed={seed}", *overrides, method=method)
    data = ROOT / "data" / "toy" / "test.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()[:items]]
    own = folder.parent / "test.jsonl"
    if not own.is_file():
        own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [
        {
            "task_id": f"toy/{place}",
            "sample": 0,
            "prompt": build_prompt(row["query"]),
            "completion": completion(place, str(row["answer"])),
            "finish_reason": "length" if place % 10 == 9 else "stop",
        }
        for place, row in enumerate(rows)
    ]
    answer(folder, "toy", lines, data=str(own))
    score_file(get_task("toy"), folder / "completions" / "toy.jsonl", options=ScoreOptions())
    return folder


def solved(method: str, seed: int, place: int) -> bool:
    """Whether a run answers an item right: LoRA every third in some seed, the other method the rest."""
    return (place % 3 == seed % 3) == (method == "lora")


def toy_world(folder: Path) -> Path:
    """Two methods of two seeds; in the second one's first seed every fourth answer is hostile."""
    for method in ("lora", "ba_lora"):
        for seed in SEEDS:

            def completion(place: int, gold: str, method: str = method, seed: int = seed) -> str:
                if method == "ba_lora" and seed == 1 and place < len(HOSTILE):
                    return HOSTILE[place]
                text = f" Step {place}: $\\frac{{1}}{{2}}$ <b>bold</b>\n"
                return f"{text}The answer is: {gold if solved(method, seed, place) else 'nobody knows'}"

            toy_run(folder / f"toy-{method}-s{seed}", method, seed, completion=completion)
    return folder


def code_run(folder: Path) -> Path:
    """Three answers to HumanEval, with the grades that its sandbox writes: passed, failed, no program."""
    write_run(folder, "seed=1", "eval.tasks=[humaneval]", method="pissa")
    kinds = (("passed", 1.0), ("failed: AssertionError: 1 != 2", 0.0), (None, 0.0))
    lines = [
        {
            "task_id": f"HumanEval/{place}",
            "sample": 0,
            "prompt": build_prompt(f"Complete function {place}", template="alpaca_code_block"),
            "completion": f"def f{place}():\n    return {place}\n```",
            "finish_reason": "stop",
        }
        for place in range(3)
    ]
    answer(folder, "humaneval", lines, template="alpaca_code_block")
    grades = [
        {
            "task_id": f"HumanEval/{place}",
            "sample": 0,
            "metrics": {"strict": 0.0, "pass@1": value},
            "extracted": {
                "program": outcome and f"def f{place}():\n    return {place}\n",
                "outcome": outcome,
                "strict_outcome": "failed: SyntaxError",
            },
            "gold": "    return 0",
            "invalid": outcome is None,
        }
        for place, (outcome, value) in enumerate(kinds)
    ]
    write_jsonl_atomic(folder / "grades" / "humaneval.jsonl", grades)
    score = {"task": "humaneval", "version": get_task("humaneval").version, "n": 3, "invalid": 1}
    write_json_atomic(folder / "scores" / "humaneval.json", score | {"metrics": {"strict": 0.0, "pass@1": 1 / 3}})
    return folder


def judged_run(folder: Path) -> Path:
    """A question of MT-Bench with two turns, each judged twice."""
    write_run(folder, "seed=1", "eval.tasks=[mt_bench]", method="full_ft", base="nlg/toy")
    turns, answers = ["Write a haiku.", "Now a limerick."], ["Old pond", "There was a young lady"]
    prompts = [build_conversation(turns[: n + 1], answers[:n]) for n in range(2)]
    lines = [
        {"task_id": f"mt_bench/81/turn{n + 1}", "sample": 0, "prompt": prompts[n], "completion": f" {answers[n]} "}
        for n in range(2)
    ]
    answer(folder, "mt_bench", lines)
    judgements = [
        {
            "question_id": 81,
            "turn": turn,
            "answer_hash": short_sha256("\0".join(answers[:turn])),
            "judge": "judge-1",
            "judge_version": "v1",
            "index": index,
            "judgement": f"Turn {turn} was judged. [[{6 + turn + index}]]",
        }
        for turn in (1, 2)
        for index in (0, 1)
    ]
    write_jsonl_atomic(folder / "judgements" / "mt_bench.jsonl", judgements)
    grades = [
        {
            "task_id": f"mt_bench/81/turn{turn}",
            "sample": 0,
            "metrics": {"rating": (6.5 + turn) / 10},
            "extracted": {"ratings": f"{6 + turn} {7 + turn}"},
            "gold": None,
            "invalid": False,
            "groups": {"category": "writing", "turn": str(turn)},
        }
        for turn in (1, 2)
    ]
    write_jsonl_atomic(folder / "grades" / "mt_bench.jsonl", grades)
    score = {"task": "mt_bench", "version": get_task("mt_bench").version, "n": 2, "invalid": 0}
    write_json_atomic(
        folder / "scores" / "mt_bench.json", score | {"metrics": {"rating": 0.8}, "judge": {"id": "judge-1"}}
    )
    return folder


def classified_run(folder: Path) -> Path:
    """Predictions on four rows of SST-2, whose text lies in a file that the run names."""
    rows = [{"sentence": f"film {n} is {'good' if n % 2 else 'bad'}", "label": n % 2, "idx": n} for n in range(4)]
    data = folder.parent / "sst2.jsonl"
    write_jsonl_atomic(data, rows)
    write_run(
        folder, "seed=1", f"data.source={data}", f"data.dev.sst2={data}", method="lora", base="nlu/minilm", task="sst2"
    )
    lines = [{"task_id": f"sst2/{n}", "label": n % 2, "prediction": 1, "logits": [0.0, float(n)]} for n in range(4)]
    write_jsonl_atomic(folder / "predictions" / "best.jsonl", lines)
    score = {"task": "sst2", "of_task": "sst2", "version": "1", "n": 4, "invalid": 0, "metrics": {"accuracy": 0.5}}
    write_json_atomic(folder / "scores" / "sst2.json", score)
    return folder
