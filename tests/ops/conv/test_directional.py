"""SiLU(causal and anti-causal convolutions): both forms against torch.nn.functional in float64.

The Triton form runs on CUDA, or small in Triton's interpreter (tests/conftest.py).
"""

import comparison
import pytest
import torch
import torch.nn.functional as F
from comparison import assert_all_finite, assert_compiles, assert_same_bits, relative_error
from devices import DEVICE, both_backends, needs_triton

from vim2.ops import directional_conv_silu

NAMES = ("x", "weight", "bias")


# Rounding an output costs 2^-9 (bfloat16) or 2^-12 (float16) of it. Gradients of weight and bias are sums in float32,
# from the same rounded inputs.
TOLERANCES = {torch.bfloat16: (5e-3, 1e-5), torch.float16: (6e-4, 1e-5)}


def make_inputs(shape, width=4, dtype=torch.float32, parameter_dtype=torch.float32, scale=1.0, seed=0):
    """x is half of wider rows, as in the mixer: sequences lie twice their size apart."""
    generator = torch.Generator().manual_seed(seed)
    sequences, steps, features = shape

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = (randn(sequences, 2 * steps, features) * scale).to(DEVICE, dtype)[:, :steps]
    parameters = (randn(2 * features, 1, width), randn(2 * features))
    return [t.requires_grad_() for t in (x, *(t.to(DEVICE, parameter_dtype) for t in parameters))]


def oracle(x, weight, bias):
    """Each direction as a causal convolution of its own; the second on reversed sequences."""
    x, weight, bias = x.double(), weight.double(), bias.double()
    features, width = x.shape[-1], weight.shape[-1]
    outputs = []
    for direction in range(2):
        sequence = (x.flip(1) if direction else x).transpose(1, 2)
        y = F.conv1d(
            F.pad(sequence, (width - 1, 0)), weight[direction::2], bias[direction::2], groups=features
        ).transpose(1, 2)
        outputs.append(F.silu(y.flip(1) if direction else y))
    return torch.stack(outputs, dim=2)


def assert_matches_oracle(inputs, backend, half, full):
    comparison.assert_matches_oracle(directional_conv_silu, oracle, NAMES, inputs, backend, half, full)


@both_backends
@pytest.mark.parametrize("width", [1, 2, 4, 5])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 16), (2, 13, 5)], ids=str)
def test_matches_float64(shape, width, backend):
    assert_matches_oracle(make_inputs(shape, width), backend, 1e-6, 1e-6)


@both_backends
@pytest.mark.parametrize("shape", [(70, 12, 16), (3, 3, 70), (520, 2, 1)], ids=str)
def test_several_blocks(shape, backend):
    assert_matches_oracle(make_inputs(shape), backend, 1e-6, 1e-6)


def test_float64():
    inputs = make_inputs((3, 7, 4), dtype=torch.float64, parameter_dtype=torch.float64)
    assert_matches_oracle(inputs, None, 1e-14, 1e-14)


@both_backends
@pytest.mark.parametrize("parameter_dtype", [torch.float32, "the same"], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, parameter_dtype, backend):
    half, full = TOLERANCES[dtype]
    if parameter_dtype == "the same":
        parameter_dtype, full = dtype, half
    inputs = make_inputs((40, 12, 16), dtype=dtype, parameter_dtype=parameter_dtype)
    assert_matches_oracle(inputs, backend, half, full)


@needs_triton
@pytest.mark.parametrize("programs", [1, 2])
def test_several_blocks_a_program(monkeypatch, programs):
    from vim2.ops.conv.triton import directional as kernels

    monkeypatch.setattr(kernels, "FORWARD_PROGRAMS", programs)
    monkeypatch.setattr(kernels, "BACKWARD_PROGRAMS", programs)
    assert_matches_oracle(make_inputs((150, 3, 16)), "triton", 1e-6, 1e-6)


@needs_triton
def test_transposed_input_and_broadcast_gradient():
    inputs = make_inputs((4, 6, 5))
    x = inputs[0].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    y = directional_conv_silu(x, *inputs[1:], backend="triton")
    assert y.is_contiguous() and relative_error(y, oracle(*inputs)) < 1e-6
    for a, e in zip(torch.autograd.grad(y.sum(), (x, *inputs[1:])), torch.autograd.grad(oracle(*inputs).sum(), inputs)):
        assert relative_error(a, e) < 1e-6


@both_backends
def test_a_direction_sees_only_what_lies_behind_it(backend):
    x, weight, bias = (t.detach() for t in make_inputs((1, 12, 3)))
    changed = x.clone()
    changed[:, 6] += 1.0
    difference = directional_conv_silu(changed, weight, bias, backend) - directional_conv_silu(x, weight, bias, backend)
    seen = difference[0].abs().sum(-1) > 0
    assert seen[:, 0].nonzero().flatten().tolist() == [6, 7, 8, 9]
    assert seen[:, 1].nonzero().flatten().tolist() == [3, 4, 5, 6]


@both_backends
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # by design: the sigmoid is then 0
@pytest.mark.parametrize("scale", [0.0, 1e18])
def test_zero_and_huge_inputs(scale, backend):
    inputs = make_inputs((3, 5, 4), scale=scale)
    y = directional_conv_silu(*inputs, backend=backend)
    assert relative_error(y, oracle(*inputs)) < 1e-6
    assert_all_finite(y, inputs)


@needs_triton
@pytest.mark.parametrize("shape", [(35, 4, 16), (1, 1, 5)], ids=str)
def test_every_output_is_written(shape, poison):
    inputs = make_inputs(shape)
    assert_all_finite(directional_conv_silu(*inputs, backend="triton"), inputs)


@needs_triton
def test_two_runs_give_the_same_bits():
    assert_same_bits(lambda *inputs: directional_conv_silu(*inputs, backend="triton"), make_inputs((40, 5, 16)))


@both_backends
def test_autocast_keeps_the_dtype_of_x(backend):
    inputs = make_inputs((3, 5, 4))
    with torch.autocast(DEVICE, torch.bfloat16):
        y = directional_conv_silu(*inputs, backend=backend)
    assert y.dtype == torch.float32 and relative_error(y, oracle(*inputs)) < 1e-6


@needs_triton
def test_operator_is_registered_correctly():
    inputs = [t.detach().requires_grad_() for t in make_inputs((3, 4, 5))]
    torch.library.opcheck(torch.ops.vim2.directional_conv_silu, inputs)


@both_backends
def test_compiles_without_graph_breaks(backend):
    inputs = make_inputs((2, 4, 5))

    assert_compiles(lambda *inputs: directional_conv_silu(*inputs, backend=backend), inputs)


@needs_triton
def test_a_sequence_too_long_for_the_kernel():
    x = torch.zeros(1, 1, 1, device=DEVICE).expand(1, 1 << 22, 1)
    with pytest.raises(ValueError, match="too long"):
        directional_conv_silu(x, torch.zeros(2, 1, 4, device=DEVICE), torch.zeros(2, device=DEVICE), backend="triton")


BAD_INPUTS = {
    "rank": (dict(x=torch.zeros(3, 4)), "x must be"),
    "empty": (dict(x=torch.zeros(0, 3, 5)), "not empty"),
    "features": (dict(x=torch.zeros(2, 3, 6)), "for P = 6"),
    "weight": (dict(weight=torch.zeros(5, 1, 4)), r"\(5, 1, 4\)"),
    "no taps": (dict(weight=torch.zeros(10, 1, 0)), r"\(10, 1, 0\)"),
    "bias": (dict(bias=torch.zeros(5)), r"\(5,\)"),
    "backend": (dict(backend="cuda"), "backend must be one of"),
}


@pytest.mark.parametrize("change, message", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input(change, message):
    arguments = dict(x=torch.zeros(2, 3, 5), weight=torch.zeros(10, 1, 4), bias=torch.zeros(10))
    with pytest.raises(ValueError, match=message):
        directional_conv_silu(**{**arguments, **change})
