"""A hyper-parameter search as a page: its trials, what mattered, what it cost; several searches: their engines.

    python -m eval.report.search FOLDER [FOLDER …] [output=DIR]

FOLDER is a search's (sh scripts/search.sh), of which trials.json is read. Written there: report.md, and as figures the
best value by trial, Optuna's importances (fANOVA), slices and parallel coordinates. With `output`, also what tells
the engines apart, there: engines.md, engines.json, engines.png and .pdf.
"""

import argparse
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ba_lora.config.checks import check_place
from ba_lora.errors import CommandParser, UserError, run_entry_point
from ba_lora.experiments.search.journal import COMPLETE, PRUNED, distribution, import_optuna
from ba_lora.experiments.search.space import Parameter
from ba_lora.io import finite, write_bytes_atomic, write_json_atomic, write_text_atomic
from ba_lora.paths import written_path
from ba_lora.words import take_options
from eval.report.search_figures import comparison_figure, search_figures
from eval.report.search_trials import SearchTrials, read_search, short_names

if TYPE_CHECKING:
    import optuna

MAX_SHOWN = 100  # trials in the page's table; trials.csv has all


def main() -> int:
    parser = CommandParser(
        prog="python -m eval.report.search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="+", metavar="FOLDER", help="of a search; output=DIR: compare them there")
    words = parser.parse_intermixed_args().words
    own, others = take_options(words, ("output",))
    searches = [read_search(written_path(folder)) for folder in others]
    for search in searches:
        write_search_report(search)
    if "output" in own:
        output = written_path(own["output"])
        check_place(output, "output")
        write_comparison(searches, output)
        print((output / "engines.md").read_text(encoding="utf-8"))
    else:
        print((searches[0].folder / "report.md").read_text(encoding="utf-8"))
    print(
        f"report{'s' if len(searches) > 1 else ''}: "
        + " ".join(str(search.folder / "report.md") for search in searches)
    )
    return 0


def study_of(search: SearchTrials) -> "optuna.Study":
    """Return the trials, with the objective's own values, as Optuna's functions read them."""
    optuna = import_optuna()
    short = short_names([parameter["key"] for parameter in search.space["parameters"]])
    parameters = [Parameter(**{**raw, "choices": tuple(raw["choices"])}) for raw in search.space["parameters"]]
    distributions = {short[parameter.key]: distribution(parameter) for parameter in parameters}
    study = optuna.create_study(
        direction="maximize" if search.maximise else "minimize", study_name=search.space["objective"]
    )
    for trial in search.trials:
        if trial["status"] in (COMPLETE, PRUNED) and trial["value"] is not None:
            state = optuna.trial.TrialState.COMPLETE if trial["status"] == COMPLETE else optuna.trial.TrialState.PRUNED
            values = {short[key]: value for key, value in trial["values"].items()}
            study.add_trial(
                optuna.trial.create_trial(state=state, value=trial["value"], params=values, distributions=distributions)
            )
    return study


def importances(search: SearchTrials) -> dict[str, float]:
    """Return how much of the value each parameter decides, by fANOVA (Hutter et al., ICML 2014); together 1. {} for
    fewer than 4 whole trials, or where all have one value."""
    values = {trial["value"] for trial in search.whole}
    if len(search.whole) < 4 or len(values) < 2:
        return {}
    optuna = import_optuna()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return optuna.importance.get_param_importances(
            study_of(search), evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
        )


# ---- one search


def write_search_report(search: SearchTrials) -> None:
    """Write a search's page and figures into its folder."""
    found = importances(search)
    for name, content in search_figures(search, found).items():
        write_bytes_atomic(search.folder / "figures" / f"{name}.png", content)
    write_text_atomic(search.folder / "report.md", _page(search, found))


def _page(search: SearchTrials, found: dict[str, float]) -> str:
    space, best, objective = search.space, search.best, search.space["objective"]
    lines = [f"# {search.facts['title']}", ""]
    seeds = ", ".join(map(str, space["seeds"]))
    lines.append(
        f"{len(search.trials)} trials by {space['engine']} (search_seed {space['search_seed']}), each trained with "
        f"{'seed' if len(space['seeds']) == 1 else 'seeds'} {seeds}; objective: {objective}."
    )
    if search.facts.get("ended_early"):
        lines.append(f"The engine had no further trial to propose: {search.facts['ended_early']}.")
    if best is not None:
        lines += ["", f"Best: trial {best['number']}, {objective} {best['value']:.5g} (`best.yaml`):", "", "```text"]
        lines += [*best["words"], "```"]
        lines += ["", "The best of many trials looks better than it is: judge it on other rows, with other seeds."]
    lines += ["", "## Cost", "", *_cost(search)]
    if found:
        lines += ["", "## What mattered", "", "| parameter | importance |", "| --- | --- |"]
        lines += [f"| {name} | {share:.2f} |" for name, share in found.items()]
        lines += ["", "By fANOVA, over the whole trials. With few trials it is a hint, not a measurement."]
        lines += [
            "",
            *(f"![{name}](figures/{name}.png)" for name in ("history", "importances", "slice", "parallel_coordinates")),
        ]
    lines += ["", "## Trials", ""]
    short = short_names([parameter["key"] for parameter in space["parameters"]])
    lines.append("| trial | status | " + " | ".join([objective, *short.values(), "seconds"]) + " |")
    lines.append("| --- " * (len(short) + 4) + "|")
    for trial in search.trials[:MAX_SHOWN]:
        cells = [_shown(trial.get("value")), *(_shown(value) for value in trial["values"].values())]
        cells.append(_shown(trial.get("seconds")))
        status = trial["status"] + (f": {trial['error'][:80]}" if trial.get("error") else "")
        lines.append(f"| {trial['number']} | {status.replace('|', '/')} | {' | '.join(cells)} |")
    if len(search.trials) > MAX_SHOWN:
        lines.append(f"\nThe first {MAX_SHOWN} of {len(search.trials)}; trials.csv has all.")
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cost(search: SearchTrials) -> list[str]:
    seconds = [trial["seconds"] for trial in search.trials if trial.get("seconds") is not None]
    memory = [
        run["peak_memory_mb"] for trial in search.trials for run in trial.get("runs", []) if run["peak_memory_mb"]
    ]
    counts = {
        status: sum(t["status"] == status for t in search.trials)
        for status in dict.fromkeys(t["status"] for t in search.trials)
    }
    lines = [f"- {', '.join(f'{number} {status}' for status, number in counts.items())}"]
    if seconds:
        lines.append(
            f"- {sum(seconds):.0f} s of training and evaluation, {statistics.median(seconds):.1f} s a trial (median)"
        )
    if seconds and search.best is not None:
        until = sum(trial.get("seconds") or 0 for trial in search.trials[: search.best["number"] + 1])
        lines.append(f"- {until:.0f} s until the best trial was known")
    if memory:
        lines.append(f"- at most {max(memory):.0f} MiB of memory")
    if search.facts.get("hardware"):
        lines.append(f"- {search.facts['hardware']}")
    return lines


# ---- several


def write_comparison(searches: Sequence[SearchTrials], folder: Path) -> None:
    """Write what tells the engines apart. Raises UserError where the searches are not of one space and budget, or one
    has no complete trial."""
    first = searches[0].space
    for search in searches:
        if not search.whole:
            raise UserError(f"{search.folder} has no trial that is complete: leave it out, or run the search further")
    for search in searches[1:]:
        for key in ("name", "parameters", "objective", "seeds", "overrides", "trials"):
            if search.space[key] != first[key]:
                raise UserError(
                    f"{search.folder} and {searches[0].folder} differ in {key}: they do not compare engines"
                )
    engines = list(dict.fromkeys(search.space["engine"] for search in searches))
    groups = {engine: [search for search in searches if search.space["engine"] == engine] for engine in engines}
    facts = {engine: _engine(found) for engine, found in groups.items()}
    differences = _differences(groups)
    told = {"objective": first["objective"], "trials": first["trials"], "engines": facts, "differences": differences}
    write_json_atomic(folder / "engines.json", finite(told))  # no best value before an engine's first complete trial
    for kind, content in comparison_figure(groups).items():
        write_bytes_atomic(folder / f"engines.{kind}", content)
    write_text_atomic(folder / "engines.md", _comparison_page(searches, facts, differences))


def _engine(found: Sequence[SearchTrials]) -> dict[str, Any]:
    curves = [search.best_so_far() for search in found]
    length = min(map(len, curves))
    finals = [curve[-1] for curve in curves]
    return {
        "search_seeds": [search.space["search_seed"] for search in found],
        "best": finals,
        "mean_best": statistics.fmean(finals),
        "sd_best": statistics.stdev(finals) if len(finals) > 1 else None,
        "mean_best_so_far": [
            statistics.fmean(values) for values in zip(*(curve[:length] for curve in curves), strict=True)
        ],
        "seconds": sum(trial.get("seconds") or 0 for search in found for trial in search.trials),
        "failed": sum(trial["status"] not in (COMPLETE, PRUNED) for search in found for trial in search.trials),
    }


def _differences(groups: dict[str, list[SearchTrials]]) -> list[dict[str, Any]]:
    """Return, for each pair of engines, the difference of the mean best value, with Welch's 95 % interval where each
    has at least two searches."""
    from scipy.stats import ttest_ind

    finals = {engine: [search.best_so_far()[-1] for search in found] for engine, found in groups.items()}
    engines, found = list(groups), []
    for number, one in enumerate(engines):
        for other in engines[number + 1 :]:
            entry: dict[str, Any] = {"engine": one, "other": other, "interval": None}
            entry["difference"] = statistics.fmean(finals[one]) - statistics.fmean(finals[other])
            spread = [len(values) > 1 and statistics.stdev(values) > 0 for values in (finals[one], finals[other])]
            if all(spread):
                interval = ttest_ind(finals[one], finals[other], equal_var=False).confidence_interval(0.95)
                entry["interval"] = [float(interval.low), float(interval.high)]
            found.append(entry)
    return found


def _comparison_page(searches: Sequence[SearchTrials], facts: dict[str, Any], differences: list[dict[str, Any]]) -> str:
    space = searches[0].space
    objective, better = space["objective"], "higher" if searches[0].maximise else "lower"
    lines = [f"# {searches[0].facts['title']}: engines", ""]
    lines.append(
        f"{space['trials']} trials a search, {objective} ({better} is better). The first trial is the same in all."
    )
    start = searches[0].trials[0]
    if start.get("value") is not None and start["status"] == COMPLETE:
        lines.append(f"It has {objective} {start['value']:.4f}.")
    lines += [
        "",
        "| engine | searches | best (mean ± sd) | best of each | seconds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for engine, one in facts.items():
        spread = "" if one["sd_best"] is None else f" ± {one['sd_best']:.4f}"
        each = ", ".join(f"{value:.4f}" for value in one["best"])
        lines.append(
            f"| {engine} | {len(one['best'])} | {one['mean_best']:.4f}{spread} | {each} | {one['seconds']:.0f} |"
        )
    lines += ["", "| difference of the means | value | 95 % interval (Welch) |", "| --- | --- | --- |"]
    for entry in differences:
        interval = "" if entry["interval"] is None else "{:+.4f} to {:+.4f}".format(*entry["interval"])
        lines.append(f"| {entry['engine']} − {entry['other']} | {entry['difference']:+.4f} | {interval} |")
    lines += ["", _verdict(facts, differences, maximise=searches[0].maximise), "", "![best by trial](engines.png)"]
    return "\n".join(lines) + "\n"


def _verdict(facts: dict[str, Any], differences: list[dict[str, Any]], *, maximise: bool) -> str:
    order = sorted(facts, key=lambda engine: facts[engine]["mean_best"], reverse=maximise)
    counted = [e for e in differences if e["interval"] is not None and (e["interval"][0] > 0 or e["interval"][1] < 0)]
    told = f"By the mean the order is {', '.join(order)}."
    if not counted:
        return f"{told} No interval leaves 0 out: these searches do not tell the engines apart."
    named = []
    for entry in counted:
        won, lost = entry["engine"], entry["other"]
        if (entry["difference"] > 0) != maximise:
            won, lost = lost, won
        named.append(f"{won} better than {lost}")
    return f"{told} Intervals that leave 0 out, not corrected for their number: {'; '.join(named)}."


if __name__ == "__main__":
    run_entry_point(main)
