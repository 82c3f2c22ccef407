"""What is decided before a scan's kernels start: how tiles of states lie in a warp, how sequences are shared among
programs, and what the kernels are told of their tensors."""

import functools
import math
from typing import NamedTuple

import torch
import triton

from ...triton_launch import INTERPRETED, Layout
from ...triton_math import LANES
from ..chunks import TRITON_CHUNK

MAX_CHUNKS = 65535  # or parts of several, that run side by side: the limit of a grid's third axis
# Steps up to which a program takes a whole sequence, however few there are: it is done before the host would have
# launched the two kernels more that chunks need.
MAX_WHOLE = 256
STEPS = 4  # whose operands the forward scan loads together: of one alone it would do little but wait for them
MANY_STEPS = 8  # likewise, where warps are few and have registers for as many
FEW_STATES = 8  # of a channel, up to which the forward scan waits for memory and has time to make step sizes, too
MAX_STATES = 128  # that the lanes of a warp can hold in the backward pass


class ForwardPlan(NamedTuple):
    """How the forward scan runs.

    Attributes:
        tile: Registers and lanes of a tile of states, see tiles.py: NR, NL, S, CE and CR; and GROUPS, of NL steps,
            whose operands are loaded together.
        split: Whether programs scan chunks side by side, not whole sequences.
        chunk: Steps of a chunk.
    """

    tile: dict[str, int]
    split: bool
    chunk: int


@functools.lru_cache(None)
def forward_plan(batch: int, length: int, directions: int, features: int, n: int, chunk: int, fill: int) -> ForwardPlan:
    """The plan for sequences of these sizes.

    Args:
        chunk: Steps between kept states, or the whole length, for none.
        fill: Of `programs_to_fill`.
    """
    most = min(4, triton.next_power_of_2(features), max(64 // triton.next_power_of_2(n), 1))
    whole = chunk == length
    tiles = [_forward_tile(n, features, channels, whole) for channels in (4, 2, 1) if channels <= most]
    if n == 4 and features >= 2 * LANES.value:  # a channel's states in one thread: what a step needs asks no other lane
        # Two channels are a word; of six steps registers hold the operands, and TRITON_CHUNK is a multiple of them.
        alone = dict(NR=4, NL=1, S=1, CE=LANES.value, CR=2, GROUPS=6)
        if channel_blocks(features, alone) * batch * directions >= fill:
            return ForwardPlan(alone, False, chunk)
    # many channels a thread take fewer instructions each, few leave more programs
    programs = [channel_blocks(features, tile) * -(-batch // tile["S"]) * directions for tile in tiles]
    for tile, count in zip(tiles[:2], programs):
        if count >= fill:
            return ForwardPlan(tile, False, chunk)
    steps = TRITON_CHUNK
    if chunk == length:
        steps *= -(-length * programs[0] // (8 * max(fill, 1)) // TRITON_CHUNK)
    if length <= max(TRITON_CHUNK, MAX_WHOLE) or length > steps * MAX_CHUNKS:
        return ForwardPlan(tiles[-1], False, chunk)
    return ForwardPlan(_forward_tile(n, features, most, False), True, steps)


def _forward_tile(n: int, features: int, channels: int, whole: bool) -> dict[str, int]:
    """A tile with that many channels a thread.

    Args:
        whole: Whether a sequence is one chunk. A shorter one, of TRITON_CHUNK steps, must end with a group of them.
    """
    states = triton.next_power_of_2(n)
    NL = min(states, 4)
    CE = min(LANES.value // NL, max(NL, triton.next_power_of_2(-(-features // channels))))
    S = LANES.value // (NL * CE)
    steps = MANY_STEPS if whole and S == 1 and (states == 8 or (states == 1 and channels < 4)) else STEPS
    return dict(NR=states // NL, NL=NL, S=S, CE=CE, CR=channels, GROUPS=max(steps // NL, 1))


def forward_registers(tile: dict[str, int], makes_steps: bool) -> int | None:
    """Registers a thread, such that sixteen warps with large tiles fit on a multiprocessor, or twenty-four with small
    ones.

    Where there are few warps, and so fewer than four channels a thread, it is worth more to have more of a group's
    steps at once: twelve warps then, if a lane has all states of its channels and more than STEPS steps under way.
    """
    if INTERPRETED:
        return None
    if tile["NL"] == 1 and tile["GROUPS"] > STEPS:
        return 168
    if tile["NR"] * tile["CR"] > 8 or tile["GROUPS"] * tile["NL"] > STEPS or makes_steps:
        return 128
    return 80 if tile["CR"] == 4 else 100


def backward_tile(n: int, features: int, batch: int, directions: int, fill: int) -> dict[str, int]:
    """A tile of the backward scan, see tiles.py: 16 states a thread where a channel has as many, and elsewhere where
    there are many channels, else fewer, so that there are more warps to wait for memory."""
    states = triton.next_power_of_2(n)
    NR = min(states, 4)
    NL = states // NR
    many = batch * directions * (features // (LANES.value // NL * 4)) >= 2 * fill
    CR = min(triton.next_power_of_2(features), 4 if states > 8 or many else 2)
    if NR == 4 and features == LANES.value // NL * 2:
        CR = 2  # so that the warp has but one sequence, whose operands can come through shared memory
    CE = min(LANES.value // NL, triton.next_power_of_2(-(-features // CR)))
    S = LANES.value // (NL * CE)
    if CE > 1 and features % (CE * CR) and features % (CE // 2 * CR) == 0 and batch % (2 * S) == 0:
        CE, S = CE // 2, 2 * S  # another sequence where lanes would have no channels
    return dict(NR=NR, NL=NL, CR=CR, CE=CE, S=S)


def backward_registers(tile: dict[str, int], staged: bool) -> int | None:
    """Registers a thread, such that twelve warps with rooms of their own fit on a multiprocessor, where two channels a
    thread leave registers over. With four they need nearly all, and eight warps fit."""
    return 168 if staged and tile["CR"] == 2 and not INTERPRETED else None


def channel_blocks(features: int, tile: dict[str, int]) -> int:
    """Tiles that the channels of a direction fill."""
    return -(-features // (tile["CE"] * tile["CR"]))


def chunks_a_part(chunks: int, programs: int, fill: int) -> int:
    """Chunks of a sequence that one program of the backward scan takes.

    All, where whole sequences make enough programs; else so many that there are three rounds of programs: each has
    parameters to load and sums to store, and a part of several chunks need not wait for operands but once.

    Args:
        chunks: Of a sequence.
        programs: If each takes whole sequences.
        fill: Of `programs_to_fill`.
    """
    if programs >= fill:
        return chunks
    parts = min(chunks, -(-3 * fill // programs), MAX_CHUNKS)
    return -(-chunks // parts)


@functools.lru_cache(None)
def programs_to_fill(device: torch.device) -> int:
    """Programs (of one warp) below which sequences are split: eight a multiprocessor."""
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def tiles_a_program(programs: int, device: torch.device) -> int:
    """How many tiles of sequences one program takes, one after the other, so that it loads its parameters rarely and
    its sums over sequences are long and few: sixteen rounds of programs fill a GPU evenly enough."""
    return max(programs // (16 * max(programs_to_fill(device), 1)), 1)


def states_layout(*shape: int) -> Layout:
    """The layout of the states that are kept, which are contiguous. Only its strides are read: the size of an element
    may be another, see `kept_dtype`."""
    return Layout(shape, tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))), 4, 0)


def strides(t: Layout) -> tuple[int, int, int]:
    """Strides of batch, length and direction; 0 where all directions share the tensor."""
    return (*t.stride[:2], t.stride[2] if len(t.shape) == 4 else 0)


def is_large(sequences: int, *tensors: Layout) -> bool:
    """Whether offsets within the sequences of one tile need 64 bits; those between tiles always have them.

    Args:
        sequences: Of a tile, along the tensors' first axis.
    """
    return any((sequences - 1) * t.stride[0] + t.shape[1] * t.stride[1] >= 2**31 for t in tensors)


def in_words(t: Layout, count: int = 4) -> bool:
    """Whether so many neighbours of 16 bits are an aligned word."""
    return t.size == 2 and t.address % (2 * count) == 0 and all(stride % count == 0 for stride in t.stride[:-1])
