#!/usr/bin/env bash
# Lint, check the formatting and test, in an environment of the project's own that is made on first use.
# Usage: bash tools/run_tests.sh [arguments of pytest, such as tests/test_vim2.py or -k scan]
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
cd "$ROOT"

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# up to eight tests side by side, each on one processor
export OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal "$@"
