# ruff: noqa: RUF005  (Triton knows no starred tuples)
"""The forward scan where sequences are long and few, yet enough for every multiprocessor: four warps take turns.

Each of a program's four warps prepares segments of one sequence by itself: their decays, which are most of the work.
Then it waits for the state that the warp before it leaves at the segment's start, walks, hands the state on, and only
after that computes y. So four warps work on one sequence and nothing is computed twice, as it is where chunks are first
scanned from a zero state (forward.py).

A program scans a slice of a sequence, and the next slice's program finds the state in global memory. Programs draw
tickets in the order of slices, so that none waits for one that has not begun; with many slices all multiprocessors are
done at about the same time, also where some have a sequence more than others.

A tile is 16 channels of a sequence with their states, in every lane four states of each of two channels. A lane loads
what is needed of one step; the others read it from shared memory, in fewer instructions than shuffles would take. For
shared memory and barriers between two warps Triton has no words, so they are written in PTX. The interpreter, which
runs none, gathers from lanes and takes one warp after the other.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_launch import INTERPRETED, MAX_LAUNCHES, Launch, Layout, layout
from ..chunks import kept_dtype
from ..operands import Operands
from . import schedule
from .step_size import kernel_inputs
from .tiles import (
    decays,
    exchange,
    gather,
    load_parameters,
    load_row,
    load_tile,
    multiply,
    multiply_add,
    of_channels,
    of_states,
    store_row,
    store_tile,
    sum_states,
    unpack,
)
from .walk import MAX_ORDERS, advance_walk, group_stride, pack_orders, start_walk

WARPS = tl.constexpr(4)
NL = tl.constexpr(4)  # groups of states, each in a lane of its own; so many steps are loaded at once
NR = tl.constexpr(4)  # states of a group
CE = tl.constexpr(8)  # groups of channels
CR = tl.constexpr(2)  # channels of a group
TILE = tl.constexpr(NR.value * CR.value)  # a lane's states
CHANNELS = CE.value * CR.value  # of a tile
SLICE_OVERHEAD = 48  # what beginning a slice costs, in steps
MIN_LENGTH = 512  # of sequences that are worth it

# Shared memory, in bytes: every warp's state that it hands on; then every warp's operands of a group of NL steps, four
# floats a time: of each step dt and dt u of the CE pairs of channels, then of each B of the NL groups of states, then C
ROW = tl.constexpr(16)
STATE = tl.constexpr(32 * TILE.value * 4)
B_OPERANDS = tl.constexpr(NL.value * CE.value * ROW.value)
C_OPERANDS = tl.constexpr(B_OPERANDS.value + NL.value * NL.value * ROW.value)
OPERANDS = tl.constexpr(C_OPERANDS.value + NL.value * NL.value * ROW.value)
MAX_GROUPS = tl.constexpr(2)  # of steps in a segment
SHARED = WARPS.value * (STATE.value + MAX_GROUPS.value * OPERANDS.value)
ALLOCATE = tl.constexpr(f"{{ .shared .align 16 .b8 relay[{SHARED}]; mov.u32 $0, relay; }}")


@triton.jit
def _shared_memory(thread):
    """The address of SHARED bytes."""
    return tl.inline_asm_elementwise(ALLOCATE, "=r,r", [thread], dtype=tl.uint32, is_pure=False, pack=1)


@triton.jit
def _sync_warp(thread):
    """Wait until all lanes of the warp have come here and see one another's writes."""
    tl.inline_asm_elementwise(
        "{ bar.warp.sync -1; mov.u32 $0, 0; }", "=r,r", [thread], dtype=tl.uint32, is_pure=False, pack=1
    )


@triton.jit
def _stage(at, row):
    """Put four floats where other lanes will fetch them."""
    tl.inline_asm_elementwise(
        "{ st.shared.v4.f32 [$1], {$2, $3, $4, $5}; mov.u32 $0, 0; }",
        "=r,r,f,f,f,f", [at, row[0], row[1], row[2], row[3]], dtype=tl.uint32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _fetch(at, row, owner, FAST: tl.constexpr):
    """The four floats that were staged there: another lane's row."""
    if FAST:  # volatile: not before a barrier that stands before it
        return tl.inline_asm_elementwise(
            "ld.volatile.shared.v4.f32 {$0, $1, $2, $3}, [$4];",
            "=f,=f,=f,=f,r", [at], dtype=(tl.float32,) * 4, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return gather(row, owner, 4)


@triton.jit
def _receive(at, barrier, active):
    """The state that another warp has handed on. Active warps wait for it; what the others get is of no use."""
    return tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.ne.u32 p, $10, 0;
        @p bar.sync $9, 64;
        ld.shared.v4.f32 {$0, $1, $2, $3}, [$8];
        ld.shared.v4.f32 {$4, $5, $6, $7}, [$8+512];
        }""",
        "=f,=f,=f,=f,=f,=f,=f,=f,r,r,r", [at, barrier, active], dtype=(tl.float32,) * 8, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _hand_on(at, barrier, active, h):
    """Active warps leave a state for the next warp, and go on."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.ne.u32 p, $3, 0;
        @p st.shared.v4.f32 [$1], {$4, $5, $6, $7};
        @p st.shared.v4.f32 [$1+512], {$8, $9, $10, $11};
        @p bar.arrive $2, 64;
        mov.u32 $0, 0;
        }""",
        "=r,r,r,r,f,f,f,f,f,f,f,f", [at, barrier, active, h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7]],
        dtype=tl.uint32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _owner(thread, step, ce):
    """The thread of the same warp that has pair of channels `ce` and loads step `step` of a group.

    Lanes spread over groups of states in bits 0 and 4, and over pairs of channels in bits 1 to 3: shared memory
    serves half of a warp at once if each lane wants what its neighbour in bit 0 or 1 does. The lane of group i of the
    states is also the one that loads the operands of step i of a group, and writes its y."""
    return thread // 32 * 32 + (step % 2 + ce * 2 + step // 2 * 16)


@triton.jit
def _load_segment(
    t, walks, advance, place, L, at, existing, GROUPS: tl.constexpr, WIDE: tl.constexpr, FAST: tl.constexpr
):
    """The operands of a lane's steps from t on, one a group: position, dt, u, and B or C; and the walks a round later.
    A step beyond the sequence's end has none: zeros move nothing.

    `existing` are the numbers of channels and states that exist.
    """
    dt_at, u_at, BC_at = at
    segment = ()
    later = ()
    for g in tl.static_range(GROUPS):
        inside = t + g * NL + place < L
        channels = tl.where(inside, existing[0], 0)
        states = tl.where(inside, existing[1], 0)
        p, _ = walks[g]
        dt = load_row(dt_at, p, channels, CR, WIDE, FAST)
        u = load_row(u_at, p, channels, CR, WIDE, FAST)
        segment = segment + ((p, dt, u, load_row(BC_at, p, states, NR, WIDE, FAST)),)
        later = later + (advance_walk(walks[g], advance),)
    return segment, later


@triton.jit
def _prepare(
    segment, pointers, A, thread, ce, stage, GROUPS: tl.constexpr, FAST: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """What of a segment needs no state: decays and dt u of every step; and of the lane's own steps, one a group, the
    position, u, and what it loaded of B or C."""
    dt_ptr, u_ptr, B_ptr = pointers
    put_steps, put_states, get_even, get_odd = stage
    own = ()
    staged = ()
    if FAST:
        _sync_warp(thread)
    for g in tl.static_range(GROUPS):
        p, dt, u, bc = segment[g]
        dt = unpack(dt, dt_ptr, CR, WIDE)
        u = unpack(u, u_ptr, CR, WIDE)
        bc = unpack(bc, B_ptr, NR, WIDE)
        row = dt + multiply(dt, u, CR)
        if FAST:
            _stage(put_steps + g * OPERANDS, row)
            _stage(put_states + g * OPERANDS, bc)
        own = own + ((p, u, bc),)
        staged = staged + (row,)
    if FAST:
        _sync_warp(thread)
    steps = ()
    for g in tl.static_range(GROUPS):
        for r in tl.static_range(NL):
            at = (get_odd if r % 2 else get_even) + (g * OPERANDS + r * (CE * ROW))
            dt0, dt1, dtu0, dtu1 = _fetch(at, staged[g], _owner(thread, r, ce), FAST)
            steps = steps + ((decays((dt0, dt1), A, NR, CR, FAST), (dtu0, dtu1)),)
    return own, steps


@triton.jit
def _walk(h, own, steps, thread, place, get_states, GROUPS: tl.constexpr, FAST: tl.constexpr):
    """The states after each of a segment's steps, from the one before it."""
    states = ()
    for g in tl.static_range(GROUPS):
        for r in tl.static_range(NL):
            decay, dtu = steps[g * NL + r]
            owner = _owner(thread, r, place)
            b = _fetch(get_states + (g * OPERANDS + r * (NL * ROW)), own[g][2], owner, FAST)
            h = multiply_add(decay, h, multiply(of_states(b, NR, CR), of_channels(dtu, NR, CR), TILE), TILE)
            states = states + (h,)
    return states


@triton.jit
def _select(mask, chosen, other, COUNT: tl.constexpr):
    """COUNT tiles, each with the elements of `chosen` where the mask is set, and of `other` elsewhere."""
    tiles = ()
    for i in tl.static_range(COUNT):
        tile = ()
        for j in tl.static_range(TILE):
            tile = tile + (tl.where(mask, chosen[i][j], other[i][j]),)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def _walk_in_turns(h, own, steps, thread, place, get_states, GROUPS: tl.constexpr, FAST: tl.constexpr):
    """In Triton's interpreter, one warp after the other: the states at a segment's start, and after each of its steps,
    from those that the last warp has at the end of the segment before."""
    warp = thread // 32
    thread_before = (warp + (WARPS - 1)) % WARPS * 32 + thread % 32
    start = gather(h, thread_before, TILE)
    states = _walk(start, own, steps, thread, place, get_states, GROUPS, FAST)
    for w in tl.static_range(1, WARPS):
        handed = gather(states[GROUPS * NL - 1], thread_before, TILE)
        start = _select(warp == w, (handed,), (start,), 1)[0]
        walked = _walk(start, own, steps, thread, place, get_states, GROUPS, FAST)
        states = _select(warp == w, walked, states, GROUPS * NL)
    return start, states


@triton.jit
def _outputs(states, bc, thread, place, get_states, g: tl.constexpr, FAST: tl.constexpr):
    """C h of the lane's own step of group g, from a segment's states.

    Args:
        bc: What the lane has loaded of B or C for the group.
    """
    ys = ()
    for r in tl.static_range(NL):
        owner = _owner(thread, r, NL + place)
        at_C = get_states + (g * OPERANDS + (C_OPERANDS - B_OPERANDS) + r * (NL * ROW))
        c = _fetch(at_C, bc, owner, FAST)
        ys = ys + sum_states(multiply(states[g * NL + r], of_states(c, NR, CR), TILE), NR, CR)
    ys = exchange(ys, thread, place >= 2, 16, NL * CR // 2, FAST)
    return exchange(ys, thread, place % 2 == 1, 1, NL * CR // 4, FAST)


# Triton would compile the kernel again for numbers that are 1 or that 16 divides, which would be no faster.
@triton.jit(
    do_not_specialize=["orders", "L", "H", "W", "E", "N_STATES", "K", "tiles", "slice_steps"]
    + [f"{name}_{axis}" for name in "uBC" for axis in "blk"]
)
def _relay_kernel(
    u_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr,  # operands
    y_ptr, starts_ptr, state_ptr,  # results, the last of them the states at the ends of slices
    done_ptr,  # how many slices of every tile are done; behind them, the next ticket
    orders,  # of all directions, two bits each
    L, H, W,  # steps of a sequence, and the map that it walks over
    E, N_STATES, K,  # channels, states of each, directions
    tiles, slice_steps,  # of all sequences; steps of a slice
    u_b, u_l, u_k, B_b, B_l, B_k, C_b, C_l, C_k,  # strides of batch, length and direction
    GROUPS: tl.constexpr, CHUNK: tl.constexpr,  # groups of steps in a segment, steps between kept states
    FAST: tl.constexpr, LARGE: tl.constexpr, WIDE: tl.constexpr,  # NVIDIA's instructions, 64-bit offsets, whole words
):  # fmt: skip
    """A program scans a slice of one sequence's tile, leaves the state at its end and says that it is done. It
    writes the states before every CHUNK steps but the first, unless CHUNK is 0."""
    SEGMENT: tl.constexpr = GROUPS * NL
    ROUND: tl.constexpr = WARPS * SEGMENT
    tl.static_assert(GROUPS <= MAX_GROUPS)
    ticket = tl.atomic_add(done_ptr + tiles, 1, sem="relaxed")
    tile = ticket % tiles
    slice_index = ticket // tiles
    blocks = tl.cdiv(E, CE * CR)
    k = (tile // blocks) % K
    order = (orders >> (2 * tl.minimum(k, MAX_ORDERS - 1))) & 3
    k = k.to(tl.int64)
    seq = (tile // blocks // K).to(tl.int64)

    # Triton lays a vector of as many elements as threads out in their order: element i is thread i's, as PTX needs it
    thread = tl.arange(0, WARPS * 32)
    warp = thread // 32
    ce = thread // 2 % CE
    place = thread % 2 + thread // 16 % 2 * 2  # among the lanes of a pair of channels, see `_owner`
    n = place * NR
    e = (tile % blocks) * (CE * CR) + ce * CR
    loads_C = ce >= NL  # half of the lanes are enough for B
    n_loaded = ce % NL * NR

    OFFSET: tl.constexpr = tl.int64 if LARGE else tl.uint32
    in_tile = n * E + e
    inside = (n, e, N_STATES, E, thread >= 0)
    A, D = load_parameters(A_ptr + k * (N_STATES * E) + in_tile, D_ptr + k * E + e, E, inside, NR, CR)
    existing = (E - e, N_STATES - n_loaded)
    first_in_y = (seq * L * K + k) * E  # and in dt: they lie as (batch, L, K, E)
    B_row = B_ptr + seq * B_b + k * B_k
    C_row = C_ptr + seq * C_b + k * C_k
    at = (
        (dt_ptr + first_in_y, e.to(OFFSET), K * E),
        (u_ptr + seq * u_b + k * u_k, e.to(OFFSET), u_l),
        (tl.where(loads_C, C_row, B_row), n_loaded.to(OFFSET), tl.where(loads_C, C_l, B_l)),
    )
    y_at = (y_ptr + first_in_y, e.to(OFFSET), K * E)
    state_at = state_ptr + (seq * K + k) * (N_STATES * E) + in_tile
    if CHUNK:
        starts_at = starts_ptr + (seq * K + k) * (tl.cdiv(L, CHUNK) - 1) * (N_STATES * E) + in_tile

    # Barrier 1 + w is between warp w, which arrives, and the next, which waits; 0 is Triton's own. Why no two accesses
    # race: arriving at a barrier synchronizes with waiting at it (PTX ISA, Memory Consistency Model), so that all that
    # a warp did before it arrived comes before all that the next does after it waited, and so on around the circle.
    # - A state is read after it was written: the write stands before the arrival, the read behind the wait.
    # - It is overwritten after it was read: a warp hands on after it has received, and what it receives comes, by way
    #   of the others, from the next warp, which had read before it handed on.
    # - No warp arrives at a barrier a second time before the next has waited there: the same chain goes through that
    #   wait. Warp 3 arrives once before the loop, too, and warp 0 waits once more after it.
    # - Rows that lanes stage are their warp's own, and barriers of the warp stand before and after the writes.
    before = (warp + (WARPS - 1)) % WARPS
    thread_before = before * 32 + thread % 32
    always = (thread >= 0).to(tl.uint32)
    shared = thread.to(tl.uint32)
    if FAST:
        shared = _shared_memory(thread)
    own_row = shared + thread % 32 * ROW
    mine = own_row + warp * STATE
    theirs = own_row + before * STATE
    operands = shared + (WARPS * STATE + warp * (GROUPS * OPERANDS))
    # pairs of channels are turned in every second step, so that neighbours which stage two steps use different banks
    stage = (
        operands + (place * (CE * ROW) + (ce ^ place % 2 * 4) * ROW),
        operands + (tl.where(loads_C, C_OPERANDS, B_OPERANDS) + place * (NL * ROW) + ce % NL * ROW),
        operands + ce * ROW,
        operands + (ce ^ 4) * ROW,
    )
    get_states = operands + (B_OPERANDS + place * ROW)

    first = slice_index * slice_steps
    walks = ()
    for g in tl.static_range(GROUPS):
        p, left, inner, stride, turn = start_walk(first + warp * SEGMENT + g * NL + place, order, L, H, W, LARGE)
        walks = walks + ((p, left),)
    advance = group_stride(ROUND, inner, stride, turn)
    pointers = (dt_ptr, u_ptr, B_ptr)
    step = first + warp * SEGMENT
    segment, walks = _load_segment(step, walks, advance, place, L, at, existing, GROUPS, WIDE, FAST)
    own, steps = _prepare(segment, pointers, A, thread, ce, stage, GROUPS, FAST, WIDE)
    segment, walks = _load_segment(step + ROUND, walks, advance, place, L, at, existing, GROUPS, WIDE, FAST)

    if slice_index > 0:
        while tl.atomic_add(done_ptr + tile, 0, sem="acquire") < slice_index:
            pass
    not_first = slice_index + tl.arange(0, 1) > 0  # a block of one: the interpreter takes no scalar masks
    h = load_tile(state_at, E, inside, not_first, NR, CR)
    if FAST:
        _hand_on(mine, 1 + warp, (warp == WARPS - 1).to(tl.uint32), h)

    for t in range(first, tl.minimum(first + slice_steps, L), ROUND):
        if FAST:
            start = _receive(theirs, 1 + before, always)
            states = _walk(start, own, steps, thread, place, get_states, GROUPS, FAST)
            _hand_on(mine, 1 + warp, always, states[SEGMENT - 1])
        else:
            start, states = _walk_in_turns(h, own, steps, thread, place, get_states, GROUPS, FAST)
            h = states[SEGMENT - 1]
        t_warp = t + warp * SEGMENT
        for g in tl.static_range(GROUPS):
            if CHUNK:
                t_group = t_warp + g * NL
                kept = (n, e, N_STATES, E, (t_group > 0) & (t_group < L) & (t_group % CHUNK == 0))
                at_start = starts_at + (t_group // CHUNK - 1).to(OFFSET) * (N_STATES * E)
                store_tile(at_start, E, start if g == 0 else states[g * NL - 1], kept, NR, CR)
            p, u, bc = own[g]
            ys = _outputs(states, bc, thread, place, get_states, g, FAST)
            y = multiply_add(D, u, ys, CR)
            store_row(y_at, p, y, tl.where(t_warp + g * NL + place < L, existing[0], 0), CR, WIDE, FAST)
        own, steps = _prepare(segment, pointers, A, thread, ce, stage, GROUPS, FAST, WIDE)
        segment, walks = _load_segment(t_warp + 2 * ROUND, walks, advance, place, L, at, existing, GROUPS, WIDE, FAST)

    end = _receive(theirs, 1 + before, (warp == 0).to(tl.uint32)) if FAST else gather(h, thread_before, TILE)
    store_tile(state_at, E, end, (n, e, N_STATES, E, warp == 0), NR, CR)
    tl.debug_barrier()
    tl.atomic_xchg(done_ptr + tile, slice_index + 1, sem="release")


def _tiles(batch: int, directions: int, features: int) -> int:
    return -(-features // CHANNELS) * batch * directions


@functools.lru_cache(None)
def relay_plan(batch: int, length: int, directions: int, features: int, n: int, fill: int) -> tuple[int, int] | None:
    """Groups of steps a segment and steps a slice, or None where another form of the scan is better, or the only one:
    where sequences are short, where a tile would be half empty or has no room for the states, and where multiprocessors
    have less than two tiles each, or so many warps for whole sequences that these need no turns.

    Args:
        features: Channels.
        n: States of a channel.
        fill: Of `schedule.programs_to_fill`, eight a multiprocessor.
    """
    if length < MIN_LENGTH or not 8 < n <= 16 or features <= CHANNELS // 2:
        return None
    tiles = _tiles(batch, directions, features)
    if tiles < fill // 4 or -(-features // 32) * batch * directions >= fill:
        return None
    # two programs a multiprocessor with long segments, or four with short ones
    groups, slots = (2, fill // 4) if tiles < fill // 2 else (1, fill // 2)
    round_steps = WARPS.value * NL.value * groups

    def cost(slices: int) -> int:
        return -(-tiles * slices // slots) * (slice_steps(slices) + SLICE_OVERHEAD)

    def slice_steps(slices: int) -> int:
        return -(-length // (slices * round_steps)) * round_steps

    return groups, slice_steps(min(range(1, 17), key=cost))


def _plan(operands: Operands) -> tuple[int, int] | None:
    """`relay_plan` for these operands; None also where B and C, which one load serves, are of two dtypes."""
    if operands.B.dtype != operands.C.dtype:
        return None
    fill = schedule.programs_to_fill(operands.u.device)
    return relay_plan(*operands.delta.shape[:3], *operands.A.shape[1:], fill)


def takes_turns(operands: Operands) -> bool:
    """Whether these operands are for `scan_forward_relay`."""
    return _plan(operands) is not None


def scan_forward_relay(
    operands: Operands, *, delta_softplus: bool, orders: tuple[str, ...], height: int, width: int, chunk: int,
    with_last: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """As `forward.scan_forward`, for operands that `takes_turns`."""
    u, dt, At, B, C, D = kernel_inputs(operands, delta_softplus)
    batch, length, directions, features = dt.shape
    n = At.shape[1]
    tiles = _tiles(batch, directions, features)
    y = torch.empty(dt.shape, dtype=u.dtype, device=u.device)
    state = torch.empty(batch, directions, n, features, dtype=torch.float32, device=u.device)
    shape = batch, directions, -(-length // chunk) - 1, n, features
    starts = torch.empty(shape, dtype=kept_dtype(u.dtype), device=u.device)
    done = torch.zeros(tiles + 1, dtype=torch.int32, device=u.device)
    plan = _plan(operands)
    layouts = [layout(t) for t in (u, dt, B, C, y)]
    launch = _launch(*plan, *layouts, n, orders, height, width, chunk)
    launch(u, dt, At, B, C, D, y, starts, state, done)
    last = state.transpose(-1, -2).contiguous() if with_last else None
    return y, last, starts


@functools.lru_cache(MAX_LAUNCHES)
def _launch(
    groups: int, slice_steps: int, u: Layout, dt: Layout, B: Layout, C: Layout, y: Layout, n: int,
    orders: tuple[str, ...], height: int, width: int, chunk: int,
) -> Launch:  # fmt: skip
    batch, length, directions, features = dt.shape
    tiles = _tiles(batch, directions, features)
    starts = schedule.states_layout(batch, directions, -(-length // chunk) - 1, n, features)
    numbers = (
        pack_orders(orders),
        length, height, width,
        features, n, directions,
        tiles, slice_steps,
        *schedule.strides(u), *schedule.strides(B), *schedule.strides(C),
    )  # fmt: skip
    fits_words = n % NR.value == 0 and features % CR.value == 0
    return Launch(
        _relay_kernel,
        (tiles * -(-length // slice_steps),),
        numbers,
        GROUPS=groups,
        CHUNK=chunk if chunk < length else 0,
        FAST=not INTERPRETED,
        LARGE=schedule.is_large(1, u, B, C, y, starts),
        WIDE=fits_words and all(map(schedule.in_words, (u, dt, B, C, y))),
        num_warps=WARPS.value,
        maxnreg=None if INTERPRETED or groups == 2 else 128,
    )
