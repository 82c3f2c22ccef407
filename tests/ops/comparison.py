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


def assert_compiles(function, inputs):
    """torch.compile finds one graph, whose gradients are those of eager mode."""

    def loss(*inputs):
        return function(*inputs).square().sum()

    eager = torch.autograd.grad(loss(*inputs), inputs)
    torch._dynamo.reset()  # the compiler has a limit to how often it compiles this function anew
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b)


def assert_all_finite(output, inputs):
    """The output and every gradient: with the fixture `poison`, also that each element of them is written."""
    for t in (output, *gradients(output, inputs)):
        assert t.isfinite().all()


def assert_same_bits(function, inputs):
    """Two runs give the same output and gradients."""
    runs = []
    for _ in range(2):
        output = function(*inputs)
        runs.append((output, *gradients(output, inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))
