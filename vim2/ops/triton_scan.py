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
from .triton_math import INTERPRETED, LOG2E, exp2, launch
from .triton_step_size import step_sizes

MAX_ORDERS = tl.constexpr(15)  # directions whose orders fit in one 32-bit argument, two bits each

# Twelve warps a multiprocessor instead of nine: 2.1 ms instead of 2.6 at vim2_tiny's first stage on an H100.
FORWARD_REGISTERS = None if INTERPRETED else 168


@triton.jit
def start_walk(t, order, L, H, W, LARGE: tl.constexpr):
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
def next_position(p, left, inner, step, turn):
    turning = left == 0
    return p + tl.where(turning, turn, step), tl.where(turning, inner - 1, left - 1)


@triton.jit
def _channels(block, E, N_STATES, zero, S: tl.constexpr, G: tl.constexpr, N: tl.constexpr, C: tl.constexpr):
    """A tile's sequences [S], channels [G, C] and states [N], and which channels and states exist."""
    e = block * (G * C) + tl.arange(0, G)[:, None] * C + tl.arange(0, C)[None, :]
    n = tl.arange(0, N)
    channels_in = (e < E)[None, :, :]
    parameters_in = (n < N_STATES)[:, None, None, None] & channels_in[None, :, :, :]
    # adding an unknown zero hides alignment: Triton then keeps one channel a thread, and does not carry the states
    # twice, in the layout of the arithmetic and in that of the widest stores
    return tl.arange(0, S).to(tl.uint32), (e + zero).to(tl.uint32), n.to(tl.uint32), channels_in, parameters_in


@triton.jit
def _parameters(A_ptr, D_ptr, k, e, n, E, N_STATES, channels_in, parameters_in):
    """A, times log2(e) for exp2, and D, in float32."""
    A_at = A_ptr + k * (N_STATES * E) + n[:, None, None, None] * E + e[None, None, :, :]
    A = tl.load(A_at, mask=parameters_in, other=0.0)
    D = tl.load(D_ptr + k * E + e[None, :, :], mask=channels_in, other=0.0)
    return A.to(tl.float32) * LOG2E, D.to(tl.float32)


@triton.jit
def _masks(seq, s, batch, n, N_STATES, channels_in, parameters_in):
    """Which elements of vectors [S, G, C], of B and C [N, S] and of states [N, S, G, C] exist."""
    s_in = seq + s < batch
    return (
        channels_in & s_in[:, None, None],
        (n < N_STATES)[:, None] & s_in[None, :],
        parameters_in & s_in[None, :, None, None],
    )


@triton.jit
def _load(at, p, mask, FULL: tl.constexpr):
    """At position p of a tensor, given as the address of its first, offsets from there and the stride of positions."""
    address = at[0] + p * at[2] + at[1]
    if FULL:
        return tl.load(address)
    else:
        return tl.load(address, mask=mask, other=0.0)


@triton.jit
def _load_unless_first(starts_at, chunk, size, in_tile, tile_in):
    """The states at a chunk's start; the first chunk's are zero and not stored. (Masks are never scalars: Triton's
    interpreter takes none.)"""
    is_first = (chunk + tl.arange(0, 1) == 0)[:, None, None, None]
    return tl.load(starts_at + (chunk - 1) * size + in_tile, mask=tile_in & (is_first == 0), other=0.0)


@triton.jit(do_not_specialize=["zero"])
def _forward_kernel(
    u_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, y_ptr, starts_ptr, decay_ptr, last_ptr,
    orders, batch, L, H, W, E, N_STATES, K, chunk, chunks, zero,
    u_b, u_l, u_k, B_b, B_l, B_k, C_b, C_l, C_k,
    SPLIT: tl.constexpr, LOCAL: tl.constexpr, LAST: tl.constexpr,
    FAST: tl.constexpr, LARGE: tl.constexpr, FULL: tl.constexpr,
    S: tl.constexpr, G: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A program scans whole sequences and writes the states at the starts of all chunks but the first. With SPLIT it
    scans one chunk, from its start; with LOCAL too, from zero, and writes only the chunk's end state and decay."""
    k = tl.program_id(1)
    order = (orders >> (2 * tl.minimum(k, MAX_ORDERS - 1))) & 3  # arithmetic, not a load: it stays uniform
    blocks = tl.cdiv(E, G * C)
    s, e, n, channels_in, parameters_in = _channels(tl.program_id(0) % blocks, E, N_STATES, zero, S, G, N, C)
    seq = (tl.program_id(0) // blocks).to(tl.int64) * S
    vector_in, states_in, tile_in = _masks(seq, s, batch, n, N_STATES, channels_in, parameters_in)
    A, D = _parameters(A_ptr, D_ptr, k, e, n, E, N_STATES, channels_in, parameters_in)

    # a 64-bit base for the program and 32-bit offsets in the tile: 64-bit offsets would fill the registers
    u_at = (u_ptr + seq * u_b + k * u_k, s[:, None, None] * u_b + e[None, :, :], u_l)
    B_at = (B_ptr + seq * B_b + k * B_k, s[None, :] * B_b + n[:, None], B_l)
    C_at = (C_ptr + seq * C_b + k * C_k, s[None, :] * C_b + n[:, None], C_l)
    lanes = (seq * L * K + k) * E  # of dt and y, which lie as (batch, L, K, E)
    in_lanes = s[:, None, None] * (L * K * E) + e[None, :, :]
    dt_at = (dt_ptr + lanes, in_lanes, K * E)
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

    p, left, inner, step, turn = start_walk(first_chunk * chunk, order, L, H, W, LARGE)
    dt = _load(dt_at, p, vector_in, FULL)
    u = _load(u_at, p, vector_in, FULL)
    b = _load(B_at, p, states_in, FULL)
    c = b if LOCAL else _load(C_at, p, states_in, FULL)
    for j in range(num_chunks):
        if not SPLIT and j > 0:
            tl.store(starts_at + in_tile, h, mask=tile_in)
            starts_at += N_STATES * E
        t = (first_chunk + j) * chunk
        for i in range(t, tl.minimum(t + chunk, L)):
            # the next step's loads are under way while this one computes
            p_next, left = next_position(p, left, inner, step, turn)
            p_next = tl.where(i + 1 < L, p_next, p)
            dt_next = _load(dt_at, p_next, vector_in, FULL)
            u_next = _load(u_at, p_next, vector_in, FULL)
            b_next = _load(B_at, p_next, states_in, FULL)
            c_next = b_next if LOCAL else _load(C_at, p_next, states_in, FULL)
            size = dt.to(tl.float32)
            uf = u.to(tl.float32)
            bu = (size * uf)[None, :, :, :] * b.to(tl.float32)[:, :, None, None]
            h = exp2(size[None, :, :, :] * A, FAST) * h + bu
            if LOCAL:
                total += size
            else:
                y = tl.sum(h * c.to(tl.float32)[:, :, None, None], axis=0) + D * uf
                tl.store(y_ptr + (lanes + p * (K * E)) + in_lanes, y.to(y_ptr.dtype.element_ty), mask=vector_in)
            p, dt, u, b, c = p_next, dt_next, u_next, b_next, c_next
    if LOCAL:
        tl.store(starts_at + first_chunk * (N_STATES * E) + in_tile, h, mask=tile_in)
        decay_at = decay_ptr + (lane * (chunks - 1) + first_chunk) * (N_STATES * E)
        tl.store(decay_at + in_tile, exp2(total[None, :, :, :] * A, FAST), mask=tile_in)
    elif LAST and first_chunk + num_chunks == chunks:
        last_at = s[None, :, None, None] * (K * N_STATES * E) + n[:, None, None, None] * E + e[None, None, :, :]
        tl.store(last_ptr + lane * (N_STATES * E) + last_at, h, mask=tile_in)


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


def _tile_shape(n: int, features: int, batch: int) -> dict[str, int]:
    """S, G, N, C of a tile of about 1024 states."""
    N = triton.next_power_of_2(n)
    C = min(32, triton.next_power_of_2(features))
    G = min(max(1024 // (N * C), 1), triton.next_power_of_2(-(-features // C)), 8)
    S = min(max(1024 // (N * G * C), 1), triton.next_power_of_2(batch), 8)
    return dict(S=S, G=G, N=N, C=C)


def _is_full(tile: dict[str, int], n: int, features: int, batch: int) -> bool:
    """Whether all elements of all tiles exist, so that loads need no masks."""
    return n == tile["N"] and features % (tile["G"] * tile["C"]) == 0 and batch % tile["S"] == 0


@functools.lru_cache(None)
def programs_to_fill(device: torch.device) -> int:
    """Programs (of one warp) below which sequences are split: eight a multiprocessor."""
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def tiles_a_program(programs: int, device: torch.device) -> int:
    """How many tiles of sequences one program of the backward pass takes, one after the other, so that the sums over
    sequences are long and few: sixteen rounds of programs fill a GPU evenly enough."""
    return max(programs // (16 * max(programs_to_fill(device), 1)), 1)


def strides(t: Tensor, lanes: bool) -> tuple[int, int, int]:
    """Strides of batch, length and direction; 0 where all directions share the tensor."""
    return (t.stride(0), t.stride(1), t.stride(2) if lanes else 0)


@functools.lru_cache(None)
def pack_orders(orders: tuple[str, ...]) -> int:
    """Two bits a direction. Directions from the 15th on must all have its order, as the groups of mamba's layout do."""
    if len(set(orders[MAX_ORDERS.value - 1 :])) > 1:
        raise ValueError(f"The Triton scan takes at most {MAX_ORDERS.value} different directions, got {len(orders)}.")
    return sum(ORDERS.index(order) << (2 * k) for k, order in enumerate(orders[: MAX_ORDERS.value]))


def is_large(sequences: int, *tensors: Tensor) -> bool:
    """Whether offsets within the sequences of one tile need 64 bits; those between tiles always have them."""
    return any(sequences * t.shape[1] * t.stride(1) >= 2**31 for t in tensors)


def last_axis_contiguous(*tensors: Tensor) -> list[Tensor]:
    return [t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in tensors]


@functools.lru_cache(None)
def _forward_plan(
    batch: int, length: int, lanes: int, features: int, n: int, chunk: int, fill: int
) -> tuple[dict[str, int], int, bool, int]:
    """The tile, with which programs a direction, whether sequences are split, and the steps of a chunk."""
    tile = _tile_shape(n, features, batch)
    programs = -(-batch // tile["S"]) * -(-features // (tile["G"] * tile["C"]))
    split = length > CHUNK and programs * lanes < fill
    if not split:
        return tile, programs, False, chunk
    steps = -(-length * programs * lanes // (4 * max(fill, 1)) // CHUNK) * CHUNK
    return tile, programs, True, steps if chunk == length else CHUNK


def selective_scan_triton(
    u, delta, A, B, C, D, delta_bias, delta_weight, delta_softplus, orders, height, width, chunk, with_last
):
    """As `reference.selective_scan_chunked`, but y is (batch, L, K, E) in u's dtype.

    Args:
        delta_weight: (K, E, R) where delta is (batch, L, K, R), else empty.
        chunk: Steps between kept states: CHUNK, or the whole length where no backward pass will follow.
    """
    u, B, C = last_axis_contiguous(u, B, C)
    At, D, delta_bias = (t.contiguous() for t in (A.transpose(1, 2), D, delta_bias))
    batch, length, lanes = delta.shape[:3]
    features, n = A.shape[1:]
    fill = programs_to_fill(u.device)
    tile, programs, split, steps = _forward_plan(batch, length, lanes, features, n, chunk, fill)
    chunks = -(-length // steps)
    y = torch.empty(batch, length, lanes, features, dtype=u.dtype, device=u.device)
    last = torch.empty((batch, lanes, n, features) if with_last else (0,), dtype=torch.float32, device=u.device)
    starts = torch.empty(batch, lanes, chunks - 1, n, features, dtype=torch.float32, device=u.device)
    decay = torch.empty_like(starts) if split else starts
    dt = step_sizes(delta, delta_weight, delta_bias, delta_softplus, u.dtype)
    arguments = (
        u, dt, At, B, C, D, y, starts, decay, last,
        pack_orders(orders), batch, length, height, width, features, n, lanes, steps, chunks, 0,
        *strides(u, u.dim() == 4), *strides(B, True), *strides(C, True),
    )  # fmt: skip
    options = dict(
        LAST=with_last, FAST=not INTERPRETED, LARGE=is_large(1, u, B, C, y),
        FULL=_is_full(tile, n, features, batch), num_warps=1, maxnreg=FORWARD_REGISTERS, **tile,
    )  # fmt: skip
    if split:
        launch(_forward_kernel, (programs, lanes, chunks - 1), arguments, SPLIT=True, LOCAL=True, **options)
        combine(starts, decay, None)
    grid = (programs, lanes, chunks if split else 1)
    launch(_forward_kernel, grid, arguments, SPLIT=split, LOCAL=False, **options)
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
