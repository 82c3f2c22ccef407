#!/usr/bin/env bash
# Build mmcv 2.1.0 with its compiled operators (for CPUs, or with FORCE_CUDA=1 for GPUs), and compare them with
# torchvision's, which stand in for them otherwise: tools/comparisons/mmcv_operators.py prints the differences.
# Usage: bash tools/comparisons/build_mmcv.sh DIR      DIR/*.whl then is the wheel, DIR/site holds it unpacked
# With the Python that has PyTorch and the extra mm ($PYTHON, else python), a C++ compiler, and ninja if it is to be quick;
# MAX_JOBS compilers at a time.
set -euo pipefail

if [ $# -ne 1 ]; then
    sed -n 's/^# Usage/usage/p' "$0" >&2
    exit 2
fi
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)"
PYTHON="${PYTHON:-python}"
mkdir -p "$1"
DIR="$(cd "$1" && pwd -P)"

# The cache may hold a wheel that was built without operators.
"$PYTHON" -m pip download --no-deps --no-binary mmcv --no-build-isolation --no-cache-dir --dest "$DIR" mmcv==2.1.0
tar -C "$DIR" -xf "$DIR/mmcv-2.1.0.tar.gz"
# PyTorch's headers have moved on to C++20.
sed -i 's/-std=c++1[47]/-std=c++20/' "$DIR/mmcv-2.1.0/setup.py"
MMCV_WITH_OPS=1 FORCE_CUDA="${FORCE_CUDA:-0}" \
    "$PYTHON" -m pip wheel --no-deps --no-build-isolation --no-cache-dir --wheel-dir "$DIR" "$DIR/mmcv-2.1.0"
"$PYTHON" -m pip install --no-deps --upgrade --target "$DIR/site" "$DIR"/mmcv-2.1.0-*.whl
PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" "$ROOT/tools/comparisons/mmcv_operators.py" "$DIR/site"
