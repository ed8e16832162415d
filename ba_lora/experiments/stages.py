"""The stages of a run: what each one is started with, said here and nowhere else. Each is a process of its own.

`Call` holds what a command is given, by name; it becomes words in `Call.command`. What eval/ may refuse is asked of
eval.check before a training (`ask_checks`).
"""

import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ba_lora.chat import is_chat
from ba_lora.config.layers import find_config, read_yaml
from ba_lora.config.schema import HARNESS, LIKELIHOOD, RUN_MEASURES, UNTUNED, RunConfig
from ba_lora.errors import UserError
from ba_lora.experiments.evaluation_state import data_file, is_generated, rank_folders
from ba_lora.experiments.spec import Spec
from ba_lora.glue import task_word
from ba_lora.models.source import model_source
from ba_lora.paths import PROJECT_ROOT, resolve_path, stage_environment
from ba_lora.words import nearest

ENDS_BY_ITSELF_S = 10.0  # the patience with a stage that may have got the signal, too
OVERWRITE = "overwrite=true"
CHECKED = ("eval.generate", "eval.harness", "eval.nlu")  # the modules with a `check`, which eval.check calls


@dataclass(frozen=True)
class Call:
    """A module or script with what it is given: `--name` and its values, None and no values leaving it out, then
    `key=value` words. launch: what stands before it."""

    module: str
    options: Mapping[str, Sequence[str] | str | None] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    launch: tuple[str, ...] = (sys.executable, "-m")

    @property
    def words(self) -> list[str]:
        """What stands behind the module's name on a command line."""
        words = []
        for name, values in self.options.items():
            if values:
                words += [f"--{name}", *([values] if isinstance(values, str) else values)]
        return [*words, *self.settings]

    @property
    def command(self) -> list[str]:
        return [*self.launch, self.module, *self.words]


@dataclass(frozen=True)
class Stage:
    """One call, and the folders of the runs that it serves. task: the one whose score it gives, and nothing else:
    no other stage needs it; None: the later stages of these runs need it. quiet: the table repeats its output."""

    name: str
    call: Call
    run_paths: tuple[Path, ...]
    task: str | None = None
    quiet: bool = False


def run_stage(stage: Stage) -> None:
    """Run one stage from the project's root; leave with its status if it fails (it has said why).

    Ctrl-C and SIGTERM, after `leave_on_sigterm`, end it too: it writes down that it was cancelled.
    """
    output = subprocess.DEVNULL if stage.quiet else None
    process = subprocess.Popen(stage.call.command, cwd=PROJECT_ROOT, stdout=output, env=stage_environment())
    try:
        status = process.wait()
    except (KeyboardInterrupt, SystemExit):
        try:
            process.wait(ENDS_BY_ITSELF_S)  # a terminal, or a cluster, sends the signal to all processes
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
        raise
    if status != 0:
        sys.exit(status if status > 0 else 128 - status)


def leave_on_sigterm() -> None:
    """Let SIGTERM end this process in order, with the status of a process that it killed."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def ask_checks(calls: Iterable[Call], *words: str) -> dict[str, Any]:
    """Return eval.check's answers: `errors`, for each call the error that it would end with after the training, as far
    as it shows before, or None; and what `words` ask for."""
    return ask_module("eval.check", [[call.module, *call.words] for call in calls], *words)


def check_evaluation(stages: Iterable[Stage]) -> None:
    """Raise the first error that an evaluation would end with, as far as it shows before the training."""
    calls = [stage.call for stage in stages if stage.call.module in CHECKED]
    for error in ask_checks(calls)["errors"] if calls else ():
        if error:
            raise UserError(error)


def ask_module(module: str, question: Any, *words: str) -> Any:
    """Return the JSON that a module prints; it reads the question, as JSON, from its standard input."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
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


def launch_command(environ: Mapping[str, str], *, num_gpus: int | None = None) -> list[str]:
    """Return what stands before the training script: python, or accelerate with the machines' and GPUs' numbers."""
    if num_gpus is None:
        import torch

        num_gpus = torch.cuda.device_count()
    num_machines = whole_number(environ, "NUM_MACHINES", 1)
    chosen = environ.get("ACCELERATE_CONFIG")
    if num_gpus <= 1 and num_machines == 1 and not chosen:
        return [sys.executable]
    default = "multi_node.yaml" if num_machines > 1 else "multi_gpu.yaml"
    config_file = resolve_path(chosen or f"configs/accelerate/{default}")
    _check_accelerate_config(config_file)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config_file)]
    processes = whole_number(environ, "NUM_PROCESSES", num_gpus * num_machines)
    if processes > 0:
        command += ["--num_processes", str(processes)]
    if num_machines > 1:
        missing = [name for name in ("MACHINE_RANK", "MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
        if missing:
            raise UserError(f"NUM_MACHINES={num_machines} also needs {', '.join(missing)}: set them on every machine")
        command += ["--num_machines", str(num_machines)]
        command += ["--machine_rank", str(whole_number(environ, "MACHINE_RANK", 0))]
        command += ["--main_process_ip", environ["MASTER_ADDR"]]
        if restarts := whole_number(environ, "MAX_RESTARTS", 0):
            is_first = str(environ["MACHINE_RANK"] == "0").lower()
            command += ["--max_restarts", str(restarts), "--rdzv_backend", "c10d", "--rdzv_conf", f"is_host={is_first}"]
    # on one machine 0 takes any free port, so that two runs there do not meet
    command += ["--main_process_port", str(whole_number(environ, "MASTER_PORT", 0))]
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
    options = {"config": str(find_config(spec.config_path, kind=spec.kind)), "method": spec.method}
    settings = list(spec.overrides)
    settings += ["hub.push=false"] if spec.config.hub.push else []  # pushed later, with the scores in its card
    settings += [OVERWRITE] if overwrite else []
    call = Call(f"train_{spec.kind}.py", options, tuple(settings), tuple(launch))
    return Stage("train", call, (spec.config.run_path,))


def evaluation_stages(configs: Sequence[RunConfig], *, generate: bool = True) -> list[Stage]:
    """Return what evaluates runs that share model and `eval`: eval.generate for all runs and tasks (one engine start;
    not with `generate=False`), eval.score for each run and task, then the measures of the runs themselves. A run with
    `export.ranks` is evaluated at each of these ranks, too."""
    first = configs[0]
    if first.kind == "nlu":
        return _nlu_stages(configs, regrade=not generate)
    tasks = [task for task in first.eval.tasks if is_generated(task)]
    run_paths = tuple(config.run_path for config in configs)
    folders = [str(path) for path in run_paths]
    files = {task: str(data_file(first, task)) for task in first.eval.tasks if task in first.eval.data}
    trusted = ("trust_remote_code=true",) if first.model.trust_remote_code else ()
    graded = ("allow_partial=true",) if first.eval.limit is not None else ()
    if "thinking" in first.eval.options:
        graded += (f"thinking={first.eval.options['thinking']}",)
    stages = []
    if tasks and generate:
        settings = [f"{key}={value}" for key, value in first.eval.options.items()]
        settings += [f"limit={first.eval.limit}"] if first.eval.limit is not None else []
        models, output = [*folders, *(str(path) for config in configs for path in rank_folders(config))], None
        if first.method == UNTUNED and first.model.quantization == "none":
            assert len(configs) == 1, "the pre-trained model has one folder"
            models, output = model_source(first.model), str(first.run_path / "completions")
            settings += [f"revision={first.model.revision}"] if first.model.revision is not None else []
        if (template := _untuned_template(first)) and "template" not in first.eval.options:
            settings.append(f"template={template}")
        options = {
            "model": models,
            "output": output,
            "task": tasks,
            "data": [f"{task}={files[task]}" for task in tasks if task in files],
            "engine": first.eval.engine,
        }
        call = Call("eval.generate", options, (*settings, *trusted))
        stages.append(Stage("generate", call, run_paths))
    for config in configs:
        for folder, task in itertools.product((config.run_path, *rank_folders(config)), tasks):
            name = task if folder == config.run_path else f"ranks/{folder.name}/{task}"
            options = {
                "task": task,
                "completions": str(folder / "completions" / f"{task}.jsonl"),
                "data": files.get(task),
            }
            call = Call("eval.score", options, graded)
            stages.append(Stage(f"score {name}", call, (config.run_path,), name, quiet=True))
        stages += _harness_stages(config, files)
    for measure in first.eval.tasks:
        if measure in RUN_MEASURES:
            if measure not in files or not tasks:
                raise UserError(f"eval.tasks: {measure} needs a task before it and its texts, eval.data.{measure}=FILE")
            options = {"run": folders, "texts": files[measure], "task": tasks[0], "data": files.get(tasks[0])}
            stages.append(Stage(measure, Call(f"eval.{measure}", options, trusted), run_paths, measure))
    return stages


def _untuned_template(config: RunConfig) -> str | None:
    """Return the chat template in which the pre-trained model is asked, the one of the runs beside it; None: none, and
    of a trained run, which keeps its own."""
    template = config.data.template
    if config.method != UNTUNED or not is_chat(template):
        return None
    return template if template == "chat" else str(resolve_path(template))


def _harness_stages(config: RunConfig, files: Mapping[str, str]) -> list[Stage]:
    """Return a call of lm-evaluation-harness for each of its tasks: one that fails leaves the others their scores.

    Raises UserError for settings of it that name a folder or a task which is not there.
    """
    tasks = [task for task in config.eval.tasks if task.startswith(HARNESS)]
    if not tasks:
        return []
    settings = config.eval.harness
    folders = [str(resolve_path(folder)) for folder in settings.include_path]
    if missing := [folder for folder in folders if not Path(folder).is_dir()]:
        raise UserError(f"eval.harness.include_path: no such folder: {missing[0]}")
    for name in settings.shots if isinstance(settings.shots, dict) else ():
        if name not in tasks:
            raise UserError(f"eval.harness.shots: {name} is not in eval.tasks{nearest(name, tasks)}")
    stages = []
    model, output, revision = str(config.run_path), None, None
    if config.method == UNTUNED:
        output = str(config.run_path / "scores")
        if config.model.quantization == "none":
            model, revision = model_source(config.model), config.model.revision
    for task in tasks:
        shots = settings.shots_of(task)
        options = {
            "model": model,
            "task": task,
            "data": f"{task}={files[task]}" if task in files else None,
            "include-path": folders,
            "output": output,
            "engine": config.eval.engine,
            "limit": None if config.eval.limit is None else str(config.eval.limit),
            "shots": None if shots is None else str(shots),
            "batch-size": str(settings.batch_size),
            "dtype": str(config.eval.options.get("dtype") or config.model.dtype),
            "template": _untuned_template(config),
            "revision": revision,
        }
        stages.append(Stage(task, Call("eval.harness", options), (config.run_path,), task, quiet=True))
    return stages


def _nlu_stages(configs: Sequence[RunConfig], *, regrade: bool) -> list[Stage]:
    """Return eval.nlu's call for the out-of-domain sets of `eval.tasks`; training has evaluated the task itself. Then
    the likelihoods, from what training has predicted.

    regrade: eval.nlu also where there are no sets, since the call scores again what training has predicted.
    """
    first = configs[0]
    sets = [name for name in first.eval.tasks if name != LIKELIHOOD]
    run_paths = tuple(config.run_path for config in configs)
    folders = [str(path) for path in run_paths]
    stages = []
    if sets or regrade:
        options = {
            "model": folders,
            "task": [task_word(first.nlu.task), *sets],
            "data": [f"{name}={data_file(first, name)}" for name in first.eval.data if name != LIKELIHOOD],
            "max-rows": None if first.eval.limit is None else str(first.eval.limit),
        }
        stages.append(Stage("evaluate", Call("eval.nlu", options), run_paths))
    if LIKELIHOOD in first.eval.tasks:
        options = {"run": folders, "data": str(data_file(first, LIKELIHOOD))}
        stages.append(Stage(LIKELIHOOD, Call("eval.likelihood_nlu", options), run_paths, LIKELIHOOD))
    return stages


def whole_number(environ: Mapping[str, str], name: str, default: int) -> int:
    """Return a whole number of the environment. Raises UserError for anything else."""
    text = environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(f"{name}={text} must be a whole number")
    return int(text)
