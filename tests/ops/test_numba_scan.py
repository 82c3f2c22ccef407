"""Numba's scan for CPUs against the float64 oracle."""

import random

import pytest
import torch
from scan_cases import CASES, NAMES, assert_matches_oracle, gradients, make_inputs, oracle, relative_error

from vim2.ops import CROSS_SCAN, FORWARD, selective_scan, selective_scan_fn

pytest.importorskip("numba")


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that torch.empty hands out is poisoned with NaN: what a kernel fails to write shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize("case", [*CASES, ((9, 12), CROSS_SCAN, 130, 16, 2, False)], ids=str)
def test_matches_recurrence(case):
    assert_matches_oracle(case, "numba")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    assert_matches_oracle(((3, 23), CROSS_SCAN, 3, 5, 2, False), "numba", dtype=dtype)


@pytest.mark.parametrize("step", [1e-8, 1e-3, 1.0, 1e3])
def test_extreme_steps(step):
    inputs = make_inputs((2, 34), CROSS_SCAN, dtype=torch.float32)
    inputs[1] = torch.full_like(inputs[1], step).requires_grad_()
    inputs[6] = torch.zeros_like(inputs[6]).requires_grad_()
    y = selective_scan(*inputs, delta_softplus=False, orders=CROSS_SCAN, backend="numba")
    assert relative_error(y, oracle(inputs, CROSS_SCAN, softplus=False)) < 1e-5
    for name, gradient in zip(NAMES, gradients(y, inputs)):
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("x", [-1e4, -18.0, -4.0, 0.0, 19.9, 1e4])
def test_softplus_over_its_whole_range(x):
    inputs = make_inputs((1, 5), FORWARD, dtype=torch.float32)
    inputs[1] = torch.full_like(inputs[1], x).requires_grad_()
    inputs[6] = torch.zeros_like(inputs[6]).requires_grad_()
    y = selective_scan(*inputs, orders=FORWARD, backend="numba")
    expected = oracle(inputs, FORWARD)
    assert relative_error(y, expected) < 2e-6
    (gradient,) = torch.autograd.grad(y.sum(), inputs[1])
    (expected_gradient,) = torch.autograd.grad(expected.sum(), inputs[1])
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-12)


def test_last_state():
    generator = torch.Generator().manual_seed(0)
    shapes = dict(u=(2, 6, 70), delta=(2, 6, 70), A=(6, 3), B=(2, 2, 3, 70), C=(2, 3, 70), D=(6,), z=(2, 6, 70))
    arguments = {k: torch.randn(shape, generator=generator) for k, shape in shapes.items()}
    arguments["A"] = -arguments["A"].abs()
    inputs = [t.requires_grad_() for t in arguments.values()]
    results = [
        selective_scan_fn(**arguments, delta_softplus=True, return_last_state=True, backend=backend)
        for backend in ("numba", "torch")
    ]
    grads = [torch.autograd.grad([t.square().sum() for t in result], inputs) for result in results]
    for a, e in zip([*results[0], *grads[0]], [*results[1], *grads[1]]):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


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
