"""SiLU(causal and anti-causal convolutions along many short sequences) in Triton. `../directional.py` says what it
computes.

A program takes a block of sequences and walks along their steps, the last TAPS steps in registers: what one direction
sees from its newest step is what the other sees from its oldest, so that every step is loaded once for both. The
backward pass walks the same way, with the gradients of those steps under way, and needs nothing but one pass, either.
Each program goes on to further blocks with the taps it has, and keeps the sums of their gradients until its end.
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

FORWARD_PROGRAMS = 8192  # that keep a GPU busy; with more blocks than that, a program goes on to the next
BACKWARD_PROGRAMS = 2048
FORWARD_FEATURES, BACKWARD_FEATURES = 4, 2  # of a block, that a thread has
THREADS = 128  # of a program

STEPS = tl.constexpr(3)  # whose loads are under way together: with 4 taps, L + 3 steps come out even for L = 12, 24, 48


@triton.jit
def _tile(P: tl.constexpr, P_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr):
    """A program's part, its sequences in a block [N, 1] and features [1, P]."""
    pid = tl.program_id(0)
    features: tl.constexpr = (P + P_BLOCK - 1) // P_BLOCK
    p = (pid % features) * P_BLOCK + tl.arange(0, P_BLOCK)[None, :]
    return pid // features, tl.arange(0, N_BLOCK)[:, None], p


@triton.jit
def _load_taps(weight_ptr, bias_ptr, p, p_in, K: tl.constexpr, TAPS: tl.constexpr):
    """Direction K's taps of (2P, 1, TAPS), in the order of steps in memory, and its bias: tiles [N, P] with all N rows
    equal, as the arithmetic has them."""
    taps = ()
    for j in tl.static_range(TAPS):
        at = (2 * p + K) * TAPS + (TAPS - 1 - j if K else j)
        taps = taps + (tl.load(weight_ptr + at, mask=p_in, other=0.0).to(tl.float32),)
    return taps, tl.load(bias_ptr + 2 * p + K, mask=p_in, other=0.0).to(tl.float32)


@triton.jit
def _apply(window, taps, bias, TAPS: tl.constexpr):
    """The convolution's output where the window stands."""
    y = bias
    for j in tl.static_range(TAPS):
        y += window[j] * taps[j]
    return y


@triton.jit
def _add_products(sums, window, factor, TAPS: tl.constexpr):
    """sums + window x factor, for each tap."""
    new = ()
    for j in tl.static_range(TAPS):
        new = new + (sums[j] + window[j] * factor,)
    return new


@triton.jit
def _append(window, tile, TAPS: tl.constexpr):
    """The window one step later: without its oldest tile, and with one more."""
    new = ()
    for j in tl.static_range(1, TAPS):
        new = new + (window[j],)
    return new + (tile,)


@triton.jit
def _zeros(TAPS: tl.constexpr, N_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr):
    """A window of zeros."""
    zero = tl.zeros([N_BLOCK, P_BLOCK], dtype=tl.float32)
    tiles = ()
    for _j in tl.static_range(TAPS):
        tiles = tiles + (zero,)
    return tiles


@triton.jit
def _load_step(block_ptr, step, stride, offset, L, count, n, p_in):
    """A tile of a step; zero outside the sequence. count is how many sequences the block has."""
    mask = (n < tl.where((step >= 0) & (step < L), count, 0)) & p_in
    return tl.load(block_ptr + step * stride + offset, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["sequences", "L", "blocks"])
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr,
    sequences, L,  # steps of each
    blocks,  # of sequences, that a program takes
    x_n, STRIDE: tl.constexpr,  # strides of x between sequences and between steps
    P: tl.constexpr, TAPS: tl.constexpr,  # features, width of the convolution
    FAST: tl.constexpr,  # NVIDIA's approximate instructions
    N_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr,  # sequences and features of a block
):  # fmt: skip
    """y (sequences, L, 2, P), both directions' outputs."""
    part, n, p = _tile(P, P_BLOCK, N_BLOCK)
    p_in = (p < P) & (n >= 0)
    p_wide = p + 0 * n
    taps0, bias0 = _load_taps(weight_ptr, bias_ptr, p_wide, p_in, 0, TAPS)
    taps1, bias1 = _load_taps(weight_ptr, bias_ptr, p_wide, p_in, 1, TAPS)
    x_offset = (n * x_n + p).to(tl.uint32)
    y_offset = (n * (L * 2 * P) + p).to(tl.uint32)
    for block in range(part * blocks, tl.minimum((part + 1) * blocks, tl.cdiv(sequences, N_BLOCK))):
        first = tl.cast(block, tl.int64) * N_BLOCK
        count = tl.minimum(sequences - block * N_BLOCK, N_BLOCK)
        x_block = x_ptr + first * x_n
        y_block = y_ptr + first * (L * 2 * P)
        window = _zeros(TAPS, N_BLOCK, P_BLOCK)
        for step in range(0, L + (TAPS - 1), STEPS):
            loaded = ()
            for i in tl.static_range(STEPS):
                loaded = loaded + (_load_step(x_block, step + i, STRIDE, x_offset, L, count, n, p_in),)
            for i in tl.static_range(STEPS):
                window = _append(window, loaded[i].to(tl.float32), TAPS)
                y = _apply(window, taps0, bias0, TAPS)
                y *= sigmoid(y, FAST)
                mask = (n < tl.where(step + i < L, count, 0)) & p_in
                tl.store(y_block + (step + i) * (2 * P) + y_offset, y.to(y_ptr.dtype.element_ty), mask=mask)
                oldest = step + i - (TAPS - 1)
                y = _apply(window, taps1, bias1, TAPS)
                y *= sigmoid(y, FAST)
                mask = (n < tl.where((oldest >= 0) & (oldest < L), count, 0)) & p_in
                tl.store(y_block + oldest * (2 * P) + P + y_offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _silu_gradient(grad, x, FAST: tl.constexpr):
    """From the gradient of SiLU(x) to that of x."""
    s = sigmoid(x, FAST)
    return grad.to(tl.float32) * (s + x * (s - s * s))


@triton.jit(do_not_specialize=["sequences", "L", "blocks"])
def _backward_kernel(
    x_ptr, weight_ptr, bias_ptr, gy_ptr,
    gx_ptr, sums_ptr,  # the gradient of x, and parts of those of weight and bias
    sequences, L, blocks, x_n,  # these and the others as above
    gx_n,  # stride of gx between sequences, whose steps lie one behind another
    STRIDE: tl.constexpr, P: tl.constexpr, TAPS: tl.constexpr, FAST: tl.constexpr,
    N_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of x, and the program's sums for the weight, (2 P, TAPS), and behind them for the bias, (2 P,)."""
    part, n, p = _tile(P, P_BLOCK, N_BLOCK)
    p_in = (p < P) & (n >= 0)
    p_wide = p + 0 * n
    taps0, bias0 = _load_taps(weight_ptr, bias_ptr, p_wide, p_in, 0, TAPS)
    taps1, bias1 = _load_taps(weight_ptr, bias_ptr, p_wide, p_in, 1, TAPS)
    zero = tl.zeros([N_BLOCK, P_BLOCK], dtype=tl.float32)
    gtaps0 = _zeros(TAPS, N_BLOCK, P_BLOCK)
    gtaps1 = _zeros(TAPS, N_BLOCK, P_BLOCK)
    gbias0 = zero
    gbias1 = zero
    x_offset = (n * x_n + p).to(tl.uint32)
    y_offset = (n * (L * 2 * P) + p).to(tl.uint32)
    gx_offset = (n * gx_n + p).to(tl.uint32)
    for block in range(part * blocks, tl.minimum((part + 1) * blocks, tl.cdiv(sequences, N_BLOCK))):
        first = tl.cast(block, tl.int64) * N_BLOCK
        count = tl.minimum(sequences - block * N_BLOCK, N_BLOCK)
        x_block = x_ptr + first * x_n
        gy_block = gy_ptr + first * (L * 2 * P)
        gx_block = gx_ptr + first * gx_n
        window = _zeros(TAPS, N_BLOCK, P_BLOCK)
        gwindow = _zeros(TAPS, N_BLOCK, P_BLOCK)
        for step in range(0, L + (TAPS - 1), STEPS):
            loaded = ()
            for i in tl.static_range(STEPS):
                oldest = step + i - (TAPS - 1)
                loaded = loaded + (
                    (
                        _load_step(x_block, step + i, STRIDE, x_offset, L, count, n, p_in),
                        _load_step(gy_block, step + i, 2 * P, y_offset, L, count, n, p_in),
                        _load_step(gy_block + P, oldest, 2 * P, y_offset, L, count, n, p_in),
                    ),
                )
            for i in tl.static_range(STEPS):
                window = _append(window, loaded[i][0].to(tl.float32), TAPS)
                gwindow = _append(gwindow, zero, TAPS)
                # outside the sequence these are zero, as the gradients of outputs that are not there
                g0 = _silu_gradient(loaded[i][1], _apply(window, taps0, bias0, TAPS), FAST)
                g1 = _silu_gradient(loaded[i][2], _apply(window, taps1, bias1, TAPS), FAST)
                gwindow = _add_products(gwindow, taps0, g0, TAPS)
                gwindow = _add_products(gwindow, taps1, g1, TAPS)
                gtaps0 = _add_products(gtaps0, window, g0, TAPS)
                gtaps1 = _add_products(gtaps1, window, g1, TAPS)
                gbias0 += g0
                gbias1 += g1
                oldest = step + i - (TAPS - 1)  # no later step touches it
                mask = (n < tl.where((oldest >= 0) & (oldest < L), count, 0)) & p_in
                tl.store(gx_block + oldest * P + gx_offset, gwindow[0].to(gx_ptr.dtype.element_ty), mask=mask)

    sums = sums_ptr + tl.cast(part, tl.int64) * (2 * (TAPS + 1) * P)
    weight_at = sums + 2 * p * TAPS
    bias_at = sums + 2 * P * TAPS + 2 * p
    for j in tl.static_range(TAPS):  # from the order of steps to that of taps
        tl.store(weight_at + j, tl.sum(gtaps0[j], axis=0)[None, :], mask=p < P)
        tl.store(weight_at + TAPS + (TAPS - 1 - j), tl.sum(gtaps1[j], axis=0)[None, :], mask=p < P)
    tl.store(bias_at, tl.sum(gbias0, axis=0)[None, :], mask=p < P)
    tl.store(bias_at + 1, tl.sum(gbias1, axis=0)[None, :], mask=p < P)


def _launch_shape(sequences: int, features: int, programs: int, a_thread: int) -> tuple[int, int, int, dict]:
    """Programs, parts of the sequences, blocks of a part, and the tile: so many features a thread."""
    P_BLOCK = min(1 << (features - 1).bit_length(), 64)
    N_BLOCK = THREADS * a_thread // P_BLOCK
    all_blocks = -(-sequences // N_BLOCK)
    blocks = max(all_blocks // programs, 1)
    parts = -(-all_blocks // blocks)
    tile = dict(N_BLOCK=N_BLOCK, P_BLOCK=P_BLOCK, num_warps=THREADS // 32)
    return parts * -(-features // P_BLOCK), parts, blocks, tile


def _sequences_addressable(x: Tensor) -> Tensor:
    most = THREADS * FORWARD_FEATURES  # sequences of a block
    if most * 2 * x.shape[1] * x.shape[2] >= 2**32:  # offsets in a block have 32 bits
        raise ValueError(f"Sequences of {x.shape[1]} steps of {x.shape[2]} are too long here: use backend='torch'.")
    contiguous = x.stride(-1) == 1 or x.shape[-1] == 1
    return x if contiguous and most * x.stride(0) < 2**31 and x.shape[1] * x.stride(1) < 2**31 else x.contiguous()


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `directional_conv_silu`, in Triton."""
    x, weight, bias = _sequences_addressable(x), weight.contiguous(), bias.contiguous()
    sequences, length, features = x.shape
    y = torch.empty(sequences, length, 2, features, dtype=x.dtype, device=x.device)
    _forward(x.shape, x.stride(), weight.shape[-1])(x, weight, bias, y)
    return y


@functools.lru_cache(MAX_LAUNCHES)
def _forward(shape: tuple[int, ...], stride: tuple[int, ...], taps: int) -> Launch:
    sequences, length, features = shape
    programs, _, blocks, tile = _launch_shape(sequences, features, FORWARD_PROGRAMS, FORWARD_FEATURES)
    options = dict(STRIDE=stride[1], P=features, TAPS=taps, FAST=not INTERPRETED, **tile)
    return Launch(_forward_kernel, (programs,), (sequences, length, blocks, stride[0]), **options)


def convolve_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, grad_x: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, weight and bias.

    Args:
        grad_x: Where the first of them is written: in a new tensor, or in this one of x's shape and dtype, which may
            have room between its sequences, less than a block of them would need 64-bit offsets for.
    """
    x, grad_y, weight, bias = (
        _sequences_addressable(x),
        grad_y.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
    )
    if grad_x is None:
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parts, launch = _backward(x.shape, x.stride(), grad_x.stride(0), weight.shape[-1])
    # rows as wide as the bias, of which one for each tap
    sums = torch.empty(parts, weight.shape[-1] + 1, bias.numel(), dtype=torch.float32, device=x.device)
    launch(x, weight, bias, grad_y, grad_x, sums)
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
    sum_parts(sums, grad_weight, grad_bias)
    return grad_x, grad_weight, grad_bias


@functools.lru_cache(MAX_LAUNCHES)
def _backward(shape: tuple[int, ...], stride: tuple[int, ...], gx_n: int, taps: int) -> tuple[int, Launch]:
    """Also the parts that the sequences are cut into."""
    sequences, length, features = shape
    programs, parts, blocks, tile = _launch_shape(sequences, features, BACKWARD_PROGRAMS, BACKWARD_FEATURES)
    options = dict(STRIDE=stride[1], P=features, TAPS=taps, FAST=not INTERPRETED, **tile)
    return parts, Launch(_backward_kernel, (programs,), (sequences, length, blocks, stride[0], gx_n), **options)
