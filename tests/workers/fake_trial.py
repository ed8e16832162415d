"""A training for the tests of searches: it writes in milliseconds what a real one leaves, its losses a function of its
settings; and a whole search over such trainings.

    python fake_trial.py train RUN key=value …         FAKE_FAIL=WORD: trainings with this word fail
                                                   FAKE_NAN=WORD: the last loss of these is not finite
    python fake_trial.py search CONFIG SPACE …         what sh scripts/search.sh would do
"""

import json
import math
import os
import sys
import time
import types
from pathlib import Path

STEPS = 4


def train(run_path: Path, words: list[str]) -> int:
    settings = dict(word.split("=", 1) for word in words)
    if (word := os.environ.get("FAKE_FAIL")) and word in words:
        print("error: loss is not finite at step 3: lower trainer.learning_rate", file=sys.stderr)
        return 2
    distance = abs(math.log10(float(settings.get("trainer.learning_rate", 1e-3))) + 2.5)
    distance += abs(int(settings.get("adapter.rank", 8)) - 16) / 32 + float(settings.get("adapter.dropout", 0))
    run_path.mkdir(parents=True, exist_ok=True)
    with open(run_path / "trainings.txt", "a") as file:
        file.write("started\n")
    lines = []
    for step in range(1, STEPS + 1):
        time.sleep(float(os.environ.get("FAKE_SECONDS", 0.01)) / STEPS)
        if (run_path / "stop").exists():
            return 130
        lines.append({"step": step, "max_steps": STEPS, "eval_task": distance + 1 / step + int(settings["seed"]) / 100})
        if step == STEPS and os.environ.get("FAKE_NAN") in words:
            lines[-1]["eval_task"] = None
        (run_path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run_path / "adapter").mkdir()
    training = {"seconds": 0.1, "steps": STEPS, "peak_memory_mb": 1.0, "trainable_parameters": 10}
    (run_path / "train.json").write_text(json.dumps({"status": "ok", "training": training}))
    return 0


def search(words: list[str]) -> None:
    from ba_lora.errors import run_entry_point
    from ba_lora.experiments.search import main as command

    use()
    command.subprocess = types.SimpleNamespace(run=lambda *_, **__: types.SimpleNamespace(returncode=0))  # no report
    sys.argv = ["search", *words]
    run_entry_point(command.main, resumes=True)


def use() -> None:
    """Put the fake training in the place of the real one, for this process."""
    from ba_lora.experiments import stages
    from ba_lora.experiments.search import loop

    def stage(spec, launch):
        words = [*spec.overrides]
        call = stages.Call(
            __file__, settings=("train", str(spec.config.run_path), *words), launch=(sys.executable, "-I", "-S")
        )
        return stages.Stage("train", call, (spec.config.run_path,))

    loop.training_stage = stage
    loop.is_trained = lambda path, config: (path / "train.json").is_file() and (path / "adapter").is_dir()


if __name__ == "__main__":
    if sys.argv[1] == "train":
        sys.exit(train(Path(sys.argv[2]), sys.argv[3:]))
    search(sys.argv[2:])
