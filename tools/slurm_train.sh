#!/usr/bin/env bash
# Train as a Slurm job, with one process for each GPU.
# Usage: [GPUS=8] [GPUS_PER_NODE=8] [CPUS_PER_TASK=5] [SRUN_ARGS=...] tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [arguments of train.py]
set -euo pipefail

if [ $# -lt 4 ]; then
    sed -n 's/^# Usage/usage/p' "$0" >&2
    exit 2
fi
TOOLS="$(dirname "${BASH_SOURCE[0]}")"
export PYTHONPATH="$TOOLS/..${PYTHONPATH:+:$PYTHONPATH}"
GPUS="${GPUS:-8}"
GPUS_PER_NODE="${GPUS_PER_NODE:-$((GPUS < 8 ? GPUS : 8))}"
# shellcheck disable=SC2086  # SRUN_ARGS are several words
exec srun --partition="$1" --job-name="$2" --gres="gpu:$GPUS_PER_NODE" --ntasks="$GPUS" \
    --ntasks-per-node="$GPUS_PER_NODE" --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$TOOLS/train.py" "$3" --work-dir="$4" --launcher=slurm "${@:5}"
