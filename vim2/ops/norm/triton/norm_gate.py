"""The gate behind a scan, with its LayerNorm, in Triton. `../norm_gate.py` says what it computes."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_launch import MAX_LAUNCHES, Launch
from ...triton_math import sigmoid
from ...triton_sums import summed
from .tiles import (
    as_rows,
    backward_programs,
    contiguous,
    empty_statistics,
    forward_programs,
    norm_gradient,
    norm_rows,
    row_tile,
    store_norm_parts,
    summing_tile,
)

BACKWARD_PROGRAMS = 6  # a multiprocessor, without norm
BACKWARD_ELEMENTS = 16  # a thread, likewise


@triton.jit(do_not_specialize=["rows", "keeps"])
def _norm_gate_kernel(
    y_ptr, gate_ptr, weight_ptr, bias_ptr, out_ptr, statistics_ptr, total_ptr,
    rows, keeps,  # rows of the result, and whether the sums are to be written
    E, gate_stride,  # the stride is between rows of the gate
    P,  # channels of a group, whose directions lie side by side in y
    eps,
    NORM: tl.constexpr, K: tl.constexpr,  # with a norm; directions
    BLOCK_ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Rows of y are (E / P, K, P), to be summed over K. Statistics are written where there is a norm, and the sums
    where there is a pointer for them and `keeps` is not 0."""
    r = tl.arange(0, BLOCK_ROWS)
    e = tl.arange(0, BLOCK_E)[None, :]
    column_in = e < E
    if NORM:
        weight = tl.load(weight_ptr + e, mask=column_in, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + e, mask=column_in, other=0.0).to(tl.float32)
    in_y = r[:, None] * (K * E) + (e if K == 1 else e // P * (K * P) + e % P)
    start = tl.program_id(0).to(tl.int64) * BLOCK_ROWS  # rows in 64 bits, offsets in the tile in 32
    for first in range(start, rows, tl.num_programs(0) * BLOCK_ROWS):
        row_in = first + r < rows
        tile_in = row_in[:, None] & column_in
        in_tile = r[:, None] * E + e
        y_at = y_ptr + first * (K * E) + in_y
        y = tl.load(y_at, mask=tile_in, other=0.0).to(tl.float32)
        for k in tl.static_range(1, K):
            y += tl.load(y_at + k * P, mask=tile_in, other=0.0).to(tl.float32)
        if total_ptr is not None:
            wanted = tl.zeros([1, 1], tl.int32) + keeps > 0  # a block of one, which masks can be combined with
            tl.store(total_ptr + first * E + in_tile, y.to(total_ptr.dtype.element_ty), mask=tile_in & wanted)
        gate_at = gate_ptr + first * gate_stride + (r[:, None] * gate_stride + e)
        gate = tl.load(gate_at, mask=tile_in, other=0.0).to(tl.float32)
        if NORM:
            y, mean, rstd = norm_rows(y, weight, bias, column_in, E, eps)
            tl.store(statistics_ptr + first + r, mean, mask=row_in)
            tl.store(statistics_ptr + rows + first + r, rstd, mask=row_in)
        out = y * (gate * sigmoid(gate, False))
        tl.store(out_ptr + first * E + in_tile, out.to(out_ptr.dtype.element_ty), mask=tile_in)


@triton.jit(do_not_specialize=["rows"])
def _norm_gate_backward_kernel(
    grad_ptr, y_ptr, gate_ptr, weight_ptr, bias_ptr, statistics_ptr, gy_ptr, ggate_ptr, gnorm_ptr,
    rows, E, gate_stride, ggate_stride,
    NORM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """gnorm: (programs, 2, E), parts of the gradients of the norm's weight and bias."""
    r = tl.arange(0, BLOCK_ROWS)
    e = tl.arange(0, BLOCK_E)[None, :]
    column_in = e < E
    if NORM:
        weight = tl.load(weight_ptr + e, mask=column_in, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + e, mask=column_in, other=0.0).to(tl.float32)
    gweight = tl.zeros([BLOCK_ROWS, BLOCK_E], tl.float32)
    gbias = tl.zeros([BLOCK_ROWS, BLOCK_E], tl.float32)
    start = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    for first in range(start, rows, tl.num_programs(0) * BLOCK_ROWS):
        row_in = first + r < rows
        tile_in = row_in[:, None] & column_in
        in_tile = r[:, None] * E + e
        grad = tl.load(grad_ptr + first * E + in_tile, mask=tile_in, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + first * E + in_tile, mask=tile_in, other=0.0).to(tl.float32)
        gate_at = gate_ptr + first * gate_stride + (r[:, None] * gate_stride + e)
        gate = tl.load(gate_at, mask=tile_in, other=0.0).to(tl.float32)
        opening = sigmoid(gate, False)
        gy = grad * (gate * opening)
        if NORM:
            mean = tl.load(statistics_ptr + first + r, mask=row_in, other=0.0)
            rstd = tl.load(statistics_ptr + rows + first + r, mask=row_in, other=0.0)
            x_hat = tl.where(column_in, (y - mean[:, None]) * rstd[:, None], 0.0)
            y = x_hat * weight + bias
            gweight += gy * x_hat
            gbias += gy
            gy = norm_gradient(gy, x_hat, rstd, weight, E)
        ggate = grad * y * (opening * (1.0 + gate * (1.0 - opening)))
        tl.store(gy_ptr + first * E + in_tile, gy.to(gy_ptr.dtype.element_ty), mask=tile_in)
        ggate_at = ggate_ptr + first * ggate_stride + (r[:, None] * ggate_stride + e)
        tl.store(ggate_at, ggate.to(ggate_ptr.dtype.element_ty), mask=tile_in)
    if NORM:
        store_norm_parts(gnorm_ptr, gweight, gbias, E, BLOCK_E)


def norm_gate_triton(
    y: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype, keeps: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns also, if it `keeps` that, mean and reciprocal deviation of the rows, (2, ...), where there is a norm, and
    y's sum over directions, where there are some."""
    directions, patch = y.shape[-2:] if y.dim() > gate.dim() else (1, gate.shape[-1])
    y, gate_rows = y.contiguous(), as_rows(gate)
    weight, bias = contiguous(weight, bias)
    rows, width = gate_rows.shape
    out = torch.empty(gate.shape, dtype=dtype, device=y.device)
    sums, norm = y.dim() > gate.dim(), weight is not None
    total = torch.empty(gate.shape, dtype=y.dtype, device=y.device) if keeps and sums else None
    statistics = empty_statistics(out) if norm else None
    if rows:
        launch = _forward(y.device, rows, keeps, width, gate_rows.stride(0), patch, eps, norm, directions)
        # training and inference have one kernel: it is told whether to write sums, and writes statistics in any case
        launch(y, gate_rows, weight, bias, out, statistics, total if keeps or not sums else out)
    return out, statistics if keeps else None, total


@functools.lru_cache(MAX_LAUNCHES)
def _forward(
    device: torch.device, rows: int, keeps: bool, width: int, gate_stride: int, patch: int, eps: float, norm: bool,
    directions: int,
) -> Launch:  # fmt: skip
    tile = row_tile(width, 16)
    grid = (forward_programs(rows, tile, device),)
    numbers = (rows, int(keeps), width, gate_stride, patch, eps)
    return Launch(_norm_gate_kernel, grid, numbers, NORM=norm, K=directions, **tile)


def norm_gate_triton_backward(
    grad: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    grad_gate: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for y, gate, and weight and bias together, (2, E) in float32, (2, 0) without a norm.

    Args:
        grad_gate: Where the second of them is written: in a new tensor, or in this one of gate's shape and dtype, which
            may have room between its rows, all as wide.
    """
    grad, y, gate_rows = grad.contiguous(), y.contiguous(), as_rows(gate)
    weight, bias = contiguous(weight, bias)
    rows, width = gate_rows.shape
    grad_y = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if grad_gate is None:
        grad_gate = torch.empty(gate.shape, dtype=gate.dtype, device=y.device)
    norm = weight is not None
    programs, launch = _backward(y.device, rows, width, gate_rows.stride(0), as_rows(grad_gate).stride(0), norm)
    parts = torch.empty(programs, 2, width, dtype=torch.float32, device=y.device) if norm else None
    if rows:
        launch(grad, y, gate_rows, weight, bias, statistics if norm else None, grad_y, grad_gate, parts)
    return grad_y, grad_gate, summed(parts) if norm else statistics.new_empty(2, 0)


@functools.lru_cache(MAX_LAUNCHES)
def _backward(
    device: torch.device, rows: int, width: int, gate_stride: int, ggate_stride: int, norm: bool
) -> tuple[int, Launch]:
    """Also the number of programs."""
    tile, per_multiprocessor = summing_tile(width) if norm else (row_tile(width, BACKWARD_ELEMENTS), BACKWARD_PROGRAMS)
    programs = backward_programs(rows, tile, device, per_multiprocessor)
    numbers = (rows, width, gate_stride, ggate_stride)
    return programs, Launch(_norm_gate_backward_kernel, (programs,), numbers, NORM=norm, **tile)
