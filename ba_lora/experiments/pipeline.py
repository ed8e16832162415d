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
    MAX_RESTARTS                          how often torchrun starts all processes again after one was lost (0); for
                                          several machines
"""

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ba_lora.config.checks import check_places
from ba_lora.config.layers import find_config, read_yaml
from ba_lora.config.registries import judged_tasks
from ba_lora.config.schema import UNTUNED, RunConfig, to_yaml
from ba_lora.config.schema_nlu import NLUConfig
from ba_lora.errors import CommandParser, UserError, run_entry_point
from ba_lora.experiments.evaluation_state import (
    STATE_FILE,
    dev_sources,
    evaluation_fault,
    evaluation_state,
    is_generated,
    read_state,
    score_path,
)
from ba_lora.experiments.spec import Spec, untuned_config
from ba_lora.experiments.stages import (
    ask_module,
    check_evaluation,
    evaluation_stages,
    launch_command,
    leave_on_sigterm,
    run_stage,
    training_stage,
    whole_number,
)
from ba_lora.io import read_object, sha256_file, write_json_atomic, write_text_atomic
from ba_lora.judge_endpoint import endpoint_from_environment
from ba_lora.locks import locked, work_lock_path
from ba_lora.models.source import folder_hash, model_source
from ba_lora.runs.card import write_model_card
from ba_lora.runs.environment import environment, git_state, now
from ba_lora.runs.folder import claimed_folder, is_finished, untuned_base_changed
from ba_lora.runs.results import track_evaluation, write_result
from ba_lora.runs.results_table import labelled, results_table
from ba_lora.words import read_list, take_options

DEFAULT_CONFIG = "configs/nlg/toy.yaml"


def main() -> int:
    parser = CommandParser(
        prog="python -m ba_lora.experiments.pipeline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--method", help="a file in configs/methods, or one's variant (default ba_lora)")
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
    leave_on_sigterm()
    evaluations = [evaluation_stages([config]) for config in configs]  # checks files, too
    for config, evaluation in zip(configs, evaluations, strict=True):
        if config.overwrite or not is_finished(config):
            check_evaluation(evaluation)
    if missing := missing_judge(configs, os.environ):
        print(missing, file=sys.stderr, flush=True)
    is_first_machine = whole_number(os.environ, "MACHINE_RANK", 0) == 0
    results = []
    for spec, evaluation in zip(specs, evaluations, strict=True):
        config = spec.config
        if dry_run:
            for stage in [training_stage(spec, launch_command(os.environ)), *evaluation]:
                print(shlex.join(stage.call.command))
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
    typed, words = take_options(words, ("method", "seed"))
    methods, seeds = (read_list(key, typed[key]) if key in typed else [] for key in ("method", "seed"))
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


def working_on(config: RunConfig) -> contextlib.AbstractContextManager[None]:
    """Hold the lock of whoever takes the run through its stages."""
    path = config.run_path
    return locked(work_lock_path(path), doing=f"works on {path.name}", made=path)


def train_run(spec: Spec) -> None:
    """Run the training's stage; where the run is trained already, say so without the seconds that torch takes.

    Of several machines each starts its own stage: none may stay away from the others.
    """
    config = spec.config
    several = whole_number(os.environ, "NUM_MACHINES", 1) > 1
    if config.overwrite or several or not is_finished(config):
        run_stage(training_stage(spec, launch_command(os.environ)))
    else:
        with claimed_folder(config):
            pass  # takes over what may change of its config
        print(f"{config.run_path.name} is trained already (overwrite=true redoes it)", flush=True)


def evaluate_run(config: RunConfig) -> dict[str, Any]:
    """Run the evaluation's stages, unless the run's scores already belong to what is asked for; return the result."""
    prepare_evaluation(config)
    state = evaluation_state(config)
    fault = evaluation_fault(config, state)
    if fault is not None:
        begin_evaluation(config, state, regrade=fault.regrade)
        for stage in evaluation_stages([config], generate=not fault.regrade):
            run_stage(stage)
        return record_evaluation(config, state)
    return record_result(config)


def prepare_evaluation(config: RunConfig) -> None:
    """Give the pre-trained model a folder like a run's, once: its scores belong to the very train.json there.

    A quantised one gets merged/ too: what is evaluated is the quantised model.
    """
    if config.method == UNTUNED and (
        read_object(config.run_path / "train.json") is None or untuned_base_changed(config)
    ):
        write_text_atomic(config.run_path / "config.yaml", to_yaml(config))
        quantized = config.model.quantization != "none"
        facts = {
            "export": ask_module("eval.dequantize", str(config.run_path)) if quantized else None,
            "status": "ok",
            "error": None,
            "finished_at": now(),
            "model": {"name": config.model.name, "revision": config.model.revision},
            "base_sha256": folder_hash(model_source(config.model)),
            "environment": environment() | {"git": git_state()},  # a grid may be older than the code
        }
        write_json_atomic(config.run_path / "train.json", facts)


def begin_evaluation(config: RunConfig, state: dict[str, Any], *, regrade: bool) -> None:
    """Note, before the first stage, that scores of the tasks asked for do not hold until `record_evaluation` says so:
    one that is stopped in between leaves some of before and some of after. regrade: the completions stay."""
    earlier = read_state(config)
    if earlier is None or regrade:
        return
    asked = state["eval"]["tasks"]
    scored, earlier["eval"]["tasks"] = earlier["eval"]["tasks"], asked
    if earlier != state:  # made in another way
        kept = dev_sources(config) if isinstance(config, NLUConfig) else ()  # training's own
        for task in asked:
            if task not in kept:
                score_path(config, task).unlink(missing_ok=True)
    tasks = [task for task in scored if earlier == state and task not in asked]
    write_json_atomic(config.run_path / STATE_FILE, state | {"eval": state["eval"] | {"tasks": tasks}})


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
        path = score_path(config, task)
        if not (made_alike and (not is_generated(task) or _is_of_its_completions(path))):
            path.unlink(missing_ok=True)
    result = record_result(config)
    tasks = [task for task in asked if task not in failed]
    tasks += [task for task in scored if made_alike and task not in asked]
    write_json_atomic(config.run_path / STATE_FILE, state | {"eval": state["eval"] | {"tasks": tasks}})
    return result


def _is_of_its_completions(path: Path) -> bool:
    """Return whether a score in a run's folder was made from the completions of its task that are there now."""
    completions_path = path.parent.with_name("completions") / f"{path.stem}.jsonl"
    score = read_object(path) or {}
    return completions_path.is_file() and sha256_file(completions_path) == score.get("completions_sha256")


def record_result(config: RunConfig) -> dict[str, Any]:
    """Write the run's result and the cards of its exports from what its folder holds; return the result."""
    before = read_object(config.result_path) or {}
    result = write_result(config.run_path, config)
    write_model_card(config.run_path, config, result)
    if result["evaluation"] != before.get("evaluation"):
        track_evaluation(config.run_path, result)
    return result


if __name__ == "__main__":
    run_entry_point(main, resumes=True)
