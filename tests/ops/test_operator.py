"""Operators are called without PyTorch's dispatcher where nobody looks, and through it where somebody does."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from devices import DEVICE, needs_triton
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from vim2.ops import norm_gate, selective_scan_fn, weighted_average, weighted_average_norm
from vim2.ops.observers import is_observed

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


def gate_alone_inputs():
    return gate_inputs()[:2]


def average_alone(first, second, weight):
    return weighted_average([first, second], weight, backend="triton")


def average_alone_inputs():
    return average_inputs()[:3]


CASES = {
    "norm_gate": (lambda *inputs: norm_gate(*inputs, backend="triton"), gate_inputs),
    "weighted_average": (average, average_inputs),
    "norm_gate, no norm": (lambda *inputs: norm_gate(*inputs, backend="triton"), gate_alone_inputs),
    "weighted_average, no norm": (average_alone, average_alone_inputs),
}
WATCHED = {
    "neither": (contextlib.nullcontext, contextlib.nullcontext),
    "both": (Seen, Seen),
    "forward": (Seen, contextlib.nullcontext),
    "backward": (contextlib.nullcontext, Seen),
}


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_both_ways_give_the_same_bits_and_may_be_mixed(name):
    """A profile, say, may begin between a forward and its backward pass."""
    function, make = CASES[name]
    results = {}
    for way, (forward, backward) in WATCHED.items():
        inputs = make()
        with forward() as first:
            output = function(*inputs)
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        with backward() as second:
            results[way] = [output, *torch.autograd.grad(output, inputs, weight)]
        operator = name.partition(",")[0]
        for seen, expected in ((first, operator), (second, f"{operator}_backward")):
            assert seen is None or seen.names == [expected]
    for tensors in results.values():
        assert all(torch.equal(a, b) for a, b in zip(tensors, results["neither"], strict=True))


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_may_be_recomputed_the_other_way(name):
    function, make = CASES[name]
    inputs = make()
    expected = torch.autograd.grad(function(*inputs).sum(), inputs)
    for forward, backward in ((Seen, contextlib.nullcontext), (contextlib.nullcontext, Seen)):
        with forward():
            output = checkpoint(function, *inputs, use_reentrant=False)
        with backward():
            gradients = torch.autograd.grad(output.sum(), inputs)
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_without_a_gradient_from_above_there_are_zeros(name):
    function, make = CASES[name]
    inputs = make()
    gradients = torch.autograd.grad(NoGradient.apply(function(*inputs)).sum(), inputs)
    assert all((gradient == 0).all() for gradient in gradients)


def test_values_of_another_type_are_refused():
    y, gate, *norm = gate_inputs()
    for eps in (None, "a"):
        with pytest.raises((TypeError, ValueError)):
            norm_gate(y, gate, *norm, eps=eps)
    sequence = torch.zeros(1, 3, 7, device=DEVICE)
    with pytest.raises(ValueError, match="delta_softplus must be True or False, got 'yes'"):
        selective_scan_fn(
            sequence, sequence, -torch.ones(3, 2, device=DEVICE), *[sequence[:, :2]] * 2, delta_softplus="yes"
        )


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
def is_observed_by_a_mode() -> bool:
    with BaseTorchFunctionMode():
        return is_observed()


def test_a_default_device_does_not_look():
    """As those who set one for all tensors of a program do not; who looks besides does."""
    torch.set_default_device(DEVICE)
    try:
        assert not is_observed()
        with BaseTorchFunctionMode():
            assert is_observed()
        with torch.device("cpu"):  # within the other
            assert not is_observed()
        assert not is_observed()
        with ThreadPoolExecutor(1) as pool:  # a thread of its own has no default device, and modes of its own
            assert pool.submit(is_observed_by_a_mode).result()
    finally:
        torch.set_default_device(None)
    assert not is_observed()
    with BaseTorchFunctionMode():
        assert is_observed()


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
