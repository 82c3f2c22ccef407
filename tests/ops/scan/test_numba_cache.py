"""Where Numba cannot keep what it compiles, kernels work without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

# a small one: the scan's own take long to compile
KERNEL = """
import resource
import sys

import numba
import numpy as np

from vim2.ops.numba_math import kernel


@kernel
def add(a, b, out):
    for i in numba.prange(len(out)):
        out[i] = a[i] + b[i]


if "full" in sys.argv:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
for kind in (np.float32, np.float64):
    out = np.zeros(3, kind)
    add(np.ones(3, kind), np.ones(3, kind), out)
    assert out.tolist() == [2, 2, 2]
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "kernel.py").write_text(KERNEL)

    def start(*argv, **variables):
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), **variables}
        done = subprocess.run(
            [sys.executable, tmp_path / "kernel.py", *argv], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and not done.stderr, done.stderr

    return start


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_and_a_damaged_cache(run, tmp_path):
    cache = tmp_path / "cache"
    run("full", NUMBA_CACHE_DIR=str(cache))
    assert not list(cache.rglob("*.nbc"))
    run(NUMBA_CACHE_DIR=str(cache))
    kept = list(cache.rglob("*.nb[ci]"))
    assert kept
    for path in kept:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    run(NUMBA_CACHE_DIR=str(cache))


@pytest.mark.skipif(sys.platform == "win32", reason="other folders there")
def test_no_folder_for_a_cache(run, tmp_path):
    (tmp_path / "__pycache__").touch()
    (tmp_path / "file").touch()
    nowhere = str(tmp_path / "file" / "folder")
    run(NUMBA_CACHE_DIR=nowhere, HOME=nowhere, XDG_CACHE_HOME=nowhere)
