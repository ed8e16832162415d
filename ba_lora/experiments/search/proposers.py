"""Who proposes the next trial: Optuna's samplers in this process, NOMAD in a child.

Trial n is proposed from the outcomes of the trials 0 … n − k and the proposals after them (k: `trials_at_once`),
whatever else has ended by then. An engine's random numbers follow from (search_seed, n). So the trials do not depend
on which of several trainings was faster, and a search that was killed makes the same ones as one that was not.
"""

from typing import Any, Protocol

from ba_lora.experiments.search.journal import GRID_NOTES, Journal, Trial, import_optuna
from ba_lora.experiments.search.space import SearchSpace


class Exhausted(Exception):
    """The engine has no further trial to propose, before its budget is spent."""


class Proposer(Protocol):
    """An engine."""

    def propose(self, journal: Journal) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Return the next trial's values and what the engine notes of it; None: it waits for an outcome.

        Raises Exhausted where there is none left.
        """

    def tell(self, trial: Trial) -> None:
        """Take the outcome of a trial, in the trials' order."""

    def close(self) -> None:
        """End what it has started."""


class OptunaProposer:
    """TPE (arXiv 1907.10902's library, its defaults, multivariate), uniform random points, or the points of a grid in a
    seeded order."""

    def __init__(self, space: SearchSpace) -> None:
        self._space = space

    def propose(self, journal: Journal) -> tuple[dict[str, Any], dict[str, Any]]:
        number = len(journal.trials)
        if number == 0 and self._space.engine != "grid" and self._space.start is not None:
            return self._space.start, {}
        study = journal.study(sampler=self._sampler(number))
        study.ask(journal.distributions)
        asked = study.trials[-1]
        return dict(asked.params), {key: asked.system_attrs[key] for key in GRID_NOTES if key in asked.system_attrs}

    def _sampler(self, number: int) -> Any:
        samplers = import_optuna().samplers
        if self._space.engine == "grid":
            points = {parameter.key: parameter.grid() for parameter in self._space.parameters}
            return samplers.GridSampler(points, seed=self._space.search_seed)
        seed = (self._space.search_seed * 1_000_003 + number) % 2**32
        if self._space.engine == "random":
            return samplers.RandomSampler(seed=seed)
        return samplers.TPESampler(seed=seed, multivariate=True, constant_liar=self._space.trials_at_once > 1)

    def tell(self, trial: Trial) -> None:
        pass  # it reads the journal

    def close(self) -> None:
        pass
