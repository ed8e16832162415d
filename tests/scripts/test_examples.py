"""The README's two lines for your own data, as they stand but for where they write: trained, evaluated, in time."""

import json
import resource
import shlex
import subprocess

import pytest

from tests.support.pages import commands

LINES = [line for line in commands("README.md") if "configs/examples/" in line]
SCORES = {  # example → task, metric, the least score, the most CPU time in seconds: several times what it takes
    "chat": ("qa", "exact_match", 0.40, 900),
    "sentiment": ("posts", "macro_f1", 0.60, 600),
}


def test_both_examples_are_in_the_readme():
    assert len(LINES) == len(SCORES) and all(any(f"/{name}.yaml" in line for line in LINES) for name in SCORES)


@pytest.mark.slow
@pytest.mark.parametrize("example", SCORES)
def test_an_example_learns_what_it_is_for(example, root, tmp_path):
    (line,) = [line for line in LINES if f"/{example}.yaml" in line]
    task, metric, least, cpu_s = SCORES[example]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [f"output_dir={tmp_path / 'run'}", f"results_dir={tmp_path / 'results'}"]
    done = subprocess.run([*shlex.split(line), *words], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    results = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json")]
    (tuned,) = [result for result in results if result["method"] == "ba_lora"]
    found = tuned["evaluation"][task]["metrics"][metric]
    print(f"{example}: {metric} {found:.3f}, {took_s:.0f} s of CPU")
    assert tuned["status"] == "ok" and found >= least and f"{100 * found:.2f}" in done.stdout
    if example == "chat":
        (untuned,) = [float(row.split()[-1]) for row in done.stdout.splitlines() if row.startswith("untuned")]
        assert 100 * found - untuned >= 20
    assert took_s < cpu_s
