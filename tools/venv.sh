# Sourced by the other scripts. Sets
#   PYTHON   the interpreter of a virtual environment that holds tools/requirements-test.txt, made on first use
#   ROOT     the root of this checkout, which alone is on PYTHONPATH
#
# Environments lie outside the checkout, in ${VIM2_VENVS:-${XDG_CACHE_HOME:-~/.cache}/vim2}, one for every set of
# requirements and Python, so that all checkouts share them. The Python is the first of 3.10 to 3.13 on PATH.
# shellcheck shell=bash

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

find_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if "$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    echo "error: Python 3.10, 3.11, 3.12 or 3.13 is needed, and none is on PATH; install one." >&2
    return 1
}

environment_key() { # of a Python and a requirements file
    "$1" - "$2" <<'PY'
import hashlib, platform, sys
with open(sys.argv[1], "rb") as file:
    digest = hashlib.sha256(file.read() + repr((sys.version, sys.base_prefix, platform.machine())).encode())
print(f"py{sys.version_info[0]}.{sys.version_info[1]}-{digest.hexdigest()[:12]}")
PY
}

is_complete() { # a virtual environment: installed to the end, and its Python still runs
    [ -e "$1/complete" ] && "$1/bin/python" -c '' 2>/dev/null
}

make_environment() { # from a Python and a requirements file, at a path
    rm -rf "$3"
    echo "Making a virtual environment in $3 (once; this downloads PyTorch)." >&2
    if ! "$1" -m venv "$3"; then
        echo "error: $1 cannot make a virtual environment; install its venv module (Debian: python3-venv)." >&2
        return 1
    fi
    "$3/bin/python" -I -m pip install --quiet --disable-pip-version-check --no-input --requirement "$2" >&2 || {
        echo "error: the packages of $2 could not be installed; pip says why above." >&2
        return 1
    }
    touch "$3/complete"
}

prepare_environment() {
    local base requirements="$ROOT/tools/requirements-test.txt" home environment
    base="$(find_python)"
    home="${VIM2_VENVS:-${XDG_CACHE_HOME:-$HOME/.cache}/vim2}"
    mkdir -p "$home"
    home="$(cd "$home" && pwd -P)"
    environment="$home/$(environment_key "$base" "$requirements")"
    if ! is_complete "$environment"; then
        # One at a time. The lock belongs to file descriptor 9, whose holders' end, however it comes, releases it.
        exec 9>"$environment.lock"
        "$base" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
        is_complete "$environment" || make_environment "$base" "$requirements" "$environment"
        exec 9>&-
    fi
    PYTHON="$environment/bin/python"
}

prepare_environment
export PYTHONPATH="$ROOT"
