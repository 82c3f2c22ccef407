"""The end of backward passes: parts of parameters' gradients, which programs have written one beside another, become
the gradients, in one launch. PyTorch would take one for the sum, and one a parameter for the copy in its own order."""

import functools

import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import MAX_LAUNCHES, Launch

PARTS = 8  # that are loaded at once


@triton.jit(do_not_specialize=["parts"])
def _gradients_kernel(
    parts_ptr, weight_ptr, first_ptr, second_ptr,
    parts, K, E, N, rows,  # parts, groups, channels, rows of the weight, and of a group of a part in all
    weight_k, weight_e, other_k, other_e,  # strides between groups and between channels
    PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """weight[k, e, n] = the sum over parts of their row n of group k, for n < N; first[k, e] and, if it is given,
    second[k, e] are the sums of the next rows."""
    k = tl.program_id(1)
    part = tl.arange(0, PARTS)[:, None, None]
    row = tl.arange(0, ROWS)[None, :, None]
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, None, :]
    inside = (row < rows) & (e < E)
    at = parts_ptr + (part.to(tl.int64) * K + k) * rows * E + (row * E + e)
    total = tl.zeros([PARTS, ROWS, BLOCK], dtype=tl.float32)
    for start in range(0, parts, PARTS):
        total += tl.load(at, mask=inside & (part < parts - start), other=0.0)
        at += tl.cast(PARTS, tl.int64) * K * rows * E
    total = tl.sum(total, 0)
    row = tl.arange(0, ROWS)[:, None]
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    weight_at = weight_ptr + (k * weight_k + e * weight_e + row)
    tl.store(weight_at, total.to(weight_ptr.dtype.element_ty), mask=(row < N) & (e < E))
    in_other = k * other_k + e * other_e + 0 * row
    tl.store(first_ptr + in_other, total.to(first_ptr.dtype.element_ty), mask=(row == N) & (e < E))
    if second_ptr is not None:
        tl.store(second_ptr + in_other, total.to(second_ptr.dtype.element_ty), mask=(row == N + 1) & (e < E))


def sum_parameters(parts: Tensor, weight: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """Write gradients of parameters.

    Args:
        parts: (parts, K, N + 1 or 2, E), float32, contiguous: rows for the weight, then for the others.
        weight: (K, E, N), with any strides but 1 along N.
        first: (K, E), with any strides.
        second: Likewise, with the same strides.
    """
    launch = _sum(parts.shape, weight.shape[2], weight.stride()[:2], first.stride())
    launch(parts, weight, first, second)


@functools.lru_cache(MAX_LAUNCHES)
def _sum(shape: tuple[int, ...], n: int, weight_stride: tuple[int, ...], other_stride: tuple[int, ...]) -> Launch:
    parts, groups, rows, features = shape
    room = max(triton.next_power_of_2(rows), 2)
    block = max(min(512 // room, triton.next_power_of_2(features)), 1)
    numbers = (parts, groups, features, n, rows, *weight_stride, *other_stride)
    grid = (-(-features // block), groups)
    return Launch(_gradients_kernel, grid, numbers, PARTS=PARTS, ROWS=room, BLOCK=block, num_warps=4)
