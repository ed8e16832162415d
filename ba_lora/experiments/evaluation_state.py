"""Whether the scores in a run's folder hold: what they were made from, and what has changed since.

`evaluation.json` there says which training, settings and data files the scores belong to; each score its grader's
version and its data.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ba_lora.config.schema import HARNESS, RUN_MEASURES, UNTUNED, RunConfig
from ba_lora.config.schema_nlg import scoring_settings
from ba_lora.config.schema_nlu import NLUConfig
from ba_lora.errors import UserError
from ba_lora.glue import find_task
from ba_lora.io import read_object, sha256_file
from ba_lora.paths import no_such_file, resolve_path

STATE_FILE = "evaluation.json"  # what the scores in a run's folder belong to

Graders = Mapping[str, Mapping[str, str | None]]  # what `python -m eval.check --graders` prints as `graders`


def evaluation_state(config: RunConfig) -> dict[str, Any]:
    """Return what the scores depend on: this very training, the settings, the local data files.

    Of the settings those are left out that change no score: whether the pre-trained model is evaluated as well, and how
    a run is served.
    """
    files = {task: sha256_file(data_file(config, task)) for task in sorted(config.eval.data) if config.eval.tasks}
    return {
        "training": sha256_file(config.run_path / "train.json"),
        "eval": _scoring_settings(dataclasses.asdict(config.eval)),
        "data_sha256": files,
    }


def read_state(config: RunConfig) -> dict[str, Any] | None:
    """Return the state that the scores in the run's folder were noted to belong to, comparable to `evaluation_state`
    whatever settings it was noted with; None where no file, or none that can be read, tells it."""
    found = read_object(config.run_path / STATE_FILE) or {}
    settings = found.get("eval")
    if not isinstance(settings, dict) or not isinstance(settings.get("tasks"), list):
        return None
    kept = {name: value for name, value in settings.items() if name in vars(config.eval)}
    return found | {"eval": _scoring_settings(kept)}


def _scoring_settings(settings: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in scoring_settings(settings).items() if name != "untuned"}
    if isinstance(options := kept.get("options"), dict):
        kept["options"] = {name: value for name, value in options.items() if name != "serve"}
    return kept


def is_generated(task: str) -> bool:
    """Whether a task has completions of eval.generate, and is no measure of the run itself or of the harness."""
    return task not in RUN_MEASURES and not task.startswith(HARNESS)


def rank_folders(config: RunConfig) -> list[Path]:
    """Return the folders of a run at lower ranks that are evaluated, NLG's: each with a plain LoRA, and completions and
    scores of its own."""
    ranks = config.export.ranks if config.kind == "nlg" and config.method != UNTUNED else []
    return [config.run_path / "ranks" / str(rank) for rank in ranks]


def score_path(config: RunConfig, name: str) -> Path:
    """Return the file with the score of a task, or of ranks/<b>/<task>."""
    rank, _, task = name.rpartition("/") if name.startswith("ranks/") else ("", "", name)
    return config.run_path / rank / "scores" / f"{task}.json"


def data_file(config: RunConfig, task: str) -> Path:
    """Return the task's file in `eval.data`. Raises UserError where it is not there."""
    path = resolve_path(config.eval.data[task])
    if not path.is_file():
        raise UserError(f"eval.data.{task}: {no_such_file(path)}; check the path, or drop the key for the hub's set")
    return path


@dataclass(frozen=True)
class Fault:
    """Why scores do not hold. `stale`: there were some; `regrade`: their completions hold, only the grades do not."""

    reason: str
    stale: bool = True
    regrade: bool = False


def evaluation_fault(config: RunConfig, state: dict[str, Any], *, graders: Graders | None = None) -> Fault | None:
    """Return why the run's folder does not hold scores of every task for exactly this state, None where it does.

    Of several faults the one that asks for most: to generate, before to grade. What training has scored, an NLU run's
    own dev sets, must hold, too. graders: a score by another version of its grader, or from another commit of its hub
    data, does not hold; without them those count that `eval.score --stale` has marked.
    """
    graders = graders or {}
    faults = list(_task_faults(config, state, graders))
    if isinstance(config, NLUConfig):
        faults += _dev_faults(config, graders)
    fault = min(faults, key=lambda fault: fault.regrade, default=None)
    if fault is None or not fault.regrade or config.kind == "nlu":  # eval.nlu predicts what it must
        return fault
    folders = (config.run_path, *rank_folders(config))
    generated = [task for task in config.eval.tasks if is_generated(task)]
    lost = [t for t in generated if not all((path / "completions" / f"{t}.jsonl").is_file() for path in folders)]
    if lost:
        return dataclasses.replace(fault, regrade=False, reason=f"{fault.reason}; no completions of {', '.join(lost)}")
    return fault


def _task_faults(config: RunConfig, state: dict[str, Any], graders: Graders) -> Iterator[Fault]:
    if not config.eval.tasks:
        return
    found = read_state(config)
    if found is None:
        damaged = (config.run_path / STATE_FILE).is_file()
        yield Fault(f"{STATE_FILE} cannot be read" if damaged else "not evaluated", stale=damaged)
        return
    scored = found["eval"]["tasks"]
    found["eval"]["tasks"] = state["eval"]["tasks"]  # another table's run may have been scored on more, or on others
    if found != state:
        changed = [name for name in state if found.get(name) != state[name]]
        if changed == ["eval"]:
            changed = [f"eval.{name}" for name, value in state["eval"].items() if found["eval"].get(name) != value]
        yield Fault(f"evaluated with another {', '.join(changed) or 'state'}")
    for task in config.eval.tasks:
        path = score_path(config, task)
        if task not in scored or not path.is_file():
            yield Fault(f"no score of {task}", stale=False)
        elif isinstance(config, NLUConfig) and task in dev_sources(config):
            continue  # MNLI's mismatched set, which training has scored
        elif (score := read_object(path)) is None:
            yield Fault(f"the score of {task} cannot be read", regrade=True)
        elif fault := (
            _score_fault(task, score, graders.get(task, {}))
            or _harness_fault(config, task, score, state)
            or _completions_fault(config.run_path, task, score)
        ):
            yield fault
        for folder in rank_folders(config) if is_generated(task) else ():
            name = f"ranks/{folder.name}/{task}"
            if (score := read_object(score_path(config, name))) is None:
                yield Fault(f"no score of {name}", stale=False)
            elif fault := _score_fault(name, score, graders.get(task, {})) or _completions_fault(folder, task, score):
                yield fault


def _completions_fault(folder: Path, task: str, score: Mapping[str, Any]) -> Fault | None:
    """Return that a score was not made from the completions that are there: eval.generate, called by hand or stopped
    before the scoring, has made others, maybe in another way."""
    if not is_generated(task):
        return None
    made = (read_object(folder / "completions" / f"{task}.meta.json") or {}).get("completions_sha256")
    scored = score.get("completions_sha256")
    return None if scored is None or made in (None, scored) else Fault(f"{task}: scored from other completions")


def _harness_fault(config: RunConfig, task: str, score: Mapping[str, Any], state: Mapping[str, Any]) -> Fault | None:
    """Return why a score of lm-evaluation-harness is not what the run's settings ask for: scripts/harness.sh, called by
    hand, writes it to the same place."""
    if not task.startswith(HARNESS):
        return None
    made = score.get("generation") or {}
    asked = [("limit", config.eval.limit), ("shots", config.eval.harness.shots_of(task))]
    asked.append(("dtype", str(config.eval.options.get("dtype") or config.model.dtype)))
    asked.append(("engine", config.eval.engine))
    for name, value in asked:
        if value != "auto" and (name not in made or made[name] != value):
            told = f"made with {name} {made[name]}" if name in made else f"it does not tell its {name}"
            return Fault(f"{task}: {told}, asked is {value}", regrade=True)
    if score.get("data_sha256") != state["data_sha256"].get(task):
        return Fault(f"{task}: made from other rows than eval.data names", regrade=True)
    return None


def _dev_faults(config: NLUConfig, graders: Graders) -> Iterator[Fault]:
    """Yield why the scores of what training has predicted do not hold: eval.nlu makes them from its predictions."""
    for name, pinned in dev_sources(config).items():
        path = config.run_path / "scores" / f"{name}.json"
        if not path.is_file():
            continue
        score = read_object(path)
        if score is None:
            yield Fault(f"the score of {name} cannot be read", regrade=True)
            continue
        version = graders.get(name, {}).get("version")
        if fault := _score_fault(name, score, {"version": version, "hub": pinned}):
            yield dataclasses.replace(fault, regrade=True)


def dev_sources(config: NLUConfig) -> dict[str, str | None]:
    """Return dev set → the hub's set with its commit, None where the config names the rows itself; of those that
    training scores."""
    task = find_task(config.nlu.task)
    names = task.dev_sets
    if config.data.source is not None:
        return dict.fromkeys([name for name in names if name in config.data.dev] or [next(iter(names))])
    hub = task.hub_rows(config.data.revision)
    return {name: None if name in config.data.dev else hub for name in names}


def hub_of(score: Mapping[str, Any]) -> str | None:
    """Return the hub's set, with its commit, that a score was made from; None where its rows are not from the hub."""
    data = score.get("data_sha256")
    return data.get("hub") if isinstance(data, dict) else None


def _score_fault(task: str, score: Mapping[str, Any], now: Mapping[str, str | None]) -> Fault | None:
    """now: the grader's version, and the hub's set with its pinned commit; None or absent where not known."""
    hub, pinned = hub_of(score), now.get("hub")
    if hub and pinned and hub != pinned and hub.split("@")[0] == pinned.split("@")[0]:
        return Fault(f"{task}: made from {hub}, pinned is {pinned}")
    if now.get("version") not in (None, score.get("version")):
        reason = f"{task}: graded by version {score.get('version')}, the grader is at version {now['version']} now"
        return Fault(reason, regrade=True)
    if score.get("stale"):
        return Fault(f"{task}: {score['stale']}", regrade=True)
    return None
