"""The tables and sentences of all pages hold no number that is not in a committed file."""

import csv
import dataclasses
import json
import re
from statistics import mean, stdev

import numpy as np
import pytest
import yaml

from ba_lora.config.layers import load_config
from ba_lora.experiments.tables import find_table, load_table
from ba_lora.io import sha256_file
from eval.report import __main__ as report
from eval.report import simulation
from eval.report.hypotheses import effect as estimate_effect
from eval.report.hypotheses import level_of
from eval.report.sources import Sources
from eval.report.spec import table_spec
from eval.report.table import build_table
from tests.conftest import ROOT
from tests.support.committed import committed_copy, committed_paths, committed_text
from tests.support.pages import PAGES

README, RESULTS = PAGES["README.md"], PAGES["docs/results.md"]


def test_the_papers_numbers_are_those_of_the_csv():
    rows = list(csv.DictReader(open(ROOT / "results" / "paper_reported" / "nlg_main.csv", encoding="utf-8")))
    known = {(row["model"], row["method"], row["task"]): f"{row['mean']} ± {row['std']}" for row in rows}
    printed = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in RESULTS.splitlines()
        if re.match(r"\| (llama|mistral|gemma)", line)
    ]
    assert len(printed) == 12
    for model, method, *cells in printed:
        wanted = [known[model, method, task] for task in ("gsm8k", "math", "humaneval", "mbpp", "mt_bench")]
        assert cells[0::2] == wanted and set(cells[1::2]) == {""}


def test_the_toys_numbers_are_those_of_the_results():
    """Mean ± standard deviation (n − 1) over the committed runs of each method."""
    printed = {
        cells[0]: cells[1:]
        for line in README.splitlines()
        if (cells := [cell.strip() for cell in line.strip("|").split("|")])[0] in ("untuned", "ba_lora")
    }
    assert set(printed) == {"untuned", "ba_lora"}
    results = [json.loads(path.read_text()) for path in (ROOT / "results" / "default" / "runs").glob("toy-*.json")]
    for method, cells in printed.items():
        scores = [100 * r["evaluation"]["toy"]["metrics"]["strict"] for r in results if _of_the_table(r, method)]
        spread = f" ± {stdev(scores):.1f}" if len(scores) > 1 else ""
        assert cells[:2] == [f"{mean(scores):.1f}{spread}", str(len(scores))]


def test_the_toy_table_is_an_extract_of_its_report():
    """Mean ± standard deviation; perplexity before and after in one cell."""
    methods = {
        "not tuned": "untuned",
        "Full FT": "full_ft",
        "LoRA": "lora",
        "LoRA + all three terms": "lora_ba",
        "PiSSA": "pissa",
        "BA-LoRA (2024)": "ba_lora",
        "BA-LoRA (ICLR 2026)": "ba_lora_iclr2026",
    }
    cells = {
        (cell["method"], cell["setting"], cell["column"]): cell
        for cell in json.loads(committed_text("results/toy/table.json"))["cells"]
    }

    def shown(method, base, column, decimals):
        cell = cells[method, f"base={base}", column]
        spread = "" if cell["std"] is None else f" ± {cell['std']:.{decimals}f}"
        lost = sum(failure["status"] == "collapsed" for failure in cell["failures"])
        spread += f" ({lost} of {cell['planned']} collapsed)" if lost else ""
        return f"{cell['mean']:.{decimals}f}{spread}"

    printed = re.findall(r"^\| (clean|noisy) \| ([^|]+) \| (.*) \|$", RESULTS, flags=re.M)
    assert [row[:2] for row in printed] == [(base, label) for base in ("clean", "noisy") for label in methods]
    for base, label, row in printed:
        before, after = (shown(methods[label], base, column, 2) for column in ("ppl_before", "ppl_after"))
        wanted = [shown(methods[label], base, column, 1) for column in ("strict", "flexible", "rare", "noisy")]
        wanted += [f"{before.split()[0]} → {after}", shown(methods[label], base, "distinct_2", 1)]
        assert row.split(" | ") == wanted, (base, label)


def test_what_the_toy_says_is_what_its_comparisons_say():
    """BA-LoRA (ICLR 2026) against PiSSA, clean and noisy base: differences, intervals, seeds."""
    comparisons = json.loads(committed_text("results/toy/table.json"))["comparisons"]
    found = {
        (one["column"], one["focus"]["setting"]): one
        for one in comparisons
        if (one["focus"]["method"], one["other"]["method"]) == ("ba_lora_iclr2026", "pissa")
    }

    def told(name, base, decimals):
        one = found[name, f"base={base}"]
        low, high = (f"{one[key]:.{decimals}f}" for key in ("low", "high"))
        return f"{one['difference']:+.{decimals}f} ({low} to {high})"

    def cells(label):
        (row,) = re.findall(rf"^ *\| {re.escape(label)} \|(.*)\|$", RESULTS, flags=re.M)
        return [cell.strip().replace("−", "-") for cell in row.split("|")]

    for label, name, decimals in (("perplexity after", "ppl_after", 2), ("distinct-2 (%)", "distinct_2", 1)):
        assert cells(label) == [told(name, base, decimals) for base in ("clean", "noisy")]
    assert cells("strict (%)") == [told("strict", base, 1) for base in ("clean", "noisy")]
    by_seed = [found["strict", f"base={base}"]["by_seed"] for base in ("clean", "noisy")]
    assert cells("strict (%), seeds 42, 1, 2") == [", ".join(f"{value:+.2f}" for value in values) for values in by_seed]
    of_2024 = [one for one in comparisons if (one["focus"]["method"], one["other"]["method"]) == ("ba_lora", "pissa")]
    assert all(one["low"] <= 0 <= one["high"] and abs(one["difference"]) <= 0.5 for one in of_2024)
    assert len(comparisons) == 72 and not any(one["p"] for one in comparisons)


def _cells(row):
    return [cell.strip(" *").replace("−", "-") for cell in row.strip().strip("|").split("|")]


# Table → where the page tells what it found, its number of hypotheses, and of means at the highest noise.
INHERITANCE = {
    "inheritance": ("## Results", 7, 7),
    "inheritance_rate": ("## At one learning rate", 2, 3),
    "inheritance_nlu": ("## The twin's results", 7, 7),
    "inheritance_nlu_rate": ("## The twin at one learning rate", 2, 4),
    "inheritance_nlu_published": ("## The published weights on the twin", 4, 6),
    "inheritance_nlu_sst2": ("## The twin on real data", 7, 7),
    "inheritance_nlu_sst2_rate": ("## The twin on real data at one learning rate", 4, 6),
    "inheritance_nlu_lora": ("## The twin's LoRA at higher rates", 4, 2),
}
DECISIONS = {  # what stands behind "refuted", by the interval and the margin
    "above 0": lambda low, high, margin: low > 0 and high > margin,
    "within ± 1": lambda low, high, margin: margin == 1 and -1 <= low and high <= 1,
    "below 0": lambda low, high, margin: high < 0 and low < -margin,
}


def _hypotheses(table):
    return {
        one["hypothesis"]["name"]: one
        for one in json.loads(committed_text(f"results/{table}/table.json"))["hypotheses"]
    }


def _effect(one):
    return f"{one['difference']:+.2f}", f"{one['low']:+.2f} to {one['high']:+.2f}"


@pytest.mark.parametrize("table", INHERITANCE)
def test_what_is_inherited_is_what_the_reports_found(table):
    """Each hypothesis with its interval and decision, and the means at the highest noise."""
    section, num_hypotheses, num_means = INHERITANCE[table]
    told = PAGES["docs/inheritance.md"].partition(section + "\n")[2].partition("\n## ")[0]
    tables = [[_cells(line) for line in part.splitlines()] for part in told.split("\n\n") if part.startswith("|")]
    (effects,) = [rows for header, _, *rows in tables if "95 % interval" in header]
    ((head, rows),) = [(header, rows) for header, _, *rows in tables if header[1].startswith("p(wrong rule)")]
    found = _hypotheses(table)
    assert len(found) == num_hypotheses
    shown = {name.partition(":")[0]: cells for name, *cells in effects}
    for name, one in found.items():
        if one["difference"] is None:
            assert one["decision"] == "not run" and name not in shown
            continue
        effect, interval, decision = shown[name]
        assert (effect, interval) == _effect(one) and decision.startswith(one["decision"])
        for reason, holds in DECISIONS.items():
            assert reason not in decision or holds(one["low"], one["high"], one["hypothesis"]["margin"]), name
        by_holm = re.search(r"Holm (0\.\d+)", decision)
        assert by_holm or one["p_adjusted"] is None, name
        assert not by_holm or float(by_holm[1]) == pytest.approx(one["p_adjusted"], abs=0.0005)
        if one["guard"] is not None and one["hypothesis"]["primary"]:
            guards = " ".join(told.replace("−", "-").partition("The guard, ")[2].partition("\n\n")[0].split())
            ((missed, value),) = re.findall(rf"(not )?kept by [^;]*?{name} \((-?[\d.]+)\)", guards)
            assert value == f"{one['guard']:.2f}"
            assert bool(missed) == (one["guard"] < -one["hypothesis"]["guard"]["margin"])
    report = committed_text(f"results/{table}/table.md").partition("## Means over the pre-trained models\n")[2]
    (header, _, *lines) = [_cells(line) for line in report.partition("\n## ")[0].splitlines() if line.startswith("|")]
    means = {  # a method, or a method and its learning rate
        ", ".join([method, *re.findall("rate=(.*) ", level)]): dict(zip(header[2:], cells, strict=True))
        for level, method, *cells in lines
        if level.endswith("noise=40")
    }
    assert len({row[0] for row in rows}) == num_means
    for method, *texts in rows:
        for column, text in zip(head[1:], texts, strict=True):
            (cell,) = [cell for name, cell in means[method].items() if name.startswith(column)]
            numbers = re.findall(r"[\d.]+", text)
            assert numbers, (method, column)
            exact_ones = re.findall(r"[\d.]+", cell)  # more: the spread, which the page may leave out, and n
            for number, exact in zip(numbers, exact_ones, strict=False):
                decimals = len(number.partition(".")[2])
                assert abs(float(number) - float(exact)) <= 0.51 * 10**-decimals, (method, column)


def test_the_first_hypothesis_follows_from_the_committed_runs(monkeypatch):
    """By the models only: the grades of items are not committed."""
    monkeypatch.setattr(Sources, "grades", lambda *_: None)
    spec = table_spec(load_table(find_table("inheritance")))
    [h1] = [one for one in spec.hypotheses if one.name == "H1"]
    levels = {row for row in spec.rows if row.method in h1.arms and level_of(row, spec.clusters) in h1.levels}
    runs = {key: of for key, of in spec.runs.items() if key[0] in levels and key[1] in (h1.column, h1.guard.column)}
    columns = tuple(spec.column(name) for name in (h1.column, h1.guard.column))
    rows = tuple(row for row in spec.rows if row in levels)
    spec = dataclasses.replace(spec, rows=rows, columns=columns, runs=runs, hypotheses=(h1,))
    (one,) = build_table(spec, report.read_sources(spec, command="")).findings
    committed = _hypotheses("inheritance")["H1"]
    assert (one.difference, one.guard) == pytest.approx((committed["difference"], committed["guard"]))
    assert (one.low, one.high) == pytest.approx((-0.97, 0.08), abs=0.005)
    assert one.num_clusters == (5, 5) and one.num_items is None and one.decision == committed["decision"]
    told = " ".join(PAGES["docs/inheritance.md"].split()).replace("−", "-")
    assert f"{_effect(dataclasses.asdict(one))[0]} ({_effect(dataclasses.asdict(one))[1]}) by the models only" in told


def test_the_committed_reports_tell_what_was_declared_and_when():
    paths = [path for path in committed_paths("results") if path.endswith("/declared.json")]
    assert len(paths) >= 14
    for path in paths:
        declared, made = (
            json.loads(committed_text(f"{path.rpartition('/')[0]}/{name}.json")) for name in ("declared", "table")
        )
        for told in filter(None, (made["declaration"], made["standing"])):
            assert declared["sha256"][:12] in told, path
            assert not declared["num_results"] or f"{declared['num_results']} results were there" in told, path
        assert made["standing"] in committed_text(f"{path.rpartition('/')[0]}/table.md")


def test_the_committed_runs_are_those_that_the_reports_read(tmp_path):
    """A run file that was copied before its evaluation had ended made a report that could not be made again."""
    copied = committed_copy("results", tmp_path)
    found = {(path.stem, sha256_file(path)) for path in copied.rglob("runs/*.json")}
    reports = {path.parent.name: json.loads(path.read_text())["runs"] for path in copied.rglob("table.json")}
    assert len(reports) >= 19
    for table, runs in reports.items():
        missing = [run["run_id"] for run in runs if (run["run_id"], run["result_sha256"]) not in found]
        assert runs and not missing, table


def test_the_committed_reports_tell_what_the_seed_moves():
    """A base of the twin brings its head; the one of the NLU default has none."""
    texts = {table: committed_text(f"results/{table}/table.md") for table in ("methods_nlu_toy", *INHERITANCE)}
    assert [table for table, text in texts.items() if "initialisation of the head" in text] == ["methods_nlu_toy"]
    assert all("dropout of the encoder" in text for table, text in texts.items() if "nlu" in table)


def test_the_first_pages_tell_what_the_reports_on_inheritance_found():
    found, of_rate = _hypotheses("inheritance"), _hypotheses("inheritance_rate")
    twin, at_one_rate = _hypotheses("inheritance_nlu"), _hypotheses("inheritance_nlu_rate")
    real, real_rate = _hypotheses("inheritance_nlu_sst2"), _hypotheses("inheritance_nlu_sst2_rate")
    assert {one["decision"] for one in (*at_one_rate.values(), *real_rate.values())} == {"undecided"}
    everywhere = [_effect(one["H1"]) for one in (found, twin, real)] + [_effect(of_rate["All terms"])]
    of_the_rate = [
        f"{one['H1']['difference'] - rate['At 2.5e-4']['difference']:.2f}"
        for one, rate in ((twin, at_one_rate), (real, real_rate))
    ]
    parts = [
        f"+{one['H1']['difference']:.2f} points {points}" for one, points in zip((twin, real), of_the_rate, strict=True)
    ]
    assert f"Of the {parts[0]}, and of the {parts[1]}, are" in " ".join(PAGES["README.md"].split())
    assert all(f"{points} of it" in PAGES["REPRODUCTION.md"] for points in of_the_rate)
    of_terms = [_effect(one[f"At {rate}"]) for one in (at_one_rate, real_rate) for rate in ("2.5e-4", "1.0e-3")]
    further = [*everywhere, _effect(found["H2"]), *of_terms]
    told = {
        "README.md": [*everywhere, *of_terms],
        "REPRODUCTION.md": further,
        "docs/results.md": [
            *further,
            _effect(_hypotheses("inheritance_nlu_lora")["Full FT, 4.0e-3"]),
            *map(_effect, _hypotheses("inheritance_nlu_published").values()),
            *(_effect(one[name]) for one, name in ((found, "H3"), (found, "H4"), (twin, "H2"), (twin, "H5"))),
            *(_effect(real[name]) for name in ("H2", "H5")),
        ],
    }
    for page, effects in told.items():
        text = " ".join(PAGES[page].replace("−", "-").split())
        for effect, interval in effects:
            assert re.search(rf"{re.escape(effect)}( points)? \((95 % )?{re.escape(interval)}", text), (page, effect)


def test_the_page_on_results_has_every_method_of_its_table():
    cells = json.loads(committed_text("results/methods_nlu_toy/table.json"))["cells"]
    labels = load_table(find_table("methods_nlu_toy")).labels
    found = {(labels[cell["method"]], cell["column"]): cell for cell in cells}
    chosen = yaml.safe_load(committed_text("results/methods_nlu_toy_tuning/chosen.yaml"))
    rates = {labels[method]: float(words[0].partition("=")[2]) for method, words in chosen.items()}
    told = PAGES["docs/results.md"].partition("## Every method on the NLU default\n")[2].partition("\n## ")[0]
    (header, _, *rows) = [_cells(line) for line in told.splitlines() if line.startswith("|")]
    assert {row[0] for row in rows} == rates.keys() and len(rows) == 31
    for name, rate, *shown in rows:
        accuracy, parameters, seconds, memory = (
            found[name, column] for column in ("accuracy", "parameters", "seconds", "memory")
        )
        assert float(rate) == rates[name]
        assert shown == [
            f"{accuracy['mean']:.1f} ± {accuracy['std']:.1f}",
            f"{parameters['mean']:.2f}",
            f"{seconds['mean']:.0f}",
            f"{memory['mean']:.0f}",
        ]
    means = [float(row[2].split()[0]) for row in rows]
    assert means == sorted(means, reverse=True)


def test_the_page_on_results_has_the_tests_and_edges_of_the_methods_on_the_nlu_default():
    report = json.loads(committed_text("results/methods_nlu_toy/table.json"))
    told = PAGES["docs/results.md"].partition("## Every method on the NLU default\n")[2].partition("\n## ")[0]
    text = " ".join(told.split())
    by_method = {}
    for one in report["comparisons"]:
        if one["column"] == "accuracy":
            decided = (one["difference"] > 0) - (one["difference"] < 0) if one["is_significant"] else 0
            by_method.setdefault(one["other"]["method"], set()).add(decided)
    assert set.union(*by_method.values()) == {0, 1}  # "behind no method by a corrected test"
    ahead = {method for method, decided in by_method.items() if decided == {1}}
    assert ahead == {"adalora", "dylora", "peanut", "nmtune", "bitfit", "lorta"}
    assert "ahead of six: AdaLoRA, DyLoRA, NEAT, NMTune, BitFit and LoRTA" in text

    chosen = yaml.safe_load(committed_text("results/methods_nlu_toy_tuning/chosen.yaml"))
    rates = {}
    for row in yaml.safe_load(committed_text("configs/tables/methods_nlu_toy_tuning.yaml"))["rows"]:
        rates |= {
            method: [float(setting.partition("=")[2]) for setting in row["settings"]] for method in row["methods"]
        }
    at = {
        place: {m for m, words in chosen.items() if float(words[0].partition("=")[2]) == rates[m][place]}
        for place in (0, -1)
    }
    assert at[-1] == {"lora_fa", "loha", "adalora", "houlsby", "pfeiffer", "vera"} and at[0] == {"lora_pro", "nmtune"}
    assert (
        "LoRA-FA, LoHa, AdaLoRA, Houlsby, Pfeiffer and VeRA at the highest rate, LoRA-Pro and NMTune at the lowest"
        in text
    )
    tuning = json.loads(committed_text("results/methods_nlu_toy_tuning/table.json"))["cells"]
    found = [f"{c['mean']:.1f} %" for c in tuning if (c["method"], c["column"]) == ("nmtune", "heldout")]
    assert set(found[1:]) == {found[-1]}
    assert f"it has {found[0]} of the held-out rows at the lowest rate, {found[-1]} at each other." in text


def test_the_page_on_results_has_every_method_on_the_nlg_toy():
    report = json.loads(committed_text("results/methods_toy/table.json"))
    labels = load_table(find_table("methods_toy")).labels
    found = {(labels[cell["method"]], cell["column"]): cell for cell in report["cells"]}
    assert all(cell["n"] == cell["planned"] == 5 for cell in report["cells"])
    chosen = yaml.safe_load(committed_text("results/methods_toy_tuning/chosen.yaml"))
    rates = {labels[method]: float(words[0].partition("=")[2]) for method, words in chosen.items()}
    told = PAGES["docs/results.md"].partition("## Every method on the NLG toy\n")[2].partition("\n## ")[0]
    (header, _, *rows) = [_cells(line) for line in told.splitlines() if line.startswith("|")]
    assert {row[0] for row in rows} == rates.keys() and len(rows) == 32
    for name, rate, *shown in rows:
        assert float(rate) == rates[name]
        spread = [(found[name, column], places) for column, places in (("inside", 1), ("outside", 1), ("ppl_after", 2))]
        wanted = [f"{cell['mean']:.{places}f} ± {cell['std']:.{places}f}" for cell, places in spread]
        parameters, seconds, memory = (found[name, column]["mean"] for column in ("parameters", "seconds", "memory"))
        assert shown == [*wanted, f"{parameters / 1000:.1f}", f"{seconds:.0f}", f"{memory:.0f}"], name
    means = [float(row[2].split()[0]) for row in rows]
    assert means == sorted(means, reverse=True)

    text = " ".join(told.replace("−", "-").split())
    behind = {"ba_lora": 0, "ba_lora_iclr2026": 0}
    ahead = set()
    for one in (one for one in report["comparisons"] if one["column"] == "inside"):
        behind[one["focus"]["method"]] += one["high"] < 0
        ahead |= {one["other"]["method"]} if one["low"] > 0 else set()
        if one["other"]["method"] in ("pissa", "lora"):
            shown = "{:+.2f} ({:+.2f} to {:+.2f}".format(*(one[key] for key in ("difference", "low", "high")))
            p = one["p_adjusted"]
            assert (f"{shown}; p {p:.2f}" if p >= 0.001 else shown) in text and (p >= 0.001 or "p < 0.001 both" in text)
    assert f"behind {behind['ba_lora']} (2024) and {behind['ba_lora_iclr2026']} (ICLR 2026) of the 30 others" in text
    assert ahead == {"ia3", "lorta", "prompt_tuning", "prefix_tuning"}
    assert {one["family"] for one in report["comparisons"]} == {"exploratory"}
    (drift,) = [
        one
        for one in report["comparisons"]
        if (one["column"], one["focus"]["method"], one["other"]["method"]) == ("ppl_after", "ba_lora_iclr2026", "pissa")
    ]
    assert "{:+.2f} ({:+.2f} to {:+.2f})".format(*(drift[key] for key in ("difference", "low", "high"))) in text
    dylora = sorted((value for value in found["DyLoRA", "inside"]["values"] if value), reverse=True)
    assert "DyLoRA solves {:.1f} and {:.1f} % with two seeds and nothing with three".format(*dylora) in text
    assert "(IA)³, LoRTA and both kinds of virtual tokens solve next to nothing" in text
    inside = {cell["method"]: cell["mean"] for cell in report["cells"] if cell["column"] == "inside"}
    assert {method for method, mean in inside.items() if mean < 5} == ahead


TERMS = ("consistency", "diversity", "svd")


def test_the_page_on_lambda_has_the_intervals_of_its_sweep():
    """Each is told as "lower by": of PiSSA minus the row."""
    report = json.loads(committed_text("results/lambda_toy/table.json"))
    found = {(one["focus"]["method"], one["focus"]["setting"], one["column"]): one for one in report["comparisons"]}
    text = " ".join(PAGES["docs/lambda.md"].replace("−", "-").split())

    def told(method, share, column, decimals):
        one = found[method, share, column]
        shown = [f"{-one[key] + 0.0:.{decimals}f}" for key in ("difference", "high", "low")]
        return "{} ({} to {})".format(*shown)

    for share in ("share=0.01", "share=0.03", "share=0.1"):
        for method in ("ba_lora", "ba_lora_iclr2026"):
            assert told(method, share, "ppl_after", 2) in text, (method, share)
    assert told("ba_lora", "published", "ppl_after", 3) in text
    assert told("ba_lora_iclr2026", "published", "ppl_after", 2) in text
    assert told("ba_lora", "share=0.3", "flexible", 1).replace(" (", " of flexible accuracy (") in text
    assert told("ba_lora_iclr2026", "share=0.3", "strict", 1).replace(" (", " points (") in text
    assert told("ba_lora", "share=0.3", "strict", 0).replace(" (", " points of strict accuracy (") in text
    small = ("published", *(f"share={share}" for share in (0.003, 0.01, 0.03, 0.1)))
    up_to_10 = [one for (_, share, column), one in found.items() if column != "ppl_after" and share in small]
    assert len(up_to_10) == 20 and all(one["low"] < 0 < one["high"] for one in up_to_10)
    strict = [one["high"] - one["low"] for one in up_to_10 if one["column"] == "strict"]
    assert 16.5 < min(strict) and max(strict) < 21.5
    kl = {(cell["method"], cell["setting"]): cell["values"] for cell in report["cells"] if cell["column"] == "kl"}
    for method in ("ba_lora", "ba_lora_iclr2026"):
        steps = [kl[method, f"share={share}"] for share in (0, 0.003, 0.01, 0.03, 0.1, 0.3, 1)]
        for by_seed in zip(*steps, strict=True):
            assert list(by_seed) == sorted(by_seed, reverse=True), method


def test_the_page_on_lambda_has_the_means_of_its_sweep():
    cells = json.loads(committed_text("results/lambda_toy/table.json"))["cells"]
    found = {(cell["method"], cell["setting"], cell["column"]): cell for cell in cells}
    methods = {"2024": ["ba_lora"], "ICLR 2026": ["ba_lora_iclr2026"], "none (PiSSA)": ["ba_lora", "ba_lora_iclr2026"]}
    settings = {"as published": "published", "0": "share=0"}
    seen = set()
    for line in PAGES["docs/lambda.md"].splitlines():
        terms, share, *numbers, weights = [*_cells(line), *6 * [""]][:6]
        if terms not in methods:
            continue
        setting = settings.get(share) or f"share={float(share.removesuffix(' %')) / 100:g}"
        method = next(one for one in methods[terms] if (one, setting) not in seen)
        seen.add((method, setting))
        for column, decimals, text in zip(("strict", "ppl_after", "kl"), (2, 3, 2), numbers, strict=True):
            cell = found[method, setting, column]
            assert text == f"{cell['mean']:.{decimals}f} ± {cell['std']:.{decimals}f}" and cell["n"] == 3
        for term, shown in zip(TERMS, filter(None, weights.split(", ")), strict=bool(weights)):
            runs = [committed_text(f"results/lambda_toy/runs/{name}.json") for name in cell["run_ids"]]
            used = mean(json.loads(run)["training"]["last_log"][f"lambda_{term}"] for run in runs)
            assert abs(float(shown) - used) <= 0.51 * 10 ** -len(shown.partition(".")[2]), (method, setting, term)
    assert seen == {(method, setting) for method, setting, _ in found}


def test_reproduction_opens_with_the_verdict_that_the_report_wrote():
    """Copied from results/toy/table.md, five lines."""
    lines = json.loads(committed_text("results/toy/table.json"))["verdict"]
    opening = PAGES["REPRODUCTION.md"].split("## ")[0]
    assert len(lines) == 5 and [line[2:] for line in opening.splitlines() if line.startswith("- ")] == lines
    assert committed_text("results/toy/table.md").splitlines()[2:7] == [f"- {line}" for line in lines]


def test_what_the_page_on_statistics_says_is_what_was_simulated():
    lines = json.loads((ROOT / "docs" / "statistics.json").read_text())["lines"]
    text = PAGES["docs/statistics.md"].partition("## What the simulation says")[2]
    found = {(line["metric"], line["num_seeds"], line["seed_sd"]): line for line in lines}

    def same(shown, share):
        decimals = len(shown.partition(".")[2])
        assert abs(float(shown) - 100 * share) <= 0.501 * 10**-decimals, (shown, share)

    header, _, *rows = [_cells(line) for line in text.splitlines() if line.startswith("|")]
    assert header == ["accuracy, seed sd 4 points", "3 seeds", "5 seeds", "10 seeds"]
    rules = {"items only": "_items_alone", "paired": "_paired", "seeds and items": ""}
    seen = set()
    for name, *shown in rows:
        kind = "false" if name.startswith("false marks") else "found"
        key = kind + next(suffix for rule, suffix in rules.items() if f", {rule}" in name)
        seen.add(key)
        for num_seeds, cell in zip((3, 5, 10), shown, strict=True):
            same(cell.removesuffix(" %"), found["accuracy", num_seeds, 4.0][key])
    assert len(seen) == len(rows) == 6

    text = " ".join(text.split())
    of = {metric: [line["false"] for line in lines if line["metric"] == metric] for metric in simulation.METRICS}
    low, high = re.search(r"wrong in ([\d.]+) to ([\d.]+) % of cases", text).groups()
    same(low, min(of["accuracy"]))
    same(high, max(of["accuracy"]))
    others = re.search(r"F1 up to ([\d.]+), Matthews ([\d.]+), perplexity ([\d.]+), Spearman ([\d.]+) %", text).groups()
    for shown, metric in zip(others, ("f1", "matthews", "perplexity", "spearman"), strict=True):
        same(shown, max(of[metric]))
    same(re.search(r"\(([\d.]+) % at sd 0 and 3 seeds\)", text)[1], found["accuracy", 3, 0.0]["false"])
    assert f"{simulation.NUM_ITEMS} items (Spearman: {simulation.NUM_RANKED})" in text
    repeats = {line["repeats"] for line in lines if line["metric"] != "accuracy"}
    (few,), many = repeats, found["accuracy", 3, 0.0]["repeats"]
    assert (
        f"{many} repetitions for accuracy, {few} for the other metrics" in text and f"({few} repetitions: ± 2)" in text
    )
    assert "At a seed sd of 4 points three seeds find a difference of 10 points in less than half of the cases" in text
    assert found["accuracy", 3, 4.0]["found"] < 0.5
    same(re.search(r"\(at 1 point in (\d+) %\)", text)[1], found["accuracy", 3, 1.0]["found"])
    assert max(line["false"] for line in lines) <= 0.06


def _newest_bench(case):
    """Of the default shape on the CPU: vocabulary → case → row, of the newest run that has the case."""
    runs = {}
    for row in csv.DictReader(committed_text("results/bench.csv").splitlines()):
        if (row["device"], row["shape"]) == ("cpu", "default"):
            runs.setdefault((row["commit"], row["vocab"]), {})[row["case"]] = row
    in_order = sorted(runs.items(), key=lambda run: next(iter(run[1].values()))["finished_at"])
    newest = {vocabulary: rows for (_, vocabulary), rows in in_order if case in rows}
    assert set(newest) == {"32000", "128000"}
    return newest


def test_the_price_of_a_step_is_that_of_the_newest_run_with_the_official_recipe():
    newest = _newest_bench("official")
    names = {"official arithmetic": "official", "fused": "fused", "fused, reference cached": "fused_cache"}
    for name, case in names.items():
        (line,) = re.findall(rf"^\| BA-LoRA, {name} \|(.*)\|$", RESULTS, flags=re.M)
        rows = [newest[vocabulary][case] for vocabulary in ("32000", "128000")]
        shown = [f"{float(row[key]):.2f}" for row in rows for key in ("step_ratio", "memory_ratio")]
        assert [cell.strip() for cell in line.split("|")] == shown, name


def test_the_ratios_to_the_best_pissa_are_those_of_the_newest_run():
    told = RESULTS.partition("**Beside the best PiSSA.**")[2].partition("**On a GPU")[0]
    for vocabulary, rows in _newest_bench("pissa_fused").items():
        assert min(rows, key=lambda case: float(rows[case]["step_s"])) == "pissa_fused"
        for name, case in (("fused with the cache", "fused_cache"), ("fused", "fused")):
            for kind in ("step", "memory"):
                what = rf"{'step' if kind == 'step' else 'peak memory'}, {name}"
                (line,) = re.findall(rf"^\| {int(vocabulary):,} \| {what} \|(.*)\|$", told, flags=re.M)
                target, measured, floor = (cell.strip() for cell in line.split("|"))
                ratio = float(rows[case][f"best_{kind}_ratio"])
                assert measured.strip("*").startswith(f"{ratio:.2f}") and floor in (
                    "",
                    f"{float(rows[case]['best_floor_ratio']):.2f}",
                )
                assert ("missed" in measured) == bool(target and round(ratio, 2) > float(target.strip("≤ ")))


def _of_the_table(result, method):
    from ba_lora.config.schema import training_hash

    if method == "untuned":
        return result["method"] == "untuned" and result["config"]["model"]["name"] == "data/toy/clean"
    config = load_config(ROOT / "configs" / "nlg" / "toy.yaml", method=method, overrides=[f"seed={result['seed']}"])
    return result["method"] == method and result["run_id"].endswith(training_hash(config))


ROBUSTNESS = {
    "robustness_nlu_toy": ("## How much hangs on the settings, on the NLU default", 1),
    "robustness_toy": ("## How much hangs on the settings, on the NLG toy", 1),
}


@pytest.mark.parametrize("table", ROBUSTNESS)
def test_the_page_on_results_has_the_spread_over_settings(table):
    section, decimals = ROBUSTNESS[table]
    report = json.loads(committed_text(f"results/{table}/table.json"))
    labels = load_table(find_table(table)).labels
    first, second = (column["name"] for column in report["columns"])
    found = {(labels[one["method"]], one["column"]): one for one in report["over_settings"]}
    told = PAGES["docs/results.md"].partition(section + "\n")[2].partition("\n## ")[0]
    (_, _, *rows) = [_cells(line) for line in told.splitlines() if line.startswith("|")]
    assert {row[0] for row in rows} == {name for name, _ in found}
    for name, *shown in rows:
        wanted = []
        for column, places in ((first, decimals), (second, 3)):
            one = found[name, column]
            assert one["num_settings"] == 12
            wanted += [f"{one[key]:.{places}f}" for key in ("best", "median", "worst", "spread")]
        assert shown == wanted, name


def _over_models(table, value):
    """Return (method, learning rate, level) → `value` of each model, in %, the mean over its runs."""
    found = {}
    for path in committed_paths("results"):
        if re.fullmatch(rf"results/{table}/runs/[^/]+\.json", path):
            run = json.loads(committed_text(path))
            base = re.search(r"/(clean|rule-40|noise-40)-b(\d)$", run["config"]["model"]["name"])
            if base and run["method"] != "untuned":
                level = "clean" if base[1] == "clean" else "noisy"
                roles = run["evaluation"]["likelihood"]["groups"]["role"]
                models = found.setdefault((run["method"], run["config"]["trainer"]["learning_rate"], level), {})
                models.setdefault(base[2], []).append(100 * value(roles["uncorrected"]["metrics"]))
    return {key: [mean(of[base]) for base in sorted(of)] for key, of in found.items()}


def _effects(models, arm, other):
    """Return arm − other of each model with noise and without, [models] each."""
    return tuple(
        [a - b for a, b in zip(models[*arm, level], models[*other, level], strict=True)] for level in ("noisy", "clean")
    )


def test_the_page_on_inheritance_has_the_same_runs_counted_otherwise():
    from scipy import stats

    part = PAGES["docs/inheritance.md"].partition("## The same runs, counted otherwise\n")[2].partition("\n## ")[0]
    told = [_cells(line) for line in part.replace("−", "-").splitlines() if line.startswith("|")]
    arms = {"H1": (("ba_lora", 2.5e-4), ("pissa", 1e-3)), "H2": (("lora", 2.5e-4), ("full_ft", 1e-4))}
    arms["H5"] = (("nmtune", 2e-3), ("lora", 2.5e-4))
    tables = {"twin": "inheritance_nlu", "SST-2": "inheritance_nlu_sst2"}
    models = {name: _over_models(table, lambda metrics: metrics["p_wrong"]) for name, table in tables.items()}
    pairs = [row for row in told if row[0].partition(",")[0] in tables]
    assert len(pairs) == 6
    for name, *shown in pairs:
        table, _, hypothesis = name.partition(", ")
        noisy, clean = _effects(models[table], *arms[hypothesis])
        paired = stats.ttest_rel(noisy, clean)
        low, high = paired.confidence_interval()
        committed = _hypotheses(tables[table])[hypothesis]
        assert mean(noisy) - mean(clean) == pytest.approx(committed["difference"], abs=1e-6)
        assert shown == [
            f"{stats.pearsonr(noisy, clean)[0]:+.2f}",
            f"{committed['low']:+.2f} to {committed['high']:+.2f}",
            f"{low:+.2f} to {high:+.2f}",
            f"{paired.pvalue:.3f}",
        ], name
        decided = {"H1": low > 0, "H2": low > 1, "H5": high < -1}[hypothesis]
        assert decided == (name not in ("twin, H5", "SST-2, H2")), name  # "No other decision changes"

    shares = _over_models("inheritance", lambda m: m["p_wrong"] / (m["p_wrong"] + m["p_right"]))
    pissa, both, own = ("pissa", 2.5e-4), ("ba_lora", 5e-4), ("pissa", 5e-4)
    wanted = {"H1": (both, pissa), "H1 at one rate, 5e-4": (both, own)}
    wanted |= {"H1 on LoRA": (("lora_ba", 1e-3), ("lora", 7e-4)), "H3": (("ba_lora_consistency", 5e-4), pissa)}
    rows = {row[0]: row[1:] for row in told if row[0] in wanted}
    assert rows.keys() == wanted.keys()
    for name, both_arms in wanted.items():
        noisy, clean = _effects(shares, *both_arms)
        low, high = stats.ttest_ind(noisy, clean, equal_var=False).confidence_interval()
        assert rows[name] == [f"{mean(noisy) - mean(clean):+.2f}", f"{low:+.2f} to {high:+.2f}"], name


@pytest.mark.slow
def test_the_page_on_inheritance_has_what_levels_that_go_together_do_to_a_test():
    """The simulated share of false marks, 4000 experiments for each correlation of the two levels."""
    random, shares = np.random.default_rng(0), []
    for correlation in (-0.9, -0.5, 0, 0.5, 0.9):
        drawn = random.multivariate_normal([0, 0], [[1, correlation], [correlation, 1]], size=(4000, 5))
        marks = sum(estimate_effect([levels[:, :1], levels[:, 1:]]).p < 0.05 for levels in drawn)
        shares.append(f"{100 * marks / 4000:.1f}")
    *first, last = reversed(shares)
    assert f"a nominal 5 % becomes {', '.join(first)} and {last} %" in " ".join(PAGES["docs/inheritance.md"].split())
