# ruff: noqa: RUF005  (Triton knows no starred tuples)
"""Tiles of a scan's states, spread over one warp's registers and lanes.

In every thread's registers lie NR states of each of CR neighbouring channels; the 32 lanes spread over CE groups of
channels, fastest, then S sequences, then NL groups of states. All values are vectors of 32 lanes, one element a thread,
and a tile is a tuple of them, states first. So a sum over a thread's own states or channels adds vectors, and one over
lanes exchanges halves of what is to be summed (`sum_over_lanes`): that takes a third of the shuffles of Triton's own
sums and leaves each result in one lane, which alone goes on with it. (The relay of warps,
forward_relay.py, has vectors of four warps and another order of lanes.)
"""

import triton
import triton.language as tl

from ...triton_math import LANES, LOG2E, exp2
from .words import element_of, load_bits, load_word, pack_word, store_word, unpack_word


@triton.jit
def load_row(at, p, existing, COUNT: tl.constexpr, WIDE: tl.constexpr, FAST: tl.constexpr):
    """COUNT neighbours at position p of a tensor, given as the address of its first, offsets from there and the stride
    of positions; zero beyond the `existing` ones.

    With WIDE all exist or none, and come as words of 64 bits, or of as many as they have: unpacked only where they are
    used, they take half of the registers meanwhile.
    """
    address = at[0] + (p * at[2] + at[1])
    row = ()
    if WIDE and COUNT > 1:
        WORD: tl.constexpr = 4 if COUNT > 2 else 2
        for i in tl.static_range(COUNT // WORD):
            if FAST:
                row = row + (load_word(address + i * WORD, existing > 0, WORD),)
            else:
                word_at = address.to(tl.pointer_type(tl.int64 if WORD == 4 else tl.int32)) + i
                row = row + (tl.load(word_at, mask=existing > 0, other=0),)
    else:
        for i in tl.static_range(COUNT):
            row = row + (load_bits(address + i, i < existing, FAST),)
    return row


@triton.jit
def unpack(row, pointer, COUNT: tl.constexpr, WIDE: tl.constexpr):
    """What `load_row` has loaded, as COUNT values in float32. Words hold elements of 16 bits; bfloat16 is the upper
    half of a float32."""
    ELEMENT: tl.constexpr = pointer.dtype.element_ty
    values = ()
    if WIDE and COUNT > 1:
        for i in tl.static_range(COUNT // 2):
            values = values + unpack_word((row[i // 2] >> (32 * (i % 2))).to(tl.int32), ELEMENT)
    else:
        for i in tl.static_range(COUNT):
            values = values + (element_of(row[i], ELEMENT),)
    return values


@triton.jit
def store_row(at, p, row, existing, COUNT: tl.constexpr, WIDE: tl.constexpr, FAST: tl.constexpr):
    """COUNT neighbours at position p, but those beyond the `existing` ones. With WIDE all exist or none, and those of
    bfloat16 are stored as words."""
    address = at[0] + (p * at[2] + at[1])
    if WIDE and FAST and COUNT > 1 and at[0].dtype.element_ty == tl.bfloat16:
        for i in tl.static_range(COUNT // 4 if COUNT > 2 else 1):
            word = pack_word(row[i * 4], row[i * 4 + 1], FAST)
            if COUNT > 2:
                word = word.to(tl.int64) | (pack_word(row[i * 4 + 2], row[i * 4 + 3], FAST).to(tl.int64) << 32)
            store_word(address + i * 4, word, existing > 0)
    else:
        for i in tl.static_range(COUNT):
            tl.store(address + i, row[i].to(address.dtype.element_ty), mask=i < existing)


@triton.jit
def gather(values, index, COUNT: tl.constexpr):
    """The same COUNT values as they stand in other lanes: each lane gets those of the lane at its `index`."""
    gathered = ()
    for i in tl.static_range(COUNT):
        gathered = gathered + (tl.gather(values[i], index, 0),)
    return gathered


@triton.jit
def half(values, upper, HALF: tl.constexpr):
    """Of 2 HALF values, the second half where `upper`, elsewhere the first."""
    kept = ()
    for i in tl.static_range(HALF):
        kept = kept + (tl.where(upper, values[i + HALF], values[i]),)
    return kept


@triton.jit
def exchange(values, lane, upper, BIT: tl.constexpr, HALF: tl.constexpr, SHUFFLE: tl.constexpr = False):
    """Lanes that differ in BIT add what they have, and keep half of the sums each, the upper one the upper half."""
    sums = ()
    if HALF > 0:
        kept = half(values, upper, HALF)
        given = half(values, upper == 0, HALF)
        for i in tl.static_range(HALF):
            sums = sums + (kept[i] + _of_neighbour(given[i], lane, BIT, SHUFFLE),)
    else:  # a single value is left: both lanes have its sum
        sums = (values[0] + _of_neighbour(values[0], lane, BIT, SHUFFLE),)
    return sums


@triton.jit
def _of_neighbour(x, lane, BIT: tl.constexpr, SHUFFLE: tl.constexpr):
    """The value of x in the lane of the same warp that differs in BIT. Where vectors are of several warps, Triton does
    not see that lanes stay within theirs, and in one it computes the other lane's number: SHUFFLE, for NVIDIA's, says
    what is meant."""
    if SHUFFLE:
        return tl.inline_asm_elementwise(
            f"shfl.sync.bfly.b32 $0, $1, {BIT}, 31, -1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.gather(x, lane ^ BIT, 0)


@triton.jit
def sum_over_lanes(
    values, lane, ordered, STRIDE: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr, SHUFFLE: tl.constexpr = False
):
    """Sums of COUNT values over an axis of SIZE lanes, STRIDE apart. Of COUNT >= SIZE values, each lane is left with
    its share: in the order of the lanes, or of these with some bits turned in all lanes of the axis."""
    for i in tl.static_range(5):
        if (SIZE >> i) > 1:
            upper = (ordered & (STRIDE * (SIZE >> (i + 1)))) != 0
            values = exchange(values, lane, upper, STRIDE * (SIZE >> (i + 1)), COUNT >> (i + 1), SHUFFLE)
    return values


@triton.jit
def zeros(COUNT: tl.constexpr):
    """COUNT vectors of zeros."""
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (tl.zeros([LANES], dtype=tl.float32),)
    return values


@triton.jit
def exists(i, j, inside):
    """Whether state i of channel j of the lanes' own exist; `inside` holds the lanes' first state and channel, the
    numbers of states and channels, and whether the lanes' sequence exists."""
    n, e, n_states, features, sequence_in = inside
    return (n + i < n_states) & (e + j < features) & sequence_in


@triton.jit
def load_tile(at, row, inside, mask, NR: tl.constexpr, CR: tl.constexpr):
    """Rows of states, `row` apart; zero where there is nothing or the mask says so."""
    tile = ()
    for i in tl.static_range(NR):
        for j in tl.static_range(CR):
            tile = tile + (tl.load(at + (i * row + j), mask=exists(i, j, inside) & mask, other=0.0),)
    return tile


@triton.jit
def load_parameters(A_at, D_at, row, inside, NR: tl.constexpr, CR: tl.constexpr):
    """A's tile of rates to the base 2, for `exp2`, and D of the thread's channels."""
    rates = load_tile(A_at, row, inside, inside[4], NR, CR)
    A = ()
    for i in tl.static_range(NR * CR):
        A = A + (rates[i].to(tl.float32) * LOG2E,)
    return A, load_channels(D_at, inside, CR)


@triton.jit
def load_channels(at, inside, CR: tl.constexpr):
    """A parameter of the thread's channels, in float32; zero where there are none."""
    values = ()
    for i in tl.static_range(CR):
        values = values + (tl.load(at + i, mask=inside[1] + i < inside[3], other=0.0).to(tl.float32),)
    return values


@triton.jit
def store_tile(at, row, tile, inside, NR: tl.constexpr, CR: tl.constexpr):
    """Rows of states, `row` apart, where states and channels exist."""
    for i in tl.static_range(NR):
        for j in tl.static_range(CR):
            tl.store(at + (i * row + j), tile[i * CR + j], mask=exists(i, j, inside))


@triton.jit
def decays(dt, A, NR: tl.constexpr, CR: tl.constexpr, FAST: tl.constexpr):
    """The tile of exp(dt A), for a step of this size in each channel; A is to the base 2."""
    tile = ()
    for i in tl.static_range(NR):
        for j in tl.static_range(CR):
            tile = tile + (exp2(dt[j] * A[i * CR + j], FAST),)
    return tile


@triton.jit
def multiply_add(a, b, c, COUNT: tl.constexpr):
    """a b + c, one value after the other."""
    sums = ()
    for i in tl.static_range(COUNT):
        sums = sums + (a[i] * b[i] + c[i],)
    return sums


@triton.jit
def multiply(a, b, COUNT: tl.constexpr):
    """a b, one value after the other."""
    products = ()
    for i in tl.static_range(COUNT):
        products = products + (a[i] * b[i],)
    return products


@triton.jit
def add(a, b, COUNT: tl.constexpr):
    """a + b, one value after the other."""
    sums = ()
    for i in tl.static_range(COUNT):
        sums = sums + (a[i] + b[i],)
    return sums


@triton.jit
def of_states(states, NR: tl.constexpr, CR: tl.constexpr):
    """As a tile, with each state's value for all channels."""
    tile = ()
    for i in tl.static_range(NR):
        for _ in tl.static_range(CR):
            tile = tile + (states[i],)
    return tile


@triton.jit
def of_channels(channels, NR: tl.constexpr, CR: tl.constexpr):
    """As a tile, with each channel's value for all states."""
    tile = ()
    for _ in tl.static_range(NR):
        tile = tile + channels
    return tile


@triton.jit
def sum_states(tile, NR: tl.constexpr, CR: tl.constexpr):
    """The sums of a tile over the thread's own states, one a channel."""
    sums = ()
    for j in tl.static_range(CR):
        total = tile[j]
        for i in tl.static_range(1, NR):
            total += tile[i * CR + j]
        sums = sums + (total,)
    return sums
