# ruff: noqa: RUF005  (Triton knows no starred tuples)
"""The selective scan in Triton. `reference.py` says what it computes; tests/ops/test_triton_scan.py compares the two.

A program walks a block of channels through the steps of one direction, with states in registers as a tile
[N states, S sequences, G channel groups, C channels]. Triton spreads a warp over the last axis first and then over the
first, so C and N decide which sums become register adds and which warp shuffles: that is what the tile shapes are for.

Addresses are computed, never gathered: a walk is two nested loops over the map with signed strides. Nothing is added
with atomics: sums over programs are written apart and added by the caller, so that two runs give the same bits.

Where there are too few channels and sequences to fill the GPU (a large image at batch 1), sequences are split: programs
first scan their chunks from a zero state, a short kernel turns these into the states at the chunks' starts, and the
chunks then run side by side. The backward pass does the same from the other end.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import ORDERS
from .selective_scan import TRITON_CHUNK as CHUNK

INTERPRETED = triton.knobs.runtime.interpret

MAX_ORDERS = tl.constexpr(15)  # directions whose orders fit in one 32-bit argument, two bits each

UNROLL = 2  # steps whose states the backward pass holds in registers at once

# Twelve warps a multiprocessor instead of nine: 2.1 ms instead of 2.6 at vim2_tiny's first stage on an H100.
FORWARD_REGISTERS = None if INTERPRETED else 168

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _exp2(x, FAST: tl.constexpr):
    # one instruction; without ftz three more guard it against denormals
    if FAST:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def _log(x, FAST: tl.constexpr):
    if FAST:
        return LN2 * tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log(x)


@triton.jit
def _step_size(x, bias, SOFTPLUS: tl.constexpr, FAST: tl.constexpr):
    """softplus(x + bias), to float32's accuracy; for half-precision x, to 1e-5, with a fast logarithm."""
    half: tl.constexpr = x.dtype != tl.float32
    x = x.to(tl.float32) + bias
    if SOFTPLUS:
        ex = _exp2(tl.minimum(x, 20.0) * LOG2E, FAST)
        small = ex * (1.0 - ex * (0.5 - ex * 0.33333334))  # log1p, where 1 + ex would lose ex's digits
        large = _log(1.0 + ex, FAST and half)
        x = tl.where(x > 20.0, x, tl.where(ex < (0.03 if half else 0.01), small, large))
    return x


@triton.jit
def _start_walk(t, order, L, H, W, LARGE: tl.constexpr):
    """A walk at step t: the flat position, the inner steps left before a turn, the stride of a step and of a turn.

    Orders are 0 rows, 1 columns; 2 and 3 are the same from their ends.
    """
    columns = order % 2 == 1
    inner = tl.where(columns, H, W)
    outer_stride = tl.where(columns, 1, W)
    inner_stride = tl.where(columns, W, 1)
    turn = outer_stride - (inner - 1) * inner_stride
    reverse = order >= 2
    s = tl.where(reverse, L - 1 - t, t)
    p = (s // inner) * outer_stride + (s % inner) * inner_stride
    if LARGE:
        p = p.to(tl.int64)
    left = tl.where(reverse, s % inner, inner - 1 - s % inner)
    return p, left, inner, tl.where(reverse, -inner_stride, inner_stride), tl.where(reverse, -turn, turn)


@triton.jit
def _next(p, left, inner, step, turn):
    turning = left == 0
    return p + tl.where(turning, turn, step), tl.where(turning, inner - 1, left - 1)


@triton.jit
def _tile(pid, batch, E, N_STATES, zero, S: tl.constexpr, G: tl.constexpr, N: tl.constexpr, C: tl.constexpr):
    """A program's first sequence, its sequences [S], channels [G, C] and states [N], and the masks of what exists."""
    blocks = tl.cdiv(E, G * C)
    s = tl.arange(0, S)
    first = (pid // blocks).to(tl.int64) * S
    e = (pid % blocks) * (G * C) + tl.arange(0, G)[:, None] * C + tl.arange(0, C)[None, :]
    n = tl.arange(0, N)
    vector_in = (first + s < batch)[:, None, None] & (e < E)[None, :, :]
    states_in = (n < N_STATES)[:, None] & (first + s < batch)[None, :]
    tile_in = (n < N_STATES)[:, None, None, None] & vector_in[None, :, :, :]
    # adding an unknown zero hides alignment: Triton then keeps one channel a thread, and does not carry the states
    # twice, in the layout of the arithmetic and in that of the widest stores
    return first, s.to(tl.uint32), (e + zero).to(tl.uint32), n.to(tl.uint32), vector_in, states_in, tile_in


@triton.jit
def _parameters(A_ptr, D_ptr, bias_ptr, k, e, n, E, N_STATES, vector_in, tile_in):
    """A, times log2(e) for exp2, D and delta's bias, in float32."""
    ke = k * E + e[None, :, :]
    A = tl.load(A_ptr + k * (N_STATES * E) + n[:, None, None, None] * E + e[None, None, :, :], mask=tile_in, other=0.0)
    D = tl.load(D_ptr + ke, mask=vector_in, other=0.0)
    bias = tl.load(bias_ptr + ke, mask=vector_in, other=0.0)
    return A.to(tl.float32) * LOG2E, D.to(tl.float32), bias.to(tl.float32)


@triton.jit
def _load(at, p, stride, mask):
    return tl.load(at[0] + p * stride + at[1], mask=mask, other=0.0)


@triton.jit
def _load_unless_first(starts_at, chunk, size, in_tile, tile_in):
    """The states at a chunk's start; the first chunk's are zero and not stored. (Masks are never scalars: Triton's
    interpreter takes none.)"""
    is_first = (chunk + tl.arange(0, 1) == 0)[:, None, None, None]
    return tl.load(starts_at + (chunk - 1) * size + in_tile, mask=tile_in & (is_first == 0), other=0.0)


@triton.jit(do_not_specialize=["zero"])
def _forward_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, y_ptr, starts_ptr, decay_ptr, last_ptr,
    orders, batch, L, H, W, E, N_STATES, K, chunks, zero,
    u_b, u_l, u_k, delta_b, delta_l, delta_k, B_b, B_l, B_k, C_b, C_l, C_k,
    CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr, SPLIT: tl.constexpr, LOCAL: tl.constexpr, LAST: tl.constexpr,
    FAST: tl.constexpr, LARGE: tl.constexpr, S: tl.constexpr, G: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A program scans whole sequences and writes the states at the starts of all chunks but the first. With SPLIT it
    scans one chunk, from its start; with LOCAL too, from zero, and writes only the chunk's end state and decay."""
    k = tl.program_id(1)
    order = (orders >> (2 * tl.minimum(k, MAX_ORDERS - 1))) & 3  # arithmetic, not a load: it stays uniform
    seq, s, e, n, vector_in, states_in, tile_in = _tile(tl.program_id(0), batch, E, N_STATES, zero, S, G, N, C)

    A, D, bias = _parameters(A_ptr, D_ptr, bias_ptr, k, e, n, E, N_STATES, vector_in, tile_in)

    # a 64-bit base for the program and 32-bit offsets in the tile: 64-bit offsets would fill the registers
    u_at = (u_ptr + seq * u_b + k * u_k, s[:, None, None] * u_b + e[None, :, :])
    delta_at = (delta_ptr + seq * delta_b + k * delta_k, s[:, None, None] * delta_b + e[None, :, :])
    B_at = (B_ptr + seq * B_b + k * B_k, s[None, :] * B_b + n[:, None])
    C_at = (C_ptr + seq * C_b + k * C_k, s[None, :] * C_b + n[:, None])
    y_at = (y_ptr + (seq * L * K + k) * E, s[:, None, None] * (L * K * E) + e[None, :, :])
    lane = seq * K + k
    in_tile = (
        s[None, :, None, None] * (K * (chunks - 1) * N_STATES * E) + n[:, None, None, None] * E + e[None, None, :, :]
    )
    starts_at = starts_ptr + lane * (chunks - 1) * (N_STATES * E)

    first_chunk = 0
    num_chunks = chunks
    h = tl.zeros([N, S, G, C], dtype=tl.float32)
    total = tl.zeros([S, G, C], dtype=tl.float32)
    if SPLIT:
        first_chunk = tl.program_id(2)
        num_chunks = 1
        if not LOCAL:
            h = _load_unless_first(starts_at, first_chunk, N_STATES * E, in_tile, tile_in)

    p, left, inner, step, turn = _start_walk(first_chunk * CHUNK, order, L, H, W, LARGE)
    x = _load(delta_at, p, delta_l, vector_in)
    u = _load(u_at, p, u_l, vector_in)
    b = _load(B_at, p, B_l, states_in)
    c = _load(C_at, p, C_l, states_in)
    for j in range(num_chunks):
        if not SPLIT and j > 0:
            tl.store(starts_at + in_tile, h, mask=tile_in)
            starts_at += N_STATES * E
        t = (first_chunk + j) * CHUNK
        for i in range(t, tl.minimum(t + CHUNK, L)):
            # the next step's loads are under way while this one computes
            p_next, left = _next(p, left, inner, step, turn)
            p_next = tl.where(i + 1 < L, p_next, p)
            x_next = _load(delta_at, p_next, delta_l, vector_in)
            u_next = _load(u_at, p_next, u_l, vector_in)
            b_next = _load(B_at, p_next, B_l, states_in)
            c_next = _load(C_at, p_next, C_l, states_in)
            dt = _step_size(x, bias, SOFTPLUS, FAST)
            uf = u.to(tl.float32)
            h = _exp2(dt[None, :, :, :] * A, FAST) * h + (dt * uf)[None, :, :, :] * b.to(tl.float32)[:, :, None, None]
            if LOCAL:
                total += dt
            else:
                y = tl.sum(h * c.to(tl.float32)[:, :, None, None], axis=0) + D * uf
                tl.store(y_at[0] + p * (K * E) + y_at[1], y.to(y_ptr.dtype.element_ty), mask=vector_in)
            p, x, u, b, c = p_next, x_next, u_next, b_next, c_next
    if LOCAL:
        tl.store(starts_at + first_chunk * (N_STATES * E) + in_tile, h, mask=tile_in)
        decay_at = decay_ptr + (lane * (chunks - 1) + first_chunk) * (N_STATES * E)
        tl.store(decay_at + in_tile, _exp2(total[None, :, :, :] * A, FAST), mask=tile_in)
    elif LAST and first_chunk + num_chunks == chunks:
        last_at = s[None, :, None, None] * (K * N_STATES * E) + n[:, None, None, None] * E + e[None, None, :, :]
        tl.store(last_ptr + lane * (N_STATES * E) + last_at, h, mask=tile_in)


@triton.jit
def _combine_kernel(
    state_ptr, decay_ptr, end_ptr, count, size, REVERSE: tl.constexpr, END: tl.constexpr, BLOCK: tl.constexpr
):
    """In place, from chunks' own end states and decays (lane, count, size) to the true states at their ends.

    With REVERSE, of adjoints and from the other end, starting from end (lane, size) if END.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.program_id(1).to(tl.int64)
    h = tl.zeros([BLOCK], dtype=tl.float32)
    if END:
        h = tl.load(end_ptr + lane * size + i, mask=i < size, other=0.0)
    for j in range(count):
        at = (lane * count + (count - 1 - j if REVERSE else j)) * size + i
        local = tl.load(state_ptr + at, mask=i < size, other=0.0)
        decay = tl.load(decay_ptr + at, mask=i < size, other=0.0)
        h = decay * h + local
        tl.store(state_ptr + at, h, mask=i < size)


@triton.jit
def _load_steps(t, walk, L, x_at, u_at, b_at, x_l, u_l, b_l, x_in, b_in, UNROLL: tl.constexpr):
    """Operands of UNROLL steps from t on: positions, whether the step exists, delta, u (or gy) and B (or C)."""
    p, left, inner, step, turn = walk
    steps = ()
    for r in tl.static_range(UNROLL):
        live = t + r + tl.arange(0, 1) < L  # a block of one: Triton's interpreter takes no scalar masks
        steps = steps + ((p, live, _load(x_at, p, x_l, x_in), _load(u_at, p, u_l, x_in), _load(b_at, p, b_l, b_in)),)
        p_next, left = _next(p, left, inner, step, turn)
        p = tl.where(t + r + 1 < L, p_next, p)
    return steps


@triton.jit(do_not_specialize=["zero"])
def _backward_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, gy_ptr,
    starts_ptr, ends_ptr, decay_ptr, end_ptr, scratch_ptr,
    gu_ptr, gdelta_ptr, gA_ptr, gB_ptr, gC_ptr, gD_ptr, gbias_ptr,
    orders, batch, L, H, W, E, N_STATES, K, chunks, zero,
    u_b, u_l, u_k, delta_b, delta_l, delta_k, B_b, B_l, B_k, C_b, C_l, C_k, gy_b, gy_l, gy_k,
    CHUNK: tl.constexpr, UNROLL: tl.constexpr, SOFTPLUS: tl.constexpr, SPLIT: tl.constexpr, LOCAL: tl.constexpr,
    LAST: tl.constexpr, FAST: tl.constexpr, LARGE: tl.constexpr,
    S: tl.constexpr, G: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Walks chunk by chunk from the end. In a chunk, the states before every UNROLL steps are recomputed into scratch;
    then, from the chunk's end, UNROLL states at a time are recomputed in registers and the adjoint passes over them.

    With SPLIT a program has one chunk, and the adjoint after it in ends; with LOCAL too, it walks from a zero adjoint
    and writes only the adjoint before its chunk (to ends) and the chunk's decay.

    Steps beyond the sequence's end are loaded from its last position; with delta and gy zero they move nothing.
    """
    k = tl.program_id(1)
    order = (orders >> (2 * tl.minimum(k, MAX_ORDERS - 1))) & 3  # arithmetic, not a load: it stays uniform
    pid = tl.program_id(0)
    seq, s, e, n, vector_in, states_in, tile_in = _tile(pid, batch, E, N_STATES, zero, S, G, N, C)

    A, D, bias = _parameters(A_ptr, D_ptr, bias_ptr, k, e, n, E, N_STATES, vector_in, tile_in)

    u_at = (u_ptr + seq * u_b + k * u_k, s[:, None, None] * u_b + e[None, :, :])
    delta_at = (delta_ptr + seq * delta_b + k * delta_k, s[:, None, None] * delta_b + e[None, :, :])
    gy_at = (gy_ptr + seq * gy_b + k * gy_k, s[:, None, None] * gy_b + e[None, :, :])
    B_at = (B_ptr + seq * B_b + k * B_k, s[None, :] * B_b + n[:, None])
    C_at = (C_ptr + seq * C_b + k * C_k, s[None, :] * C_b + n[:, None])
    row = (seq * L * K + k) * E
    in_row = s[:, None, None] * (L * K * E) + e[None, :, :]
    part = ((pid % tl.cdiv(E, G * C)) * batch + seq) * L * K + k  # gB and gC: a part for each block of channels
    in_part = s[None, :] * (L * K * N_STATES) + n[:, None]
    lane = seq * K + k
    in_tile = (
        s[None, :, None, None] * (K * (chunks - 1) * N_STATES * E) + n[:, None, None, None] * E + e[None, None, :, :]
    )
    starts_at = starts_ptr + lane * (chunks - 1) * (N_STATES * E)
    ends_at = ends_ptr + lane * (chunks - 1) * (N_STATES * E)
    program = (tl.program_id(2) * K + k).to(tl.int64) * tl.num_programs(0) + pid
    scratch_at = scratch_ptr + program * (CHUNK // UNROLL) * (S * G * N * C)
    in_scratch = n[:, None, None, None] * (S * G * C) + s[None, :, None, None] * (G * C)
    in_scratch = in_scratch + tl.arange(0, G)[None, None, :, None] * C + tl.arange(0, C)[None, None, None, :] + zero

    g = tl.zeros([N, S, G, C], dtype=tl.float32)
    gA = tl.zeros([N, S, G, C], dtype=tl.float32)
    gD = tl.zeros([S, G, C], dtype=tl.float32)
    gbias = tl.zeros([S, G, C], dtype=tl.float32)
    total = tl.zeros([S, G, C], dtype=tl.float32)

    last_chunk = chunks - 1
    num_chunks = chunks
    if SPLIT:
        last_chunk = tl.program_id(2) + (1 if LOCAL else 0)  # the first chunk has none before it to tell
        num_chunks = 1
    if not LOCAL:
        is_last = (last_chunk + tl.arange(0, 1) == chunks - 1)[:, None, None, None]
        if SPLIT:
            g_at = ends_at + last_chunk * (N_STATES * E) + in_tile
            g = tl.load(g_at, mask=tile_in & (is_last == 0), other=0.0)
        if LAST:
            end_at = s[None, :, None, None] * (K * N_STATES * E) + n[:, None, None, None] * E + e[None, None, :, :]
            g += tl.load(end_ptr + lane * (N_STATES * E) + end_at, mask=tile_in & is_last, other=0.0)

    for j in range(num_chunks):
        chunk = last_chunk - j
        first = chunk * CHUNK
        subs = tl.cdiv(tl.minimum(CHUNK, L - first), UNROLL)
        if not LOCAL:
            h = _load_unless_first(starts_at, chunk, N_STATES * E, in_tile, tile_in)
            tl.store(scratch_at + in_scratch, h)
            # here and below, the next operands are under way while these are used
            walk = _start_walk(first, order, L, H, W, LARGE)
            steps = _load_steps(first, walk, L, delta_at, u_at, B_at, delta_l, u_l, B_l, vector_in, states_in, UNROLL)
            for i in range(1, subs):
                t = first + i * UNROLL
                walk = _start_walk(t, order, L, H, W, LARGE)
                following = _load_steps(
                    t, walk, L, delta_at, u_at, B_at, delta_l, u_l, B_l, vector_in, states_in, UNROLL
                )
                for r in tl.static_range(UNROLL):
                    dt = _step_size(steps[r][2], bias, SOFTPLUS, FAST)
                    bu = (dt * steps[r][3].to(tl.float32))[None, :, :, :] * steps[r][4].to(tl.float32)[:, :, None, None]
                    h = _exp2(dt[None, :, :, :] * A, FAST) * h + bu
                tl.store(scratch_at + i * (S * G * N * C) + in_scratch, h)
                steps = following
            tl.debug_barrier()  # where a tile has fewer states than a warp threads, one may read what another wrote
            # steps: those of the last sub-chunk, loaded above
            outputs = _load_steps(
                first + (subs - 1) * UNROLL, walk, L, gy_at, gy_at, C_at, gy_l, gy_l, C_l, vector_in, states_in, UNROLL
            )
        for i in range(subs):
            sub = subs - 1 - i
            t = first + sub * UNROLL
            if LOCAL:
                walk = _start_walk(t, order, L, H, W, LARGE)
                steps = _load_steps(t, walk, L, delta_at, gy_at, C_at, delta_l, gy_l, C_l, vector_in, states_in, UNROLL)
                for r in tl.static_range(UNROLL - 1, -1, -1):
                    live = steps[r][1][None, None, :]
                    dt = tl.where(live, _step_size(steps[r][2], bias, SOFTPLUS, FAST), 0.0)
                    gy = tl.where(live, steps[r][3].to(tl.float32), 0.0)
                    g += gy[None, :, :, :] * steps[r][4].to(tl.float32)[:, :, None, None]
                    g *= _exp2(dt[None, :, :, :] * A, FAST)
                    total += dt
            else:
                h = tl.load(scratch_at + sub * (S * G * N * C) + in_scratch)
                t = tl.maximum(t - UNROLL, first)
                walk = _start_walk(t, order, L, H, W, LARGE)
                following = _load_steps(
                    t, walk, L, delta_at, u_at, B_at, delta_l, u_l, B_l, vector_in, states_in, UNROLL
                )
                outputs_following = _load_steps(
                    t, walk, L, gy_at, gy_at, C_at, gy_l, gy_l, C_l, vector_in, states_in, UNROLL
                )
                states = (h,)
                decays = ()
                sizes = ()
                for r in tl.static_range(UNROLL):
                    live = steps[r][1][None, None, :]
                    dt = tl.where(live, _step_size(steps[r][2], bias, SOFTPLUS, FAST), 0.0)
                    bu = (dt * steps[r][3].to(tl.float32))[None, :, :, :] * steps[r][4].to(tl.float32)[:, :, None, None]
                    decay = _exp2(dt[None, :, :, :] * A, FAST)
                    h = decay * h + bu
                    states = states + (h,)
                    decays = decays + (decay,)
                    sizes = sizes + (dt,)
                for r in tl.static_range(UNROLL - 1, -1, -1):
                    # g: the gradient of the state after step r, then of the state before it
                    p = steps[r][0]
                    live = steps[r][1]
                    dt = sizes[r]
                    u = steps[r][3].to(tl.float32)
                    b = steps[r][4].to(tl.float32)
                    gy = tl.where(live[None, None, :], outputs[r][3].to(tl.float32), 0.0)
                    g += gy[None, :, :, :] * outputs[r][4].to(tl.float32)[:, :, None, None]
                    gC = tl.sum(tl.sum(gy[None, :, :, :] * states[r + 1], axis=2), axis=2)
                    gB = tl.sum(tl.sum((dt * u)[None, :, :, :] * g, axis=2), axis=2)
                    ginput = tl.sum(g * b[:, :, None, None], axis=0)
                    g *= decays[r]
                    gexponent = g * states[r]
                    gdt = u * ginput + tl.sum(gexponent * A, axis=0) * LN2
                    gA += gexponent * dt[None, :, :, :]
                    gD += gy * u
                    if SOFTPLUS:
                        # d softplus(x) = sigmoid(x) = 1 - exp(-softplus(x)), by its series where that would cancel
                        gdt *= tl.where(
                            dt < 0.01, dt * (1.0 - dt * (0.5 - dt * 0.16666667)), 1.0 - _exp2(-dt * LOG2E, FAST)
                        )
                    gbias += gdt
                    gu = dt * ginput + D * gy
                    at = row + p * (K * E)
                    vector_live = vector_in & live[None, None, :]
                    tl.store(gu_ptr + at + in_row, gu.to(gu_ptr.dtype.element_ty), mask=vector_live)
                    tl.store(gdelta_ptr + at + in_row, gdt.to(gdelta_ptr.dtype.element_ty), mask=vector_live)
                    part_at = (part + p * K) * N_STATES
                    tl.store(gB_ptr + part_at + in_part, gB, mask=states_in & live[None, :])
                    tl.store(gC_ptr + part_at + in_part, gC, mask=states_in & live[None, :])
                steps = following
                outputs = outputs_following

    if LOCAL:
        tl.store(ends_at + (last_chunk - 1) * (N_STATES * E) + in_tile, g, mask=tile_in)
        decay_at = decay_ptr + (lane * (chunks - 1) + last_chunk - 1) * (N_STATES * E)
        tl.store(decay_at + in_tile, _exp2(total[None, :, :, :] * A, FAST), mask=tile_in)
    else:
        sums = ((tl.program_id(2) * batch + seq) * K + k) * E  # over steps: a part for each sequence and program
        in_sums = s[:, None, None] * (K * E) + e[None, :, :]
        gA_at = s[None, :, None, None] * (K * N_STATES * E) + n[:, None, None, None] * E + e[None, None, :, :]
        tl.store(gA_ptr + sums * N_STATES + gA_at, gA, mask=tile_in)
        tl.store(gD_ptr + sums + in_sums, gD, mask=vector_in)
        tl.store(gbias_ptr + sums + in_sums, gbias, mask=vector_in)


def _power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _tile_shape(states: int, channels: int, n: int, features: int, batch: int) -> dict[str, int]:
    """S, G, N, C of a tile of about `states` states whose last axis is `channels` wide."""
    N = _power_of_2(n)
    C = min(channels, _power_of_2(features))
    G = min(max(states // (N * C), 1), _power_of_2(-(-features // C)), 8)
    S = min(max(states // (N * G * C), 1), _power_of_2(batch), 8)
    return dict(S=S, G=G, N=N, C=C)


@functools.lru_cache(None)
def _programs_to_fill(device: torch.device) -> int:
    """Programs (of one warp) below which sequences are split: eight a multiprocessor."""
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _strides(t: Tensor, lanes: bool) -> tuple[int, int, int]:
    """Strides of batch, length and direction; 0 where all directions share the tensor."""
    return (t.stride(0), t.stride(1), t.stride(2) if lanes else 0)


def _pack_orders(orders) -> int:
    """Two bits a direction. Directions from the 15th on must all have its order, as the groups of mamba's layout do."""
    if len(set(orders[MAX_ORDERS.value - 1 :])) > 1:
        raise ValueError(f"The Triton scan takes at most {MAX_ORDERS.value} different directions, got {len(orders)}.")
    return sum(ORDERS.index(order) << (2 * k) for k, order in enumerate(orders[: MAX_ORDERS.value]))


def _is_large(*tensors: Tensor) -> bool:
    """Whether offsets within one sequence need 64 bits; those between sequences always have them."""
    return any(t.shape[1] * t.stride(1) >= 2**31 for t in tensors)


def _last_axis_contiguous(*tensors: Tensor) -> list[Tensor]:
    return [t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in tensors]


def selective_scan_triton(u, delta, A, B, C, D, delta_bias, delta_softplus, orders, height, width, chunk, with_last):
    """As `reference.selective_scan_chunked`, but y is (batch, L, K, E) in u's dtype.

    Args:
        chunk: Steps between kept states: CHUNK, or the whole length where no backward pass will follow.
    """
    u, delta, B, C = _last_axis_contiguous(u, delta, B, C)
    At, D, delta_bias = (t.contiguous() for t in (A.transpose(1, 2), D, delta_bias))
    batch, length, lanes, features = delta.shape
    n = A.shape[-1]
    tile = _tile_shape(1024, 32, n, features, batch)
    programs = -(-batch // tile["S"]) * -(-features // (tile["G"] * tile["C"]))
    split = length > CHUNK and programs * lanes < _programs_to_fill(u.device)
    chunks = -(-length // (CHUNK if split else chunk))
    y = torch.empty(delta.shape, dtype=u.dtype, device=u.device)
    last = torch.empty((batch, lanes, n, features) if with_last else (0,), dtype=torch.float32, device=u.device)
    starts = torch.empty(batch, lanes, chunks - 1, n, features, dtype=torch.float32, device=u.device)
    decay = torch.empty_like(starts) if split else starts

    def launch(grid_chunks, **options):
        _forward_kernel[(programs, lanes, grid_chunks)](
            u, delta, At, B, C, D, delta_bias, y, starts, decay, last,
            _pack_orders(orders), batch, length, height, width, features, n, lanes, chunks, 0,
            *_strides(u, u.dim() == 4), *_strides(delta, True), *_strides(B, True), *_strides(C, True),
            CHUNK=CHUNK if split else chunk, SOFTPLUS=delta_softplus, LAST=with_last, FAST=not INTERPRETED,
            LARGE=_is_large(u, delta, B, C, y), num_warps=1, maxnreg=FORWARD_REGISTERS, **tile, **options,
        )  # fmt: skip

    with torch.cuda.device_of(u):
        if split:
            launch(chunks - 1, SPLIT=True, LOCAL=True)
            _combine(starts, decay, None)
        launch(chunks if split else 1, SPLIT=split, LOCAL=False)
    return y, last.transpose(-1, -2).contiguous() if with_last else last, starts if chunk == CHUNK else starts[:, :, :0]


def _combine(states: Tensor, decay: Tensor, end: Tensor | None) -> None:
    """In place: (batch, K, chunks - 1, N, E) from chunks' own end states to the true states at their ends; given
    `end`, from chunks' own adjoints to the true ones, after `end` (batch, K, N, E) if that is not empty."""
    batch, lanes, count, n, features = states.shape
    size = n * features
    _combine_kernel[(-(-size // 128), batch * lanes)](
        states, decay, states if end is None else end, count, size,
        REVERSE=end is not None, END=end is not None and end.numel() > 0, BLOCK=128, num_warps=1,
    )  # fmt: skip


def selective_scan_triton_backward(
    grad_y, grad_last, starts, u, delta, A, B, C, D, delta_bias, delta_softplus, orders, height, width
):
    """As `reference.selective_scan_chunked_backward`, for states kept every CHUNK steps."""
    u, delta, B, C, grad_y = _last_axis_contiguous(u, delta, B, C, grad_y)
    At, D, delta_bias = (t.contiguous() for t in (A.transpose(1, 2), D, delta_bias))
    batch, length, lanes, features = delta.shape
    chunks, n = starts.shape[2] + 1, A.shape[-1]
    tile = _tile_shape(512, 8 if n >= 4 else 32 // _power_of_2(n), n, features, batch)
    blocks = -(-features // (tile["G"] * tile["C"]))
    programs = -(-batch // tile["S"]) * blocks
    split = chunks > 1 and programs * lanes < _programs_to_fill(u.device)
    parts = chunks if split else 1

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device=u.device)

    end = grad_last.transpose(-1, -2).float().contiguous() if grad_last.numel() else grad_last
    ends = empty(starts.shape) if split else starts
    decay = empty(starts.shape) if split else starts
    scratch = empty(parts, lanes, programs, CHUNK // UNROLL, tile["S"] * tile["G"] * tile["N"] * tile["C"])
    grad_u, grad_delta = empty(delta.shape, dtype=u.dtype), empty(delta.shape, dtype=delta.dtype)
    grad_A = empty(parts, batch, lanes, n, features)
    grad_D, grad_bias = (empty(parts, batch, lanes, features) for _ in range(2))
    grad_B, grad_C = (empty(blocks, batch, length, lanes, n) for _ in range(2))

    def launch(grid_chunks, **options):
        _backward_kernel[(programs, lanes, grid_chunks)](
            u, delta, At, B, C, D, delta_bias, grad_y, starts, ends, decay, end, scratch,
            grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias,
            _pack_orders(orders), batch, length, height, width, features, n, lanes, chunks, 0,
            *_strides(u, u.dim() == 4), *_strides(delta, True), *_strides(B, True), *_strides(C, True),
            *_strides(grad_y, grad_y.dim() == 4),
            CHUNK=CHUNK, UNROLL=UNROLL, SOFTPLUS=delta_softplus, LAST=end.numel() > 0, FAST=not INTERPRETED,
            LARGE=_is_large(u, delta, B, C, grad_u, grad_y), num_warps=1, **tile, **options,
        )  # fmt: skip

    with torch.cuda.device_of(u):
        if split:
            launch(chunks - 1, SPLIT=True, LOCAL=True)
            _combine(ends, decay, end)
        launch(parts, SPLIT=split, LOCAL=False)
    return (
        grad_u if u.dim() == 4 else grad_u.sum(2),
        grad_delta,
        grad_A.sum((0, 1)).transpose(1, 2).contiguous().to(A.dtype),
        grad_B.sum(0).to(B.dtype),
        grad_C.sum(0).to(C.dtype),
        grad_D.sum((0, 1)).to(D.dtype),
        grad_bias.sum((0, 1)).to(delta_bias.dtype),
    )
