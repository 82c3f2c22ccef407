"""The Triton scan against the float64 oracle: on the GPU where there is one, else in Triton's interpreter."""

import pytest
import torch
from scan_cases import CASES, NAMES, assert_matches_oracle, gradients, make_inputs, oracle, relative_error

from vim2.ops import BIDIRECTIONAL, CROSS_SCAN, FORWARD, selective_scan, selective_scan_fn

pytest.importorskip("triton")
from vim2.ops import triton_scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=[False, True], ids=["whole", "split"])
def split(request, monkeypatch):
    """Whether sequences are split into chunks that run side by side, as they are where little else fills the GPU."""
    monkeypatch.setattr(triton_scan, "_programs_to_fill", lambda device: 10**9 if request.param else 0)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that torch.empty hands out is poisoned with NaN: what a kernel fails to write shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_recurrence(case, split):
    assert_matches_oracle(case, "triton", DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    assert_matches_oracle(((3, 23), CROSS_SCAN, 3, 5, 2, False), "triton", DEVICE, dtype)


@pytest.mark.parametrize("step", [1e-8, 1e-3, 1.0, 1e3])
def test_extreme_steps(step):
    inputs = make_inputs((2, 34), BIDIRECTIONAL, dtype=torch.float32)
    inputs[1] = torch.full_like(inputs[1], step).requires_grad_()
    inputs[6] = torch.zeros_like(inputs[6]).requires_grad_()
    inputs = [t.detach().to(DEVICE).requires_grad_() for t in inputs]
    y = selective_scan(*inputs, delta_softplus=False, orders=BIDIRECTIONAL, backend="triton")
    assert relative_error(y.cpu(), oracle([t.cpu() for t in inputs], BIDIRECTIONAL, softplus=False)) < 1e-5
    for name, gradient in zip(NAMES, gradients(y, inputs)):
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("x", [-1e4, -18.0, -4.0, 19.9, 1e4])
def test_softplus_over_its_whole_range(x):
    inputs = make_inputs((1, 5), FORWARD, dtype=torch.float32)
    inputs[1] = torch.full_like(inputs[1], x).requires_grad_()
    inputs[6] = torch.zeros_like(inputs[6]).requires_grad_()
    inputs = [t.detach().to(DEVICE).requires_grad_() for t in inputs]
    y = selective_scan(*inputs, orders=FORWARD, backend="triton")
    inputs_cpu = [t.detach().cpu().requires_grad_() for t in inputs]
    expected = oracle(inputs_cpu, FORWARD)
    assert relative_error(y.cpu(), expected) < 2e-6
    delta_gradient = torch.autograd.grad(y.sum(), inputs[1])[0].cpu()
    expected_gradient = torch.autograd.grad(expected.sum(), inputs_cpu[1])[0]
    torch.testing.assert_close(delta_gradient.double(), expected_gradient.double(), rtol=1e-4, atol=1e-12)


def test_low_rank_steps_agree_with_full_ones():
    inputs = make_inputs((3, 5), CROSS_SCAN, features=6, dtype=torch.float32)
    generator = torch.Generator().manual_seed(2)
    factor = torch.randn(2, 3, 5, 4, 2, generator=generator)
    weight = torch.randn(4, 6, 2, generator=generator)
    factor, weight, *inputs = (t.detach().to(DEVICE).requires_grad_() for t in (factor, weight, *inputs))
    u, _, *others = inputs
    low = selective_scan(u, factor, *others, orders=CROSS_SCAN, delta_weight=weight, backend="triton")
    delta = torch.einsum("bhwkr,ker->bhwke", factor, weight)
    full = selective_scan(u, delta, *others, orders=CROSS_SCAN, backend="torch")
    variables = [u, *others, factor, weight]
    for a, e in zip([low, *gradients(low, variables)], [full, *gradients(full, variables)]):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_mamba_signature_with_last_state(split):
    generator = torch.Generator().manual_seed(0)
    shapes = dict(u=(2, 6, 70), delta=(2, 6, 70), A=(6, 3), B=(2, 2, 3, 70), C=(2, 3, 70), D=(6,), z=(2, 6, 70))
    arguments = {k: torch.randn(shape, generator=generator).to(DEVICE) for k, shape in shapes.items()}
    arguments["A"] = -arguments["A"].abs()
    inputs = [t.requires_grad_() for t in arguments.values()]
    results = [
        selective_scan_fn(**arguments, delta_softplus=True, return_last_state=True, backend=backend)
        for backend in ("triton", "torch")
    ]
    grads = [torch.autograd.grad([t.square().sum() for t in result], inputs) for result in results]
    for a, e in zip([*results[0], *grads[0]], [*results[1], *grads[1]]):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter runs one program after the other")
def test_two_runs_give_the_same_bits(split):
    inputs = [t.to(DEVICE).detach().requires_grad_() for t in make_inputs((3, 43), CROSS_SCAN, 20, dtype=torch.float32)]
    runs = []
    for _ in range(2):
        y = selective_scan(*inputs, orders=CROSS_SCAN, backend="triton")
        runs.append([y, *gradients(y, inputs)])
    for a, b in zip(*runs):
        assert torch.equal(a, b)


def test_without_gradients_the_result_is_the_same():
    inputs = [t.to(DEVICE) for t in make_inputs((3, 43), CROSS_SCAN, dtype=torch.float32)]
    with_gradients = selective_scan(*inputs, orders=CROSS_SCAN, backend="triton")
    with torch.no_grad():
        assert torch.equal(selective_scan(*inputs, orders=CROSS_SCAN, backend="triton"), with_gradients)


def test_operator_is_registered_correctly():
    u, delta, A, B, C, D, bias = (
        t.detach().to(DEVICE) for t in make_inputs((2, 3), BIDIRECTIONAL, dtype=torch.float32)
    )
    flat = [u.flatten(1, 2), delta.flatten(1, 2), A, B.flatten(1, 2), C.flatten(1, 2), D, bias, A.new_zeros(0)]
    options = (True, [0, 2], 2, 3, True, True, triton_scan.CHUNK, "triton")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.vim2.selective_scan, (*(t.requires_grad_() for t in flat), *options), test_utils=tests
    )


def test_too_many_different_directions():
    inputs = make_inputs((2, 2), CROSS_SCAN * 5, dtype=torch.float32)
    with pytest.raises(ValueError, match="at most 15"):
        selective_scan(*(t.to(DEVICE) for t in inputs), orders=CROSS_SCAN * 5, backend="triton")


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend must be one of auto, triton, numba, torch, got 'cuda'"):
        selective_scan(*make_inputs((2, 2), FORWARD), backend="cuda")
