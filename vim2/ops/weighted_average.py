"""Weighted averaging of earlier features (arXiv 2403.19888, section 3.3)."""

from collections.abc import Sequence

from torch import Tensor


def weighted_average(features: Sequence[Tensor], weight: Tensor) -> Tensor:
    """The sum of features, each times its own scalar: sum_i weight[i] * features[i].

    Args:
        features: n tensors of one shape.
        weight: (n,), unconstrained (the paper's name is kept although the weights need not sum to one).

    Returns:
        A tensor of the features' shape. Its dtype is that of weight and features promoted, so that under autocast
        the sum is kept in the parameters' float32.

    Raises:
        ValueError: If there are not as many features as weights.
    """
    if len(features) != weight.shape[0]:
        raise ValueError(f"{len(features)} features do not fit {weight.shape[0]} weights.")
    # reshaped to the features' rank, a weight takes part in type promotion, which a 0-d tensor would not
    scalars = weight.reshape(-1, *(1,) * features[0].dim()).unbind()
    total = features[0] * scalars[0]
    for feature, scalar in zip(features[1:], scalars[1:]):
        total = total + feature * scalar
    return total
