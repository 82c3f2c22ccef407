"""Selective scan (S6): the public functions, their argument checks, and the registered operator behind them.

The operator `torch.ops.vim2.selective_scan` is opaque to torch.compile, torch.export, autocast and activation
checkpointing, and carries its own fake, autograd and FLOP rules.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .backend import autocast_off, resolve_backend
from .operator import needs_backward, operator
from .reference import ORDERS, compute_dtype, selective_scan_chunked, selective_scan_chunked_backward

FORWARD = ("forward",)
BIDIRECTIONAL = ("forward", "backward")
CROSS_SCAN = ("forward", "columns", "backward", "columns_backward")  # in VMamba's order of directions

# Steps between the states that the Triton kernels keep for the backward pass: a multiple of those that they take at
# once, 4 forward and 3 backward.
TRITON_CHUNK = 36
MAMBA_CHUNK = 2048  # the same of mamba-ssm's kernels


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
    delta_weight: Tensor | None = None,
    backend: str | None = None,
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
        delta_weight: (K, E, R); delta is then its low-rank factor (batch, *spatial, K, R), and the step sizes before
            bias and softplus are delta_weight @ delta. They are not kept for the backward pass.
        backend: See `vim2.ops.backend.resolve_backend`.

    Returns:
        (batch, *spatial, E) in u's dtype.

    Raises:
        ValueError: Shapes that do not fit together, an unknown order or backend, an empty batch or map.
        RuntimeError: A backend that is not there.
    """
    if delta.dim() not in (4, 5):
        raise ValueError(
            f"delta must be (batch, L, K, E) for a sequence or (batch, H, W, K, E) for a map, got {tuple(delta.shape)}."
        )
    spatial = delta.shape[1:-2]
    _check_arguments(u, delta, A, B, C, orders, spatial, delta_weight)
    D, delta_bias = (A.new_zeros(A.shape[:2]) if t is None else t for t in (D, delta_bias))
    for name, t in (("D", D), ("delta_bias", delta_bias)):
        if t.shape != A.shape[:2]:
            raise ValueError(f"{name} must be (K, E) = {tuple(A.shape[:2])}, got {tuple(t.shape)}.")
    if delta_weight is None:
        delta_weight = A.new_empty(0)
    u, delta, B, C = (t if len(spatial) == 1 else t.flatten(1, 2) for t in (u, delta, B, C))
    tensors = (u, delta, A, B, C, D, delta_bias, delta_weight)
    size = _height_and_width(spatial)
    y, _, _ = _scan(tensors, delta_softplus, orders, *size, True, False, backend, needs_backward(*tensors))
    return y.unflatten(1, spatial)


def scan_flat(
    tensors: Sequence[Tensor],
    orders: Sequence[str],
    spatial: Sequence[int],
    backend: str | None,
    merge: bool,
    keeps: bool,
) -> tuple[Tensor, Tensor]:
    """`selective_scan` of u, delta, A, B, C, D, delta_bias and delta_weight, unchecked, where (batch, L, ...) are
    sequences or maps of size `spatial`; without `merge`, of each direction, (batch, L, K, E). Returns also the states
    that are kept, if a backward pass is to follow."""
    y, _, starts = _scan(tensors, True, orders, *_height_and_width(spatial), merge, False, backend, keeps)
    return y, starts


def scan_flat_backward(
    grad_y: Tensor,
    starts: Tensor,
    tensors: Sequence[Tensor],
    orders: Sequence[str],
    spatial: Sequence[int],
    backend: str | None,
    grads: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Gradients for u, A, D, delta_bias and delta_weight; those for B, C and delta are written to `grads`, of which the
    last may be wider than delta: the rest is zeroed."""
    backend = resolve_backend(backend, *tensors, scan=True)
    options = (True, [ORDERS.index(order) for order in orders], *_height_and_width(spatial), backend)
    return torch.ops.vim2.selective_scan_backward(grad_y, starts.new_empty(0), starts, *tensors, *options, *grads)


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
        z: Gate, (batch, D, L): the output is multiplied by SiLU(z).
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
    batch, channels, length = u.shape
    if A.dim() != 2 or A.shape[0] != channels:
        raise ValueError(f"A must be (D, N) with D = {channels} as in u, got {tuple(A.shape)}.")
    n = A.shape[1]
    # A direction of the operator holds the channels that share B and C; a constant B or C is one for every channel.
    B, C = (t.expand(batch, length, -1, -1).permute(0, 2, 3, 1) if t.shape == (channels, n) else t for t in (B, C))
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
    u, delta = (t.transpose(1, 2).unflatten(2, (groups, -1)) for t in (u, delta))
    A, D, delta_bias = (t.unflatten(0, (groups, -1)) for t in (A, D, delta_bias))
    B, C = (t.unsqueeze(2).expand(-1, -1, groups // t.shape[1], -1, -1).flatten(1, 2) for t in (B, C))
    B, C = (t.permute(0, 3, 1, 2) for t in (B, C))
    orders = FORWARD * groups
    tensors = (u, delta, A, B, C, D, delta_bias, A.new_empty(0))
    keeps = needs_backward(*tensors)
    y, last_state, _ = _scan(tensors, delta_softplus, orders, 1, length, False, return_last_state, backend, keeps)
    y = y.flatten(2).transpose(1, 2)
    if z is not None:
        y = (y * F.silu(z)).to(u.dtype)
    return (y, last_state.flatten(1, 2)) if return_last_state else y


def check_orders(orders: Sequence[str]) -> None:
    """Raise a ValueError unless all are known, and there is one."""
    if not orders or any(order not in ORDERS for order in orders):
        raise ValueError(f"orders must name one or more of {', '.join(ORDERS)}, got {tuple(orders)}.")


def _check_arguments(u, delta, A, B, C, orders, spatial, delta_weight):
    check_orders(orders)
    batch, lanes, features = delta.shape[0], *delta.shape[-2:]
    if len(orders) != lanes:
        raise ValueError(f"delta has {lanes} directions, but orders names {len(orders)}: {tuple(orders)}.")
    if delta_weight is not None:
        if delta_weight.dim() != 3 or (delta_weight.shape[0], delta_weight.shape[2]) != (lanes, features):
            raise ValueError(
                f"delta_weight must be (K, E, R) with K, R = {lanes}, {features} as in delta, "
                f"got {tuple(delta_weight.shape)}."
            )
        features = delta_weight.shape[1]
    full = (batch, *spatial, lanes, features)
    if u.shape not in ((batch, *spatial, features), full):
        raise ValueError(
            f"u must be {(batch, *spatial, features)}, shared by all directions, or {full}, got {tuple(u.shape)}."
        )
    if A.dim() != 3 or A.shape[:2] != (lanes, features):
        raise ValueError(f"A must be (K, E, N) with K, E = {lanes}, {features}, got {tuple(A.shape)}.")
    for name, t in (("B", B), ("C", C)):
        if t.shape != (batch, *spatial, lanes, A.shape[-1]):
            raise ValueError(f"{name} must be {(batch, *spatial, lanes, A.shape[-1])}, got {tuple(t.shape)}.")
    if u.numel() == 0:
        raise ValueError(f"There is nothing to scan: u is {tuple(u.shape)}.")


def _height_and_width(spatial):
    """Of a map, or of the one row that a sequence is."""
    return spatial if len(spatial) == 2 else (1, *spatial)


def _scan(tensors, delta_softplus, orders, height, width, merge, with_last, backend, keeps):
    backend = resolve_backend(backend, *tensors, scan=True)
    # the kernels keep states inside the sequence for a backward pass only; PyTorch's and Numba's forms never do
    length = height * width
    chunk = {"triton": TRITON_CHUNK, "mamba_ssm": MAMBA_CHUNK}.get(backend, length) if keeps else length
    order_ids = [ORDERS.index(order) for order in orders]
    return torch.ops.vim2.selective_scan(
        *tensors, delta_softplus, order_ids, height, width, merge, with_last, chunk, backend
    )


def _step_sizes(delta, delta_weight):
    """delta itself, or (batch, L, K, R) times (K, E, R), in delta's dtype: (batch, L, K, E)."""
    if delta_weight.numel() == 0:
        return delta
    weight = delta_weight.to(delta.dtype)
    if weight.shape[-1] == 1:
        return delta * weight.squeeze(-1)
    return torch.einsum("blkr,ker->blke", delta, weight)


@operator("vim2::selective_scan")
def _selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    delta_weight: Tensor,
    delta_softplus: bool,
    orders: Sequence[int],
    height: int,
    width: int,
    merge: bool,
    with_last: bool,
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Maps flattened to L = height * width; an empty delta_weight means that delta is full.

    Returns:
        y, summed over directions with merge; the last states, or (0,) without with_last; the kernels' states before
        every `chunk` steps but the first, from which their backward pass recomputes the others.
    """
    options = (delta_softplus, tuple(ORDERS[i] for i in orders), height, width)
    if backend == "triton":
        from .triton_scan import selective_scan_triton
        from .triton_step_size import sum_lanes

        inputs = (u, delta, A, B, C, D, delta_bias, delta_weight)
        y, last, starts = selective_scan_triton(*inputs, *options, chunk, with_last)
        return sum_lanes(y) if merge else y, last, starts
    with autocast_off(u):
        inputs = (u, _step_sizes(delta, delta_weight), A, B, C, D, delta_bias, *options)
        if backend == "mamba_ssm":
            from .mamba_ssm_scan import selective_scan_mamba

            y, last, starts = selective_scan_mamba(*inputs, chunk, with_last)
        else:
            if backend == "numba":
                from .numba_scan import selective_scan_numba

                y, last = selective_scan_numba(*inputs, with_last)
            else:
                y, last = selective_scan_chunked(*inputs, with_last)
            starts = last.new_empty(u.shape[0], len(orders), 0, A.shape[-1], A.shape[-2])
        return (y.sum(2) if merge else y).to(u.dtype), last, starts


def _of_directions(t: Tensor, shape: Sequence[int], backend: str) -> Tensor:
    """A fake (batch, L, K, ...), as the backend lays it out: Numba one direction after the other."""
    batch, length, lanes, features = shape
    if backend == "numba":
        return t.new_empty(lanes, batch, length, features).permute(1, 2, 0, 3)
    return t.new_empty(shape)


@torch.library.register_fake("vim2::selective_scan")
def _(u, delta, A, B, C, D, delta_bias, delta_weight, delta_softplus, orders, height, width, merge, *options):
    with_last, chunk, backend = options
    batch, length = delta.shape[:2]
    lanes, features, n = A.shape
    dtype = compute_dtype(u, delta, A, B, C)
    chunks = -(-length // chunk)
    return (
        u.new_empty(batch, length, features) if merge else _of_directions(u, (batch, length, lanes, features), backend),
        u.new_empty((batch, lanes, features, n) if with_last else (0,), dtype=dtype),
        u.new_empty((batch, lanes, chunks - 1, n, features), dtype=dtype),
    )


@torch.library.custom_op("vim2::selective_scan_backward", mutates_args=("grad_B", "grad_C", "grad_delta"))
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
    delta_weight: Tensor,
    delta_softplus: bool,
    orders: Sequence[int],
    height: int,
    width: int,
    backend: str,
    grad_B: Tensor,
    grad_C: Tensor,
    grad_delta: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for u, A, D, delta_bias and delta_weight; those for B, C and delta are written to the last arguments,
    which may be parts of one tensor. With a delta_weight grad_delta may be wider than delta: the rest is zeroed."""
    options = (delta_softplus, tuple(ORDERS[i] for i in orders), height, width)
    if grad_y.dim() == 4 and grad_y.stride(2) == 0:  # one gradient for all directions
        grad_y = grad_y[:, :, 0]
    with autocast_off(u):
        if backend == "triton":
            from .triton_scan_backward import selective_scan_triton_backward
            from .triton_step_size import step_sizes_backward

            grad_u, grad_steps, grad_A, grad_D, grad_bias = selective_scan_triton_backward(
                grad_y, grad_last, starts, u, delta, A, B, C, D, delta_bias, delta_weight, *options, grad_B, grad_C
            )
        else:
            inputs = (u, _step_sizes(delta, delta_weight), A, B, C, D, delta_bias, *options)
            if backend == "mamba_ssm" and not grad_last.numel():  # which knows no gradient of last states
                from .mamba_ssm_scan import selective_scan_mamba_backward

                grads = selective_scan_mamba_backward(grad_y, starts, *inputs)
            elif backend == "numba":
                from .numba_scan import selective_scan_numba_backward

                grads = selective_scan_numba_backward(grad_y, grad_last, *inputs)
            else:
                grads = selective_scan_chunked_backward(grad_y, grad_last, *inputs)
            grad_u, grad_steps, grad_A, B_gradient, C_gradient, grad_D, grad_bias = grads
            grad_B.copy_(B_gradient)
            grad_C.copy_(C_gradient)
        if delta_weight.numel() == 0:
            grad_delta.copy_(grad_steps)
            grad_weight = torch.empty_like(delta_weight)
        elif backend == "triton":
            grad_weight = step_sizes_backward(grad_steps, delta, delta_weight, grad_delta)
        else:
            grad_weight = torch.einsum("blke,blkr->ker", grad_steps, delta)
            rank = delta.shape[-1]
            grad_delta[..., :rank] = torch.einsum("blke,ker->blkr", grad_steps, delta_weight.to(grad_steps.dtype))
            grad_delta[..., rank:] = 0
        return grad_u, grad_A, grad_D, grad_bias, grad_weight.to(delta_weight.dtype)


@_selective_scan_backward.register_fake
def _(grad_y, grad_last, starts, u, delta, A, B, C, D, delta_bias, delta_weight, *options):
    _, _, _, _, backend, *_ = options
    grad_u = _of_directions(u, u.shape, backend) if u.dim() == 4 else u.new_empty(u.shape)
    return grad_u, *(t.new_empty(t.shape) for t in (A, D, delta_bias, delta_weight))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, ctx.orders, ctx.height, ctx.width, _, _, _, ctx.backend = inputs
    ctx.save_for_backward(output[2], *tensors)


def _backward(ctx, grad_y, grad_last, _):
    options = (ctx.delta_softplus, ctx.orders, ctx.height, ctx.width, ctx.backend)
    _, _, delta, _, B, C, *_ = ctx.saved_tensors
    grad_B, grad_C, grad_delta = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (B, C, delta))
    grad_u, grad_A, *others = torch.ops.vim2.selective_scan_backward(
        grad_y, grad_last, *ctx.saved_tensors, *options, grad_B, grad_C, grad_delta
    )
    return grad_u, grad_delta, grad_A, grad_B, grad_C, *others, *(None,) * 8


torch.library.register_autograd("vim2::selective_scan", _backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.vim2.selective_scan)
def selective_scan_flops(u, delta, A, B, C, D, delta_bias, delta_weight, *args, out_shape=None, **kwargs) -> int:
    """From the arguments' shapes: 9 N + 2 operations a step, channel and direction (the count that Mamba's followers
    publish: the recurrence, and the skip), and R multiply-adds where delta is a low-rank factor."""
    batch, length = delta[:2]
    lanes, features, n = A
    rank = delta[-1] if len(delta_weight) == 3 else 0
    return batch * length * lanes * features * (9 * n + 2 + rank)
