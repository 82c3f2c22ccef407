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

From the top: `_backward_kernel` has sequences, one after the other, `_walk_chunk` a chunk of one, `_walk_sub` a sub,
and `_differentiate` a step. What stands above each of these is what it is made of, in its order. What many functions
want to know comes in named tuples: FORM and LAYOUT are constants, lanes, places, parameters and the sequence values.
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


class _Form(NamedTuple):
    """What the kernel is compiled for: a constant of its functions.

    Attributes:
        CHUNK, UNROLL, SOFTPLUS, LOCAL, STAGED, FAST, FACTOR, LARGE, WIDE: As `_backward_kernel` has them.
        NR, NL, S, CE, CR: The tile, see tiles.py.
        TILE: States of a lane.
        STATES_STRIDE: Between lanes of neighbouring groups of states.
        HALVED, REST: A state's channels spread over CE = HALVED REST lanes: sums over HALVED of these leave a lane with
            OWN_STATES of B's values and of C's, and those over the REST are still to come.
        OWN_STATES: So many of B's and C's gradients are a lane's own.
        OWN_CHANNELS: And of u's and delta's, after sums over states.
    """

    CHUNK: int
    UNROLL: int
    SOFTPLUS: bool
    LOCAL: bool
    STAGED: bool
    FAST: bool
    FACTOR: bool
    LARGE: bool
    WIDE: bool
    NR: int
    NL: int
    S: int
    CE: int
    CR: int
    TILE: int
    STATES_STRIDE: int
    HALVED: int
    REST: int
    OWN_STATES: int
    OWN_CHANNELS: int


class _Layout(NamedTuple):
    """How a program's room is laid out: rows of two chunks' operands, the states before the next chunk, tiles of states
    of this one, and a zero for each lane. Without STAGED it is but the tiles. A constant of the kernel's functions.

    Attributes:
        PIECES_C, PIECES_S: Pieces that a row has of the block's channels, three times, and of its states, twice.
        ROW: Pieces of a row: dt, u, gy, B, C, and with FACTOR the factor, with zeros behind it.
        SPREAD: Rows that are copied at once.
        KEPT: Pieces of a tile.
        SIZE: Pieces of the room.
        PIECE: The distance of neighbouring pieces, as all that follows in addresses: bytes, or words of 32 bits.
        AT_U, AT_GY, AT_B, AT_C, AT_FACTOR: Where in a row they begin.
        STEP: The distance of neighbouring rows.
        BUFFER: And of one chunk's rows from the other's.
        KEPT_STEP: And of neighbouring tiles.
    """

    PIECES_C: int
    PIECES_S: int
    ROW: int
    SPREAD: int
    KEPT: int
    SIZE: int
    PIECE: int
    AT_U: int
    AT_GY: int
    AT_B: int
    AT_C: int
    AT_FACTOR: int
    STEP: int
    BUFFER: int
    KEPT_STEP: int


class _Lanes(NamedTuple):
    """What of a block's tile the lanes have: a vector each.

    Attributes:
        lane: The lane's number.
        s, n, e: Its sequence of the tile, its first state and its first channel.
        block_e: The block's first channel.
        own_n, own_e: The first of its own states and channels.
        own_is_C: Whether its own states' gradients are those of C; without REST it has B's and C's.
        writes_n, writes_e: Whether it writes these: of lanes with the same own states or channels, one does.
        turns: Of states and channels.
        ordered: The lane's number, for sums over lanes; zero where turns put the lane's own first.
    """

    lane: tl.tensor
    s: tl.tensor
    n: tl.tensor
    e: tl.tensor
    block_e: tl.tensor
    own_n: tl.tensor
    own_e: tl.tensor
    own_is_C: tl.tensor
    writes_n: tl.tensor
    writes_e: tl.tensor
    turns: tuple
    ordered: tl.tensor


@triton.jit
def _share(place, SIZE: tl.constexpr, COUNT: tl.constexpr):
    """After `sum_over_lanes`: the first value that the lane at this place of the axis holds, and whether it is the
    first lane that does."""
    if COUNT >= SIZE:
        return place * (COUNT // SIZE), place >= 0
    else:
        return place // (SIZE // COUNT), place % (SIZE // COUNT) == 0


@triton.jit
def _spread(block, FORM: tl.constexpr):
    """What of a block's tile the lanes have: `_Lanes`."""
    REST: tl.constexpr = FORM.REST
    lane = tl.arange(0, LANES)
    s = (lane // FORM.CE) % FORM.S
    n = lane // FORM.STATES_STRIDE * FORM.NR
    block_e = block * (FORM.CE * FORM.CR)
    e = block_e + lane % FORM.CE * FORM.CR
    own_n = lane % FORM.CE // REST * FORM.OWN_STATES
    own_is_C = lane % REST * 2 // REST == 1 if REST > 1 else lane < 0
    writes_n = lane % REST % (REST // 2) == 0 if REST > 1 else lane >= 0
    own_e, writes_e = _share(lane // FORM.STATES_STRIDE, FORM.NL, FORM.CR)
    turns = (own_n, own_e) if FORM.STAGED else (lane * 0, lane * 0)
    ordered = lane * 0 if FORM.STAGED else lane
    return _Lanes(lane, s, n, e, block_e, own_n + n, own_e + e, own_is_C, writes_n, writes_e, turns, ordered)


class _Places(NamedTuple):
    """Addresses in the room, one a lane; those from `channels` on with STAGED only.

    Attributes:
        room: Where it begins.
        next: The states before the next chunk.
        kept: The lane's part of the tile of states before a chunk's first sub.
        channels, states: The lane's first of what a row begins with, if that is of channels, as it is, or of states:
            AT_U and the like and a row's beginning are added to these.
        own_states: Where the first row's B begins, or C in lanes whose own states' gradients are those of C.
        zero: For `unknown_zero`.
    """

    room: tl.tensor
    next: tl.tensor
    kept: tl.tensor
    channels: tl.tensor
    states: tl.tensor
    own_states: tl.tensor
    zero: tl.tensor


@triton.jit
def _find_places(room, lanes, FORM: tl.constexpr, LAYOUT: tl.constexpr):
    """The addresses in the room that begins there: `_Places`."""
    lane = lanes.lane
    PIECE: tl.constexpr = LAYOUT.PIECE
    WORDS: tl.constexpr = FORM.TILE // 2 if FORM.STAGED else FORM.TILE  # of a tile, a lane
    next_at = room + 2 * LAYOUT.BUFFER
    kept_at = room + (2 * LAYOUT.BUFFER + (LAYOUT.KEPT_STEP if FORM.STAGED else 0))
    kept_at += lane * ((WORDS if WORDS < 4 else 4) * PIECE // 4)
    channel_at = room + lane % FORM.CE * (FORM.CR * PIECE // 8)
    state_at = room + lane // FORM.STATES_STRIDE * (FORM.NR * PIECE // 8)
    zero_at = room + LAYOUT.SIZE * PIECE + lane * (PIECE // 4)
    if FORM.STAGED:
        put_zero(zero_at, FORM.FAST)
    own_state_at = room + tl.where(lanes.own_is_C, LAYOUT.AT_C, LAYOUT.AT_B)
    return _Places(room, next_at, kept_at, channel_at, state_at, own_state_at, zero_at)


@triton.jit
def _load_tile(at, row, inside, turns, mask, FORM: tl.constexpr):
    """As `load_tile`, with states and channels of each lane in the order that its turns make."""
    turn_n, turn_e = turns
    n, e, n_states, features, sequence_in = inside
    tile = ()
    for i in tl.static_range(FORM.NR):
        for j in tl.static_range(FORM.CR):
            i_turned = turn_n ^ i
            j_turned = turn_e ^ j
            there = (n + i_turned < n_states) & (e + j_turned < features) & sequence_in & mask
            tile = tile + (load_element(at + (i_turned * row + j_turned), there, FORM.FAST).to(tl.float32),)
    return tile


@triton.jit
def _store_tile(at, row, tile, inside, turns, FORM: tl.constexpr):
    """As `store_tile`, with states and channels of each lane in the order that its turns make."""
    turn_n, turn_e = turns
    n, e, n_states, features, sequence_in = inside
    for i in tl.static_range(FORM.NR):
        for j in tl.static_range(FORM.CR):
            i_turned = turn_n ^ i
            j_turned = turn_e ^ j
            there = (n + i_turned < n_states) & (e + j_turned < features) & sequence_in
            tl.store(at + (i_turned * row + j_turned), tile[i * FORM.CR + j], mask=there)


class _Parameters(NamedTuple):
    """A's tile of rates to the base 2; of the lane's own channels D, and with FACTOR the step sizes' weight."""

    A: tuple
    D: tuple
    weight: tuple


@triton.jit
def _load_parameters(A_ptr, D_ptr, weight_ptr, k, E, N_STATES, lanes, FORM: tl.constexpr):
    """Those of direction k: `_Parameters`."""
    everywhere = (lanes.n, lanes.e, N_STATES, E, lanes.lane >= 0)
    A = ()
    A_at = A_ptr + k * (N_STATES * E) + (lanes.n * E + lanes.e)
    rates = _load_tile(A_at, E, everywhere, lanes.turns, lanes.lane >= 0, FORM)
    for v in tl.static_range(FORM.TILE):
        A = A + (rates[v].to(tl.float32) * LOG2E,)  # for exp2
    D = ()
    for v in tl.static_range(FORM.OWN_CHANNELS):
        D = D + (tl.load(D_ptr + k * E + lanes.own_e + v, mask=lanes.own_e + v < E, other=0.0).to(tl.float32),)
    weight = ()
    if FORM.FACTOR:  # of lanes that have the same channels, one adds their part
        for v in tl.static_range(FORM.OWN_CHANNELS):
            own = tl.load(weight_ptr + k * E + lanes.own_e + v, mask=lanes.writes_e, other=0.0)
            weight = weight + (own.to(tl.float32),)
    return _Parameters(A, D, weight)


class _Rows(NamedTuple):
    """What rows are made of with STAGED: dt, u, gy, B, C and the factor, or the gradients of these. Without FACTOR the
    factor has no piece; with it, none of dt's gradient is copied.

    Attributes:
        pointers: Where each begins.
        of_sequence, of_direction, of_step: Its strides.
    """

    pointers: tuple
    of_sequence: tuple
    of_direction: tuple
    of_step: tuple


class _Operands(NamedTuple):
    """Where a sequence's operands are without STAGED, as `load_row` wants it, and how many of the lane's channels and
    states exist."""

    dt: tuple
    u: tuple
    gy: tuple
    B: tuple
    C: tuple
    channels: tl.tensor
    states: tl.tensor


class _Results(NamedTuple):
    """Where their gradients are written.

    Attributes:
        u, delta, B, C: Pointers.
        of_dt, own_dt: How far it is from u's and delta's to the sequence, and from there to the lane's own channels.
        of_part, own_part: Likewise from B's and C's, to the lane's own states.
        part_row: How far it is from one direction to the next of B's and C's.
        K: Directions.
    """

    u: tl.tensor
    delta: tl.tensor
    B: tl.tensor
    C: tl.tensor
    of_dt: tl.tensor
    own_dt: tl.tensor
    of_part: tl.tensor
    own_part: tl.tensor
    part_row: tl.tensor
    K: tl.tensor


class _Sequence(NamedTuple):
    """The sequence that is walked, or those of a tile, in one direction.

    Attributes:
        seq, k: The number of the first, and that of the direction.
        block, batch: The number of the block of channels, and how many sequences there are.
        order, L, H, W: The order, the steps, and the map's height and width, see walk.py.
        inside: Of the lane's tile, as `load_tile` wants it.
        starts, in_tile: Where the states that the forward pass has kept begin, and the lane's tile of these.
        operands, results: `_Rows` with STAGED, `_Operands` and `_Results` without.
    """

    seq: tl.tensor
    k: tl.tensor
    block: tl.tensor
    batch: tl.tensor
    order: tl.tensor
    L: tl.tensor
    H: tl.tensor
    W: tl.tensor
    inside: tuple
    starts: tl.tensor
    in_tile: tl.tensor
    operands: tuple
    results: tuple


@triton.jit
def _choose(piece, values, PIECES_C: tl.constexpr, PIECES_S: tl.constexpr):
    """The one of six values, of dt, u, gy, B, C and the factor, that belongs to a lane's piece of a row."""
    dt, u, gy, b, c, factor = values
    of_states = tl.where(piece < 3 * PIECES_C + PIECES_S, b, tl.where(piece < 3 * PIECES_C + 2 * PIECES_S, c, factor))
    of_channels = tl.where(piece < PIECES_C, dt, tl.where(piece < 2 * PIECES_C, u, gy))
    return tl.where(piece < 3 * PIECES_C, of_channels, of_states)


@triton.jit
def _copy_rows(
    buffer, rows, t, subs, zero, sequence, lanes, places,
    BACK: tl.constexpr, FORM: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Copies the rows of a chunk's steps, `subs` subs from step t on, to the room, or with BACK from there to memory:
    SPREAD rows at once, of which each lane copies a piece.

    Args:
        buffer: Where the chunk's rows begin in those of both chunks.
        rows: What they are made of, `_Rows`.
        zero: One a lane, which the compiler may know or not, see `unknown_zero`.
    """
    C: tl.constexpr = LAYOUT.PIECES_C
    S: tl.constexpr = LAYOUT.PIECES_S
    lane = lanes.lane + zero
    seq = sequence.seq + zero
    piece = lane % LAYOUT.ROW
    lane_row = lane // LAYOUT.ROW % LAYOUT.SPREAD  # lanes that are left over copy what others do
    in_channels = lanes.block_e + piece % C * 8
    in_states = (piece - 3 * C) % S * 8
    if BACK:  # of B's and C's gradients, there is a part for each block
        seq = tl.where(piece < 3 * C, seq, sequence.block * sequence.batch + sequence.seq + zero)
    offset = seq.to(tl.int64) * _choose(piece, rows.of_sequence, C, S)
    offset += sequence.k.to(tl.int64) * _choose(piece, rows.of_direction, C, S)
    offset += tl.where(piece < 3 * C, in_channels, in_states)
    address = (_choose(piece, rows.pointers, C, S) + offset).to(tl.pointer_type(tl.int64))
    stride = _choose(piece, rows.of_step, C, S) // 4  # in words of 64 bits
    there = piece >= 0
    if BACK:
        there = ((piece < 2 * C) | (piece >= 3 * C)) & (piece >= C * FORM.FACTOR)

    in_rows = (lane_row * LAYOUT.ROW + piece) * LAYOUT.PIECE
    at = places.room + buffer + in_rows
    t += lane_row
    start = tl.minimum(t, sequence.L - 1)
    p, left, inner, step, turn = start_walk(start, sequence.order, sequence.L, sequence.H, sequence.W, FORM.LARGE)
    jump, bend, rest, inner = group_stride(LAYOUT.SPREAD, inner, step, turn)
    walk = (p * stride, left)
    advance = (jump * stride, bend * stride, rest, inner)
    for i in range(subs):
        for r in tl.static_range(0, FORM.UNROLL, LAYOUT.SPREAD):
            if BACK:
                send(address + walk[0], at + (i * FORM.UNROLL + r) * LAYOUT.STEP, there & (t < sequence.L), FORM.FAST)
            else:
                fetch(at + (i * FORM.UNROLL + r) * LAYOUT.STEP, address + walk[0], there & (t < sequence.L), FORM.FAST)
            walk = advance_walk(walk, advance)
            t += LAYOUT.SPREAD


@triton.jit
def _fetch_states(at, chunk, zero, sequence, lanes, FORM: tl.constexpr, LAYOUT: tl.constexpr):
    """Copies the states before a chunk to the room, as rows of their block's channels; zeros before the first.

    Args:
        zero: As for `_copy_rows`.
    """
    lane = lanes.lane + zero
    _, _, N_STATES, E, _ = sequence.inside
    there = chunk + lane * 0 > 0
    states = sequence.starts + tl.maximum(chunk - 1, 0).to(tl.int64) * (N_STATES * E) + lanes.block_e
    for i in tl.static_range(0, LAYOUT.KEPT, LANES):
        piece = i + lane
        address = states + (piece // LAYOUT.PIECES_C * E + piece % LAYOUT.PIECES_C * 8)
        fetch(at + piece * LAYOUT.PIECE, address.to(tl.pointer_type(tl.int64)), there, FORM.FAST)


@triton.jit
def _take_states(at, lane, turns, FORM: tl.constexpr, LAYOUT: tl.constexpr):
    """The lane's tile of what `_fetch_states` has brought."""
    at += lane // FORM.STATES_STRIDE * (FORM.NR * LAYOUT.PIECES_C * LAYOUT.PIECE)
    at += lane % FORM.CE * (FORM.CR * LAYOUT.PIECE // 8)
    tile = ()
    for i in tl.static_range(FORM.NR):
        row_at = at + (turns[0] ^ i) * (LAYOUT.PIECES_C * LAYOUT.PIECE)
        tile = tile + take(row_at, turns[1], FORM.CR, FORM.FAST)
    return tile


@triton.jit
def _take_operands(row, places, turns, FORM: tl.constexpr, LAYOUT: tl.constexpr):
    """dt, u and B of the step whose row begins there."""
    of_channels = places.channels + row
    dt = take(of_channels, turns[1], FORM.CR, FORM.FAST)
    u = take(of_channels + LAYOUT.AT_U, turns[1], FORM.CR, FORM.FAST)
    return dt, u, take(places.states + row + LAYOUT.AT_B, turns[0], FORM.NR, FORM.FAST)


@triton.jit
def _take_outputs(row, places, turns, FORM: tl.constexpr, LAYOUT: tl.constexpr):
    """Likewise gy and C."""
    gy = take(places.channels + row + LAYOUT.AT_GY, turns[1], FORM.CR, FORM.FAST)
    return gy, take(places.states + row + LAYOUT.AT_C, turns[0], FORM.NR, FORM.FAST)


@triton.jit
def _take_sub(buffer, first, end, L, places, turns, FORM: tl.constexpr, LAYOUT: tl.constexpr):
    """With STAGED, a sub's steps from its last on: of each, where its row begins in those of both chunks, whether the
    sequence is as long, dt, u, gy, B and C. But gy and C are taken later: dt and B stand in their places.

    A step is a plain tuple: where tuples of named ones are added, Triton forgets the names.

    Args:
        buffer: Where the chunk's rows begin in those of both chunks.
        first: The chunk's first step.
        end: The sub's end, in steps of the chunk.
    """
    steps = ()
    for r in tl.static_range(FORM.UNROLL):
        step = end - 1 - r
        position = buffer + step * LAYOUT.STEP
        dt, u, b = _take_operands(position, places, turns, FORM, LAYOUT)
        steps = steps + ((position, first + step + tl.arange(0, 1) < L, dt, u, dt, b, b),)
    return steps


@triton.jit
def _load_row(at, p, existing, live, LIVE: tl.constexpr, COUNT: tl.constexpr, FORM: tl.constexpr):
    """As `load_row`, for 2 or 4 neighbours with WIDE, and with LIVE zero where not `live`."""
    address = at[0] + p * at[2] + at[1]
    if FORM.WIDE and COUNT > 1:
        mask = live & (at[1] >= 0) if LIVE else at[1] >= 0  # in the second case, everywhere
        if FORM.FAST:
            return (load_word(address, mask, COUNT),)
        else:
            word: tl.constexpr = tl.int64 if COUNT == 4 else tl.int32
            return (tl.load(address.to(tl.pointer_type(word)), mask=mask, other=0),)
    else:
        row = ()
        for i in tl.static_range(COUNT):
            mask = (i < existing) & live if LIVE else i < existing
            row = row + (load_element(address + i, mask, FORM.FAST),)
        return row


@triton.jit
def _load_sub(t, walk, L, operands, REVERSE: tl.constexpr, FORM: tl.constexpr):
    """Without STAGED, a sub's steps from step t on, or with REVERSE from t down, and where the walk then is.

    Of each step its position, whether the sequence is as long, dt, u, gy, B, and with REVERSE C, as `load_row` has
    them. A step beyond the sequence's end stands on the last position; its dt and gy are zero: it moves nothing.
    """
    channels, states = operands.channels, operands.states
    p, left, inner, stride, turn = walk
    steps = ()
    for _ in tl.static_range(FORM.UNROLL):
        live = t + tl.arange(0, 1) < L  # a block of one: Triton's interpreter takes no scalar masks
        dt = _load_row(operands.dt, p, channels, live, True, FORM.CR, FORM)
        u = _load_row(operands.u, p, channels, live, False, FORM.CR, FORM)
        gy = _load_row(operands.gy, p, channels, live, True, FORM.CR, FORM)
        b = _load_row(operands.B, p, states, live, False, FORM.NR, FORM)
        c = _load_row(operands.C, p, states, live, False, FORM.NR, FORM) if REVERSE else b
        steps = steps + ((p, live, dt, u, gy, b, c),)
        p_next, left_next = next_position(p, left, inner, stride, turn)
        moves = (t < L) & (t > 0) if REVERSE else t + 1 < L
        p = tl.where(moves, p_next, p)
        left = tl.where(moves, left_next, left)
        t += -1 if REVERSE else 1
    return steps, (p, left, inner, stride, turn)


@triton.jit
def _in_float32(steps, operands, FORM: tl.constexpr):
    """The steps of `_load_sub` with their operands unpacked, in float32."""
    converted = ()
    for r in tl.static_range(FORM.UNROLL):
        p, live, dt, u, gy, b, c = steps[r]
        dt = unpack(dt, operands.dt[0], FORM.CR, FORM.WIDE)
        u = unpack(u, operands.u[0], FORM.CR, FORM.WIDE)
        gy = unpack(gy, operands.gy[0], FORM.CR, FORM.WIDE)
        b = unpack(b, operands.B[0], FORM.NR, FORM.WIDE)
        c = unpack(c, operands.C[0], FORM.NR, FORM.WIDE)
        converted = converted + ((p, live, dt, u, gy, b, c),)
    return converted


@triton.jit
def _next(decay, h, b, channels, FORM: tl.constexpr):
    """decay h + b channels, with a decay and an h for each state and channel."""
    states = ()
    for i in tl.static_range(FORM.NR):
        for j in tl.static_range(FORM.CR):
            states = states + (decay[i * FORM.CR + j] * h[i * FORM.CR + j] + b[i] * channels[j],)
    return states


@triton.jit
def _recompute_chunk(h, buffer, first, subs, A, sequence, places, turns, FORM: tl.constexpr, LAYOUT: tl.constexpr):
    """The first pass over a chunk, from the states h before it: keeps those before each of its subs but the last, and
    returns those before the last, whose own states are left to the second pass.

    Args:
        buffer, first: As for `_take_sub`.
    """
    if not FORM.STAGED:
        walk = start_walk(first, sequence.order, sequence.L, sequence.H, sequence.W, FORM.LARGE)
        steps, walk = _load_sub(first, walk, sequence.L, sequence.operands, False, FORM)
    for i in range(subs - 1):
        put_tile(places.kept + i * LAYOUT.KEPT_STEP, h, FORM.TILE, FORM.STAGED, FORM.FAST)
        if not FORM.STAGED:
            # here and in the second pass, the next operands are under way while these are used
            t = first + (i + 1) * FORM.UNROLL
            current = _in_float32(steps, sequence.operands, FORM)
            steps, walk = _load_sub(t, walk, sequence.L, sequence.operands, False, FORM)
        for r in tl.static_range(FORM.UNROLL):
            if FORM.STAGED:
                row = buffer + (i * FORM.UNROLL + r) * LAYOUT.STEP
                dt, u, b = _take_operands(row, places, turns, FORM, LAYOUT)
            else:
                _, _, dt, u, _, b, _ = current[r]
            h = _next(decays(dt, A, FORM.NR, FORM.CR, FORM.FAST), h, b, multiply(dt, u, FORM.CR), FORM)
    return h


@triton.jit
def _recompute_sub(state, steps, A, FORM: tl.constexpr):
    """Of a sub's steps, from the last on, their decays, and unless LOCAL the states before them; and the states after
    the last, from those before the first."""
    steps_decays = ()
    before = ()
    for r in tl.static_range(FORM.UNROLL - 1, -1, -1):  # in the walk's order
        _, _, dt, u, _, b, _ = steps[r]
        decay = decays(dt, A, FORM.NR, FORM.CR, FORM.FAST)
        steps_decays = (decay,) + steps_decays
        if not FORM.LOCAL:
            before = (state,) + before
            state = _next(decay, state, b, multiply(dt, u, FORM.CR), FORM)
    return steps_decays, before, state


class _Sums(NamedTuple):
    """Gradients summed over steps: of A's tile, and of the lane's own channels' D, bias, and with FACTOR weight."""

    A: tuple
    D: tuple
    bias: tuple
    weight: tuple


@triton.jit
def _outer(total, states, channels, NR: tl.constexpr, CR: tl.constexpr):
    """A tile plus the outer product of states and channels."""
    return multiply_add(of_states(states, NR, CR), of_channels(channels, NR, CR), total, NR * CR)


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
def _sum_states(a, b, FORM: tl.constexpr):
    """The sums of a times b over the thread's own states, one a channel."""
    return sum_states(multiply(a, b, FORM.TILE), FORM.NR, FORM.CR)


@triton.jit
def _own(values, ordered, FORM: tl.constexpr):
    """The lane's own of its channels' values: those whose sums over states `sum_over_lanes` would leave in it."""
    for i in tl.static_range(5):
        if (FORM.NL >> i) > 1 and (FORM.CR >> (i + 1)) > 0:
            upper = (ordered & (FORM.STATES_STRIDE * (FORM.NL >> (i + 1)))) != 0
            values = half(values, upper, FORM.CR >> (i + 1))
    return values


@triton.jit
def _of_step_size(gdt, dt, live, FORM: tl.constexpr):
    """The gradient of delta, before bias and softplus, from that of dt."""
    if FORM.SOFTPLUS:
        # d softplus(x) = sigmoid(x) = 1 - exp(-softplus(x)); its series where that cancels
        slope = tl.where(dt < 0.01, dt * (1.0 - dt * (0.5 - dt * 0.16666667)), 1.0 - exp2(-dt * LOG2E, FORM.FAST))
        return gdt * slope
    else:
        return tl.where(live, gdt, 0.0)


@triton.jit
def _write_of_states(gBC, position, live, sequence, lanes, places, FORM: tl.constexpr, LAYOUT: tl.constexpr):
    """The lane's own of a step's gradients of B and C: both, or with REST one of them."""
    if FORM.STAGED:
        row_at = places.own_states + position
        for v in tl.static_range(FORM.OWN_STATES):
            put_element(row_at, lanes.own_n + v, gBC[v], lanes.writes_n, FORM.FAST)
            if FORM.REST == 1:  # the lane has C's, too
                row_C_at = places.own_states + (position + (LAYOUT.AT_C - LAYOUT.AT_B))
                put_element(row_C_at, lanes.own_n + v, gBC[FORM.OWN_STATES + v], lanes.writes_n, FORM.FAST)
    else:
        results = sequence.results
        _, _, n_states, _, sequence_in = sequence.inside
        mask = lanes.writes_n & sequence_in & live
        gB_at = results.B + (results.of_part + position * (results.K * results.part_row)) + results.own_part
        gC_at = results.C + (results.of_part + position * (results.K * results.part_row)) + results.own_part
        for v in tl.static_range(FORM.OWN_STATES):
            mask_v = mask & (lanes.own_n + v < n_states)
            mask_B = mask_v & (lanes.own_is_C == 0)
            mask_C = mask_v & lanes.own_is_C if FORM.REST > 1 else mask_v
            value_C = gBC[v if FORM.REST > 1 else FORM.OWN_STATES + v]
            tl.store(gB_at + v, gBC[v].to(results.B.dtype.element_ty), mask=mask_B)
            tl.store(gC_at + v, value_C.to(results.C.dtype.element_ty), mask=mask_C)


@triton.jit
def _write_of_channels(gdts, gus, position, live, sequence, lanes, places, FORM: tl.constexpr, LAYOUT: tl.constexpr):
    """The lane's own of a step's gradients of u, and unless FACTOR of delta."""
    if FORM.STAGED:
        for v in tl.static_range(FORM.OWN_CHANNELS):
            i_own = lanes.own_e - lanes.block_e + v
            if not FORM.FACTOR:
                put_element(places.room + position, i_own, gdts[v], lanes.writes_e, FORM.FAST)
            put_element(places.room + (position + LAYOUT.AT_U), i_own, gus[v], lanes.writes_e, FORM.FAST)
    else:
        results = sequence.results
        _, _, _, features, sequence_in = sequence.inside
        own = tl.where(lanes.writes_e & sequence_in & live, features - lanes.own_e, 0)
        gu_at = (results.u + results.of_dt, results.own_dt, results.K * features)
        gdelta_at = (results.delta + results.of_dt, results.own_dt, results.K * features)
        store_row(gu_at, position, gus, own, FORM.OWN_CHANNELS, FORM.WIDE, FORM.FAST)
        store_row(gdelta_at, position, gdts, own, FORM.OWN_CHANNELS, FORM.WIDE, FORM.FAST)


@triton.jit
def _differentiate(
    g, after, before, decay, step, gy, factor, parameters, sums, sequence, lanes, places,
    FORM: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Writes a step's gradients.

    Args:
        g: The adjoint: the gradient of the states after the step.
        after, before: The states after and before it.
        decay: Of the step's states.
        gy: The gradient of y.
        factor: With FACTOR, of the step sizes.
        sums: Those over the steps behind it.

    Returns:
        The adjoint of the states before it, the sums from it on, and with FACTOR the lane's part in the gradient of the
        factor.
    """
    lane, ordered = lanes.lane, lanes.ordered
    position, live, dt, u, _, b, _ = step
    gB = _sum_channels(g, multiply(dt, u, FORM.CR), FORM.NR, FORM.CR)
    gB = sum_over_lanes(gB, lane, ordered, FORM.REST, FORM.HALVED, FORM.NR, FORM.FAST)
    gC = _sum_channels(after, gy, FORM.NR, FORM.CR)
    gC = sum_over_lanes(gC, lane, ordered, FORM.REST, FORM.HALVED, FORM.NR, FORM.FAST)
    gBC = sum_over_lanes(gB + gC, lane, lane, 1, FORM.REST, 2 * FORM.OWN_STATES, FORM.FAST)
    _write_of_states(gBC, position, live, sequence, lanes, places, FORM, LAYOUT)

    ginput = _sum_states(g, of_states(b, FORM.NR, FORM.CR), FORM)  # of dt u
    ginput = sum_over_lanes(ginput, lane, ordered, FORM.STATES_STRIDE, FORM.NL, FORM.CR, FORM.FAST)
    g = multiply(g, decay, FORM.TILE)
    gexponent = multiply(g, before, FORM.TILE)  # of dt A
    gdecay = _sum_states(gexponent, parameters.A, FORM)
    gdecay = sum_over_lanes(gdecay, lane, ordered, FORM.STATES_STRIDE, FORM.NL, FORM.CR, FORM.FAST)
    gA = multiply_add(gexponent, of_channels(dt, FORM.NR, FORM.CR), sums.A, FORM.TILE)

    dt = _own(dt, ordered, FORM)
    u = _own(u, ordered, FORM)
    gy = _own(gy, ordered, FORM)
    gD = add(sums.D, multiply(gy, u, FORM.OWN_CHANNELS), FORM.OWN_CHANNELS)
    gus = ()
    gdts = ()
    for v in tl.static_range(FORM.OWN_CHANNELS):
        gdts = gdts + (_of_step_size(u[v] * ginput[v] + gdecay[v] * LN2, dt[v], live, FORM),)
        gus = gus + (dt[v] * ginput[v] + parameters.D[v] * gy[v],)
    gbias = add(sums.bias, gdts, FORM.OWN_CHANNELS)
    gfactor = ()
    gweight = sums.weight
    if FORM.FACTOR:
        gfactor = _sum_channels(gdts, parameters.weight, 1, FORM.OWN_CHANNELS)
        gweight = _outer(gweight, (factor,), gdts, 1, FORM.OWN_CHANNELS)
    _write_of_channels(gdts, gus, position, live, sequence, lanes, places, FORM, LAYOUT)
    return g, _Sums(gA, gD, gbias, gweight), gfactor


@triton.jit
def _put_factors(gfactors, row, lane, places, FORM: tl.constexpr, LAYOUT: tl.constexpr):
    """The gradients of the factors of a sub's steps, from all lanes' parts.

    Args:
        row: Of the sub's last step.
    """
    gfactor = sum_over_lanes(gfactors, lane, lane, 1, LANES, FORM.UNROLL, FORM.FAST)[0]
    # of eight lanes that have a step's, the first puts it in place, the others the zeros behind it
    row -= lane // (LANES // FORM.UNROLL) * LAYOUT.STEP
    column = lane % (LANES // FORM.UNROLL)
    value = tl.where(column == 0, gfactor, 0.0)
    put_element(places.room + (row + LAYOUT.AT_FACTOR), column, value, lane >= 0, FORM.FAST)


@triton.jit
def _walk_sub(
    sums, g, total, state, steps, sequence, parameters, lanes, places, FORM: tl.constexpr, LAYOUT: tl.constexpr
):
    """The second pass over a sub, from the states before it: passes the adjoint g over its steps, and writes gradients,
    or with LOCAL adds up step sizes. Returns sums, g and total as `_walk_chunk` does."""
    lane = lanes.lane
    factors = ()
    if FORM.FACTOR:
        for r in tl.static_range(FORM.UNROLL):
            factor, _ = take(places.room + (steps[r][0] + LAYOUT.AT_FACTOR), lane * 0, 2, FORM.FAST)
            factors = factors + (factor,)
    gfactors = ()
    steps_decays, before, state = _recompute_sub(state, steps, parameters.A, FORM)
    if FORM.STAGED:
        gy, c = _take_outputs(steps[0][0], places, lanes.turns, FORM, LAYOUT)
    for r in tl.static_range(FORM.UNROLL):  # against the walk's order
        if FORM.STAGED:
            # the next operands are under way while these are used; no lane writes results before all have taken theirs
            next_row = steps[r + 1 if r + 1 < FORM.UNROLL else r][0]
            next_gy, next_c = _take_outputs(next_row, places, lanes.turns, FORM, LAYOUT)
            if not FORM.LOCAL:
                wait(lane, False, FORM.FAST)
        else:
            _, _, _, _, gy, _, c = steps[r]
        g = _outer(g, c, gy, FORM.NR, FORM.CR)
        if FORM.LOCAL:
            g = multiply(g, steps_decays[r], FORM.TILE)
            total = add(total, steps[r][2], FORM.CR)
        else:
            g, sums, gfactor = _differentiate(
                g, state, before[r], steps_decays[r], steps[r], gy, factors[r] if FORM.FACTOR else (),
                parameters, sums, sequence, lanes, places, FORM, LAYOUT,
            )  # fmt: skip
            state = before[r]
            gfactors = gfactors + gfactor
        if FORM.STAGED:
            gy, c = next_gy, next_c
    if FORM.FACTOR and not FORM.LOCAL:
        _put_factors(gfactors, steps[0][0], lane, places, FORM, LAYOUT)
    return sums, g, total


@triton.jit
def _walk_chunk(
    sums, g, total, chunk, j, num_chunks, buffer, sequence, parameters, lanes, places,
    FORM: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Both passes over a chunk.

    Args:
        sums, g, total: The sums over the steps behind the chunk, the adjoint there, and with LOCAL the sum of those
            steps' sizes.
        j, num_chunks: How many chunks have been walked before this one, and how many there are to walk.
        buffer: With STAGED, where the chunk's rows begin in those of both chunks.

    Returns:
        sums, g and total from the chunk's start on.
    """
    lane, turns = lanes.lane, lanes.turns
    L = sequence.L
    first = chunk * FORM.CHUNK
    subs = tl.cdiv(tl.minimum(FORM.CHUNK, L - first), FORM.UNROLL)
    if FORM.STAGED:
        wait(lane, True, FORM.FAST)
        zero = unknown_zero(places.zero, FORM.FAST)
        if not FORM.LOCAL:
            h = _take_states(places.next, lane + zero, turns, FORM, LAYOUT)
            wait(lane, False, FORM.FAST)
        if j + 1 < num_chunks:
            # all subs of a whole chunk, but not as a constant: the loop would be unrolled, which is slower
            subs_before = tl.cdiv(tl.minimum(FORM.CHUNK, L - first + FORM.CHUNK), FORM.UNROLL)
            _copy_rows(
                LAYOUT.BUFFER - buffer, sequence.operands, first - FORM.CHUNK, subs_before, zero,
                sequence, lanes, places, False, FORM, LAYOUT,
            )  # fmt: skip
            if not FORM.LOCAL:
                _fetch_states(places.next, chunk - 1, zero, sequence, lanes, FORM, LAYOUT)

    state = ()
    if not FORM.LOCAL:
        if not FORM.STAGED:
            _, _, N_STATES, E, _ = sequence.inside
            not_first = chunk + tl.arange(0, 1) > 0  # the first chunk's states are zero and not stored
            start_at = sequence.starts + tl.cast(chunk - 1, tl.int64) * (N_STATES * E) + sequence.in_tile
            h = _load_tile(start_at, E, sequence.inside, turns, not_first, FORM)
        state = _recompute_chunk(h, buffer, first, subs, parameters.A, sequence, places, turns, FORM, LAYOUT)
        # not for the room: else ptxas makes two loops of the one before, more than its cache has room for
        wait(lane, False, FORM.FAST)

    last = first + subs * FORM.UNROLL - 1
    if not FORM.STAGED:
        start = tl.maximum(L - 1 - last, 0)
        walk = start_walk(start, sequence.order ^ 2, L, sequence.H, sequence.W, FORM.LARGE)
        steps, walk = _load_sub(last, walk, L, sequence.operands, True, FORM)
    for i in range(subs):
        if FORM.STAGED:
            current = _take_sub(buffer, first, (subs - i) * FORM.UNROLL, L, places, turns, FORM, LAYOUT)
        else:
            t = last - (i + 1) * FORM.UNROLL
            current = _in_float32(steps, sequence.operands, FORM)
            steps, walk = _load_sub(t, walk, L, sequence.operands, True, FORM)
        sums, g, total = _walk_sub(sums, g, total, state, current, sequence, parameters, lanes, places, FORM, LAYOUT)
        if not FORM.LOCAL:
            before_next = places.kept + tl.maximum(subs - 2 - i, 0) * LAYOUT.KEPT_STEP
            state = take_tile(before_next, FORM.TILE, FORM.STAGED, FORM.FAST)

    if FORM.STAGED:
        wait(lane, False, FORM.FAST)
        if not FORM.LOCAL:
            zero = unknown_zero(places.zero, FORM.FAST)
            _copy_rows(buffer, sequence.results, first, subs, zero, sequence, lanes, places, True, FORM, LAYOUT)
            wait(lane, False, FORM.FAST)
    return sums, g, total


@triton.jit
def _store_sums(at, sums, E, N_STATES, lanes, FORM: tl.constexpr):
    """As rows of E channels: N_STATES of A's gradient, then D's, the bias's, and with FACTOR the weight's."""
    everywhere = (lanes.n, lanes.e, N_STATES, E, lanes.lane >= 0)
    _store_tile(at + lanes.n * E + lanes.e, E, sums.A, everywhere, lanes.turns, FORM)
    for v in tl.static_range(FORM.OWN_CHANNELS):
        own_at = at + N_STATES * E + lanes.own_e + v
        mask = lanes.writes_e & (lanes.own_e + v < E)
        tl.store(own_at, sums.D[v], mask=mask)
        tl.store(own_at + E, sums.bias[v], mask=mask)
        if FORM.FACTOR:
            tl.store(own_at + 2 * E, sums.weight[v], mask=mask)


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
    STATES_STRIDE: tl.constexpr = CE * S
    HALVED: tl.constexpr = CE if CE < NR else NR
    FORM: tl.constexpr = _Form(
        CHUNK, UNROLL, SOFTPLUS, LOCAL, STAGED, FAST, FACTOR, LARGE, WIDE, NR, NL, S, CE, CR,
        TILE=NR * CR, STATES_STRIDE=STATES_STRIDE, HALVED=HALVED, REST=CE // HALVED, OWN_STATES=NR // HALVED,
        OWN_CHANNELS=CR // NL if CR > NL else 1,
    )  # fmt: skip
    PIECES_C: tl.constexpr = CE * CR // 8
    PIECES_S: tl.constexpr = NR * NL // 8
    ROW: tl.constexpr = 3 * PIECES_C + 2 * PIECES_S + FACTOR if STAGED else 0
    KEPT: tl.constexpr = NR * CR * LANES // (8 if STAGED else 4)  # in bfloat16 or float32
    TILES: tl.constexpr = CHUNK // UNROLL if STAGED else CHUNK // UNROLL - 1
    PIECE: tl.constexpr = 16 if FAST else 4
    LAYOUT: tl.constexpr = _Layout(
        PIECES_C, PIECES_S, ROW, SPREAD=2 if STAGED and 2 * ROW <= LANES else 1, KEPT=KEPT,
        SIZE=2 * CHUNK * ROW + TILES * KEPT, PIECE=PIECE,
        AT_U=PIECES_C * PIECE, AT_GY=2 * PIECES_C * PIECE, AT_B=3 * PIECES_C * PIECE,
        AT_C=(3 * PIECES_C + PIECES_S) * PIECE, AT_FACTOR=(3 * PIECES_C + 2 * PIECES_S) * PIECE,
        STEP=ROW * PIECE, BUFFER=CHUNK * ROW * PIECE, KEPT_STEP=KEPT * PIECE,
    )  # fmt: skip

    k = tl.program_id(1)
    order = (orders >> (2 * tl.minimum(k, MAX_ORDERS - 1))) & 3  # arithmetic, not a load: it stays uniform
    k = k.to(tl.int64)
    blocks = tl.cdiv(E, CE * CR)
    block = tl.program_id(0) % blocks
    group = (tl.program_id(0) // blocks).to(tl.int64)
    lanes = _spread(block, FORM)
    lane, s, n, e, turns = lanes.lane, lanes.s, lanes.n, lanes.e, lanes.turns

    # 64-bit bases for the program and 32-bit offsets of its lanes: 64-bit offsets would fill the registers
    OFFSET: tl.constexpr = tl.int64 if LARGE else tl.uint32
    sw = s.to(OFFSET)
    of_sequence = tl.cast(L, OFFSET) * K * E
    in_dt = sw * of_sequence + e.to(OFFSET)  # and in the gradients of u and delta: they lie as (batch, L, K, E)
    own_in_dt = sw * of_sequence + lanes.own_e.to(OFFSET)
    own_in_part = sw * (tl.cast(L, OFFSET) * K * part_row) + lanes.own_n.to(OFFSET)
    in_u = sw * u_b + e.to(OFFSET)
    in_gy = sw * gy_b + e.to(OFFSET)
    in_B = sw * B_b + n.to(OFFSET)
    in_C = sw * C_b + n.to(OFFSET)
    in_tile = sw * (tl.cast(K, OFFSET) * (chunks - 1) * N_STATES * E) + (n * E + e).to(OFFSET)
    parts = tl.cdiv(chunks, span)  # of a sequence
    in_end = sw * (tl.cast(K, OFFSET) * (parts - 1) * N_STATES * E) + (n * E + e).to(OFFSET)

    program = (tl.program_id(2) * K + k).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    SIZE: tl.constexpr = LAYOUT.SIZE
    room = shared_memory(lane, SIZE * 16 + LANES * 4) if FAST else room_ptr + program * (SIZE * PIECE) + lane * 0
    places = _find_places(room, lanes, FORM, LAYOUT)
    parameters = _load_parameters(A_ptr, D_ptr, weight_ptr, k, E, N_STATES, lanes, FORM)
    sums = _Sums(zeros(NR * CR), zeros(FORM.OWN_CHANNELS), zeros(FORM.OWN_CHANNELS), zeros(FORM.OWN_CHANNELS))
    for repeat in range(tl.minimum(repeats, (tl.cdiv(batch, S) - group * repeats).to(tl.int32))):
        seq = (group * repeats + repeat) * S
        s_in = seq + s < batch
        inside = (n, e, N_STATES, E, s_in)
        if not STAGED:
            channels = tl.where(s_in, E - e, 0)
            states = tl.where(s_in, N_STATES - n, 0)
            first_in_dt = (seq * L * K + k) * E
            operands = _Operands(
                (dt_ptr + first_in_dt, in_dt, K * E),
                (u_ptr + seq * u_b + k * u_k, in_u, u_l),
                (gy_ptr + seq * gy_b + k * gy_k, in_gy, gy_l),
                (B_ptr + seq * B_b + k * B_k, in_B, B_l),
                (C_ptr + seq * C_b + k * C_k, in_C, C_l),
                channels, states,
            )  # fmt: skip
        part = ((block.to(tl.int64) * batch + seq) * L * K + k) * part_row  # of B and C: one a block of channels
        starts = starts_ptr + (seq * K + k) * (chunks - 1) * (N_STATES * E)
        end_row = (seq * K + k) * (parts - 1) * (N_STATES * E)
        if STAGED:
            operands = _Rows(
                (dt_ptr, u_ptr, gy_ptr, B_ptr, C_ptr, factor_ptr),
                (of_sequence, u_b, gy_b, B_b, C_b, factor_b),
                (E, u_k, gy_k, B_k, C_k, factor_k),
                (K * E, u_l, gy_l, B_l, C_l, factor_l),
            )
            of_part = tl.cast(L, OFFSET) * K * part_row
            results = _Rows(
                (gdelta_ptr, gu_ptr, gu_ptr, gB_ptr, gC_ptr, gfactor_ptr),
                (of_sequence, of_sequence, of_sequence, of_part, of_part, of_part),
                (E, E, E, part_row, part_row, part_row),
                (K * E, K * E, K * E, K * part_row, K * part_row, K * part_row),
            )
        else:
            results = _Results(
                gu_ptr, gdelta_ptr, gB_ptr, gC_ptr, first_in_dt, own_in_dt, part, own_in_part, part_row, K
            )
        sequence = _Sequence(seq, k, block, batch, order, L, H, W, inside, starts, in_tile, operands, results)

        g = zeros(NR * CR)
        total = zeros(CR)
        part_of_sequence = tl.program_id(2) + (1 if LOCAL else 0)  # the first has none before it to tell
        last_chunk = tl.minimum((part_of_sequence + 1) * span, chunks) - 1
        num_chunks = last_chunk + 1 - part_of_sequence * span
        if not LOCAL:
            is_last = last_chunk + tl.arange(0, 1) == chunks - 1
            if SPLIT:
                g_at = ends_ptr + end_row + tl.cast(part_of_sequence, tl.int64) * (N_STATES * E) + in_end
                g = _load_tile(g_at, E, inside, turns, is_last == 0, FORM)
            if LAST:
                end_at = end_ptr + (seq * K + k) * (N_STATES * E) + s * (K * N_STATES * E) + (n * E + e)
                g = add(g, _load_tile(end_at, E, inside, turns, is_last, FORM), NR * CR)

        buffer = last_chunk * 0  # where the chunk's rows begin in those of both chunks
        if STAGED:
            first = last_chunk * CHUNK
            subs = tl.cdiv(tl.minimum(CHUNK, L - first), UNROLL)
            _copy_rows(buffer, operands, first, subs, lane * 0, sequence, lanes, places, False, FORM, LAYOUT)
            if not LOCAL:
                _fetch_states(places.next, last_chunk, lane * 0, sequence, lanes, FORM, LAYOUT)
        for j in range(num_chunks):
            sums, g, total = _walk_chunk(
                sums, g, total, last_chunk - j, j, num_chunks, buffer,
                sequence, parameters, lanes, places, FORM, LAYOUT,
            )  # fmt: skip
            if STAGED:
                buffer = LAYOUT.BUFFER - buffer

        if LOCAL:
            at_part = end_row + tl.cast(part_of_sequence - 1, tl.int64) * (N_STATES * E)
            _store_tile(ends_ptr + at_part + in_end, E, g, inside, turns, FORM)
            total_decays = decays(total, parameters.A, NR, CR, FAST)
            _store_tile(decay_ptr + at_part + in_end, E, total_decays, inside, turns, FORM)

    if not LOCAL:
        # sums over steps and repeats: a part for each group of sequences, sequence of a tile and part of a sequence;
        # those of sequences that do not exist are zero
        part_of_sums = ((tl.program_id(2) * (tl.num_programs(0) // blocks) + group) * S + s) * K + k
        _store_sums(gsums_ptr + part_of_sums * ((N_STATES + 2 + FACTOR) * E), sums, E, N_STATES, lanes, FORM)


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
