"""The parameters of S6 as its products and its scan read them, in one launch, and their gradients in another: a launch
costs the host more than the GPU. `projected_scan.py` says what is computed."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_launch import MAX_LAUNCHES, Launch

BLOCK = 1024


@triton.jit
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


@triton.jit
def _parameters_backward_kernel(
    grad_matrix_ptr, grad_A_ptr, A_ptr, grad_weight_ptr, grad_A_log_ptr,
    directions, E, columns, states, rank, room,  # as above
    SEPARATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the gradients of the matrix, as it lies, and of A, (directions, E, states), those of weight and A_log."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = 2 * states + rank
    row = i // E % rows
    k = i // (rows * E)
    e = i % E
    if SEPARATE:
        e += k * E
    at = grad_matrix_ptr + (k * (rows + room) + (row + 2 * states) % rows) * columns + e
    grad = tl.load(at, mask=k < directions, other=0.0)
    tl.store(grad_weight_ptr + i, grad.to(grad_weight_ptr.dtype.element_ty), mask=k < directions)

    inside = i < directions * states * E
    A_at = A_ptr + (i // (states * E) * states + i % states) * E + i // states % E
    A = tl.load(A_at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_A_ptr + i, mask=inside, other=0.0).to(tl.float32) * A  # what -exp is, its derivative is, too
    tl.store(grad_A_log_ptr + i, grad.to(grad_A_log_ptr.dtype.element_ty), mask=inside)


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


def scan_parameters_triton_backward(
    grad_matrix: Tensor, grad_A: Tensor, A: Tensor, weight: Tensor, separate_inputs: bool
) -> tuple[Tensor, Tensor]:
    """Gradients for weight and A_log. A is what `scan_parameters_triton` returned, weight what it was given."""
    directions, rows, features = weight.shape
    _, launch = _parameters(directions, rows, features, A.shape[-1], separate_inputs, backward=True)
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    grad_A_log = torch.empty(A.shape, dtype=A.dtype, device=A.device)
    transposed = A.transpose(1, 2).contiguous()
    launch(grad_matrix.contiguous(), grad_A.contiguous(), transposed, grad_weight, grad_A_log)
    return grad_weight, grad_A_log


@functools.lru_cache(MAX_LAUNCHES)
def _parameters(
    directions: int, rows: int, features: int, states: int, separate_inputs: bool, backward: bool = False
) -> tuple[tuple[int, int], Launch]:
    """Also the shape of the matrix."""
    columns = directions * features if separate_inputs else features
    room = -rows % 8
    shape = directions * (rows + room), columns
    numbers = (directions, features, columns, states, rows - 2 * states, room)
    grid = (-(-max(shape[0] * columns, directions * states * features) // BLOCK),)
    kernel = _parameters_backward_kernel if backward else _parameters_kernel
    return shape, Launch(kernel, grid, numbers, SEPARATE=separate_inputs, BLOCK=BLOCK, num_warps=4)
