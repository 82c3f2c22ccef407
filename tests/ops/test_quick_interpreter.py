"""What quick_interpreter.py spares Triton's interpreter changes no result, and can be restored."""

import os
import types

import pytest
import torch
from comparison import gradients

from vim2.ops import BIDIRECTIONAL, directional_conv_silu, selective_scan, weighted_average_norm

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="of Triton's interpreter")
NOTES = hasattr(getattr(interpreter, "_patch_attr", None), "__wrapped__")


def test_what_is_put_in_place_once_can_be_restored():
    """As what is put in place at each call can: versions of Triton may ask it of every call."""
    from vim2.ops.norm.triton import norm_gate

    kernel, before = norm_gate._norm_gate_kernel.fn, tl.load
    first, second = (interpreter._patch_lang(kernel) for _ in range(2))
    assert tl.load is not before
    second.restore()
    assert tl.load is not before
    first.restore()
    assert tl.load is before


def test_what_is_in_place_is_not_put_in_place_of_itself():
    """The interpreter does not restore what functions inside a kernel have asked for."""
    norm(torch.float32)
    after_one = tl.load, tl.core.load
    norm(torch.float32)
    assert (tl.load, tl.core.load) == after_one


def make(dtype, activations, parameters):
    """Random tensors of these shapes, the parameters in float32."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in activations]
    tensors += [torch.randn(shape, generator=generator) for shape in parameters]
    return [t.requires_grad_() for t in tensors]


def scan(dtype):
    u, delta, B, C, A, D, bias = inputs = make(
        dtype, ((1, 5, 16), (1, 5, 2, 16), (1, 5, 2, 3), (1, 5, 2, 3)), ((2, 16, 3), (2, 16), (2, 16))
    )
    return inputs, selective_scan(u, delta, -A.exp(), B, C, D, bias, orders=BIDIRECTIONAL, backend="triton")


def convolution(dtype):
    inputs = make(dtype, ((3, 5, 6),), ((12, 1, 4), (12,)))
    return inputs, directional_conv_silu(*inputs, backend="triton")


def norm(dtype):
    inputs = make(dtype, ((7, 5), (7, 5)), ((2,), (5,), (5,)))
    return inputs, weighted_average_norm(inputs[:2], *inputs[2:], backend="triton")


@pytest.mark.skipif(not NOTES, reason="this version's interpreter is left as it is")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operator", [scan, convolution, norm])
def test_noted_operations_give_the_bits_of_those_worked_out_anew(operator, dtype, monkeypatch):
    results = []
    for own in (False, False, True):  # noted if they were not, made from notes, and by the interpreter's own
        if own:
            for name in ("_patch_attr", "_get_np_dtype"):
                monkeypatch.setattr(interpreter, name, getattr(interpreter, name).__wrapped__)
            for name, value in vars(tl.core).items():  # what is there still since the last launch
                if type(value) is types.FunctionType and value.__module__ == "quick_interpreter":
                    monkeypatch.setattr(tl.core, name, value.__wrapped__)
        inputs, y = operator(dtype)
        results.append((y, *gradients(y, inputs)))
    for noted, own in zip(results[1], results[2], strict=True):
        assert torch.equal(noted.view(-1).view(torch.uint8), own.view(-1).view(torch.uint8))
    assert all(map(torch.equal, results[0], results[1]))


@triton.jit
def _mixed_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i, mask=i < 3, other=5.0)
    out_ptr += tl.program_id(0) * 5 * N
    tl.store(out_ptr + i, x * x)
    tl.store(out_ptr + N + i, x * y)
    total = x
    for step in range(3):
        total = total + step
    tl.store(out_ptr + 2 * N + i, total)
    tl.store(out_ptr + 3 * N + i, 1.0 / (x * 0.0))
    tl.store(out_ptr + 4 * N + i, 1.0 / (x * -0.0) + tl.program_id(0))


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_operations_differ_by_values_and_operands_of_the_same_types():
    """One tensor may be both operands, plain numbers may be others, -0.0 is not 0.0, and every program has its own."""
    x, y, infinite = torch.tensor([1.0, 2, 3, 4]), torch.tensor([7.0, 6, 5, 4]), torch.full((4,), torch.inf)
    for _ in range(2):
        out = torch.zeros(2, 5, 4)
        _mixed_kernel[(2,)](x, y, out, N=4)
        y[3] = 5.0  # as the mask has it
        expected = torch.stack((x * x, x * y, x + 3, infinite, -infinite))
        assert torch.equal(out, torch.stack((expected, expected)))
