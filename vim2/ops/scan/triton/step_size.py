# ruff: noqa: RUF005  (Triton knows no starred tuples)
"""Around the Triton scan: step sizes, and the gradients of their low-rank factors."""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_launch import INTERPRETED, MAX_LAUNCHES, Launch, column_block, last_axis_contiguous
from ...triton_math import LOG2E, exp2
from ..operands import Operands

MAX_TILES, MIN_PROGRAMS = 8, 2048  # tiles of rows that share a block of the weight, unless that leaves few programs
# Channels of a program of the gradients' kernel, whose sums over rows are in registers, for factors of rank 16 at most,
# and of more; and the sums that it has at most: with as many weights beside them, and a tile of rows, of rank's width,
# it fits into the shared memory of small GPUs, too.
GRADIENT_CHANNELS = {True: 384, False: 192}
GRADIENT_SUMS = 12288


@triton.jit
def softplus(x, FAST: tl.constexpr):
    """To float32's accuracy, or to 1e-5 with a polynomial for the logarithm."""
    if FAST:
        # max(x, 0) + log(1 + e) with e = exp(-|x|) from 0 to 1, where log(1 + e) / e is nearly this polynomial
        ex = exp2(tl.abs(x) * -LOG2E, FAST)
        slope = 0.10122232884 - ex * 0.02386916429
        slope = 0.32520669699 + ex * (-0.21004875004 + ex * slope)
        slope = 0.99999159575 + ex * (-0.49936136603 + ex * slope)
        return tl.maximum(x, 0.0) + ex * slope
    else:
        ex = exp2(tl.minimum(x, 20.0, propagate_nan=tl.PropagateNan.ALL) * LOG2E, FAST)
        small = ex * (1.0 - ex * (0.5 - ex * (0.33333334 - ex * 0.25)))  # log1p, where 1 + ex would lose ex's digits
        return tl.where(x > 20.0, x, tl.where(ex < 0.03, small, tl.log(1.0 + ex)))


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
    # what the program reads of a tile: of full delta its own channels, else all of the factor
    column = e if R == 0 else r[None, :]
    width = E if R == 0 else RANK
    at = delta_ptr + k * delta_k + (row * delta_row + column)
    end = tl.minimum(start + tiles * ROWS, rows)
    ahead = tl.load(at + start * delta_row, mask=(start + row < end) & (column < width), other=0.0)
    for first in range(start, end, ROWS):
        row_in = first + row < end
        factor = ahead
        # the next tile is under way while this one is worked on
        ahead = tl.load(at + (first + ROWS) * delta_row, mask=(first + ROWS + row < end) & (column < width), other=0.0)
        if R > 1:
            x = tl.dot(factor, weight.to(factor.dtype), input_precision=PRECISION)
        elif R == 1:
            x = factor.to(tl.float32) * weight.to(tl.float32)
        else:
            x = factor.to(tl.float32)
        x += bias
        if SOFTPLUS:
            x = softplus(x, FAST)
        dt_at = dt_ptr + (first * K + k) * E + (row * (K * E) + e)
        tl.store(dt_at, x.to(dt_ptr.dtype.element_ty), mask=row_in & (e < E))


@triton.jit(do_not_specialize=["rows", "rows_a_part"])
def _gradients_kernel(
    grad_ptr, weight_ptr, factor_ptr,  # the gradient of the product, and what was multiplied
    gfactor_ptr, gweight_ptr,  # gradients, or parts of them
    rows, rows_a_part,  # positions, of all and of a program
    K, E, RANK,  # directions, channels, and the width of the factors
    factor_row, factor_k,  # strides of the factors between positions and between directions
    out_width, out_row,  # columns to write of the factors' gradient, and the stride between its rows
    PRECISION: tl.constexpr, WORD: tl.constexpr,  # divides these two
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,  # positions and channels of a tile, and tiles
    R: tl.constexpr, OUT: tl.constexpr,  # room for RANK in a product, and for out_width
):  # fmt: skip
    """For some blocks of channels and a part of the rows of grad (rows, K, E), which is read once:

    gfactor (groups, rows, K, RANK), rows out_row apart, = grad weight (K, E, RANK), and zero from RANK to out_width;
    gweight (parts, K, E, RANK) = the sums over rows of grad times factor (rows, K, RANK).
    """
    out_width = out_width // WORD * WORD  # so that Triton, too, knows it, and stores whole words
    out_row = out_row // WORD * WORD
    k = tl.program_id(1)
    part = tl.program_id(2).to(tl.int64)
    group = tl.program_id(0)
    row = tl.arange(0, ROWS)[:, None]
    r = tl.arange(0, R) if R > 1 else tl.arange(0, 1)
    out = tl.arange(0, OUT)[None, :]
    weights = ()
    totals = ()
    for i in tl.static_range(BLOCKS):
        e = (group * BLOCKS + i) * BLOCK + tl.arange(0, BLOCK)
        if R > 1:
            weight_at = weight_ptr + (k * E + e[:, None]) * RANK + r[None, :]
            weight = tl.load(weight_at, mask=(e < E)[:, None] & (r < RANK)[None, :], other=0.0)
            weights = weights + (weight.to(grad_ptr.dtype.element_ty),)
            totals = totals + (tl.zeros([BLOCK, R], dtype=tl.float32),)
        else:
            weights = weights + (tl.load(weight_ptr + k * E + e, mask=e < E, other=0.0).to(tl.float32)[None, :],)
            totals = totals + (tl.zeros([ROWS, BLOCK], dtype=tl.float32),)
    start = part * rows_a_part
    gfactor_at = gfactor_ptr + (group.to(tl.int64) * rows * K + k) * out_row
    for first in range(start, tl.minimum(start + rows_a_part, rows), ROWS):
        row_in = first + row < rows
        factor_at = factor_ptr + first * factor_row + k * factor_k + row * factor_row + r[None, :]
        factor = tl.load(factor_at, mask=row_in & (r < RANK)[None, :], other=0.0)
        grad_at = grad_ptr + (first * K + k) * E + row * (K * E)
        gfactor = tl.zeros([ROWS, R], dtype=tl.float32)
        new = ()
        for i in tl.static_range(BLOCKS):
            column = (group * BLOCKS + i) * BLOCK + tl.arange(0, BLOCK)[None, :]
            grad = tl.load(grad_at + column, mask=row_in & (column < E), other=0.0)
            if R > 1:
                gfactor += tl.dot(grad, weights[i], input_precision=PRECISION)
                new = new + (totals[i] + tl.dot(tl.trans(grad), factor.to(grad.dtype), input_precision=PRECISION),)
            else:
                wide = grad.to(tl.float32)
                gfactor += tl.sum(wide * weights[i], axis=1)[:, None]
                new = new + (totals[i] + wide * factor.to(tl.float32),)
        totals = new
        result = gfactor if R > 1 else tl.where(out == 0, gfactor, 0.0)
        out_at = gfactor_at + first * K * out_row + row * (K * out_row) + out
        tl.store(out_at, result.to(gfactor_ptr.dtype.element_ty), mask=row_in & (out < out_width))
    for i in tl.static_range(BLOCKS):
        column = (group * BLOCKS + i) * BLOCK + tl.arange(0, BLOCK)[:, None]
        at = gweight_ptr + ((part * K + k) * E + column) * RANK + r[None, :]
        total = totals[i] if R > 1 else tl.sum(totals[i], axis=0)[:, None]
        tl.store(at, total, mask=(column < E) & (r < RANK)[None, :])


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
    block = min(column_block(features), 128)
    rows = max((2048 if block > 16 else 1024) // block, 16)
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
    features, width = weight.shape[1], grad_factor.shape[-1]
    sizes = (batch * length, directions, features, rank, width)
    plan = _backward(*sizes, grad_factor.stride(-2), *factor.stride()[1:3], grad.itemsize, _precision(grad))
    grad_weight = torch.empty(plan.parts, directions, features, rank, dtype=torch.float32, device=grad.device)
    part_factor = grad_factor
    if plan.groups > 1:
        shape = plan.groups, *grad_factor.shape
        part_factor = torch.empty(shape, dtype=grad_factor.dtype, device=grad.device)
    plan.launch(grad, weight, factor, part_factor, grad_weight)
    if plan.groups > 1:
        torch.sum(part_factor, 0, out=grad_factor)
    return grad_weight.sum(0) if plan.parts > 1 else grad_weight.squeeze(0)


class _Backward(NamedTuple):
    """How gradients are made.

    Attributes:
        groups: Of channels, whose parts of the factors' gradient are summed.
        parts: Of the weight's gradient, which are summed.
    """

    groups: int
    parts: int
    launch: Launch


@functools.lru_cache(MAX_LAUNCHES)
def _backward(
    rows: int, directions: int, features: int, rank: int, width: int, out_row: int, factor_l: int, factor_k: int,
    itemsize: int, precision: str | None,
) -> _Backward:  # fmt: skip
    out = triton.next_power_of_2(width)
    block = min(column_block(features), 64)
    if rank == 1:
        room, blocks, tile_rows, programs = 1, 1, 512 // itemsize, 4096
    else:
        room = out = max(out, 16)
        tile_rows, programs = (128 if room <= 64 else 64) // itemsize, 512
        channels = min(GRADIENT_CHANNELS[room == 16], GRADIENT_SUMS // room)
        blocks = min(triton.cdiv(features, block), max(channels // block, 1))
    groups = triton.cdiv(features, block * blocks)
    parts = max(min(programs // (groups * directions), rows // 256), 1)
    rows_a_part = triton.cdiv(rows, parts * tile_rows) * tile_rows
    parts = triton.cdiv(rows, rows_a_part)
    out_row = out_row if groups == 1 else width
    launch = Launch(
        _gradients_kernel, (groups, directions, parts),
        (rows, rows_a_part, directions, features, rank, factor_l, factor_k, width, out_row),
        PRECISION=precision, WORD=math.gcd(width, out_row, 8), ROWS=tile_rows, BLOCK=block, BLOCKS=blocks, R=room,
        OUT=out, num_warps=4, num_stages=2,
    )  # fmt: skip
    return _Backward(groups, parts, launch)


def kernel_inputs(operands: Operands, delta_softplus: bool, *, make_steps: bool = True) -> tuple[Tensor, ...]:
    """What the scan's kernels read.

    Args:
        make_steps: Whether step sizes are made here; else the kernel does it, with `delta_weight` and `delta_bias`.

    Returns:
        u, with neighbouring channels next to one another in memory; the step sizes (batch, L, K, E), or delta as it is
        without make_steps; A as (K, N, E); B and C, with neighbouring states next to one another; and D.
    """
    u, B, C = last_axis_contiguous(operands.u, operands.B, operands.C)
    At, D = operands.A.transpose(1, 2).contiguous(), operands.D.contiguous()
    dt = operands.delta
    if make_steps:
        dt = step_sizes(dt, operands.delta_weight, operands.delta_bias.contiguous(), delta_softplus, u.dtype)
    return u, dt, At, B, C, D
