"""The selective scan for CPUs, compiled by Numba. `reference.py` says what it computes.

Channels are the vector lanes: the inner loops run over a block of channels, with states, decays and adjoints of the
block in the cache. Exponentials and logarithms are polynomials here, since calls into libm would not be vectorised;
they are as accurate as float32. The first call ever compiles for some seconds; Numba keeps the result on disk.
"""

import math

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic

from .reference import ORDERS

CHANNELS = 64  # of a block: its states (x 16) fill a quarter of a 32 KiB cache
CHUNK = 32  # steps whose states the backward pass holds at once

_LN2 = np.float32(math.log(2))
_LOG2E = np.float32(1 / math.log(2))
_EXP2 = tuple(np.float32(math.log(2) ** k / math.factorial(k)) for k in range(8))

# Loops are compiled in two forms, by vectors and not, and addresses decide between them. To round alike in both, sums
# of products are fused where `_fma` says so; the compiler may neither fuse others ("contract") nor reorder ("reassoc").
_FAST = {"nsz"}
_jit = numba.njit(fastmath=_FAST, error_model="numpy", inline="always")
_kernel = numba.njit(fastmath=_FAST, error_model="numpy", parallel=True, cache=True)


@intrinsic
def _fma(context, a, b, c):
    """a b + c, rounded once; by software, and slow, on an x86 processor from before 2013."""

    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@_jit
def _exp2(x):
    """2^x for x <= 0, to 2 units in the last place; 0 below the smallest normal number."""
    x = max(x, np.float32(-127.0))
    whole = np.floor(x + np.float32(0.5))
    f = x - whole
    p = _EXP2[7]
    p = _fma(p, f, _EXP2[6])
    p = _fma(p, f, _EXP2[5])
    p = _fma(p, f, _EXP2[4])
    p = _fma(p, f, _EXP2[3])
    p = _fma(p, f, _EXP2[2])
    p = _fma(p, f, _EXP2[1])
    p = _fma(p, f, _EXP2[0])
    return p * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@_jit
def _softplus(x):
    e = _exp2(-abs(x) * _LOG2E)
    z = e / (np.float32(2) + e)  # log(1 + e) = 2 artanh(z), z <= 1/3
    s = z * z
    p = np.float32(1 / 13)
    p = _fma(p, s, np.float32(1 / 11))
    p = _fma(p, s, np.float32(1 / 9))
    p = _fma(p, s, np.float32(1 / 7))
    p = _fma(p, s, np.float32(1 / 5))
    p = _fma(p, s, np.float32(1 / 3))
    return _fma(np.float32(2) * z, _fma(p, s, np.float32(1)), max(x, np.float32(0)))


@numba.njit(fastmath={*_FAST, "reassoc"}, error_model="numpy")
def _sums(a, b, size):
    """Of two arrays, by vectors: a loop that writes nothing has one form only."""
    sum_a = np.float32(0)
    sum_b = np.float32(0)
    for e in range(size):
        sum_a += a[e]
        sum_b += b[e]
    return sum_a, sum_b


@_jit
def _position(t, order, height, width):
    """Flat position of step t: order 0 rows, 1 columns; 2 and 3 the same from their ends."""
    if order >= 2:
        t = height * width - 1 - t
    return (t % height) * width + t // height if order % 2 == 1 else t


@_kernel
def _forward(u, delta, A, B, C, D, bias, y, last, orders, height, width, softplus, threads):
    """u (batch, L, 1 or K, E), delta and y (batch, L, K, E), A (K, N, E) times log2(e)."""
    batch, length, lanes, features = delta.shape
    n = A.shape[1]
    blocks = (features + CHANNELS - 1) // CHANNELS
    for worker in numba.prange(threads):
        h = np.empty((n, CHANNELS), np.float32)
        dt = np.empty(CHANNELS, np.float32)
        du = np.empty(CHANNELS, np.float32)
        out = np.empty(CHANNELS, np.float32)
        for task in range(worker, batch * blocks, threads):
            b, first = task // blocks, (task % blocks) * CHANNELS
            size = min(CHANNELS, features - first)
            for k in range(lanes):
                ku = k if u.shape[2] > 1 else 0
                h[:] = 0
                for t in range(length):
                    p = _position(t, orders[k], height, width)
                    for e in range(size):
                        x = delta[b, p, k, first + e] + bias[k, first + e]
                        dt[e] = _softplus(x) if softplus else x
                        v = u[b, p, ku, first + e]
                        du[e] = dt[e] * v
                        out[e] = D[k, first + e] * v
                    for i in range(n):
                        bi, ci = B[b, p, k, i], C[b, p, k, i]
                        for e in range(size):
                            s = _fma(_exp2(dt[e] * A[k, i, first + e]), h[i, e], du[e] * bi)
                            h[i, e] = s
                            out[e] = _fma(s, ci, out[e])
                    for e in range(size):
                        y[b, p, k, first + e] = out[e]
                if last.shape[0] > 0:
                    for i in range(n):
                        for e in range(size):
                            last[b, k, first + e, i] = h[i, e]


@_kernel
def _backward(
    gy, glast, u, delta, A, B, C, D, bias, gu, gdelta, gA, gB, gC, gD, gbias, orders, height, width, softplus, threads
):
    """Gradients; gu (batch, L, K, E), and gA, gD and gbias apart for every image: (batch, K, ...)."""
    batch, length, lanes, features = delta.shape
    n = A.shape[1]
    chunks = (length + CHUNK - 1) // CHUNK
    for worker in numba.prange(threads):
        starts = np.empty((chunks, n, CHANNELS), np.float32)
        states = np.empty((CHUNK + 1, n, CHANNELS), np.float32)
        decays = np.empty((CHUNK, n, CHANNELS), np.float32)
        dts = np.empty((CHUNK, CHANNELS), np.float32)
        g = np.empty((n, CHANNELS), np.float32)
        ga = np.empty((n, CHANNELS), np.float32)
        du = np.empty(CHANNELS, np.float32)
        ginput = np.empty(CHANNELS, np.float32)
        gdt = np.empty(CHANNELS, np.float32)
        gd = np.empty(CHANNELS, np.float32)
        gb = np.empty(CHANNELS, np.float32)
        products_b = np.empty(CHANNELS, np.float32)
        products_c = np.empty(CHANNELS, np.float32)
        for task in range(worker, batch * lanes, threads):
            b, k = task // lanes, task % lanes
            ku = k if u.shape[2] > 1 else 0
            ky = k if gy.shape[2] > 1 else 0
            order = orders[k]
            for first in range(0, features, CHANNELS):
                size = min(CHANNELS, features - first)
                # the states before every chunk
                h = states[0]
                h[:] = 0
                for t in range(length):
                    if t % CHUNK == 0:
                        starts[t // CHUNK] = h
                    p = _position(t, order, height, width)
                    for e in range(size):
                        x = delta[b, p, k, first + e] + bias[k, first + e]
                        dts[0, e] = _softplus(x) if softplus else x
                        du[e] = dts[0, e] * u[b, p, ku, first + e]
                    for i in range(n):
                        bi = B[b, p, k, i]
                        for e in range(size):
                            h[i, e] = _fma(_exp2(dts[0, e] * A[k, i, first + e]), h[i, e], du[e] * bi)
                g[:] = 0
                ga[:] = 0
                gd[:] = 0
                gb[:] = 0
                if glast.shape[0] > 0:
                    for i in range(n):
                        for e in range(size):
                            g[i, e] = glast[b, k, first + e, i]
                for chunk in range(chunks - 1, -1, -1):
                    begin = chunk * CHUNK
                    steps = min(CHUNK, length - begin)
                    states[0] = starts[chunk]
                    for r in range(steps):
                        p = _position(begin + r, order, height, width)
                        for e in range(size):
                            x = delta[b, p, k, first + e] + bias[k, first + e]
                            dts[r, e] = _softplus(x) if softplus else x
                            du[e] = dts[r, e] * u[b, p, ku, first + e]
                        for i in range(n):
                            bi = B[b, p, k, i]
                            for e in range(size):
                                a = _exp2(dts[r, e] * A[k, i, first + e])
                                decays[r, i, e] = a
                                states[r + 1, i, e] = _fma(a, states[r, i, e], du[e] * bi)
                    for r in range(steps - 1, -1, -1):
                        p = _position(begin + r, order, height, width)
                        for e in range(size):
                            ginput[e] = 0
                            gdt[e] = 0
                            du[e] = dts[r, e] * u[b, p, ku, first + e]
                        for i in range(n):
                            bi, ci = B[b, p, k, i], C[b, p, k, i]
                            for e in range(size):
                                y = gy[b, p, ky, first + e]
                                after = _fma(ci, y, g[i, e])  # the adjoint of the state after this step
                                products_c[e] = y * states[r + 1, i, e]
                                products_b[e] = after * du[e]
                                ginput[e] = _fma(after, bi, ginput[e])
                                before = after * decays[r, i, e]  # and of the state before it
                                exponent = before * states[r, i, e]
                                gdt[e] = _fma(exponent, A[k, i, first + e], gdt[e])
                                ga[i, e] = _fma(exponent, dts[r, e], ga[i, e])
                                g[i, e] = before
                            sum_b, sum_c = _sums(products_b, products_c, size)
                            gB[b, p, k, i] += sum_b
                            gC[b, p, k, i] += sum_c
                        for e in range(size):
                            v = u[b, p, ku, first + e]
                            y = gy[b, p, ky, first + e]
                            gu[b, p, k, first + e] = _fma(dts[r, e], ginput[e], D[k, first + e] * y)
                            gd[e] = _fma(y, v, gd[e])
                            x = _fma(v, ginput[e], _LN2 * gdt[e])
                            if softplus:
                                d = dts[r, e]  # sigmoid = 1 - exp(-softplus), by its series where that would cancel
                                small = d * _fma(-d, _fma(-d, np.float32(1 / 6), np.float32(0.5)), np.float32(1))
                                x *= small if d < np.float32(0.01) else np.float32(1) - _exp2(-d * _LOG2E)
                            gdelta[b, p, k, first + e] = x
                            gb[e] += x
                for e in range(size):
                    gD[b, k, first + e] = gd[e]
                    gbias[b, k, first + e] = gb[e]
                for i in range(n):
                    for e in range(size):
                        gA[b, k, i, first + e] = ga[i, e]


def _arrays(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [t.detach().float().contiguous().numpy() for t in tensors]


def _common(u, delta, A, B, C, D, delta_bias, orders):
    u = u.unsqueeze(2) if u.dim() == 3 else u
    tensors = _arrays(u, delta, A.float().transpose(1, 2) * float(_LOG2E), B, C, D, delta_bias)
    return tensors, np.array([ORDERS.index(order) for order in orders])


def _threads() -> int:
    """PyTorch's number of threads, as far as Numba has as many."""
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(threads)
    return threads


def selective_scan_numba(u, delta, A, B, C, D, delta_bias, delta_softplus, orders, height, width, with_last):
    """As `reference.selective_scan_chunked`, in float32."""
    batch, _, lanes, features = delta.shape
    arrays, order_ids = _common(u, delta, A, B, C, D, delta_bias, orders)
    y = torch.empty(delta.shape)
    last = torch.empty((batch, lanes, features, A.shape[-1]) if with_last else (0, 0, 0, 0))
    _forward(*arrays, y.numpy(), last.numpy(), order_ids, height, width, delta_softplus, _threads())
    return y, last if with_last else last.flatten()


def selective_scan_numba_backward(
    grad_y, grad_last, u, delta, A, B, C, D, delta_bias, delta_softplus, orders, height, width
):
    """As `reference.selective_scan_chunked_backward`, in float32."""
    batch, length, lanes, features = delta.shape
    n = A.shape[-1]
    arrays, order_ids = _common(u, delta, A, B, C, D, delta_bias, orders)
    gy, glast = _arrays(
        grad_y.unsqueeze(2) if grad_y.dim() == 3 else grad_y,
        grad_last if grad_last.numel() else grad_last.view(0, 0, 0, 0),
    )
    gu, gdelta = torch.empty(delta.shape), torch.empty(delta.shape)
    gA = torch.empty(batch, lanes, n, features)
    gB, gC = (torch.zeros(batch, length, lanes, n) for _ in range(2))
    gD, gbias = (torch.empty(batch, lanes, features) for _ in range(2))
    outputs = [t.numpy() for t in (gu, gdelta, gA, gB, gC, gD, gbias)]
    _backward(gy, glast, *arrays, *outputs, order_ids, height, width, delta_softplus, _threads())
    return (
        (gu if u.dim() == 4 else gu.sum(2)).to(u.dtype),
        gdelta.to(delta.dtype),
        gA.sum(0).transpose(1, 2).contiguous().to(A.dtype),
        gB.to(B.dtype),
        gC.to(C.dtype),
        gD.sum(0).to(D.dtype),
        gbias.sum(0).to(delta_bias.dtype),
    )
