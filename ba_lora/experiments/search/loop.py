"""The search itself: propose, train, prune, tell; `Search` takes one engine through its budget.

Everything that counts is on disk before the next step depends on it (journal.py), so the same command goes on after
kill -9. Trials are proposed, and their outcomes told, in their numbers' order; trainings run in any (proposers.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

from ba_lora.errors import UserError
from ba_lora.experiments.executors.base import Busy, Executor, Slot, StageQueue
from ba_lora.experiments.search.journal import COMPLETE, FAILED, PRUNED, Journal, Outcome, Trial
from ba_lora.experiments.search.nomad import NomadProposer
from ba_lora.experiments.search.proposers import Exhausted, OptunaProposer, Proposer
from ba_lora.experiments.search.space import SearchSpace
from ba_lora.experiments.search.trials import TrialRuns, ask_to_stop, remove_weights
from ba_lora.experiments.spec import Spec
from ba_lora.experiments.stages import Stage, evaluation_stages, launch_command, training_stage
from ba_lora.experiments.state import stage_error
from ba_lora.io import disk_errors
from ba_lora.locks import holder, try_lock, work_lock_path
from ba_lora.runs.folder import is_trained

LOOK_S = 1.0  # between two looks at the evaluations of what runs; a training that ends is seen at once
MAX_FAILURES = 5  # trials in a row, from the first on: then it is no matter of the values


@dataclass
class _Running:
    """A proposed trial whose outcome is not told yet."""

    trial: Trial
    specs: list[Spec]  # a seed each
    losses: list[float] = field(default_factory=list)  # of the seeds that are done
    facts: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    work: StageQueue | None = None
    outcome: Outcome | None = None
    judged: int = -1  # the last step whose evaluation the pruning rule has judged

    @property
    def spec(self) -> Spec:
        """The training that runs, or is next."""
        return self.specs[len(self.losses)]

    @property
    def has_ended(self) -> bool:
        return self.outcome is not None and self.work is None


class Search:
    """Takes a search from what its journal holds to the end of its budget. Use `run`."""

    def __init__(
        self,
        journal: Journal,
        runs: TrialRuns,
        proposer: Proposer,
        executor: Executor,
        *,
        say: Callable[[str], None] = print,
    ) -> None:
        self.journal, self.runs, self.space = journal, runs, journal.space
        self._proposer, self._executor, self._say = proposer, executor, say
        self._running: dict[int, _Running] = {}
        self._exhausted: str | None = None
        self._said: set[str] = set()  # what is said once

    def run(self) -> str | None:
        """Work until the budget is spent; return why it was not, where the engine had no further trial."""
        try:
            if self.journal.told:  # a search that was killed may have left them
                self._remove_weights(self.journal.told - 1)
            for trial in self.journal.trials[self.journal.told :]:
                self._begin(trial)
            while True:
                self._advance()
                if self.journal.told == len(self.journal.trials) and self._is_proposed:
                    return self._exhausted
                while (slot := self._executor.free_slot()) is not None and self._start(slot):
                    pass
                for work in self._executor.wait(LOOK_S):
                    self._ended(next(running for running in self._running.values() if running.work is work))
                for running in list(self._running.values()):
                    self._tell_news(running)
                    self._prune(running)
        finally:
            for line in self._executor.cancel():
                self._say(line)
            for running in self._running.values():
                if running.work is not None:
                    running.work.release()
            self._proposer.close()

    @property
    def _is_proposed(self) -> bool:
        return self._exhausted is not None or len(self.journal.trials) >= self.space.budget

    # ---- in the trials' order

    def _advance(self) -> None:
        """Propose and tell as far as it goes: trial n is proposed as soon as n − k + 1 outcomes are told, before the
        next one is; NOMAD may wait for more, to the end of its block."""
        while True:
            proposed, told = len(self.journal.trials), self.journal.told
            is_due = told >= proposed - self.space.trials_at_once + 1
            if not self._is_proposed and is_due and self._propose():
                continue
            if told == proposed or not self._running[told].has_ended:
                return
            self._tell(self._running.pop(told))

    def _propose(self) -> bool:
        try:
            proposal = self._proposer.propose(self.journal)
        except Exhausted as error:
            self._exhausted = str(error)
            return False
        if proposal is None:
            return False
        self._begin(self.journal.propose(*proposal))
        return True

    def _begin(self, trial: Trial) -> None:
        self._running[trial.number] = running = _Running(trial, [])
        try:
            running.specs = [self.runs.spec(trial.number, trial.values, seed) for seed in self.space.seeds]
        except UserError as error:
            running.outcome = Outcome(FAILED, facts={"error": str(error)})

    def _tell(self, running: _Running) -> None:
        trial, outcome = running.trial, running.outcome
        assert outcome is not None
        self.journal.tell(trial.number, outcome)
        self._proposer.tell(trial)
        self._remove_weights(trial.number)
        shown = "" if outcome.loss is None else f" {self._shown(outcome.loss)}"
        error = f": {outcome.facts['error']}" if outcome.status == FAILED else ""
        best = self.best()
        told = f", best {self._shown(best.outcome.loss)} of trial {best.number}" if best else ""
        values = " ".join(self.space.words(trial.values))
        of_all = f"{trial.number + 1} of {self.space.budget}"
        self._say(f"trial {trial.number}: {outcome.status}{shown}{error} | {values}   [{of_all}{told}]")
        first = self.journal.trials[:MAX_FAILURES]
        if trial.number == MAX_FAILURES - 1 and all(one.outcome.status == FAILED for one in first):
            raise UserError(f"the first {MAX_FAILURES} trials have failed, the last one with: {outcome.facts['error']}")

    def _remove_weights(self, number: int) -> None:
        for seed in self.space.seeds:
            remove_weights(self.runs.run_path(number, seed))

    def best(self) -> Trial | None:
        """Return the trial with the least loss of those that are whole, the first of equals; None where none is."""
        return best_of(self.journal.trials)

    def _shown(self, loss: float) -> str:
        return f"{self.space.objective} {1 - loss if self.space.maximise else loss:.5g}"

    # ---- in any order

    def _start(self, slot: Slot) -> bool:
        """Start the next training on the slot; return whether there was one."""
        for running in self._running.values():
            if running.outcome is not None or running.work is not None:
                continue
            spec = running.spec
            lock_path = work_lock_path(spec.config.run_path)
            if (lock := try_lock(lock_path)) is None:  # of a killed search, whose stages live on
                self._tell_waiting(running, f"is worked on by {holder(lock_path)}")
                continue
            try:
                running.work = self._executor.find(spec.config.run_path)  # what a killed search gave to a cluster
            except Busy as error:
                self._tell_waiting(running, str(error))
                lock.close()
                continue
            if running.work is not None:
                running.work.locks.append(lock)
                return True
            running.work = self._work(spec, slot, lock)
            self._executor.submit(running.work, slot)
            return True
        return False

    def _tell_waiting(self, running: _Running, why: str) -> None:
        told = f"waiting: trial {running.trial.number} {why}"
        if told not in self._said:
            self._said.add(told)
            self._say(told)

    def _tell_news(self, running: _Running) -> None:
        """Say what a cluster has done with a trial."""
        while running.work is not None and running.work.news:
            self._say(f"trial {running.trial.number}: {running.work.news.pop(0)}")

    def _work(self, spec: Spec, slot: Slot, lock: IO[str]) -> StageQueue:
        config = spec.config
        stages: list[Stage] = []
        if not is_trained(config.run_path, config):
            launch = launch_command(slot.launch_environment, num_gpus=slot.num_gpus)
            stages.append(training_stage(spec, launch))
        if config.kind == "nlg" and config.eval.tasks:
            stages += evaluation_stages([config])
        log_folder = self.runs.folder / "logs"
        with disk_errors(log_folder):
            log_folder.mkdir(parents=True, exist_ok=True)
        return StageQueue(stages, log_folder, [lock])

    def _ended(self, running: _Running) -> None:
        work, spec = running.work, running.spec
        assert work is not None
        running.seconds += work.seconds
        try:
            self._prune(running)  # where the training was faster than the last look at it, or failed since
            if running.outcome is None:
                running.outcome = self._concluded(running, work)
            if running.outcome is not None:
                running.outcome.facts |= {"seconds": round(running.seconds, 2), "runs": running.facts}
            self._tell_news(running)
            self._executor.forget(work, spec.config.run_path)
        finally:
            running.work = None
            work.release()

    def _concluded(self, running: _Running, work: StageQueue) -> Outcome | None:
        """Return what came of a trial whose training has ended; None where its next seed is still to be trained."""
        config = running.spec.config
        if failures := work.failures.get(config.run_path):
            facts = {"error": stage_error(failures[0]), "log": str(failures[0].log_path)}
            return Outcome(FAILED, None, self._evaluations(running), facts)
        loss = self.runs.loss(config)
        running.facts.append({"seed": config.seed, "loss": loss} | self.runs.facts(config))
        running.losses.append(loss)
        if len(running.losses) < len(running.specs):
            return None
        mean = sum(running.losses) / len(running.losses)
        if not math.isfinite(mean):
            return Outcome(FAILED, None, self._evaluations(running), {"error": "its held-out loss is not finite"})
        return Outcome(COMPLETE, mean, self._evaluations(running), {})

    def _evaluations(self, running: _Running) -> dict[int, float]:
        return {step: loss for step, loss, _ in self.runs.evaluations(running.specs[0].config)}

    def _prune(self, running: _Running) -> None:
        """End a trial at the first evaluation that the rule is against; of the first seed's, but for the last one.

        The rule looks at the outcomes that the trial was proposed from. So it does not matter when this is called.
        """
        if self.space.pruning is None or running.losses or running.outcome is not None or running.work is None:
            return
        number = running.trial.number
        upto = max(0, number - self.space.trials_at_once + 1)
        seen: dict[int, float] = {}
        for step, loss, is_last in self.runs.evaluations(running.specs[0].config):
            if is_last:
                return
            seen[step] = loss
            if step <= running.judged:
                continue
            running.judged = step
            if self.journal.is_pruned(number, seen, upto=upto):
                running.outcome = Outcome(PRUNED, loss, seen, {"pruned_at_step": step})
                ask_to_stop(running.specs[0].config.run_path)
                return


def open_proposer(space: SearchSpace) -> Proposer:
    """Return the space's engine. Raises UserError where its package is missing."""
    return NomadProposer(space) if space.engine == "nomad" else OptunaProposer(space)


def best_of(trials: list[Trial]) -> Trial | None:
    """Return the whole trial with the least loss, the first of equals; None where none is whole."""
    whole = [trial for trial in trials if trial.outcome is not None and trial.outcome.status == COMPLETE]
    return min(whole, key=lambda trial: trial.outcome.loss, default=None)
