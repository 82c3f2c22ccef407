"""The weighted average in front of a mixer, with its LayerNorm, in Triton. `../weighted_average.py` says what it
computes."""

import functools
from collections.abc import Sequence

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

BACKWARD_PROGRAMS = {True: 4, False: 2}  # a multiprocessor, with up to 8 features, and with more
MAX_FEATURES = 16  # whose gradients one launch writes; kernels with more would spill their registers


@triton.jit(do_not_specialize=["rows", "n"])
def _average_kernel(
    features, scale_ptr, weight_ptr, bias_ptr,
    out_ptr, statistics_ptr,  # the second where there is a norm
    rows, n, E,  # rows of a feature, features, width of a row
    eps,
    NORM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """features: a tuple of pointers, of which the first n count. scale: (n,), the weights of the average."""
    r = tl.arange(0, BLOCK_ROWS)
    e = tl.arange(0, BLOCK_E)[None, :]
    column_in = e < E
    present = tl.zeros([1, 1], tl.int32) + n  # a block of one, which masks can be combined with
    if NORM:
        weight = tl.load(weight_ptr + e, mask=column_in, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + e, mask=column_in, other=0.0).to(tl.float32)
    start = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    for first in range(start, rows, tl.num_programs(0) * BLOCK_ROWS):
        row_in = first + r < rows
        tile_in = row_in[:, None] & column_in
        in_tile = r[:, None] * E + e
        total = tl.zeros([BLOCK_ROWS, BLOCK_E], tl.float32)
        for i in tl.static_range(len(features)):
            scale = tl.load(scale_ptr + tl.minimum(i, n - 1)).to(tl.float32)
            x = tl.load(features[i] + first * E + in_tile, mask=tile_in & (i < present), other=0.0)
            total += scale * x.to(tl.float32)
        if NORM:
            total, mean, rstd = norm_rows(total, weight, bias, column_in, E, eps)
            tl.store(statistics_ptr + first + r, mean, mask=row_in)
            tl.store(statistics_ptr + rows + first + r, rstd, mask=row_in)
        tl.store(out_ptr + first * E + in_tile, total.to(out_ptr.dtype.element_ty), mask=tile_in)


@triton.jit(do_not_specialize=["rows", "n"])
def _average_backward_kernel(
    grad_ptr, features, scale_ptr, weight_ptr, statistics_ptr,
    gfeatures, parts_ptr, gtotal_ptr,  # gradients, or parts of them
    others,  # of the features, to which these are added, or None
    rows, n, E,  # rows of a feature, features, width of a row
    NORM: tl.constexpr, SPLIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_E: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """parts: (programs, n + 2 E), of the gradients of scale, and of the norm's weight and bias where there is one, else
    (programs, n). VECTOR: columns that lie in one thread. With SPLIT only the gradient of the weighted average, gtotal,
    is written in place of those of features and scale."""
    r = tl.arange(0, BLOCK_ROWS)
    e = tl.arange(0, BLOCK_E)[None, :]
    column_in = e < E
    present = tl.zeros([1, 1], tl.int32) + n
    gscales = ()
    for _ in tl.static_range(len(features)):
        gscales = gscales + (tl.zeros([BLOCK_ROWS, BLOCK_E // VECTOR], tl.float32),)  # noqa: RUF005 (no star in Triton)
    if NORM:
        weight = tl.load(weight_ptr + e, mask=column_in, other=0.0).to(tl.float32)
    gweight = tl.zeros([BLOCK_ROWS, BLOCK_E], tl.float32)
    gbias = tl.zeros([BLOCK_ROWS, BLOCK_E], tl.float32)
    start = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    for first in range(start, rows, tl.num_programs(0) * BLOCK_ROWS):
        row_in = first + r < rows
        tile_in = row_in[:, None] & column_in
        at = first * E + (r[:, None] * E + e)
        grad = tl.load(grad_ptr + at, mask=tile_in, other=0.0).to(tl.float32)
        if NORM:
            total = tl.zeros([BLOCK_ROWS, BLOCK_E], tl.float32)
            for i in tl.static_range(len(features)):
                scale = tl.load(scale_ptr + tl.minimum(i, n - 1)).to(tl.float32)
                x = tl.load(features[i] + at, mask=tile_in & (i < present), other=0.0)
                total += scale * x.to(tl.float32)
            mean = tl.load(statistics_ptr + first + r, mask=row_in, other=0.0)
            rstd = tl.load(statistics_ptr + rows + first + r, mask=row_in, other=0.0)
            x_hat = tl.where(column_in, (total - mean[:, None]) * rstd[:, None], 0.0)
            gweight += grad * x_hat
            gbias += grad
            grad = norm_gradient(grad, x_hat, rstd, weight, E)
        if SPLIT:
            tl.store(gtotal_ptr + at, grad, mask=tile_in)
        else:
            sums = ()
            for i in tl.static_range(len(features)):
                # again, out of the cache: held in registers, features would leave room for few programs
                x = tl.load(features[i] + at, mask=tile_in & (i < present), other=0.0)
                # within a thread only: the sum over threads waits for the end
                products = tl.reshape(grad * x.to(tl.float32), [BLOCK_ROWS, BLOCK_E // VECTOR, VECTOR])
                sums = sums + (gscales[i] + tl.sum(products, 2),)  # noqa: RUF005
                scale = tl.load(scale_ptr + tl.minimum(i, n - 1)).to(tl.float32)
                gx = (scale * grad).to(gfeatures[i].dtype.element_ty)
                if others is not None:  # in the same steps as autograd, which rounds in between
                    other = tl.load(others[i] + at, mask=tile_in & (i < present), other=0.0)
                    gx = (gx.to(tl.float32) + other.to(tl.float32)).to(gfeatures[i].dtype.element_ty)
                tl.store(gfeatures[i] + at, gx, mask=tile_in & (i < present))
            gscales = sums
    part = parts_ptr + tl.program_id(0) * n
    if NORM:
        store_norm_parts(part + n, gweight, gbias, E, BLOCK_E)  # behind each program's part of the scale
        part += tl.program_id(0) * 2 * E
    if not SPLIT:
        for i in tl.static_range(len(features)):
            tl.store(part + i, tl.sum(tl.sum(gscales[i], 1), 0), mask=i < n)


def _padded(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """The last tensor repeated up to 4, 8, 16, 24 ... in all: kernels are compiled for these numbers only."""
    n = len(tensors)
    size = 4 if n <= 4 else 8 * triton.cdiv(n, 8)
    return (*tensors, *(tensors[-1:] * (size - n)))


def weighted_average_triton(
    features: list[Tensor],
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    keeps: bool,
) -> tuple[Tensor, Tensor | None]:
    """Returns also mean and reciprocal deviation of the rows, (2, ...), if there is a norm and it `keeps` them: they
    are written in any case, so that training and inference have one kernel."""
    features = contiguous(*features)
    scale, weight, bias = contiguous(scale, weight, bias)
    width = features[0].shape[-1]
    rows = features[0].numel() // max(width, 1)
    out = torch.empty(features[0].shape, dtype=dtype, device=scale.device)
    statistics = empty_statistics(out) if weight is not None else None
    if rows:
        launch = _forward(scale.device, rows, len(features), width, eps, weight is not None)
        launch(_padded(features), scale, weight, bias, out, statistics)
    return out, statistics if keeps else None


@functools.lru_cache(MAX_LAUNCHES)
def _forward(device: torch.device, rows: int, features: int, width: int, eps: float, norm: bool) -> Launch:
    tile = row_tile(width, 16 if features <= 4 else 8)
    grid = (forward_programs(rows, tile, device),)
    return Launch(_average_kernel, grid, (rows, features, width, eps), NORM=norm, **tile)


def weighted_average_triton_backward(
    grad: Tensor,
    features: list[Tensor],
    scale: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    others: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Gradients for every feature, and for scale, weight and bias together, (n + 2 E,) in float32, (n,) without.

    Args:
        others: One for every feature, to which its gradient is added; or none.
    """
    grad, *features = contiguous(grad, *features)
    others = contiguous(*others)
    scale, weight = contiguous(scale, weight)
    n, width = len(features), grad.shape[-1]
    rows = grad.numel() // max(width, 1)
    grad_features = [torch.empty_like(f) for f in features]

    def launch_part(grad: Tensor, part: slice, norm: bool, grad_total: Tensor | None) -> Tensor:
        count = len(features[part])
        pointers = _padded(features[part])
        vector = 16 // min(f.element_size() for f in features)
        programs, launch = _backward(grad.device, rows, count, width, norm, grad_total is not None, vector)
        parts = torch.empty(programs, count + 2 * width * norm, dtype=torch.float32, device=grad.device)
        if rows:
            added = _padded(others[part]) if others and grad_total is None else None
            gradients = (_padded(grad_features[part]), parts, grad_total, added)
            launch(grad, pointers, scale[part], weight, statistics, *gradients)
        return summed(parts)

    norm = weight is not None
    if n <= MAX_FEATURES:
        return [*grad_features, launch_part(grad, slice(None), norm, None)]
    # first the gradient of the average, then those of the features, some at a time
    grad_norm = grad.new_empty(0, dtype=torch.float32)
    if norm:
        grad_total = torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
        grad_norm = launch_part(grad, slice(None), True, grad_total)[n:]
        grad = grad_total
    slices = [slice(i, i + MAX_FEATURES) for i in range(0, n, MAX_FEATURES)]
    return [*grad_features, torch.cat([*(launch_part(grad, part, False, None) for part in slices), grad_norm])]


@functools.lru_cache(MAX_LAUNCHES)
def _backward(
    device: torch.device, rows: int, features: int, width: int, norm: bool, split: bool, vector: int
) -> tuple[int, Launch]:
    """Also the number of programs."""
    tile = row_tile(width, 8)
    programs = backward_programs(rows, tile, device, BACKWARD_PROGRAMS[features <= 8])
    options = dict(NORM=norm, SPLIT=split, VECTOR=vector, **tile)
    return programs, Launch(_average_backward_kernel, (programs,), (rows, features, width), **options)
