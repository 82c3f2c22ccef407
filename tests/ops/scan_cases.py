"""Inputs for the scan and its oracle, shared by the tests of its two forms."""

import torch

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
