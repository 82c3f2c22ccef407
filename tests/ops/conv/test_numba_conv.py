"""Causal convolutions, and those of both directions, compiled by Numba, against torch.nn.functional in float64."""

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_all_finite, assert_compiles, assert_matches_oracle, assert_same_bits, relative_error

from vim2.ops import causal_conv_silu, directional_conv_silu
from vim2.ops.conv import causal, directional

pytest.importorskip("numba")


def causal_oracle(x, weight, bias):
    x, weight, bias = x.double(), weight.double(), bias.double()
    return F.silu(F.conv1d(F.pad(x.mT, (weight.shape[2] - 1, 0)), weight, bias, groups=x.shape[2])).mT


def both_ways(x, weight, bias):
    """The second direction sees the sequences from their ends."""
    forward, backward = causal_oracle(x, weight[0::2], bias[0::2]), causal_oracle(x.flip(1), weight[1::2], bias[1::2])
    return torch.stack((forward, backward.flip(1)), dim=2)


FUNCTIONS = {1: (causal_conv_silu, causal_oracle), 2: (directional_conv_silu, both_ways)}
KERNELS = {1: causal._convolve_numba, 2: directional._convolve_numba}
both_functions = pytest.mark.parametrize("outputs", FUNCTIONS)


def make_inputs(shape, outputs, taps=4, dtype=torch.float32, scale=1.0):
    """x is half of wider rows, as in the mixers."""
    generator = torch.Generator().manual_seed(0)
    n, steps, features = shape
    shapes = (n, steps, 2 * features), (outputs * features, 1, taps), (outputs * features,)
    x, *parameters = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return [t.requires_grad_() for t in ((x * scale)[..., :features], *parameters)]


def check(inputs, outputs, bound):
    function, oracle = FUNCTIONS[outputs]
    assert_matches_oracle(function, oracle, ("x", "weight", "bias"), inputs, "numba", bound, bound)


@both_functions
@pytest.mark.parametrize("taps", [1, 2, 4, 7])
# one step; more steps than are summed in float32; more sequences than parts
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 16), (2, 300, 5), (150, 6, 70)], ids=str)
def test_matches_float64(shape, taps, outputs):
    check(make_inputs(shape, outputs, taps), outputs, 1e-6)


@both_functions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, outputs):
    check(make_inputs((40, 12, 16), outputs, dtype=dtype), outputs, 5e-3)


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


@both_functions
def test_auto_is_this_form_and_what_looks_into_operators_gets_pytorchs(outputs, monkeypatch):
    (function, oracle), kernel, calls = FUNCTIONS[outputs], KERNELS[outputs], []
    module = causal if outputs == 1 else directional
    monkeypatch.setattr(module, "_convolve_numba", lambda *args: calls.append(1) or kernel(*args))
    x, *parameters = (t.detach() for t in make_inputs((3, 5, 4), outputs))
    expected = oracle(x, *parameters)
    assert relative_error(function(x, *parameters), expected) < 1e-6 and calls == [1]
    double = function(x.double(), *(t.double() for t in parameters))
    program = torch.export.export(Module(function), (x, *parameters))
    assert calls == [1] and not any("vim2" in str(node.target) for node in program.graph.nodes)
    for y in (double, program.module()(x, *parameters)):
        assert relative_error(y, expected) < 1e-6
    if outputs == 1:  # PyTorch's form of the other is for no transforms either
        mapped = torch.func.vmap(lambda x: function(x.unsqueeze(0), *parameters).squeeze(0))(x)
        assert relative_error(mapped, expected) < 1e-6 and calls == [1]


@both_functions
@pytest.mark.parametrize("scale", [0.0, 1e18])
def test_zero_and_huge_inputs(scale, outputs):
    inputs = make_inputs((3, 5, 4), outputs, scale=scale)
    y = FUNCTIONS[outputs][0](*inputs, backend="numba")
    assert relative_error(y, FUNCTIONS[outputs][1](*inputs)) < 1e-6
    assert_all_finite(y, inputs)


@both_functions
def test_a_broadcast_input_and_gradient(outputs):
    function, oracle = FUNCTIONS[outputs]
    x, *parameters = make_inputs((4, 6, 5), outputs)
    inputs = [x.detach()[:1].expand_as(x).requires_grad_(), *parameters]
    actual = torch.autograd.grad(function(*inputs, backend="numba").sum(), inputs)
    for a, e in zip(actual, torch.autograd.grad(oracle(*inputs).sum(), inputs)):
        assert relative_error(a, e) < 1e-6


@both_functions
def test_not_a_number_stays_one(outputs):
    x, *parameters = (t.detach() for t in make_inputs((1, 9, 3), outputs))
    x = x.clone()
    x[0, 4] = torch.nan
    y = FUNCTIONS[outputs][0](x, *parameters, backend="numba")
    assert y[0, 4].isnan().all() and not y[0, 0].select(0, 0).isnan().any()


@both_functions
def test_the_same_bits_with_one_thread_and_with_two(outputs):
    inputs, before = make_inputs((70, 6, 16), outputs), torch.get_num_threads()
    results = []

    def run(*inputs):
        return FUNCTIONS[outputs][0](*inputs, backend="numba")

    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = run(*inputs)
            results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
        assert_same_bits(run, inputs)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@both_functions
def test_operator_is_registered_correctly_and_compiles(outputs):
    inputs = make_inputs((3, 4, 5), outputs)
    torch.library.opcheck(KERNELS[outputs].registered, inputs)
    assert_compiles(lambda *inputs: FUNCTIONS[outputs][0](*inputs, backend="numba"), inputs)
