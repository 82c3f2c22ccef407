"""The registered operator behind every scan, `torch.ops.vim2.selective_scan`, and its backward pass.

It is opaque to torch.compile, torch.export, autocast and activation checkpointing, chooses among the scan's forms, and
carries its own fake, autograd and FLOP rules.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..backend import BACKENDS, autocast_off, check_tensors, compute_dtype, resolve_backend
from ..operator import refuse_second_derivatives, register_operator, require_fit
from .chunks import kept_dtype, kept_every
from .operands import Call, Operands
from .orders import ORDERS
from .reference import selective_scan_chunked, selective_scan_chunked_backward


def scan(
    operands: Operands,
    *,
    orders: Sequence[str],
    spatial: Sequence[int],
    keeps: bool,
    delta_softplus: bool = True,
    merge: bool = True,
    with_last: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the scan on operands whose shapes fit together.

    Args:
        operands: The tensors of sequences, or of maps that are flattened.
        orders: The K directions.
        spatial: Height and width of the maps, or the sequences' length alone.
        keeps: Whether a backward pass may follow, for which kernels keep states.
        delta_softplus: Apply softplus to delta + delta_bias.
        merge: Sum over directions.
        with_last: Whether the last states are wanted.
        backend: See `vim2.ops.backend.resolve_backend`.

    Returns:
        y, (batch, L, E) in u's dtype, or without merge (batch, L, K, E); the last states, (batch, K, E, N), if
        `with_last`; and the states that are kept for `scan_backward`.

    Raises:
        ValueError: An unknown backend, or one that does not know these sizes; a delta_softplus that is no truth value.
        RuntimeError: A backend that is not there.
    """
    if delta_softplus not in (True, False):
        raise ValueError(f"delta_softplus must be True or False, got {delta_softplus!r}.")
    backend = resolve_backend(backend, *operands, scan=True)
    height, width = _height_and_width(spatial)
    chunk = kept_every(backend, height * width, keeps)
    return _selective_scan(
        *operands, delta_softplus, _order_ids(orders), height, width, merge, with_last, chunk, backend
    )


def scan_backward(
    grad_y: Tensor,
    starts: Tensor,
    operands: Operands,
    *,
    orders: Sequence[str],
    spatial: Sequence[int],
    backend: str | None,
    grad_B: Tensor,
    grad_C: Tensor,
    grad_delta: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients of a `scan` with softplus whose last states were not wanted.

    Args:
        grad_y: (batch, L, E), or (batch, L, K, E) where directions were not summed.
        starts: The states that `scan` kept.
        operands: As for `scan`, and so are orders, spatial and backend.
        grad_B, grad_C, grad_delta: Where the gradients of B, C and delta are written. The last may be wider than a
            low-rank delta: the rest is zeroed.

    Returns:
        Gradients for u, A, D, delta_bias and delta_weight.
    """
    backend = resolve_backend(backend, *operands, scan=True)
    options = (True, _order_ids(orders), *_height_and_width(spatial), backend)
    no_grad_last = starts.new_empty(0)
    return _selective_scan_backward(grad_y, no_grad_last, starts, *operands, *options, grad_B, grad_C, grad_delta)


def flatten_as_traced(field: Tensor, spatial: Sequence[int]) -> Tensor:
    """(batch, *spatial, ...) -> (batch, L, ...). A graph of torch.jit.trace keeps the map's height and width as
    numbers, with which the operator alone would walk another map of as many positions in a wrong order: here that one
    is cut, and becomes too short for the operator."""
    if len(spatial) == 1:
        return field
    if torch.jit.is_tracing():
        field = field[:, : int(spatial[0]), : int(spatial[1])]
    return field.flatten(1, 2)


def _height_and_width(spatial: Sequence[int]) -> Sequence[int]:
    """A map's height and width; a sequence is a map of one row."""
    return spatial if len(spatial) == 2 else (1, *spatial)


def _order_ids(orders: Sequence[str]) -> list[int]:
    return [ORDERS.index(order) for order in orders]


def _check_call(tensors: Sequence[Tensor], orders: Sequence[int], backend: str) -> None:
    """What `scan` has settled, for those who call the operator themselves: one they must not get wrong silently."""
    check_tensors(*tensors)
    if any(not 0 <= order < len(ORDERS) for order in orders):
        raise ValueError(f"Orders must be indices into {ORDERS}, got {list(orders)}.")
    if backend not in BACKENDS or backend == "auto":
        raise ValueError(f"The operator's backend must be one of {', '.join(BACKENDS[1:])}, got {backend!r}.")


def _check(*args):
    call = Call.of(args)
    operands, orders, height, width = call.operands, call.orders, call.height, call.width
    _check_call(operands, orders, call.backend)
    length = height * width
    fits = operands.fit(len(orders), height, width) and call.chunk in (length, kept_every(call.backend, length, True))
    require_fit(fits, "selective_scan", *operands, height=height, width=width, chunk=call.chunk)


@register_operator("vim2::selective_scan", _check)
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
    """As `scan`, with everything settled: orders by their index, and the `chunk` of steps after which states are kept,
    but for the first."""
    operands = Operands(u, delta, A, B, C, D, delta_bias, delta_weight)
    walks = dict(delta_softplus=delta_softplus, orders=tuple(ORDERS[i] for i in orders), height=height, width=width)
    if backend == "triton":
        from .triton.forward import scan_forward
        from .triton.forward_relay import scan_forward_relay, takes_turns
        from .triton.sums import sum_directions

        form = scan_forward_relay if takes_turns(operands) else scan_forward
        y, last, starts = form(operands, **walks, chunk=chunk, with_last=with_last)
        return sum_directions(y) if merge else y, last, starts
    with autocast_off(u):
        y, last, starts = _scan_in_full(operands, walks, chunk, with_last, backend)
        return (y.sum(2) if merge else y).to(u.dtype), last, starts


def _scan_in_full(
    operands: Operands, walks: dict, chunk: int, with_last: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """y (batch, L, K, E), the last states and the kept ones, by a form that takes delta in full."""
    full = operands.with_full_delta()
    if backend == "mamba_ssm":
        from .mamba_ssm_scan import selective_scan_mamba

        return selective_scan_mamba(*full, **walks, chunk=chunk, with_last=with_last)
    if backend == "numba":
        from .numba_scan import selective_scan_numba

        y, last = selective_scan_numba(*full, **walks, with_last=with_last)
    else:
        y, last = selective_scan_chunked(*full, **walks, with_last=with_last)
    directions, features, n = operands.A.shape
    return y, last, last.new_empty(operands.u.shape[0], directions, 0, n, features)


def _of_directions(t: Tensor, shape: Sequence[int], backend: str) -> Tensor:
    """A fake (batch, L, K, ...), as the backend lays it out: Numba one direction after the other."""
    batch, length, directions, features = shape
    if backend == "numba":
        return t.new_empty(directions, batch, length, features).permute(1, 2, 0, 3)
    return t.new_empty(shape)


@_selective_scan.register_fake
def _(u, delta, A, B, C, D, delta_bias, delta_weight, delta_softplus, orders, height, width, merge, *options):
    with_last, chunk, backend = options
    _check_call((u, delta, A, B, C, D, delta_bias, delta_weight), orders, backend)
    batch, length = delta.shape[:2]
    directions, features, n = A.shape
    dtype = compute_dtype(u, delta, A, B, C)
    chunks = -(-length // chunk)
    per_direction = (batch, length, directions, features)
    return (
        u.new_empty(batch, length, features) if merge else _of_directions(u, per_direction, backend),
        u.new_empty((batch, directions, features, n) if with_last else (0,), dtype=dtype),
        u.new_empty(
            (batch, directions, chunks - 1, n, features), dtype=kept_dtype(u.dtype) if backend == "triton" else dtype
        ),
    )


def _check_backward(grad_y, grad_last, starts, *args):
    operands, (_, orders, height, width, backend, grad_B, grad_C, grad_delta) = Operands(*args[:8]), args[8:]
    u, delta, A, B, C, *_ = operands
    tensors = (grad_y, grad_last, starts, *operands, grad_B, grad_C, grad_delta)
    _check_call(tensors, orders, backend)
    length = height * width
    kept = -(-length // kept_every(backend, length, True)) - 1
    fits = (
        operands.fit(len(orders), height, width)
        and grad_y.shape in (u.shape[:2] + u.shape[-1:], (*delta.shape[:3], u.shape[-1]))
        and starts.shape == (len(u), len(orders), kept, *A.mT.shape[1:])
        and grad_last.shape in ((0,), (len(u), *A.shape))
        and (grad_B.shape, grad_C.shape, grad_delta.shape[:-1]) == (B.shape, C.shape, delta.shape[:-1])
        and grad_delta.shape[-1] >= delta.shape[-1]
    )
    require_fit(fits, "selective_scan_backward", *tensors, height=height, width=width)


@register_operator("vim2::selective_scan_backward", _check_backward, mutates_args=("grad_B", "grad_C", "grad_delta"))
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
    """As `scan_backward`, also with the gradient of the last states, (batch, K, E, N), or (0,) where there is none.
    grad_B, grad_C and grad_delta may be parts of one tensor."""
    operands = Operands(u, delta, A, B, C, D, delta_bias, delta_weight)
    walks = dict(delta_softplus=delta_softplus, orders=tuple(ORDERS[i] for i in orders), height=height, width=width)
    if grad_y.dim() == 4 and grad_y.stride(2) == 0:  # one gradient for all directions
        grad_y = grad_y[:, :, 0]
    with autocast_off(u):
        if backend == "triton":
            from .triton import backward

            gradients = dict(grad_B=grad_B, grad_C=grad_C, grad_delta=grad_delta)
            grad_u, grad_A, grad_D, grad_bias, grad_weight = backward.scan_backward(
                grad_y, grad_last, starts, operands, **walks, **gradients
            )
        else:
            grads = _differentiate_in_full(grad_y, grad_last, starts, operands, walks, backend)
            grad_u, grad_steps, grad_A, B_gradient, C_gradient, grad_D, grad_bias = grads
            grad_B.copy_(B_gradient)
            grad_C.copy_(C_gradient)
            grad_weight = _differentiate_delta(grad_steps, operands, grad_delta)
        return grad_u, grad_A, grad_D, grad_bias, grad_weight.to(delta_weight.dtype)


def _differentiate_in_full(
    grad_y: Tensor, grad_last: Tensor, starts: Tensor, operands: Operands, walks: dict, backend: str
) -> tuple[Tensor, ...]:
    """Gradients of the operands with delta in full, by a form that takes it so."""
    full = operands.with_full_delta()
    if backend == "mamba_ssm" and not grad_last.numel():  # it knows no gradient of last states
        from .mamba_ssm_scan import selective_scan_mamba_backward

        return selective_scan_mamba_backward(grad_y, starts, *full, **walks)
    if backend == "numba":
        from .numba_scan import selective_scan_numba_backward

        return selective_scan_numba_backward(grad_y, grad_last, *full, **walks)
    return selective_scan_chunked_backward(grad_y, grad_last, *full, **walks)


def _differentiate_delta(grad_steps: Tensor, operands: Operands, grad_delta: Tensor) -> Tensor:
    """Write the gradient of delta, which may be a factor, to grad_delta, from that of the step sizes in full. Returns
    the gradient of delta_weight."""
    delta, weight = operands.delta, operands.delta_weight
    if not operands.is_low_rank:
        grad_delta.copy_(grad_steps)
        return torch.empty_like(weight)
    rank = delta.shape[-1]
    grad_delta[..., :rank] = torch.einsum("blke,ker->blkr", grad_steps, weight.to(grad_steps.dtype))
    grad_delta[..., rank:] = 0
    return torch.einsum("blke,blkr->ker", grad_steps, delta)


@_selective_scan_backward.register_fake
def _(grad_y, grad_last, starts, u, delta, A, B, C, D, delta_bias, delta_weight, *options):
    _, _, _, _, backend, *_ = options
    grad_u = _of_directions(u, u.shape, backend) if u.dim() == 4 else u.new_empty(u.shape)
    return grad_u, *(t.new_empty(t.shape) for t in (A, D, delta_bias, delta_weight))


def _setup_context(ctx, inputs, output):
    *operands, ctx.delta_softplus, ctx.orders, ctx.height, ctx.width, _, _, _, ctx.backend = inputs
    ctx.save_for_backward(output[2], *operands)


def _backward(ctx, grad_y, grad_last, _):
    refuse_second_derivatives()
    starts, *operands = ctx.saved_tensors
    options = (ctx.delta_softplus, ctx.orders, ctx.height, ctx.width, ctx.backend)
    u, delta, _, B, C, *_ = operands
    if grad_y is None:  # only the last states are used
        grad_y = u.new_zeros(*u.shape[:2], u.shape[-1])
    if grad_last is None:
        grad_last = starts.new_empty(0)
    grad_B, grad_C, grad_delta = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (B, C, delta))
    grad_u, grad_A, *others = _selective_scan_backward(
        grad_y, grad_last, starts, *operands, *options, grad_B, grad_C, grad_delta
    )
    return grad_u, grad_delta, grad_A, grad_B, grad_C, *others, *(None,) * 8


_selective_scan.register_autograd(_backward, _setup_context)


@register_flop_formula(torch.ops.vim2.selective_scan)
def selective_scan_flops(u, delta, A, B, C, D, delta_bias, delta_weight, *args, out_shape=None, **kwargs) -> int:
    """From the arguments' shapes: 9 N + 2 operations a step, channel and direction (the count that Mamba's followers
    publish: the recurrence, and the skip), and R multiply-adds where delta is a low-rank factor."""
    batch, length = delta[:2]
    directions, features, n = A
    rank = delta[-1] if len(delta_weight) == 3 else 0
    return batch * length * directions * features * (9 * n + 2 + rank)


def selective_scan_jit_flops(inputs: Sequence, outputs: Sequence) -> int:
    """`selective_scan_flops` for counters that trace a model, such as fvcore's and MMEngine's:
    `counter.set_op_handle("vim2::selective_scan", selective_scan_jit_flops)`.

    Args:
        inputs: The operator's inputs in the graph, values of torch.jit.
        outputs: Its outputs.
    """
    return selective_scan_flops(*(value.type().sizes() for value in inputs[:8]))
