"""Numba's scan for CPUs against the float64 oracle."""

import os
import random
import subprocess
import sys

import pytest
import torch
from comparison import gradients, relative_error
from scan_cases import (
    CASES,
    EXTREME_STEPS,
    SOFTPLUS_ARGUMENTS,
    assert_finite_at_step,
    assert_last_state_matches_torch,
    assert_matches_oracle,
    assert_softplus_is_right,
    make_inputs,
)

from vim2.ops import BIDIRECTIONAL, CROSS_SCAN, FORWARD, projected_scan, selective_scan

pytest.importorskip("numba")
pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize(
    "case", [*CASES, ((9, 12), CROSS_SCAN, 130, 16, 2, False), ((2, 32), CROSS_SCAN, 3, 5, 2, False)], ids=str
)
def test_matches_recurrence(case):
    assert_matches_oracle(case, "numba")


def test_a_gradient_that_is_one_for_all_directions():
    """As that of their sum is: an expanded tensor, which is read as it lies; and inputs of a direction's own, to whose
    gradients the projections' are added in place."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 37, 2, 3), (2, 11, 3), (2, 3, 4), (2, 3), (2, 3), (2, 3, 3))
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    grad = torch.randn(2, 37, 1, 3, generator=generator).expand(2, 37, 2, 3)
    y = projected_scan(*inputs, BIDIRECTIONAL, True, merge=False, backend="numba")
    expected = projected_scan(*doubles, BIDIRECTIONAL, True, merge=False, backend="torch")
    grads = torch.autograd.grad(y, inputs, grad, retain_graph=True)
    for a, same in zip(grads, torch.autograd.grad(y, inputs, grad.contiguous())):
        assert torch.equal(a, same)
    for a, e in zip(grads, torch.autograd.grad(expected, doubles, grad.double())):
        assert relative_error(a, e) < 5e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    assert_matches_oracle(((3, 23), CROSS_SCAN, 3, 5, 2, False), "numba", dtype=dtype)


@pytest.mark.parametrize("step", EXTREME_STEPS)
def test_extreme_steps(step):
    assert_finite_at_step(step, "numba")


@pytest.mark.parametrize("x", SOFTPLUS_ARGUMENTS)
def test_softplus_over_its_whole_range(x):
    assert_softplus_is_right(x, "numba")


@pytest.mark.filterwarnings("ignore:overflow")
def test_states_that_grow_without_bound_become_infinite():
    inputs = [t.detach() for t in make_inputs((1, 6), FORWARD, dtype=torch.float32)]
    inputs[1] = torch.full_like(inputs[1], 50.0)
    inputs[2] = -10 * inputs[2]  # rates that are positive: exp(delta A) overflows
    y, expected = (selective_scan(*inputs, orders=FORWARD, backend=backend) for backend in ("numba", "torch"))
    finite = expected.isfinite()
    assert not finite.all() and torch.equal(y.isfinite(), finite)


def test_gradients_of_parameters_are_right_to_single_precision_over_long_sequences():
    """One sum from end to end would have grown too large for what is added last."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 65536, 2), (1, 65536, 1, 2), (1, 2, 1), (1, 65536, 1, 1), (1, 65536, 1, 1), (1, 2), (1, 2)]
    u, delta, rates, B, C, D, bias = (torch.rand(shape, generator=generator) for shape in shapes)
    D.requires_grad_()
    selective_scan(u, delta, -rates - 0.5, B, C, D, bias, backend="numba").sum().backward()
    torch.testing.assert_close(D.grad.double(), u.double().sum(1), rtol=1e-6, atol=0)


def test_float64_is_for_another_backend():
    with pytest.raises(RuntimeError, match=r"computes in float32.*backend='torch'"):
        selective_scan(*make_inputs((1, 6), FORWARD), orders=FORWARD, backend="numba")


def test_parameters_can_still_be_resized():
    inputs = [t.detach() for t in make_inputs((1, 6), FORWARD, dtype=torch.float32)]
    selective_scan(*inputs, orders=FORWARD, backend="numba")
    assert all(inputs[i].untyped_storage().resizable() for i in (2, 5, 6))  # A, D and delta_bias, as FSDP resizes them


FORK = """
import os, torch
from vim2.ops import FORWARD, selective_scan
torch.manual_seed(0)
u, delta, B, A, D = (torch.randn(s) for s in ((1, 9, 3), (1, 9, 1, 3), (1, 9, 1, 2), (1, 3, 2), (1, 3)))
scan = lambda: selective_scan(u, delta, -A.abs(), B, B, D, orders=FORWARD)
before = scan()
child = os.fork()
if child == 0:
    try:
        os._exit(0 if torch.allclose(scan(), before, atol=1e-5) else 3)
    finally:
        os._exit(4)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert code == 0 and torch.equal(scan(), before), code
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_scans_without_numba():
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "VIM2_SCAN_BACKEND": "auto"}
    run = subprocess.run([sys.executable, "-c", FORK], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "forked after Numba's scan had run" in run.stderr


THREADS = """
import torch
from vim2.ops import FORWARD, selective_scan

u = torch.rand(1, 8, 4)
selective_scan(u, u[:, :, None], -torch.rand(1, 4, 2), *torch.rand(2, 1, 8, 1, 2), orders=FORWARD, backend="numba")
assert torch.get_num_threads() == 1, torch.get_num_threads()
"""


def test_pytorch_keeps_its_number_of_threads():
    """Numba starts its own by the same OpenMP; with other numbers of threads, sums have other last bits."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("NUMBA_NUM_THREADS", None)
    run = subprocess.run([sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_mamba_signature_with_last_state():
    assert_last_state_matches_torch("numba")


def test_where_the_inputs_lie_does_not_matter(monkeypatch):
    """Compiled loops may go by vectors or not depending on addresses; sums must not depend on it."""
    inputs = make_inputs((2, 2), CROSS_SCAN, 96, 4, dtype=torch.float32)
    generator = random.Random(0)
    runs, keep = [], []
    monkeypatch.undo()  # poisoning would even out where memory lies
    for run in range(200):
        keep.append([torch.zeros(generator.randint(1, 5000)) for _ in range(generator.randint(0, 3))])
        moved = []
        for t in inputs:
            offset = generator.randint(0, 15)
            buffer = torch.zeros(t.numel() + offset)
            moved.append(buffer[offset:].view(t.shape).copy_(t.detach()).requires_grad_())
        if run % 3:
            keep.append(moved)
        y = selective_scan(*moved, orders=CROSS_SCAN, backend="numba")
        runs.append([t.detach() for t in (y, *gradients(y, moved))])
    for other in runs[1:]:
        for a, b in zip(other, runs[0]):
            assert torch.equal(a, b)


def test_the_number_of_threads_does_not_matter(monkeypatch):
    inputs = make_inputs((5, 9), CROSS_SCAN, 70, dtype=torch.float32)
    runs = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        y = selective_scan(*inputs, orders=CROSS_SCAN, backend="numba")
        runs.append([y, *gradients(y, inputs)])
    for a, b in zip(*runs):
        assert torch.equal(a, b)
