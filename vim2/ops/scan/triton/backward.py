# ruff: noqa: RUF005  (Triton knows no starred tuples)
"""The backward pass of the selective scan in Triton; `forward.py` has the forward pass.

A program is one warp. It walks a tile of states from the sequence's end, spread over the lanes as tiles.py says, and
has a room of its own, in shared memory, for what it needs again soon. Little is left to Triton's own loads and stores:
for each it searches the whole kernel for the best layout of its vectors, see `load_word`.

The words of this file:

    part      of a sequence: what one program walks, where a sequence is split (SPLIT); `span` chunks
    chunk     TRITON_CHUNK steps, before which the forward pass has kept the states
    sub       UNROLL steps, which are walked at once, with their states in registers
    adjoint   the gradient for a state, which the walk carries, as the forward scan carries the state itself
    room      a program's shared memory; in Triton's interpreter, its part of a tensor
    row       in the room: what one step reads, dt, u, gy, B, C and the factor, or the gradients of these
    piece     16 bytes of a row, which one lane copies at once
    turn      the order in which a lane holds its states or channels: the i-th is that at i ^ turn
    own       of states and channels: those whose sums over lanes end up in this lane
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_launch import INTERPRETED, MAX_LAUNCHES, Launch, Layout, last_axis_contiguous, layout
from ...triton_math import LANES, LN2, LOG2E, exp2
from ...triton_sums import sum_parts, summed
from ..chunks import TRITON_CHUNK
from ..operands import Operands
from . import schedule
from .combine import combine
from .room import fetch, put_element, put_tile, put_zero, send, shared_memory, take, take_tile, unknown_zero, wait
from .step_size import kernel_inputs, step_sizes_backward
from .sums import sum_blocks, sum_directions
from .tiles import (
    add,
    decays,
    half,
    multiply,
    multiply_add,
    of_channels,
    of_states,
    store_row,
    sum_over_lanes,
    sum_states,
    unpack,
    zeros,
)
from .walk import MAX_ORDERS, advance_walk, group_stride, next_position, pack_orders, start_walk
from .words import load_element, load_word


@triton.jit
def _load_row(at, p, existing, live, LIVE: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr, FAST: tl.constexpr):
    """As `load_row`, for 2 or 4 neighbours with WIDE; and with LIVE zero where not `live`."""
    address = at[0] + p * at[2] + at[1]
    if WIDE and COUNT > 1:
        mask = live & (at[1] >= 0) if LIVE else at[1] >= 0  # in the second case, everywhere
        if FAST:
            return (load_word(address, mask, COUNT),)
        else:
            word: tl.constexpr = tl.int64 if COUNT == 4 else tl.int32
            return (tl.load(address.to(tl.pointer_type(word)), mask=mask, other=0),)
    else:
        row = ()
        for i in tl.static_range(COUNT):
            mask = (i < existing) & live if LIVE else i < existing
            row = row + (load_element(address + i, mask, FAST),)
        return row


@triton.jit
def _own(values, lane, STRIDE: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr):
    """This lane's own of COUNT values that all lanes of an axis have: those whose sums `sum_over_lanes` would leave in
    it."""
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
def _copy_rows(
    rows, at, t, subs, L, H, W,
    ROW: tl.constexpr, SPREAD: tl.constexpr, UNROLL: tl.constexpr, LARGE: tl.constexpr, FETCH: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Copies the rows of subs times UNROLL steps from step t on to the program's room, or back, SPREAD of them at once.

    Args:
        rows: What `_rows` has returned.
        at: The address of the first of the rows in the room, each ROW from the one before.
    """
    address, stride, in_row, lane_row, there, order = rows
    at += in_row
    t += lane_row
    p, left, inner, step, turn = start_walk(tl.minimum(t, L - 1), order, L, H, W, LARGE)
    jump, bend, rest, inner = group_stride(SPREAD, inner, step, turn)
    walk = (p * stride, left)  # in words
    advance = (jump * stride, bend * stride, rest, inner)
    for i in range(subs):
        for r in tl.static_range(0, UNROLL, SPREAD):
            if FETCH:
                fetch(at + (i * UNROLL + r) * ROW, address + walk[0], there & (t < L), FAST)
            else:
                send(address + walk[0], at + (i * UNROLL + r) * ROW, there & (t < L), FAST)
            walk = advance_walk(walk, advance)
            t += SPREAD


@triton.jit
def _fetch_tile(
    at, states_ptr, chunk, e, lane, E, N_STATES, PIECES_C: tl.constexpr, PIECES: tl.constexpr,
    PIECE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Copies the states before a chunk to the program's room, as rows of its block of channels, from e on; zeros before
    the first."""
    there = chunk + lane * 0 > 0
    states = states_ptr + tl.maximum(chunk - 1, 0).to(tl.int64) * (N_STATES * E) + e
    for i in tl.static_range(0, PIECES, LANES):
        piece = i + lane
        address = states + (piece // PIECES_C * E + piece % PIECES_C * 8)
        fetch(at + piece * PIECE, address.to(tl.pointer_type(tl.int64)), there, FAST)


@triton.jit
def _load_tile(at, row, inside, turns, mask, NR: tl.constexpr, CR: tl.constexpr, FAST: tl.constexpr):
    """As `load_tile`, with states and channels of each lane in the order that its turns make."""
    turn_n, turn_e = turns
    n, e, n_states, features, sequence_in = inside
    tile = ()
    for i in tl.static_range(NR):
        for j in tl.static_range(CR):
            i_turned = turn_n ^ i
            j_turned = turn_e ^ j
            there = (n + i_turned < n_states) & (e + j_turned < features) & sequence_in & mask
            tile = tile + (load_element(at + (i_turned * row + j_turned), there, FAST).to(tl.float32),)
    return tile


@triton.jit
def _store_tile(at, row, tile, inside, turns, NR: tl.constexpr, CR: tl.constexpr):
    """As `store_tile`, with states and channels of each lane in the order that its turns make."""
    turn_n, turn_e = turns
    n, e, n_states, features, sequence_in = inside
    for i in tl.static_range(NR):
        for j in tl.static_range(CR):
            i_turned = turn_n ^ i
            j_turned = turn_e ^ j
            there = (n + i_turned < n_states) & (e + j_turned < features) & sequence_in
            tl.store(at + (i_turned * row + j_turned), tile[i * CR + j], mask=there)


@triton.jit
def _outer(total, states, channels, NR: tl.constexpr, CR: tl.constexpr):
    """A tile plus the outer product of states and channels."""
    return multiply_add(of_states(states, NR, CR), of_channels(channels, NR, CR), total, NR * CR)


@triton.jit
def _next(decay, h, b, channels, NR: tl.constexpr, CR: tl.constexpr):
    """decay h + b channels, with a decay and an h for each state and channel."""
    states = ()
    for i in tl.static_range(NR):
        for j in tl.static_range(CR):
            states = states + (decay[i * CR + j] * h[i * CR + j] + b[i] * channels[j],)
    return states


@triton.jit
def _sum_channels(tile, channels, NR: tl.constexpr, CR: tl.constexpr):
    """The sums of a tile times channels over the thread's own channels, one a state."""
    sums = ()
    for i in tl.static_range(NR):
        total = tile[i * CR] * channels[0]
        for j in tl.static_range(1, CR):
            total += tile[i * CR + j] * channels[j]
        sums = sums + (total,)
    return sums


@triton.jit
def _sum_states(a, b, NR: tl.constexpr, CR: tl.constexpr):
    """The sums of a times b over the thread's own states, one a channel."""
    return sum_states(multiply(a, b, NR * CR), NR, CR)


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
        dt = _load_row(dt_at, p, channels, live, True, CR, WIDE, FAST)
        u = _load_row(u_at, p, channels, live, False, CR, WIDE, FAST)
        gy = _load_row(gy_at, p, channels, live, True, CR, WIDE, FAST)
        b = _load_row(B_at, p, states, live, False, NR, WIDE, FAST)
        c = _load_row(C_at, p, states, live, False, NR, WIDE, FAST) if REVERSE else b
        steps = steps + ((p, live, dt, u, gy, b, c),)
        p_next, left_next = next_position(p, left, inner, stride, turn)
        moves = (t < L) & (t > 0) if REVERSE else t + 1 < L
        p = tl.where(moves, p_next, p)
        left = tl.where(moves, left_next, left)
        t += -1 if REVERSE else 1
    return steps, p, left


@triton.jit
def _in_float32(steps, at, UNROLL: tl.constexpr, NR: tl.constexpr, CR: tl.constexpr, WIDE: tl.constexpr):
    """Steps of `_load_steps` with their operands unpacked, in float32."""
    dt_at, u_at, gy_at, B_at, C_at = at
    converted = ()
    for r in tl.static_range(UNROLL):
        p, live, dt, u, gy, b, c = steps[r]
        dt = unpack(dt, dt_at[0], CR, WIDE)
        u = unpack(u, u_at[0], CR, WIDE)
        gy = unpack(gy, gy_at[0], CR, WIDE)
        b = unpack(b, B_at[0], NR, WIDE)
        c = unpack(c, C_at[0], NR, WIDE)
        converted = converted + ((p, live, dt, u, gy, b, c),)
    return converted


@triton.jit
def _choose(piece, values, PIECES_C: tl.constexpr, PIECES_S: tl.constexpr):
    """The one of six values, of dt, u, gy, B, C and the factor, that belongs to a lane's piece of a row."""
    dt, u, gy, b, c, factor = values
    of_states = tl.where(piece < 3 * PIECES_C + PIECES_S, b, tl.where(piece < 3 * PIECES_C + 2 * PIECES_S, c, factor))
    of_channels = tl.where(piece < PIECES_C, dt, tl.where(piece < 2 * PIECES_C, u, gy))
    return tl.where(piece < 3 * PIECES_C, of_channels, of_states)


@triton.jit
def _rows(
    lane, order, seq, part, k, e, tensors, BACK: tl.constexpr, FACTOR: tl.constexpr,
    PIECES_C: tl.constexpr, PIECES_S: tl.constexpr, SPREAD: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """What `_copy_rows` wants to know of rows of operands, or with BACK of results: each lane has 16 bytes, a piece, of
    one of SPREAD rows; those that are left over copy what others do.

    Args:
        seq, part: The sequence, and that of B's and C's gradients, of which there is a part for each block of channels.
        e: The first channel.
        tensors: Of dt, u, gy, B, C and delta's factor, or of the gradients: where they begin, and the strides of
            sequences, directions and positions. Without FACTOR the last has no piece; with it, none of dt's gradient
            is copied.

    Returns:
        The address of the lane's piece at position 0, the stride of positions in words of 64 bits, where in the
        room's rows it lies, which row it is of, whether it is copied, and the order.
    """
    ROW: tl.constexpr = 3 * PIECES_C + 2 * PIECES_S + FACTOR
    pointers, of_sequence, of_direction, of_step = tensors
    piece = lane % ROW
    lane_row = lane // ROW % SPREAD
    in_channels = e + piece % PIECES_C * 8
    in_states = (piece - 3 * PIECES_C) % PIECES_S * 8
    if BACK:
        seq = tl.where(piece < 3 * PIECES_C, seq, part)
    offset = seq.to(tl.int64) * _choose(piece, of_sequence, PIECES_C, PIECES_S)
    offset += k.to(tl.int64) * _choose(piece, of_direction, PIECES_C, PIECES_S)
    offset += tl.where(piece < 3 * PIECES_C, in_channels, in_states)
    address = (_choose(piece, pointers, PIECES_C, PIECES_S) + offset).to(tl.pointer_type(tl.int64))
    stride = _choose(piece, of_step, PIECES_C, PIECES_S) // 4
    there = piece >= 0
    if BACK:
        there = ((piece < 2 * PIECES_C) | (piece >= 3 * PIECES_C)) & (piece >= PIECES_C * FACTOR)
    return address, stride, (lane_row * ROW + piece) * PIECE, lane_row, there, order


@triton.jit
def _take_operands(
    of_channels, of_states, turns, AT_U: tl.constexpr, NR: tl.constexpr, CR: tl.constexpr, FAST: tl.constexpr
):
    """dt, u and B of a step, from its row in the program's room."""
    dt = take(of_channels, turns[1], CR, FAST)
    return dt, take(of_channels + AT_U, turns[1], CR, FAST), take(of_states, turns[0], NR, FAST)


# Triton would compile the kernel again for numbers that 16 divides: no faster, and it takes long to compile.
NOT_SPECIALIZED = [
    *("orders", "batch", "repeats", "L", "H", "W", "K", "part_row", "chunks", "span"),
    *("u_b", "u_l", "u_k", "B_b", "B_l", "B_k", "C_b", "C_l", "C_k", "gy_b", "gy_l", "gy_k"),
    *("factor_b", "factor_l", "factor_k"),
]


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _backward_kernel(
    u_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, gy_ptr,  # operands, and the gradient of y
    starts_ptr, ends_ptr, decay_ptr, end_ptr,  # states and adjoints at chunks' ends, decays, the last adjoint
    room_ptr,  # the programs' rooms, where not in shared memory
    factor_ptr, weight_ptr,  # with FACTOR, the step sizes' one number, and what it is multiplied with
    gu_ptr, gdelta_ptr, gB_ptr, gC_ptr, gfactor_ptr,  # gradients, or parts of them
    gsums_ptr,  # likewise, of A, D, the bias, and with FACTOR the weight
    orders,  # of all directions, two bits each
    batch, repeats,  # sequences of a direction, and tiles of them that a program takes
    L, H, W,  # steps of a sequence, and the map that it walks over
    E, N_STATES, K,  # channels, states of each, directions
    part_row,  # stride between directions of B's and C's gradients
    chunks, span,  # of a sequence, and of a program
    u_b, u_l, u_k, B_b, B_l, B_k, C_b, C_l, C_k, gy_b, gy_l, gy_k,  # strides of batch, length and direction
    factor_b, factor_l, factor_k,
    CHUNK: tl.constexpr, UNROLL: tl.constexpr,  # steps of a chunk, and of those that are walked at once
    SOFTPLUS: tl.constexpr, LAST: tl.constexpr,  # of the step sizes; whether the last states have a gradient
    SPLIT: tl.constexpr, LOCAL: tl.constexpr,  # a part of a sequence a program; from a zero adjoint
    STAGED: tl.constexpr, FAST: tl.constexpr,  # operands and results by way of the room; NVIDIA's instructions
    FACTOR: tl.constexpr,  # the gradients of the step sizes' factor and weight, not of the step sizes
    LARGE: tl.constexpr, WIDE: tl.constexpr,  # 64-bit offsets, whole words
    NR: tl.constexpr, NL: tl.constexpr, S: tl.constexpr, CE: tl.constexpr, CR: tl.constexpr,  # the tile, see tiles.py
):  # fmt: skip
    """Walks chunk by chunk from the end. In a chunk, a first pass recomputes the states and keeps those before every
    UNROLL steps in the program's room; a second, from the chunk's end, recomputes the states between them and passes
    the adjoint over UNROLL steps at a time.

    With STAGED, a chunk's operands come to the room all at once, a row for each step, while the chunk after it is
    walked, and its results take their places there: so steps cost no addresses and no masks, and wait for no memory.
    States and channels lie in each lane in an order of its own then, in which sums over lanes leave the lane with the
    first of what it has, without a choice for each.

    With FACTOR, which is for STAGED, a lane adds up its channels' part in the gradient of each step's factor, and all
    lanes those parts, of UNROLL steps at once.

    With SPLIT a program has `span` chunks, and the adjoint after them in ends; with LOCAL too, it walks from a zero
    adjoint and writes only the adjoint before its chunks (to ends) and their decay.
    """
    STATES_STRIDE: tl.constexpr = CE * S  # between lanes of neighbouring groups of states
    # sums over channels leave so many of B's values and of C's in a lane, when those over REST lanes are still to come
    HALVED: tl.constexpr = CE if CE < NR else NR
    OWN_STATES: tl.constexpr = NR // HALVED
    REST: tl.constexpr = CE // HALVED
    OWN_CHANNELS: tl.constexpr = CR // NL if CR > NL else 1  # so many of u's and delta's do sums over states
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
    own_n = lane % CE // REST * OWN_STATES
    own_C = lane % REST * 2 // REST == 1 if REST > 1 else lane < 0  # with REST, one of both is left
    first_n = lane % REST % (REST // 2) == 0 if REST > 1 else lane >= 0
    own_e, first_e = _share(lane // STATES_STRIDE, NL, CR)
    turns = (own_n, own_e) if STAGED else (lane * 0, lane * 0)
    ordered = lane * 0 if STAGED else lane  # of turned values, each lane keeps the first ones
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
    parts = tl.cdiv(chunks, span)  # of a sequence
    in_end = sw * (tl.cast(K, OFFSET) * (parts - 1) * N_STATES * E) + (n * E + e).to(OFFSET)

    program = (tl.program_id(2) * K + k).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    # the program's room: rows of two chunks' operands, of which each lane copies a piece of 16 bytes, the states before
    # the next chunk, and tiles of states of this one
    PIECES_C: tl.constexpr = CE * CR // 8
    PIECES_S: tl.constexpr = NR * NL // 8
    ROW: tl.constexpr = 3 * PIECES_C + 2 * PIECES_S + FACTOR if STAGED else 0
    SPREAD: tl.constexpr = 2 if STAGED and 2 * ROW <= LANES else 1  # rows that are copied at once
    KEPT: tl.constexpr = NR * CR * LANES // (8 if STAGED else 4)
    WORDS: tl.constexpr = NR * CR // 2 if STAGED else NR * CR  # of a tile, a lane
    PIECES: tl.constexpr = 2 * CHUNK * ROW + (CHUNK // UNROLL if STAGED else CHUNK // UNROLL - 1) * KEPT
    PIECE: tl.constexpr = 16 if FAST else 4  # in addresses: in bytes, or in words of 32 bits
    AT_U: tl.constexpr = PIECES_C * PIECE  # of a row that begins with dt, and goes on with u, gy, B, C and the factor
    AT_GY: tl.constexpr = 2 * PIECES_C * PIECE
    AT_B: tl.constexpr = 3 * PIECES_C * PIECE
    AT_C: tl.constexpr = (3 * PIECES_C + PIECES_S) * PIECE
    AT_FACTOR: tl.constexpr = (3 * PIECES_C + 2 * PIECES_S) * PIECE
    room = shared_memory(lane, PIECES * 16 + LANES * 4) if FAST else room_ptr + program * (PIECES * PIECE) + lane * 0
    BUFFER: tl.constexpr = CHUNK * ROW * PIECE
    KEPT_STEP: tl.constexpr = KEPT * PIECE
    next_at = room + 2 * BUFFER
    kept_at = room + (2 * BUFFER + (KEPT_STEP if STAGED else 0)) + lane * ((WORDS if WORDS < 4 else 4) * PIECE // 4)
    if STAGED:
        channel_at = room + lane % CE * (CR * PIECE // 8)
        state_at = room + lane // STATES_STRIDE * (NR * PIECE // 8)
        zero_at = room + PIECES * PIECE + lane * (PIECE // 4)
        put_zero(zero_at, FAST)
        own_state_at = room + tl.where(own_C, AT_C, AT_B)

    existing = (n, e, N_STATES, E, lane >= 0)
    A = ()
    rates = _load_tile(A_ptr + k * (N_STATES * E) + (n * E + e), E, existing, turns, lane >= 0, NR, CR, FAST)
    for v in tl.static_range(NR * CR):
        A = A + (rates[v].to(tl.float32) * LOG2E,)  # for exp2
    D = ()
    for v in tl.static_range(OWN_CHANNELS):
        D = D + (tl.load(D_ptr + k * E + own_e + v, mask=own_e + v < E, other=0.0).to(tl.float32),)
    weight = ()
    if FACTOR:  # of lanes that have the same channels, one adds their part
        for v in tl.static_range(OWN_CHANNELS):
            weight = weight + (tl.load(weight_ptr + k * E + own_e + v, mask=first_e, other=0.0).to(tl.float32),)

    gA = zeros(NR * CR)
    gD = zeros(OWN_CHANNELS)
    gbias = zeros(OWN_CHANNELS)
    gweight = zeros(OWN_CHANNELS)
    for repeat in range(tl.minimum(repeats, (tl.cdiv(batch, S) - group * repeats).to(tl.int32))):
        seq = (group * repeats + repeat) * S
        s_in = seq + s < batch
        channels = tl.where(s_in, E - e, 0)  # how many of the lane's own exist
        states = tl.where(s_in, N_STATES - n, 0)
        inside = (n, e, N_STATES, E, s_in)
        first_in_dt = (seq * L * K + k) * E
        dt_at = (dt_ptr + first_in_dt, in_dt, K * E)
        u_at = (u_ptr + seq * u_b + k * u_k, in_u, u_l)
        gy_at = (gy_ptr + seq * gy_b + k * gy_k, in_gy, gy_l)
        B_at = (B_ptr + seq * B_b + k * B_k, in_B, B_l)
        C_at = (C_ptr + seq * C_b + k * C_k, in_C, C_l)
        at = (dt_at, u_at, gy_at, B_at, C_at)
        part = ((block.to(tl.int64) * batch + seq) * L * K + k) * part_row  # of B and C: one a block of channels
        state_row = (seq * K + k) * (chunks - 1) * (N_STATES * E)
        end_row = (seq * K + k) * (parts - 1) * (N_STATES * E)

        if STAGED:
            operands = (
                (dt_ptr, u_ptr, gy_ptr, B_ptr, C_ptr, factor_ptr),
                (sequence, u_b, gy_b, B_b, C_b, factor_b),
                (E, u_k, gy_k, B_k, C_k, factor_k),
                (K * E, u_l, gy_l, B_l, C_l, factor_l),
            )
            of_part = tl.cast(L, OFFSET) * K * part_row
            results = (
                (gdelta_ptr, gu_ptr, gu_ptr, gB_ptr, gC_ptr, gfactor_ptr),
                (sequence, sequence, sequence, of_part, of_part, of_part),
                (E, E, E, part_row, part_row, part_row),
                (K * E, K * E, K * E, K * part_row, K * part_row, K * part_row),
            )

        g = zeros(NR * CR)
        total = zeros(CR)
        part_of_sequence = tl.program_id(2) + (1 if LOCAL else 0)  # the first has none before it to tell
        last_chunk = tl.minimum((part_of_sequence + 1) * span, chunks) - 1
        num_chunks = last_chunk + 1 - part_of_sequence * span
        if not LOCAL:
            is_last = last_chunk + tl.arange(0, 1) == chunks - 1
            if SPLIT:
                g_at = ends_ptr + end_row + tl.cast(part_of_sequence, tl.int64) * (N_STATES * E) + in_end
                g = _load_tile(g_at, E, inside, turns, is_last == 0, NR, CR, FAST)
            if LAST:
                end_at = end_ptr + (seq * K + k) * (N_STATES * E) + s * (K * N_STATES * E) + (n * E + e)
                end = _load_tile(end_at, E, inside, turns, is_last, NR, CR, FAST)
                g = add(g, end, NR * CR)

        buffer = last_chunk * 0  # where the chunk's rows begin
        if STAGED:
            first = last_chunk * CHUNK
            subs = tl.cdiv(tl.minimum(CHUNK, L - first), UNROLL)
            rows = _rows(
                lane, order, seq, seq, k, block * (CE * CR), operands, False, FACTOR, PIECES_C, PIECES_S, SPREAD, PIECE
            )
            _copy_rows(rows, room, first, subs, L, H, W, ROW * PIECE, SPREAD, UNROLL, LARGE, True, FAST)
            if not LOCAL:
                _fetch_tile(
                    next_at, starts_ptr + state_row, last_chunk, block * (CE * CR), lane, E, N_STATES,
                    PIECES_C, KEPT, PIECE, FAST,
                )  # fmt: skip
        for j in range(num_chunks):
            chunk = last_chunk - j
            first = chunk * CHUNK
            subs = tl.cdiv(tl.minimum(CHUNK, L - first), UNROLL)
            if STAGED:
                wait(lane, True, FAST)
                again = lane + unknown_zero(zero_at, FAST)
                if not LOCAL:
                    own_next_at = next_at + again // STATES_STRIDE * (NR * PIECES_C * PIECE)
                    own_next_at += again % CE * (CR * PIECE // 8)
                    h = ()
                    for i in tl.static_range(NR):
                        row_at = own_next_at + (turns[0] ^ i) * (PIECES_C * PIECE)
                        h = h + take(row_at, turns[1], CR, FAST)
                    wait(lane, False, FAST)
                if j + 1 < num_chunks:
                    rows = _rows(
                        again, order, seq + (again - lane), seq, k, block * (CE * CR), operands, False, FACTOR,
                        PIECES_C, PIECES_S, SPREAD, PIECE,
                    )  # fmt: skip
                    # all groups of a whole chunk, but not as a constant: the loop would be unrolled, which is slower
                    subs_before = tl.cdiv(tl.minimum(CHUNK, L - first + CHUNK), UNROLL)
                    _copy_rows(
                        rows, room + (BUFFER - buffer), first - CHUNK, subs_before, L, H, W,
                        ROW * PIECE, SPREAD, UNROLL, LARGE, True, FAST,
                    )  # fmt: skip
                    if not LOCAL:
                        _fetch_tile(
                            next_at, starts_ptr + state_row, chunk - 1, block * (CE * CR), again, E, N_STATES,
                            PIECES_C, KEPT, PIECE, FAST,
                        )  # fmt: skip

            if not LOCAL:
                if not STAGED:
                    # the first chunk's states are zero and not stored
                    not_first = chunk + tl.arange(0, 1) > 0
                    start_at = starts_ptr + state_row + tl.cast(chunk - 1, tl.int64) * (N_STATES * E) + in_tile
                    h = _load_tile(start_at, E, inside, turns, not_first, NR, CR, FAST)
                    p, left, inner, stride, turn = start_walk(first, order, L, H, W, LARGE)
                    steps, p, left = _load_steps(
                        first, p, left, inner, stride, turn, L, at, channels, states, False, UNROLL, NR, CR, WIDE, FAST
                    )
                for i in range(subs - 1):  # the last group's own states are left to the second pass
                    put_tile(kept_at + i * KEPT_STEP, h, NR * CR, STAGED, FAST)
                    if not STAGED:
                        # here and below, the next operands are under way while these are used
                        t = first + (i + 1) * UNROLL
                        current = _in_float32(steps, at, UNROLL, NR, CR, WIDE)
                        steps, p, left = _load_steps(
                            t, p, left, inner, stride, turn, L, at, channels, states, False, UNROLL, NR, CR, WIDE, FAST
                        )
                    for r in tl.static_range(UNROLL):
                        if STAGED:
                            row = buffer + (i * UNROLL + r) * (ROW * PIECE)
                            dt, u, b = _take_operands(
                                channel_at + row, state_at + row + AT_B, turns, AT_U, NR, CR, FAST
                            )
                        else:
                            _, _, dt, u, _, b, _ = current[r]
                        h = _next(decays(dt, A, NR, CR, FAST), h, b, multiply(dt, u, CR), NR, CR)
                state = h
                # not for the room: else ptxas makes two loops of the one before, more than its cache has room for
                wait(lane, False, FAST)

            last = first + subs * UNROLL - 1
            if not STAGED:
                p, left, inner, stride, turn = start_walk(tl.maximum(L - 1 - last, 0), order ^ 2, L, H, W, LARGE)
                steps, p, left = _load_steps(
                    last, p, left, inner, stride, turn, L, at, channels, states, True, UNROLL, NR, CR, WIDE, FAST
                )
            for i in range(subs):
                t = last - (i + 1) * UNROLL
                if STAGED:
                    current = ()
                    for r in tl.static_range(UNROLL):
                        step = (subs - i) * UNROLL - 1 - r
                        row = buffer + step * (ROW * PIECE)
                        dt, u, b = _take_operands(channel_at + row, state_at + row + AT_B, turns, AT_U, NR, CR, FAST)
                        current = current + (
                            (row, first + step + tl.arange(0, 1) < L, dt, u, dt, b, b),
                        )  # gy and C come later
                else:
                    current = _in_float32(steps, at, UNROLL, NR, CR, WIDE)
                    steps, p, left = _load_steps(
                        t, p, left, inner, stride, turn, L, at, channels, states, True, UNROLL, NR, CR, WIDE, FAST
                    )
                factors = ()
                if FACTOR:
                    for r in tl.static_range(UNROLL):
                        factor, _ = take(room + (current[r][0] + AT_FACTOR), lane * 0, 2, FAST)
                        factors = factors + (factor,)
                gfactors = ()
                steps_decays = ()
                before = ()
                for r in tl.static_range(UNROLL - 1, -1, -1):  # in the walk's order
                    _, _, dt, u, _, b, _ = current[r]
                    decay = decays(dt, A, NR, CR, FAST)
                    steps_decays = (decay,) + steps_decays
                    if not LOCAL:
                        before = (state,) + before
                        state = _next(decay, state, b, multiply(dt, u, CR), NR, CR)
                if STAGED:
                    gy = take(channel_at + current[0][0] + AT_GY, turns[1], CR, FAST)
                    c = take(state_at + current[0][0] + AT_C, turns[0], NR, FAST)
                for r in tl.static_range(UNROLL):  # against it
                    # g: the gradient of the state after the step, then of the state before it
                    if STAGED:  # the position is that of the row
                        position, live, dt, u, _, b, _ = current[r]
                        # the next operands are under way while these are used; no lane writes results before all have
                        # taken theirs
                        next_row = current[r + 1 if r + 1 < UNROLL else r][0]
                        next_gy = take(channel_at + next_row + AT_GY, turns[1], CR, FAST)
                        next_c = take(state_at + next_row + AT_C, turns[0], NR, FAST)
                        if not LOCAL:
                            wait(lane, False, FAST)
                    else:
                        position, live, dt, u, gy, b, c = current[r]
                    g = _outer(g, c, gy, NR, CR)
                    if LOCAL:
                        g = multiply(g, steps_decays[r], NR * CR)
                        total = add(total, dt, CR)
                    else:
                        gB = _sum_channels(g, multiply(dt, u, CR), NR, CR)
                        gB = sum_over_lanes(gB, lane, ordered, REST, HALVED, NR, FAST)
                        gC = _sum_channels(state, gy, NR, CR)
                        gC = sum_over_lanes(gC, lane, ordered, REST, HALVED, NR, FAST)
                        state = before[r]
                        gBC = sum_over_lanes(gB + gC, lane, lane, 1, REST, 2 * OWN_STATES, FAST)
                        if STAGED:
                            for v in tl.static_range(OWN_STATES):
                                put_element(own_state_at + position, own_n + v, gBC[v], first_n, FAST)
                                if REST == 1:  # a lane has C's, too
                                    own_at = own_state_at + (position + (AT_C - AT_B))
                                    put_element(own_at, own_n + v, gBC[OWN_STATES + v], first_n, FAST)
                        else:
                            mask = first_n & s_in & live
                            gB_at = gB_ptr + (part + position * (K * part_row)) + own_in_part
                            gC_at = gC_ptr + (part + position * (K * part_row)) + own_in_part
                            for v in tl.static_range(OWN_STATES):
                                mask_v = mask & (own_n + v < N_STATES)
                                mask_B = mask_v & (own_C == 0)
                                mask_C = mask_v & own_C if REST > 1 else mask_v
                                value_C = gBC[v if REST > 1 else OWN_STATES + v]
                                tl.store(gB_at + v, gBC[v].to(gB_ptr.dtype.element_ty), mask=mask_B)
                                tl.store(gC_at + v, value_C.to(gC_ptr.dtype.element_ty), mask=mask_C)
                        ginput = sum_over_lanes(
                            _sum_states(g, of_states(b, NR, CR), NR, CR), lane, ordered, STATES_STRIDE, NL, CR, FAST
                        )
                        g = multiply(g, steps_decays[r], NR * CR)
                        gexponent = multiply(g, state, NR * CR)
                        gdecay = _sum_states(gexponent, A, NR, CR)
                        gdecay = sum_over_lanes(gdecay, lane, ordered, STATES_STRIDE, NL, CR, FAST)
                        gA = multiply_add(gexponent, of_channels(dt, NR, CR), gA, NR * CR)
                        dt = _own(dt, ordered, STATES_STRIDE, NL, CR)
                        u = _own(u, ordered, STATES_STRIDE, NL, CR)
                        gy = _own(gy, ordered, STATES_STRIDE, NL, CR)
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
                            else:
                                gdt = tl.where(live, gdt, 0.0)
                            gdts = gdts + (gdt,)
                            gus = gus + (dt[v] * ginput[v] + D[v] * gy[v],)
                        gbias = add(gbias, gdts, OWN_CHANNELS)
                        if FACTOR:
                            gfactors = gfactors + _sum_channels(gdts, weight, 1, OWN_CHANNELS)
                            gweight = _outer(gweight, (factors[r],), gdts, 1, OWN_CHANNELS)
                        if STAGED:
                            for v in tl.static_range(OWN_CHANNELS):
                                i_own = own_e - block * (CE * CR) + v
                                if not FACTOR:
                                    put_element(room + position, i_own, gdts[v], first_e, FAST)
                                put_element(room + (position + AT_U), i_own, gus[v], first_e, FAST)
                        else:
                            own = tl.where(first_e & s_in & live, E - own_e, 0)
                            gu_at = (gu_ptr + first_in_dt, own_in_dt, K * E)
                            gdelta_at = (gdelta_ptr + first_in_dt, own_in_dt, K * E)
                            store_row(gu_at, position, gus, own, OWN_CHANNELS, WIDE, FAST)
                            store_row(gdelta_at, position, gdts, own, OWN_CHANNELS, WIDE, FAST)
                    if STAGED:
                        gy, c = next_gy, next_c
                if FACTOR and not LOCAL:
                    gfactor = sum_over_lanes(gfactors, lane, lane, 1, LANES, UNROLL, FAST)[0]
                    # of eight lanes that have a step's, the first puts it in place, the others the zeros behind it
                    row = current[0][0] - lane // (LANES // UNROLL) * (ROW * PIECE)
                    column = lane % (LANES // UNROLL)
                    put_element(room + (row + AT_FACTOR), column, tl.where(column == 0, gfactor, 0.0), lane >= 0, FAST)
                if not LOCAL:
                    before_next = kept_at + tl.maximum(subs - 2 - i, 0) * KEPT_STEP
                    state = take_tile(before_next, NR * CR, STAGED, FAST)

            if STAGED:
                wait(lane, False, FAST)
                if not LOCAL:
                    again = lane + unknown_zero(zero_at, FAST)
                    rows = _rows(
                        again, order, seq + (again - lane), block * batch + seq + (again - lane), k, block * (CE * CR),
                        results, True, FACTOR, PIECES_C, PIECES_S, SPREAD, PIECE,
                    )  # fmt: skip
                    _copy_rows(
                        rows, room + buffer, first, subs, L, H, W, ROW * PIECE, SPREAD, UNROLL, LARGE, False, FAST
                    )
                    wait(lane, False, FAST)
                buffer = BUFFER - buffer

        if LOCAL:
            at_part = end_row + tl.cast(part_of_sequence - 1, tl.int64) * (N_STATES * E)
            _store_tile(ends_ptr + at_part + in_end, E, g, inside, turns, NR, CR)
            total_decays = decays(total, A, NR, CR, FAST)
            _store_tile(decay_ptr + at_part + in_end, E, total_decays, inside, turns, NR, CR)

    if not LOCAL:
        # sums over steps and repeats: a part for each group of sequences, sequence of a tile and part of a sequence;
        # those of sequences that do not exist are zero
        part_of_sums = ((tl.program_id(2) * (tl.num_programs(0) // blocks) + group) * S + s) * K + k
        sums = gsums_ptr + part_of_sums * ((N_STATES + 2 + FACTOR) * E)
        _store_tile(sums + n * E + e, E, gA, existing, turns, NR, CR)
        for v in tl.static_range(OWN_CHANNELS):
            at_own = sums + N_STATES * E + own_e + v
            tl.store(at_own, gD[v], mask=first_e & (own_e + v < E))
            tl.store(at_own + E, gbias[v], mask=first_e & (own_e + v < E))
            if FACTOR:
                tl.store(at_own + 2 * E, gweight[v], mask=first_e & (own_e + v < E))


@functools.lru_cache(None)
def _copies_in_background(device: torch.device) -> bool:
    """Whether the GPU copies from global to shared memory in the background: from compute capability 8.0 on."""
    return INTERPRETED or torch.cuda.get_device_capability(device) >= (8, 0)


def scan_backward(
    grad_y: Tensor, grad_last: Tensor, starts: Tensor, operands: Operands, *, delta_softplus: bool,
    orders: tuple[str, ...], height: int, width: int, grad_B: Tensor, grad_C: Tensor, grad_delta: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As `reference.selective_scan_chunked_backward`, for states kept every TRITON_CHUNK steps, with a gradient for
    delta_weight at the end, which is empty where delta is full.

    Args:
        starts: The states that are kept, (batch, K, chunks - 1, N, E).
        grad_B, grad_C: Where the gradients of B and C are written, (batch, L, K, N); their rows may lie apart.
        grad_delta: Where that of delta is written; where delta is a factor, it may be wider, and the rest is zeroed.
    """
    u, dt, At, B, C, D = kernel_inputs(operands, delta_softplus)
    (grad_y,) = last_axis_contiguous(grad_y)
    batch, length, directions, features = dt.shape
    n = At.shape[1]
    delta, weight = operands.delta, operands.delta_weight
    layouts = [layout(t) for t in (u, dt, B, C, grad_y, grad_B, grad_C, delta, grad_delta)]
    plan = _plan(
        u.device, *layouts, n, starts.shape[2] + 1, orders, height, width, delta_softplus, grad_last.numel() > 0,
        all(t.dtype == torch.bfloat16 for t in (operands.u, delta, B, C, grad_y, starts))
        and starts.data_ptr() % 16 == 0,
        operands.is_rank_1 and _is_padded(delta),
    )  # fmt: skip

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device=u.device)

    end = grad_last.transpose(-1, -2).float().contiguous() if grad_last.numel() else grad_last
    ends, decay = (
        empty(batch, directions, plan.parts - 1, n, features) if plan.scan_parts else starts for _ in range(2)
    )
    room = empty(plan.room, dtype=torch.int32)
    grad_u = empty(batch, length, directions, features, dtype=operands.u.dtype)
    grad_steps = grad_delta  # not written to with plan.factor
    in_place = grad_delta.is_contiguous() and grad_delta.data_ptr() % 16 == 0  # the kernel writes whole words
    if not plan.factor and (operands.is_low_rank or not in_place):
        grad_steps = empty(batch, length, directions, features, dtype=delta.dtype)
    sums = empty(plan.sums, directions, n + 2 + plan.factor, features)
    # added up over the blocks of channels, unless there is but one
    part_B, part_C = (
        t if plan.blocks == 1 else empty(plan.blocks, batch, length, directions, n, dtype=t.dtype)
        for t in (grad_B, grad_C)
    )
    tensors = (
        u, dt, At, B, C, D, grad_y,
        starts, ends, decay, end,
        room,
        delta, weight.contiguous() if plan.factor else None,
        grad_u, grad_steps, part_B, part_C, grad_delta,
        sums,
    )  # fmt: skip
    if plan.scan_parts:
        plan.scan_parts(*tensors)
        combine(ends, decay, end)
    plan.scan_all(*tensors)
    if plan.blocks > 1:
        sum_blocks((part_B, part_C), (grad_B, grad_C))
    grad_A, grad_D, grad_bias = (
        torch.empty(t.shape, dtype=t.dtype, device=u.device) for t in (operands.A, operands.D, operands.delta_bias)
    )
    grad_weight = torch.empty(weight.shape if plan.factor else (0,), dtype=torch.float32, device=u.device)
    sum_parts(sums, grad_A, grad_D, grad_bias, *((grad_weight,) if plan.factor else ()), transposed=True)
    if not operands.is_low_rank and grad_steps is not grad_delta:
        grad_delta.copy_(grad_steps)
    if operands.is_low_rank and not plan.factor:
        parts = step_sizes_backward(grad_steps, delta, weight, grad_delta)
        grad_weight = summed(parts) if len(parts) > 1 else parts.squeeze(0)
    return grad_u if u.dim() == 4 else sum_directions(grad_u), grad_A, grad_D, grad_bias, grad_weight


def _is_padded(factor: Tensor) -> bool:
    """Whether behind each of the factor's numbers lie seven more of the same memory: eight are a piece."""
    last = sum((size - 1) * stride for size, stride in zip(factor.shape, factor.stride()))
    return (factor.storage_offset() + last + 8) * factor.itemsize <= factor.untyped_storage().nbytes()


class _Plan(NamedTuple):
    """How the backward scan runs.

    Attributes:
        blocks: How many blocks of channels there are, whose parts of B's and C's gradients are summed.
        parts: How many parts of a sequence are scanned side by side.
        factor: Whether the kernel makes the gradients of the step sizes' factor and weight.
        sums: How many parts the gradients of A, D and the bias, and with `factor` the weight, come in.
        room: Shape of the programs' rooms, in words of 32 bits; empty where they are in shared memory.
        scan_parts: Where there are several parts of a sequence, the launch for each from a zero adjoint.
        scan_all: The launch for the results.
    """

    blocks: int
    parts: int
    factor: bool
    sums: int
    room: tuple[int, ...]
    scan_parts: Launch | None
    scan_all: Launch


@functools.lru_cache(MAX_LAUNCHES)
def _plan(
    device: torch.device, u: Layout, dt: Layout, B: Layout, C: Layout, grad_y: Layout, grad_B: Layout, grad_C: Layout,
    delta: Layout, grad_delta: Layout,
    n: int, chunks: int, orders: tuple[str, ...], height: int, width: int, softplus: bool, last: bool,
    bfloat16: bool, padded: bool,
) -> _Plan:  # fmt: skip
    """How tensors of these layouts are scanned.

    Args:
        n: States N.
        last: Whether the last states have a gradient.
        bfloat16: Whether all that is staged is bfloat16, and lies on multiples of 16 bytes.
        padded: Whether delta is a factor of one number a step with memory behind each, see `_is_padded`.
    """
    batch, length, directions, features = dt.shape
    fill = schedule.programs_to_fill(device)
    tile = schedule.backward_tile(n, features, batch, directions, fill)
    blocks = schedule.channel_blocks(features, tile)
    tiles = -(-batch // tile["S"])
    span = schedule.chunks_a_part(chunks, tiles * blocks * directions, fill)
    parts = -(-chunks // span)
    repeats = schedule.tiles_a_program(tiles * blocks * directions, device)
    groups = -(-tiles // repeats)
    programs = groups * blocks
    numbers = (
        pack_orders(orders),
        batch, repeats,
        length, height, width,
        features, n, directions,
        grad_B.stride[-2] if blocks == 1 else n,
        chunks, span,
        *schedule.strides(u), *schedule.strides(B), *schedule.strides(C), *schedule.strides(grad_y),
        *schedule.strides(delta),
    )  # fmt: skip
    starts = schedule.states_layout(batch, directions, chunks - 1, n, features)
    block = tile["CE"] * tile["CR"]
    all_exist = n == tile["NR"] * tile["NL"] and features % block == 0 and batch % tile["S"] == 0
    words = [u, dt, grad_y, *((B, C) if tile["NR"] > 1 else ())]
    wide = all_exist and all(map(schedule.in_words, words))
    row = (3 * block + 2 * n) // 8  # pieces of 16 bytes that the operands of a step are
    results = (grad_B, grad_C) if blocks == 1 else ()
    staged = (
        (wide and bfloat16 and tile["S"] == 1 and tile["NR"] == 4 and tile["CR"] > 1)
        and (block % 8 == 0 and n % 8 == 0 and row <= LANES.value and _copies_in_background(device))
        and all(schedule.in_words(t, 8) for t in (u, dt, B, C, grad_y, *results))
    )
    # of one number a step, the kernel makes the gradient where that of B and C is a row with eight numbers for it
    factor = (
        (staged and padded and parts == 1 and blocks == 1 and row < LANES.value)
        and (grad_delta.shape[-1] == 8 and grad_delta.stride == grad_B.stride)
        and all(schedule.in_words(t, 8) for t in (delta, grad_delta))
    )
    row += factor
    unroll = 4 if staged else 3  # steps whose states are held in registers at once
    options = dict(
        CHUNK=TRITON_CHUNK,
        UNROLL=unroll,
        SOFTPLUS=softplus,
        LAST=last,
        SPLIT=parts > 1,
        FAST=not INTERPRETED,
        STAGED=staged,
        FACTOR=factor,
        LARGE=schedule.is_large(tile["S"], u, B, C, dt, grad_y, grad_B, grad_C, delta, grad_delta, starts),
        WIDE=wide,
        num_warps=1,
        maxnreg=schedule.backward_registers(tile, staged),
        **tile,
    )
    tile_words = tile["NR"] * tile["CR"] * LANES.value
    if staged:  # rows of two chunks, and tiles in bfloat16
        room = 2 * TRITON_CHUNK * row * 4 + TRITON_CHUNK // unroll * tile_words // 2
    else:
        room = (TRITON_CHUNK // unroll - 1) * tile_words
    scan_parts = None
    if parts > 1:
        grid = (programs, directions, parts - 1)
        scan_parts = Launch(_backward_kernel, grid, numbers, LOCAL=True, **options)
    return _Plan(
        blocks=blocks,
        parts=parts,
        factor=factor,
        sums=parts * groups * tile["S"],
        room=(parts, directions, programs, room) if INTERPRETED else (0,),
        scan_parts=scan_parts,
        scan_all=Launch(_backward_kernel, (programs, directions, parts), numbers, LOCAL=False, **options),
    )
