"""Kill train_nlg.py or train_nlu.py with SIGKILL at many points, run it again until it is done, report what came out.

    killed_runs.py CONFIG FOLDER NUM_RANDOM POINT …

Each attempt is a fork of this process, which has paid for the imports once. A point is `random`, drawn uniformly over
an uninterrupted run, or FUNCTION:N, inside the N-th call: the call is made, the file it wrote is cut in half, and the
process dies. Prints one JSON object: the uninterrupted run's file hashes, and for each attempt its own.
"""

import hashlib
import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

import train_nlg
import train_nlu
from ba_lora.config.layers import load_config

torch.set_num_threads(1)
SCRIPTS = {"nlg": train_nlg, "nlu": train_nlu}
FILES = ("adapter/adapter_model.safetensors", "lora/adapter_model.safetensors", "merged/model.safetensors")


def arm(point: str) -> None:
    """Make this process die inside the N-th call of a function."""
    name, number = point.split(":")
    module = importlib.import_module(name.rpartition(".")[0])
    original = getattr(module, name.rpartition(".")[2])
    calls = 0

    def dying(*args, **kwargs):
        nonlocal calls
        calls += 1
        result = original(*args, **kwargs)
        if calls == int(number):
            for argument in (*args, *kwargs.values()) if name != "os.replace" else ():  # a rename is whole
                if isinstance(argument, str | Path) and Path(argument).is_file():
                    os.truncate(argument, Path(argument).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name.rpartition(".")[2], dying)


def run(config: str, folder: Path, point: str | None, delay_s: float | None) -> int:
    """Run the training in a fork; return the signal that ended it (0: it ended by itself)."""
    pid = os.fork()
    if pid == 0:
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = 1
        try:
            if point:
                arm(point)
            results = folder.with_name(f"{folder.name}-results")
            script = SCRIPTS[load_config(config).kind]
            sys.argv = [f"{script.__name__}.py", "--config", config, f"output_dir={folder}", f"results_dir={results}"]
            script.main()
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)
    if delay_s is not None:
        time.sleep(delay_s)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise SystemExit(f"the run failed: {folder.with_suffix('.log').read_text()[-3000:]}")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def describe(folder: Path) -> dict:
    """Return the exported files' hashes and what else must be right after a finished run."""
    (path,) = folder.with_name(f"{folder.name}-results").glob("*.json")
    result = json.loads(path.read_text())
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        "files": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES},
        "status": result["status"],
        "scores": {name: score["metrics"] for name, score in result["evaluation"].items()},
        "steps": sorted(set(steps)),
        "leftovers": [str(path) for path in folder.rglob("*") if path.name.endswith((".tmp", ".saving"))],
    }


def main() -> None:
    config, folder, num_random, *points = sys.argv[1:]
    folder = Path(folder)
    folder.mkdir(parents=True)
    started = time.perf_counter()
    run(config, folder / "whole", None, None)
    duration_s = time.perf_counter() - started
    generator = random.Random(0)
    report = {"whole": describe(folder / "whole"), "duration_s": duration_s, "attempts": []}
    plan = [(point, None) for point in points]
    plan += [(None, generator.uniform(0, duration_s)) for _ in range(int(num_random))]
    for number, (point, delay_s) in enumerate(plan):
        target = folder / f"killed{number}"
        ended = run(config, target, point, delay_s)
        whole = [path.name for path in target.glob("checkpoints/*/files.json")] if target.exists() else []
        run(config, target, None, None)
        log = target.with_suffix(".log").read_text()
        report["attempts"].append(
            {
                "point": point or f"{delay_s:.2f} s",
                "signal": ended,
                "checkpoints": len(whole),
                "warned": "is damaged" in log,
                **describe(target),
            }
        )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
