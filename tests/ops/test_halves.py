"""A projection's halves, whose gradients are written side by side."""

import pytest
import torch
from devices import DEVICE, needs_triton
from torch.utils._python_dispatch import TorchDispatchMode

from vim2.ops import depthwise_conv_silu, directional_conv_silu, norm_gate
from vim2.ops.conv.depthwise import depthwise_conv_silu_of_half
from vim2.ops.conv.directional import directional_conv_silu_of_half

KINDS = ["depthwise", "directional"]


def inputs(kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 3, 5, 40), (20, 1, 3, 3), (20,)] if kind == "depthwise" else [(2, 3, 5, 40), (10, 1, 4), (10,)]
    return [torch.randn(shape, generator=generator).to(DEVICE).requires_grad_() for shape in shapes]


def gated(kind, projected, weight, bias, backend, halves=True):
    """As a mixer has it, but for the scan."""
    if halves:
        of_half = depthwise_conv_silu_of_half if kind == "depthwise" else directional_conv_silu_of_half
        value, gate = of_half(projected, weight, bias, backend)
    else:
        value, gate = projected.chunk(2, dim=-1)
        if kind == "depthwise":
            value = depthwise_conv_silu(value, weight, bias, backend)
        else:
            value = directional_conv_silu(value.unflatten(-1, (-1, 5)).flatten(0, 2), weight, bias, backend)
    y = value if kind == "depthwise" else value.unflatten(0, gate.shape[:-1])
    return norm_gate(y, gate, backend=backend)


def gradients(y, tensors, **options):
    return torch.autograd.grad(y, tensors, torch.cos(y.detach()), **options)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("kind", KINDS)
def test_halves_are_those_of_a_chunk(kind, backend):
    tensors = inputs(kind)
    y, expected = (gated(kind, *tensors, backend, halves) for halves in (True, False))
    assert torch.equal(y, expected)
    first = gradients(y, tensors, retain_graph=True)
    for grads in (first, gradients(y, tensors)):  # of a graph that is kept, each walk has memory of its own
        for actual, other in zip(grads, gradients(expected, tensors, retain_graph=True), strict=True):
            assert torch.equal(actual, other)
    with torch.no_grad():
        assert torch.equal(gated(kind, *tensors, backend), y)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket._qualified_op_name)
        return function(*args, **(kwargs or {}))


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="autograd walks back in a GPU's thread, where the mode is no notebook")
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_halves_are_not_copied_together(kind):
    from vim2.ops.observers import ours

    tensors = inputs(kind)
    y = gated(kind, *tensors, "triton")
    with Seen() as seen:
        ours.modes += 1  # as a notebook of replays
        try:
            gradients(y, tensors)
        finally:
            ours.modes -= 1
    assert "aten::empty" in seen.names and not seen.names & {"aten::cat", "aten::copy_"}


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
def test_what_others_make_of_the_gates_gradient_counts(kind):
    """A hook that changes it, another use of the gate, or none."""

    def of(halves, change):
        tensors = inputs(kind)
        of_half = depthwise_conv_silu_of_half if kind == "depthwise" else directional_conv_silu_of_half
        if halves:
            value, gate = of_half(*tensors, "triton")
        else:
            value, gate = tensors[0].chunk(2, dim=-1)
            if kind == "depthwise":
                value = depthwise_conv_silu(value, *tensors[1:], "triton")
            else:
                value = directional_conv_silu(value.unflatten(-1, (-1, 5)).flatten(0, 2), *tensors[1:], "triton")
        y = change(value if kind == "depthwise" else value.unflatten(0, gate.shape[:-1]), gate)
        return torch.autograd.grad(y, tensors, torch.cos(y.detach()), allow_unused=True)

    def hooked(value, gate):
        gate.register_hook(lambda grad: 2 * grad)
        return norm_gate(value, gate, backend="triton")

    def used_twice(value, gate):
        return norm_gate(value, gate, backend="triton") + gate

    changes = [hooked, used_twice, lambda value, gate: value * 1, lambda value, gate: gate * 1]
    for change in changes:
        for actual, expected in zip(of(True, change), of(False, change), strict=True):
            if expected is None:
                assert actual is None
            else:
                torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
