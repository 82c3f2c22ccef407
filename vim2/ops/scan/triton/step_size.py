"""Around the Triton scan: step sizes, and the gradients of their low-rank factors."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_launch import INTERPRETED, MAX_LAUNCHES, Launch, column_block, last_axis_contiguous
from ...triton_math import LN2, LOG2E, exp2
from ..operands import Operands

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
    delta_ptr, weight_ptr, bias_ptr, dt_ptr,  # operands, and the result
    rows, tiles,  # positions of all sequences, and tiles of them that a program takes
    K, E, RANK,  # directions, channels, and the width of delta's factors
    delta_row, delta_k,  # strides of delta between positions and between directions
    SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,  # and NVIDIA's approximate instructions
    ROWS: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr,  # a tile's positions and channels, and RANK's room
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
    grad_ptr, weight_ptr, out_ptr,
    rows, K, E, RANK,  # positions, directions, channels, width of the factors
    out_width, out_row,  # columns to write, and the stride between their rows
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
    grad_ptr, factor_ptr, out_ptr,
    rows, rows_a_part, K, E, RANK,  # positions, of all and of a program, directions, channels, width of the factors
    factor_row, factor_k,  # strides of the factors between positions and between directions
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
    """Of tl.dot: without TF32 for float32; others have no choice."""
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
    batch, length, directions, _ = delta.shape
    features = bias.shape[-1]
    rank = weight.shape[-1] if weight.numel() else 0
    half = dtype == torch.bfloat16
    dt = torch.empty(batch, length, directions, features, dtype=dtype if half else torch.float32, device=delta.device)
    sizes = (batch * length, directions, features, rank, *delta.stride()[1:3])
    _forward(*sizes, softplus, _precision(delta), half and not INTERPRETED)(delta, weight.contiguous(), bias, dt)
    return dt


@functools.lru_cache(MAX_LAUNCHES)
def _forward(
    positions: int, directions: int, features: int, rank: int, delta_l: int, delta_k: int, softplus: bool,
    precision: str | None, fast: bool,
) -> Launch:  # fmt: skip
    block = column_block(features)
    rows = max(2048 // block, 16)
    blocks = directions * triton.cdiv(features, block)
    tiles = min(max(blocks * triton.cdiv(positions, rows) // MIN_PROGRAMS, 1), MAX_TILES)
    return Launch(
        _step_size_kernel, (blocks * triton.cdiv(positions, rows * tiles),),
        (positions, tiles, directions, features, rank, delta_l, delta_k),
        SOFTPLUS=softplus, PRECISION=precision, FAST=fast, ROWS=rows, BLOCK=block, R=_room(rank), num_warps=4,
    )  # fmt: skip


def step_sizes_backward(grad: Tensor, factor: Tensor, weight: Tensor, grad_factor: Tensor) -> Tensor:
    """From the gradient (batch, L, K, E), contiguous, of factor weight^T those of factor (batch, L, K, R), written to
    grad_factor, which may be wider than R (the rest is zeroed) and have room between its rows, and of weight (K, E, R),
    returned in float32."""
    factor, weight = _as_rows(factor), weight.contiguous()
    batch, length, directions, rank = factor.shape
    features = weight.shape[1]
    sizes = (batch * length, directions, features, rank, grad_factor.shape[-1], grad_factor.stride(-2))
    parts, of_factor, of_weight = _backward(*sizes, *factor.stride()[1:3], grad.itemsize, _precision(grad))
    grad_weight = torch.empty(parts, directions, features, rank, dtype=torch.float32, device=grad.device)
    of_factor(grad, weight, grad_factor)
    of_weight(grad, factor, grad_weight)
    return grad_weight.sum(0)


@functools.lru_cache(MAX_LAUNCHES)
def _backward(
    rows: int, directions: int, features: int, rank: int, width: int, out_row: int, factor_l: int, factor_k: int,
    itemsize: int, precision: str | None,
) -> tuple[int, Launch, Launch]:  # fmt: skip
    """Parts of the weight's gradient, and the launches for the factors' gradient and for it."""
    block = min(column_block(features), 64)
    tile_rows = 512 // itemsize  # two stages of them fit in the shared memory of any GPU
    blocks = triton.cdiv(features, block)
    parts = max(min(2048 // (blocks * directions), rows // 256), 1)  # enough programs to fill a GPU
    rows_a_part = triton.cdiv(rows, parts * 64) * 64
    of_factor = Launch(
        _factor_gradient_kernel, (directions * triton.cdiv(rows, tile_rows),),
        (rows, directions, features, rank, width, out_row),
        PRECISION=precision, ROWS=tile_rows, BLOCK=block, R=max(triton.next_power_of_2(width), 16),
        num_warps=8, num_stages=2,
    )  # fmt: skip
    of_weight = Launch(
        _weight_gradient_kernel, (blocks, directions, parts),
        (rows, rows_a_part, directions, features, rank, factor_l, factor_k),
        PRECISION=precision, ROWS=64, BLOCK=block, R=_room(rank), num_warps=4,
    )  # fmt: skip
    return parts, of_factor, of_weight


def kernel_inputs(operands: Operands, delta_softplus: bool) -> tuple[Tensor, ...]:
    """What the scan's kernels read.

    Returns:
        u, with neighbouring channels next to one another in memory; the step sizes (batch, L, K, E); A as (K, N, E); B
        and C, with neighbouring states next to one another; and D.
    """
    u, B, C = last_axis_contiguous(operands.u, operands.B, operands.C)
    At, D, bias = (t.contiguous() for t in (operands.A.transpose(1, 2), operands.D, operands.delta_bias))
    dt = step_sizes(operands.delta, operands.delta_weight, bias, delta_softplus, u.dtype)
    return u, dt, At, B, C, D
