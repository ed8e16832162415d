#!/bin/sh
# Train, export, evaluate and compare LoRA, PiSSA and BA-LoRA on an NLU task; sets itself up first.
#
#     sh scripts/nlu.sh [CONFIG] [key=value …]       CONFIG: a base, by its path or its name in configs/nlu (toy unless
#                                                  given), or a run's own config.yaml
#
# `task=sst2` chooses the task, `method=NAME[,NAME…]` other methods, `seed=N[,N…]` seeds. Several GPUs or machines: see
# ba_lora/experiments/pipeline.py.
set -eu
ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
BA_LORA_FOLDER=${BA_LORA_FOLDER:-$PWD} # relative paths count from here
export BA_LORA_FOLDER
sh "$ROOT/scripts/setup.sh"
cd "$ROOT"
export PATH="$ROOT/.venv/bin:$PATH" # DeepSpeed builds its kernels with the ninja in there
exec "$ROOT/.venv/bin/python" -m ba_lora.experiments.pipeline_nlu "$@"
