# ruff: noqa: RUF005  (Triton knows no starred tuples)
"""The selective scan in Triton. `reference.py` says what it computes; tests/ops/test_triton_scan.py compares the two.

A program is one warp. It walks a tile of channels, with their states in registers (triton_tiles.py), through the steps
of one direction.

Nothing is added with atomics: sums over programs are written apart and added by the caller, so that two runs give the
same bits.

Where there are too few channels and sequences to fill the GPU (a large image at batch 1), sequences are split: programs
first scan their chunks from a zero state, a short kernel turns these into the states at the chunks' starts, and the
chunks then run side by side. The backward pass does the same from the other end. Between few and many, warps take turns
with one sequence (triton_scan_ring.py).
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .selective_scan import TRITON_CHUNK as CHUNK
from .triton_math import INTERPRETED, launch
from .triton_scan_ring import ring_plan, scan_in_rings
from .triton_step_size import step_sizes
from .triton_tiles import (
    LANES,
    add,
    decays,
    gather,
    in_words,
    load_parameters,
    load_row,
    load_tile,
    multiply,
    multiply_add,
    of_channels,
    of_states,
    store_row,
    store_tile,
    sum_over_lanes,
    sum_states,
    unpack,
    zeros,
)
from .triton_walk import (
    MAX_ORDERS,
    advance_walk,
    group_stride,
    is_large,
    last_axis_contiguous,
    pack_orders,
    start_walk,
    strides,
)

MAX_CHUNKS = 65535  # that run side by side: the limit of a grid's third axis
MAX_STATES = 128  # that the lanes of a warp can hold in the backward pass


@triton.jit
def _load_group(
    t, walk, advance, L, at, rows, LOCAL: tl.constexpr, NR: tl.constexpr, CR: tl.constexpr, WIDE: tl.constexpr
):
    """The operands of a lane's step t: its position, dt, u, B, and unless LOCAL, C; and where the walk is a group of
    steps later. A step beyond the sequence's end has none: zeros move nothing."""
    dt_at, u_at, B_at, C_at = at
    channels = tl.where(t < L, rows[0], 0)
    states = tl.where(t < L, rows[1], 0)
    p, _ = walk
    dt = load_row(dt_at, p, channels, CR, WIDE)
    u = load_row(u_at, p, channels, CR, WIDE)
    b = load_row(B_at, p, states, NR, WIDE)
    c = b if LOCAL else load_row(C_at, p, states, NR, WIDE)
    return (p, dt, u, b, c), advance_walk(walk, advance)


# forms of its own for numbers that are 1 or that 16 divides would be no faster
@triton.jit(
    do_not_specialize=["orders", "batch", "repeats", "L", "H", "W", "E", "N_STATES", "K", "chunk", "chunks"]
    + [f"{name}_{axis}" for name in "uBC" for axis in "blk"]
)
def _forward_kernel(
    u_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, y_ptr, starts_ptr, decay_ptr, last_ptr,
    orders, batch, repeats, L, H, W, E, N_STATES, K, chunk, chunks,
    u_b, u_l, u_k, B_b, B_l, B_k, C_b, C_l, C_k,
    SPLIT: tl.constexpr, LOCAL: tl.constexpr, LAST: tl.constexpr,
    FAST: tl.constexpr, LARGE: tl.constexpr, WIDE: tl.constexpr,
    NR: tl.constexpr, NL: tl.constexpr, S: tl.constexpr, CE: tl.constexpr, CR: tl.constexpr,
):  # fmt: skip
    """A program scans whole sequences and writes the states at the starts of all chunks but the first. With SPLIT it
    scans one chunk, from its start; with LOCAL too, from zero, and writes only the chunk's end state and decay.

    It takes a group of NL steps at a time, with the next one under way. Each lane loads the operands
    of one of the steps, and writes its y: shuffles tell the lanes that share channels or states."""
    TILE: tl.constexpr = NR * CR
    STATES_STRIDE: tl.constexpr = CE * S  # between lanes of neighbouring groups of states
    k = tl.program_id(1)
    order = (orders >> (2 * tl.minimum(k, MAX_ORDERS - 1))) & 3  # arithmetic, not a load: it stays uniform
    k = k.to(tl.int64)
    blocks = tl.cdiv(E, CE * CR)
    group = (tl.program_id(0) // blocks).to(tl.int64)

    lane = tl.arange(0, LANES)
    s = (lane // CE) % S
    n = lane // STATES_STRIDE * NR
    # which of NL steps the lane loads: all of them among the lanes of a channel, and among NL lanes of a state
    ordered = lane ^ (lane % NL * STATES_STRIDE)
    place = ordered // STATES_STRIDE
    e = (tl.program_id(0) % blocks) * (CE * CR) + lane % CE * CR

    # 64-bit bases for the program and 32-bit offsets of its lanes: 64-bit offsets would fill the registers
    OFFSET: tl.constexpr = tl.int64 if LARGE else tl.uint32
    sw = s.to(OFFSET)
    sequence = tl.cast(L, OFFSET) * K * E
    in_lanes = sw * sequence + e.to(OFFSET)
    in_u = sw * u_b + e.to(OFFSET)
    in_B = sw * B_b + n.to(OFFSET)
    in_C = sw * C_b + n.to(OFFSET)
    in_tile = sw * (tl.cast(K, OFFSET) * (chunks - 1) * N_STATES * E) + (n * E + e).to(OFFSET)

    everywhere = (n, e, N_STATES, E, lane >= 0)
    A, D = load_parameters(A_ptr + k * (N_STATES * E) + (n * E + e), D_ptr + k * E + e, E, everywhere, NR, CR)

    for repeat in range(tl.minimum(repeats, (tl.cdiv(batch, S) - group * repeats).to(tl.int32))):
        seq = (group * repeats + repeat) * S
        s_in = seq + s < batch
        rows = (tl.where(s_in, E - e, 0), tl.where(s_in, N_STATES - n, 0))  # how many channels, states exist
        inside = (n, e, N_STATES, E, s_in)
        lanes = (seq * L * K + k) * E  # of dt and y, which lie as (batch, L, K, E)
        at = (
            (dt_ptr + lanes, in_lanes, K * E),
            (u_ptr + seq * u_b + k * u_k, in_u, u_l),
            (B_ptr + seq * B_b + k * B_k, in_B, B_l),
            (C_ptr + seq * C_b + k * C_k, in_C, C_l),
        )
        y_at = (y_ptr + lanes, in_lanes, K * E)
        starts_at = starts_ptr + (seq * K + k) * (chunks - 1) * (N_STATES * E)

        first_chunk = 0
        num_chunks = chunks
        h = zeros(TILE)
        total = zeros(CR)
        if SPLIT:
            first_chunk = tl.program_id(2)
            num_chunks = 1
            if not LOCAL:
                # the first chunk's states are zero and not stored
                not_first = first_chunk + tl.arange(0, 1) > 0
                start_at = starts_at + tl.cast(first_chunk - 1, tl.int64) * (N_STATES * E) + in_tile
                h = load_tile(start_at, E, inside, not_first, NR, CR)

        first = first_chunk * chunk
        p, left, inner, step, turn = start_walk(first + place, order, L, H, W, LARGE)
        walk = (p, left)
        advance = group_stride(NL, inner, step, turn)
        group_ahead, walk = _load_group(first + place, walk, advance, L, at, rows, LOCAL, NR, CR, WIDE)
        for index in range(num_chunks):
            if not SPLIT and index > 0:
                store_tile(starts_at + in_tile, E, h, inside, NR, CR)
                starts_at += N_STATES * E
            first = (first_chunk + index) * chunk
            for t in range(first, tl.minimum(first + chunk, L), NL):
                # unpacked before the next loads, which then take the same registers: moved at the end of the loop, they
                # would be waited for there
                p, dt, u, b, c = group_ahead
                dt = unpack(dt, dt_ptr, CR, WIDE)
                u = unpack(u, u_ptr, CR, WIDE)
                b = unpack(b, B_ptr, NR, WIDE)
                c = unpack(c, C_ptr, NR, WIDE)
                group_ahead, walk = _load_group(t + NL + place, walk, advance, L, at, rows, LOCAL, NR, CR, WIDE)
                dtu = multiply(dt, u, CR)
                ys = ()
                for r in tl.static_range(NL):
                    dt_lane = lane % STATES_STRIDE + (lane % NL ^ r) * STATES_STRIDE
                    bc_lane = lane // NL * NL + (lane // STATES_STRIDE ^ r)
                    decay = decays(gather(dt, dt_lane, CR), A, NR, CR, FAST)
                    inputs = multiply(
                        of_states(gather(b, bc_lane, NR), NR, CR),
                        of_channels(gather(dtu, dt_lane, CR), NR, CR),
                        TILE,
                    )
                    h = multiply_add(decay, h, inputs, TILE)
                    if not LOCAL:
                        weights = of_states(gather(c, bc_lane, NR), NR, CR)
                        ys = ys + sum_states(multiply(h, weights, TILE), NR, CR)
                if LOCAL:
                    total = add(total, dt, CR)
                else:
                    y = multiply_add(D, u, sum_over_lanes(ys, lane, ordered, STATES_STRIDE, NL, NL * CR), CR)
                    store_row(y_at, p, y, tl.where(t + place < L, rows[0], 0), CR, WIDE, FAST)
        if LOCAL:
            at_chunk = tl.cast(first_chunk, tl.int64) * (N_STATES * E) + in_tile
            decay_at = decay_ptr + (seq * K + k) * (chunks - 1) * (N_STATES * E)
            sums = ()
            for i in tl.static_range(CR):
                sums = sums + sum_over_lanes((total[i],), lane, ordered, STATES_STRIDE, NL, 1)
            store_tile(starts_at + at_chunk, E, h, inside, NR, CR)
            store_tile(decay_at + at_chunk, E, decays(sums, A, NR, CR, FAST), inside, NR, CR)
        elif LAST and first_chunk + num_chunks == chunks:
            last_at = last_ptr + (seq * K + k) * (N_STATES * E) + sw * (K * N_STATES * E) + (n * E + e)
            store_tile(last_at, E, h, inside, NR, CR)


@triton.jit
def _combine_kernel(
    state_ptr, decay_ptr, end_ptr, count, size,
    REVERSE: tl.constexpr, END: tl.constexpr, AHEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """In place, from chunks' own end states and decays (lane, count, size) to the true states at their ends.

    With REVERSE, of adjoints and from the other end, starting from end (lane, size) if END.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.program_id(1).to(tl.int64)
    h = tl.zeros([BLOCK], dtype=tl.float32)
    if END:
        h = tl.load(end_ptr + lane * size + i, mask=i < size, other=0.0)
    for first in range(0, count, AHEAD):
        # loads that wait for nothing come before the sums that wait for each other
        ahead = ()
        for r in tl.static_range(AHEAD):
            j = first + r
            at = (lane * count + (count - 1 - j if REVERSE else j)) * size + i
            mask = (i < size) & (j + tl.arange(0, 1) < count)  # a block of one: the interpreter takes no scalar masks
            local = tl.load(state_ptr + at, mask=mask, other=0.0)
            ahead = ahead + ((at, mask, local, tl.load(decay_ptr + at, mask=mask, other=0.0)),)
        for r in tl.static_range(AHEAD):
            at, mask, local, decay = ahead[r]
            h = decay * h + local
            tl.store(state_ptr + at, h, mask=mask)


def _tile_shape(n: int, features: int, channels: int) -> dict[str, int]:
    """Registers and lanes of a tile with that many channels a thread, see triton_tiles.py."""
    states = triton.next_power_of_2(n)
    NL = min(states, 4)
    CE = min(LANES.value // NL, max(NL, triton.next_power_of_2(-(-features // channels))))
    return dict(NR=states // NL, NL=NL, S=LANES.value // (NL * CE), CE=CE, CR=channels)


@functools.lru_cache(None)
def programs_to_fill(device: torch.device) -> int:
    """Programs (of one warp) below which sequences are split: eight a multiprocessor."""
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def tiles_a_program(programs: int, device: torch.device) -> int:
    """How many tiles of sequences one program takes, one after the other, so that it loads its parameters rarely and
    its sums over sequences are long and few: sixteen rounds of programs fill a GPU evenly enough."""
    return max(programs // (16 * max(programs_to_fill(device), 1)), 1)


@functools.lru_cache(None)
def _forward_plan(
    batch: int, length: int, lanes: int, features: int, n: int, chunk: int, fill: int
) -> tuple[dict[str, int], bool, int]:
    """The tile, whether sequences are split, and the steps of a chunk."""
    most = min(4, triton.next_power_of_2(features), max(64 // triton.next_power_of_2(n), 1))
    tiles = [_tile_shape(n, features, channels) for channels in (4, 2, 1) if channels <= most]
    # many channels a thread take fewer instructions each, few leave more programs
    programs = [_blocks(features, tile) * -(-batch // tile["S"]) * lanes for tile in tiles]
    for tile, count in zip(tiles[:2], programs):
        if count >= fill:
            return tile, False, chunk
    steps = -(-length * programs[0] // (8 * max(fill, 1)) // CHUNK) * CHUNK if chunk == length else CHUNK
    if length <= CHUNK or length > steps * MAX_CHUNKS:
        return tiles[-1], False, chunk
    return tiles[0], True, steps


def forward_registers(tile: dict[str, int]) -> int | None:
    """So that sixteen warps with large tiles fit on a multiprocessor, or twenty-four with small ones. Where there are
    few warps, and so fewer than four channels a thread, room for more of a group's steps at once is worth more."""
    if INTERPRETED:
        return None
    if tile["NR"] * tile["CR"] > 8:
        return 128
    return 80 if tile["CR"] == 4 else 100


def _blocks(features: int, tile: dict[str, int]) -> int:
    return -(-features // (tile["CE"] * tile["CR"]))


def selective_scan_triton(
    u, delta, A, B, C, D, delta_bias, delta_weight, delta_softplus, orders, height, width, chunk, with_last
):
    """As `reference.selective_scan_chunked`, but y is (batch, L, K, E) in u's dtype.

    Args:
        delta_weight: (K, E, R) where delta is (batch, L, K, R), else empty.
        chunk: Steps between kept states: CHUNK, or the whole length where no backward pass will follow.

    Raises:
        ValueError: More than MAX_STATES states.
    """
    if A.shape[-1] > MAX_STATES:
        raise ValueError(
            f"The Triton scan takes at most {MAX_STATES} states, got {A.shape[-1]}: use the backend 'torch'."
        )
    u, B, C = last_axis_contiguous(u, B, C)
    At, D, delta_bias = (t.contiguous() for t in (A.transpose(1, 2), D, delta_bias))
    batch, length, lanes = delta.shape[:3]
    features, n = A.shape[1:]
    fill = programs_to_fill(u.device)
    dt = step_sizes(delta, delta_weight, delta_bias, delta_softplus, u.dtype)
    plan = ring_plan(batch, length, lanes, features, n, fill)
    if plan and B.dtype == C.dtype:
        y, last, starts = scan_in_rings(u, dt, At, B, C, D, orders, height, width, chunk, plan)
        return y, last.transpose(-1, -2).contiguous() if with_last else last.new_empty(0), starts
    tile, split, steps = _forward_plan(batch, length, lanes, features, n, chunk, fill)
    chunks = -(-length // steps)
    blocks, tiles = _blocks(features, tile), -(-batch // tile["S"])
    repeats = 1 if split else tiles_a_program(tiles * blocks * lanes, u.device)
    programs = blocks * -(-tiles // repeats)
    y = torch.empty(batch, length, lanes, features, dtype=u.dtype, device=u.device)
    last = torch.empty((batch, lanes, n, features) if with_last else (0,), dtype=torch.float32, device=u.device)
    starts = torch.empty(batch, lanes, chunks - 1, n, features, dtype=torch.float32, device=u.device)
    decay = torch.empty_like(starts) if split else starts
    arguments = (
        u, dt, At, B, C, D, y, starts, decay, last,
        pack_orders(orders), batch, repeats, length, height, width, features, n, lanes, steps, chunks,
        *strides(u, u.dim() == 4), *strides(B, True), *strides(C, True),
    )  # fmt: skip
    options = dict(
        LAST=with_last, FAST=not INTERPRETED, LARGE=is_large(tile["S"], u, B, C, y, starts),
        WIDE=n % tile["NR"] == 0 and features % tile["CR"] == 0 and all(map(in_words, (u, dt, B, C, y))),
        num_warps=1, maxnreg=forward_registers(tile), **tile,
    )  # fmt: skip
    if split:
        launch(_forward_kernel, (programs, lanes, chunks - 1), arguments, SPLIT=True, LOCAL=True, **options)
        combine(starts, decay, None)
    launch(_forward_kernel, (programs, lanes, chunks if split else 1), arguments, SPLIT=split, LOCAL=False, **options)
    last = last.transpose(-1, -2).contiguous() if with_last else last
    return y, last, starts if chunk == CHUNK or not split else starts[:, :, :0]


def combine(states: Tensor, decay: Tensor, end: Tensor | None) -> None:
    """In place: (batch, K, chunks - 1, N, E) from chunks' own end states to the true states at their ends; given
    `end`, from chunks' own adjoints to the true ones, after `end` (batch, K, N, E) if that is not empty."""
    batch, lanes, count, n, features = states.shape
    size = n * features
    arguments = (states, decay, states if end is None else end, count, size)
    options = dict(REVERSE=end is not None, END=end is not None and end.numel() > 0, AHEAD=8, BLOCK=128, num_warps=1)
    launch(_combine_kernel, (-(-size // 128), batch * lanes), arguments, **options)
