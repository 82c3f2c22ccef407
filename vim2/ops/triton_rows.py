"""Row-wise operators in Triton: LayerNorm, the gate behind a scan, and the weighted average in front of a mixer, with
theirs. `layer_norm.py`, `norm_gate.py` and `weighted_average.py` say what they compute; their tests compare the two.

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

from .triton_math import launch

# programs a multiprocessor: many of the forward kernels; of the backward ones as many as their registers let run
FORWARD_PROGRAMS = 32
LAYER_NORM_BACKWARD_PROGRAMS = 4
NORM_GATE_BACKWARD_PROGRAMS = {True: 3, False: 6}  # with and without norm
NORM_GATE_BACKWARD_ELEMENTS = 16  # a thread
AVERAGE_BACKWARD_PROGRAMS = {True: 4, False: 2}  # up to 8 features, and more

MAX_FEATURES = 16  # whose gradients one launch writes; kernels with more would spill their registers


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def _norm(x, weight, bias, column_in, E, eps):
    """LayerNorm over the rows of x, which is 0 outside of column_in. Returns also mean and reciprocal deviation."""
    mean = tl.sum(x, 1) / E
    centred = tl.where(column_in, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / E + eps)
    return centred * rstd[:, None] * weight + bias, mean, rstd


@triton.jit
def _norm_gradient(grad, x_hat, rstd, weight, E):
    """From the gradient of LayerNorm's output to that of its input; grad and x_hat are 0 outside of the tile."""
    grad *= weight
    along = tl.sum(grad * x_hat, 1) / E
    return rstd[:, None] * (grad - (tl.sum(grad, 1) / E)[:, None] - x_hat * along[:, None])


@triton.jit
def _store_norm_parts(gnorm_ptr, gweight, gbias, E, BLOCK_E: tl.constexpr):
    """A program's part (2, E) of the gradients of a norm's weight and bias, from its sums [BLOCK_ROWS, BLOCK_E]."""
    e = tl.arange(0, BLOCK_E)
    part = gnorm_ptr + tl.program_id(0) * 2 * E
    tl.store(part + e, tl.sum(gweight, 0), mask=e < E)
    tl.store(part + E + e, tl.sum(gbias, 0), mask=e < E)


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
    x_ptr, weight_ptr, bias_ptr, out_ptr, statistics_ptr, rows, H, W, C, E, eps,
    PATCH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
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
        out, mean, rstd = _norm(x, weight, bias, column_in, E, eps)
        tl.store(statistics_ptr + row, mean, mask=row < rows)
        tl.store(statistics_ptr + rows + row, rstd, mask=row < rows)
        out_at = out_ptr + (row.to(tl.int64)[:, None] * E + e)
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=tile_in)


@triton.jit(do_not_specialize=["rows", "H", "W"])
def _layer_norm_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, statistics_ptr, gx_ptr, gnorm_ptr, rows, H, W, C, E,
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
        gx = _norm_gradient(grad, x_hat, rstd, weight, E)
        tl.store(gx_ptr + at, gx.to(gx_ptr.dtype.element_ty), mask=tile_in & inside)
    _store_norm_parts(gnorm_ptr, gweight, gbias, E, BLOCK_E)


@triton.jit(do_not_specialize=["rows"])
def _norm_gate_kernel(
    y_ptr, gate_ptr, weight_ptr, bias_ptr, out_ptr, statistics_ptr, total_ptr, rows, E, gate_stride, P, eps,
    NORM: tl.constexpr, K: tl.constexpr, KEEP: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Rows of y are (E / P, K, P), to be summed over K; with KEEP the sums are written, too."""
    r = tl.arange(0, BLOCK_ROWS)
    e = tl.arange(0, BLOCK_E)[None, :]
    column_in = e < E
    if NORM:
        weight = tl.load(weight_ptr + e, mask=column_in, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + e, mask=column_in, other=0.0).to(tl.float32)
    in_y = r[:, None] * (K * E) + (e if K == 1 else e // P * (K * P) + e % P)
    start = tl.program_id(0).to(tl.int64) * BLOCK_ROWS  # rows in 64 bits, offsets in the tile in 32
    for first in range(start, rows, tl.num_programs(0) * BLOCK_ROWS):
        row_in = first + r < rows
        tile_in = row_in[:, None] & column_in
        in_tile = r[:, None] * E + e
        y_at = y_ptr + first * (K * E) + in_y
        y = tl.load(y_at, mask=tile_in, other=0.0).to(tl.float32)
        for k in tl.static_range(1, K):
            y += tl.load(y_at + k * P, mask=tile_in, other=0.0).to(tl.float32)
        if KEEP:
            tl.store(total_ptr + first * E + in_tile, y.to(total_ptr.dtype.element_ty), mask=tile_in)
        gate_at = gate_ptr + first * gate_stride + (r[:, None] * gate_stride + e)
        gate = tl.load(gate_at, mask=tile_in, other=0.0).to(tl.float32)
        if NORM:
            y, mean, rstd = _norm(y, weight, bias, column_in, E, eps)
            tl.store(statistics_ptr + first + r, mean, mask=row_in)
            tl.store(statistics_ptr + rows + first + r, rstd, mask=row_in)
        out = y * (gate * _sigmoid(gate))
        tl.store(out_ptr + first * E + in_tile, out.to(out_ptr.dtype.element_ty), mask=tile_in)


@triton.jit(do_not_specialize=["rows"])
def _norm_gate_backward_kernel(
    grad_ptr, y_ptr, gate_ptr, weight_ptr, bias_ptr, statistics_ptr, gy_ptr, ggate_ptr, gnorm_ptr,
    rows, E, gate_stride,
    NORM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """gnorm: (programs, 2, E), parts of the gradients of the norm's weight and bias."""
    r = tl.arange(0, BLOCK_ROWS)
    e = tl.arange(0, BLOCK_E)[None, :]
    column_in = e < E
    if NORM:
        weight = tl.load(weight_ptr + e, mask=column_in, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + e, mask=column_in, other=0.0).to(tl.float32)
    gweight = tl.zeros([BLOCK_ROWS, BLOCK_E], tl.float32)
    gbias = tl.zeros([BLOCK_ROWS, BLOCK_E], tl.float32)
    start = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    for first in range(start, rows, tl.num_programs(0) * BLOCK_ROWS):
        row_in = first + r < rows
        tile_in = row_in[:, None] & column_in
        in_tile = r[:, None] * E + e
        grad = tl.load(grad_ptr + first * E + in_tile, mask=tile_in, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + first * E + in_tile, mask=tile_in, other=0.0).to(tl.float32)
        gate_at = gate_ptr + first * gate_stride + (r[:, None] * gate_stride + e)
        gate = tl.load(gate_at, mask=tile_in, other=0.0).to(tl.float32)
        sigmoid = _sigmoid(gate)
        gy = grad * (gate * sigmoid)
        if NORM:
            mean = tl.load(statistics_ptr + first + r, mask=row_in, other=0.0)
            rstd = tl.load(statistics_ptr + rows + first + r, mask=row_in, other=0.0)
            x_hat = tl.where(column_in, (y - mean[:, None]) * rstd[:, None], 0.0)
            y = x_hat * weight + bias
            gweight += gy * x_hat
            gbias += gy
            gy = _norm_gradient(gy, x_hat, rstd, weight, E)
        ggate = grad * y * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))
        tl.store(gy_ptr + first * E + in_tile, gy.to(gy_ptr.dtype.element_ty), mask=tile_in)
        tl.store(ggate_ptr + first * E + in_tile, ggate.to(ggate_ptr.dtype.element_ty), mask=tile_in)
    if NORM:
        _store_norm_parts(gnorm_ptr, gweight, gbias, E, BLOCK_E)


@triton.jit(do_not_specialize=["rows", "n"])
def _average_kernel(
    features, scale_ptr, weight_ptr, bias_ptr, out_ptr, statistics_ptr, rows, n, E, eps,
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
            total, mean, rstd = _norm(total, weight, bias, column_in, E, eps)
            tl.store(statistics_ptr + first + r, mean, mask=row_in)
            tl.store(statistics_ptr + rows + first + r, rstd, mask=row_in)
        tl.store(out_ptr + first * E + in_tile, total.to(out_ptr.dtype.element_ty), mask=tile_in)


@triton.jit(do_not_specialize=["rows", "n"])
def _average_backward_kernel(
    grad_ptr, features, scale_ptr, weight_ptr, statistics_ptr, gfeatures, gscale_ptr, gnorm_ptr, gtotal_ptr,
    rows, n, E,
    NORM: tl.constexpr, SPLIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_E: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """gscale: (programs, len(features)); gnorm: (programs, 2, E). VECTOR: columns that lie in one thread. With SPLIT
    only the gradient of the weighted average, gtotal, is written in place of those of features and scale."""
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
            grad = _norm_gradient(grad, x_hat, rstd, weight, E)
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
                tl.store(gfeatures[i] + at, gx, mask=tile_in & (i < present))
            gscales = sums
    if not SPLIT:
        for i in tl.static_range(len(features)):
            tl.store(gscale_ptr + tl.program_id(0) * len(features) + i, tl.sum(tl.sum(gscales[i], 1), 0))
    if NORM:
        _store_norm_parts(gnorm_ptr, gweight, gbias, E, BLOCK_E)


@functools.lru_cache(None)
def _tile(width: int, elements: int) -> dict[str, int]:
    """Whole rows of about this many elements a thread, with four warps up to 128 * elements columns."""
    block = max(triton.next_power_of_2(width), 16)
    warps = min(max(block // (32 * elements), 4), 16)
    return dict(BLOCK_ROWS=max(128 * elements // block, 1), BLOCK_E=block, num_warps=warps)


def _programs(rows: int, block_rows: int, per_multiprocessor: int, device: torch.device) -> int:
    return min(-(-rows // block_rows), per_multiprocessor * _multiprocessors(device))


@functools.lru_cache(None)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _rows(t: Tensor) -> Tensor:
    """(..., E) -> (rows, E) with contiguous rows, a view where there is one."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _statistics(x: Tensor, norm: bool) -> Tensor:
    """Room for mean and reciprocal deviation of the rows; empty without a norm."""
    return torch.empty((2, *x.shape[:-1]) if norm else (0,), dtype=torch.float32, device=x.device)


def _map_sizes(x: Tensor, patch: int) -> tuple[int, int, int]:
    """H, W and C of maps; with patches of one, of the rows, for which H and W have no meaning."""
    return x.shape[1:] if patch > 1 else (1, 1, x.shape[-1])


def layer_norm_triton(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, patch: int, shape: list[int]
) -> tuple[Tensor, Tensor]:
    """The result, of this shape. Returns also mean and reciprocal deviation of the rows, (2, ...)."""
    x, weight, bias = _contiguous(x, weight, bias)
    out = torch.empty(shape, dtype=dtype, device=x.device)
    statistics = _statistics(out, True)
    rows, width = statistics[0].numel(), shape[-1]
    tile = _tile(width, 16)
    if rows:
        programs = _programs(rows, tile["BLOCK_ROWS"], FORWARD_PROGRAMS, x.device)
        arguments = (x, weight, bias, out, statistics, rows, *_map_sizes(x, patch), width, eps)
        launch(_layer_norm_kernel, (programs,), arguments, PATCH=patch, **tile)
    return out, statistics


def layer_norm_triton_backward(
    grad: Tensor, x: Tensor, weight: Tensor, statistics: Tensor, patch: int
) -> tuple[Tensor, Tensor]:
    """Gradients for x, and for weight and bias together, (2, E) in float32."""
    grad, x, weight = _contiguous(grad, x, weight)
    rows, width = statistics[0].numel(), grad.shape[-1]
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = _tile(width, 8)
    programs = _programs(rows, tile["BLOCK_ROWS"], LAYER_NORM_BACKWARD_PROGRAMS, x.device)
    parts = torch.empty(programs, 2, width, dtype=torch.float32, device=x.device)
    if rows:
        arguments = (grad, x, weight, statistics, grad_x, parts, rows, *_map_sizes(x, patch), width)
        launch(_layer_norm_backward_kernel, (programs,), arguments, PATCH=patch, **tile)
    return grad_x, parts.sum(0)


def norm_gate_triton(
    y: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype, keeps: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns also mean and reciprocal deviation of the rows, (2, ...), empty without a norm, and y's sum over
    directions if it `keeps` that, else (0,)."""
    lanes, patch = y.shape[-2:] if y.dim() > gate.dim() else (1, gate.shape[-1])
    y, gate_rows = y.contiguous(), _rows(gate)
    weight, bias = _contiguous(weight, bias)
    rows, width = gate_rows.shape
    out = torch.empty(gate.shape, dtype=dtype, device=y.device)
    total = torch.empty(gate.shape if keeps else (0,), dtype=y.dtype, device=y.device)
    statistics = _statistics(out, weight is not None)
    tile = _tile(width, 16)
    if rows:
        arguments = (y, gate_rows, weight, bias, out, statistics, total, rows, width, gate_rows.stride(0), patch, eps)
        programs = _programs(rows, tile["BLOCK_ROWS"], FORWARD_PROGRAMS, y.device)
        launch(_norm_gate_kernel, (programs,), arguments, NORM=weight is not None, K=lanes, KEEP=keeps, **tile)
    return out, statistics, total


def norm_gate_triton_backward(
    grad: Tensor, y: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for y, gate, and weight and bias together, (2, E) in float32, (2, 0) without a norm."""
    grad, y, gate_rows = grad.contiguous(), y.contiguous(), _rows(gate)
    weight, bias = _contiguous(weight, bias)
    rows, width = gate_rows.shape
    grad_y, grad_gate = (torch.empty(t.shape, dtype=t.dtype, device=y.device) for t in (y, gate))
    tile = _tile(width, NORM_GATE_BACKWARD_ELEMENTS)
    norm = weight is not None
    programs = _programs(rows, tile["BLOCK_ROWS"], NORM_GATE_BACKWARD_PROGRAMS[norm], y.device)
    parts = torch.empty(programs, 2, width if norm else 0, dtype=torch.float32, device=y.device)
    if rows:
        tensors = (grad, y, gate_rows, weight, bias, statistics, grad_y, grad_gate, parts)
        arguments = (*tensors, rows, width, gate_rows.stride(0))
        launch(_norm_gate_backward_kernel, (programs,), arguments, NORM=norm, **tile)
    return grad_y, grad_gate, parts.sum(0)


def _padded(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """The last tensor repeated up to 1, 4, 8, 16, 24 ... in all: kernels are compiled for these numbers only."""
    n = len(tensors)
    size = n if n == 1 else 4 if n <= 4 else 8 * triton.cdiv(n, 8)
    return (*tensors, *(tensors[-1:] * (size - n)))


def weighted_average_triton(
    features: list[Tensor],
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Returns also mean and reciprocal deviation of the rows, (2, ...), empty without a norm."""
    features = _contiguous(*features)
    scale, weight, bias = _contiguous(scale, weight, bias)
    width = features[0].shape[-1]
    rows = features[0].numel() // max(width, 1)
    out = torch.empty(features[0].shape, dtype=dtype, device=scale.device)
    statistics = _statistics(out, weight is not None)
    pointers = _padded(features)
    tile = _tile(width, 16 if len(pointers) <= 4 else 8)
    if rows:
        arguments = (pointers, scale, weight, bias, out, statistics, rows, len(features), width, eps)
        programs = _programs(rows, tile["BLOCK_ROWS"], FORWARD_PROGRAMS, scale.device)
        launch(_average_kernel, (programs,), arguments, NORM=weight is not None, **tile)
    return out, statistics


def weighted_average_triton_backward(
    grad: Tensor, features: list[Tensor], scale: Tensor, weight: Tensor | None, statistics: Tensor
) -> list[Tensor]:
    """Gradients for every feature, for scale, and for weight and bias together, (2, E) in float32, (2, 0) without."""
    grad, *features = _contiguous(grad, *features)
    scale, weight = _contiguous(scale, weight)
    n, width = len(features), grad.shape[-1]
    rows = grad.numel() // max(width, 1)
    grad_features = [torch.empty_like(f) for f in features]

    def launch_part(grad: Tensor, part: slice, norm: bool, grad_total: Tensor | None) -> tuple[Tensor, Tensor]:
        count = len(features[part])
        pointers = _padded(features[part])
        tile = _tile(width, 8)
        per_multiprocessor = AVERAGE_BACKWARD_PROGRAMS[len(pointers) <= 8]
        programs = _programs(rows, tile["BLOCK_ROWS"], per_multiprocessor, grad.device)
        grad_scale = torch.empty(programs, len(pointers), dtype=torch.float32, device=grad.device)
        grad_norm = torch.empty(programs, 2, width if norm else 0, dtype=torch.float32, device=grad.device)
        if rows:
            gradients = (_padded(grad_features[part]), grad_scale, grad_norm, grad_total)
            launch(
                _average_backward_kernel, (programs,),
                (grad, pointers, scale[part], weight, statistics, *gradients, rows, count, width),
                NORM=norm, SPLIT=grad_total is not None, **tile,
                VECTOR=16 // min(f.element_size() for f in features),
            )  # fmt: skip
        return grad_scale.sum(0)[:count], grad_norm.sum(0)

    norm = weight is not None
    if n <= MAX_FEATURES:
        grad_scale, grad_norm = launch_part(grad, slice(None), norm, None)
    else:  # first the gradient of the average, then those of the features, some at a time
        grad_norm = grad.new_empty(2, 0, dtype=torch.float32)
        if norm:
            grad_total = torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
            _, grad_norm = launch_part(grad, slice(None), True, grad_total)
            grad = grad_total
        parts = [slice(i, i + MAX_FEATURES) for i in range(0, n, MAX_FEATURES)]
        grad_scale = torch.cat([launch_part(grad, part, False, None)[0] for part in parts])
    return [*grad_features, grad_scale.to(scale.dtype), grad_norm]
