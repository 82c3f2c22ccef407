"""Around the Triton scan: step sizes, the gradients of their low-rank factors, sums over directions or parts."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_math import INTERPRETED, LN2, LOG2E, exp2, launch


@triton.jit
def _softplus(x, FAST: tl.constexpr):
    """To float32's accuracy, or to 1e-5 with one instruction for the logarithm."""
    ex = exp2(tl.minimum(x, 20.0) * LOG2E, FAST)
    small = ex * (1.0 - ex * (0.5 - ex * 0.33333334))  # log1p, where 1 + ex would lose ex's digits
    if FAST:
        large = LN2 * tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + ex], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        large = tl.log(1.0 + ex)
    return tl.where(x > 20.0, x, tl.where(ex < 0.03, small, large))


@triton.jit
def _step_size_kernel(
    delta_ptr, weight_ptr, bias_ptr, dt_ptr, rows, K, E, RANK, delta_row, delta_k,
    SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """dt (rows, K, E) = softplus(delta weight^T + bias); R is 0 where delta is full, or RANK's room in a product."""
    k = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    e = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (e < E)
    delta_at = delta_ptr + row * delta_row + k * delta_k
    if R == 0:
        x = tl.load(delta_at + e, mask=inside, other=0.0).to(tl.float32)
    elif R == 1:
        weight = tl.load(weight_ptr + k * E + e, mask=e < E, other=0.0).to(tl.float32)
        x = tl.load(delta_at, mask=row < rows, other=0.0).to(tl.float32) * weight
    else:
        r = tl.arange(0, R)
        factor = tl.load(delta_at + r[None, :], mask=(row < rows) & (r[None, :] < RANK), other=0.0)
        weight_at = weight_ptr + (k * E + e) * RANK + r[:, None]
        weight = tl.load(weight_at, mask=(e < E) & (r[:, None] < RANK), other=0.0).to(factor.dtype)
        x = tl.dot(factor, weight, input_precision=PRECISION)
    x += tl.load(bias_ptr + k * E + e, mask=e < E, other=0.0).to(tl.float32)
    if SOFTPLUS:
        x = _softplus(x, FAST)
    tl.store(dt_ptr + (row * K + k) * E + e, x.to(dt_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _factor_gradient_kernel(
    grad_ptr, weight_ptr, out_ptr, rows, K, E, RANK, out_row,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """out (rows, K, RANK), in memory out_row apart, = grad (rows, K, E) weight (K, E, RANK)."""
    k = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    r = tl.arange(0, R)[None, :]
    total = tl.zeros([ROWS, R], dtype=tl.float32)
    for first in range(0, E, BLOCK):
        e = first + tl.arange(0, BLOCK)
        grad_at = grad_ptr + (row * K + k) * E + e[None, :]
        grad = tl.load(grad_at, mask=(row < rows) & (e < E)[None, :], other=0.0)
        weight_at = weight_ptr + (k * E + e[:, None]) * RANK + r
        weight = tl.load(weight_at, mask=(e < E)[:, None] & (r < RANK), other=0.0)
        if R == 1:
            total += tl.sum(grad.to(tl.float32) * tl.trans(weight.to(tl.float32)), axis=1)[:, None]
        else:
            total += tl.dot(grad, weight.to(grad.dtype), input_precision=PRECISION)
    inside = (row < rows) & (r < RANK)
    tl.store(out_ptr + (row * K + k) * out_row + r, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weight_gradient_kernel(
    grad_ptr, factor_ptr, out_ptr, rows, rows_a_part, K, E, RANK, factor_row, factor_k,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """out (parts, K, E, RANK): the sums over a part of the rows of grad (rows, K, E) times factor (rows, K, RANK)."""
    k = tl.program_id(1)
    part = tl.program_id(2).to(tl.int64)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r = tl.arange(0, R)[None, :]
    total = tl.zeros([BLOCK, R], dtype=tl.float32)
    for first in range(0, rows_a_part, ROWS):
        row = part * rows_a_part + first + tl.arange(0, ROWS)[:, None]
        grad_at = grad_ptr + (row * K + k) * E + e[None, :]
        grad = tl.load(grad_at, mask=(row < rows) & (e < E)[None, :], other=0.0)
        factor_at = factor_ptr + row * factor_row + k * factor_k + r
        factor = tl.load(factor_at, mask=(row < rows) & (r < RANK), other=0.0).to(grad.dtype)
        if R == 1:
            total += tl.sum(grad.to(tl.float32) * factor.to(tl.float32), axis=0)[:, None]
        else:
            total += tl.dot(tl.trans(grad), factor, input_precision=PRECISION)
    out_at = out_ptr + ((part * K + k) * E + e[:, None]) * RANK + r
    tl.store(out_at, total, mask=(e < E)[:, None] & (r < RANK))


@triton.jit
def _sum_kernel(
    x_ptr, out_ptr, parts, rows, E, part_stride, row_stride, out_row, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (e < E)
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    at = x_ptr + row * row_stride + e
    for _ in range(parts):
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        at += part_stride
    tl.store(out_ptr + row * out_row + e, total.to(out_ptr.dtype.element_ty), mask=inside)


def _block(features: int) -> int:
    """A power of 2 from 16 to 256 that leaves as little as possible of the last block empty."""
    return min(max(features & -features, 16), 256)


def _sum(x: Tensor, out: Tensor, parts: int, rows: int, E: int, part_stride: int, row_stride: int, out_row: int):
    block = _block(E)
    rows_a_program = 2048 // block
    grid = (-(-rows // rows_a_program), -(-E // block))
    arguments = (x, out, parts, rows, E, part_stride, row_stride, out_row)
    launch(_sum_kernel, grid, arguments, ROWS=rows_a_program, BLOCK=block, num_warps=4)


def sum_lanes(x: Tensor) -> Tensor:
    """(batch, L, K, E), contiguous -> (batch, L, E), in x's dtype, added in float32."""
    batch, length, lanes, features = x.shape
    out = torch.empty(batch, length, features, dtype=x.dtype, device=x.device)
    _sum(x, out, lanes, batch * length, features, features, lanes * features, features)
    return out


def sum_blocks(x: Tensor, out: Tensor) -> None:
    """(blocks, batch, L, K, N), contiguous, summed into out (batch, L, K, N), which may have room between its rows."""
    rows, n = x[0].numel() // x.shape[-1], x.shape[-1]
    _sum(x, out, x.shape[0], rows, n, rows * n, n, out.stride(-2))


def _as_rows(factor: Tensor) -> Tensor:
    """(batch, L, K, R), copied only where batch and L do not make one dimension of rows."""
    batch, length = factor.shape[:2]
    rows = factor.stride(-1) == 1 and (batch == 1 or factor.stride(0) == length * factor.stride(1))
    return factor if rows else factor.contiguous()


@functools.lru_cache(None)
def _room(rank: int) -> int:
    """The width of a block for factors of this rank: products want 16 at least."""
    return rank if rank < 2 else max(triton.next_power_of_2(rank), 16)


def _precision(t: Tensor) -> str | None:
    return "ieee" if t.dtype == torch.float32 else None


def step_sizes(delta: Tensor, weight: Tensor, bias: Tensor, softplus: bool, dtype: torch.dtype) -> Tensor:
    """softplus(delta weight^T + bias), (batch, L, K, E), contiguous.

    bfloat16 where `dtype`, that of the activations, is: they have lost what it would lose. In float16 small steps
    would vanish.

    Args:
        delta: (batch, L, K, R) with weight (K, E, R), or (batch, L, K, E) with an empty weight.
        bias: (K, E).
    """
    delta = _as_rows(delta)
    batch, length, lanes, _ = delta.shape
    features = bias.shape[-1]
    rank = weight.shape[-1] if weight.numel() else 0
    half = dtype == torch.bfloat16
    dt = torch.empty(batch, length, lanes, features, dtype=dtype if half else torch.float32, device=delta.device)
    block = _block(features)
    rows = 4096 // block
    sizes = (batch * length, lanes, features, rank, delta.stride(1), delta.stride(2))
    launch(
        _step_size_kernel, (-(-batch * length // rows), lanes, -(-features // block)),
        (delta, weight.contiguous(), bias, dt, *sizes), SOFTPLUS=softplus, PRECISION=_precision(delta),
        FAST=half and not INTERPRETED, ROWS=rows, BLOCK=block, R=_room(rank), num_warps=4,
    )  # fmt: skip
    return dt


def step_sizes_backward(grad: Tensor, factor: Tensor, weight: Tensor, grad_factor: Tensor) -> Tensor:
    """From the gradient (batch, L, K, E), contiguous, of factor weight^T those of factor (batch, L, K, R), written to
    grad_factor, which may have room between its rows, and of weight (K, E, R), returned in float32."""
    factor, weight = _as_rows(factor), weight.contiguous()
    batch, length, lanes, rank = factor.shape
    features = weight.shape[1]
    rows = batch * length
    block = min(_block(features), 64)
    options = dict(PRECISION=_precision(grad), ROWS=64, BLOCK=block, R=_room(rank), num_warps=4)
    blocks = triton.cdiv(features, block)
    parts = max(min(2048 // (blocks * lanes), rows // 256), 1)  # enough programs to fill a GPU
    rows_a_part = triton.cdiv(rows, parts * 64) * 64
    grad_weight = torch.empty(parts, lanes, features, rank, dtype=torch.float32, device=grad.device)
    arguments = (grad, weight, grad_factor, rows, lanes, features, rank, grad_factor.stride(-2))
    launch(_factor_gradient_kernel, (triton.cdiv(rows, 64), lanes), arguments, **options)
    arguments = (grad, factor, grad_weight, rows, rows_a_part, lanes, features, rank, *factor.stride()[1:3])
    launch(_weight_gradient_kernel, (blocks, lanes, parts), arguments, **options)
    return grad_weight.sum(0)
