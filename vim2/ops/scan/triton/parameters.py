"""The parameters of S6 as its products and its scan read them, in one launch, and their gradients, in another.
`projected_scan.py` says what is computed; a launch costs the host more than these take the GPU."""

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


@triton.jit
def _parameters_backward_kernel(
    gmatrix_ptr, gA_ptr, A_ptr, gweight_ptr, gA_log_ptr,
    directions, E, columns, states, rank, room,  # as above
    SEPARATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of weight and A_log, each number made by one program. A is (directions, states, E), but not its
    gradient."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = 2 * states + rank
    k = i // (rows * E)
    row = i // E % rows
    matrix_row = k * (rows + room) + (row + 2 * states) % rows
    e = i % E
    if SEPARATE:
        e += k * E
    inside = k < directions
    gweight = tl.load(gmatrix_ptr + matrix_row * columns + e, mask=inside, other=0.0)
    tl.store(gweight_ptr + i, gweight.to(gweight_ptr.dtype.element_ty), mask=inside)

    k = i // (E * states)
    inside = k < directions
    A = tl.load(A_ptr + (k * states + i % states) * E + i // states % E, mask=inside, other=0.0)
    gA_log = tl.load(gA_ptr + i, mask=inside, other=0.0).to(tl.float32) * A.to(tl.float32)
    tl.store(gA_log_ptr + i, gA_log.to(gA_log_ptr.dtype.element_ty), mask=inside)


def scan_parameters_triton(
    weight: Tensor, A_log: Tensor, separate_inputs: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `projected_scan.scan_parameters`."""
    directions, rows, features = weight.shape
    states = A_log.shape[-1]
    shape, launch, _ = _parameters(directions, rows, features, states, separate_inputs)
    matrix = torch.empty(shape, dtype=dtype, device=weight.device)
    A = torch.empty(directions, states, features, dtype=A_log.dtype, device=weight.device)
    launch(weight.contiguous(), A_log.contiguous(), matrix, A)
    return matrix, A.transpose(1, 2)


def scan_parameters_triton_backward(
    grad_matrix: Tensor, grad_A: Tensor, A: Tensor, rows: int, separate_inputs: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `projected_scan._scan_parameters_backward`."""
    directions, features, states = A.shape
    _, _, launch = _parameters(directions, rows, features, states, separate_inputs)
    grad_weight = torch.empty(directions, rows, features, dtype=dtype, device=A.device)
    grad_A_log = torch.empty(A.shape, dtype=A.dtype, device=A.device)
    launch(grad_matrix.contiguous(), grad_A.contiguous(), A.mT.contiguous(), grad_weight, grad_A_log)
    return grad_weight, grad_A_log


@functools.lru_cache(MAX_LAUNCHES)
def _parameters(
    directions: int, rows: int, features: int, states: int, separate_inputs: bool
) -> tuple[tuple[int, int], Launch, Launch]:
    """The shape of the matrix, and the launches forward and backward."""
    columns = directions * features if separate_inputs else features
    room = -rows % 8
    shape = directions * (rows + room), columns
    numbers = (directions, features, columns, states, rows - 2 * states, room)
    options = dict(SEPARATE=separate_inputs, BLOCK=BLOCK, num_warps=4)
    of_A = directions * states * features
    forward = (triton.cdiv(max(shape[0] * columns, of_A), BLOCK),)
    backward = (triton.cdiv(max(directions * rows * features, of_A), BLOCK),)
    return (
        shape,
        Launch(_parameters_kernel, forward, numbers, **options),
        Launch(_parameters_backward_kernel, backward, numbers, **options),
    )
