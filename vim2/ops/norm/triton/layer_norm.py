"""LayerNorm of rows and of 2 x 2 patches in Triton. `../layer_norm.py` says what it computes."""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_launch import MAX_LAUNCHES, Launch
from ...triton_sums import summed
from .tiles import (
    backward_programs,
    contiguous,
    empty_statistics,
    forward_programs,
    norm_gradient,
    norm_rows,
    row_tile,
    store_norm_parts,
)

BACKWARD_PROGRAMS = 4  # a multiprocessor


@triton.jit
def _in_patches(row, e, H, W, C, PATCH: tl.constexpr):
    """Where the elements e [1, BLOCK_E] of rows [BLOCK_ROWS] lie in x, and whether they do.

    Rows are patches of PATCH x PATCH positions of maps (batch, H, W, C), read column by column, as Swin does; those
    that stick out at the bottom or right are zero there. With PATCH 1, x lies as the rows do.
    """
    if PATCH == 1:
        return row.to(tl.int64)[:, None] * C + e, (row >= 0)[:, None]
    else:
        columns = tl.cdiv(W, PATCH)
        patch_row = row // columns
        w = (row % columns * PATCH)[:, None] + e // C // PATCH
        image = patch_row // tl.cdiv(H, PATCH)
        h = (patch_row % tl.cdiv(H, PATCH) * PATCH)[:, None] + e // C % PATCH
        at = ((image.to(tl.int64) * H)[:, None] + h) * W + w
        return at * C + e % C, (h < H) & (w < W)


@triton.jit(do_not_specialize=["rows", "H", "W"])
def _layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, statistics_ptr,
    rows, H, W, C, E,  # rows of the result, sizes of x's maps, width of a row
    eps,
    PATCH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """out (rows, E), and in statistics (2, rows) the mean and reciprocal deviation of each."""
    r = tl.arange(0, BLOCK_ROWS)
    e = tl.arange(0, BLOCK_E)[None, :]
    column_in = e < E
    weight = tl.load(weight_ptr + e, mask=column_in, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + e, mask=column_in, other=0.0).to(tl.float32)
    for first in range(tl.program_id(0) * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS):
        row = first + r
        tile_in = (row < rows)[:, None] & column_in
        at, inside = _in_patches(row, e, H, W, C, PATCH)
        x = tl.load(x_ptr + at, mask=tile_in & inside, other=0.0).to(tl.float32)
        out, mean, rstd = norm_rows(x, weight, bias, column_in, E, eps)
        tl.store(statistics_ptr + row, mean, mask=row < rows)
        tl.store(statistics_ptr + rows + row, rstd, mask=row < rows)
        out_at = out_ptr + (row.to(tl.int64)[:, None] * E + e)
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=tile_in)


@triton.jit(do_not_specialize=["rows", "H", "W"])
def _layer_norm_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, statistics_ptr, gx_ptr, gnorm_ptr,
    rows, H, W, C, E,  # rows of the result, sizes of x's maps, width of a row
    PATCH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """gnorm: (programs, 2, E), parts of the gradients of weight and bias."""
    r = tl.arange(0, BLOCK_ROWS)
    e = tl.arange(0, BLOCK_E)[None, :]
    column_in = e < E
    weight = tl.load(weight_ptr + e, mask=column_in, other=0.0).to(tl.float32)
    gweight = tl.zeros([BLOCK_ROWS, BLOCK_E], tl.float32)
    gbias = tl.zeros([BLOCK_ROWS, BLOCK_E], tl.float32)
    for first in range(tl.program_id(0) * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS):
        row = first + r
        tile_in = (row < rows)[:, None] & column_in
        at, inside = _in_patches(row, e, H, W, C, PATCH)
        x = tl.load(x_ptr + at, mask=tile_in & inside, other=0.0).to(tl.float32)
        grad_at = grad_ptr + (row.to(tl.int64)[:, None] * E + e)
        grad = tl.load(grad_at, mask=tile_in, other=0.0).to(tl.float32)
        mean = tl.load(statistics_ptr + row, mask=row < rows, other=0.0)
        rstd = tl.load(statistics_ptr + rows + row, mask=row < rows, other=0.0)
        x_hat = tl.where(column_in, (x - mean[:, None]) * rstd[:, None], 0.0)
        gweight += grad * x_hat
        gbias += grad
        gx = norm_gradient(grad, x_hat, rstd, weight, E)
        tl.store(gx_ptr + at, gx.to(gx_ptr.dtype.element_ty), mask=tile_in & inside)
    store_norm_parts(gnorm_ptr, gweight, gbias, E, BLOCK_E)


def _map_sizes(x: Tensor, patch: int) -> tuple[int, int, int]:
    """H, W and C of maps; with patches of one, of the rows, for which H and W have no meaning."""
    return x.shape[1:] if patch > 1 else (1, 1, x.shape[-1])


def layer_norm_triton(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, patch: int, shape: list[int], keeps: bool
) -> tuple[Tensor, Tensor | None]:
    """The result, of this shape; and mean and reciprocal deviation of the rows, (2, ...), if it `keeps` them: they are
    written in any case, so that training and inference have one kernel."""
    x, weight, bias = contiguous(x, weight, bias)
    out = torch.empty(shape, dtype=dtype, device=x.device)
    statistics = empty_statistics(out)
    rows, width = math.prod(shape[:-1]), shape[-1]
    if rows:
        launch = _forward(x.device, rows, *_map_sizes(x, patch), width, eps, patch)
        launch(x, weight, bias, out, statistics)
    return out, statistics if keeps else None


@functools.lru_cache(MAX_LAUNCHES)
def _forward(
    device: torch.device, rows: int, height: int, map_width: int, channels: int, width: int, eps: float, patch: int
) -> Launch:
    tile = row_tile(width, 16)
    numbers = (rows, height, map_width, channels, width, eps)
    return Launch(_layer_norm_kernel, (forward_programs(rows, tile, device),), numbers, PATCH=patch, **tile)


def layer_norm_triton_backward(
    grad: Tensor, x: Tensor, weight: Tensor, statistics: Tensor, patch: int
) -> tuple[Tensor, Tensor]:
    """Gradients for x, and for weight and bias together, (2, E) in float32."""
    grad, x, weight = contiguous(grad, x, weight)
    rows, width = statistics[0].numel(), grad.shape[-1]
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    programs, launch = _backward(x.device, rows, *_map_sizes(x, patch), width, patch)
    parts = torch.empty(programs, 2, width, dtype=torch.float32, device=x.device)
    if rows:
        launch(grad, x, weight, statistics, grad_x, parts)
    return grad_x, summed(parts)


@functools.lru_cache(MAX_LAUNCHES)
def _backward(
    device: torch.device, rows: int, height: int, map_width: int, channels: int, width: int, patch: int
) -> tuple[int, Launch]:
    """Also the number of programs."""
    tile = row_tile(width, 8)
    programs = backward_programs(rows, tile, device, BACKWARD_PROGRAMS)
    numbers = (rows, height, map_width, channels, width)
    return programs, Launch(_layer_norm_backward_kernel, (programs,), numbers, PATCH=patch, **tile)
