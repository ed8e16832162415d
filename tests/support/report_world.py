"""Made-up results with known answers, for the report's tests: ten items, three seeds, methods that end in every way.

Of ten GSM8K items each is solved by `lora` in one seed of three, by `pissa` and `ba_lora` in two: the seed means are
30, 30, 40 and 70, 70, 60 %, and every item's mean differs by exactly a third.
"""

import functools
from collections.abc import Iterable
from pathlib import Path

from ba_lora.experiments.tables import Row
from ba_lora.io import read_json, write_json_atomic, write_jsonl_atomic
from eval.report.columns import ReportColumn
from eval.report.sources import Sources, read_paper, read_results
from eval.report.spec import PlannedRun, TableSpec
from eval.report.table import ReportTable, build_table
from eval.tasks import get_task

SEEDS = (1, 2, 3)
ITEMS = 10
PAPER = """\
table,model,method,setting,task,metric,mean,std,source
known,tiny,lora,,gsm8k,accuracy,34.33,0.5,"paper, table 1"
known,tiny,ba_lora,,gsm8k,accuracy,66.17,,"paper, table 1"
known,tiny,ba_lora,,mbpp,pass@1,12.5,0.25,"paper, table 1"
known,tiny,full_ft,,compute,"hours, more than",24,,"paper, text"
"""


def solved(method: str, seed: int) -> list[float]:
    """Return the grades of the ten items."""
    once = [float(item % 3 == seed % 3) for item in range(ITEMS)]  # each item in one seed of three
    return once if method == "lora" else [1.0 - grade for grade in once]


def result(method: str, seed: int, *, run_id: str, grades: list[float] | None, base: str = "tiny", **changes) -> dict:
    """Return a result as a run leaves it; for changes see `changed`."""
    made = {
        "run_id": run_id,
        "status": "ok",
        "error": None,
        "base": base,
        "method": method,
        "seed": seed,
        "config": {"model": {"dtype": "float32", "quantization": "none"}},
        "model": {"name": base, "revision": "r1"},
        "data": {"sha256": "d1", "rows_used": 100},
        "prompt_hash": "p1",
        "training": {"seconds": 3600.0 * (2 if method == "lora" else 3), "trainable_parameters": 75776},
        "evaluation": {},
        "environment": {"git": {"commit": "c0ffee" * 6, "dirty": False}, "hardware": {"cpu": "x"}, "num_threads": 2},
        "finished_at": "2026-01-01T00:00:00+00:00",
    }
    if grades is not None:
        made["evaluation"]["gsm8k"] = {
            "task": "gsm8k",
            "version": get_task("gsm8k").version,
            "n": len(grades),
            "metrics": {"strict": sum(grades) / len(grades)},
            "partial": False,
            "data_sha256": "t1",
            "prompt_hash": "p1",
            "packages": {},
            "choices": {"setup": "true"},
            "generation": {"engine": "hf", "engine_version": "1", "dtype": "float32", "sampling": {"temperature": 0.0}},
        }
    return changed(made, changes)


def changed(made: dict, changes: dict) -> dict:
    """Return `made` with values set in it; changes: path, its keys joined by "/", → value."""
    for path, value in changes.items():
        *keys, last = path.split("/")
        functools.reduce(dict.__getitem__, keys, made)[last] = value
    return made


class World:
    """A folder of results, run folders and the paper's numbers, and the table over them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "paper").mkdir()
        (folder / "paper" / "known.csv").write_text(PAPER)

    def run(self, method: str, seed: int, *, base: str = "tiny", setting: str = "") -> PlannedRun:
        run_id = "-".join(word for word in (base, method, setting, f"s{seed}") if word)
        return PlannedRun(method, seed, self.folder / "runs" / f"{run_id}.json", self.folder / "outputs" / run_id)

    def add(
        self, method: str, seed: int, *, base: str = "tiny", setting: str = "", grades=..., **changes
    ) -> PlannedRun:
        """Write a run's result and its grades (default: those of `solved`)."""
        run = self.run(method, seed, base=base, setting=setting)
        grades = solved(method, seed) if grades is ... else grades
        write_json_atomic(run.result_path, result(method, seed, run_id=run.run_id, grades=grades, base=base, **changes))
        if grades is not None:
            rows = [
                {"task_id": f"gsm8k/{item}", "sample": 0, "metrics": {"strict": grade}}
                for item, grade in enumerate(grades)
            ]
            write_jsonl_atomic(run.run_path / "grades" / "gsm8k.jsonl", rows)
        return run

    def fill(self) -> None:
        """Add the known runs: lora, pissa, ba_lora done; full_ft once out of memory; dora failed; no loha."""
        for seed in SEEDS:
            for method in ("lora", "pissa", "ba_lora"):
                self.add(method, seed)
            failed = {"status": "failed", "error": "ValueError: no such layer"}
            self.add("dora", seed, grades=None, **failed)
        self.add("full_ft", 1)
        self.add("full_ft", 2)
        self.add("full_ft", 3, grades=None, status="oom", error="OutOfMemoryError: CUDA out of memory")

    def spec(self, **changes) -> TableSpec:
        """Return the known table's spec: GSM8K, its mean with itself, hours."""
        rows = [Row("tiny", method) for method in ("full_ft", "lora", "dora", "loha", "pissa", "ba_lora")]
        columns = (
            ReportColumn("gsm8k", "GSM8K", task="gsm8k", metric="strict", paper=("gsm8k", "accuracy")),
            ReportColumn("average", "Average", mean_of=("gsm8k", "hours"), unit="", scale=1.0, decimals=1),
            ReportColumn(
                "hours",
                "time",
                metric="training.seconds",
                unit="h",
                scale=1 / 3600,
                decimals=1,
                better="lower",
                paper=("compute", "hours"),
            ),  # fmt: skip
        )
        runs = {
            (row, name): tuple(self.run(row.method, seed) for seed in SEEDS)
            for row in rows
            for name in ("gsm8k", "hours")
        }
        fields = {
            "name": "known",
            "title": "A known table",
            "rows": tuple(rows),
            "columns": columns,
            "runs": runs,
            "paper": ("known",),
            "ours": ("ba_lora",),
            "labels": {"ba_lora": "BA-LoRA", "pissa": "PiSSA", "full_ft": "Full FT"},
        }
        return TableSpec(**(fields | changes))

    def sources(self, spec: TableSpec) -> Sources:
        results, hashes = read_results(spec.all_runs())
        return Sources(results, read_paper(spec.paper, renamed=spec.names, folder=self.folder / "paper"), hashes)

    def edit(self, run: PlannedRun, **changes) -> None:
        """Change a run's result; see `changed`."""
        write_json_atomic(run.result_path, changed(read_json(run.result_path), changes))


def build(world: World, *, allow: Iterable[str] = (), config_allows: tuple[str, ...] = (), **changes) -> ReportTable:
    """Return the table of a world; changes: to its spec."""
    spec = world.spec(allow=config_allows, **changes)
    return build_table(spec, world.sources(spec), allow=allow)
