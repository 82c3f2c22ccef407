"""The selective scan for CPUs, compiled by Numba. `reference.py` says what it computes.

Channels are the vector lanes: the inner loops run over a block of channels, with states, decays and adjoints of the
block in the cache. They index rows that begin at the block, never `first + e`: Numba cannot tell that such an index is
not negative, looks at its sign, and reads element by element. The first call ever compiles for some seconds; Numba
keeps the result on disk, if it can.
"""

import math

import numba
import numpy as np
import torch

from ..numba_math import FAST, LOG2E, exp2, fma, jit, kernel, threads_to_use
from .orders import ORDERS

CHANNELS = 64  # of a block: its states (x 16) fill a quarter of a 32 KiB cache
CHUNK = 32  # steps whose states the backward pass holds at once

_LN2 = np.float32(math.log(2))


@jit
def _softplus(x):
    e = exp2(-abs(x) * LOG2E)
    z = e / (np.float32(2) + e)  # log(1 + e) = 2 artanh(z), z <= 1/3
    s = z * z
    p = np.float32(1 / 13)
    p = fma(p, s, np.float32(1 / 11))
    p = fma(p, s, np.float32(1 / 9))
    p = fma(p, s, np.float32(1 / 7))
    p = fma(p, s, np.float32(1 / 5))
    p = fma(p, s, np.float32(1 / 3))
    return fma(np.float32(2) * z, fma(p, s, np.float32(1)), max(x, np.float32(0)))


@numba.njit(fastmath={*FAST, "reassoc"}, error_model="numpy")
def _sums(a, b, size):
    """The sums of two arrays. This loop may be reordered, into vectors: it writes nothing, and so has one form only."""
    sum_a = np.float32(0)
    sum_b = np.float32(0)
    for e in range(size):
        sum_a += a[e]
        sum_b += b[e]
    return sum_a, sum_b


@jit
def _position(t, order, height, width):
    """Flat position of step t: order 0 rows, 1 columns; 2 and 3 the same from their ends."""
    if order >= 2:
        t = height * width - 1 - t
    return (t % height) * width + t // height if order % 2 == 1 else t


@jit
def _load(block, rows, first, size):
    """Copies the block's columns of rows (n, E)."""
    for i in range(rows.shape[0]):
        row, to = rows[i, first : first + size], block[i]
        for e in range(size):
            to[e] = row[e]


@jit
def _step_sizes(dt, delta, bias, softplus):
    if softplus:
        for e in range(delta.shape[0]):
            dt[e] = _softplus(delta[e] + bias[e])
    else:
        for e in range(delta.shape[0]):
            dt[e] = delta[e] + bias[e]


@jit
def _next(a, dt, h, du, b):
    """The state after h, in a step of size dt whose input, times dt, is du."""
    return fma(exp2(dt * a), h, du * b)


@kernel
def _forward(u, delta, A, B, C, D, bias, y, last, orders, height, width, softplus, threads):
    """u (batch, L, 1 or K, E), delta and y (K, batch, L, E), A (K, N, E) times log2(e), B and C (K, batch, L, N)."""
    directions, batch, length, features = delta.shape
    n = A.shape[1]
    whole = n // 4 * 4  # states that are taken four at a time, so that dt, du and out are read once for four
    blocks = (features + CHANNELS - 1) // CHANNELS
    for worker in numba.prange(threads):
        a = np.empty((n, CHANNELS), np.float32)
        h = np.empty((n, CHANNELS), np.float32)
        dt = np.empty(CHANNELS, np.float32)
        du = np.empty(CHANNELS, np.float32)
        out = np.empty(CHANNELS, np.float32)
        for task in range(worker, batch * blocks, threads):
            b, first = task // blocks, (task % blocks) * CHANNELS
            size = min(CHANNELS, features - first)
            end = first + size
            for k in range(directions):
                ku = k if u.shape[2] > 1 else 0
                _load(a, A[k], first, size)
                bias_row, D_row = bias[k, first:end], D[k, first:end]
                h[:] = 0
                for t in range(length):
                    p = _position(t, orders[k], height, width)
                    _step_sizes(dt, delta[k, b, p, first:end], bias_row, softplus)
                    u_row, b_row, c_row = u[b, p, ku, first:end], B[k, b, p], C[k, b, p]
                    for e in range(size):
                        du[e] = dt[e] * u_row[e]
                        out[e] = D_row[e] * u_row[e]
                    for i in range(0, whole, 4):
                        b0, b1, b2, b3 = b_row[i], b_row[i + 1], b_row[i + 2], b_row[i + 3]
                        c0, c1, c2, c3 = c_row[i], c_row[i + 1], c_row[i + 2], c_row[i + 3]
                        for e in range(size):
                            d, v, o = dt[e], du[e], out[e]
                            h0 = _next(a[i, e], d, h[i, e], v, b0)
                            h1 = _next(a[i + 1, e], d, h[i + 1, e], v, b1)
                            h2 = _next(a[i + 2, e], d, h[i + 2, e], v, b2)
                            h3 = _next(a[i + 3, e], d, h[i + 3, e], v, b3)
                            h[i, e], h[i + 1, e], h[i + 2, e], h[i + 3, e] = h0, h1, h2, h3
                            out[e] = fma(h3, c3, fma(h2, c2, fma(h1, c1, fma(h0, c0, o))))
                    for i in range(whole, n):
                        bi, ci = b_row[i], c_row[i]
                        for e in range(size):
                            h[i, e] = _next(a[i, e], dt[e], h[i, e], du[e], bi)
                            out[e] = fma(h[i, e], ci, out[e])
                    y_row = y[k, b, p, first:end]
                    for e in range(size):
                        y_row[e] = out[e]
                if last.shape[0] > 0:
                    for i in range(n):
                        for e in range(size):
                            last[b, k, first + e, i] = h[i, e]


@jit
def _scale(du, dt, u, size):
    """du = dt u: the inputs, as the states take them."""
    for e in range(size):
        du[e] = dt[e] * u[e]


@jit
def _advance(h, a, dt, du, b, size):
    """The states after h, in its place."""
    for i in range(h.shape[0]):
        bi = b[i]
        for e in range(size):
            h[i, e] = _next(a[i, e], dt[e], h[i, e], du[e], bi)


@jit
def _advance_and_keep(after, decay, h, a, dt, du, b, size):
    """The states after h, and the decays that led to them."""
    for i in range(h.shape[0]):
        bi = b[i]
        for e in range(size):
            decay[i, e] = exp2(dt[e] * a[i, e])
            after[i, e] = fma(decay[i, e], h[i, e], du[e] * bi)


@jit
def _differentiate_states(
    g, ga, ginput, gdt, gB, gC, products_b, products_c, h, after, decay, a, dt, du, b, c, gy, size
):
    """From the adjoint g of the states after a step to that of the states before it, in its place. Writes the gradients
    of du to ginput and of dt, by way of the decays, to gdt, and adds those of a, B and C to theirs."""
    for e in range(size):
        ginput[e] = 0
        gdt[e] = 0
    for i in range(h.shape[0]):
        bi, ci = b[i], c[i]
        for e in range(size):
            gafter = fma(ci, gy[e], g[i, e])  # the adjoint of the state after this step
            products_c[e] = gy[e] * after[i, e]
            products_b[e] = gafter * du[e]
            ginput[e] = fma(gafter, bi, ginput[e])
            gbefore = gafter * decay[i, e]  # and of the state before it
            exponent = gbefore * h[i, e]
            gdt[e] = fma(exponent, a[i, e], gdt[e])
            ga[i, e] = fma(exponent, dt[e], ga[i, e])
            g[i, e] = gbefore
        sum_b, sum_c = _sums(products_b, products_c, size)
        gB[i] += sum_b
        gC[i] += sum_c


@jit
def _differentiate_inputs(gu, gdelta, gd, gb, ginput, gdt, dt, u, gy, D, softplus, size):
    """Writes the gradients of u and delta, from those of du and dt, and adds those of D and the bias to theirs."""
    for e in range(size):
        gu[e] = fma(dt[e], ginput[e], D[e] * gy[e])
        gd[e] = fma(gy[e], u[e], gd[e])
        x = fma(u[e], ginput[e], _LN2 * gdt[e])
        if softplus:
            d = dt[e]  # sigmoid = 1 - exp(-softplus), by its series where that would cancel
            small = d * fma(-d, fma(-d, np.float32(1 / 6), np.float32(0.5)), np.float32(1))
            x *= small if d < np.float32(0.01) else np.float32(1) - exp2(-d * LOG2E)
        gdelta[e] = x
        gb[e] += x


@kernel
def _backward(
    gy, glast, u, delta, A, B, C, D, bias, gu, gdelta, gA, gB, gC, gD, gbias, orders, height, width, softplus, threads
):
    """Gradients; gu (K, batch, L, E), and gA, gD and gbias apart for every image: (batch, K, ...). The last three are
    float64, and they, gB and gC are added to."""
    directions, batch, length, features = delta.shape
    n = A.shape[1]
    chunks = (length + CHUNK - 1) // CHUNK
    for worker in numba.prange(threads):
        starts = np.empty((chunks, n, CHANNELS), np.float32)
        states = np.empty((CHUNK + 1, n, CHANNELS), np.float32)
        decays = np.empty((CHUNK, n, CHANNELS), np.float32)
        dts = np.empty((CHUNK, CHANNELS), np.float32)
        a = np.empty((n, CHANNELS), np.float32)
        g = np.empty((n, CHANNELS), np.float32)
        ga = np.empty((n, CHANNELS), np.float32)
        du = np.empty(CHANNELS, np.float32)
        ginput = np.empty(CHANNELS, np.float32)
        gdt = np.empty(CHANNELS, np.float32)
        gd = np.empty(CHANNELS, np.float32)
        gb = np.empty(CHANNELS, np.float32)
        products_b = np.empty(CHANNELS, np.float32)
        products_c = np.empty(CHANNELS, np.float32)
        for task in range(worker, batch * directions, threads):
            b, k = task // directions, task % directions
            ku = k if u.shape[2] > 1 else 0
            ky = k if gy.shape[2] > 1 else 0
            order = orders[k]
            for first in range(0, features, CHANNELS):
                size = min(CHANNELS, features - first)
                end = first + size
                _load(a, A[k], first, size)
                bias_row, D_row = bias[k, first:end], D[k, first:end]
                # the states before every chunk: what the last one does to them is not asked for, so that a short walk,
                # of one chunk, is not walked here at all
                h, dt = states[0], dts[0]
                h[:] = 0
                for t in range((chunks - 1) * CHUNK):
                    if t % CHUNK == 0:
                        starts[t // CHUNK] = h
                    p = _position(t, order, height, width)
                    _step_sizes(dt, delta[k, b, p, first:end], bias_row, softplus)
                    _scale(du, dt, u[b, p, ku, first:end], size)
                    _advance(h, a, dt, du, B[k, b, p], size)
                starts[chunks - 1] = h
                g[:] = 0
                if glast.shape[0] > 0:
                    for i in range(n):
                        for e in range(size):
                            g[i, e] = glast[b, k, first + e, i]
                for chunk in range(chunks - 1, -1, -1):
                    # of this chunk: a single sum over a long walk would grow too large for what is added last
                    ga[:] = 0
                    gd[:] = 0
                    gb[:] = 0
                    begin = chunk * CHUNK
                    steps = min(CHUNK, length - begin)
                    states[0] = starts[chunk]
                    for r in range(steps):
                        p = _position(begin + r, order, height, width)
                        h, after, decay, dt = states[r], states[r + 1], decays[r], dts[r]
                        _step_sizes(dt, delta[k, b, p, first:end], bias_row, softplus)
                        _scale(du, dt, u[b, p, ku, first:end], size)
                        _advance_and_keep(after, decay, h, a, dt, du, B[k, b, p], size)
                    for r in range(steps - 1, -1, -1):
                        p = _position(begin + r, order, height, width)
                        h, after, decay, dt = states[r], states[r + 1], decays[r], dts[r]
                        u_row, gy_row = u[b, p, ku, first:end], gy[b, p, ky, first:end]
                        _scale(du, dt, u_row, size)
                        _differentiate_states(
                            g, ga, ginput, gdt, gB[k, b, p], gC[k, b, p], products_b, products_c,
                            h, after, decay, a, dt, du, B[k, b, p], C[k, b, p], gy_row, size,
                        )  # fmt: skip
                        _differentiate_inputs(
                            gu[k, b, p, first:end], gdelta[k, b, p, first:end], gd, gb,
                            ginput, gdt, dt, u_row, gy_row, D_row, softplus, size,
                        )  # fmt: skip
                    for e in range(size):
                        gD[b, k, first + e] += gd[e]
                        gbias[b, k, first + e] += gb[e]
                    for i in range(n):
                        for e in range(size):
                            gA[b, k, i, first + e] += ga[i, e]


def _arrays(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [t.detach().float().contiguous().numpy() for t in tensors]


def _copies(*parameters: torch.Tensor) -> list[torch.Tensor]:
    """So that no array shares a parameter's memory: PyTorch could no longer resize it, as FSDP does."""
    return [t.detach().float().clone() for t in parameters]


def _by_direction(t: torch.Tensor) -> torch.Tensor:
    """(batch, L, K, ...) -> (K, batch, L, ...): walked from row to row, memory is read ahead."""
    return t.permute(2, 0, 1, 3)


def _by_step(t: torch.Tensor) -> torch.Tensor:
    """(K, batch, L, ...) -> (batch, L, K, ...)."""
    return t.permute(1, 2, 0, 3)


def _one_for_all(t: torch.Tensor) -> torch.Tensor:
    """(batch, L, K, E) -> (batch, L, 1, E) where it was expanded to K, as the gradient of a sum over directions is, so
    that no copy is made for each."""
    return t[:, :, :1] if t.stride(2) == 0 else t


def _common(u, delta, A, B, C, D, delta_bias, orders):
    u = u.unsqueeze(2) if u.dim() == 3 else u
    delta, B, C = map(_by_direction, (delta, B, C))
    rates = A.detach().float().transpose(1, 2) * float(LOG2E)
    tensors = _arrays(u, delta, rates, B, C, *_copies(D, delta_bias))
    return tensors, np.array([ORDERS.index(order) for order in orders])


def selective_scan_numba(u, delta, A, B, C, D, delta_bias, *, delta_softplus, orders, height, width, with_last):
    """As `reference.selective_scan_chunked`, in float32; y lies in memory one direction after the other."""
    batch, length, directions, features = delta.shape
    arrays, order_ids = _common(u, delta, A, B, C, D, delta_bias, orders)
    y = torch.empty(directions, batch, length, features)
    last = torch.empty((batch, directions, features, A.shape[-1]) if with_last else (0, 0, 0, 0))
    _forward(*arrays, y.numpy(), last.numpy(), order_ids, height, width, delta_softplus, threads_to_use())
    return _by_step(y), last if with_last else last.flatten()


def selective_scan_numba_backward(
    grad_y, grad_last, u, delta, A, B, C, D, delta_bias, *, delta_softplus, orders, height, width
):
    """As `reference.selective_scan_chunked_backward`, in float32; the gradients of delta, B, C and of a u that differs
    between directions lie in memory one direction after the other."""
    batch, length, directions, features = delta.shape
    n = A.shape[-1]
    arrays, order_ids = _common(u, delta, A, B, C, D, delta_bias, orders)
    gy, glast = _arrays(
        grad_y.unsqueeze(2) if grad_y.dim() == 3 else _one_for_all(grad_y),
        grad_last if grad_last.numel() else grad_last.view(0, 0, 0, 0),
    )
    gu, gdelta = (torch.empty(directions, batch, length, features) for _ in range(2))
    gA = torch.zeros(batch, directions, n, features, dtype=torch.float64)
    gB, gC = (torch.zeros(directions, batch, length, n) for _ in range(2))
    gD, gbias = (torch.zeros(batch, directions, features, dtype=torch.float64) for _ in range(2))
    outputs = [t.numpy() for t in (gu, gdelta, gA, gB, gC, gD, gbias)]
    _backward(gy, glast, *arrays, *outputs, order_ids, height, width, delta_softplus, threads_to_use())
    return (
        (_by_step(gu) if u.dim() == 4 else gu.sum(0)).to(u.dtype),
        _by_step(gdelta).to(delta.dtype),
        gA.sum(0).transpose(1, 2).contiguous().to(A.dtype),
        _by_step(gB).to(B.dtype),
        _by_step(gC).to(C.dtype),
        gD.sum(0).to(D.dtype),
        gbias.sum(0).to(delta_bias.dtype),
    )
