"""Sums of the parts of gradients that a kernel's programs have written one beside another, in one launch: of PyTorch's
sum, which is one tensor, each parameter's part would have to be copied out."""

import functools

import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import MAX_LAUNCHES, Launch

TILE = 8192  # numbers that a program adds up at once


@triton.jit(do_not_specialize=["parts", "directions", "rows"])
def _sum_parts_kernel(
    parts_ptr, matrix_ptr, vector_ptrs,  # the last a tuple
    parts, directions, rows, E,  # rows of the matrix, without those of the vectors
    TRANSPOSED: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For parts (parts, directions, rows + vectors, E) the sums over them, of the first rows as a matrix (directions,
    rows, E), or with TRANSPOSED (directions, E, rows), of each of the others as a vector (directions, E)."""
    all_rows = rows + len(vector_ptrs)
    k = tl.program_id(0) // all_rows
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0) % all_rows + 0 * e
    part = tl.arange(0, PARTS)[:, None]
    total = tl.zeros([PARTS, BLOCK], dtype=tl.float32)
    row_at = parts_ptr + tl.program_id(0).to(tl.int64) * E + e[None, :]
    for first in range(0, parts, PARTS):
        at = row_at + (first + part).to(tl.int64) * (directions * all_rows * E)
        total += tl.load(at, mask=(first + part < parts) & (e < E)[None, :], other=0.0)
    result = tl.sum(total, 0)
    in_matrix = e * rows + row if TRANSPOSED else row * E + e
    matrix_at = matrix_ptr + k * rows * E + in_matrix
    tl.store(matrix_at, result.to(matrix_ptr.dtype.element_ty), mask=(e < E) & (row < rows))
    for i in tl.static_range(len(vector_ptrs)):
        mask = (e < E) & (row == rows + i)
        tl.store(vector_ptrs[i] + k * E + e, result.to(vector_ptrs[i].dtype.element_ty), mask=mask)


def sum_parts(parts: Tensor, matrix: Tensor, *vectors: Tensor, transposed: bool = False) -> None:
    """Sums over parts, each written to its tensor, in that one's dtype.

    Args:
        parts: (parts, directions, rows + vectors, E), contiguous, float32; without the second axis for one direction.
        matrix: Contiguous, for the sums of the first rows: (directions, rows, E), or transposed (directions, E, rows).
        vectors: Contiguous, each for the sums of one of the other rows: (directions, E).
    """
    rows, width = parts.shape[-2:]
    directions = matrix.numel() // (width * (rows - len(vectors)))
    _sum(len(parts), directions, rows, width, len(vectors), transposed)(parts, matrix, vectors)


@functools.lru_cache(MAX_LAUNCHES)
def _sum(parts: int, directions: int, rows: int, width: int, vectors: int, transposed: bool) -> Launch:
    block = min(max(triton.next_power_of_2(width), 16), 64)
    grid = (directions * rows, triton.cdiv(width, block))
    options = dict(TRANSPOSED=transposed, PARTS=TILE // block, BLOCK=block, num_warps=8)
    return Launch(_sum_parts_kernel, grid, (parts, directions, rows - vectors, width), **options)
