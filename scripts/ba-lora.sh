#!/bin/sh
# Train, export, evaluate and print a run, by default of BA-LoRA; sets itself up first.
#
#     sh scripts/ba-lora.sh [CONFIG] [key=value …]       CONFIG: a base (configs/nlg/toy.yaml unless given) or a run's
#                                                      own config.yaml, which names its method
#
# Several GPUs or machines: see ba_lora/pipeline.py (NUM_MACHINES, MACHINE_RANK, MASTER_ADDR, MASTER_PORT,
# ACCELERATE_CONFIG).
set -eu
ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
sh "$ROOT/scripts/setup.sh"
cd "$ROOT"
export PATH="$ROOT/.venv/bin:$PATH" # DeepSpeed builds its kernels with the ninja in there
exec "$ROOT/.venv/bin/python" -m ba_lora.pipeline "$@"
