"""The selective scan with B, C and delta projected from its input: S6. The projections, in the channel mixer five times
as large as the input, are not kept for the backward pass, which computes them again."""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import autocast_dtype
from .selective_scan import selective_scan, selective_scan_with_backward


def project(u: Tensor, weight: Tensor, separate_inputs: bool, dt_rank: int, d_state: int) -> tuple[Tensor, ...]:
    """B, C and delta's low-rank factor for all directions, by products on the map as it lies.

    Args:
        u: (batch, *spatial, E), or (batch, *spatial, K, E) with separate_inputs.
        weight: (K, R + 2 N, E), rows in VMamba's order: delta, B, C.

    Returns:
        B and C (batch, *spatial, K, N), delta (batch, *spatial, K, R).
    """
    lanes, rows, _ = weight.shape
    # B and C first, and on GPUs rows padded to a multiple of 8: kernels read them in whole 16-byte words
    weight = weight.roll(-dt_rank, dims=1)
    padding = -rows % 8 if u.is_cuda else 0
    weight = F.pad(weight, (0, 0, 0, padding))
    if not separate_inputs:
        projected = F.linear(u, weight.flatten(0, 1)).unflatten(-1, (lanes, -1))
    elif u.is_cuda:  # one wide product, mostly of zeros, where a batch of thin ones would be slow
        projected = F.linear(u.flatten(-2), torch.block_diag(*weight)).unflatten(-1, (lanes, -1))
    else:
        projected = torch.einsum("...ke,kce->...kc", u, weight)
    return projected.split((d_state, d_state, dt_rank, padding), dim=-1)[:3]


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
    project_u = functools.partial(
        project, separate_inputs=separate_inputs, dt_rank=delta_weight.shape[-1], d_state=A.shape[-1]
    )
    tensors = (u, weight, A, D, delta_bias, delta_weight)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        B, C, delta = project_u(u, weight)  # compilers decide themselves what they keep
        options = dict(orders=orders, delta_weight=delta_weight, backend=backend)
        return selective_scan(u, delta, A, B, C, D, delta_bias, **options)
    return _ProjectedScan.apply(*tensors, project_u, orders, backend)


class _ProjectedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, weight, A, D, delta_bias, delta_weight, project_u, orders, backend):
        B, C, delta = project_u(u, weight)
        operands = (u, delta, A, B, C, D, delta_bias)
        y, starts, ctx.scan_backward = selective_scan_with_backward(*operands, orders, delta_weight, backend)
        ctx.project_u, ctx.autocast = project_u, autocast_dtype(u)
        ctx.save_for_backward(u, weight, A, D, delta_bias, delta_weight, starts)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        u, weight, A, D, delta_bias, delta_weight, starts = ctx.saved_tensors
        inputs = [t.detach().requires_grad_() for t in (u, weight)]
        autocast = torch.autocast(u.device.type, dtype=ctx.autocast, enabled=ctx.autocast is not None)
        with torch.enable_grad(), autocast:
            projections = ctx.project_u(*inputs)
        B, C, delta = (t.detach() for t in projections)
        grads = ctx.scan_backward(grad_y, starts, u, delta, A, B, C, D, delta_bias, delta_weight)
        grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias, grad_delta_weight = grads
        grad_projected_u, grad_weight = torch.autograd.grad(projections, inputs, (grad_B, grad_C, grad_delta))
        return (
            grad_u + grad_projected_u, grad_weight, grad_A, grad_D, grad_bias, grad_delta_weight, None, None, None,
        )  # fmt: skip
