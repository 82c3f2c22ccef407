# ruff: noqa: RUF005  (Triton knows no starred tuples)
"""The backward pass of the selective scan in Triton; `forward.py` has the forward pass.

A program is one warp. It walks a tile of states from the sequence's end, spread over the lanes as tiles.py says. The CR
channels of a thread are a row [LANES, CR] here, and a tile is a tuple of NR rows: that is the same to the GPU as
vectors, and less to compile for Triton, which takes a time quadratic in a kernel's operations.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_launch import INTERPRETED, MAX_LAUNCHES, Launch, Layout, last_axis_contiguous, layout
from ...triton_math import LANES, LN2, LOG2E, exp2
from ..chunks import TRITON_CHUNK
from ..operands import Operands
from . import schedule
from .combine import combine
from .step_size import kernel_inputs
from .sums import sum_blocks, sum_directions
from .tiles import add, half, load_word, multiply, store_row, sum_over_lanes, zeros
from .walk import MAX_ORDERS, next_position, pack_orders, start_walk

UNROLL = 3  # steps whose states are held in registers at once


@triton.jit
def _load_row(at, p, existing, live, LIVE: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr, FAST: tl.constexpr):
    """COUNT neighbours at position p of a tensor, given as the address of its first, offsets from there and the stride
    of positions: [LANES, COUNT]; zero beyond the `existing` ones, and with LIVE where not `live`.

    With WIDE, two or four of 16 bits, all exist and come as one word [LANES]: unpacked only where they are used, they
    take half of the registers meanwhile.
    """
    address = at[0] + p * at[2] + at[1]
    if WIDE and COUNT > 1:
        mask = live if LIVE else at[1] >= 0  # in the second case, everywhere
        if FAST:
            return load_word(address, mask, COUNT)
        else:
            return tl.load(address.to(tl.pointer_type(tl.int64 if COUNT == 4 else tl.int32)), mask=mask, other=0)
    else:
        i = tl.arange(0, COUNT)[None, :]
        mask = (i < existing[:, None]) & live if LIVE else i < existing[:, None]
        return tl.load(address[:, None] + i, mask=mask, other=0.0)


@triton.jit
def _unpack(row, at, COUNT: tl.constexpr, WIDE: tl.constexpr):
    """What `_load_row` has loaded, in float32."""
    kind: tl.constexpr = at[0].dtype.element_ty
    if WIDE and COUNT == 4:
        even, odd = _unpack_word(tl.join(row.to(tl.int32), (row >> 32).to(tl.int32)), kind)
        return tl.reshape(tl.join(even, odd), [LANES, 4])
    elif WIDE and COUNT == 2:
        even, odd = _unpack_word(row, kind)
        return tl.join(even, odd)
    else:
        return row.to(tl.float32)


@triton.jit
def _unpack_word(word, kind: tl.constexpr):
    """The two elements in each word of 32 bits; bfloat16 is the upper half of a float32."""
    if kind == tl.bfloat16:
        return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
    else:
        even = word.to(tl.int16).to(kind, bitcast=True).to(tl.float32)
        return even, (word >> 16).to(tl.int16).to(kind, bitcast=True).to(tl.float32)


@triton.jit
def _split(row, COUNT: tl.constexpr):
    """A row [LANES, COUNT] as COUNT vectors."""
    if COUNT == 1:
        return (tl.reshape(row, [LANES]),)
    elif COUNT == 2:
        first, second = tl.split(row)
        return (first, second)
    else:
        even, odd = tl.split(tl.reshape(row, [LANES, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return (first, second, third, fourth)


@triton.jit
def _own(values, lane, STRIDE: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr):
    """Of COUNT values that all lanes of an axis have, those whose sums `sum_over_lanes` would leave in this lane."""
    for i in tl.static_range(5):
        if (SIZE >> i) > 1 and (COUNT >> (i + 1)) > 0:
            values = half(values, (lane & (STRIDE * (SIZE >> (i + 1)))) != 0, COUNT >> (i + 1))
    return values


@triton.jit
def _share(place, SIZE: tl.constexpr, COUNT: tl.constexpr):
    """After `sum_over_lanes`: the first value that the lane at this place of the axis holds, and whether it is the
    first lane that does."""
    if COUNT >= SIZE:
        return place * (COUNT // SIZE), place >= 0
    else:
        return place // (SIZE // COUNT), place % (SIZE // COUNT) == 0


@triton.jit
def _zero_tile(NR: tl.constexpr, CR: tl.constexpr):
    """NR rows of zeros."""
    tile = ()
    for _ in tl.static_range(NR):
        tile = tile + (tl.zeros([LANES, CR], dtype=tl.float32),)
    return tile


@triton.jit
def _load_tile(at, row, exists, mask, NR: tl.constexpr, CR: tl.constexpr):
    """Rows of channels, `row` apart; zero where one does not exist or the mask says so."""
    at = at[:, None] + tl.arange(0, CR)[None, :]
    tile = ()
    for i in tl.static_range(NR):
        tile = tile + (tl.load(at + i * row, mask=exists[i] & mask, other=0.0),)
    return tile


@triton.jit
def _store_tile(at, row, tile, exists, NR: tl.constexpr, CR: tl.constexpr):
    """Rows of channels, `row` apart, where they exist."""
    at = at[:, None] + tl.arange(0, CR)[None, :]
    for i in tl.static_range(NR):
        tl.store(at + i * row, tile[i], mask=exists[i])


@triton.jit
def _discard(at):
    """Tell the cache that the lines of 128 bytes at these addresses, one a lane, need not go to memory: no lane reads
    them again."""
    tl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; discard.global.L2 [$1], 128; bar.warp.sync 0xffffffff; mov.u32 $0, 0;",
        "=r,l",
        [at.to(tl.uint64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _decays(dt, A, NR: tl.constexpr, FAST: tl.constexpr):
    """The tile of exp(dt A), for a step of this size in each channel; A is to the base 2."""
    decays = ()
    for i in tl.static_range(NR):
        decays = decays + (exp2(dt * A[i], FAST),)
    return decays


@triton.jit
def _accumulate(total, a, row, COUNT: tl.constexpr):
    """A tile plus another whose rows are a times `row`."""
    sums = ()
    for i in tl.static_range(COUNT):
        sums = sums + (total[i] + a[i] * row,)
    return sums


@triton.jit
def _next(decay, h, b, channels, NR: tl.constexpr):
    """decay h + b channels, with a decay and an h for each state and channel."""
    states = ()
    for i in tl.static_range(NR):
        states = states + (decay[i] * h[i] + b[i] * channels,)
    return states


@triton.jit
def _sum_channels(tile, channels, NR: tl.constexpr):
    """The sums of a tile times channels over the thread's own channels, one a state."""
    sums = ()
    for i in tl.static_range(NR):
        sums = sums + (tl.sum(tile[i] * channels, axis=1),)
    return sums


@triton.jit
def _sum_states(a, b, NR: tl.constexpr, CR: tl.constexpr):
    """The sums of a times b over the thread's own states: CR vectors, one a channel."""
    total = a[0] * b[0]
    for i in tl.static_range(1, NR):
        total += a[i] * b[i]
    return _split(total, CR)


@triton.jit
def _load_steps(
    t, p, left, inner, stride, turn, L, at, channels, states,
    REVERSE: tl.constexpr, UNROLL: tl.constexpr, NR: tl.constexpr, CR: tl.constexpr, WIDE: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """The operands of UNROLL steps of a walk from step t on, or with REVERSE from t down, and where the walk then is.

    Of each step: its position, whether it exists, dt, u, gy, B, and with REVERSE C. A step beyond the sequence's end
    stands on the last position; its dt and gy are zero, so that it moves nothing.
    """
    dt_at, u_at, gy_at, B_at, C_at = at
    steps = ()
    for _ in tl.static_range(UNROLL):
        live = t + tl.arange(0, 1) < L  # a block of one: Triton's interpreter takes no scalar masks
        row_live = live if WIDE and CR > 1 else live[:, None]
        dt = _load_row(dt_at, p, channels, row_live, True, CR, WIDE, FAST)
        u = _load_row(u_at, p, channels, row_live, False, CR, WIDE, FAST)
        gy = _load_row(gy_at, p, channels, row_live, True, CR, WIDE, FAST)
        b = _load_row(B_at, p, states, row_live, False, NR, WIDE, FAST)
        c = _load_row(C_at, p, states, row_live, False, NR, WIDE, FAST) if REVERSE else b
        steps = steps + ((p, live, dt, u, gy, b, c),)
        p_next, left_next = next_position(p, left, inner, stride, turn)
        moves = (t < L) & (t > 0) if REVERSE else t + 1 < L
        p = tl.where(moves, p_next, p)
        left = tl.where(moves, left_next, left)
        t += -1 if REVERSE else 1
    return steps, p, left


@triton.jit
def _columns(row, COUNT: tl.constexpr):
    """A row [LANES, COUNT] as COUNT columns [LANES, 1]."""
    vectors = _split(row, COUNT)
    columns = ()
    for i in tl.static_range(COUNT):
        columns = columns + (vectors[i][:, None],)
    return columns


@triton.jit
def _in_float32(steps, at, UNROLL: tl.constexpr, NR: tl.constexpr, CR: tl.constexpr, WIDE: tl.constexpr):
    """dt, u and gy as rows [LANES, CR], B and C as NR columns [LANES, 1]."""
    dt_at, u_at, gy_at, B_at, C_at = at
    converted = ()
    for r in tl.static_range(UNROLL):
        p, live, dt, u, gy, b, c = steps[r]
        dt = _unpack(dt, dt_at, CR, WIDE)
        u = _unpack(u, u_at, CR, WIDE)
        gy = _unpack(gy, gy_at, CR, WIDE)
        b = _columns(_unpack(b, B_at, NR, WIDE), NR)
        c = _columns(_unpack(c, C_at, NR, WIDE), NR)
        converted = converted + ((p, live, dt, u, gy, b, c),)
    return converted


# Triton would compile the kernel again for numbers that 16 divides: no faster, and it takes long to compile.
NOT_SPECIALIZED = [
    *("orders", "batch", "repeats", "L", "H", "W", "K", "part_row", "chunks"),
    *("u_b", "u_l", "u_k", "B_b", "B_l", "B_k", "C_b", "C_l", "C_k", "gy_b", "gy_l", "gy_k"),
]


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _backward_kernel(
    u_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, gy_ptr,  # operands, and the gradient of y
    starts_ptr, ends_ptr, decay_ptr, end_ptr,  # states and adjoints at chunks' ends, decays, the last adjoint
    scratch_ptr,  # where a program keeps states for itself
    gu_ptr, gdelta_ptr, gB_ptr, gC_ptr, gsums_ptr,  # gradients, or parts of them; the last of A, D and the bias
    orders,  # of all directions, two bits each
    batch, repeats,  # sequences of a direction, and tiles of them that a program takes
    L, H, W,  # steps of a sequence, and the map that it walks over
    E, N_STATES, K,  # channels, states of each, directions
    part_row,  # stride between directions of B's and C's gradients
    chunks,  # of a sequence
    u_b, u_l, u_k, B_b, B_l, B_k, C_b, C_l, C_k, gy_b, gy_l, gy_k,  # strides of batch, length and direction
    CHUNK: tl.constexpr, UNROLL: tl.constexpr,  # steps of a chunk, and of those that are walked at once
    SOFTPLUS: tl.constexpr, LAST: tl.constexpr,  # of the step sizes; whether the last states have a gradient
    SPLIT: tl.constexpr, LOCAL: tl.constexpr,  # one chunk a program; from a zero adjoint
    FAST: tl.constexpr, DISCARD: tl.constexpr,  # NVIDIA's instructions, and that which empties the cache
    LARGE: tl.constexpr, WIDE: tl.constexpr,  # 64-bit offsets, whole words
    NR: tl.constexpr, NL: tl.constexpr, S: tl.constexpr, CE: tl.constexpr, CR: tl.constexpr,  # the tile, see tiles.py
):  # fmt: skip
    """Walks chunk by chunk from the end. In a chunk, a first pass recomputes the states, keeps those before every
    UNROLL steps in scratch and writes C's gradients; a second, from the chunk's end, recomputes the states between
    them and passes the adjoint over UNROLL steps at a time.

    With SPLIT a program has one chunk, and the adjoint after it in ends; with LOCAL too, it walks from a zero adjoint
    and writes only the adjoint before its chunk (to ends) and the chunk's decay.
    """
    STATES_STRIDE: tl.constexpr = CE * S  # between lanes of neighbouring groups of states
    OWN_STATES: tl.constexpr = NR // CE if NR > CE else 1  # values in a lane after sums over channels
    OWN_CHANNELS: tl.constexpr = CR // NL if CR > NL else 1  # and after sums over states
    k = tl.program_id(1)
    order = (orders >> (2 * tl.minimum(k, MAX_ORDERS - 1))) & 3  # arithmetic, not a load: it stays uniform
    k = k.to(tl.int64)
    blocks = tl.cdiv(E, CE * CR)
    block = tl.program_id(0) % blocks
    group = (tl.program_id(0) // blocks).to(tl.int64)

    lane = tl.arange(0, LANES)
    s = (lane // CE) % S
    n = lane // STATES_STRIDE * NR
    e = block * (CE * CR) + lane % CE * CR
    own_n, first_n = _share(lane % CE, CE, NR)
    own_e, first_e = _share(lane // STATES_STRIDE, NL, CR)
    own_n += n
    own_e += e

    # 64-bit bases for the program and 32-bit offsets of its lanes: 64-bit offsets would fill the registers
    OFFSET: tl.constexpr = tl.int64 if LARGE else tl.uint32
    sw = s.to(OFFSET)
    sequence = tl.cast(L, OFFSET) * K * E
    in_dt = sw * sequence + e.to(OFFSET)  # and in the gradients of u and delta: they lie as (batch, L, K, E)
    own_in_dt = sw * sequence + own_e.to(OFFSET)
    own_in_part = sw * (tl.cast(L, OFFSET) * K * part_row) + own_n.to(OFFSET)
    in_u = sw * u_b + e.to(OFFSET)
    in_gy = sw * gy_b + e.to(OFFSET)
    in_B = sw * B_b + n.to(OFFSET)
    in_C = sw * C_b + n.to(OFFSET)
    in_tile = sw * (tl.cast(K, OFFSET) * (chunks - 1) * N_STATES * E) + (n * E + e).to(OFFSET)

    program = (tl.program_id(2) * K + k).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    KEPT: tl.constexpr = NR * CR * LANES  # a tile: so many lines of 128 bytes as a lane has states
    program_scratch = scratch_ptr + program * (CHUNK // UNROLL * KEPT)
    scratch_at = program_scratch + (lane[:, None] * CR + tl.arange(0, CR)[None, :])
    scratch_lines = program_scratch + tl.minimum(lane, NR * CR - 1) * LANES

    existing = ()  # channels of the lanes' states
    for v in tl.static_range(NR):
        existing = existing + ((n[:, None] + v < N_STATES) & (e[:, None] + tl.arange(0, CR)[None, :] < E),)
    A = _load_tile(A_ptr + k * (N_STATES * E) + (n * E + e), E, existing, lane[:, None] >= 0, NR, CR)
    scaled = ()
    for v in tl.static_range(NR):
        scaled = scaled + (A[v].to(tl.float32) * LOG2E,)
    A = scaled  # for exp2
    D = ()
    for v in tl.static_range(OWN_CHANNELS):
        D = D + (tl.load(D_ptr + k * E + own_e + v, mask=own_e + v < E, other=0.0).to(tl.float32),)

    gA = _zero_tile(NR, CR)
    gD = zeros(OWN_CHANNELS)
    gbias = zeros(OWN_CHANNELS)
    for repeat in range(tl.minimum(repeats, (tl.cdiv(batch, S) - group * repeats).to(tl.int32))):
        seq = (group * repeats + repeat) * S
        s_in = seq + s < batch
        channels = tl.where(s_in, E - e, 0)  # how many of the lane's own exist
        states = tl.where(s_in, N_STATES - n, 0)
        inside = ()
        for v in tl.static_range(NR):
            inside = inside + (existing[v] & s_in[:, None],)
        first_in_dt = (seq * L * K + k) * E
        dt_at = (dt_ptr + first_in_dt, in_dt, K * E)
        u_at = (u_ptr + seq * u_b + k * u_k, in_u, u_l)
        gy_at = (gy_ptr + seq * gy_b + k * gy_k, in_gy, gy_l)
        B_at = (B_ptr + seq * B_b + k * B_k, in_B, B_l)
        C_at = (C_ptr + seq * C_b + k * C_k, in_C, C_l)
        at = (dt_at, u_at, gy_at, B_at, C_at)
        part = ((block.to(tl.int64) * batch + seq) * L * K + k) * part_row  # of B and C: one a block of channels
        state_row = (seq * K + k) * (chunks - 1) * (N_STATES * E)

        g = _zero_tile(NR, CR)
        total = tl.zeros([LANES, CR], dtype=tl.float32)
        last_chunk = chunks - 1
        num_chunks = chunks
        if SPLIT:
            last_chunk = tl.program_id(2) + (1 if LOCAL else 0)  # the first chunk has none before it to tell
            num_chunks = 1
        if not LOCAL:
            is_last = last_chunk + tl.arange(0, 1) == chunks - 1
            if SPLIT:
                g_at = ends_ptr + state_row + tl.cast(last_chunk, tl.int64) * (N_STATES * E) + in_tile
                g = _load_tile(g_at, E, inside, is_last[:, None] == 0, NR, CR)
            if LAST:
                end_at = end_ptr + (seq * K + k) * (N_STATES * E) + s * (K * N_STATES * E) + (n * E + e)
                end = _load_tile(end_at, E, inside, is_last[:, None], NR, CR)
                g = add(g, end, NR)

        for j in range(num_chunks):
            chunk = last_chunk - j
            first = chunk * CHUNK
            subs = tl.cdiv(tl.minimum(CHUNK, L - first), UNROLL)
            if not LOCAL:
                # the first chunk's states are zero and not stored
                not_first = chunk + tl.arange(0, 1) > 0
                start_at = starts_ptr + state_row + tl.cast(chunk - 1, tl.int64) * (N_STATES * E) + in_tile
                h = _load_tile(start_at, E, inside, not_first[:, None], NR, CR)
                p, left, inner, stride, turn = start_walk(first, order, L, H, W, LARGE)
                steps, p, left = _load_steps(
                    first, p, left, inner, stride, turn, L, at, channels, states, False, UNROLL, NR, CR, WIDE, FAST
                )
                for i in range(subs):
                    for v in tl.static_range(NR):
                        kept_at = scratch_at + (i * NR + v) * (CR * LANES)
                        tl.store(kept_at, h[v], eviction_policy="evict_last")
                    # here and below, the next operands are under way while these are used
                    t = first + (i + 1) * UNROLL
                    current = _in_float32(steps, at, UNROLL, NR, CR, WIDE)
                    steps, p, left = _load_steps(
                        t, p, left, inner, stride, turn, L, at, channels, states, False, UNROLL, NR, CR, WIDE, FAST
                    )
                    for r in tl.static_range(UNROLL):
                        position, live, dt, u, gy, b, _ = current[r]
                        h = _next(_decays(dt, A, NR, FAST), h, b, dt * u, NR)
                        gC = sum_over_lanes(_sum_channels(h, gy, NR), lane, lane, 1, CE, NR)
                        gC_at = gC_ptr + (part + position * (K * part_row)) + own_in_part
                        for v in tl.static_range(OWN_STATES):
                            mask = first_n & (own_n + v < N_STATES) & s_in & live
                            tl.store(gC_at + v, gC[v].to(gC_ptr.dtype.element_ty), mask=mask)

            last = first + subs * UNROLL - 1
            p, left, inner, stride, turn = start_walk(tl.maximum(L - 1 - last, 0), order ^ 2, L, H, W, LARGE)
            steps, p, left = _load_steps(
                last, p, left, inner, stride, turn, L, at, channels, states, True, UNROLL, NR, CR, WIDE, FAST
            )
            for i in range(subs):
                if not LOCAL:
                    state = ()
                    for v in tl.static_range(NR):  # each thread reads what it wrote, once
                        kept_at = scratch_at + ((subs - 1 - i) * NR + v) * (CR * LANES)
                        state = state + (tl.load(kept_at, eviction_policy="evict_first"),)
                t = last - (i + 1) * UNROLL
                current = _in_float32(steps, at, UNROLL, NR, CR, WIDE)
                steps, p, left = _load_steps(
                    t, p, left, inner, stride, turn, L, at, channels, states, True, UNROLL, NR, CR, WIDE, FAST
                )
                decays = ()
                before = ()
                for r in tl.static_range(UNROLL - 1, -1, -1):  # in the walk's order
                    _, _, dt, u, _, b, _ = current[r]
                    decay = _decays(dt, A, NR, FAST)
                    decays = (decay,) + decays
                    if not LOCAL:
                        before = (state,) + before
                        if r > 0:
                            state = _next(decay, state, b, dt * u, NR)
                for r in tl.static_range(UNROLL):  # against it
                    # g: the gradient of the state after the step, then of the state before it
                    position, live, dt, u, gy, b, c = current[r]
                    g = _accumulate(g, c, gy, NR)
                    if LOCAL:
                        g = multiply(g, decays[r], NR)
                        total += dt
                    else:
                        gB = sum_over_lanes(_sum_channels(g, dt * u, NR), lane, lane, 1, CE, NR)
                        gB_at = gB_ptr + (part + position * (K * part_row)) + own_in_part
                        for v in tl.static_range(OWN_STATES):
                            mask = first_n & (own_n + v < N_STATES) & s_in & live
                            tl.store(gB_at + v, gB[v].to(gB_ptr.dtype.element_ty), mask=mask)
                        ginput = sum_over_lanes(_sum_states(g, b, NR, CR), lane, lane, STATES_STRIDE, NL, CR)
                        g = multiply(g, decays[r], NR)
                        gexponent = multiply(g, before[r], NR)
                        gdecay = sum_over_lanes(_sum_states(gexponent, A, NR, CR), lane, lane, STATES_STRIDE, NL, CR)
                        gA = _accumulate(gA, gexponent, dt, NR)
                        dt = _own(_split(dt, CR), lane, STATES_STRIDE, NL, CR)
                        u = _own(_split(u, CR), lane, STATES_STRIDE, NL, CR)
                        gy = _own(_split(gy, CR), lane, STATES_STRIDE, NL, CR)
                        gD = add(gD, multiply(gy, u, OWN_CHANNELS), OWN_CHANNELS)
                        gus = ()
                        gdts = ()
                        for v in tl.static_range(OWN_CHANNELS):
                            gdt = u[v] * ginput[v] + gdecay[v] * LN2
                            if SOFTPLUS:
                                # d softplus(x) = sigmoid(x) = 1 - exp(-softplus(x)); its series where that cancels
                                size = dt[v]
                                gdt *= tl.where(
                                    size < 0.01,
                                    size * (1.0 - size * (0.5 - size * 0.16666667)),
                                    1.0 - exp2(-size * LOG2E, FAST),
                                )
                            gdts = gdts + (gdt,)
                            gus = gus + (dt[v] * ginput[v] + D[v] * gy[v],)
                        gbias = add(gbias, gdts, OWN_CHANNELS)
                        own = tl.where(first_e & s_in & live, E - own_e, 0)
                        gu_at = (gu_ptr + first_in_dt, own_in_dt, K * E)
                        gdelta_at = (gdelta_ptr + first_in_dt, own_in_dt, K * E)
                        store_row(gu_at, position, gus, own, OWN_CHANNELS, WIDE, FAST)
                        store_row(gdelta_at, position, gdts, own, OWN_CHANNELS, WIDE, FAST)
                if DISCARD and not LOCAL:  # else all of it goes to memory, sooner or later
                    _discard(scratch_lines + (subs - 1 - i) * KEPT)

        if LOCAL:
            at_chunk = state_row + tl.cast(last_chunk - 1, tl.int64) * (N_STATES * E)
            _store_tile(ends_ptr + at_chunk + in_tile, E, g, inside, NR, CR)
            _store_tile(decay_ptr + at_chunk + in_tile, E, _decays(total, A, NR, FAST), inside, NR, CR)

    if not LOCAL:
        # sums over steps and repeats: a part for each group of sequences, sequence of a tile and chunk; those of
        # sequences that do not exist are zero
        part_of_sums = ((tl.program_id(2) * (tl.num_programs(0) // blocks) + group) * S + s) * K + k
        sums = gsums_ptr + part_of_sums * ((N_STATES + 2) * E)
        _store_tile(sums + n * E + e, E, gA, existing, NR, CR)
        for v in tl.static_range(OWN_CHANNELS):
            at_own = sums + N_STATES * E + own_e + v
            tl.store(at_own, gD[v], mask=first_e & (own_e + v < E))
            tl.store(at_own + E, gbias[v], mask=first_e & (own_e + v < E))


@functools.lru_cache(None)
def _can_discard(device: torch.device) -> bool:
    """Whether the GPU knows the instruction: from compute capability 8.0 on."""
    return not INTERPRETED and torch.cuda.get_device_capability(device) >= (8, 0)


def scan_backward(
    grad_y: Tensor, grad_last: Tensor, starts: Tensor, operands: Operands, *, delta_softplus: bool,
    orders: tuple[str, ...], height: int, width: int, grad_B: Tensor, grad_C: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As `reference.selective_scan_chunked_backward`, for states kept every TRITON_CHUNK steps.

    Args:
        starts: Those states, (batch, K, chunks - 1, N, E).
        grad_B, grad_C: Where the gradients of B and C are written, (batch, L, K, N); they may have room between rows.

    Returns:
        Gradients for u, for the step sizes before bias and softplus, (batch, L, K, E), A, D and delta_bias.
    """
    u, dt, At, B, C, D = kernel_inputs(operands, delta_softplus)
    (grad_y,) = last_axis_contiguous(grad_y)
    batch, length, directions, features = dt.shape
    n = At.shape[1]
    layouts = [layout(t) for t in (u, dt, B, C, grad_y, grad_B, grad_C)]
    plan = _plan(
        u.device, *layouts, n, starts.shape[2] + 1, orders, height, width, delta_softplus, grad_last.numel() > 0
    )

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device=u.device)

    end = grad_last.transpose(-1, -2).float().contiguous() if grad_last.numel() else grad_last
    ends = empty(starts.shape) if plan.scan_chunks else starts
    decay = empty(starts.shape) if plan.scan_chunks else starts
    scratch = empty(plan.scratch)
    grad_u, grad_delta = (
        empty(batch, length, directions, features, dtype=t.dtype) for t in (operands.u, operands.delta)
    )
    sums = empty(plan.parts, directions, n + 2, features)
    # added up over the blocks of channels, unless there is but one
    part_B, part_C = (
        t if plan.blocks == 1 else empty(plan.blocks, batch, length, directions, n, dtype=t.dtype)
        for t in (grad_B, grad_C)
    )
    tensors = (
        u, dt, At, B, C, D, grad_y,
        starts, ends, decay, end,
        scratch,
        grad_u, grad_delta, part_B, part_C, sums,
    )  # fmt: skip
    if plan.scan_chunks:
        plan.scan_chunks(*tensors)
        combine(ends, decay, end)
    plan.scan_all(*tensors)
    if plan.blocks > 1:
        sum_blocks(part_B, grad_B)
        sum_blocks(part_C, grad_C)
    grad_A, grad_D, grad_bias = sums.sum(0).split((n, 1, 1), dim=1)
    return (
        grad_u if u.dim() == 4 else sum_directions(grad_u),
        grad_delta,
        _copy(grad_A.transpose(1, 2), operands.A.dtype),
        _copy(grad_D.squeeze(1), operands.D.dtype),
        _copy(grad_bias.squeeze(1), operands.delta_bias.dtype),
    )


def _copy(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """A part of the sums, contiguous and apart from the others, as compilers have been told."""
    return sums.to(dtype, copy=True, memory_format=torch.contiguous_format)


class _Plan(NamedTuple):
    """How the backward scan runs.

    Attributes:
        blocks: Of channels, whose parts of B's and C's gradients are summed.
        parts: Of the gradients of A, D and the bias, which are summed together.
        scratch: Shape of the room for programs' own states.
        scan_chunks: Where chunks are scanned side by side, the launch for each from a zero adjoint.
        scan_all: The launch for the results.
    """

    blocks: int
    parts: int
    scratch: tuple[int, ...]
    scan_chunks: Launch | None
    scan_all: Launch


@functools.lru_cache(MAX_LAUNCHES)
def _plan(
    device: torch.device, u: Layout, dt: Layout, B: Layout, C: Layout, grad_y: Layout, grad_B: Layout, grad_C: Layout,
    n: int, chunks: int, orders: tuple[str, ...], height: int, width: int, softplus: bool, last: bool,
) -> _Plan:  # fmt: skip
    batch, length, directions, features = dt.shape
    fill = schedule.programs_to_fill(device)
    tile = schedule.backward_tile(n, features, batch, directions, fill)
    blocks = schedule.channel_blocks(features, tile)
    tiles = -(-batch // tile["S"])
    fills = tiles * blocks * directions >= fill
    split = 1 < chunks <= schedule.MAX_CHUNKS and not fills
    parts = chunks if split else 1
    repeats = schedule.tiles_a_program(tiles * blocks * directions, device)
    groups = -(-tiles // repeats)
    programs = groups * blocks
    numbers = (
        pack_orders(orders),
        batch, repeats,
        length, height, width,
        features, n, directions,
        grad_B.stride[-2] if blocks == 1 else n,
        chunks,
        *schedule.strides(u), *schedule.strides(B), *schedule.strides(C), *schedule.strides(grad_y),
    )  # fmt: skip
    starts = schedule.states_layout(batch, directions, chunks - 1, n, features)
    block = tile["CE"] * tile["CR"]
    all_exist = n == tile["NR"] * tile["NL"] and features % block == 0 and batch % tile["S"] == 0
    words = [u, dt, grad_y, *((B, C) if tile["NR"] > 1 else ())]
    options = dict(
        CHUNK=TRITON_CHUNK,
        UNROLL=UNROLL,
        SOFTPLUS=softplus,
        LAST=last,
        FAST=not INTERPRETED,
        DISCARD=_can_discard(device),
        LARGE=schedule.is_large(tile["S"], u, B, C, dt, grad_y, grad_B, grad_C, starts),
        WIDE=all_exist and all(map(schedule.in_words, words)),
        num_warps=1,
        **tile,
    )
    kept = tile["NR"] * tile["CR"] * LANES.value
    scan_chunks = None
    if split:
        grid = (programs, directions, chunks - 1)
        scan_chunks = Launch(_backward_kernel, grid, numbers, SPLIT=True, LOCAL=True, **options)
    return _Plan(
        blocks=blocks,
        parts=parts * groups * tile["S"],
        scratch=(parts, directions, programs, TRITON_CHUNK // UNROLL, kept),
        scan_chunks=scan_chunks,
        scan_all=Launch(_backward_kernel, (programs, directions, parts), numbers, SPLIT=split, LOCAL=False, **options),
    )
