#!/bin/sh
# Train, export, evaluate and compare LoRA, PiSSA and BA-LoRA on an NLU task; sets itself up first.
#
#     sh scripts/nlu.sh [CONFIG] [key=value …]       CONFIG: configs/nlu/toy.yaml unless given
#
# `task=sst2` chooses the task, `method=NAME[,NAME…]` other methods. Several GPUs or machines: see ba_lora/pipeline.py.
set -eu
ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
sh "$ROOT/scripts/setup.sh"
cd "$ROOT"
export PATH="$ROOT/.venv/bin:$PATH" # DeepSpeed builds its kernels with the ninja in there
exec "$ROOT/.venv/bin/python" -m ba_lora.pipeline_nlu "$@"
