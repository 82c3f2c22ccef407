"""What a scan reads, as it travels from the public functions to the kernels."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Operands(NamedTuple):
    """The tensors of a scan, maps flattened to L = height * width.

    Attributes:
        u: Input, (batch, L, E), or (batch, L, K, E) where every direction has one of its own.
        delta: Step sizes before bias and softplus, (batch, L, K, E), or their low-rank factor, (batch, L, K, R).
        A: Decay rates, (K, E, N).
        B: Input weights, (batch, L, K, N).
        C: Output weights, (batch, L, K, N).
        D: Skip weights, (K, E).
        delta_bias: (K, E).
        delta_weight: (K, E, R) where delta is a low-rank factor, else empty.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    delta_bias: Tensor
    delta_weight: Tensor

    def fit(self, directions: int, height: int, width: int) -> bool:
        """Whether the tensors fit together, and a walk over height x width positions in so many directions."""
        if self.delta.dim() != 4 or self.A.dim() != 3 or min(height, width, *self.delta.shape, *self.A.shape) < 1:
            return False
        batch, length = self.delta.shape[:2]
        _, features, n = self.A.shape
        full = (batch, length, directions, features)
        delta_fits = self.delta.shape == full
        if self.is_low_rank:
            delta_fits = self.delta_weight.shape == (directions, features, self.delta.shape[-1])
        return (
            height * width == length
            and delta_fits
            and self.delta.shape[2] == self.A.shape[0] == directions
            and self.u.shape in ((batch, length, features), full)
            and self.B.shape == self.C.shape == (batch, length, directions, n)
            and self.D.shape == self.delta_bias.shape == (directions, features)
        )

    @property
    def is_low_rank(self) -> bool:
        """Whether delta is a factor of the step sizes."""
        return self.delta_weight.numel() > 0

    @property
    def is_rank_1(self) -> bool:
        """Whether that factor is one number a step and direction."""
        return self.is_low_rank and self.delta.shape[-1] == 1

    def with_full_delta(self) -> tuple[Tensor, ...]:
        """All but delta_weight, with delta in full, in its own dtype: what the scan's plain forms take."""
        delta = self.delta
        if self.is_low_rank:
            weight = self.delta_weight.to(delta.dtype)
            rank_1 = weight.shape[-1] == 1
            delta = delta * weight.squeeze(-1) if rank_1 else torch.einsum("blkr,ker->blke", delta, weight)
        return self._replace(delta=delta)[:-1]


class Call(NamedTuple):
    """A call of the operator `torch.ops.vim2.selective_scan`: its first eight arguments are the operands.

    Attributes:
        operands: The tensors.
        delta_softplus: Whether softplus is applied to delta + delta_bias.
        orders: The directions, by their index in ORDERS.
        height, width: Of the map that is walked over.
        merge: Whether directions are summed.
        with_last: Whether the last states are wanted.
        chunk: Steps from one state that is kept to the next.
        backend: Which form runs.
    """

    operands: Operands
    delta_softplus: bool
    orders: Sequence[int]
    height: int
    width: int
    merge: bool
    with_last: bool
    chunk: int
    backend: str

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> "Call":
        """The call of the operator with these arguments."""
        return cls(Operands(*arguments[:8]), *arguments[8:])
