#!/bin/sh
# Set-up: a virtual environment in .venv with everything the code imports. Every other script calls this one.
#
#     sh scripts/setup.sh
#
# The first call takes minutes (progress on stderr, pip's own words in .cache/setup.log), the next ones do nothing. An
# interrupted set-up is continued by the next call; calls at the same time wait for each other.
#   PYTHON=/path/to/python3.12   the Python to build on (3.11 or newer); otherwise the newest one found
#   BA_LORA_SETUP=cpu|gpu        overrides the choice by `nvidia-smi` (a login node without GPU that prepares for others)
#   BA_LORA_NO_VLLM=1            leaves vLLM out; generation then uses transformers
# pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, PIP_CACHE_DIR, …) hold.
set -eu

ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
cd "$ROOT"
VENV=$ROOT/.venv
STAMP=$VENV/.setup-stamp   # "KIND WANTED", written last: it exists only after a complete set-up
BASIS=$VENV/.setup-basis   # "KIND ROOT": an environment of another kind, or moved with its folder, is made again
LOG=$ROOT/.cache/setup.log
TORCH=$(sed -n 's/^torch==//p' requirements.txt)

say() { echo "setup: $*" >&2; }
die() {
    echo "error: $*" >&2
    exit 1
}

# ---- nothing to do? (files only: no Python, no nvidia-smi, so that it costs milliseconds)
WANTED=$(cat requirements.txt requirements-cpu.txt requirements-gpu.txt pyproject.toml scripts/setup.sh | cksum | tr ' ' '-')-${BA_LORA_NO_VLLM:-0}
DRIVER=no
if [ -e /dev/nvidiactl ] || [ -e /dev/dxg ]; then DRIVER=yes; fi
done_already() {
    [ -f "$STAMP" ] && [ -x "$VENV/bin/python" ] || return 1
    read -r kind wanted root <"$STAMP" || return 1
    [ "$wanted" = "$WANTED" ] && [ "$root" = "$ROOT" ] || return 1
    case ${BA_LORA_SETUP:-} in
    '') [ "$kind" != cpu ] || [ "$DRIVER" = no ] || [ -f "$VENV/.setup-no-gpu" ] ;; # a gpu environment serves everywhere
    *) [ "$kind" = "$BA_LORA_SETUP" ] ;;
    esac
}
if done_already; then exit 0; fi
# making an environment again empties its folder: never that of another project behind a link
[ ! -L "$VENV" ] || die ".venv is a link to $(readlink "$VENV"): remove the link, then run again"

# ---- one set-up at a time. flock's lock dies with its holder; without flock, a folder that names its holder
mkdir -p .cache || die "cannot write in $ROOT: choose a folder of your own"
if command -v flock >/dev/null 2>&1; then
    exec 9>.cache/setup.lock
    flock -n 9 || { say "another set-up is running; waiting for it" && flock 9; }
else
    until mkdir .cache/setup.lock.d 2>/dev/null; do
        holder=$(cat .cache/setup.lock.d/pid 2>/dev/null || { sleep 2 && cat .cache/setup.lock.d/pid 2>/dev/null; } || echo 0)
        if [ "$holder" = 0 ] || ! kill -0 "$holder" 2>/dev/null; then rm -rf .cache/setup.lock.d; else sleep 1; fi
    done
    echo $$ >.cache/setup.lock.d/pid
    trap 'rm -rf "$ROOT/.cache/setup.lock.d"' EXIT
    trap 'exit 130' INT TERM HUP
fi
if done_already; then exit 0; fi # the one we waited for did it

# ---- Python
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
if [ -n "${PYTHON:-}" ]; then
    new_enough "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.11 or newer: point PYTHON at one, or unset it"
else
    for candidate in python3.13 python3.12 python3.11 python3 python python3.14; do
        if new_enough "$candidate"; then PYTHON=$candidate && break; fi
    done
    [ -n "${PYTHON:-}" ] || die "no Python 3.11 or newer found: install one, or set PYTHON=/path/to/python3.11"
fi

# ---- which machine
case ${BA_LORA_SETUP:-} in
cpu | gpu) KIND=$BA_LORA_SETUP ;;
'') if nvidia-smi >/dev/null 2>&1; then KIND=gpu; else KIND=cpu; fi ;;
*) die "BA_LORA_SETUP=$BA_LORA_SETUP: choose cpu or gpu, or unset it" ;;
esac

# ---- steps: each quiet, its output in the log, a failure told in one line
: >"$LOG" || die "cannot write $LOG"
quietly() { # COMMAND… -> its status; output appended to the log
    STEP=$(sed -n '$=' "$LOG")
    echo "+ $*" >>"$LOG"
    "$@" >>"$LOG" 2>&1
}
explain() { # WHAT -> one line from what the last step said, and leave
    said=$(sed "1,${STEP:-0}d" "$LOG")
    says() { printf "%s\n" "$said" | grep -E "$@"; }
    if says -qi 'no space left|disk quota'; then
        die "no disk space left while installing $1: free at least 6 GB (30 GB with GPU packages), then run again"
    elif says -q 'No module named (venv|ensurepip)|ensurepip is not available'; then
        die "$PYTHON cannot make virtual environments: install its venv package (Debian: apt install python3-venv)"
    elif says -q 'NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError|Max retries'; then
        die "the package registry cannot be reached while installing $1: check the network or PIP_INDEX_URL (see $LOG)"
    fi
    line=$(says -i '^ *(error|.*Error:)' | tail -n 1 | cut -c1-300)
    die "installing $1 failed: ${line:-no reason given} (see $LOG)"
}
pip() { quietly "$VENV/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }

started=$(date +%s)
rm -f "$STAMP" "$VENV/.setup-no-gpu" 2>/dev/null || true
if [ ! -x "$VENV/bin/python" ] || ! new_enough "$VENV/bin/python" || [ "$(cat "$BASIS" 2>/dev/null)" != "$KIND $ROOT" ]; then
    say "1/5 environment .venv ($("$PYTHON" --version 2>&1), $KIND)"
    quietly "$PYTHON" -m venv --clear "$VENV" || explain "the environment"
    echo "$KIND $ROOT" >"$BASIS"
else
    say "1/5 environment .venv is there ($KIND)"
fi
pip --version || { quietly "$VENV/bin/python" -m ensurepip --upgrade || explain "pip"; }

if "$VENV/bin/python" -c "import importlib.metadata as m, sys; sys.exit(m.version('torch').split('+')[0] != '$TORCH')" 2>/dev/null; then
    say "2/5 torch $TORCH is there"
elif [ "$KIND" = gpu ] || [ "$(uname -s)" != Linux ]; then
    say "2/5 torch $TORCH (plain registry)"
    pip install --no-deps "torch==$TORCH" || explain "torch"
else
    say "2/5 torch $TORCH (CPU build)"
    # One try each: what pip's settings find (a wheel folder), PyTorch's CPU index, the registry's CUDA build.
    if pip install --no-deps --timeout 15 --retries 1 "torch==$TORCH+cpu"; then
        :
    elif pip install --no-deps --timeout 15 --retries 1 --index-url https://download.pytorch.org/whl/cpu "torch==$TORCH+cpu"; then
        :
    else
        say "    no CPU build found; taking the registry's build (several GB)"
        pip install --no-deps "torch==$TORCH" || explain "torch"
    fi
fi

say "3/5 packages of requirements.txt"
pip install -r requirements.txt || explain "requirements.txt"

if [ "${BA_LORA_NO_VLLM:-0}" = 1 ]; then
    say "4/5 vLLM is left out (BA_LORA_NO_VLLM=1)"
elif [ "$KIND" = gpu ]; then
    say "4/5 GPU packages of requirements-gpu.txt"
    grep -v '^flash-attn' requirements-gpu.txt >.cache/requirements-gpu.txt
    pip install -r requirements.txt -r .cache/requirements-gpu.txt || explain "requirements-gpu.txt"
    # flash-attn compiles against the installed torch where no wheel fits; without it sdpa serves.
    flash=$(grep '^flash-attn' requirements-gpu.txt)
    say "    $flash (optional; may compile for long)"
    pip install --no-build-isolation --no-deps "$flash" ||
        say "    $flash could not be installed; attention uses sdpa (see $LOG)"
elif [ "$(uname -sm)" = "Linux x86_64" ]; then
    say "4/5 vLLM for CPUs, requirements-cpu.txt"
    pip install --no-deps -r requirements-cpu.txt || explain "requirements-cpu.txt"
else
    say "4/5 vLLM has no build for $(uname -sm); generation uses transformers"
fi

say "5/5 ba_lora itself"
pip install --no-deps --no-build-isolation -e . || explain "ba_lora"

if [ "$KIND" = cpu ] && [ "$DRIVER" = yes ]; then : >"$VENV/.setup-no-gpu"; fi # a device file, but nvidia-smi fails
echo "$KIND $WANTED $ROOT" >"$STAMP.tmp"
mv "$STAMP.tmp" "$STAMP"
say "done in $(($(date +%s) - started)) s"
