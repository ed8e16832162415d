"""One run from config to table line: train → export → generate → score, each stage a command in its own process.

    python -m ba_lora.pipeline [--method ba_lora] [CONFIG] [key=value …]

`sh scripts/ba-lora.sh` and its siblings call this. A finished run is printed again, a killed one goes on. On one GPU or
none the training runs under plain python; on several, or several machines, under `accelerate launch`:

    ACCELERATE_CONFIG                     a file of configs/accelerate; chosen by the number of GPUs where unset
    NUM_PROCESSES                         of all machines together; the number of GPUs where unset
    NUM_MACHINES MACHINE_RANK             how many machines, and which one this is (the same command on each)
    MASTER_ADDR MASTER_PORT               machine 0, and a free port on it
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ba_lora.config import PROJECT_ROOT, RunConfig, load_config, resolve_path
from ba_lora.errors import UserError, run_entry_point
from ba_lora.export import push_to_hub, write_model_card
from ba_lora.io import read_json, sha256_file, write_json_atomic
from ba_lora.model import model_source
from ba_lora.results import results_table, write_result

DEFAULT_CONFIG = "configs/nlg/toy.yaml"
STATE_FILE = "evaluation.json"  # what the scores in a run's folder belong to


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", help="a file in configs/methods (default ba_lora)")
    parser.add_argument("--dry-run", action="store_true", help="check the config and print the commands, run nothing")
    parser.add_argument("words", nargs="*", metavar="CONFIG key=value", help=f"default config {DEFAULT_CONFIG}")
    options = parser.parse_intermixed_args()
    config_path, overrides = split_words(options.words)
    config = load_config(config_path, method=options.method, overrides=overrides, kind="nlg")

    arguments = ["--config", str(resolve_path(config_path))]
    arguments += ["--method", options.method] if options.method else []
    training = [*launch_command(os.environ), "train_nlg.py", *arguments, *overrides]
    training += ["hub.push=false"] if config.hub.push else []  # pushed below, with the scores in its card
    evaluation = evaluation_commands(config, model=str(config.run_path), run_path=config.run_path)  # checks files, too
    if options.dry_run:
        for command in [training, *evaluation]:
            print(shlex.join(command))
        return 0
    run_stage(training)
    if int(os.environ.get("MACHINE_RANK", "0")) != 0:
        return 0  # machine 0 evaluates

    results = [evaluate_untuned(config)] if config.eval.untuned and config.eval.tasks else []
    results.append(evaluate_run(config))
    if config.hub.push:
        print(f"pushed to {push_to_hub(config.run_path, config)}")
    print()
    print(results_table(results))
    print(f"result: {config.result_path}")
    return 0


def split_words(words: list[str]) -> tuple[str, list[str]]:
    """Return (config path, overrides) from `[CONFIG] [key=value …]`."""
    configs = [word for word in words if "=" not in word]
    if len(configs) > 1:
        raise UserError(f"one config at a time, found {' and '.join(configs)}; overrides are key=value")
    return configs[0] if configs else DEFAULT_CONFIG, [word for word in words if "=" in word]


def launch_command(environ: Mapping[str, str], *, num_gpus: int | None = None) -> list[str]:
    """Return what stands before the training script: python, or accelerate with the machines' and GPUs' numbers."""
    if num_gpus is None:
        import torch

        num_gpus = torch.cuda.device_count()
    num_machines = _whole_number(environ, "NUM_MACHINES", 1)
    chosen = environ.get("ACCELERATE_CONFIG")
    if num_gpus <= 1 and num_machines == 1 and not chosen:
        return [sys.executable]
    default = "multi_node.yaml" if num_machines > 1 else "multi_gpu.yaml"
    config_file = resolve_path(chosen or f"configs/accelerate/{default}")
    if not config_file.is_file():
        raise UserError(f"ACCELERATE_CONFIG: no such file: {config_file}; configs/accelerate has some")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config_file)]
    processes = _whole_number(environ, "NUM_PROCESSES", num_gpus * num_machines)
    if processes > 0:
        command += ["--num_processes", str(processes)]
    if num_machines > 1:
        missing = [name for name in ("MACHINE_RANK", "MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
        if missing:
            raise UserError(f"NUM_MACHINES={num_machines} also needs {', '.join(missing)}: set them on every machine")
        command += ["--num_machines", str(num_machines)]
        command += ["--machine_rank", str(_whole_number(environ, "MACHINE_RANK", 0))]
        command += ["--main_process_ip", environ["MASTER_ADDR"]]
    if environ.get("MASTER_PORT"):
        command += ["--main_process_port", str(_whole_number(environ, "MASTER_PORT", 0))]
    return command


def run_stage(command: list[str]) -> None:
    """Run one stage from the project's root; leave with its status if it fails (it has said why).

    A scorer's own output is left out: the table repeats it.
    """
    output = subprocess.DEVNULL if "eval.score" in command else None
    status = subprocess.run(command, cwd=PROJECT_ROOT, stdout=output).returncode
    if status != 0:
        sys.exit(status if status > 0 else 128 - status)


def evaluate_run(config: RunConfig) -> dict[str, Any]:
    """Generate and score what `eval` asks for, unless the run's scores already belong to it; return the result."""
    run_path = config.run_path
    state = evaluation_state(run_path, config)
    if config.eval.tasks and not is_evaluated(run_path, state):
        generate_and_score(config, model=str(run_path), run_path=run_path)
        write_json_atomic(run_path / STATE_FILE, state)
    result = write_result(run_path, config)
    write_model_card(run_path, config, result)
    return result


def evaluate_untuned(config: RunConfig) -> dict[str, Any]:
    """The same for the pre-trained model itself, under the method name `untuned`."""
    key = json.dumps([dataclasses.asdict(config.model), dataclasses.asdict(config.eval)], sort_keys=True)
    name = f"{config.name}-untuned-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
    untuned = dataclasses.replace(
        config,
        method="untuned",
        output_dir=str(PROJECT_ROOT / "outputs" / name),
        trainer={},
        hub=dataclasses.replace(config.hub, push=False),
    )
    run_path = untuned.run_path
    write_json_atomic(run_path / "train.json", {"status": "ok", "model": {"name": config.model.name}})
    state = evaluation_state(run_path, untuned)
    if not is_evaluated(run_path, state):
        generate_and_score(untuned, model=model_source(config.model), run_path=run_path, revision=config.model.revision)
        write_json_atomic(run_path / STATE_FILE, state)
    return write_result(run_path, untuned)


def evaluation_state(run_path: Path, config: RunConfig) -> dict[str, Any]:
    """Return what the scores depend on: this very training, the settings, the local data files."""
    files = {task: sha256_file(_data_file(config, task)) for task in sorted(config.eval.data)}
    return {
        "training": sha256_file(run_path / "train.json"),
        "eval": dataclasses.asdict(config.eval),
        "data_sha256": files,
    }


def is_evaluated(run_path: Path, state: dict[str, Any]) -> bool:
    """Whether the run's folder holds scores of every task for exactly this state, none of them by an older grader."""
    path = run_path / STATE_FILE
    if not path.is_file() or read_json(path) != state:
        return False
    scores = [run_path / "scores" / f"{task}.json" for task in state["eval"]["tasks"]]
    return all(score.is_file() and not read_json(score).get("stale") for score in scores)


def generate_and_score(config: RunConfig, *, model: str, run_path: Path, revision: str | None = None) -> None:
    """Run the evaluation's commands."""
    for command in evaluation_commands(config, model=model, run_path=run_path, revision=revision):
        run_stage(command)


def evaluation_commands(
    config: RunConfig, *, model: str, run_path: Path, revision: str | None = None
) -> list[list[str]]:
    """Return eval.generate for all tasks (one engine start), then eval.score for each task."""
    if not config.eval.tasks:
        return []
    settings = [f"{key}={value}" for key, value in config.eval.options.items()]
    if config.eval.limit is not None:
        settings.append(f"limit={config.eval.limit}")
    if revision is not None:
        settings.append(f"revision={revision}")
    if config.model.trust_remote_code:
        settings.append("trust_remote_code=true")
    files = {task: str(_data_file(config, task)) for task in config.eval.tasks if task in config.eval.data}
    completions = run_path / "completions"
    generate = [sys.executable, "-m", "eval.generate", "--model", model, "--task", *config.eval.tasks]
    generate += ["--engine", config.eval.engine, "--output", str(completions), *settings]
    generate += ["--data", *(f"{task}={path}" for task, path in files.items())] if files else []
    commands = [generate]
    for task in config.eval.tasks:
        score = [sys.executable, "-m", "eval.score", "--task", task]
        score += ["--completions", str(completions / f"{task}.jsonl")]
        score += ["--data", files[task]] if task in files else []
        score += ["allow_partial=true"] if config.eval.limit is not None else []
        commands.append(score)
    return commands


def _data_file(config: RunConfig, task: str) -> Path:
    path = resolve_path(config.eval.data[task])
    if not path.is_file():
        raise UserError(f"eval.data.{task}: no such file: {path}; check the path, or drop the key for the hub's set")
    return path


def _whole_number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(f"{name}={text} must be a whole number")
    return int(text)


if __name__ == "__main__":
    run_entry_point(main)
