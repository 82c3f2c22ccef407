import pytest
import torch

from vim2.ops import weighted_average


def make(n, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64).to(dtype) for _ in range(n)]
    weight = torch.randn(n, generator=generator, dtype=torch.float64)
    return [f.requires_grad_() for f in features], weight.requires_grad_()


@pytest.mark.parametrize("n", [1, 2, 7])
def test_is_the_weighted_sum(n):
    features, weight = make(n)
    expected = torch.einsum("n,nbhwc->bhwc", weight, torch.stack(features))
    actual = weighted_average(features, weight)
    torch.testing.assert_close(actual, expected)
    inputs = [*features, weight]
    for a, e in zip(
        torch.autograd.grad(actual.square().sum(), inputs), torch.autograd.grad(expected.square().sum(), inputs)
    ):
        torch.testing.assert_close(a, e)


def test_half_precision_features_are_summed_in_the_weights_dtype():
    """Under autocast mixers put out bfloat16 while weights are float32: the stream must not round at every sum."""
    features, weight = make(5, torch.bfloat16)
    total = weighted_average(features, weight.float())
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, sum(f.float() * w for f, w in zip(features, weight.float())))
    assert weighted_average(features, weight.bfloat16()).dtype == torch.bfloat16


def test_as_many_weights_as_features():
    features, weight = make(3)
    with pytest.raises(ValueError, match="2 features do not fit 3 weights"):
        weighted_average(features[:2], weight)
