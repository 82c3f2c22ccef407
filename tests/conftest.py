"""Where there is no CUDA device, Triton kernels run on the CPU in Triton's interpreter. It must be asked for before
anything imports Triton, as timm does: hence here, above all tests."""

import os

import pytest
import torch
from quick_interpreter import make_interpreter_quick

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1":
    make_interpreter_quick()


def pytest_collection_modifyitems(items):
    """Numba's own tests come last. Of two workers the first begins with a model's training, which compiles Numba's
    kernels; the second would begin with tests of them and compile the same ones meanwhile, and reads them later."""
    items.sort(key=lambda item: "numba" in item.path.name)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models are quickest so, and give the same sums whatever else runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poison(monkeypatch):
    """Memory that torch.empty and empty_like hand out is poisoned with NaN: what a kernel fails to write shows."""

    def poisoned(empty):
        def function(*args, **kwargs):
            tensor = empty(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return function

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture
def failing(capsys):
    """Of a program's main: runs a command that must fail as user errors do, and returns its one line."""

    def of(main, program):
        def run(*argv) -> str:
            capsys.readouterr()
            assert main([str(a) for a in argv]) == 2
            error = capsys.readouterr().err
            assert error.startswith(f"{program}: error: ") and error.count("\n") == 1, error
            return error

        return run

    return of


@pytest.fixture
def fill_shared_memory(monkeypatch):
    """Has /dev/shm be full from now on, of which containers often have little, for processes that are forked, too."""

    def fail(*_):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    def fill():
        for name in ("_share_fd_cpu_", "_share_filename_cpu_"):
            monkeypatch.setattr(torch.UntypedStorage, name, fail)

    return fill
