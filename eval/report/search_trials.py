"""A search as its trials.json tells it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ba_lora.errors import UserError
from ba_lora.experiments.search.best import TRIALS
from ba_lora.experiments.search.journal import COMPLETE
from ba_lora.io import read_object


@dataclass(frozen=True)
class SearchTrials:
    """A search as its trials.json tells it."""

    folder: Path
    facts: dict[str, Any]

    @property
    def space(self) -> dict[str, Any]:
        return self.facts["space"]

    @property
    def trials(self) -> list[dict[str, Any]]:
        return self.facts["trials"]

    @property
    def whole(self) -> list[dict[str, Any]]:
        return [trial for trial in self.trials if trial["status"] == COMPLETE]

    @property
    def best(self) -> dict[str, Any] | None:
        return next((trial for trial in self.trials if trial["number"] == self.facts["best"]), None)

    @property
    def maximise(self) -> bool:
        return self.space["objective"] == "heldout_accuracy"

    def best_so_far(self) -> list[float]:
        """Return the best value after each trial; NaN before the first whole one."""
        found, best = [], math.nan
        for trial in self.trials:
            if trial["status"] == COMPLETE:
                value = trial["value"]
                best = value if math.isnan(best) else (max if self.maximise else min)(best, value)
            found.append(best)
        return found


def read_search(folder: Path) -> SearchTrials:
    """Return a search. Raises UserError where the folder is none's, or its trials.json is damaged."""
    facts = read_object(folder / TRIALS)
    if facts is None or not {"title", "space", "trials", "best"} <= facts.keys():
        raise UserError(f"{folder / TRIALS} is not there or damaged: sh scripts/search.sh writes it at a search's end")
    return SearchTrials(folder, facts)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return each key's last part, where no other key ends so."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}
