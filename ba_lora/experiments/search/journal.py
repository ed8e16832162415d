"""What a search has tried, kept so that kill -9 loses nothing: Optuna's journal, one line an event, for every engine.

A proposed trial is one line, with all its values: none is ever there in part. Its outcome is another. `folder/` holds

    search.json      what decides the trials; another search in the same folder is refused
    journal.log      Optuna's JournalStorage: `optuna.load_study` and optuna-dashboard read it

Losses are minimised: an accuracy stands there as 1 − accuracy.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ba_lora.config.schema import setting_differences
from ba_lora.errors import UserError
from ba_lora.experiments.search.space import Parameter, SearchSpace
from ba_lora.io import disk_errors, read_object, write_json_atomic

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

PROPOSED, COMPLETE, PRUNED, FAILED = "proposed", "complete", "pruned", "failed"
GRID_NOTES = ("grid_id", "search_space")  # what Optuna's GridSampler notes of a trial
INSTALL = ".venv/bin/pip install -e '.[search]'"


def import_optuna() -> Any:
    """Return the module, which speaks of errors only. Raises UserError where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise UserError(f"a search needs Optuna, which is not installed: run {INSTALL}") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


@dataclass
class Outcome:
    """What came of a trial. loss: to be minimised; of a pruned trial that of its last counted evaluation, None where
    there is none. evaluations: step → loss, of the first seed's training."""

    status: str
    loss: float | None = None
    evaluations: dict[int, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Trial:
    """A proposed trial: its number, the parameters' values, and its outcome once it is told."""

    number: int
    values: dict[str, Any]
    outcome: Outcome | None = None
    proposal: dict[str, Any] = field(default_factory=dict)  # what the engine notes of it


class Journal:
    """The trials of one search, on disk. The caller holds the search's lock."""

    def __init__(self, folder: Path, space: SearchSpace, run: Mapping[str, Any]) -> None:
        self._optuna = import_optuna()
        self.space = space
        self.distributions = {parameter.key: distribution(parameter) for parameter in space.parameters}
        _claim(folder, {"space": space.identity(), "run": dict(run)}, optuna_version=self._optuna.__version__)
        self.path = folder / "journal.log"
        _cut_torn_line(self.path)
        with disk_errors(self.path):
            self._study = open_study(self.path)
        self.trials = [_trial(frozen) for frozen in self._study.trials]

    @property
    def told(self) -> int:
        """How many trials, from the first on, have their outcome."""
        return next((trial.number for trial in self.trials if trial.outcome is None), len(self.trials))

    def propose(self, values: Mapping[str, Any], proposal: Mapping[str, Any]) -> Trial:
        """Write down the next trial, in one line."""
        frozen = self._optuna.trial.create_trial(
            state=self._optuna.trial.TrialState.RUNNING,
            params=dict(values),
            distributions=self.distributions,
            user_attrs={"proposal": dict(proposal)},
            system_attrs={key: proposal[key] for key in GRID_NOTES if key in proposal},
        )
        with disk_errors(self.path):
            self._study.add_trial(frozen)
        trial = Trial(len(self.trials), dict(values), proposal=dict(proposal))
        self.trials.append(trial)
        return trial

    def tell(self, number: int, outcome: Outcome) -> None:
        """Write down what came of a trial: its facts, its evaluations, and last, in one line, that it has ended."""
        assert number == self.told, "outcomes are told in order"
        states = self._optuna.trial.TrialState
        storage = self._study._storage
        trial_id = self._study.get_trials(deepcopy=False)[number]._trial_id
        with disk_errors(self.path):
            storage.set_trial_user_attr(trial_id, "facts", outcome.facts)
            for step, loss in outcome.evaluations.items():
                storage.set_trial_intermediate_value(trial_id, step, loss)
            state = {COMPLETE: states.COMPLETE, PRUNED: states.PRUNED, FAILED: states.FAIL}[outcome.status]
            values = None if outcome.loss is None or outcome.status == FAILED else [outcome.loss]
            storage.set_trial_state_values(trial_id, state, values)
        self.trials[number].outcome = outcome

    def study(self, *, sampler: Any) -> "optuna.Study":
        """Return a study in memory: the trials up to the first that is not told, and those after them as running."""
        told = self.told
        study = self._optuna.create_study(direction="minimize", sampler=sampler)
        for trial in self.trials:
            study.add_trial(self._frozen(trial, known=trial.number < told))
        return study

    def is_pruned(self, number: int, evaluations: Mapping[int, float], *, upto: int) -> bool:
        """Return whether a trial with these evaluations (step → loss) ends at the last of them, by the first `upto`
        trials' outcomes."""
        rule = self.space.pruning
        assert rule is not None
        pruner = self._optuna.pruners.PercentilePruner(
            rule.percentile, n_startup_trials=rule.startup_trials, n_warmup_steps=rule.warmup_steps
        )
        study = self._optuna.create_study(direction="minimize")
        study.add_trials([self._frozen(trial, known=True) for trial in self.trials[:upto]])
        running = self._optuna.trial.create_trial(
            state=self._optuna.trial.TrialState.RUNNING,
            params=self.trials[number].values,
            distributions=self.distributions,
            intermediate_values=dict(evaluations),
        )
        return pruner.prune(study, running)

    def _frozen(self, trial: Trial, *, known: bool) -> "optuna.trial.FrozenTrial":
        states = self._optuna.trial.TrialState
        outcome = trial.outcome if known else None
        status = outcome.status if outcome else PROPOSED
        found = {PROPOSED: states.RUNNING, COMPLETE: states.COMPLETE, PRUNED: states.PRUNED, FAILED: states.FAIL}
        return self._optuna.trial.create_trial(
            state=found[status],
            value=outcome.loss if outcome and status in (COMPLETE, PRUNED) else None,
            params=trial.values,
            distributions=self.distributions,
            system_attrs={key: trial.proposal[key] for key in GRID_NOTES if key in trial.proposal},
            intermediate_values=outcome.evaluations if outcome else {},
        )


def open_study(path: Path) -> "optuna.Study":
    """Return the study in a journal, made where there is none. One process at a time: the search's lock sees to it."""
    optuna = import_optuna()
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    class Unlocked(JournalFileOpenLock):
        """Optuna's own locks are files, and kill -9 leaves them behind."""

        def acquire(self) -> bool:
            return True

        def release(self) -> None:
            pass

    storage = JournalStorage(JournalFileBackend(str(path), lock_obj=Unlocked(str(path))))
    return optuna.create_study(storage=storage, study_name="search", direction="minimize", load_if_exists=True)


def distribution(parameter: Parameter) -> "BaseDistribution":
    """Return Optuna's distribution of a parameter."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.kind == "choice":
        return CategoricalDistribution(parameter.choices)
    kind = IntDistribution if parameter.kind == "int" else FloatDistribution
    return kind(parameter.low, parameter.high, log=parameter.log)


def _trial(frozen: "optuna.trial.FrozenTrial") -> Trial:
    status = {"COMPLETE": COMPLETE, "PRUNED": PRUNED, "FAIL": FAILED}.get(frozen.state.name)
    outcome = None
    if status is not None:
        loss = frozen.values[0] if frozen.values else None
        outcome = Outcome(status, loss, dict(frozen.intermediate_values), frozen.user_attrs.get("facts", {}))
    return Trial(frozen.number, dict(frozen.params), outcome, frozen.user_attrs.get("proposal", {}))


def _claim(folder: Path, identity: dict[str, Any], *, optuna_version: str) -> None:
    """Write down whose folder it is, or raise UserError where it is another search's."""
    path = folder / "search.json"
    if not path.exists():
        if (folder / "journal.log").exists():
            raise UserError(f"{folder} has a journal.log and no search.json: restore it, or give another output=DIR")
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, identity | {"optuna": optuna_version})
        return
    found = read_object(path)
    if found is None or not {"space", "run", "optuna"} <= found.keys():
        raise UserError(f"{path} is damaged: restore it, or give another output=DIR")
    now = json.loads(json.dumps(identity))
    if changes := setting_differences({key: found[key] for key in now}, now):
        told = ", ".join(changes[:3]) + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")
        raise UserError(f"{folder} holds another search ({told}): give another output=DIR, or delete that folder")
    if found["optuna"] != optuna_version:
        raise UserError(
            f"{folder} was begun with Optuna {found['optuna']}, here is {optuna_version}, whose trials may be others: "
            "install that version, or give another output=DIR"
        )


def _cut_torn_line(path: Path) -> None:
    """Cut off what a killed process has written of a last line: its event has not happened."""
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with disk_errors(path), open(path, "r+b") as file:
            file.truncate(whole)
            os.fsync(file.fileno())
