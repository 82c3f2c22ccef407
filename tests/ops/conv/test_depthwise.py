"""SiLU(depth-wise 3x3 convolution): both forms against torch.nn.functional in float64.

The Triton form runs on CUDA, or small in Triton's interpreter (tests/conftest.py).
"""

import subprocess
import sys

import comparison
import pytest
import torch
import torch.nn.functional as F
from comparison import assert_all_finite, assert_compiles, assert_same_bits, relative_error
from devices import DEVICE, both_backends, needs_triton

from vim2.ops import depthwise_conv_silu

NAMES = ("x", "weight", "bias")


# Rounding the output alone costs 2^-9 (bfloat16) or 2^-12 (float16) of it; the gradient of x is also rounded before the
# second convolution. Gradients of weight and bias are sums in float32, from the same rounded inputs.
TOLERANCES = {torch.float32: (1e-6, 1e-6), torch.bfloat16: (1e-2, 1e-5), torch.float16: (1e-3, 1e-5)}


def make_inputs(shape, dtype=torch.float32, parameter_dtype=torch.float32, scale=1.0, seed=0):
    """x is half of a wider map, as in the mixer: its pixels lie 2E apart."""
    generator = torch.Generator().manual_seed(seed)
    channels = shape[-1]

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = (randn(*shape[:-1], 2 * channels) * scale).to(DEVICE, dtype)[..., :channels]
    weight, bias = randn(channels, 1, 3, 3).to(DEVICE, parameter_dtype), randn(channels).to(DEVICE, parameter_dtype)
    return [t.requires_grad_() for t in (x, weight, bias)]


def oracle(x, weight, bias):
    x, weight, bias = x.double(), weight.double(), bias.double()
    return F.silu(F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(weight))).permute(0, 2, 3, 1)


def assert_matches_oracle(inputs, backend, half, full):
    comparison.assert_matches_oracle(depthwise_conv_silu, oracle, NAMES, inputs, backend, half, full)


@both_backends
@pytest.mark.parametrize(
    "shape", [(2, 1, 1, 3), (1, 1, 9, 5), (1, 9, 1, 16), (2, 7, 7, 70), (1, 11, 13, 64), (3, 2, 17, 1)], ids=str
)
def test_matches_float64(shape, backend):
    assert_matches_oracle(make_inputs(shape), backend, 1e-6, 1e-6)


def test_float64():
    inputs = make_inputs((2, 5, 6, 3), torch.float64, torch.float64)
    assert_matches_oracle(inputs, None, 1e-14, 1e-14)


@both_backends
@pytest.mark.parametrize("parameter_dtype", [torch.float32, "the same"], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, parameter_dtype, backend):
    half, full = TOLERANCES[dtype]
    if parameter_dtype == "the same":
        parameter_dtype, full = dtype, half
    assert_matches_oracle(make_inputs((2, 7, 10, 64), dtype, parameter_dtype), backend, half, full)


@needs_triton
@pytest.mark.parametrize("programs", [1, 3, 1000])
def test_strips_and_several_images_a_program(monkeypatch, programs):
    from vim2.ops.conv.triton import depthwise as kernels

    monkeypatch.setattr(kernels, "FORWARD_PROGRAMS", programs)
    monkeypatch.setattr(kernels, "BACKWARD_PROGRAMS", programs)
    monkeypatch.setattr(kernels, "MIN_ROWS", 2)
    monkeypatch.setattr(kernels, "MAX_ROWS", 5)
    assert_matches_oracle(make_inputs((3, 11, 9, 3)), "triton", 1e-6, 1e-6)


@needs_triton
def test_channels_first_input_and_broadcast_gradient():
    inputs = make_inputs((2, 6, 5, 4))
    x = inputs[0].detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).requires_grad_()
    y = depthwise_conv_silu(x, *inputs[1:], backend="triton")
    assert y.is_contiguous() and relative_error(y, oracle(*inputs)) < 1e-6
    for a, e in zip(torch.autograd.grad(y.sum(), (x, *inputs[1:])), torch.autograd.grad(oracle(*inputs).sum(), inputs)):
        assert relative_error(a, e) < 1e-6


@both_backends
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_the_weight_has_its_strides(layout, backend):
    """DistributedDataParallel warns of others, and copies."""
    x, weight, bias = make_inputs((2, 6, 5, 4))
    weight = weight.detach().to(memory_format=layout).requires_grad_()
    depthwise_conv_silu(x, weight, bias, backend=backend).sum().backward()
    assert weight.grad.stride() == weight.stride()


@both_backends
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # by design: the sigmoid is then 0
@pytest.mark.parametrize("scale", [0.0, 1e18])
def test_zero_and_huge_inputs(scale, backend):
    inputs = make_inputs((1, 5, 6, 4), scale=scale)
    y = depthwise_conv_silu(*inputs, backend=backend)
    assert relative_error(y, oracle(*inputs)) < 1e-6
    assert_all_finite(y, inputs)


@needs_triton
@pytest.mark.parametrize("shape", [(2, 7, 9, 5), (1, 1, 1, 64)], ids=str)
def test_every_output_is_written(shape, poison):
    inputs = make_inputs(shape)
    assert_all_finite(depthwise_conv_silu(*inputs, backend="triton"), inputs)


@needs_triton
def test_two_runs_give_the_same_bits():
    assert_same_bits(lambda *inputs: depthwise_conv_silu(*inputs, backend="triton"), make_inputs((3, 6, 9, 5)))


@both_backends
def test_autocast_keeps_the_dtype_of_x(backend):
    inputs = make_inputs((2, 4, 5, 4))
    with torch.autocast(DEVICE, torch.bfloat16):
        y = depthwise_conv_silu(*inputs, backend=backend)
    assert y.dtype == torch.float32 and relative_error(y, oracle(*inputs)) < 1e-6


@needs_triton
def test_operator_is_registered_correctly():
    inputs = [t.detach().requires_grad_() for t in make_inputs((2, 3, 4, 5))]
    torch.library.opcheck(torch.ops.vim2.depthwise_conv_silu, inputs)


@both_backends
def test_compiles_without_graph_breaks(backend):
    inputs = make_inputs((1, 3, 4, 5))

    assert_compiles(lambda *inputs: depthwise_conv_silu(*inputs, backend=backend), inputs)


BAD_INPUTS = {
    "rank": (dict(x=torch.zeros(3, 4, 5)), "x must be"),
    "empty": (dict(x=torch.zeros(0, 3, 4, 5)), "not empty"),
    "channels": (dict(x=torch.zeros(2, 3, 4, 6)), "for 6 channels"),
    "weight": (dict(weight=torch.zeros(5, 1, 5, 5)), r"\(5, 1, 3, 3\)"),
    "bias": (dict(bias=torch.zeros(4)), r"\(4,\)"),
    "backend": (dict(backend="cuda"), "backend must be one of"),
}


@pytest.mark.parametrize("change, message", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input(change, message):
    arguments = dict(x=torch.zeros(2, 3, 4, 5), weight=torch.zeros(5, 1, 3, 3), bias=torch.zeros(5))
    with pytest.raises(ValueError, match=message):
        depthwise_conv_silu(**{**arguments, **change})


def test_import_leaves_kernels_alone():
    """Kernels are imported when they first run: those who have no GPU never wait for them."""
    code = "import sys, vim2; print([m for m in sys.modules if m.startswith('vim2.ops') and 'triton' in m])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
