"""What the row-wise kernels share: tiles of whole rows, and LayerNorm over them.

All are bound by memory: a program holds whole rows in registers, a tile [BLOCK_ROWS, BLOCK_E], and reads and writes
everything once. Arithmetic is float32. A fixed number of programs walk over the tiles, so that weights are loaded once;
in backward kernels they keep the sums over rows in registers, each writes its own part, and the caller adds the parts:
two runs give the same bits. Tiles do not depend on the rows: nothing recompiles when batch or image size changes.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD_PROGRAMS = 32  # a multiprocessor


@triton.jit
def norm_rows(x, weight, bias, column_in, E, eps):
    """LayerNorm over the rows of x, which is 0 outside of column_in, where nothing is made of the result. Returns also
    mean and reciprocal deviation."""
    mean = tl.sum(x, 1) / E
    centred = x - mean[:, None]
    # Not squared before it is masked: a square may be fused with the sum's first addition, unrounded, and then a row's
    # threads would have sums that differ in their last bits, of which any may be stored.
    squares = tl.where(column_in, centred * centred, 0.0)
    rstd = tl.rsqrt(tl.sum(squares, 1) / E + eps)
    return centred * rstd[:, None] * weight + bias, mean, rstd


@triton.jit
def norm_gradient(grad, x_hat, rstd, weight, E):
    """From the gradient of LayerNorm's output to that of its input; grad and x_hat are 0 outside of the tile."""
    grad *= weight
    along = tl.sum(grad * x_hat, 1) / E
    return rstd[:, None] * (grad - (tl.sum(grad, 1) / E)[:, None] - x_hat * along[:, None])


@triton.jit
def store_norm_parts(gnorm_ptr, gweight, gbias, E, BLOCK_E: tl.constexpr):
    """A program's part (2, E) of the gradients of a norm's weight and bias, from its sums [BLOCK_ROWS, BLOCK_E]."""
    e = tl.arange(0, BLOCK_E)
    part = gnorm_ptr + tl.program_id(0) * 2 * E
    tl.store(part + e, tl.sum(gweight, 0), mask=e < E)
    tl.store(part + E + e, tl.sum(gbias, 0), mask=e < E)


@functools.lru_cache(None)
def row_tile(width: int, elements: int) -> dict[str, int]:
    """Whole rows of about this many elements a thread, with four warps up to 128 * elements columns."""
    block = _row_block(width)
    warps = min(max(block // (32 * elements), 4), 16)
    return dict(BLOCK_ROWS=max(128 * elements // block, 1), BLOCK_E=block, num_warps=warps)


@functools.lru_cache(None)
def summing_tile(width: int) -> tuple[dict[str, int], int]:
    """The tile of a kernel that sums over rows for each column, in registers: of few warps, in which columns lie one
    beside another, so that sums over columns stay within one. Returns also how many programs a multiprocessor has
    registers for."""
    block = _row_block(width)
    elements, warps = (8, 24) if block <= 256 else (16, 16 if block <= 512 else 12)  # a thread; a multiprocessor
    num_warps = min(max(block // (32 * elements), 1), 16)
    tile = dict(BLOCK_ROWS=max(32 * num_warps * elements // block, 1), BLOCK_E=block, num_warps=num_warps)
    return tile, max(warps // num_warps, 1)


def _row_block(width: int) -> int:
    """Columns of a tile that has rows of this width whole."""
    return max(triton.next_power_of_2(width), 16)


def forward_programs(rows: int, tile: dict[str, int], device: torch.device) -> int:
    """Programs of a forward kernel on so many rows, of the tile of `row_tile`."""
    return backward_programs(rows, tile, device, FORWARD_PROGRAMS)


def backward_programs(rows: int, tile: dict[str, int], device: torch.device, per_multiprocessor: int) -> int:
    """Programs of a backward kernel, of which a multiprocessor's registers hold no more at once than these."""
    return min(-(-rows // tile["BLOCK_ROWS"]), per_multiprocessor * _multiprocessors(device))


@functools.lru_cache(None)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def as_rows(t: Tensor) -> Tensor:
    """(..., E) -> (rows, E) with contiguous rows, a view where there is one."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, or contiguous copies of them; None stays None."""
    return [None if t is None else t.contiguous() for t in tensors]


def empty_statistics(x: Tensor) -> Tensor:
    """Room for mean and reciprocal deviation of the rows."""
    return torch.empty((2, *x.shape[:-1]), dtype=torch.float32, device=x.device)
