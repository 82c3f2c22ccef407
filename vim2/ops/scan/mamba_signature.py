"""The selective scan with the signature and layout of mamba-ssm's."""

import math
from typing import Literal, overload

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
    if u.dim() != 3 or u.shape != delta.shape:
        raise ValueError(f"u and delta must both be (batch, D, L), got {tuple(u.shape)} and {tuple(delta.shape)}.")
    if A.is_complex():
        raise ValueError("A is complex: only real A is supported; split the states into real pairs.")
    check_tensors(u, delta, A, B, C)
    batch, channels, length = u.shape
    if A.dim() != 2 or A.shape[0] != channels:
        raise ValueError(f"A must be (D, N) with D = {channels} as in u, got {tuple(A.shape)}.")
    if A.shape[1] < 1:
        raise ValueError("A must hold a state or more for each channel, got none.")
    n = A.shape[1]
    # A direction of the operator holds the channels that share B and C; a constant B or C is one for every channel.
    # What is repeated is so in the arithmetic's dtype: the gradients of its copies are added, and rounded only then.
    wide = compute_dtype(u, delta, A, B, C)
    B, C = (
        t.to(wide).expand(batch, length, -1, -1).permute(0, 2, 3, 1) if t.shape == (channels, n) else t for t in (B, C)
    )
    B, C = (t.unsqueeze(1) if t.dim() == 3 else t for t in (B, C))
    groups = math.lcm(*(max(t.shape[1], 1) for t in (B, C) if t.dim() == 4))
    for name, t in (("B", B), ("C", C)):
        if t.dim() != 4 or t.shape[1] < 1 or (t.shape[0], *t.shape[2:]) != (batch, n, length):
            raise ValueError(
                f"{name} must be (batch, N, L) = {(batch, n, length)}, (batch, G, N, L) or (D, N), "
                f"got {tuple(t.shape)}."
            )
    if channels % groups:
        raise ValueError(f"B and C have {groups} groups, which does not divide the {channels} channels of u.")
    D, delta_bias = (A.new_zeros(channels) if t is None else t for t in (D, delta_bias))
    if D.shape != (channels,) or delta_bias.shape != (channels,):
        raise ValueError(f"D and delta_bias must be ({channels},), got {tuple(D.shape)} and {tuple(delta_bias.shape)}.")
    if z is not None and z.shape != u.shape:
        raise ValueError(f"z must be {tuple(u.shape)} as u, got {tuple(z.shape)}.")
    if u.numel() == 0:
        raise ValueError(f"There is nothing to scan: u is {tuple(u.shape)}.")
    dtype = u.dtype
    if z is not None:
        check_tensors(u, z)
        u, z = (t.to(compute_dtype(u, z)) for t in (u, z))
    u, delta = (t.transpose(1, 2).unflatten(2, (groups, -1)) for t in (u, delta))
    A, D, delta_bias = (t.unflatten(0, (groups, -1)) for t in (A, D, delta_bias))
    B, C = (t if t.shape[1] == groups else t.to(wide) for t in (B, C))
    B, C = (t.unsqueeze(2).expand(-1, -1, groups // t.shape[1], -1, -1).flatten(1, 2) for t in (B, C))
    B, C = (t.permute(0, 3, 1, 2) for t in (B, C))
    operands = Operands(u, delta, A, B, C, D, delta_bias, A.new_empty(0))
    y, last_state, _ = scan(
        operands,
        orders=FORWARD * groups,
        spatial=(length,),
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
