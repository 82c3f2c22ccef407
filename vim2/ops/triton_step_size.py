"""Around the Triton scan: step sizes, the gradients of their low-rank factors, sums over directions or parts."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_math import INTERPRETED, LN2, LOG2E, exp2, launch

MAX_TILES, MIN_PROGRAMS = 8, 8192  # tiles of rows that share a block of the weight, unless that leaves few programs


@triton.jit
def _softplus(x, FAST: tl.constexpr):
    """To float32's accuracy, or to 1e-5 with one instruction for the logarithm."""
    ex = exp2(tl.minimum(x, 20.0, propagate_nan=tl.PropagateNan.ALL) * LOG2E, FAST)
    last = 0.33333334 if FAST else 0.33333334 - ex * 0.25
    small = ex * (1.0 - ex * (0.5 - ex * last))  # log1p, where 1 + ex would lose ex's digits
    if FAST:
        large = LN2 * tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + ex], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        large = tl.log(1.0 + ex)
    return tl.where(x > 20.0, x, tl.where(ex < 0.03, small, large))


@triton.jit(do_not_specialize=["rows", "tiles"])
def _step_size_kernel(
    delta_ptr, weight_ptr, bias_ptr, dt_ptr, rows, tiles, K, E, RANK, delta_row, delta_k,
    SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """dt (rows, K, E) = softplus(delta weight^T + bias), for some tiles of rows, with one block of the weight.

    R is 0 where delta is full, or RANK's room in a product.
    """
    blocks = tl.cdiv(E, BLOCK)
    k = tl.program_id(0) % (K * blocks) // blocks
    e = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    bias = tl.load(bias_ptr + k * E + e, mask=e < E, other=0.0).to(tl.float32)
    r = tl.arange(0, R) if R > 1 else tl.arange(0, 1)
    if R > 0:
        weight_at = weight_ptr + (k * E + e) * RANK + r[:, None]
        weight = tl.load(weight_at, mask=(e < E) & (r[:, None] < RANK), other=0.0)
    start = (tl.program_id(0) // (K * blocks)).to(tl.int64) * (tiles * ROWS)
    for first in range(start, tl.minimum(start + tiles * ROWS, rows), ROWS):
        row_in = first + row < rows
        delta_at = delta_ptr + (first * delta_row + k * delta_k)
        if R == 0:
            x = tl.load(delta_at + (row * delta_row + e), mask=row_in & (e < E), other=0.0).to(tl.float32)
        else:
            factor = tl.load(delta_at + (row * delta_row + r[None, :]), mask=row_in & (r[None, :] < RANK), other=0.0)
            if R == 1:
                x = factor.to(tl.float32) * weight.to(tl.float32)
            else:
                x = tl.dot(factor, weight.to(factor.dtype), input_precision=PRECISION)
        x += bias
        if SOFTPLUS:
            x = _softplus(x, FAST)
        dt_at = dt_ptr + (first * K + k) * E + (row * (K * E) + e)
        tl.store(dt_at, x.to(dt_ptr.dtype.element_ty), mask=row_in & (e < E))


@triton.jit(do_not_specialize=["rows"])
def _factor_gradient_kernel(
    grad_ptr, weight_ptr, out_ptr, rows, K, E, RANK, out_width, out_row,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """out (rows, K, RANK), in memory out_row apart, = grad (rows, K, E) weight (K, E, RANK), and zero from RANK to
    out_width."""
    k = tl.program_id(0) % K
    first = (tl.program_id(0) // K).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    row_in = first + row < rows
    r = tl.arange(0, R)[None, :]
    total = tl.zeros([ROWS, R], dtype=tl.float32)
    grad_at = grad_ptr + (first * K + k) * E + row * (K * E)
    for start in range(0, E, BLOCK):
        e = start + tl.arange(0, BLOCK)
        grad = tl.load(grad_at + e[None, :], mask=row_in & (e < E)[None, :], other=0.0)
        weight_at = weight_ptr + (k * E + e[:, None]) * RANK + r
        weight = tl.load(weight_at, mask=(e < E)[:, None] & (r < RANK), other=0.0)
        total += tl.dot(grad, weight.to(grad.dtype), input_precision=PRECISION)
    out_at = out_ptr + (first * K + k) * out_row + row * (K * out_row) + r
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=row_in & (r < out_width))


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
    if lanes == 1:
        return x.squeeze(2)
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
    near = factor.stride(1) < 2**22  # offsets in a tile of rows have 32 bits
    return factor if rows and near else factor.contiguous()


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
    rows = max(2048 // block, 16)
    blocks = lanes * triton.cdiv(features, block)
    tiles = min(max(blocks * triton.cdiv(batch * length, rows) // MIN_PROGRAMS, 1), MAX_TILES)
    sizes = (batch * length, tiles, lanes, features, rank, delta.stride(1), delta.stride(2))
    launch(
        _step_size_kernel, (blocks * triton.cdiv(batch * length, rows * tiles),),
        (delta, weight.contiguous(), bias, dt, *sizes), SOFTPLUS=softplus, PRECISION=_precision(delta),
        FAST=half and not INTERPRETED, ROWS=rows, BLOCK=block, R=_room(rank), num_warps=4,
    )  # fmt: skip
    return dt


def step_sizes_backward(grad: Tensor, factor: Tensor, weight: Tensor, grad_factor: Tensor) -> Tensor:
    """From the gradient (batch, L, K, E), contiguous, of factor weight^T those of factor (batch, L, K, R), written to
    grad_factor, which may be wider than R (the rest is zeroed) and have room between its rows, and of weight (K, E, R),
    returned in float32."""
    factor, weight = _as_rows(factor), weight.contiguous()
    batch, length, lanes, rank = factor.shape
    features = weight.shape[1]
    rows = batch * length
    block = min(_block(features), 64)
    width = grad_factor.shape[-1]
    tile_rows = 512 // grad.element_size()  # two stages of them fit in the shared memory of any GPU
    blocks = triton.cdiv(features, block)
    parts = max(min(2048 // (blocks * lanes), rows // 256), 1)  # enough programs to fill a GPU
    rows_a_part = triton.cdiv(rows, parts * 64) * 64
    grad_weight = torch.empty(parts, lanes, features, rank, dtype=torch.float32, device=grad.device)
    launch(
        _factor_gradient_kernel, (lanes * triton.cdiv(rows, tile_rows),),
        (grad, weight, grad_factor, rows, lanes, features, rank, width, grad_factor.stride(-2)),
        PRECISION=_precision(grad), ROWS=tile_rows, BLOCK=block, R=max(triton.next_power_of_2(width), 16),
        num_warps=8, num_stages=2,
    )  # fmt: skip
    launch(
        _weight_gradient_kernel, (blocks, lanes, parts),
        (grad, factor, grad_weight, rows, rows_a_part, lanes, features, rank, *factor.stride()[1:3]),
        PRECISION=_precision(grad), ROWS=64, BLOCK=block, R=_room(rank), num_warps=4,
    )  # fmt: skip
    return grad_weight.sum(0)
