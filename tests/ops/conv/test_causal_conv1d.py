"""Causal convolutions, and those of both directions, against torch.nn.functional in float64: in PyTorch, and by
causal-conv1d, with its kernels where they and a GPU are there, and with a stand-in that takes and refuses the same
arguments, so that layouts are checked everywhere."""

import importlib.util
import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_compiles, assert_same_bits, gradients, relative_error

from vim2.ops import backend, causal_conv_silu, directional_conv_silu
from vim2.ops.conv import causal, directional
from vim2.tsm2 import TimeMixer, VariateMixer

HAS_KERNELS = torch.cuda.is_available() and backend.HAS_CAUSAL_CONV1D

# The kernels' exponentials are approximate; in half precision, an output is rounded to 2^-9 or 2^-12 of it, and
# directions' gradients for x are rounded before they are added.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 8e-4}


def check(x, weight, bias, silu):
    """What the C++ side checks of x, weight and bias, and what it trusts its callers with: that threads may load 16
    bytes at once. Returns whether channels lie together."""
    channels, steps = x.shape[1:]
    assert x.dtype in BOUNDS and weight.dtype == bias.dtype and silu
    assert weight.shape == (channels, weight.shape[1]) and 2 <= weight.shape[1] <= 4 and bias.shape == (channels,)
    assert x.stride(2) == 1 or x.stride(1) == 1
    assert weight.stride(1) == 1 and bias.stride(0) == 1  # along axes of one element, too
    together = x.stride(1) == 1 and x.stride(2) > 1
    if together:
        assert channels % 8 == 0 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0
    if together or steps % (16 // x.element_size()) == 0:
        strides = (x.stride(0), x.stride(2 if together else 1))
        assert x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in strides)
    return together


def silu_of_convolution(x, weight, bias):
    """In float64, from (n, P, steps), (P, w) and (P,)."""
    x, weight, bias = x.double(), weight.double(), bias.double()
    return F.silu(F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight.unsqueeze(1), bias, groups=x.shape[1]))


def fwd(x, weight, bias, seq_idx, initial_states, final_states, silu):
    assert seq_idx is initial_states is final_states is None
    check(x, weight, bias, silu)
    return torch.empty_like(x).copy_(silu_of_convolution(x, weight, bias))


def bwd(x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, wants_initial, silu):
    assert seq_idx is initial_states is dfinal_states is dx is None and not wants_initial
    assert dout.dtype == x.dtype and dout.shape == x.shape
    assert check(x, weight, bias, silu) == check(dout, weight, bias, silu)
    inputs = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    with torch.enable_grad():
        grads = torch.autograd.grad(silu_of_convolution(*inputs), inputs, dout.double())
    dx, dweight, dbias = (torch.empty_like(t).copy_(grad) for t, grad in zip((x, weight, bias), grads))
    return dx, dweight, dbias, None


def stand_in(version="1.6.0"):
    functions = types.ModuleType("causal_conv1d.cpp_functions")
    functions.causal_conv1d_fwd_function, functions.causal_conv1d_bwd_function = fwd, bwd
    package = types.ModuleType("causal_conv1d")
    package.__version__, package.cpp_functions = version, functions
    return {"causal_conv1d": package, "causal_conv1d.cpp_functions": functions}


@pytest.fixture
def forget_the_form(monkeypatch):
    """The form is imported anew, with what a test gives it, and not kept beyond the test."""
    name = "vim2.ops.conv.causal_conv1d"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(sys.modules["vim2.ops.conv"], "causal_conv1d", raising=False)
    yield
    sys.modules.pop(name, None)
    vars(sys.modules["vim2.ops.conv"]).pop("causal_conv1d", None)


@pytest.fixture(params=["stand-in", "kernels"])
def device(request, monkeypatch, forget_the_form):
    if request.param == "kernels":
        if not HAS_KERNELS:
            pytest.skip("causal-conv1d's CUDA kernels or the GPU for them are not there")
        return "cuda"
    for name, module in stand_in().items():
        monkeypatch.setitem(sys.modules, name, module)
    for module in (causal, directional):  # so that CPU tensors pass
        monkeypatch.setattr(module, "resolve_backend", lambda backend, *tensors, causal_taps: backend or "mamba_ssm")
    return "cpu"


def make_inputs(shape, taps=4, dtype=torch.float32, device="cpu", outputs=1, parameter_dtype=torch.float32):
    """x is half of wider rows, as in the mixers: sequences lie twice their size apart."""
    generator = torch.Generator().manual_seed(0)
    n, steps, features = shape

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = randn(n, 2 * steps, features).to(device, dtype)[:, :steps]
    parameters = randn(outputs * features, 1, taps), randn(outputs * features)
    return [t.requires_grad_() for t in (x, *(t.to(device, parameter_dtype) for t in parameters))]


def oracle(x, weight, bias):
    return silu_of_convolution(x.mT, weight.squeeze(1), bias).mT


def both_ways(x, weight, bias):
    """The second direction sees the sequences from their ends."""
    forward, backward = oracle(x, weight[0::2], bias[0::2]), oracle(x.flip(1), weight[1::2], bias[1::2])
    return torch.stack((forward, backward.flip(1)), dim=2)


FUNCTIONS = {1: (causal_conv_silu, oracle), 2: (directional_conv_silu, both_ways)}


def assert_matches_oracle(inputs, outputs, backend, bound, parameter_bound=None):
    function, expected = FUNCTIONS[outputs]
    y, y_exact = function(*inputs, backend=backend), expected(*inputs)
    assert y.dtype == inputs[0].dtype and y.shape == y_exact.shape and y.is_contiguous()
    assert relative_error(y, y_exact) < bound
    grads = zip(gradients(y, inputs), gradients(y_exact, inputs, dtype=y.dtype), inputs)
    for actual, exact, t in grads:
        assert actual.dtype == t.dtype
        assert relative_error(actual, exact) < (bound if t is inputs[0] else parameter_bound or bound)


SHAPES = [(1, 1, 1), (5, 3, 16), (2, 13, 5), (3, 16, 7), (4, 1, 8), (4, 1, 3), (1, 70, 24), (2, 300, 8)]


@pytest.mark.parametrize("outputs", FUNCTIONS)
@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, taps, outputs, device):
    assert_matches_oracle(make_inputs(shape, taps, device=device, outputs=outputs), outputs, "mamba_ssm", 1e-5)


@pytest.mark.parametrize("outputs", FUNCTIONS)
@pytest.mark.parametrize("parameter_dtype", [torch.float32, "the same"], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(40, 12, 16), (3, 9, 5)], ids=str)
def test_half_precision(shape, dtype, parameter_dtype, outputs, device):
    of_parameters = dtype if parameter_dtype == "the same" else parameter_dtype
    inputs = make_inputs(shape, 4, dtype, device, outputs, of_parameters)
    assert_matches_oracle(inputs, outputs, "mamba_ssm", BOUNDS[dtype], None if of_parameters == dtype else 1e-5)


# Of tensors of 6 sequences of 8 steps of 16 channels, of which each should end up with the kernels somehow.
LAYOUTS = {
    "steps together": lambda t: t.mT.contiguous().mT,
    "channels of a wider tensor": lambda t: F.pad(t, (0, 8))[..., :16],
    "rows at odd strides": lambda t: F.pad(t, (0, 3))[..., :16],
    "begins at an odd address": lambda t: F.pad(t.flatten(), (1, 0))[1:].view_as(t),
    "one sequence for all": lambda t: t[:1].expand_as(t),
    "one step for all": lambda t: t[:, :1].expand_as(t),
    "every other channel": lambda t: t.repeat_interleave(2, dim=2)[..., ::2],
}


@pytest.mark.parametrize("lay_out", LAYOUTS.values(), ids=LAYOUTS)
def test_any_layout_of_the_input_and_of_the_gradient(lay_out, device):
    inputs = make_inputs((6, 8, 16), device=device)
    x, *parameters = inputs
    laid_out = lay_out(x.detach()).requires_grad_()
    y, exact = causal_conv_silu(laid_out, *parameters, backend="mamba_ssm"), oracle(laid_out, *parameters)
    assert relative_error(y, exact) < 1e-5
    grad = lay_out(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device))
    actual = torch.autograd.grad(y, (laid_out, *parameters), grad)
    for a, e in zip(actual, torch.autograd.grad(exact, (laid_out, *parameters), grad.double())):
        assert relative_error(a, e) < 1e-5


def test_what_the_kernels_know_is_not_copied(device, monkeypatch):
    """The channel mixer's values, half of a linear map's output, reach them as they lie."""
    import vim2.ops.conv.causal_conv1d as form

    seen = []
    kernel = form.causal_conv1d_fwd_function
    monkeypatch.setattr(form, "causal_conv1d_fwd_function", lambda x, *args: seen.append(x) or kernel(x, *args))
    x, *parameters = (t.detach() for t in make_inputs((6, 8, 16), device=device))
    causal_conv_silu(x, *parameters, backend="mamba_ssm")
    assert seen[0].data_ptr() == x.data_ptr() and seen[0].stride() == (256, 1, 16)


def test_more_elements_than_32_bits_count(device, monkeypatch):
    """Offsets in the kernels would wrap around: sequences go in parts. Here they wrap around at 1000."""
    import vim2.ops.conv.causal_conv1d as form

    calls = []
    for name in ("causal_conv1d_fwd_function", "causal_conv1d_bwd_function"):
        kernel = getattr(form, name)
        monkeypatch.setattr(form, name, lambda x, *args, kernel=kernel: calls.append(len(x)) or kernel(x, *args))
    monkeypatch.setattr(form, "MAX_OFFSET", 1000)
    assert_matches_oracle(make_inputs((7, 8, 16), device=device), 1, "mamba_ssm", 1e-5)
    assert calls == [3, 3, 1] * 2


def test_operator_is_registered_correctly(device):
    inputs = make_inputs((3, 5, 8), device=device)
    torch.library.opcheck(torch.ops.vim2.causal_conv_silu, inputs)


@pytest.mark.parametrize("shape", [(3, 5, 8), (3, 5, 7), (1, 1, 16)], ids=str)
def test_gradients_lie_in_memory_as_their_fakes_say(shape, device):
    inputs = [t.detach() for t in make_inputs(shape, device=device)]
    grads = torch.ops.vim2.causal_conv_silu_backward(torch.ones(shape, device=device), *inputs)
    assert all(grad.is_contiguous() for grad in grads)


@pytest.mark.parametrize("outputs", FUNCTIONS)
def test_compiles_without_graph_breaks(outputs, device):
    inputs = make_inputs((2, 4, 8), device=device, outputs=outputs)
    assert_compiles(lambda *inputs: FUNCTIONS[outputs][0](*inputs, backend="mamba_ssm"), inputs)


def test_deterministic_algorithms(device):
    inputs = make_inputs((300, 20, 16), device=device, outputs=2)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same_bits(lambda *inputs: directional_conv_silu(*inputs, backend="mamba_ssm"), inputs)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("mixer", [TimeMixer, VariateMixer])
def test_mixers_of_tsm2_run_on_it(mixer, device, monkeypatch):
    torch.manual_seed(0)
    mixer, x = mixer(8), torch.randn(2, 3, 5, 8)
    mixer.s6 = _FirstDirection()
    with monkeypatch.context() as plain:
        plain.setattr(causal, "resolve_backend", lambda *args, **options: "torch")
        plain.setattr(directional, "resolve_backend", lambda *args, **options: "torch")
        expected = mixer(x)
    calls = []
    kernel = causal.convolve
    for module, name in ((causal, "convolve"), (directional, "convolve_causally")):
        monkeypatch.setattr(module, name, lambda *args: calls.append(1) or kernel(*args))
    if device == "cuda":
        monkeypatch.setattr(backend, "DEFAULT_BACKEND", "mamba_ssm")
        monkeypatch.setattr(backend, "HAS_MAMBA_SSM", True)  # no scan is run
    actual = mixer.to(device)(x.to(device))
    assert calls
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=1e-5)


class _FirstDirection(torch.nn.Module):
    """In place of S6, so that mamba-ssm need not be there."""

    def forward(self, u, merge=True):
        return u if merge else u[..., :1, :].expand_as(u)


def test_plain_form():
    for shape, taps in (((5, 3, 16), 4), ((2, 1, 5), 1), ((1, 9, 1), 6)):
        assert_matches_oracle(make_inputs(shape, taps), 1, "torch", 1e-5)
    assert_matches_oracle(make_inputs((2, 9, 3), dtype=torch.float64, parameter_dtype=torch.float64), 1, None, 1e-13)
    inputs = make_inputs((2, 9, 3))
    with torch.autocast("cpu", torch.bfloat16):
        y = causal_conv_silu(*inputs, backend="torch")
    assert y.dtype == torch.float32 and relative_error(y, oracle(*inputs)) < 2e-2


def gpu_tensor(dtype=torch.float32):
    """What is asked of a tensor on a GPU."""
    device = torch.device("cuda", 0)
    return types.SimpleNamespace(dtype=dtype, device=device, is_cuda=True, is_meta=False, get_device=lambda: 0)


def test_it_is_chosen_with_mamba_ssm_where_it_can(monkeypatch):
    for name in ("HAS_MAMBA_SSM", "HAS_CAUSAL_CONV1D", "HAS_TRITON"):
        monkeypatch.setattr(backend, name, True)
    monkeypatch.setattr(backend, "IS_ROCM", False)
    resolve = backend.resolve_backend
    assert resolve("mamba_ssm", gpu_tensor(), causal_taps=4) == "mamba_ssm"
    assert resolve("auto", gpu_tensor(), causal_taps=4) == "triton"
    assert resolve("mamba_ssm", gpu_tensor(), causal_taps=5) == "triton"
    assert resolve("mamba_ssm", gpu_tensor(), causal_taps=1) == "triton"
    assert resolve("mamba_ssm", gpu_tensor()) == "triton"  # any other operator
    assert resolve("mamba_ssm", gpu_tensor(torch.float64), causal_taps=4) == "torch"
    assert resolve("mamba_ssm", torch.zeros(1), causal_taps=4) == resolve("auto", torch.zeros(1))
    assert resolve("mamba_ssm", torch.zeros(1, device="meta"), causal_taps=4) == "torch"


def test_where_it_is_not_installed_that_is_said_once(monkeypatch):
    for name, there in (("HAS_MAMBA_SSM", True), ("HAS_TRITON", True), ("HAS_CAUSAL_CONV1D", False)):
        monkeypatch.setattr(backend, name, there)
    monkeypatch.setattr(backend, "IS_ROCM", False)
    monkeypatch.setattr(backend, "_warned", set())
    with pytest.warns(UserWarning, match="causal-conv1d is not installed.*pip install"):
        assert backend.resolve_backend("mamba_ssm", gpu_tensor(), causal_taps=4) == "triton"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.resolve_backend("mamba_ssm", gpu_tensor(), causal_taps=4) == "triton"
        assert backend.resolve_backend("mamba_ssm", gpu_tensor(), causal_taps=7) == "triton"


def test_an_old_release_is_refused(monkeypatch, forget_the_form):
    for name, module in stand_in("1.5.3.post1").items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(RuntimeError, match=r"needs causal-conv1d 1\.6 or later, and 1\.5\.3\.post1 is installed"):
        importlib.import_module("vim2.ops.conv.causal_conv1d")


BAD_INPUTS = {
    "rank": (dict(x=torch.zeros(3, 4)), "x must be"),
    "empty": (dict(x=torch.zeros(0, 3, 5)), "not empty"),
    "features": (dict(x=torch.zeros(2, 3, 6)), "for P = 6"),
    "no taps": (dict(weight=torch.zeros(5, 1, 0)), r"\(5, 1, 0\)"),
    "bias": (dict(bias=torch.zeros(10)), r"\(10,\)"),
    "backend": (dict(backend="cuda"), "backend must be one of"),
}


@pytest.mark.parametrize("change, message", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input(change, message):
    arguments = dict(x=torch.zeros(2, 3, 5), weight=torch.zeros(5, 1, 4), bias=torch.zeros(5))
    with pytest.raises(ValueError, match=message):
        causal_conv_silu(**{**arguments, **change})
