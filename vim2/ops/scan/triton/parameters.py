"""The parameters of S6 as its products and its scan read them, in one launch. `projected_scan.py` says what it
computes; at batch 1 a launch costs the host more than the GPU."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_launch import MAX_LAUNCHES, Launch

BLOCK = 1024


@triton.jit(do_not_specialize=["directions", "E", "columns", "states", "rank", "room"])
def _parameters_kernel(
    weight_ptr, A_log_ptr, matrix_ptr, A_ptr,
    directions, E, columns,  # and the matrix's columns, E or directions x E
    states, rank, room,  # rows of the weight: 2 states + rank; rows of zeros that the matrix has more
    SEPARATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """matrix: (directions, 2 states + rank + room, columns); A: (directions, states, E)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = 2 * states + rank
    row = i // columns % (rows + room)
    k = i // columns // (rows + room)
    e = i % columns
    if SEPARATE:
        e -= k * E
    # delta comes first in the weight, and last in the matrix
    weight_at = weight_ptr + (k * rows + (row + rank) % rows) * E + e
    inside = k < directions
    weight = tl.load(weight_at, mask=inside & (row < rows) & (e >= 0) & (e < E), other=0.0)
    tl.store(matrix_ptr + i, weight.to(matrix_ptr.dtype.element_ty), mask=inside)

    inside = i < directions * states * E
    A_log_at = A_log_ptr + (i // (states * E) * E + i % E) * states + i // E % states
    A = -tl.exp(tl.load(A_log_at, mask=inside, other=0.0).to(tl.float32))
    tl.store(A_ptr + i, A.to(A_ptr.dtype.element_ty), mask=inside)


def scan_parameters_triton(
    weight: Tensor, A_log: Tensor, separate_inputs: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `projected_scan.scan_parameters`."""
    directions, rows, features = weight.shape
    states = A_log.shape[-1]
    shape, launch = _parameters(directions, rows, features, states, separate_inputs)
    matrix = torch.empty(shape, dtype=dtype, device=weight.device)
    A = torch.empty(directions, states, features, dtype=A_log.dtype, device=weight.device)
    launch(weight.contiguous(), A_log.contiguous(), matrix, A)
    return matrix, A.transpose(1, 2)


@functools.lru_cache(MAX_LAUNCHES)
def _parameters(
    directions: int, rows: int, features: int, states: int, separate_inputs: bool
) -> tuple[tuple[int, int], Launch]:
    """Also the shape of the matrix."""
    columns = directions * features if separate_inputs else features
    room = -rows % 8
    shape = directions * (rows + room), columns
    numbers = (directions, features, columns, states, rows - 2 * states, room)
    grid = (-(-max(shape[0] * columns, directions * states * features) // BLOCK),)
    return shape, Launch(_parameters_kernel, grid, numbers, SEPARATE=separate_inputs, BLOCK=BLOCK, num_warps=4)
