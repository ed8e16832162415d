#!/bin/sh
# Give one run of scripts/ba-lora.sh to a Slurm cluster, on one node or several; run it on the cluster's login node.
#
#     [NODES=2] GPUS_PER_NODE=8 [CPUS_PER_NODE=64] sh scripts/slurm/submit.sh CONFIG [key=value …]
#
# GPUS_PER_NODE may name the kind, a100:4; 0 trains on CPUs. sbatch's own variables say the rest: SBATCH_PARTITION,
# SBATCH_ACCOUNT, SBATCH_TIMELIMIT, SBATCH_MEM_PER_NODE, SBATCH_CONSTRAINT, …; and ACCELERATE_CONFIG chooses DeepSpeed:
# configs/accelerate/zero2.yaml. The same line again after a failure goes on.
set -eu
ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
[ $# -gt 0 ] || {
    echo "error: which config? sh scripts/slurm/submit.sh CONFIG [key=value …]" >&2
    exit 2
}
command -v sbatch >/dev/null || {
    echo "error: there is no sbatch here: run it on a node of the cluster, such as its login" >&2
    exit 2
}
[ -n "${GPUS_PER_NODE:-}${SBATCH_GRES:-}${SBATCH_GPUS:-}${SBATCH_GPUS_PER_NODE:-}${SBATCH_GPUS_PER_TASK:-}" ] || {
    echo "error: how many GPUs? GPUS_PER_NODE=8 sh scripts/slurm/submit.sh CONFIG; 0 trains on CPUs" >&2
    exit 2
}
BA_LORA_FOLDER=${BA_LORA_FOLDER:-$PWD} # relative paths count from here
export BA_LORA_FOLDER
sh "$ROOT/scripts/ba-lora.sh" "$@" --dry-run >/dev/null # what is wrong in the settings is told now, not after the queue
mkdir -p "$ROOT/outputs/slurm"
for name in $(env | grep -E '^(SLURM|SLURMD|SRUN|SUBMITIT)_[A-Z0-9_]*=' | cut -d = -f 1); do
    [ "$name" = SLURM_CONF ] || unset "$name" # of a job that this is typed in: sbatch would hand them to the new one
done
[ "${GPUS_PER_NODE:-0}" != 0 ] || GPUS_PER_NODE=
exec sbatch --nodes="${NODES:-1}" ${GPUS_PER_NODE:+--gpus-per-node="$GPUS_PER_NODE"} \
    ${CPUS_PER_NODE:+--cpus-per-task="$CPUS_PER_NODE"} --chdir="$ROOT" \
    --output="$ROOT/outputs/slurm/%j.log" "$ROOT/scripts/slurm/train.sbatch" "$@"
