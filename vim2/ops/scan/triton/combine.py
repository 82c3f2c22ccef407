# ruff: noqa: RUF005  (Triton knows no starred tuples)
"""From chunks that were scanned each by itself to the states at their ends."""

import functools

import triton
import triton.language as tl
from torch import Tensor

from ...triton_launch import MAX_LAUNCHES, Launch


@triton.jit
def _combine_kernel(
    state_ptr, decay_ptr, end_ptr,  # of all sequences' chunks; of all sequences
    count, size,  # chunks of a sequence but the first, and states of one
    REVERSE: tl.constexpr, END: tl.constexpr,  # adjoints, from the other end; whether they begin with end's
    AHEAD: tl.constexpr, BLOCK: tl.constexpr,  # chunks that are loaded at once, states of a program
):  # fmt: skip
    """In place, from chunks' own end states and decays, (sequences, count, size), to the true states at their ends.

    With REVERSE, of adjoints and from the other end, starting from end, (sequences, size), if END.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sequence = tl.program_id(1).to(tl.int64)
    h = tl.zeros([BLOCK], dtype=tl.float32)
    if END:
        h = tl.load(end_ptr + sequence * size + i, mask=i < size, other=0.0)
    for first in range(0, count, AHEAD):
        # loads that wait for nothing come before the sums that wait for each other
        ahead = ()
        for r in tl.static_range(AHEAD):
            j = first + r
            at = (sequence * count + (count - 1 - j if REVERSE else j)) * size + i
            mask = (i < size) & (j + tl.arange(0, 1) < count)  # a block of one: the interpreter takes no scalar masks
            local = tl.load(state_ptr + at, mask=mask, other=0.0)
            ahead = ahead + ((at, mask, local, tl.load(decay_ptr + at, mask=mask, other=0.0)),)
        for r in tl.static_range(AHEAD):
            at, mask, local, decay = ahead[r]
            h = decay * h + local
            tl.store(state_ptr + at, h, mask=mask)


def combine(states: Tensor, decay: Tensor, end: Tensor | None) -> None:
    """In place: (batch, K, chunks - 1, N, E) from chunks' own end states to the true states at their ends; given
    `end`, from chunks' own adjoints to the true ones, after `end` (batch, K, N, E) if that is not empty."""
    batch, directions, count, n, features = states.shape
    launch = _combine(batch * directions, count, n * features, end is not None, end is not None and end.numel() > 0)
    launch(states, decay, states if end is None else end)


@functools.lru_cache(MAX_LAUNCHES)
def _combine(sequences: int, count: int, size: int, reverse: bool, from_end: bool) -> Launch:
    options = dict(REVERSE=reverse, END=from_end, AHEAD=8, BLOCK=128, num_warps=1)
    return Launch(_combine_kernel, (-(-size // 128), sequences), (count, size), **options)
