"""SiLU(depth-wise 3x3 convolution) in Triton. `../depthwise.py` says what it computes.

A program takes a strip of rows, P * T columns of it and C channels, and walks down the rows. Threads lie over channels
and P groups of T neighbouring columns, so that each keeps its channels' taps and the rows it still needs in registers:
a row is loaded once, with one column of margin on either side. Rows have 64-bit addresses, pixels in a row 32-bit
offsets. The walk takes three rows at a time, whose loads are under way together; after three, the roles of the
registers that hold rows have come round. Where maps are low, a program goes on to the next images with the taps it has.
"""

# ruff: noqa: RUF005  (Triton does not know starred tuples)

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_launch import INTERPRETED, MAX_LAUNCHES, Launch
from ...triton_math import sigmoid
from ...triton_sums import sum_parts

MIN_ROWS, MAX_ROWS = 10, 42  # of a strip
FORWARD_PROGRAMS = 4096  # that keep a GPU busy; with more images than that, a program goes on to the next
BACKWARD_PROGRAMS = 2048
FORWARD_REGISTERS = 128  # for half precision: a few spills, twice the warps


@triton.jit
def _tile(strips, W, E, P: tl.constexpr, T: tl.constexpr, C: tl.constexpr):
    """A program's part, strip and first image group, its columns [P, 1] (the first of T) and channels [1, C]."""
    pid = tl.program_id(0)
    channel_blocks = tl.cdiv(E, C)
    column_blocks = tl.cdiv(W, P * T)
    e = (pid % channel_blocks) * C + tl.arange(0, C)[None, :]
    part = pid // channel_blocks
    w = (part % column_blocks) * (P * T) + T * tl.arange(0, P)[:, None]
    strip = part // column_blocks
    return part, strip % strips, strip // strips, w, e


@triton.jit
def _load_taps(weight_ptr, e, channel_in, FLIP: tl.constexpr):
    """The nine taps of (E, 1, 3, 3), row by row, each a tile [P, C] with all P rows equal, as the sums have them."""
    taps = ()
    for i in tl.static_range(9):
        taps = taps + (tl.load(weight_ptr + e * 9 + (8 - i if FLIP else i), mask=channel_in, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _load_columns(row_ptr, offset, w, row, end, W, x_w, channel_in, COLUMNS: tl.constexpr, MARGIN: tl.constexpr):
    """Neighbouring columns of a row, the first MARGIN before w; zero outside the map (rows from 0 to before end)."""
    columns = ()
    width = tl.where((row >= 0) & (row < end), W, 0)
    for j in tl.static_range(COLUMNS):
        at = w + (j - MARGIN)
        mask = (at >= 0) & (at < width) & channel_in
        columns = columns + (tl.load(row_ptr + (j - MARGIN) * x_w + offset, mask=mask, other=0.0),)
    return columns


@triton.jit
def _to_float32(tiles):
    converted = ()
    for i in tl.static_range(len(tiles)):
        converted = converted + (tiles[i].to(tl.float32),)
    return converted


@triton.jit
def _add_row(sums, columns, taps, ROW: tl.constexpr, T: tl.constexpr):
    """To the sums of T outputs, what the row of taps ROW makes of T + 2 columns."""
    new = ()
    for t in tl.static_range(T):
        new = new + (
            sums[t]
            + columns[t] * taps[3 * ROW]
            + columns[t + 1] * taps[3 * ROW + 1]
            + columns[t + 2] * taps[3 * ROW + 2],
        )
    return new


@triton.jit(do_not_specialize=["batch", "H", "W", "rows", "strips", "images"])
def _conv_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr,
    batch, H, W, E,  # sizes of the maps
    rows, strips, images,  # rows of a strip, strips of a map, images that a program takes
    x_b, x_h, x_w,  # strides of x
    y_w,  # stride of y between columns, which lie row by row and map by map
    ACTIVATE: tl.constexpr, FAST: tl.constexpr,  # with SiLU; NVIDIA's approximate instructions
    P: tl.constexpr, T: tl.constexpr, C: tl.constexpr,  # groups of columns, columns of a group, channels of a tile
):  # fmt: skip
    """y = SiLU(conv(x) + bias); without ACTIVATE, y = conv(x) with flipped taps, the convolution's adjoint."""
    _, strip, group, w, e = _tile(strips, W, E, P, T, C)
    channel_in = (w < W) & (e < E)
    taps = _load_taps(weight_ptr, e + 0 * w, channel_in, not ACTIVATE)
    bias = tl.zeros([P, C], dtype=tl.float32)
    if ACTIVATE:
        bias = tl.load(bias_ptr + e + 0 * w, mask=channel_in, other=0.0).to(tl.float32)
    start = ()
    for _t in tl.static_range(T):
        start = start + (bias,)

    first = strip * rows
    last = tl.minimum(first + rows, H)
    x_offset = (w * x_w + e).to(tl.uint32)
    y_offset = (w * y_w + e).to(tl.uint32)
    y_h = tl.cast(W, tl.int64) * y_w
    for image in range(group * images, tl.minimum((group + 1) * images, batch)):
        x_row = x_ptr + tl.cast(image, tl.int64) * x_b + tl.cast(first - 1, tl.int64) * x_h
        y_row = y_ptr + (tl.cast(image, tl.int64) * H + first - 2) * y_h
        upper = start  # the sums of the row above the one that comes next, which is their last, and of that row
        middle = start
        for row in range(first - 1, last + 1, 3):
            new_rows = ()
            for i in tl.static_range(3):
                new_rows = new_rows + (
                    _load_columns(x_row, x_offset, w, row + i, tl.minimum(last + 1, H), W, x_w, channel_in, T + 2, 1),
                )
                x_row += x_h
            for i in tl.static_range(3):
                columns = _to_float32(new_rows[i])
                done = _add_row(upper, columns, taps, 2, T)
                upper = _add_row(middle, columns, taps, 1, T)
                middle = _add_row(start, columns, taps, 0, T)
                out = row + i - 1
                width = tl.where((out >= first) & (out < last), W, 0)
                for t in tl.static_range(T):
                    y = done[t]
                    if ACTIVATE:
                        y *= sigmoid(y, FAST)
                    mask = (w + t < width) & channel_in
                    tl.store(y_row + t * y_w + y_offset, y.to(y_ptr.dtype.element_ty), mask=mask)
                y_row += y_h


@triton.jit(do_not_specialize=["batch", "H", "W", "rows", "strips", "images"])
def _backward_kernel(
    x_ptr, weight_ptr, bias_ptr, gy_ptr,
    gpre_ptr, sums_ptr,  # the gradient of what SiLU is applied to, and parts of those of weight and bias
    batch, H, W, E, rows, strips, images, x_b, x_h, x_w,  # these and the others as above
    FAST: tl.constexpr, P: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The gradient of what SiLU is applied to, and the program's sums (10, E) for the nine taps and the bias."""
    part, strip, group, w, e = _tile(strips, W, E, P, T, C)
    channel_in = (w < W) & (e < E)
    taps = _load_taps(weight_ptr, e + 0 * w, channel_in, False)
    bias = tl.load(bias_ptr + e + 0 * w, mask=channel_in, other=0.0).to(tl.float32)
    start = ()
    for _t in tl.static_range(T):
        start = start + (bias,)
    zero = tl.zeros([P, C], dtype=tl.float32)
    gbias = zero
    gtaps = (zero, zero, zero, zero, zero, zero, zero, zero, zero)

    first = strip * rows
    last = tl.minimum(first + rows, H)
    x_offset = (w * x_w + e).to(tl.uint32)
    y_offset = (w * E + e).to(tl.uint32)
    y_h = tl.cast(W, tl.int64) * E
    for image in range(group * images, tl.minimum((group + 1) * images, batch)):
        x_row = x_ptr + tl.cast(image, tl.int64) * x_b + tl.cast(first - 1, tl.int64) * x_h
        at = (tl.cast(image, tl.int64) * H + first) * y_h
        gy_row = gy_ptr + at
        gpre_row = gpre_ptr + at
        upper = _to_float32(_load_columns(x_row, x_offset, w, first - 1, H, W, x_w, channel_in, T + 2, 1))
        middle = _to_float32(_load_columns(x_row + x_h, x_offset, w, first, H, W, x_w, channel_in, T + 2, 1))
        x_row = x_row + x_h + x_h
        for row in range(first, last, 3):
            new_rows = ()
            gys = ()
            for i in tl.static_range(3):
                new_rows = new_rows + (
                    _load_columns(
                        x_row, x_offset, w, row + i + 1, tl.minimum(last + 1, H), W, x_w, channel_in, T + 2, 1
                    ),
                )
                gys = gys + (_load_columns(gy_row, y_offset, w, row + i, last, W, E, channel_in, T, 0),)
                x_row += x_h
                gy_row += y_h
            for i in tl.static_range(3):
                lower = _to_float32(new_rows[i])
                pre = _add_row(start, upper, taps, 0, T)
                pre = _add_row(pre, middle, taps, 1, T)
                pre = _add_row(pre, lower, taps, 2, T)
                window = (upper, middle, lower)
                width = tl.where(row + i < last, W, 0)
                for t in tl.static_range(T):
                    s = sigmoid(pre[t], FAST)
                    gpre = gys[i][t].to(tl.float32) * (s + pre[t] * (s - s * s))  # zero outside the map, as gy is
                    mask = (w + t < width) & channel_in
                    tl.store(gpre_row + t * E + y_offset, gpre.to(gpre_ptr.dtype.element_ty), mask=mask)
                    gbias += gpre
                    new = ()
                    for k in tl.static_range(9):
                        new = new + (gtaps[k] + gpre * window[k // 3][t + k % 3],)
                    gtaps = new
                gpre_row += y_h
                upper = middle
                middle = lower

    sums_at = sums_ptr + tl.cast(part, tl.int64) * 10 * E + e
    for k in tl.static_range(9):
        tl.store(sums_at + k * E, tl.sum(gtaps[k], axis=0)[None, :], mask=e < E)
    tl.store(sums_at + 9 * E, tl.sum(gbias, axis=0)[None, :], mask=e < E)


def _launch_shape(shape: tuple[int, ...], columns: int, programs: int) -> tuple[int, int, int, int, dict]:
    """For maps of this shape: programs, rows of a strip, strips of a map, images of a program, and the tile: 4 channels
    and `columns` columns a thread, 64 channels and 8 columns a program. Small batches are cut into short strips, large
    ones share programs."""
    batch, height, width, channels = shape
    blocks = -(-width // 8) * -(-channels // 64)
    strips = max(-(-height // MAX_ROWS), min(-(-height // MIN_ROWS), programs // (batch * blocks)))
    rows = -(-height // strips)
    strips = -(-height // rows)
    images = max(batch * blocks * strips // programs, 1)
    tile = dict(P=8 // columns, T=columns, C=64, num_warps=4 // columns)
    return blocks * strips * -(-batch // images), rows, strips, images, tile


def _rows_addressable(x: Tensor) -> Tensor:
    contiguous = x.stride(-1) == 1 or x.shape[-1] == 1
    return x if contiguous and x.shape[2] * x.stride(2) < 2**31 else x.contiguous()


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, activate: bool) -> None:
    _forward(x.shape, x.stride(), y.stride(2), x.itemsize == 2, activate)(x, weight, bias, y)


@functools.lru_cache(MAX_LAUNCHES)
def _forward(shape: tuple[int, ...], stride: tuple[int, ...], y_w: int, half: bool, activate: bool) -> Launch:
    programs, rows, strips, images, tile = _launch_shape(shape, 2, FORWARD_PROGRAMS)
    numbers = (*shape, rows, strips, images, *stride[:3], y_w)
    options = dict(ACTIVATE=activate, FAST=not INTERPRETED, **tile, maxnreg=FORWARD_REGISTERS if half else None)
    return Launch(_conv_kernel, (programs,), numbers, **options)


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `depthwise_conv_silu`, in Triton."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _convolve(_rows_addressable(x), weight.contiguous(), bias.contiguous(), y, activate=True)
    return y


def convolve_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, grad_x: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, weight and bias.

    Args:
        grad_x: Where the first of them is written: in a new tensor, or in this one of x's shape and dtype, which may
            have room between its columns, all as wide.
    """
    x, grad_y, weight, bias = _rows_addressable(x), grad_y.contiguous(), weight.contiguous(), bias.contiguous()
    channels = x.shape[3]
    programs, launch = _backward(x.shape, x.stride(), x.itemsize == 2)
    grad_pre = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums = torch.empty(programs // -(-channels // 64), 10, channels, dtype=torch.float32, device=x.device)
    launch(x, weight, bias, grad_y, grad_pre, sums)
    if grad_x is None:
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _convolve(grad_pre, weight, bias, grad_x, activate=False)
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
    sum_parts(sums, grad_weight, grad_bias, transposed=True)
    return grad_x, grad_weight, grad_bias


@functools.lru_cache(MAX_LAUNCHES)
def _backward(shape: tuple[int, ...], stride: tuple[int, ...], half: bool) -> tuple[int, Launch]:
    """Also the number of programs."""
    # in half precision two columns a thread, for which it loads four, where one alone takes three
    programs, rows, strips, images, tile = _launch_shape(shape, 2 if half else 1, BACKWARD_PROGRAMS)
    numbers = (*shape, rows, strips, images, *stride[:3])
    return programs, Launch(_backward_kernel, (programs,), numbers, FAST=not INTERPRETED, **tile)
