"""Selective scan (S6): the public functions, their argument checks, and the registered operator behind them.

The operator `torch.ops.vim2.selective_scan` is opaque to torch.compile, torch.export, autocast and activation
checkpointing, and carries its own fake, autograd and FLOP rules.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .reference import ORDERS, chunk_positions, compute_dtype, selective_scan_chunked, selective_scan_chunked_backward

FORWARD = ("forward",)
BIDIRECTIONAL = ("forward", "backward")
CROSS_SCAN = ("forward", "columns", "backward", "columns_backward")  # in VMamba's order of directions


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    orders: Sequence[str] = FORWARD,
) -> Tensor:
    """Scan a sequence or a map in several directions at once and sum the directions' outputs.

    Along each direction k (arXiv 2403.19888 section 3.1; arXiv 2312.00752 eq. 2):
    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t and y_t = C_t h_t + D u_t. Directions are ways to walk over the same
    memory: no permuted or flipped copies are made. States and decays are float32 (float64 if any input is).

    Args:
        u: Input, (batch, L, E) for a sequence or (batch, H, W, E) for a map; or, where every direction has an input of
            its own, (batch, L, K, E) or (batch, H, W, K, E). Any floating dtype.
        delta: Step sizes before bias and softplus, (batch, *spatial, K, E).
        A: Decay rates, (K, E, N), negative.
        B: Input weights, (batch, *spatial, K, N).
        C: Output weights, (batch, *spatial, K, N).
        D: Skip weights, (K, E).
        delta_bias: (K, E).
        delta_softplus: Apply softplus to delta + delta_bias.
        orders: K of "forward" (row by row), "columns" (column by column), "backward" and "columns_backward" (the same
            walks from their ends). The same order may stand more than once.

    Returns:
        (batch, *spatial, E) in u's dtype.

    Raises:
        ValueError: Shapes that do not fit together, an unknown order, an empty batch or map.
    """
    if delta.dim() not in (4, 5):
        raise ValueError(
            f"delta must be (batch, L, K, E) for a sequence or (batch, H, W, K, E) for a map, got {tuple(delta.shape)}."
        )
    spatial = delta.shape[1:-2]
    height, width = spatial if len(spatial) == 2 else (1, spatial[0])
    lanes = _check_arguments(u, delta, A, B, C, orders, spatial)
    D, delta_bias = (_optional(t, A, name) for t, name in ((D, "D"), (delta_bias, "delta_bias")))
    u, delta, B, C = (t if len(spatial) == 1 else t.flatten(1, 2) for t in (u, delta, B, C))
    y, _ = _scan(u, delta, A, B, C, D, delta_bias, delta_softplus, lanes, height, width, merge=True)
    return y.unflatten(1, spatial)


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
) -> Tensor | tuple[Tensor, Tensor]:
    """mamba-ssm's `selective_scan_fn`, argument for argument, for those who cannot build mamba-ssm.

    Args:
        u: (batch, D, L).
        delta: (batch, D, L).
        A: (D, N), real.
        B: (batch, N, L), or (batch, G, N, L) where each of G groups of D / G channels has its own, or (D, N), constant.
        C: As B.
        D: (D,).
        z: Gate, (batch, D, L): the output is multiplied by SiLU(z).
        delta_bias: (D,).
        delta_softplus: Apply softplus to delta + delta_bias.
        return_last_state: Also return the state after the last step. Unlike mamba-ssm's, it is differentiable.

    Returns:
        (batch, D, L) in u's dtype, and with return_last_state the last state, (batch, D, N), float32.

    Raises:
        ValueError: Shapes that do not fit together, or a complex A.
    """
    if u.dim() != 3 or u.shape != delta.shape:
        raise ValueError(f"u and delta must both be (batch, D, L), got {tuple(u.shape)} and {tuple(delta.shape)}.")
    if A.is_complex():
        raise ValueError("A is complex: only real A is supported; split the states into real pairs.")
    batch, channels, length = u.shape
    if A.dim() != 2 or A.shape[0] != channels:
        raise ValueError(f"A must be (D, N) with D = {channels} as in u, got {tuple(A.shape)}.")
    n = A.shape[1]
    # A direction of the operator holds the channels that share B and C; a constant B or C is one for every channel.
    B, C = (t.expand(batch, length, -1, -1).permute(0, 2, 3, 1) if t.shape == (channels, n) else t for t in (B, C))
    B, C = (t.unsqueeze(1) if t.dim() == 3 else t for t in (B, C))
    groups = max(t.shape[1] if t.dim() == 4 else 0 for t in (B, C))
    for name, t in (("B", B), ("C", C)):
        if t.dim() != 4 or t.shape[1] not in (1, groups) or (t.shape[0], *t.shape[2:]) != (batch, n, length):
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
    u, delta = (t.transpose(1, 2).unflatten(2, (groups, -1)) for t in (u, delta))
    A, D, delta_bias = (t.unflatten(0, (groups, -1)) for t in (A, D, delta_bias))
    B, C = (t.expand(-1, groups, -1, -1).permute(0, 3, 1, 2) for t in (B, C))
    orders = FORWARD * groups
    y, last_state = _scan(u, delta, A, B, C, D, delta_bias, delta_softplus, orders, 1, length, merge=False)
    y = y.flatten(2).transpose(1, 2)
    if z is not None:
        y = y * F.silu(z)
    return (y, last_state.flatten(1, 2)) if return_last_state else y


def _check_arguments(u, delta, A, B, C, orders, spatial):
    unknown = [order for order in orders if order not in ORDERS]
    if unknown or not orders:
        raise ValueError(f"orders must name one or more of {', '.join(ORDERS)}, got {tuple(orders)}.")
    batch, lanes, features = delta.shape[0], *delta.shape[-2:]
    if len(orders) != lanes:
        raise ValueError(f"delta has {lanes} directions, but orders names {len(orders)}: {tuple(orders)}.")
    if u.shape not in ((batch, *spatial, features), delta.shape):
        raise ValueError(
            f"u must be {(batch, *spatial, features)}, shared by all directions, or {tuple(delta.shape)}, "
            f"as delta is; got {tuple(u.shape)}."
        )
    if A.dim() != 3 or A.shape[:2] != (lanes, features):
        raise ValueError(f"A must be (K, E, N) with K, E = {lanes}, {features} as in delta, got {tuple(A.shape)}.")
    for name, t in (("B", B), ("C", C)):
        if t.shape != (batch, *spatial, lanes, A.shape[-1]):
            raise ValueError(f"{name} must be {(batch, *spatial, lanes, A.shape[-1])}, got {tuple(t.shape)}.")
    if delta.numel() == 0:
        raise ValueError(f"There is nothing to scan: delta is {tuple(delta.shape)}.")
    return tuple(orders)


def _optional(t, A, name):
    if t is None:
        return A.new_zeros(A.shape[:2])
    if t.shape != A.shape[:2]:
        raise ValueError(f"{name} must be (K, E) = {tuple(A.shape[:2])}, got {tuple(t.shape)}.")
    return t


def _scan(u, delta, A, B, C, D, delta_bias, delta_softplus, orders, height, width, merge):
    order_ids = [ORDERS.index(order) for order in orders]
    y, last_state, _ = torch.ops.vim2.selective_scan(
        u, delta, A, B, C, D, delta_bias, delta_softplus, order_ids, height, width, merge
    )
    return y, last_state


@torch.library.custom_op("vim2::selective_scan", mutates_args=())
def _selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    delta_softplus: bool,
    orders: Sequence[int],
    height: int,
    width: int,
    merge: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Maps flattened to L = height * width. Returns y, summed over directions with `merge`, the last states, and the
    states from which the backward pass recomputes the others."""
    names = [ORDERS[i] for i in orders]
    y, last, starts = selective_scan_chunked(u, delta, A, B, C, D, delta_bias, delta_softplus, names, height, width)
    return (y.sum(2) if merge else y).to(u.dtype), last, starts


@_selective_scan.register_fake
def _(u, delta, A, B, C, D, delta_bias, delta_softplus, orders, height, width, merge):
    batch, length, lanes, features = delta.shape
    dtype = compute_dtype(u, delta, A, B, C)
    chunks = chunk_positions(["forward"], height, width, device="meta")[0].shape[1]
    n = A.shape[-1]
    return (
        u.new_empty((batch, length, features) if merge else delta.shape),
        u.new_empty((batch, lanes, features, n), dtype=dtype),
        u.new_empty((batch, lanes, chunks, n, features), dtype=dtype),
    )


@torch.library.custom_op("vim2::selective_scan_backward", mutates_args=())
def _selective_scan_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    starts: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    delta_softplus: bool,
    orders: Sequence[int],
    height: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for u, delta, A, B, C, D and delta_bias."""
    names = [ORDERS[i] for i in orders]
    return selective_scan_chunked_backward(
        grad_y, grad_last, starts, u, delta, A, B, C, D, delta_bias, delta_softplus, names, height, width
    )


@_selective_scan_backward.register_fake
def _(grad_y, grad_last, starts, u, delta, A, B, C, D, delta_bias, *_):
    return tuple(t.new_empty(t.shape) for t in (u, delta, A, B, C, D, delta_bias))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, ctx.orders, ctx.height, ctx.width, _ = inputs
    ctx.save_for_backward(output[2], *tensors)


def _backward(ctx, grad_y, grad_last, _):
    grads = torch.ops.vim2.selective_scan_backward(
        grad_y, grad_last, *ctx.saved_tensors, ctx.delta_softplus, ctx.orders, ctx.height, ctx.width
    )
    return *grads, None, None, None, None, None


_selective_scan.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.vim2.selective_scan)
def selective_scan_flops(u_shape, delta_shape, A_shape, *args, out_shape=None, **kwargs) -> int:
    """9 L N operations a channel and direction, plus 2 L for the skip: the count that Mamba's followers publish."""
    batch, length, lanes, features = delta_shape
    return batch * length * lanes * features * (9 * A_shape[-1] + 2)
