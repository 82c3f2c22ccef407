"""Where Numba cannot keep what it compiles, kernels work without."""

import contextlib
import importlib.util
import sys

import numpy as np
import pytest

numba = pytest.importorskip("numba")

# a small one: the scan's own take long to compile
KERNEL = """
import numba

from vim2.ops.numba_math import kernel


@kernel
def add(a, b, out):
    for i in numba.prange(len(out)):
        out[i] = a[i] + b[i]
"""


@contextlib.contextmanager
def full_disk():
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def run(tmp_path, monkeypatch, capfd, recwarn):
    """Makes the kernel anew, as another process would, and calls it. Numba reads the variables when it is told to."""
    (tmp_path / "kernel.py").write_text(KERNEL)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # of which Python 3.11.2 leaves a part on a full disk

    def start(disk=contextlib.nullcontext, **variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        numba.config.reload_config()
        specification = importlib.util.spec_from_file_location("kernel", tmp_path / "kernel.py")
        module = importlib.util.module_from_spec(specification)
        with disk():
            specification.loader.exec_module(module)
            for kind in (np.float32, np.float64):
                out = np.zeros(3, kind)
                module.add(np.ones(3, kind), np.ones(3, kind), out)
                assert out.tolist() == [2, 2, 2]
        assert not recwarn.list and not capfd.readouterr().err

    yield start
    monkeypatch.undo()
    numba.config.reload_config()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_and_a_damaged_cache(run, tmp_path):
    cache = tmp_path / "cache"
    run(full_disk, NUMBA_CACHE_DIR=str(cache))
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
