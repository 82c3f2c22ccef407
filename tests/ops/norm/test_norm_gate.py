import pytest
import torch
from comparison import assert_all_finite, assert_compiles, assert_same_bits, gradients, relative_error
from devices import DEVICE, both_backends, needs_triton

from vim2.ops import norm_gate


def make(width, norm=True, rows=(2, 3, 5), dtype=torch.float32, parameter_dtype=torch.float32, directions=None):
    """y, the projection whose second half is the gate, and the norm's weight and bias. With directions, (G, K), y is
    of K directions and G groups of channels."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape, dtype):
        t = torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.3
        return t.to(DEVICE, dtype).requires_grad_()

    parameters = [randn(width, dtype=parameter_dtype) for _ in range(2)] if norm else []
    of_y = (*directions, width // directions[0]) if directions else (width,)
    return [randn(*rows, *of_y, dtype=dtype), randn(*rows, 2 * width, dtype=dtype), *parameters]


def run(inputs, backend, **kwargs):
    y, projection, *norm = inputs
    return norm_gate(y, projection.chunk(2, dim=-1)[1], *norm, backend=backend, **kwargs)


def expected(inputs, eps=1e-5):
    """The definition, in float64, and copies of the inputs to differentiate by."""
    y, projection, *norm = copies = [t.detach().double().requires_grad_() for t in inputs]
    gate = projection.chunk(2, dim=-1)[1]
    if y.dim() > gate.dim():
        y = y.sum(-2).flatten(-2)
    if norm:
        centred = y - y.mean(-1, keepdim=True)
        y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * norm[0] + norm[1]
    return y * gate / (1 + torch.exp(-gate)), copies


def assert_close_to_definition(inputs, backend, bound, **kwargs):
    actual = run(inputs, backend, **kwargs)
    wanted, copies = expected(inputs, **kwargs)
    assert relative_error(actual, wanted) < bound
    for a, e, t in zip(
        gradients(actual, inputs, torch.bfloat16), gradients(wanted, copies, torch.bfloat16), inputs, strict=True
    ):
        assert a.dtype == t.dtype and a.shape == t.shape
        assert relative_error(a, e) < bound


@both_backends
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("width", [5, 24, 33, 192, 300])
def test_is_the_gated_norm(width, norm, backend):
    assert_close_to_definition(make(width, norm), backend, 1e-6)


@both_backends
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("width, directions", [(48, (1, 4)), (48, (3, 2)), (15, (5, 2)), (7, (1, 1))])
def test_sums_over_directions(width, directions, norm, backend):
    inputs = make(width, norm, directions=directions)
    assert_close_to_definition(inputs, backend, 1e-6)
    with torch.no_grad():  # which keeps no sum
        assert torch.equal(run(inputs, backend), run([t.detach() for t in inputs], backend))
        assert relative_error(run(inputs, backend), expected(inputs)[0]) < 1e-6


@needs_triton
def test_sums_over_directions_are_rounded_once():
    inputs = make(48, dtype=torch.bfloat16, directions=(1, 4))
    bound = 2**-8 if DEVICE == "cuda" else 2**-7  # Triton's interpreter truncates
    assert relative_error(run(inputs, "triton"), expected(inputs)[0]) < bound
    for a, e in zip(
        gradients(run(inputs, "triton"), inputs), gradients(*expected(inputs), torch.bfloat16), strict=True
    ):
        assert relative_error(a, e) < 2 * bound  # the backward pass has a sum that was rounded, too


def test_float64_is_exact():
    assert_close_to_definition(make(33, dtype=torch.float64, parameter_dtype=torch.float64), "torch", 1e-14)


@both_backends
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str)
def test_half_precision_rounds_once(dtype, bound, norm, backend):
    for parameter_dtype in (dtype, torch.float32):
        inputs = make(48, norm, dtype=dtype, parameter_dtype=parameter_dtype)
        assert run(inputs, backend).dtype == dtype
        truncated = dtype == torch.bfloat16 and backend == "triton" and DEVICE == "cpu"  # by Triton's interpreter
        assert_close_to_definition(inputs, backend, 2 * bound if truncated else bound)


@needs_triton
@pytest.mark.parametrize("rows, width", [((1,), 1536), ((), 24), ((67,), 130), ((301,), 40)], ids=str)
def test_more_rows_than_programs_hold_at_once(rows, width, monkeypatch):
    from vim2.ops.norm.triton import norm_gate as kernels
    from vim2.ops.norm.triton import tiles

    monkeypatch.setattr(tiles, "FORWARD_PROGRAMS", 2)
    monkeypatch.setattr(kernels, "BACKWARD_PROGRAMS", 2)
    monkeypatch.setattr(tiles, "_multiprocessors", lambda device: 1)
    for norm in (True, False):
        assert_close_to_definition(make(width, norm, rows), "triton", 1e-6)


@both_backends
def test_gate_of_any_strides(backend):
    y, gate = make(24)[0], make(24)[1][..., :24].detach()
    contiguous = norm_gate(y, gate.contiguous(), backend=backend)
    for strided in (gate.transpose(0, 2).contiguous().transpose(0, 2), gate.mT.contiguous().mT):
        torch.testing.assert_close(norm_gate(y, strided, backend=backend), contiguous)
    parameters = torch.randn(24, 2, device=DEVICE).unbind(1)  # every second number
    torch.testing.assert_close(
        norm_gate(y, gate, *parameters, backend=backend),
        norm_gate(y, gate, *(t.contiguous() for t in parameters), backend=backend),
    )
    shared = gate[:1, :1, :1].expand(y.shape)
    torch.testing.assert_close(norm_gate(y, shared, backend=backend), norm_gate(y, shared.clone(), backend=backend))


@both_backends
def test_eps(backend):
    assert_close_to_definition(make(24), backend, 1e-6, eps=0.5)


@both_backends
def test_mixed_dtypes(backend):
    y, projection, *norm = make(24)
    y = y.detach().bfloat16().requires_grad_()
    inputs = [y, projection, *norm]
    assert run(inputs, backend).dtype == torch.float32
    assert relative_error(run(inputs, backend), expected(inputs)[0]) < 1e-6
    for a, t in zip(gradients(run(inputs, backend), inputs), inputs, strict=True):
        assert a.dtype == t.dtype


@both_backends
@pytest.mark.parametrize("norm", [True, False])
def test_under_autocast_the_result_is_ready_for_a_linear(norm, backend):
    inputs = make(24, norm, dtype=torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        output = run(inputs, backend)
    assert output.dtype == torch.bfloat16 and output.is_contiguous()
    inputs[0] = inputs[0].detach().float().requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        output = run(inputs, backend)
    assert output.dtype == torch.bfloat16
    assert relative_error(output, expected(inputs)[0]) < 2**-7
    assert gradients(output, inputs)[0].dtype == torch.float32


@both_backends
def test_extreme_values(backend):
    y, projection, *norm = make(24)
    with torch.no_grad():
        y[0, 0] = 3.0  # constant rows
        y[0, 1] = 0.0
        y[0, 2] *= 1e18
        y[1, 0] += 1e4
        projection[0, :, 0] *= 1e4  # saturated gates
        projection[0, :, 1] = -1e30
        projection[1, :, 1] = 0.0
    inputs = [y, projection, *norm]
    output = run(inputs, backend)
    wanted, _ = expected(inputs)
    assert output.isfinite().all()
    torch.testing.assert_close(output.double(), wanted, rtol=1e-3, atol=1e-3)  # y + 1e4 has lost its digits
    for a, t in zip(gradients(output, inputs), inputs, strict=True):
        assert a.isfinite().all() and a.shape == t.shape


@needs_triton
@pytest.mark.parametrize("norm", [True, False])
def test_every_output_is_written(norm, poison):
    inputs = make(33, norm, rows=(7,), directions=(3, 2))
    assert_all_finite(run(inputs, "triton"), inputs)


@needs_triton
def test_two_runs_give_the_same_bits():
    assert_same_bits(lambda *inputs: run(inputs, "triton"), make(130, rows=(50,)))


@both_backends
def test_no_rows(backend):
    inputs = make(24, rows=(0, 3))
    output = run(inputs, backend)
    assert output.shape == (0, 3, 24)
    grads = torch.autograd.grad(output.sum(), inputs)
    assert (grads[2] == 0).all() and (grads[3] == 0).all()


@needs_triton
@pytest.mark.parametrize("directions", [None, (3, 2)])
@pytest.mark.parametrize("norm", [True, False])
def test_operator_is_registered_correctly(norm, directions):
    y, projection, *parameters = make(12, norm, rows=(2, 3), directions=directions)
    gate = projection.detach().chunk(2, dim=-1)[1].requires_grad_()
    parameters = parameters or [None, None]
    torch.library.opcheck(torch.ops.vim2.norm_gate, (y, gate, *parameters, 1e-5, torch.float32, True))


@pytest.mark.parametrize("directions", [None, (3, 2)])
@both_backends
def test_compiles_without_graph_breaks(backend, directions):
    inputs = make(12, rows=(2, 3), directions=directions)

    assert_compiles(lambda *inputs: run(inputs, backend), inputs)


BAD_INPUTS = {
    "gate": (
        dict(gate=torch.zeros(2, 5)),
        r"must both be \(..., E\), or y \(..., G, K, P\) with E = G P, got \(2, 4\) and \(2, 5\)",
    ),
    "directions": (dict(y=torch.zeros(2, 2, 3, 4)), r"with E = G P, got \(2, 2, 3, 4\) and \(2, 4\)"),
    "scalar": (dict(y=torch.zeros(()), gate=torch.zeros(())), r"must both be \(..., E\)"),
    "weight": (dict(norm_weight=torch.ones(5)), r"both be \(4,\) or both None; norm_weight is \(5,\)"),
    "bias": (dict(norm_bias=torch.ones(4, 1)), r"norm_bias is \(4, 1\)"),
    "no bias": (dict(norm_bias=None), "both None"),
    "no weight": (dict(norm_weight=None), "norm_weight is None"),
    "backend": (dict(backend="cuda"), "backend must be one of"),
}


@pytest.mark.parametrize("change, message", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input(change, message):
    arguments = dict(y=torch.zeros(2, 4), gate=torch.zeros(2, 4), norm_weight=torch.ones(4), norm_bias=torch.ones(4))
    with pytest.raises(ValueError, match=message):
        norm_gate(**{**arguments, **change})
