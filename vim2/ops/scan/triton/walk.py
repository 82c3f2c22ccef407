"""Walks over a map in the four orders of a scan.

Addresses are computed, never gathered: a walk is two nested loops over the map with signed strides.
"""

import functools

import triton
import triton.language as tl

from ..orders import ORDERS

MAX_ORDERS = tl.constexpr(15)  # directions whose orders fit in one 32-bit argument, two bits each


@triton.jit
def start_walk(t, order, L, H, W, LARGE: tl.constexpr):
    """A walk at step t: the flat position, the steps left before a turn, how many lie between turns, and the strides of
    a step and of a turn.

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
def next_position(p, left, inner, stride, turn):
    """A walk one step later: its position, and the steps left before a turn."""
    turning = left == 0
    return p + tl.where(turning, turn, stride), tl.where(turning, inner - 1, left - 1)


@triton.jit
def group_stride(STEPS: tl.constexpr, inner, stride, turn):
    """What takes a walk STEPS on at once, see `advance_walk`."""
    row = (inner - 1) * stride + turn
    return (STEPS // inner * row + STEPS % inner * stride, turn - stride, STEPS % inner, inner)


@triton.jit
def advance_walk(walk, advance):
    """A walk, as a position and the steps left before a turn, a group of steps later: that is whole rows and the rest,
    by `jump`, and `bend` more if there is a turn in the rest."""
    p, left = walk
    jump, bend, rest, inner = advance
    left -= rest
    turned = left < 0
    return p + tl.where(turned, jump + bend, jump), tl.where(turned, left + inner, left)


@functools.lru_cache(None)
def pack_orders(orders: tuple[str, ...]) -> int:
    """Two bits a direction. Directions from the 15th on must all have its order, as the groups of mamba's layout do."""
    if len(set(orders[MAX_ORDERS.value - 1 :])) > 1:
        raise ValueError(f"The Triton scan takes at most {MAX_ORDERS.value} different directions, got {len(orders)}.")
    return sum(ORDERS.index(order) << (2 * k) for k, order in enumerate(orders[: MAX_ORDERS.value]))
