"""A launch remembers which of a kernel's compiled forms fits; here with kernels that note what they are given."""

import types

import pytest
import torch
from devices import needs_triton

pytestmark = needs_triton


class Kernel:
    """Compiles a form at each call, as Triton's kernels do, if in no time."""

    arg_names = ("x_ptr", "y_ptr", "n", "BLOCK")

    def __init__(self):
        self.forms = 0
        self.runs = []

    def __getitem__(self, grid):
        def compile_and_run(*arguments, **options):
            self.forms += 1
            run = lambda *given, form=self.forms: self.runs.append((form, given))  # noqa: E731
            return types.SimpleNamespace(run=run, function="function", packed_metadata="metadata")

        return compile_and_run


@pytest.fixture
def launch(monkeypatch):
    from vim2.ops import triton_launch

    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # a CPU tensor's
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: "stream", raising=False)
    return triton_launch.Launch(Kernel(), (3, 2), (5,), BLOCK=16, num_warps=4)


def test_the_second_launch_runs_what_the_first_compiled(launch):
    x, y = torch.zeros(8), torch.zeros(8)
    launch(x, y)
    launch(x, y)
    assert launch.kernel.forms == 1
    addresses = (x.data_ptr(), y.data_ptr())
    expected = (3, 2, 1, "stream", "function", "metadata", None, None, None, *addresses, 5, 16)
    assert launch.kernel.runs == [(1, expected)]


def test_another_dtype_and_another_alignment_are_other_forms(launch):
    x, y = torch.zeros(16), torch.zeros(16)
    for tensors in ((x, y), (x.double(), y), (x[1:], y), (x, y[1:]), (x[1:], y[1:]), (x, None), ((x, y), y)):
        launch(*tensors)
    assert launch.kernel.forms == 7 and not launch.kernel.runs
    launch(x[2:], y)  # as misaligned as x[1:]
    launch((x, x), y)
    assert launch.kernel.forms == 7 and [form for form, _ in launch.kernel.runs] == [3, 7]
    assert launch.kernel.runs[1][1][9:] == ((x.data_ptr(), x.data_ptr()), y.data_ptr(), 5, 16)


def test_hooks_see_every_launch(launch, monkeypatch):
    import triton

    x = torch.zeros(8)
    launch(x, x)
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", lambda metadata: None)
    launch(x, x)
    assert launch.kernel.forms == 2 and not launch.kernel.runs  # Triton's own way, which calls them
