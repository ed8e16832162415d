#!/bin/sh
# The library's fast tests (objective, trainer, export, TRL) with other packages than requirements.txt pins:
#
#     sh scripts/width.sh oldest     the oldest versions that pyproject.toml allows
#     sh scripts/width.sh newest     the newest ones that it allows and the registry has
#     sh scripts/width.sh oldest tests/objective/test_fused.py     further arguments go to pytest
#
# Each has an environment of its own, .cache/width-oldest and .cache/width-newest, made once for each pyproject.toml: 1 GB
# with a CPU build of torch, several where only the registry's build is found. Status 69: no package registry.
set -eu
cd -- "$(dirname -- "$0")/.."
WHICH=${1:-}
case $WHICH in
oldest | newest) shift ;;
*)
    echo "error: sh scripts/width.sh oldest|newest [pytest's arguments]" >&2
    exit 2
    ;;
esac
sh scripts/setup.sh
ENV=.cache/width-$WHICH
PYTHON=$PWD/$ENV/bin/python
STAMP=$ENV/.made-of
WANTED=$(cksum <pyproject.toml)

# One requirement a line: NAME==LOWEST, or NAME with its bounds.
needs() {
    .venv/bin/python - "$WHICH" <<'EOF'
import re, sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
for need in [*project["dependencies"], *project["optional-dependencies"]["trl"]]:
    oldest = re.sub(r"^([\w.-]+)>=([\w.]+).*", r"\1==\2", need)
    print(oldest if sys.argv[1] == "oldest" else need)
EOF
}

if [ "$(cat "$STAMP" 2>/dev/null)" != "$WANTED" ]; then
    pip() { "$PYTHON" -m pip --disable-pip-version-check --no-input "$@"; }
    echo "width: the $WHICH packages in $ENV" >&2
    .venv/bin/python -m venv --clear "$ENV"
    if ! pip download --quiet --no-deps --dest "$ENV/probe" filelock >/dev/null 2>&1; then
        echo "error: the package registry cannot be reached: check the network or PIP_INDEX_URL" >&2
        exit 69
    fi
    torch=$(needs | grep '^torch')
    pip install -qqq --timeout 15 --retries 1 --index-url https://download.pytorch.org/whl/cpu "$torch" >&2 ||
        pip install --quiet "$torch" >&2
    needs >"$ENV/needs.txt"
    pip install --quiet -r "$ENV/needs.txt" "$(grep '^pytest==' requirements.txt)" >&2
    echo "$WANTED" >"$STAMP"
fi
"$PYTHON" -m pip --disable-pip-version-check list --format=freeze | grep -E '^(torch|transformers|peft|accelerate|trl)==' >&2
[ $# -gt 0 ] || set -- tests/objective tests/training/test_trainer.py tests/training/test_mixin.py \
    tests/training/test_sft.py tests/runs/test_export.py
exec env PYTHONPATH="$PWD" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
    "$PYTHON" -m pytest -p no:cacheprovider -m "not gpu and not real and not slow" "$@"
