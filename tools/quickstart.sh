#!/usr/bin/env bash
# Train a small ViM2 on real images, in an environment of the project's own that is made on first use.
# Usage: bash tools/quickstart.sh [arguments of tools/quickstart.py, such as --help]
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
exec "$PYTHON" "$ROOT/tools/quickstart.py" "$@"
