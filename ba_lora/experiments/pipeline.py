"""One run from config to table line: train → export → generate → score, each stage a command in its own process.

    python -m ba_lora.experiments.pipeline [--method ba_lora] [CONFIG] [key=value …]

CONFIG is a file, or the name of one in configs/nlg, such as toy. `method=lora,ba_lora` and `seed=1,2` make several
runs, one after another, and print them side by side.

`sh scripts/ba-lora.sh` and its siblings call this. A finished run is printed again, a killed one goes on. On one GPU or
none the training runs under plain python; on several, or several machines, under `accelerate launch`:

    ACCELERATE_CONFIG                     a file of configs/accelerate; chosen by the number of GPUs where unset
    NUM_PROCESSES                         of all machines together; the number of GPUs where unset
    NUM_MACHINES MACHINE_RANK             how many machines, and which one this is (the same command on each)
    MASTER_ADDR MASTER_PORT               machine 0, and a free port on it; for several machines
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ba_lora.config.checks import check_places
from ba_lora.config.layers import find_config, load_config, read_yaml
from ba_lora.config.registries import judged_tasks
from ba_lora.config.schema import RUN_MEASURES, UNTUNED, RunConfig, to_yaml
from ba_lora.errors import CommandParser, UserError, run_entry_point
from ba_lora.experiments.evaluation_state import STATE_FILE, data_file, evaluation_fault, evaluation_state, read_state
from ba_lora.io import read_object, sha256_file, write_json_atomic, write_text_atomic
from ba_lora.judge_endpoint import endpoint_from_environment
from ba_lora.locks import locked, work_lock_path
from ba_lora.models.source import model_source
from ba_lora.paths import PROJECT_ROOT, resolve_path, stage_environment
from ba_lora.runs.card import write_model_card
from ba_lora.runs.environment import environment, now
from ba_lora.runs.folder import claim_folder, is_finished
from ba_lora.runs.results import write_result
from ba_lora.runs.results_table import labelled, results_table

DEFAULT_CONFIG = "configs/nlg/toy.yaml"


@dataclass(frozen=True)
class Spec:
    """A run as it is asked for: what one would type after the training script, and what that resolves to."""

    config: RunConfig
    config_path: str
    method: str | None
    overrides: tuple[str, ...] = ()
    kind: str = "nlg"
    trained: bool = True  # False: the pre-trained model itself, evaluated alone

    @classmethod
    def resolve(cls, config_path: str, method: str | None, overrides: Sequence[str], *, kind: str = "nlg") -> "Spec":
        """Return the run of a base, a method and overrides. Raises UserError for anything wrong in them."""
        config = load_config(config_path, method=method, overrides=tuple(overrides), kind=kind)
        return cls(config, config_path, method, tuple(overrides), kind)


@dataclass(frozen=True)
class Stage:
    """One command, and the folders of the runs that it serves. task: the one whose score it gives, and nothing else:
    no other stage needs it; None: what comes after it in these runs does."""

    name: str
    command: list[str]
    run_paths: tuple[Path, ...]
    task: str | None = None


def main() -> int:
    parser = CommandParser(
        prog="python -m ba_lora.experiments.pipeline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--method", help="a file in configs/methods (default ba_lora)")
    parser.add_argument("--dry-run", action="store_true", help="check the config and print the commands, run nothing")
    parser.add_argument("words", nargs="*", metavar="CONFIG key=value", help=f"default config {DEFAULT_CONFIG}")
    options = parser.parse_intermixed_args()
    config_path, overrides = split_words(options.words)
    specs = asked_specs(config_path, overrides, method=options.method)
    run_specs(specs, table=results_table, dry_run=options.dry_run)
    return 0


def run_specs(specs: Sequence[Spec], *, table: Callable[[list[dict[str, Any]]], str], dry_run: bool) -> None:
    """Train, evaluate and push the runs, one after another, and print the table of their results; with `dry_run` only
    check them and print the commands."""
    configs = [spec.config for spec in specs]
    evaluations = [evaluation_stages([config]) for config in configs]  # checks files, too
    for config, evaluation in zip(configs, evaluations, strict=True):
        if not (config.run_path / "train.json").is_file():
            check_evaluation(evaluation)
    if missing := missing_judge(configs, os.environ):
        print(missing, file=sys.stderr, flush=True)
    is_first_machine = _whole_number(os.environ, "MACHINE_RANK", 0) == 0
    results = []
    for spec, evaluation in zip(specs, evaluations, strict=True):
        config = spec.config
        if dry_run:
            for stage in [training_stage(spec, launch_command(os.environ)), *evaluation]:
                print(shlex.join(stage.command))
            continue
        if not is_first_machine:
            train_run(spec)
            continue  # machine 0 evaluates
        with working_on(config):
            train_run(spec)
            if config.kind == "nlg" and config.eval.untuned and config.eval.tasks and not results:
                untuned = untuned_config(config)
                with working_on(untuned):
                    results.append(evaluate_run(untuned))
            results.append(evaluate_run(config))
        if config.hub.push:
            from ba_lora.runs.export import push_to_hub

            print(f"pushed to {push_to_hub(config.run_path, config)}")
    if results:
        print()
        print(table(labelled(results)))
        print(f"result{'s' if len(configs) > 1 else ''}: " + " ".join(str(config.result_path) for config in configs))


def check_evaluation(stages: Iterable[Stage]) -> None:
    """Raise the UserError that an evaluation would end with after the training, as far as it shows before."""
    commands = [stage.command[2:] for stage in stages if stage.name in ("generate", "evaluate")]
    for error in ask_module("eval.check", commands) if commands else ():
        if error:
            raise UserError(error)


def ask_module(module: str, question: Any, *words: str) -> Any:
    """Return the JSON that a module prints; it reads the question, as JSON, from its standard input."""
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(
        command,
        cwd=PROJECT_ROOT,
        env=stage_environment(),
        input=json.dumps(question),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise UserError(
            f"{' '.join([module, *words])} failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}"
        )
    return json.loads(done.stdout)


def asked_specs(
    config_path: str,
    words: Sequence[str],
    *,
    method: str | None = None,
    kind: str = "nlg",
    default: Sequence[str | None] = (None,),
) -> list[Spec]:
    """Return the runs of `method=A[,B…]` and `seed=1[,2…]`, each method with each seed, in this order.

    method: the only one that may be typed; default: the methods where none is, for a base. Raises UserError for
    anything wrong in them, or where one could not write.
    """
    methods, words = _take(words, "method")
    seeds, words = _take(words, "seed")
    if method is not None and methods not in ([], [method]):
        raise UserError(
            f"method={','.join(methods)} beside --method {method}: give one (scripts/lora.sh, pissa.sh and full-ft.sh "
            "name their method, scripts/ba-lora.sh takes method=NAME[,NAME…])"
        )
    if not methods and method is None and "method" in read_yaml(find_config(config_path, kind=kind)):
        default = (None,)  # a run's own config names its method
    seed_words = [[f"seed={seed}"] for seed in seeds] or [[]]
    specs = [
        Spec.resolve(config_path, name, [*words, *seed], kind=kind)
        for name in methods or ([method] if method else default)
        for seed in seed_words
    ]
    if len({spec.config.run_path for spec in specs}) < len(specs):
        raise UserError("two of these runs would have the same folder: leave output_dir out, and name each run once")
    if len(specs) > 1 and specs[0].config.hub.push:
        raise UserError("hub.push=true pushes one run: give one method and one seed")
    for spec in specs:
        check_places(spec.config)
    return specs


def _take(words: Sequence[str], key: str) -> tuple[list[str], list[str]]:
    """Return the values of the last `key=A[,B…]` or `key=[A,B…]`, and the other words."""
    typed = [word.partition("=")[2] for word in words if word.startswith(f"{key}=")]
    values = [value.strip() for value in typed[-1].strip("[]").split(",")] if typed else []
    if not all(values):
        raise UserError(f"{key}={typed[-1]}: a name or several, as in {key}=A,B, are needed")
    return values, [word for word in words if not word.startswith(f"{key}=")]


def missing_judge(configs: Iterable[RunConfig], environ: Mapping[str, str]) -> str | None:
    """Return the line that warns before a training whose answers nobody will judge; None where a judge is named, or
    where nothing is left to judge.

    No error: training and generation need no judge, and judgements on file are scored without one.
    """
    left = any(
        task in judged_tasks() and not (config.run_path / "scores" / f"{task}.json").is_file()
        for config in configs
        for task in config.eval.tasks
    )
    if not left:
        return None
    try:
        endpoint_from_environment(environ)
    except UserError as error:
        tasks = ", ".join(judged_tasks())
        return (
            f"warning: {error}; without a judge {tasks} is trained for and answered, but scoring it will fail unless "
            "its judgements are on file"
        )
    return None


def split_words(words: list[str], *, default: str = DEFAULT_CONFIG) -> tuple[str, list[str]]:
    """Return (config path, overrides) from `[CONFIG] [key=value …]`."""
    configs = [word for word in words if "=" not in word]
    if len(configs) > 1:
        raise UserError(f"one config at a time, found {' and '.join(configs)}; overrides are key=value")
    return configs[0] if configs else default, [word for word in words if "=" in word]


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
    _check_accelerate_config(config_file)
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
    # on one machine 0 takes any free port, so that two runs there do not meet
    command += ["--main_process_port", str(_whole_number(environ, "MASTER_PORT", 0))]
    return command


def _check_accelerate_config(file: Path) -> None:
    """Raise UserError for a file that `accelerate launch` cannot read."""
    if not file.is_file():
        raise UserError(f"ACCELERATE_CONFIG: no such file: {file}; configs/accelerate has some")
    from accelerate.commands.config.config_args import load_config_from_file

    read_yaml(file)
    try:
        load_config_from_file(str(file))
    except Exception as error:  # it raises unrelated classes for what it does not know
        told = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"ACCELERATE_CONFIG: accelerate cannot read {file}: {type(error).__name__}: {told}; configs/accelerate has "
            "files that it reads"
        ) from error


def training_stage(spec: Spec, launch: Sequence[str], *, overwrite: bool = False) -> Stage:
    """Return the training and export of a run; `launch` is what stands before the script."""
    command = [*launch, f"train_{spec.kind}.py", "--config", str(find_config(spec.config_path, kind=spec.kind))]
    command += ["--method", spec.method] if spec.method else []
    command += spec.overrides
    command += ["hub.push=false"] if spec.config.hub.push else []  # pushed later, with the scores in its card
    command += ["overwrite=true"] if overwrite else []
    return Stage("train", command, (spec.config.run_path,))


def working_on(config: RunConfig) -> contextlib.AbstractContextManager[None]:
    """Hold the lock of whoever takes the run through its stages."""
    path = config.run_path
    return locked(work_lock_path(path), doing=f"works on {path.name}", made=path)


def train_run(spec: Spec) -> None:
    """Run the training's stage; where the run is trained already, say so without the seconds that torch takes.

    Of several machines each starts its own stage: none may stay away from the others.
    """
    config = spec.config
    several = _whole_number(os.environ, "NUM_MACHINES", 1) > 1
    if config.overwrite or several or not is_finished(config):
        run_stage(training_stage(spec, launch_command(os.environ)))
    else:
        claim_folder(config)  # takes over what may change of its config
        print(f"{config.run_path.name} is trained already (overwrite=true redoes it)", flush=True)


def run_stage(stage: Stage) -> None:
    """Run one stage from the project's root; leave with its status if it fails (it has said why).

    A scorer's own output is left out: the table repeats it.
    """
    output = subprocess.DEVNULL if stage.name.startswith("score") else None
    status = subprocess.run(stage.command, cwd=PROJECT_ROOT, stdout=output, env=stage_environment()).returncode
    if status != 0:
        sys.exit(status if status > 0 else 128 - status)


def evaluate_run(config: RunConfig) -> dict[str, Any]:
    """Run the evaluation's stages, unless the run's scores already belong to what is asked for; return the result."""
    prepare_evaluation(config)
    state = evaluation_state(config)
    fault = evaluation_fault(config, state)
    if fault is not None:
        for stage in evaluation_stages([config], generate=not fault.regrade):
            run_stage(stage)
        return record_evaluation(config, state)
    return record_result(config)


def prepare_evaluation(config: RunConfig) -> None:
    """Give the pre-trained model a folder like a run's, once: its scores belong to the very train.json there."""
    if config.method == UNTUNED and read_object(config.run_path / "train.json") is None:
        write_text_atomic(config.run_path / "config.yaml", to_yaml(config))
        facts = {
            "status": "ok",
            "error": None,
            "finished_at": now(),
            "model": {"name": config.model.name, "revision": config.model.revision},
            "environment": environment(),
        }
        write_json_atomic(config.run_path / "train.json", facts)


def record_evaluation(config: RunConfig, state: dict[str, Any], *, failed: Collection[str] = ()) -> dict[str, Any]:
    """Write the result and, last, note what the scores in the run's folder belong to; return the result.

    Scores of other tasks that were made in the same way stay valid: tables with other columns share the run. failed:
    the tasks whose scoring failed; their scores from before do not hold, and those made in another way, or from other
    completions than are there now, are taken away.
    """
    asked = state["eval"]["tasks"]
    scored: list[str] = []
    if earlier := read_state(config):
        scored, earlier["eval"]["tasks"] = earlier["eval"]["tasks"], asked
    made_alike = earlier == state
    for task in failed:
        score_path = config.run_path / "scores" / f"{task}.json"
        if not (made_alike and (task in RUN_MEASURES or _is_of_its_completions(score_path))):
            score_path.unlink(missing_ok=True)
    result = record_result(config)
    tasks = [task for task in asked if task not in failed]
    tasks += [task for task in scored if made_alike and task not in asked]
    write_json_atomic(config.run_path / STATE_FILE, state | {"eval": state["eval"] | {"tasks": tasks}})
    return result


def _is_of_its_completions(score_path: Path) -> bool:
    """Return whether a score in a run's folder was made from the completions of its task that are there now."""
    completions_path = score_path.parent.with_name("completions") / f"{score_path.stem}.jsonl"
    score = read_object(score_path) or {}
    return completions_path.is_file() and sha256_file(completions_path) == score.get("completions_sha256")


def record_result(config: RunConfig) -> dict[str, Any]:
    """Write the run's result and the cards of its exports from what its folder holds; return the result."""
    result = write_result(config.run_path, config)
    write_model_card(config.run_path, config, result)
    return result


def untuned_config(config: RunConfig) -> RunConfig:
    """Return the "run" of the pre-trained model itself, under the method name `untuned`: one for all runs on it."""
    key = json.dumps([dataclasses.asdict(config.model), dataclasses.asdict(config.eval)], sort_keys=True)
    name = f"{config.name}-{UNTUNED}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
    return dataclasses.replace(
        config,
        method=UNTUNED,
        output_dir=str(PROJECT_ROOT / "outputs" / name),
        trainer={},
        hub=dataclasses.replace(config.hub, push=False),
    )


def evaluation_stages(configs: Sequence[RunConfig], *, generate: bool = True) -> list[Stage]:
    """Return what evaluates runs that share model and `eval`: eval.generate for all runs and tasks (one engine start;
    not with `generate=False`), eval.score for each run and task, then the measures of the runs themselves."""
    first = configs[0]
    if first.kind == "nlu":
        return _nlu_stages(configs, regrade=not generate)
    tasks = [task for task in first.eval.tasks if task not in RUN_MEASURES]
    run_paths = tuple(config.run_path for config in configs)
    files = {task: str(data_file(first, task)) for task in first.eval.tasks if task in first.eval.data}
    stages = []
    if tasks and generate:
        settings = [f"{key}={value}" for key, value in first.eval.options.items()]
        settings += [f"limit={first.eval.limit}"] if first.eval.limit is not None else []
        settings += ["trust_remote_code=true"] if first.model.trust_remote_code else []
        command = [sys.executable, "-m", "eval.generate", "--model"]
        if first.method == UNTUNED:
            assert len(configs) == 1, "the pre-trained model has one folder"
            command += [model_source(first.model), "--output", str(first.run_path / "completions")]
            settings += [f"revision={first.model.revision}"] if first.model.revision is not None else []
        else:
            command += map(str, run_paths)
        command += ["--task", *tasks, "--engine", first.eval.engine, *settings]
        data = [f"{task}={files[task]}" for task in tasks if task in files]
        command += ["--data", *data] if data else []
        stages.append(Stage("generate", command, run_paths))
    for config in configs:
        for task in tasks:
            score = [sys.executable, "-m", "eval.score", "--task", task]
            score += ["--completions", str(config.run_path / "completions" / f"{task}.jsonl")]
            score += ["--data", files[task]] if task in files else []
            score += ["allow_partial=true"] if first.eval.limit is not None else []
            stages.append(Stage(f"score {task}", score, (config.run_path,), task))
    for measure in first.eval.tasks:
        if measure in RUN_MEASURES:
            if measure not in files or not tasks:
                raise UserError(f"eval.tasks: {measure} needs a task before it and its texts, eval.data.{measure}=FILE")
            command = [sys.executable, "-m", f"eval.{measure}", "--run", *map(str, run_paths)]
            command += ["--texts", files[measure], "--task", tasks[0]]
            command += ["--data", files[tasks[0]]] if tasks[0] in files else []
            command += ["trust_remote_code=true"] if first.model.trust_remote_code else []
            stages.append(Stage(measure, command, run_paths, measure))
    return stages


def _nlu_stages(configs: Sequence[RunConfig], *, regrade: bool) -> list[Stage]:
    """Return eval.nlu's call for the out-of-domain sets of `eval.tasks`; training has evaluated the task itself.

    regrade: also where there are none, since the call scores anew what training has predicted.
    """
    first = configs[0]
    if not first.eval.tasks and not regrade:
        return []
    run_paths = tuple(config.run_path for config in configs)
    command = [sys.executable, "-m", "eval.nlu", "--model", *map(str, run_paths)]
    command += ["--task", first.nlu.task, *first.eval.tasks]
    files = [f"{name}={data_file(first, name)}" for name in first.eval.data]
    command += ["--data", *files] if files else []
    command += ["--max-rows", str(first.eval.limit)] if first.eval.limit is not None else []
    return [Stage("evaluate", command, run_paths)]


def _whole_number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(f"{name}={text} must be a whole number")
    return int(text)


if __name__ == "__main__":
    run_entry_point(main, resumes=True)
