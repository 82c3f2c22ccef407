"""Operators are called without PyTorch's dispatcher where nobody looks, and through it where somebody does."""

import pytest
import torch
from devices import DEVICE, needs_triton
from torch.utils._python_dispatch import TorchDispatchMode

from vim2.ops import norm_gate, selective_scan_fn, weighted_average_norm

NAMES = ("u", "delta", "A", "B")
TRITON = pytest.param("triton", marks=needs_triton)


class Seen(TorchDispatchMode):
    """Notes the names of the package's operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vim2":
            self.names.append(func._schema.name.removeprefix("vim2::"))
        return func(*args, **(kwargs or {}))


def gate_inputs():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*shape, generator=generator) for shape in ((2, 3, 2, 4, 8), (2, 3, 16), (16,), (16,))]
    return [t.to(DEVICE).requires_grad_() for t in tensors]


def average_inputs():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*shape, generator=generator) for shape in ((2, 5, 8), (2, 5, 8), (2,), (8,), (8,))]
    return [t.to(DEVICE).requires_grad_() for t in tensors]


def average(first, second, *parameters):
    return weighted_average_norm([first, second], *parameters, backend="triton")


CASES = {
    "norm_gate": (lambda *inputs: norm_gate(*inputs, backend="triton"), gate_inputs),
    "weighted_average": (average, average_inputs),
}


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_both_ways_give_the_same_bits(name):
    function, make = CASES[name]
    inputs = make()
    direct = function(*inputs)
    weight = torch.randn(direct.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    gradients = torch.autograd.grad(direct, inputs, weight)
    with Seen() as seen:
        registered = function(*inputs)
        expected = torch.autograd.grad(registered, inputs, weight)
    assert seen.names == [name, f"{name}_backward"]
    assert torch.equal(direct, registered)
    for a, b in zip(gradients, expected, strict=True):
        assert torch.equal(a, b)


@needs_triton
def test_eager_calls_are_not_dispatched(monkeypatch):
    def refuse(*args):
        raise AssertionError("dispatched")

    from vim2.ops.norm import norm_gate as module

    monkeypatch.setattr(module._norm_gate, "registered", refuse)
    monkeypatch.setattr(module._norm_gate_backward, "registered", refuse)
    inputs = gate_inputs()
    function, _ = CASES["norm_gate"]
    torch.autograd.grad(function(*inputs).sum(), inputs)
    with torch.no_grad():
        function(*inputs)


@needs_triton
def test_a_profiler_sees_them():
    function, make = CASES["norm_gate"]
    inputs = make()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        function(*inputs)
    assert "vim2::norm_gate" in {event.name for event in profiler.events()}


@pytest.mark.parametrize("backend", ["torch", TRITON])
def test_a_gradient_of_the_last_state_alone(backend):
    """Then the output has none."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"u": (1, 3, 7), "delta": (1, 3, 7), "A": (3, 2), "B": (1, 2, 7), "C": (1, 2, 7)}
    inputs = {name: torch.randn(*shape, generator=generator).to(DEVICE) for name, shape in shapes.items()}
    inputs["A"] = -inputs["A"].exp()
    inputs = {name: t.requires_grad_() for name, t in inputs.items()}

    def last(**options):
        return selective_scan_fn(**inputs, delta_softplus=True, return_last_state=True, **options)

    y, state = last(backend=backend)
    alone = torch.autograd.grad(state.square().sum(), [inputs[name] for name in NAMES])
    y, state = last(backend="torch")
    expected = torch.autograd.grad(state.square().sum() + 0 * y.sum(), [inputs[name] for name in NAMES])
    for a, b in zip(alone, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
