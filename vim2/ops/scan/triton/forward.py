# ruff: noqa: RUF005  (Triton knows no starred tuples)
"""The forward scan in Triton. `reference.py` says what it computes; tests/ops/scan/test_triton.py compares the two.

A program is one warp. It walks a tile of channels, with their states in registers (tiles.py), through the steps of one
direction.

Nothing is added with atomics: sums over programs are written apart and added by the caller, so that two runs give the
same bits.

Where there are too few channels and sequences to fill the GPU (a large image at batch 1), sequences are split: programs
first scan their chunks from a zero state, a short kernel turns these into the states at the chunks' starts, and the
chunks then run side by side. The backward pass does the same from the other end. Between few and many, warps take turns
with one sequence (forward_relay.py).
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_launch import INTERPRETED, MAX_LAUNCHES, Launch, Layout, layout
from ...triton_math import LANES
from ..chunks import TRITON_CHUNK, kept_dtype
from ..operands import Operands
from . import schedule
from .combine import combine
from .step_size import kernel_inputs, softplus
from .tiles import (
    add,
    decays,
    gather,
    load_channels,
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
from .walk import MAX_ORDERS, advance_walk, group_stride, pack_orders, start_walk


@triton.jit
def _load_group(
    t, walk, advance, L, at, existing,
    LOCAL: tl.constexpr, FACTOR: tl.constexpr, NR: tl.constexpr, CR: tl.constexpr, WIDE: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """The operands of a lane's step t: its position, dt, u, B, and unless LOCAL, C; and where the walk is a group of
    steps later. A step beyond the sequence's end has none: zeros move nothing. With FACTOR dt is a single number, of
    which `_step_sizes` makes those of the channels.

    `existing` are the numbers of channels and states that exist.
    """
    dt_at, u_at, B_at, C_at = at
    channels = tl.where(t < L, existing[0], 0)
    states = tl.where(t < L, existing[1], 0)
    p, _ = walk
    dt = load_row(dt_at, p, channels, 1 if FACTOR else CR, WIDE, FAST)
    u = load_row(u_at, p, channels, CR, WIDE, FAST)
    b = load_row(B_at, p, states, NR, WIDE, FAST)
    c = b if LOCAL else load_row(C_at, p, states, NR, WIDE, FAST)
    return (p, dt, u, b, c), advance_walk(walk, advance)


@triton.jit
def _step_sizes(factor, weight, bias, live, CR: tl.constexpr, SOFTPLUS: tl.constexpr, FAST: tl.constexpr):
    """The step sizes of a lane's channels, of the one number that they have in common: as `step_sizes` with rank 1, but
    never rounded to bfloat16. Zero for a step that is not there."""
    dt = ()
    for i in tl.static_range(CR):
        x = factor * weight[i] + bias[i]
        if SOFTPLUS:
            x = softplus(x, FAST)
        dt = dt + (tl.where(live, x, 0.0),)
    return dt


@triton.jit
def _of_lane(values, index, COUNT: tl.constexpr, NL: tl.constexpr):
    """As `gather`, among the lanes that share a group's steps: where it has one step, each lane has loaded its own."""
    if NL == 1:
        return values
    else:
        return gather(values, index, COUNT)


@triton.jit
def _walk_group(
    h, dt, u, b, c, A, lane,
    LOCAL: tl.constexpr, FAST: tl.constexpr, NR: tl.constexpr, NL: tl.constexpr, CR: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """The states after a group's steps, from those before it; and unless LOCAL the lane's part of each step's C h.

    Args:
        dt, u, b, c: Of the step that the lane has loaded.
        STRIDE: Between lanes of neighbouring groups of states.
    """
    dtu = multiply(dt, u, CR)
    ys = ()
    for r in tl.static_range(NL):
        dt_lane = lane % STRIDE + (lane % NL ^ r) * STRIDE
        bc_lane = lane // NL * NL + (lane // STRIDE ^ r)
        step_dt = _of_lane(dt, dt_lane, CR, NL)
        step_dtu = _of_lane(dtu, dt_lane, CR, NL)
        decay = decays(step_dt, A, NR, CR, FAST)
        inputs = multiply(of_states(_of_lane(b, bc_lane, NR, NL), NR, CR), of_channels(step_dtu, NR, CR), NR * CR)
        h = multiply_add(decay, h, inputs, NR * CR)
        if not LOCAL:
            weights = of_states(_of_lane(c, bc_lane, NR, NL), NR, CR)
            ys = ys + sum_states(multiply(h, weights, NR * CR), NR, CR)
    return h, ys


# Triton would compile the kernel again for numbers that are 1 or that 16 divides, which would be no faster.
@triton.jit(
    do_not_specialize=["orders", "batch", "repeats", "L", "H", "W", "E", "N_STATES", "K", "chunk", "chunks"]
    + [f"{name}_{axis}" for name in ("u", "dt", "B", "C") for axis in "blk"]
)
def _forward_kernel(
    u_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr,  # operands
    weight_ptr, bias_ptr,  # with FACTOR, of the step sizes, whose factor dt is then
    y_ptr, starts_ptr, decay_ptr, last_ptr,  # results
    orders,  # of all directions, two bits each
    batch, repeats,  # sequences of a direction, and tiles of them that a program takes
    L, H, W,  # steps of a sequence, and the map that it walks over
    E, N_STATES, K,  # channels, states of each, directions
    chunk, chunks,  # steps of a chunk, and chunks of a sequence
    u_b, u_l, u_k, dt_b, dt_l, dt_k, B_b, B_l, B_k, C_b, C_l, C_k,  # strides of batch, length and direction
    SPLIT: tl.constexpr, LOCAL: tl.constexpr,  # one chunk a program; from a zero state
    LAST: tl.constexpr,  # whether the last states are wanted
    FACTOR: tl.constexpr, SOFTPLUS: tl.constexpr,  # whether step sizes are made here, and are positive by softplus
    FEW: tl.constexpr,  # states: memory is what takes the time
    FAST: tl.constexpr, LARGE: tl.constexpr, WIDE: tl.constexpr,  # NVIDIA's instructions, 64-bit offsets, whole words
    NR: tl.constexpr, NL: tl.constexpr, S: tl.constexpr, CE: tl.constexpr, CR: tl.constexpr,  # the tile, see tiles.py
    GROUPS: tl.constexpr,  # of NL steps, whose loads are under way together
):  # fmt: skip
    """A program scans whole sequences and writes the states at the starts of all chunks but the first. With SPLIT it
    scans one chunk, from its start; with LOCAL too, from zero, and writes only the chunk's end state and decay.

    It takes GROUPS of NL steps at a time, with the next ones under way. Each lane loads the operands of one of a
    group's steps, and writes its y: shuffles tell the lanes that share channels or states.
    """
    TILE: tl.constexpr = NR * CR
    STATES_STRIDE: tl.constexpr = CE * S  # between lanes of neighbouring groups of states
    ROUGH: tl.constexpr = FAST and u_ptr.dtype.element_ty == tl.bfloat16  # the softplus, as in `step_sizes`
    if FEW:  # directions of a tile run side by side: they read the same of memory, or neighbours
        k = tl.program_id(0) % K
        program = tl.program_id(0) // K
    else:  # which is slower where arithmetic is what takes the time
        k = tl.program_id(0) // (tl.num_programs(0) // K)
        program = tl.program_id(0) % (tl.num_programs(0) // K)
    order = (orders >> (2 * tl.minimum(k, MAX_ORDERS - 1))) & 3  # arithmetic, not a load: it stays uniform
    k = k.to(tl.int64)
    blocks = tl.cdiv(E, CE * CR)
    group = (program // blocks).to(tl.int64)

    lane = tl.arange(0, LANES)
    s = (lane // CE) % S
    n = lane // STATES_STRIDE * NR
    # which of NL steps the lane loads: all of them among the lanes of a channel, and among NL lanes of a state
    ordered = lane ^ (lane % NL * STATES_STRIDE)
    place = ordered // STATES_STRIDE
    e = (program % blocks) * (CE * CR) + lane % CE * CR

    # 64-bit bases for the program and 32-bit offsets of its lanes: 64-bit offsets would fill the registers
    OFFSET: tl.constexpr = tl.int64 if LARGE else tl.uint32
    sw = s.to(OFFSET)
    sequence = tl.cast(L, OFFSET) * K * E
    in_y = sw * sequence + e.to(OFFSET)  # which lies as (batch, L, K, E)
    in_dt = sw * dt_b if FACTOR else sw * dt_b + e.to(OFFSET)
    in_u = sw * u_b + e.to(OFFSET)
    in_B = sw * B_b + n.to(OFFSET)
    in_C = sw * C_b + n.to(OFFSET)
    in_tile = sw * (tl.cast(K, OFFSET) * (chunks - 1) * N_STATES * E) + (n * E + e).to(OFFSET)

    everywhere = (n, e, N_STATES, E, lane >= 0)
    A, D = load_parameters(A_ptr + k * (N_STATES * E) + (n * E + e), D_ptr + k * E + e, E, everywhere, NR, CR)
    weight, bias = (), ()
    if FACTOR:
        weight = load_channels(weight_ptr + k * E + e, everywhere, CR)
        bias = load_channels(bias_ptr + k * E + e, everywhere, CR)

    for repeat in range(tl.minimum(repeats, (tl.cdiv(batch, S) - group * repeats).to(tl.int32))):
        seq = (group * repeats + repeat) * S
        s_in = seq + s < batch
        existing = (tl.where(s_in, E - e, 0), tl.where(s_in, N_STATES - n, 0))
        inside = (n, e, N_STATES, E, s_in)
        first_in_y = (seq * L * K + k) * E
        at = (
            (dt_ptr + seq * dt_b + k * dt_k, in_dt, dt_l),
            (u_ptr + seq * u_b + k * u_k, in_u, u_l),
            (B_ptr + seq * B_b + k * B_k, in_B, B_l),
            (C_ptr + seq * C_b + k * C_k, in_C, C_l),
        )
        y_at = (y_ptr + first_in_y, in_y, K * E)
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
        p, left, inner, stride, turn = start_walk(first + place, order, L, H, W, LARGE)
        walk = (p, left)
        advance = group_stride(NL, inner, stride, turn)
        ahead = ()
        for g in tl.static_range(GROUPS):
            step = first + g * NL + place
            loaded, walk = _load_group(step, walk, advance, L, at, existing, LOCAL, FACTOR, NR, CR, WIDE, FAST)
            ahead = ahead + (loaded,)
        for index in range(num_chunks):
            if not SPLIT and index > 0:
                store_tile(starts_at + in_tile, E, h, inside, NR, CR)
                starts_at += N_STATES * E
            first = (first_chunk + index) * chunk
            for t in range(first, tl.minimum(first + chunk, L), GROUPS * NL):
                # unpacked before the next loads, which then take the same registers: moved at the end of the loop, they
                # would be waited for there
                groups = ()
                for g in tl.static_range(GROUPS):
                    p, dt, u, b, c = ahead[g]
                    dt = unpack(dt, dt_ptr, 1 if FACTOR else CR, WIDE)
                    u = unpack(u, u_ptr, CR, WIDE)
                    groups = groups + ((p, dt, u, unpack(b, B_ptr, NR, WIDE), unpack(c, C_ptr, NR, WIDE)),)
                ahead = ()
                for g in tl.static_range(GROUPS):
                    step = t + (GROUPS + g) * NL + place
                    loaded, walk = _load_group(step, walk, advance, L, at, existing, LOCAL, FACTOR, NR, CR, WIDE, FAST)
                    ahead = ahead + (loaded,)
                for g in tl.static_range(GROUPS):
                    p, dt, u, b, c = groups[g]
                    live = tl.where(t + g * NL + place < L, existing[0], 0)
                    if FACTOR:
                        dt = _step_sizes(dt[0], weight, bias, live > 0, CR, SOFTPLUS, ROUGH)
                    h, ys = _walk_group(h, dt, u, b, c, A, lane, LOCAL, FAST, NR, NL, CR, STATES_STRIDE)
                    if LOCAL:
                        total = add(total, dt, CR)
                    else:
                        y = multiply_add(D, u, sum_over_lanes(ys, lane, ordered, STATES_STRIDE, NL, NL * CR), CR)
                        store_row(y_at, p, y, live, CR, WIDE, FAST)
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


def scan_forward(
    operands: Operands, *, delta_softplus: bool, orders: tuple[str, ...], height: int, width: int, chunk: int,
    with_last: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """As `reference.selective_scan_chunked`, but y is (batch, L, K, E) in u's dtype.

    Args:
        chunk: Steps between kept states: TRITON_CHUNK, or the whole length where no backward pass will follow.

    Returns:
        y; the last states, (batch, K, E, N), or None; the states before every `chunk` steps but the first, (batch, K,
        chunks - 1, N, E), see `kept_dtype`.

    Raises:
        ValueError: More than MAX_STATES states.
    """
    if operands.A.shape[-1] > schedule.MAX_STATES:
        raise ValueError(
            f"The Triton scan takes at most {schedule.MAX_STATES} states, got {operands.A.shape[-1]}: "
            "use the backend 'torch'."
        )
    # of one number, step sizes are made sooner than written and read
    factor = operands.is_rank_1 and operands.A.shape[-1] <= schedule.FEW_STATES
    u, dt, At, B, C, D = kernel_inputs(operands, delta_softplus, make_steps=not factor)
    weight, bias = (operands.delta_weight.contiguous(), operands.delta_bias.contiguous()) if factor else (None, None)
    directions, n, features = At.shape
    batch, length = dt.shape[:2]
    y = torch.empty(batch, length, directions, features, dtype=u.dtype, device=u.device)
    layouts = [layout(t) for t in (u, dt, B, C, y)]
    options = (factor, delta_softplus)
    chunks, scan_chunks, scan_all = _launches(u.device, *layouts, n, orders, height, width, chunk, with_last, *options)
    last = torch.empty(batch, directions, n, features, dtype=torch.float32, device=u.device) if with_last else None
    kept = kept_dtype(u.dtype)
    shape = batch, directions, chunks - 1, n, features
    starts = torch.empty(shape, dtype=torch.float32 if scan_chunks else kept, device=u.device)
    if scan_chunks:
        decay = torch.empty_like(starts)
        scan_chunks(u, dt, At, B, C, D, weight, bias, y, starts, decay, decay)
        combine(starts, decay, None)
    scan_all(u, dt, At, B, C, D, weight, bias, y, starts, starts, last if with_last else starts)
    split = scan_chunks is not None
    last = last.transpose(-1, -2).contiguous() if with_last else None
    return y, last, (starts if chunk == TRITON_CHUNK or not split else starts[:, :, :0]).to(kept)


@functools.lru_cache(MAX_LAUNCHES)
def _launches(
    device: torch.device, u: Layout, dt: Layout, B: Layout, C: Layout, y: Layout, n: int, orders: tuple[str, ...],
    height: int, width: int, chunk: int, with_last: bool, factor: bool, softplus: bool,
) -> tuple[int, Launch | None, Launch]:  # fmt: skip
    """Chunks of a sequence; where they are scanned side by side, the launch for each from a zero state; and the launch
    for the results."""
    batch, length, directions, features = y.shape
    fill = schedule.programs_to_fill(device)
    tile, split, steps = schedule.forward_plan(batch, length, directions, features, n, chunk, fill)
    chunks = -(-length // steps)
    blocks, tiles = schedule.channel_blocks(features, tile), -(-batch // tile["S"])
    repeats = 1 if split else schedule.tiles_a_program(tiles * blocks * directions, device)
    programs = blocks * -(-tiles // repeats)
    numbers = (
        pack_orders(orders),
        batch, repeats,
        length, height, width,
        features, n, directions,
        steps, chunks,
        *schedule.strides(u), *schedule.strides(dt), *schedule.strides(B), *schedule.strides(C),
    )  # fmt: skip
    fits_words = n % tile["NR"] == 0 and features % tile["CR"] == 0
    words = [u, y, *(() if factor else (dt,)), *((B, C) if tile["NR"] > 1 else ())]
    starts = schedule.states_layout(batch, directions, chunks - 1, n, features)
    options = dict(
        LAST=with_last,
        FACTOR=factor,
        SOFTPLUS=softplus and factor,  # else it has been done, and asks for no form of its own
        FEW=n <= schedule.FEW_STATES,
        FAST=not INTERPRETED,
        LARGE=schedule.is_large(tile["S"], u, dt, B, C, y, starts),
        WIDE=fits_words and all(map(schedule.in_words, words)),
        num_warps=1,
        maxnreg=schedule.forward_registers(tile, factor),
        **tile,
    )
    scan_chunks = None
    if split:
        grid = (programs * directions, 1, chunks - 1)
        scan_chunks = Launch(_forward_kernel, grid, numbers, SPLIT=True, LOCAL=True, **options)
    grid = (programs * directions, 1, chunks if split else 1)
    return chunks, scan_chunks, Launch(_forward_kernel, grid, numbers, SPLIT=split, LOCAL=False, **options)
