"""A stage that does nothing but leave the files of a real one: KIND RUN … ; no imports beyond the standard library.
KIND is train, generate, score (of toy) or score-TASK.

Every file is written beside its place and renamed. A line in $FAKE/ledger says that the stage came to its end; its pid
is in $FAKE/pids while it runs. $FAKE/fail holds lines "KIND WORD": such a stage of a run with WORD in its name fails.
So does $FAKE/hold: such a stage runs until it is ended; a training that is told to stop (USR1) leaves $FAKE/saved-RUN,
and is not held the next time.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

fake, (kind, *runs) = Path(os.environ["FAKE"]), sys.argv[1:]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


(fake / "pids").mkdir(exist_ok=True)
pid_file = fake / "pids" / str(os.getpid())
pid_file.write_text("")


def named_in(file):
    """Return the first WORD of the file's lines that means this stage."""
    lines = [line.split() for line in (fake / file).read_text().splitlines()] if (fake / file).exists() else []
    return next((word for named, word in lines if named == kind and any(word in run for run in runs)), None)


if word := named_in("fail"):
    print(f"Traceback …\nerror: {word} is broken: fix it")
    sys.exit(2)


def save(number, frame):
    for run in map(Path, runs):
        (fake / f"saved-{run.name}").write_text("")
    sys.exit(75)


if kind == "train":
    signal.signal(signal.SIGUSR1, save)
saved = any((fake / f"saved-{Path(run).name}").exists() for run in runs)
seconds = 600 if named_in("hold") and not saved else float(os.environ.get("FAKE_SECONDS", "0.03"))
for run in map(Path, runs):
    print(f"{kind}:  10%\r{kind}:  50%\r\n", flush=True)
    if kind == "train":
        write(run / "config.yaml", "started")
    time.sleep(seconds)
    number = sum(map(ord, run.name)) % 100 / 100
    if kind == "train":
        for weights in (
            "adapter/adapter_model.safetensors",
            "lora/adapter_model.safetensors",
            "merged/model.safetensors",
        ):
            write(run / weights, "weights")
        write(run / "train.json", json.dumps({"status": "ok", "training": {"seconds": number}}))
    elif kind == "generate":
        write(run / "completions" / "toy.jsonl", "{}\n")
    else:
        score = {"version": "1", "n": 1, "invalid": 0, "metrics": {"strict": number}}
        write(run / "scores" / f"{kind.partition('-')[2] or 'toy'}.json", json.dumps(score))
with open(fake / "ledger", "a") as ledger:
    ledger.write("".join(f"{kind} {Path(run).name}\n" for run in runs))
pid_file.unlink()
