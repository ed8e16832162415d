#!/bin/sh
# Evaluate a run or a model by lm-evaluation-harness; a run's JSON gets the scores as harness/<task>.
#
#     sh scripts/harness.sh RUN|MODEL TASK … [--data TASK=FILE …] [--include-path DIR] [--engine hf|vllm] [--limit N]
#                                            [--shots N] [--batch-size N] [--template chat|FILE] [--output DIR]
#
# The first call makes an environment of its own for it, .cache/lm-eval, on top of .venv: it needs another version of
# dateutil. `sh scripts/harness.sh --setup` does only that. See eval/harness.py.
set -eu
ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
BA_LORA_FOLDER=${BA_LORA_FOLDER:-$PWD} # relative paths count from here
export BA_LORA_FOLDER
sh "$ROOT/scripts/setup.sh"
cd "$ROOT"
HARNESS=.cache/lm-eval
VERSION=0.4.13
STAMP="$HARNESS/.version"
WANTED="$VERSION on $(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')" # moves with the folder
made() { [ "$(cat "$STAMP" 2>/dev/null)" = "$WANTED" ]; }
if ! made; then
    exec 9>.cache/lm-eval.lock # one at a time: the lock is this shell's, and ends with it and with pip
    lock() { .venv/bin/python -c "import fcntl; fcntl.flock(9, fcntl.LOCK_EX$1)" 2>/dev/null; }
    lock " | fcntl.LOCK_NB" || { echo "harness: another call sets it up; waiting for it" >&2 && lock ""; }
fi
if ! made; then # nor has the one we waited for made it
    echo "harness: an environment for lm-evaluation-harness $VERSION in $HARNESS" >&2
    ours=$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')
    .venv/bin/python -m venv --clear "$HARNESS"
    echo "$ours" >"$("$HARNESS/bin/python" -c 'import site; print(site.getsitepackages()[0])')/ours.pth"
    "$HARNESS/bin/python" -m pip --disable-pip-version-check --no-input install --quiet "lm-eval==$VERSION" >&2
    echo "$WANTED" >"$STAMP"
fi
exec 9>&-
[ "${1:-}" = --setup ] && exit 0
exec .venv/bin/python -m eval.harness "$@"
