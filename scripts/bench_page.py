"""How fast the page of a report is with many answers, measured in a headless Chromium (scripts/browser.sh).

    .venv/bin/python scripts/bench_page.py [--items 10000] [--repeats 5]

Made-up answers of GSM8K's lengths: questions of about 240 characters, answers of about 450. Prints one JSON line:
medians in milliseconds, by the clock and as CPU time of the page's main thread, and the sizes in MB.

open          from the call to the first answer on the screen
filter        from the event to the redrawn list, the next frame included
first search  the same for words, when the texts are made ready; search: those after it
next          the next item by key
"""

import argparse
import json
import random
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from ba_lora.errors import CommandParser, UserError, run_entry_point
from ba_lora.experiments.tables import Row
from ba_lora.io import write_json_atomic, write_jsonl_atomic
from ba_lora.prompts import build_prompt
from eval.page.build import shown_runs, write_page
from eval.report.sources import Sources
from eval.report.spec import PlannedRun, ReportColumn, TableSpec
from eval.report.table import build_table

TASK = "gsm8k"
# Changes a control of the answers' view; done when the list is drawn and the frame after that is on.
CHANGE = """([id, value, event]) => new Promise((done) => {
  const control = document.getElementById(id), start = performance.now();
  control.value = value;
  control.dispatchEvent(new Event(event));
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
})"""


def main() -> int:
    parser = CommandParser(
        prog="python scripts/bench_page.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = make_page(Path(folder), parsed.items)
        print(json.dumps({"items": parsed.items} | measure(page, parsed.items, parsed.repeats)))
    return 0


def make_page(folder: Path, num_items: int) -> Path:
    """Write a run of so many answers, and its page; return the page's folder."""
    draw = random.Random(0)
    words = "the of each has buys sells shares apples dollars how many left total then gives twice half".split()

    def text(length: int) -> str:
        return " ".join(draw.choices(words, k=length // 5))

    completions, grades = [], []
    for place in range(num_items):
        right = float(draw.random() < 0.6)
        line = {"task_id": f"{TASK}/{place}", "sample": 0, "prompt": build_prompt(text(240))}
        completions.append(line | {"completion": f" {text(450)}\nThe answer is: {place}", "finish_reason": "stop"})
        grade = {
            "metrics": {"strict": right, "flexible": right},
            "extracted": {"strict": str(place)},
            "gold": str(place),
        }
        grades.append({"task_id": line["task_id"], "sample": 0, "invalid": False} | grade)
    run = PlannedRun("lora", 1, folder / "results" / "many.json", folder / "many")
    write_jsonl_atomic(run.run_path / "completions" / f"{TASK}.jsonl", completions)
    write_jsonl_atomic(run.run_path / "grades" / f"{TASK}.jsonl", grades)
    strict = statistics.fmean(grade["metrics"]["strict"] for grade in grades)
    result = {"run_id": "many", "status": "ok", "base": "tiny", "method": "lora", "seed": 1}
    result |= {"evaluation": {TASK: {"task": TASK, "n": num_items, "metrics": {"strict": strict}}}}
    write_json_atomic(run.result_path, result)
    column = ReportColumn("gsm8k", "GSM8K", task=TASK, metric="strict")
    row = Row("tiny", "lora")
    spec = TableSpec("many", f"{num_items} answers", (row,), (column,), {(row, "gsm8k"): (run,)})
    sources = Sources({"many": result})
    table = build_table(spec, sources, allow=["stale"])
    write_page(folder / "page", table, sources, shown_runs(table, sources))
    return folder / "page"


def measure(page: Path, num_items: int, repeats: int) -> dict[str, Any]:
    """Return the medians in milliseconds and the sizes in MB. Raises UserError without a browser."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise UserError("no playwright: sh scripts/browser.sh installs it and a Chromium") from error
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    times: dict[str, list[tuple[float, float]]] = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        for _ in range(repeats):
            tab = browser.new_page()
            session = tab.context.new_cdp_session(tab)
            session.send("Performance.enable", {"timeDomain": "threadTicks"})

            def timed(name: str, script: str, *words: Any, tab: Any = tab, session: Any = session) -> None:
                before = _cpu_ms(session)
                spent = tab.evaluate(script, *words)
                times.setdefault(name, []).append((spent, _cpu_ms(session) - before))

            tab.goto(f"file://{page}/index.html#/answers/many/{TASK}")
            tab.locator("#answers-item h3").wait_for()
            tab.wait_for_timeout(200)  # until it is painted: by the page's own clock, which began with the navigation
            times.setdefault("open", []).append((tab.evaluate(OPENED), _cpu_ms(session)))
            for value in ("wrong", ""):
                timed("filter", CHANGE, ["answers-verdict", value, "change"])
            for number, value in enumerate((f"answer is: {num_items - 1}", "buys twice", "")):
                timed("search" if number else "first search", CHANGE, ["answers-search", value, "input"])
            timed("next", NEXT)
            tab.close()
        browser.close()
    sizes = {"page MB": sum(file.stat().st_size for file in page.rglob("*") if file.is_file())}
    sizes |= {"data MB": sum(file.stat().st_size for file in (page / "data").iterdir())}
    found = {name: round(size / 1e6, 2) for name, size in sizes.items()}
    for place, kind in enumerate(("ms", "CPU ms")):
        found |= {f"{name} {kind}": round(statistics.median(one[place] for one in of), 1) for name, of in times.items()}
    return found


def _cpu_ms(session: Any) -> float:
    """Return the CPU time that the page's main thread has spent in its tasks, which other processes do not lengthen."""
    metrics = session.send("Performance.getMetrics")["metrics"]
    return 1000 * next(one["value"] for one in metrics if one["name"] == "TaskDuration")


OPENED = "performance.getEntriesByName('answer shown')[0].startTime"
NEXT = """() => new Promise((done) => {
  const start = performance.now(), item = document.getElementById("answers-item");
  new MutationObserver(() => requestAnimationFrame(() => setTimeout(() => done(performance.now() - start))))
    .observe(item, { childList: true });
  document.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
})"""


if __name__ == "__main__":
    run_entry_point(main)
