#!/bin/sh
# Rerun a table or figure of configs/tables: what is missing is trained and evaluated, then the report is written.
#
#     sh scripts/reproduce.sh TABLE [--dry-run] [key=value …]       e.g. toy, nlg_main, ablation
#
# --dry-run prints the runs, which are done, time and disk. The same command goes on after Ctrl-C or a crash; see
# ba_lora/experiments/grid.py for retry=true, workers=N, gpus=N, seeds=[…], only=….
set -eu
ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
BA_LORA_FOLDER=${BA_LORA_FOLDER:-$PWD} # relative paths count from here
export BA_LORA_FOLDER
sh "$ROOT/scripts/setup.sh"
cd "$ROOT"
export PATH="$ROOT/.venv/bin:$PATH"
exec "$ROOT/.venv/bin/python" -m ba_lora.experiments.search "$@"
