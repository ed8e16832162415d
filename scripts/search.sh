#!/bin/sh
# Search for hyper-parameters: trials of a space on held-out rows, then a report and the best config.
#
#     sh scripts/search.sh CONFIG SPACE [--dry-run] [key=value …]       e.g. toy toy, llama-2-7b tuned method=lora
#
# SPACE: a file of configs/search. The same command goes on after Ctrl-C or kill -9; see
# ba_lora/experiments/search/main.py for engine=…, search_seed=…, trials=N, workers=N, gpus=N, output=DIR.
set -eu
ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
BA_LORA_FOLDER=${BA_LORA_FOLDER:-$PWD} # relative paths count from here
export BA_LORA_FOLDER
sh "$ROOT/scripts/setup.sh"
cd "$ROOT"
export PATH="$ROOT/.venv/bin:$PATH"
exec "$ROOT/.venv/bin/python" -m ba_lora.experiments.search.main "$@"
