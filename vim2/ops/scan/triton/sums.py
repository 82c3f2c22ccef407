"""Sums of parts that the scan's programs have written one beside another: of directions, and of blocks of channels."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_launch import MAX_LAUNCHES, Launch, column_block


@triton.jit(do_not_specialize=["parts", "rows"])
def _sum_kernel(
    x_ptr, out_ptr,
    parts, rows, E,  # of x, whose parts are summed
    part_stride, row_stride, out_row,  # of x between parts and between rows, of the result between rows
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (rows, E) = the sum over x's parts (rows, E), in float32."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (e < E)
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    at = x_ptr + row * row_stride + e
    for _ in range(parts):
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        at += part_stride
    tl.store(out_ptr + row * out_row + e, total.to(out_ptr.dtype.element_ty), mask=inside)


@functools.lru_cache(MAX_LAUNCHES)
def _sum(parts: int, rows: int, E: int, part_stride: int, row_stride: int, out_row: int) -> Launch:
    block = column_block(E)
    rows_a_program = 2048 // block
    grid = (-(-rows // rows_a_program), -(-E // block))
    numbers = (parts, rows, E, part_stride, row_stride, out_row)
    return Launch(_sum_kernel, grid, numbers, ROWS=rows_a_program, BLOCK=block, num_warps=4)


def sum_directions(x: Tensor) -> Tensor:
    """(batch, L, K, E), contiguous -> (batch, L, E), in x's dtype, added in float32."""
    batch, length, directions, features = x.shape
    if directions == 1:
        return x.squeeze(2)
    out = torch.empty(batch, length, features, dtype=x.dtype, device=x.device)
    _sum(directions, batch * length, features, features, directions * features, features)(x, out)
    return out


def sum_blocks(x: Tensor, out: Tensor) -> None:
    """(blocks, batch, L, K, N), contiguous, summed into out (batch, L, K, N), which may have room between its rows."""
    rows, n = x[0].numel() // x.shape[-1], x.shape[-1]
    _sum(x.shape[0], rows, n, rows * n, n, out.stride(-2))(x, out)
