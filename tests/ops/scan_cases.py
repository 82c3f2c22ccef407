"""Inputs for the scan and its oracle, shared by the tests of its forms."""

import torch

from vim2.ops import BIDIRECTIONAL, CROSS_SCAN, FORWARD, selective_scan
from vim2.ops.reference import selective_scan_recurrence

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


def gradients(output, inputs, seed=1):
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    return torch.autograd.grad(output, inputs, grad)


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


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


def assert_matches_oracle(case, backend, device="cpu", dtype=torch.float32):
    """Output and every gradient of a backend that computes in float32, against the oracle on the same inputs."""
    spatial, orders, *sizes = case
    inputs = make_inputs(spatial, orders, *sizes, dtype=dtype)
    for i in (2, 5, 6):  # A, D and delta_bias are float32 whatever the activations are
        inputs[i] = inputs[i].float()
    inputs = [t.detach().to(device).requires_grad_() for t in inputs]
    actual = selective_scan(*inputs, orders=orders, backend=backend)
    exact = [t.detach().cpu().requires_grad_() for t in inputs]
    expected = oracle(exact, orders)
    assert actual.dtype == dtype
    assert relative_error(actual.cpu(), expected) < BOUNDS[dtype]
    for name, a, e in zip(NAMES, gradients(actual, inputs), gradients(expected, exact)):
        assert a.isfinite().all(), name
        assert relative_error(a.cpu(), e) < BOUNDS[dtype], name
