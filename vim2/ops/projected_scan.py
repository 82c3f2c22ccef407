"""The selective scan with B, C and delta projected from its input: S6. The projections, in the channel mixer five times
as large as the input, are not kept for the backward pass, which computes them again."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import autocast_dtype
from .selective_scan import needs_backward, selective_scan, selective_scan_with_backward


def project(u: Tensor, weight: Tensor, separate_inputs: bool, d_state: int) -> Tensor:
    """B, C and delta's low-rank factor for all directions, by products on the map as it lies.

    Args:
        u: (batch, *spatial, E), or (batch, *spatial, K, E) with separate_inputs.
        weight: (K, R + 2 N, E), rows in VMamba's order: delta, B, C.

    Returns:
        (batch, *spatial, K, 2 N + R) in the order B, C, delta; on GPUs with zeros up to a multiple of 8, so that
        kernels read whole 16-byte words.
    """
    lanes, rows, _ = weight.shape
    weight = weight.roll(2 * d_state - rows, dims=1)
    if u.is_cuda and rows % 8:
        weight = F.pad(weight, (0, 0, 0, -rows % 8))
    if not separate_inputs:
        return F.linear(u, weight.flatten(0, 1)).unflatten(-1, (lanes, -1))
    if u.is_cuda:  # one wide product, mostly of zeros, where a batch of thin ones would be slow
        return F.linear(u.flatten(-2), torch.block_diag(*weight)).unflatten(-1, (lanes, -1))
    return torch.einsum("...ke,kce->...kc", u, weight)


def projected_scan(
    u: Tensor,
    weight: Tensor,
    A: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    delta_weight: Tensor,
    orders: Sequence[str],
    separate_inputs: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`selective_scan` with B, C and delta linear in u (arXiv 2312.00752, section 3.2).

    Args:
        u: (batch, *spatial, E), or (batch, *spatial, K, E) with separate_inputs.
        weight: (K, R + 2 N, E), see `project`.
        A: (K, E, N), negative.
        D: (K, E).
        delta_bias: (K, E).
        delta_weight: (K, E, R).
        orders: K directions.
        separate_inputs: Whether every direction has an input of its own.
        backend: See `vim2.ops.backend.resolve_backend`.

    Returns:
        (batch, *spatial, E) in u's dtype.

    Raises:
        ValueError, RuntimeError: As `selective_scan`.
    """
    tensors = (u, weight, A, D, delta_bias, delta_weight)
    if torch.compiler.is_compiling() or not needs_backward(*tensors):
        projected = project(u, weight, separate_inputs, A.shape[-1])  # compilers decide themselves what they keep
        B, C, delta, _ = _split(projected, A, delta_weight)
        options = dict(orders=orders, delta_weight=delta_weight, backend=backend)
        return selective_scan(u, delta, A, B, C, D, delta_bias, **options)
    return _ProjectedScan.apply(*tensors, tuple(orders), separate_inputs, backend)


def _split(projected: Tensor, A: Tensor, delta_weight: Tensor) -> tuple[Tensor, ...]:
    """B, C, delta, and the room after them."""
    n, rank = A.shape[-1], delta_weight.shape[-1]
    return projected.split((n, n, rank, projected.shape[-1] - 2 * n - rank), dim=-1)


class _ProjectedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, weight, A, D, delta_bias, delta_weight, orders, separate_inputs, backend):
        B, C, delta, _ = _split(project(u, weight, separate_inputs, A.shape[-1]), A, delta_weight)
        operands = (u, delta, A, B, C, D, delta_bias)
        y, starts, ctx.scan_backward = selective_scan_with_backward(*operands, orders, delta_weight, backend)
        ctx.separate_inputs, ctx.autocast = separate_inputs, autocast_dtype(u)
        ctx.save_for_backward(u, weight, A, D, delta_bias, delta_weight, starts)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        u, weight, A, D, delta_bias, delta_weight, starts = ctx.saved_tensors
        inputs = [t.detach().requires_grad_() for t in (u, weight)]
        autocast = torch.autocast(u.device.type, dtype=ctx.autocast, enabled=ctx.autocast is not None)
        with torch.enable_grad(), autocast:
            projected = project(*inputs, ctx.separate_inputs, A.shape[-1])
        B, C, delta, _ = _split(projected.detach(), A, delta_weight)
        grad_projected = torch.empty(projected.shape, dtype=projected.dtype, device=u.device)
        *grads, room = _split(grad_projected, A, delta_weight)
        room.zero_()
        operands = (u, delta, A, B, C, D, delta_bias, delta_weight)
        grad_u, grad_A, grad_D, grad_bias, grad_delta_weight = ctx.scan_backward(grad_y, starts, operands, *grads)
        grad_projected_u, grad_weight = torch.autograd.grad(projected, inputs, grad_projected)
        gradients = (grad_u + grad_projected_u, grad_weight, grad_A, grad_D, grad_bias, grad_delta_weight)
        return *gradients, None, None, None
