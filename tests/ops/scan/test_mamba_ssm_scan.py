"""The scan by mamba-ssm's kernels against the float64 oracle: with the kernels, where they and a GPU are there, and
with a stand-in that takes the same arguments, so that layouts, permutations and kept states are checked everywhere."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from comparison import gradients
from scan_cases import CASES, assert_last_state_matches_torch, assert_matches_oracle, make_inputs

from vim2.ops import BIDIRECTIONAL, CROSS_SCAN, backend, norm_gate, selective_scan, selective_scan_fn
from vim2.ops.scan import chunks, operator
from vim2.ops.scan.reference import selective_scan_chunked_backward

HAS_KERNELS = torch.cuda.is_available() and backend.HAS_MAMBA_SSM
CHUNK = 8  # of the stand-in; the kernels' is 2048

# the kernels' exponentials are approximate, and they round every direction's output and gradient
KERNEL_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def recurrence(u, delta, A, B, C, D, bias, softplus):
    """Outputs, and the states at the chunks' ends, (batch, channels, chunks, N), in float64."""
    groups, channels = B.shape[1], u.shape[1]
    B, C = (t.repeat_interleave(channels // groups, dim=1) for t in (B, C))
    delta = delta + bias[:, None]
    delta = F.softplus(delta) if softplus else delta
    h, ys, ends = torch.zeros_like(u[:, :, :1] * A), [], []
    for t in range(u.shape[2]):
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta * u)[:, :, t, None] * B[..., t]
        ys.append((h * C[..., t]).sum(-1) + D * u[:, :, t])
        if t % CHUNK == CHUNK - 1 or t == u.shape[2] - 1:
            ends.append(h)
    return torch.stack(ys, -1), torch.stack(ends, 2)


def check(u, delta, A, B, C, D, z, bias):
    """What the kernels' C++ side checks of its arguments."""
    batch, channels, length = u.shape
    groups, n = B.shape[1], A.shape[1]
    assert z is None and delta.shape == u.shape and A.shape == (channels, n) and D.shape == bias.shape == (channels,)
    assert B.shape == C.shape == (batch, groups, n, length) and channels % groups == 0
    assert u.dtype == delta.dtype == B.dtype == C.dtype and u.dtype in KERNEL_BOUNDS
    assert A.dtype == D.dtype == bias.dtype == torch.float32
    assert all(t.stride(-1) == 1 or t.shape[-1] == 1 for t in (u, delta, B, C, D, bias))


def fwd(u, delta, A, B, C, D, z, bias, softplus):
    check(u, delta, A, B, C, D, z, bias)
    y, ends = recurrence(*(t.double() for t in (u, delta, A, B, C, D, bias)), softplus)
    x = torch.full((*ends.shape[:3], 2 * A.shape[1]), float("nan"))
    x[..., 1::2] = ends
    return [y.to(u.dtype), x]


def bwd(u, delta, A, B, C, D, z, bias, dout, x, out, dz, softplus, recompute):
    check(u, delta, A, B, C, D, z, bias)
    assert out is None and dz is None and not recompute
    assert dout.shape == u.shape and dout.dtype == u.dtype and (dout.stride(-1) == 1 or dout.shape[-1] == 1)
    inputs = (u, delta, A, B, C, D, bias)
    exact = [t.double() for t in inputs]
    _, ends = recurrence(*exact, softplus)
    if ends.shape[2] > 1:
        assert x.shape == (*ends.shape[:3], 2 * A.shape[1]) and x.is_contiguous() and x.dtype == torch.float32
        torch.testing.assert_close(x[:, :, :-1, 1::2], ends[:, :, :-1].float())
    # the groups are directions that share a walk
    groups = B.shape[1]
    u, delta, dout = (t.double().unflatten(1, (groups, -1)).permute(0, 3, 1, 2) for t in (u, delta, dout))
    A, B, C, D, bias = (t.unflatten(0, (groups, -1)) if t.dim() < 3 else t.permute(0, 3, 1, 2) for t in exact[2:])
    arguments = (u, delta, A, B, C, D, bias, softplus, ["forward"] * groups, 1, u.shape[1])
    grads = selective_scan_chunked_backward(dout, torch.empty(0), *arguments)
    grads = [g.permute(0, 2, 3, 1).contiguous() if g.dim() == 4 else g for g in grads]
    return [g.reshape(t.shape).to(t.dtype) for g, t in zip(grads, inputs)]


@pytest.fixture(params=["stand-in", "kernels"])
def device(request, monkeypatch):
    if request.param == "kernels":
        if not HAS_KERNELS:
            pytest.skip("mamba-ssm's CUDA kernels or the GPU for them are not there")
        yield "cuda"
        return
    stand_in = types.SimpleNamespace(fwd=fwd, bwd=bwd)
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", stand_in)
    monkeypatch.setattr(chunks, "MAMBA_CHUNK", CHUNK)
    monkeypatch.setattr(operator, "resolve_backend", lambda backend, *tensors, scan: backend)  # CPU tensors pass
    sys.modules.pop("vim2.ops.scan.mamba_ssm_scan", None)
    yield "cpu"
    sys.modules.pop("vim2.ops.scan.mamba_ssm_scan", None)  # it holds the stand-in


def bounds(device):
    return KERNEL_BOUNDS if device == "cuda" else None


LONG = ((3000,), BIDIRECTIONAL, 4, 5, 2, False)  # more than one of the kernels' chunks


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_recurrence(case, device):
    assert_matches_oracle(case, "mamba_ssm", device, bounds=bounds(device))


def test_a_sequence_of_several_chunks_of_the_kernels(device):
    case = LONG if device == "cuda" else ((30,), *LONG[1:])
    assert_matches_oracle(case, "mamba_ssm", device, bounds=bounds(device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, device):
    assert_matches_oracle(((3, 23), CROSS_SCAN, 3, 5, 2, False), "mamba_ssm", device, dtype, bounds(device))


def test_mamba_signature_with_last_state(device):
    assert_last_state_matches_torch("mamba_ssm", device)


def test_mamba_layout_needs_no_copies(device, monkeypatch):
    """What selective_scan_fn is given reaches the kernels as it lies."""
    import selective_scan_cuda

    seen = []
    kernel = selective_scan_cuda.fwd
    monkeypatch.setattr(selective_scan_cuda, "fwd", lambda *args: seen.extend(args) or kernel(*args))
    generator = torch.Generator().manual_seed(0)
    u, delta, B, C = (
        torch.randn(shape, generator=generator).to(device)
        for shape in ((2, 6, 9), (2, 6, 9), (2, 3, 4, 9), (2, 3, 4, 9))
    )
    selective_scan_fn(u, delta, -torch.ones(6, 4, device=device), B, C, backend="mamba_ssm")
    for given, used in zip((u, delta, B, C), (seen[0], seen[1], seen[3], seen[4])):
        assert given.data_ptr() == used.data_ptr()


def test_without_gradients_the_result_is_the_same(device):
    inputs = [t.to(device) for t in make_inputs((3, 43), CROSS_SCAN, dtype=torch.float32)]
    with_gradients = selective_scan(*inputs, orders=CROSS_SCAN, backend="mamba_ssm")
    with torch.no_grad():
        assert torch.equal(selective_scan(*inputs, orders=CROSS_SCAN, backend="mamba_ssm"), with_gradients)


def test_operator_is_registered_correctly(device):
    u, delta, A, B, C, D, bias = (t.detach().to(device) for t in make_inputs((3, 5), CROSS_SCAN, dtype=torch.float32))
    flat = [u.flatten(1, 2), delta.flatten(1, 2), A, B.flatten(1, 2), C.flatten(1, 2), D, bias, A.new_empty(0)]
    flat = [t.requires_grad_() for t in flat]
    chunk = chunks.MAMBA_CHUNK
    for with_last in (False, True):
        options = (True, [0, 1, 2, 3], 3, 5, True, with_last, chunk, "mamba_ssm")
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(torch.ops.vim2.selective_scan, (*flat, *options), test_utils=tests)


def test_compiles_without_graph_breaks(device):
    inputs = [t.detach().to(device).requires_grad_() for t in make_inputs((3, 5), CROSS_SCAN, dtype=torch.float32)]

    def loss(*inputs):
        return selective_scan(*inputs, orders=CROSS_SCAN, backend="mamba_ssm").square().sum()

    eager = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for a, b in zip(compiled, eager):
        torch.testing.assert_close(a, b)


def test_deterministic_algorithms_are_not_pretended(device):
    inputs = [t.detach().to(device).requires_grad_() for t in make_inputs((3, 5), CROSS_SCAN, dtype=torch.float32)]
    y = selective_scan(*inputs, orders=CROSS_SCAN, backend="mamba_ssm")
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="no deterministic backward"):
            gradients(y, inputs)
        torch.use_deterministic_algorithms(True, warn_only=True)
        with pytest.warns(UserWarning, match="no deterministic backward"):
            gradients(y, inputs)
    finally:
        torch.use_deterministic_algorithms(False)


def test_float64_is_refused(device):
    inputs = [t.to(device) for t in make_inputs((3, 4), CROSS_SCAN)]
    with pytest.raises(ValueError, match="no float64"):
        selective_scan(*inputs, orders=CROSS_SCAN, backend="mamba_ssm")


def test_it_says_what_is_missing(monkeypatch):
    inputs = make_inputs((2, 2), CROSS_SCAN, dtype=torch.float32)
    monkeypatch.setattr(backend, "HAS_MAMBA_SSM", False)
    with pytest.raises(RuntimeError, match=r"package mamba-ssm .* pip install .*vim2\[mamba\]"):
        selective_scan(*inputs, orders=CROSS_SCAN, backend="mamba_ssm")
    monkeypatch.setattr(backend, "HAS_MAMBA_SSM", True)
    with pytest.raises(RuntimeError, match="needs tensors on a GPU"):
        selective_scan(*inputs, orders=CROSS_SCAN, backend="mamba_ssm")


def test_it_is_chosen_only_when_asked_for_and_only_for_the_scan(monkeypatch):
    monkeypatch.setattr(backend, "HAS_MAMBA_SSM", True)
    x = torch.randn(2, 3, 8)
    assert backend.resolve_backend("auto", x, scan=True) != "mamba_ssm"
    monkeypatch.setattr(backend, "DEFAULT_BACKEND", "mamba_ssm")
    assert backend.resolve_backend(None, x) == backend.resolve_backend("auto", x)
    assert torch.equal(norm_gate(x, x), norm_gate(x, x, backend="auto"))
    if torch.cuda.is_available():
        assert backend.resolve_backend(None, x.cuda(), scan=True) == "mamba_ssm"
