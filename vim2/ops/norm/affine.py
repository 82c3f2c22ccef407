"""What the operators with a LayerNorm share of its weight and bias: the check, fakes, and the gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_norm(weight: Tensor | None, bias: Tensor | None, width: int) -> None:
    """Raise a ValueError unless both are (width,), or both are None."""
    for name, t in (("norm_weight", weight), ("norm_bias", bias)):
        if (weight is None) != (bias is None) or (t is not None and t.shape != (width,)):
            shape = None if t is None else tuple(t.shape)
            raise ValueError(f"norm_weight and norm_bias must both be {(width,)} or both None; {name} is {shape}.")


def is_affine(weight: Tensor | None, bias: Tensor | None, width: int) -> bool:
    """Whether both are (width,), or both are None."""
    if weight is None or bias is None:
        return weight is bias
    return weight.shape == bias.shape == (width,)


def has_statistics(statistics: Tensor, weight: Tensor | None, rows: Sequence[int]) -> bool:
    """Whether the statistics are (2, *rows), or (0,) without a norm."""
    return statistics.shape == ((0,) if weight is None else (2, *rows))


def fake_statistics(x: Tensor, kept: bool) -> Tensor:
    """A fake of the mean and reciprocal deviation of every row of x, (2, ...), or (0,) where they are not kept."""
    return x.new_empty((2, *x.shape[:-1]) if kept else (0,), dtype=torch.float32)


def fake_norm_gradient(statistics: Tensor, norm_weight: Tensor | None) -> Tensor:
    """A fake of the gradients of a norm's weight and bias together, (2, width), or (2, 0) without a norm."""
    return statistics.new_empty(2, 0 if norm_weight is None else norm_weight.shape[0])


def split_norm_gradient(grad: Tensor | Sequence[Tensor], dtypes: Sequence[torch.dtype | None]) -> list[Tensor | None]:
    """These gradients, each in its parameter's dtype, None where there is no norm."""
    return [None if dtype is None else g.to(dtype) for g, dtype in zip(grad, dtypes)]


def norm_dtypes(*norm: Tensor | None) -> list[torch.dtype | None]:
    """The dtypes of a norm's weight and bias, None where there is no norm.

    They are kept for the backward pass in place of the bias, which it does not read: so that may be changed before it.
    """
    return [None if t is None else t.dtype for t in norm]
