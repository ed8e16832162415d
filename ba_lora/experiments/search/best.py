"""The best values of finished searches, for tables: `search: SPACE` in an entry of a table's rows."""

from pathlib import Path

from ba_lora.errors import UserError
from ba_lora.experiments.search.space import load_space
from ba_lora.io import read_object
from ba_lora.paths import PROJECT_ROOT

TRIALS = "trials.json"
ENGINES_OWN = ("engine", "search_seed")  # of a space's identity: several searches of it differ in these
SEARCHES_PATH = PROJECT_ROOT / "outputs" / "searches"


def search_folder(base: str, method: str, space: str) -> Path:
    """Return the folder of a base's and method's searches of a space, by all engines and seeds."""
    return SEARCHES_PATH / f"{base}-{method}-{space}"


def finished_searches(base: str, method: str, space: str) -> tuple[str, ...]:
    """Return the engines and search seeds of the finished searches, by their folders' names (tpe-s0)."""
    return tuple(sorted(path.parent.name for path in search_folder(base, method, space).glob(f"*/{TRIALS}")))


def best_words(base: str, method: str, space: str) -> list[str] | None:
    """Return `key=value` of the best trial of all these searches, None where none is finished. Raises UserError where
    one was made in another space than the file has now."""
    folder = search_folder(base, method, space)
    found = []
    now = {key: value for key, value in load_space(space).identity().items() if key not in ENGINES_OWN}
    for path in sorted(folder.glob(f"*/{TRIALS}")):
        facts = read_object(path)
        if facts is None:
            raise UserError(f"{path} is damaged: delete it, and give the search's command again")
        if changed := [key for key, value in now.items() if facts["space"].get(key) != value]:
            raise UserError(
                f"{path} is of another search space than {space} ({', '.join(changed)} differ): delete {path.parent}, "
                "and give the search's command again"
            )
        sign = -1 if facts["space"]["objective"] == "heldout_accuracy" else 1
        found += [
            (sign * trial["value"], trial["words"]) for trial in facts["trials"] if trial["number"] == facts["best"]
        ]
    return min(found, key=lambda entry: entry[0])[1] if found else None
