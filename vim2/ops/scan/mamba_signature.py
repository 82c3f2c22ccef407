"""The selective scan with the signature and layout of mamba-ssm's."""

import math
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import check_tensors, compute_dtype
from ..operator import needs_backward
from .operands import Operands
from .operator import scan
from .orders import FORWARD


@overload
def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    delta_bias: Tensor | None = ...,
    delta_softplus: bool = ...,
    return_last_state: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    delta_bias: Tensor | None = ...,
    delta_softplus: bool = ...,
    *,
    return_last_state: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """mamba-ssm's `selective_scan_fn`, argument for argument, for those who cannot build mamba-ssm.

    Args:
        u: (batch, D, L).
        delta: (batch, D, L).
        A: (D, N), real.
        B: (batch, N, L), or (batch, G, N, L) where each of G groups of D / G channels has its own, or (D, N), constant.
        C: As B, and of its own kind.
        D: (D,).
        z: Gate, (batch, D, L): the output is multiplied by SiLU(z), and rounded only then.
        delta_bias: (D,).
        delta_softplus: Apply softplus to delta + delta_bias.
        return_last_state: Also return the state after the last step. Unlike mamba-ssm's, it is differentiable.
        backend: As for `selective_scan`.

    Returns:
        (batch, D, L) in u's dtype, and with return_last_state the last state, (batch, D, N), float32.

    Raises:
        ValueError: Shapes that do not fit together, or a complex A.
    """
    D, delta_bias = (A.new_zeros(A.shape[:1]) if t is None else t for t in (D, delta_bias))
    _check(u, delta, A, B, C, D, z, delta_bias)
    # A direction of the operator holds the channels that share B and C.
    sizes = u.shape[0], u.shape[1], A.shape[1], u.shape[2]
    wide = compute_dtype(u, delta, A, B, C)
    B, C = (_by_groups(name, t, sizes, wide) for name, t in (("B", B), ("C", C)))
    groups = math.lcm(B.shape[1], C.shape[1])
    if u.shape[1] % groups:
        raise ValueError(f"B and C have {groups} groups, which does not divide the {u.shape[1]} channels of u.")
    dtype = u.dtype
    if z is not None:
        u, z = (t.to(compute_dtype(u, z)) for t in (u, z))
    u, delta = (t.transpose(1, 2).unflatten(2, (groups, -1)) for t in (u, delta))
    A, D, delta_bias = (t.unflatten(0, (groups, -1)) for t in (A, D, delta_bias))
    B, C = (_by_directions(t, groups, wide) for t in (B, C))
    operands = Operands(u, delta, A, B, C, D, delta_bias, A.new_empty(0))
    y, last_state, _ = scan(
        operands,
        orders=FORWARD * groups,
        spatial=(u.shape[1],),
        delta_softplus=delta_softplus,
        merge=False,
        with_last=return_last_state,
        backend=backend,
        keeps=needs_backward(*operands),
    )
    y = y.flatten(2).transpose(1, 2)
    if z is not None:
        y = (y * F.silu(z)).to(dtype)
    return (y, last_state.flatten(1, 2)) if return_last_state else y


def _check(u, delta, A, B, C, D, z, delta_bias) -> None:
    """Raise a ValueError unless all but B's and C's shapes are as `selective_scan_fn` wants them."""
    if u.dim() != 3 or u.shape != delta.shape:
        raise ValueError(f"u and delta must both be (batch, D, L), got {tuple(u.shape)} and {tuple(delta.shape)}.")
    if A.is_complex():
        raise ValueError("A is complex: only real A is supported; split the states into real pairs.")
    check_tensors(u, delta, A, B, C)
    channels = u.shape[1]
    if A.dim() != 2 or A.shape[0] != channels:
        raise ValueError(f"A must be (D, N) with D = {channels} as in u, got {tuple(A.shape)}.")
    if A.shape[1] < 1:
        raise ValueError("A must hold a state or more for each channel, got none.")
    if D.shape != (channels,) or delta_bias.shape != (channels,):
        raise ValueError(f"D and delta_bias must be ({channels},), got {tuple(D.shape)} and {tuple(delta_bias.shape)}.")
    if z is not None:
        if z.shape != u.shape:
            raise ValueError(f"z must be {tuple(u.shape)} as u, got {tuple(z.shape)}.")
        check_tensors(u, z)
    if u.numel() == 0:
        raise ValueError(f"There is nothing to scan: u is {tuple(u.shape)}.")


def _by_groups(name: str, t: Tensor, sizes: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    """B or C as (batch, G, N, L). A constant one has a group for every channel, and is repeated in the dtype of the
    arithmetic: the gradients of its copies are added, and rounded only then.

    Raises:
        ValueError: It has another shape than `selective_scan_fn` takes, for sizes batch, D, N and L.
    """
    batch, channels, n, length = sizes
    if t.shape == (channels, n):
        return t.to(dtype).expand(batch, length, -1, -1).permute(0, 2, 3, 1)
    grouped = t.unsqueeze(1) if t.dim() == 3 else t
    if grouped.dim() != 4 or grouped.shape[1] < 1 or (grouped.shape[0], *grouped.shape[2:]) != (batch, n, length):
        raise ValueError(
            f"{name} must be (batch, N, L) = {(batch, n, length)}, (batch, G, N, L) or (D, N), got {tuple(t.shape)}."
        )
    return grouped


def _by_directions(t: Tensor, directions: int, dtype: torch.dtype) -> Tensor:
    """B or C (batch, G, N, L) as (batch, L, K, N), each group's repeated for the directions that share it."""
    groups = t.shape[1]
    t = t if groups == directions else t.to(dtype)
    return t.unsqueeze(2).expand(-1, -1, directions // groups, -1, -1).flatten(1, 2).permute(0, 3, 1, 2)
