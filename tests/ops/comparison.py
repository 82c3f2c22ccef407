"""How outputs and gradients are compared with an oracle in float64."""

import torch


def gradients(output, inputs, dtype=None, seed=1):
    """For random gradients of the output, rounded to dtype, by default the output's."""
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(dtype or output.dtype)
    return torch.autograd.grad(output, inputs, grad.to(output))


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def assert_matches_oracle(function, oracle, names, inputs, backend, half, full):
    """`half` bounds the error of what has the first input's dtype, `full` that of the parameters' gradients."""
    y, expected = function(*inputs, backend=backend), oracle(*inputs)
    assert y.dtype == inputs[0].dtype and y.shape == expected.shape and y.is_contiguous()
    assert relative_error(y, expected) < half
    for name, a, e in zip(names, gradients(y, inputs), gradients(expected, inputs, dtype=y.dtype)):
        assert a.isfinite().all(), name
        assert relative_error(a, e) < (half if name == "x" else full), name
