"""S6: the selective scan with B, C and delta projected from its input.

The projections, in the channel mixer five times as large as the input, are not kept for the backward pass, which
computes them again. It takes two steps: parameters become what kernels read (`scan_parameters`), and the input is
projected by them and scanned, in one of three forms:

- in eager training, `_ProjectedScan`, an autograd function;
- in compiled training, the operator `torch.ops.vim2.projected_scan`, which does the same;
- without gradients, `project` and then `scan`, each as compilers and exporters know it.

The operators `torch.ops.vim2.scan_parameters` and `torch.ops.vim2.projected_scan` are opaque to torch.compile and
activation checkpointing, the first to torch.export as well, and carry their own fake and autograd rules.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import autocast_dtype, autocast_off, resolve_backend
from ..observers import is_compiling_to_run
from ..operator import (
    needs_backward,
    opaque_on_cpus,
    refuse_second_derivatives,
    refuse_transforms,
    register_operator,
    require_fit,
)
from ..replay import replayed
from .operands import Operands
from .operator import flatten_as_traced, scan, scan_backward
from .orders import ORDERS, check_orders


def projected_scan(
    u: Tensor,
    weight: Tensor,
    A_log: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    delta_weight: Tensor,
    orders: Sequence[str],
    separate_inputs: bool = False,
    merge: bool = True,
    backend: str | None = None,
) -> Tensor:
    """`selective_scan` with B, C and delta linear in u (arXiv 2312.00752, section 3.2), and A = -exp(A_log).

    Args:
        u: (batch, *spatial, E), or (batch, *spatial, K, E) with separate_inputs.
        weight: (K, R + 2 N, E), rows in VMamba's order: delta, B, C.
        A_log: (K, E, N).
        D: (K, E).
        delta_bias: (K, E).
        delta_weight: (K, E, R).
        orders: K directions.
        separate_inputs: Whether every direction has an input of its own.
        merge: Whether to sum over directions.
        backend: See `vim2.ops.backend.resolve_backend`.

    Returns:
        (batch, *spatial, E) in u's dtype, or without merge (batch, *spatial, K, E).

    Raises:
        ValueError: Shapes that do not fit together, an unknown order or backend, an empty batch or map.
        RuntimeError: A backend that is not there.
    """
    _check_arguments(u, weight, A_log, D, delta_bias, delta_weight, orders, separate_inputs)
    refuse_transforms(u, weight, A_log, D, delta_bias, delta_weight)
    spatial = u.shape[1 : -2 if separate_inputs else -1]
    matrix, A = scan_parameters(weight, A_log, separate_inputs, backend)
    flat = u.flatten(1, 2) if len(spatial) == 2 else u
    tensors = (flat, matrix, A, D, delta_bias, delta_weight)
    options = dict(orders=orders, spatial=spatial, backend=backend)
    trains = needs_backward(*tensors)
    if trains and is_compiling_to_run():
        backend = resolve_backend(backend, *tensors, scan=True)
        y, _ = _projected_scan(
            *tensors, autocast_dtype(flat), merge, [ORDERS.index(o) for o in orders], spatial, backend
        )
    elif trains and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        y = _ProjectedScan.apply(*tensors, options, merge)
    else:
        projected = project(flatten_as_traced(u, spatial), matrix, A.shape[0])
        operands = _operands(flat, projected, A, D, delta_bias, delta_weight)
        y, _, _ = scan(operands, **options, merge=merge, keeps=trains)
    return y.unflatten(1, spatial)


def _check_arguments(u, weight, A_log, D, delta_bias, delta_weight, orders, separate_inputs):
    check_orders(orders)
    directions, features, n, rank = len(orders), u.shape[-1], A_log.shape[-1], delta_weight.shape[-1]
    if u.dim() - separate_inputs not in (3, 4) or u.numel() == 0 or (separate_inputs and u.shape[-2] != directions):
        raise ValueError(
            f"u must be (batch, L, E) for a sequence or (batch, H, W, E) for a map, not empty, with an axis K = "
            f"{directions} before E if directions have inputs of their own, got {tuple(u.shape)}."
        )
    for name, t, shape in (
        ("weight", weight, (directions, rank + 2 * n, features)),
        ("A_log", A_log, (directions, features, n)),
        ("D", D, (directions, features)),
        ("delta_bias", delta_bias, (directions, features)),
        ("delta_weight", delta_weight, (directions, features, rank)),
    ):
        if t.shape != shape:
            raise ValueError(f"{name} must be {shape} with these orders, u and widths, got {tuple(t.shape)}.")


def scan_parameters(
    weight: Tensor, A_log: Tensor, separate_inputs: bool, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The weight as `project` takes it, and A = -exp(A_log).

    Returns:
        The weight with its rows in the order B, C, delta, so that kernels read whole 16-byte words: in Triton
        (K (R + 2 N), E), or (K (R + 2 N), K E) with zeros between directions if inputs are separate, R + 2 N rounded up
        to a multiple of 8 by rows of zeros, and in autocast's dtype where that is on; else (K, R + 2 N, E). A is
        (K, E, N), in A_log's dtype.
    """
    if resolve_backend(backend, weight, A_log) == "triton":
        dtype = autocast_dtype(weight) or weight.dtype
        return _scan_parameters(weight, A_log, separate_inputs, dtype)
    return _scan_parameters_torch(weight, A_log)


def _fake_scan_parameters_torch(weight, A_log):
    return weight.new_empty(weight.shape), A_log.new_empty(A_log.shape)


@opaque_on_cpus("vim2::scan_parameters_torch", _fake_scan_parameters_torch)
def _scan_parameters_torch(weight: Tensor, A_log: Tensor) -> tuple[Tensor, Tensor]:
    return weight.roll(2 * A_log.shape[-1] - weight.shape[1], dims=1), -torch.exp(A_log)


def project(u: Tensor, weight: Tensor, directions: int) -> Tensor:
    """B, C and delta's low-rank factor for all K directions, by products on the map as it lies.

    Args:
        u: (batch, L, E), or (batch, L, K, E) with separate inputs.
        weight: See `scan_parameters`.
        directions: K.

    Returns:
        (batch, L, K, 2 N + R) in the order B, C, delta, with what comes of the weight's rows of zeros behind them.
    """
    if u.dim() == 3:
        return F.linear(u, weight.flatten(0, -2)).unflatten(-1, (directions, -1))
    if weight.dim() == 2:  # one wide product, mostly of zeros, where a batch of thin ones would be slow
        return F.linear(u.flatten(-2), weight).unflatten(-1, (directions, -1))
    return torch.einsum("...ke,kce->...kc", u, weight)


def project_backward(grad: Tensor, u: Tensor, weight: Tensor, grad_u: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of u, added to grad_u, and of weight, from the gradient of `project`'s result and in its dtype."""
    if u.dim() == 4 and weight.dim() == 3:
        grad_weight = torch.einsum("...kc,...ke->kce", grad, u.to(grad.dtype))
        return grad_u + torch.einsum("...kc,kce->...ke", grad, weight.to(grad.dtype)), grad_weight.to(weight.dtype)

    def rows(t: Tensor) -> Tensor:
        return t.flatten(2).flatten(0, 1)

    grad_u = grad_u.contiguous()  # so that its rows are no copy
    grad, matrix = rows(grad), weight.flatten(0, -2).to(grad.dtype)
    grad_weight = (grad.t() @ rows(u).to(grad.dtype)).view(weight.shape)
    if grad_u.dtype == grad.dtype:
        rows(grad_u).addmm_(grad, matrix)
    else:
        rows(grad_u).add_(grad @ matrix)
    return grad_u, grad_weight.to(weight.dtype)


def _split(projected: Tensor, A: Tensor) -> tuple[Tensor, ...]:
    """B, C, and delta's factor with the zeros behind it, as `project` returns them side by side."""
    n = A.shape[-1]
    return projected.split((n, n, projected.shape[-1] - 2 * n), dim=-1)


def _operands(u: Tensor, projected: Tensor, A: Tensor, D: Tensor, delta_bias: Tensor, delta_weight: Tensor) -> Operands:
    """The scan's operands, of which B, C and delta are parts of what `project` returned."""
    B, C, delta = _split(projected, A)
    return Operands(u, delta[..., : delta_weight.shape[-1]], A, B, C, D, delta_bias, delta_weight)


def _project_in(u: Tensor, weight: Tensor, directions: int, dtype: torch.dtype | None) -> Tensor:
    """`project` as under autocast of this dtype, which compiled graphs turn off where they call an operator."""
    with autocast_off(u):
        return project(u, weight, directions) if dtype is None else project(u.to(dtype), weight.to(dtype), directions)


def _scan_projected(tensors, dtype, options, merge):
    """y, and the states that are kept for `_scan_projected_backward`."""
    u, weight, A, *others = tensors
    projected = _project_in(u, weight, A.shape[0], dtype)
    y, _, starts = scan(_operands(u, projected, A, *others), **options, merge=merge, keeps=True)
    return y, starts


def _scan_projected_backward(grad_y, starts, tensors, dtype, options):
    """The gradients of `tensors`."""
    u, weight, A, *others = tensors
    projected = _project_in(u, weight, A.shape[0], dtype)
    grad_projected = torch.empty_like(projected)
    grad_B, grad_C, grad_delta = _split(grad_projected, A)
    grad_u, *grads = scan_backward(
        grad_y,
        starts,
        _operands(u, projected, A, *others),
        **options,
        grad_B=grad_B,
        grad_C=grad_C,
        grad_delta=grad_delta,
    )
    with autocast_off(u):
        grad_u, grad_weight = project_backward(grad_projected, u, weight, grad_u)
    return grad_u, grad_weight, *grads


class _ProjectedScan(torch.autograd.Function):
    """Projection and scan. Only the input and the states that the scan keeps wait for the backward pass."""

    @staticmethod
    def forward(ctx, u, weight, A, D, delta_bias, delta_weight, options, merge):
        ctx.autocast = autocast_dtype(u)
        ctx.options, ctx.operator = options, "vim2::projected_scan"
        tensors = (u, weight, A, D, delta_bias, delta_weight)
        y, starts = _scan_projected(tensors, ctx.autocast, options, merge)
        ctx.save_for_backward(*tensors, starts)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        refuse_second_derivatives()
        *tensors, starts = ctx.saved_tensors
        return *_scan_projected_backward(grad_y, starts, tensors, ctx.autocast, ctx.options), None, None


def _options(orders: Sequence[int], spatial: Sequence[int], backend: str) -> dict:
    """The options of `scan`, from what an operator can be given."""
    return dict(orders=tuple(ORDERS[i] for i in orders), spatial=tuple(spatial), backend=backend)


def _check_projected(u, weight, A, D, delta_bias, delta_weight, dtype, *options):
    orders, spatial, _ = options[-3:]
    directions, features, n = A.shape
    width = directions * features if u.dim() == 4 and weight.dim() == 2 else features
    rows = 2 * n + delta_weight.shape[-1]  # the weight's, for a direction; there may be further ones, of zeros
    fits = (
        len(orders) == directions
        and all(0 <= order < len(ORDERS) for order in orders)
        and u.shape in ((len(u), math.prod(spatial), *shape) for shape in ((features,), (directions, features)))
        and weight.shape[-1] == width
        and weight.shape[:-1].numel() % directions == 0
        and weight.shape[:-1].numel() >= directions * rows
        and D.shape == delta_bias.shape == delta_weight.shape[:-1] == (directions, features)
    )
    require_fit(fits, "projected_scan", u, weight, A, D, delta_bias, delta_weight, spatial=spatial)


@register_operator("vim2::projected_scan", _check_projected, decorate=replayed)
def _projected_scan(
    u: Tensor,
    weight: Tensor,
    A: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    delta_weight: Tensor,
    dtype: torch.dtype | None,
    merge: bool,
    orders: Sequence[int],
    spatial: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`_ProjectedScan` as one operator for compilers, which would keep the projections otherwise, and add up their
    gradients in copies.

    Args:
        u: Flattened, (batch, L, E) or (batch, L, K, E).
        weight, A: See `scan_parameters`.
        dtype: The dtype in which the projections are made, as under autocast; None leaves them as they come.
        orders: The directions, by their index in ORDERS.
        backend: Settled, see `vim2.ops.backend.resolve_backend`.

    Returns:
        y, (batch, L, E) or without merge (batch, L, K, E), and the states that are kept for the backward pass.
    """
    tensors = (u, weight, A, D, delta_bias, delta_weight)
    return _scan_projected(tensors, dtype, _options(orders, spatial, backend), merge)


@_projected_scan.register_fake
def _(*args):
    return _projected_scan.function(*args)  # all that it calls has fakes


def _check_projected_backward(grad_y, starts, *args):
    u, _, A, *_ = args
    _check_projected(*args)
    fits = grad_y.shape in ((*u.shape[:2], *shape) for shape in (A.shape[1:2], A.shape[:2]))
    fits = fits and (starts.shape[:2], starts.shape[3:]) == ((len(u), len(A)), A.mT.shape[1:])
    require_fit(fits, "projected_scan_backward", grad_y, starts, *args[:6])


@register_operator("vim2::projected_scan_backward", _check_projected_backward, decorate=replayed)
def _projected_scan_backward(
    grad_y: Tensor,
    starts: Tensor,
    u: Tensor,
    weight: Tensor,
    A: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    delta_weight: Tensor,
    dtype: torch.dtype | None,
    orders: Sequence[int],
    spatial: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (u, weight, A, D, delta_bias, delta_weight)
    return _scan_projected_backward(grad_y, starts, tensors, dtype, _options(orders, spatial, backend))


@_projected_scan_backward.register_fake
def _(*args):
    return _projected_scan_backward.function(*args)


def _save_projected(ctx, inputs, output):
    *tensors, ctx.dtype, _, ctx.orders, ctx.spatial, ctx.backend = inputs
    ctx.save_for_backward(output[1], *tensors)


def _differentiate_projected(ctx, grad_y, _):
    refuse_second_derivatives()
    options = (ctx.dtype, ctx.orders, ctx.spatial, ctx.backend)
    return *_projected_scan_backward(grad_y, *ctx.saved_tensors, *options), *(None,) * 5


_projected_scan.register_autograd(_differentiate_projected, _save_projected)


def _check_parameters(weight, A_log, *options):
    directions, rows, features = weight.shape
    fits = A_log.shape[:2] == (directions, features) and rows >= 2 * A_log.shape[2]
    require_fit(fits, "scan_parameters", weight, A_log)


@register_operator("vim2::scan_parameters", _check_parameters, decorate=replayed)
def _scan_parameters(weight: Tensor, A_log: Tensor, separate_inputs: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    from .triton.parameters import scan_parameters_triton

    return scan_parameters_triton(weight, A_log, separate_inputs, dtype)


@_scan_parameters.register_fake
def _(weight, A_log, separate_inputs, dtype):
    directions, rows, features = weight.shape
    shape = (directions * -(-rows // 8) * 8, directions * features if separate_inputs else features)
    return weight.new_empty(shape, dtype=dtype), A_log.new_empty(A_log.mT.shape).mT


def _check_parameters_backward(grad_matrix, grad_A, A, rows, separate_inputs, *options):
    directions, features, states = A.shape
    columns = directions * features if separate_inputs else features
    fits = rows >= 2 * states and grad_matrix.shape == (directions * -(-rows // 8) * 8, columns)
    require_fit(fits and grad_A.shape == A.shape, "scan_parameters_backward", grad_matrix, grad_A, A, rows=rows)


@register_operator("vim2::scan_parameters_backward", _check_parameters_backward, decorate=replayed)
def _scan_parameters_backward(
    grad_matrix: Tensor, grad_A: Tensor, A: Tensor, rows: int, separate_inputs: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight, (K, rows, E), in a dtype, and of A_log."""
    from .triton.parameters import scan_parameters_triton_backward

    return scan_parameters_triton_backward(grad_matrix, grad_A, A, rows, separate_inputs, dtype)


@_scan_parameters_backward.register_fake
def _(grad_matrix, grad_A, A, rows, separate_inputs, dtype):
    directions, features, _ = A.shape
    return A.new_empty((directions, rows, features), dtype=dtype), A.new_empty(A.shape)


def _save_parameters(ctx, inputs, output):
    weight, _, ctx.separate_inputs, _ = inputs
    matrix, A = output
    ctx.rows, ctx.dtype = weight.shape[1], weight.dtype
    ctx.matrix = matrix.shape, matrix.dtype
    ctx.save_for_backward(A)


def _differentiate_parameters(ctx, grad_matrix, grad_A):
    refuse_second_derivatives()
    (A,) = ctx.saved_tensors
    given = grad_matrix is not None, grad_A is not None
    if grad_matrix is None:
        shape, dtype = ctx.matrix
        grad_matrix = A.new_zeros(shape, dtype=dtype)
    if grad_A is None:
        grad_A = torch.zeros_like(A)
    grads = _scan_parameters_backward(grad_matrix, grad_A, A, ctx.rows, ctx.separate_inputs, ctx.dtype)
    return *(grad if wanted else None for grad, wanted in zip(grads, given)), None, None


_scan_parameters.register_autograd(_differentiate_parameters, _save_parameters)
