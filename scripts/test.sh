#!/bin/sh
# The test suite, after set-up:
#
#     sh scripts/test.sh                        the default suite by two workers, about 8 minutes on 2 free cores
#     sh scripts/test.sh slow                   everything, one test at a time: some measure time
#     sh scripts/test.sh slow --slow-minutes=25    slow tests only, from the day's place on, for so many minutes
#     sh scripts/test.sh gpu                    the checks of a CUDA machine, with a table of their figures
#     sh scripts/test.sh tests/eval/test_score.py    further arguments go to pytest (paths count from the repository's root)
set -eu
cd -- "$(dirname -- "$0")/.."

MARKS="not slow and not gpu"
WORKERS=2
case "${1:-}" in
slow)
    MARKS="not gpu"
    WORKERS=0
    shift
    ;;
gpu)
    MARKS=gpu
    WORKERS=0
    shift
    set -- tests/gpu "$@"
    ;;
esac

sh scripts/setup.sh

# What only tests import. Without it the tests that need it are skipped.
MADE=.venv/.test-stamp
WANTED=$(cksum <requirements-test.txt)
if [ "$(cat "$MADE" 2>/dev/null)" != "$WANTED" ]; then
    if .venv/bin/python -m pip --disable-pip-version-check --no-input install -r requirements.txt -r requirements-test.txt >>.cache/setup.log 2>&1; then
        echo "$WANTED" >"$MADE"
    else
        echo "test: requirements-test.txt cannot be installed (see .cache/setup.log): the tests that need it are skipped" >&2
    fi
fi

# The other PiSSAs that the bench compares with.
if [ "$MARKS" = gpu ] && ! .venv/bin/python -c "import importlib.util as u, sys; sys.exit(not (u.find_spec('cut_cross_entropy') and u.find_spec('liger_kernel')))"; then
    .venv/bin/python -m pip --disable-pip-version-check --no-input install -r requirements.txt --no-build-isolation -e '.[bench]' >>.cache/setup.log 2>&1 ||
        echo "test: cut-cross-entropy and Liger cannot be installed (see .cache/setup.log): the bench compares without them" >&2
fi

# The sandbox needs bubblewrap. Where it cannot be installed, the tests that run generated programs are skipped.
if ! command -v bwrap >/dev/null 2>&1; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        DEBIAN_FRONTEND=noninteractive
        export DEBIAN_FRONTEND
        {
            apt-get install -y bubblewrap || { apt-get update && apt-get install -y bubblewrap; } || true
        } >>.cache/setup.log 2>&1 </dev/null
    fi
    command -v bwrap >/dev/null 2>&1 ||
        echo "test: bubblewrap is missing, sandbox tests are skipped; Debian: apt-get install bubblewrap" >&2
fi

PATH=$PWD/.venv/bin:$PATH # ninja, torchrun, accelerate and deepspeed for the processes that tests start
export PATH HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
[ "$WORKERS" = 0 ] || export OMP_NUM_THREADS=1

# pytest's status is ours; when no test was collected, it is 5.
exec .venv/bin/python -m pytest -m "$MARKS" -n "$WORKERS" --dist worksteal "$@"
