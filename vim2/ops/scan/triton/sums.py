"""Sums of parts that the scan's programs have written one beside another: of directions, and of blocks of channels."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_launch import MAX_LAUNCHES, Launch, column_block


@triton.jit(do_not_specialize=["parts", "rows"])
def _sum_kernel(
    inputs, outputs,  # tuples of pointers
    parts, rows, E,  # of each input x, whose parts are summed
    part_stride, row_stride, out_row,  # of x between parts and between rows, of the result between rows
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (rows, E) = the sum over x's parts (rows, E), in float32, for each input and its output."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (e < E)
    for i in tl.static_range(len(inputs)):
        if tl.program_id(2) == i:
            total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
            at = inputs[i] + row * row_stride + e
            for _ in range(parts):
                total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
                at += part_stride
            tl.store(outputs[i] + row * out_row + e, total.to(outputs[i].dtype.element_ty), mask=inside)


@functools.lru_cache(MAX_LAUNCHES)
def _sum(inputs: int, parts: int, rows: int, E: int, part_stride: int, row_stride: int, out_row: int) -> Launch:
    block = column_block(E)
    rows_a_program = 512 // block
    grid = (-(-rows // rows_a_program), -(-E // block), inputs)
    numbers = (parts, rows, E, part_stride, row_stride, out_row)
    return Launch(_sum_kernel, grid, numbers, ROWS=rows_a_program, BLOCK=block, num_warps=2)


def sum_directions(x: Tensor) -> Tensor:
    """(batch, L, K, E), contiguous -> (batch, L, E), in x's dtype, added in float32."""
    batch, length, directions, features = x.shape
    if directions == 1:
        return x.squeeze(2)
    out = torch.empty(batch, length, features, dtype=x.dtype, device=x.device)
    _sum(1, directions, batch * length, features, features, directions * features, features)((x,), (out,))
    return out


def sum_blocks(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
    """Each input (blocks, batch, L, K, N), contiguous, summed into its output (batch, L, K, N), which may have room
    between its rows. Inputs are alike, and so are outputs."""
    x, out = inputs[0], outputs[0]
    rows, n = x[0].numel() // x.shape[-1], x.shape[-1]
    _sum(len(inputs), x.shape[0], rows, n, rows * n, n, out.stride(-2))(inputs, outputs)
