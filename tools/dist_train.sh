#!/usr/bin/env bash
# Train with one process for each of GPUS GPUs, or on a machine without any, with GPUS processes on its CPUs.
# Usage: tools/dist_train.sh CONFIG GPUS [arguments of train.py]
# Several machines: NNODES, NODE_RANK and MASTER_ADDR; another port than 29500: PORT.
set -euo pipefail

if [ $# -lt 2 ]; then
    sed -n 's/^# Usage/usage/p' "$0" >&2
    exit 2
fi
TOOLS="$(dirname "${BASH_SOURCE[0]}")"
export PYTHONPATH="$TOOLS/..${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node-rank="${NODE_RANK:-0}" \
    --master-addr="${MASTER_ADDR:-127.0.0.1}" --master-port="${PORT:-29500}" --nproc-per-node="$2" \
    "$TOOLS/train.py" "$1" --launcher pytorch "${@:3}"
