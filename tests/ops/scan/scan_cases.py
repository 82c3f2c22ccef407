"""Inputs for the scan and its oracle, shared by the tests of its forms."""

import torch
from comparison import gradients, relative_error

from vim2.ops import BIDIRECTIONAL, CROSS_SCAN, FORWARD, selective_scan, selective_scan_fn
from vim2.ops.scan.reference import selective_scan_recurrence

NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")


def make_inputs(spatial, orders, features=3, n=5, batch=2, separate=False, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    k = len(orders)
    tensors = (
        randn(batch, *spatial, *((k,) if separate else ()), features),
        randn(batch, *spatial, k, features),
        -torch.rand(k, features, n, generator=generator, dtype=torch.float64) * n - 0.1,
        randn(batch, *spatial, k, n),
        randn(batch, *spatial, k, n),
        randn(k, features),
        randn(k, features),
    )
    return [t.to(dtype).requires_grad_() for t in tensors]


def oracle(inputs, orders, softplus=True):
    """selective_scan by the recurrence, in float64."""
    u, delta, A, B, C, D, bias = (t.double() for t in inputs)
    spatial = delta.shape[1:-2]
    height, width = spatial if len(spatial) == 2 else (1, spatial[0])
    u, delta, B, C = (t.flatten(1, len(spatial)) for t in (u, delta, B, C))
    y, _ = selective_scan_recurrence(u, delta, A, B, C, D, bias, softplus, orders, height, width)
    return y.sum(2).unflatten(1, spatial)


# spatial, orders, features, d_state, batch, whether directions have inputs of their own
CASES = (
    ((1, 1), CROSS_SCAN, 3, 1, 2, False),
    ((3, 7), CROSS_SCAN, 20, 4, 3, True),
    ((7, 13), CROSS_SCAN, 5, 16, 1, False),
    ((67, 1), CROSS_SCAN, 2, 2, 1, False),
    ((1, 6), BIDIRECTIONAL, 16, 16, 5, True),
    ((131,), FORWARD, 9, 5, 1, False),
    ((4, 4), ("columns", "columns"), 40, 64, 1, False),
)
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def assert_matches_oracle(case, backend, device="cpu", dtype=torch.float32, bounds=None):
    """Output and every gradient of a backend that computes in float32, against the oracle on the same inputs."""
    bound = (bounds or BOUNDS)[dtype]
    spatial, orders, *sizes = case
    inputs = make_inputs(spatial, orders, *sizes, dtype=dtype)
    for i in (2, 5, 6):  # A, D and delta_bias are float32 whatever the activations are
        inputs[i] = inputs[i].float()
    inputs = [t.detach().to(device).requires_grad_() for t in inputs]
    actual = selective_scan(*inputs, orders=orders, backend=backend)
    exact = [t.detach().cpu().requires_grad_() for t in inputs]
    expected = oracle(exact, orders)
    assert actual.dtype == dtype
    assert relative_error(actual.cpu(), expected) < bound
    for name, a, e in zip(NAMES, gradients(actual, inputs), gradients(expected, exact)):
        assert a.isfinite().all(), name
        assert relative_error(a.cpu(), e) < bound, name


EXTREME_STEPS = (1e-8, 1e-3, 1.0, 1e3)


def assert_finite_at_step(step, backend, device="cpu"):
    """Right outputs and finite gradients where every step size is `step`."""
    inputs = make_inputs((2, 34), BIDIRECTIONAL, dtype=torch.float32)
    inputs[1] = torch.full_like(inputs[1], step)
    inputs[6] = torch.zeros_like(inputs[6])
    inputs = [t.detach().to(device).requires_grad_() for t in inputs]
    y = selective_scan(*inputs, delta_softplus=False, orders=BIDIRECTIONAL, backend=backend)
    assert relative_error(y.cpu(), oracle([t.cpu() for t in inputs], BIDIRECTIONAL, softplus=False)) < 1e-5
    for name, gradient in zip(NAMES, gradients(y, inputs)):
        assert gradient.isfinite().all(), name


SOFTPLUS_ARGUMENTS = (-1e4, -18.0, -4.0, -3.51, 0.0, 19.9, 1e4)


def assert_softplus_is_right(x, backend, device="cpu"):
    """The softplus within the scan, and its derivative, at x."""
    inputs = make_inputs((1, 5), FORWARD, dtype=torch.float32)
    inputs[1] = torch.full_like(inputs[1], x)
    inputs[6] = torch.zeros_like(inputs[6])
    inputs = [t.detach().to(device).requires_grad_() for t in inputs]
    exact = [t.detach().cpu().requires_grad_() for t in inputs]
    y, expected = selective_scan(*inputs, orders=FORWARD, backend=backend), oracle(exact, FORWARD)
    assert relative_error(y.cpu(), expected) < 2e-6
    (gradient,) = torch.autograd.grad(y.sum(), inputs[1])
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact[1])
    torch.testing.assert_close(gradient.cpu(), expected_gradient, rtol=1e-4, atol=1e-12)


def assert_last_state_matches_torch(backend, device="cpu"):
    """selective_scan_fn with all its arguments, and the gradients through y and the last state."""
    generator = torch.Generator().manual_seed(0)
    shapes = dict(u=(2, 6, 70), delta=(2, 6, 70), A=(6, 3), B=(2, 2, 3, 70), C=(2, 3, 70), D=(6,), z=(2, 6, 70))
    arguments = {k: torch.randn(shape, generator=generator).to(device) for k, shape in shapes.items()}
    arguments["A"] = -arguments["A"].abs()
    inputs = [t.requires_grad_() for t in arguments.values()]
    results = [
        selective_scan_fn(**arguments, delta_softplus=True, return_last_state=True, backend=name)
        for name in (backend, "torch")
    ]
    grads = [torch.autograd.grad([t.square().sum() for t in result], inputs) for result in results]
    for a, e in zip([*results[0], *grads[0]], [*results[1], *grads[1]]):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
