"""A grid whose stages are tests/workers/fake_stage.py: the real scheduling, locks and files, in milliseconds."""

import os
import signal
import sys
from pathlib import Path

import yaml

from ba_lora import paths
from ba_lora.config import schema as config
from ba_lora.experiments import grid, grid_runs, stages
from ba_lora.experiments import plan as grid_plan
from ba_lora.experiments import spec as grid_spec
from ba_lora.experiments import state as grid_state
from ba_lora.experiments.executors.base import Slot
from ba_lora.experiments.executors.local import LocalExecutor
from ba_lora.experiments.tables import load_table
from ba_lora.io import sha256_file

STAGE = [sys.executable, "-I", "-S", str(Path(__file__).with_name("fake_stage.py"))]
TABLE = {
    "title": "Fake",
    "kind": "nlg",
    "seeds": [1, 2, 3],
    "rows": [{"bases": ["toy"], "methods": ["lora"], "settings": {"rank=2": ["adapter.rank=2"], "rank=4": []}}],
    "columns": {"strict": {"task": "toy", "metric": "strict"}, "seconds": {"metric": "training.seconds"}},
}
GRADERS = {"toy": {"version": "1", "hub": None}}


def use(folder):
    """Put all files of runs and grids below `folder`, and the fake stages in the place of the real ones."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["FAKE"] = str(folder)
    paths.PROJECT_ROOT = config.PROJECT_ROOT = grid_spec.PROJECT_ROOT = folder
    grid.GRID_PATH = grid_runs.GRID_PATH = grid_state.GRID_PATH = folder / "outputs" / ".grid"
    grid_runs.training_stage = _training_stage
    grid_runs.evaluation_stages = grid_plan.evaluation_stages = _evaluation_stages
    grid_runs.evaluation_state = grid_state.evaluation_state = lambda config: {
        "training": sha256_file(config.run_path / "train.json"),
        "eval": {"tasks": config.eval.tasks, "limit": config.eval.limit},
    }


def _stage(name, words, run_paths, task=None):
    call = stages.Call(STAGE[-1], settings=tuple(words), launch=tuple(STAGE[:-1]))
    return stages.Stage(name, call, run_paths, task)


def _training_stage(spec, launch, *, overwrite=False):
    return _stage("train", ["train", str(spec.config.run_path)], (spec.config.run_path,))


def _evaluation_stages(configs, *, generate=True):
    paths = [config.run_path for config in configs]
    found = [_stage("generate", ["generate", *map(str, paths)], tuple(paths))] if generate else []
    kinds = {task: "score" if task == "toy" else f"score-{task}" for task in configs[0].eval.tasks}
    return found + [
        _stage(f"score {task}", [kind, str(path)], (path,), task) for path in paths for task, kind in kinds.items()
    ]


def table(folder, *, overrides=(), **changes):
    """Return the fake table, its results below `folder`."""
    path = Path(folder) / "fake.yaml"
    path.write_text(yaml.safe_dump(TABLE | {"overrides": [f"results_dir={folder}/results"]} | changes))
    return load_table(path, overrides=list(overrides))


def run(loaded, *, workers=2, executor=None, graders=GRADERS, say=lambda line: None, **settings):
    """Fill the table, by this machine's workers unless there is another executor; return the grid."""
    if executor is None:
        executor = LocalExecutor([Slot(f"worker {number}", {}) for number in range(workers)])
    filled = grid_runs.Grid(loaded, executor, graders=graders, say=say, **settings)
    filled.run()
    return filled


def fork(loaded, **settings):
    """Start a grid in a process of its own (which has paid for the imports); return its pid. It exits 0 when done."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            run(loaded, **settings)
            status = 0
        except KeyboardInterrupt:
            status = 130
        finally:
            os._exit(status)
    return pid


def ledger(folder):
    """Return "KIND RUN" of every stage that came to its end."""
    path = Path(folder) / "ledger"
    return path.read_text().splitlines() if path.exists() else []
