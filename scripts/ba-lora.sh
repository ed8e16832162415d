#!/bin/sh
# Train, export, evaluate and print a run, by default of BA-LoRA; sets itself up first.
#
#     sh scripts/ba-lora.sh [CONFIG] [key=value …]       CONFIG: a base, by its path or its name in configs/nlg (toy
#                                                      unless given), or a run's own config.yaml
#
# `method=NAME[,NAME…]` and `seed=N[,N…]` make several runs and print them side by side.
# Several GPUs or machines: see ba_lora/experiments/pipeline.py (NUM_MACHINES, MACHINE_RANK, MASTER_ADDR, MASTER_PORT,
# ACCELERATE_CONFIG).
set -eu
ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
BA_LORA_FOLDER=${BA_LORA_FOLDER:-$PWD} # relative paths count from here
export BA_LORA_FOLDER
sh "$ROOT/scripts/setup.sh"
cd "$ROOT"
export PATH="$ROOT/.venv/bin:$PATH" # DeepSpeed builds its kernels with the ninja in there
exec "$ROOT/.venv/bin/python" -m ba_lora.experiments.pipeline "$@"
