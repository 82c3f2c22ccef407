"""Sums over the parts of gradients, which a kernel's programs have written one beside another, each to its place.

One launch makes any number of sums of any number of tensors: a launch costs the host more than such sums take the GPU.
A sum of one part is a copy in another layout or dtype.
"""

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import MAX_LAUNCHES, Launch

BLOCK, PARTS = 32, 256  # columns and parts that a program adds up at once
FEW = 8  # parts up to which a program adds up FLAT columns, of whatever rows, instead
FLAT = 2048


class Sum(NamedTuple):
    """result[k, row, e] = the sum over parts of source[part, k, row, e], in float32, for all k, rows and columns e.

    Attributes:
        source: The place among a launch's sources of the tensor that has the parts.
        target: The place among its targets of the tensor for the result.
        offset: Where the first number lies in the source.
        parts, directions, rows, width: Sizes of the source.
        strides: The source's, but for columns, which lie side by side; PARTS times the first fits into 31 bits.
        target_strides: The target's, of directions, rows and columns.
    """

    source: int
    target: int
    offset: int
    parts: int
    directions: int
    rows: int
    width: int
    strides: tuple[int, int, int]
    target_strides: tuple[int, int, int]

    def programs(self) -> int:
        all_rows = self.directions * self.rows
        if self.parts <= FEW:
            return triton.cdiv(all_rows * self.width, FLAT)
        return all_rows * triton.cdiv(self.width, BLOCK)


FIELDS = 14  # numbers that the table has for a sum


@triton.jit
def _choose(pointers, number):
    """The address of one of several tensors, and its dtype's number. Chosen so, and not by a copy of the code for each
    tensor, many take little longer to compile than few."""
    address = pointers[0].to(tl.int64)
    dtype = _dtype(pointers[0])
    for i in tl.static_range(1, len(pointers)):
        address = tl.where(number == i, pointers[i].to(tl.int64), address)
        dtype = tl.where(number == i, _dtype(pointers[i]), dtype)
    return address, dtype


@triton.jit
def _dtype(pointer):
    dtype: tl.constexpr = pointer.dtype.element_ty
    return 0 if dtype == tl.float32 else 1 if dtype == tl.bfloat16 else 2


@triton.jit
def _pointer(address, dtype: tl.constexpr):
    """To what lies at an address, of a dtype that `_dtype` gave this number."""
    if dtype == 0:
        return address.to(tl.pointer_type(tl.float32))
    elif dtype == 1:
        return address.to(tl.pointer_type(tl.bfloat16))
    else:
        return address.to(tl.pointer_type(tl.float16))


@triton.jit
def _store(target, strides, place, sums, mask):
    """Sums of a place, which is direction, row and columns, to that one of a target, an address and a dtype."""
    address, dtype = target
    at = place[0] * strides[0] + place[1] * strides[1] + place[2] * strides[2]
    for d in tl.static_range(3):
        if dtype == d:
            pointer = _pointer(address, d)
            tl.store(pointer + at, sums.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _sum_few(source, offset, strides, target, target_strides, parts, place, mask):
    """The sums of a program where parts are few: each number by itself."""
    address, dtype = source
    at = offset + place[0] * strides[1] + place[1] * strides[2] + place[2]
    total = (place[2] * 0).to(tl.float32) * -1.0  # of a copy of -0.0, to which 0.0 would add up to 0.0
    for d in tl.static_range(3):
        if dtype == d:
            for part in range(parts):
                x = tl.load(_pointer(address, d) + part * strides[0] + at, mask=mask, other=0.0)
                total += x.to(tl.float32)
    _store(target, target_strides, place, total, mask)


@triton.jit
def _sum_many(
    source, offset, strides, target, target_strides, parts, place, width,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of a program where parts are many: BLOCK columns of a row, PARTS parts at once."""
    address, dtype = source
    start = offset + place[0] * strides[1] + place[1] * strides[2]
    inside = place[2] < width
    part = tl.arange(0, PARTS)[:, None]
    at = part * strides[0].to(tl.int32) + place[2][None, :]
    tile = tl.zeros([PARTS, BLOCK], dtype=tl.float32)
    for d in tl.static_range(3):
        if dtype == d:
            for first in range(0, parts, PARTS):
                first_at = _pointer(address, d) + first * strides[0] + start
                x = tl.load(first_at + at, mask=(first + part < parts) & inside[None, :], other=0.0)
                tile += x.to(tl.float32)
    _store(target, target_strides, place, tl.sum(tile, 0), inside)


@triton.jit(do_not_specialize=["table"])
def _sums_kernel(
    sources, targets,  # tuples of pointers
    table,  # the address of FIELDS numbers a sum
    SUMS: tl.constexpr, FIELDS: tl.constexpr,  # the first a power of 2: of those that do not exist no program is
    FEW: tl.constexpr, FLAT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program makes a piece of one sum, of those that the table tells of, as `Sums` makes it."""
    table = table.to(tl.pointer_type(tl.int64))
    firsts = tl.load(table + tl.arange(0, SUMS) * FIELDS)
    at = table + (tl.sum((firsts <= tl.program_id(0)).to(tl.int32), 0) - 1) * FIELDS
    piece = (tl.program_id(0) - tl.load(at)).to(tl.int32)
    source = _choose(sources, tl.load(at + 1))
    target = _choose(targets, tl.load(at + 2))
    offset = tl.load(at + 3).to(tl.int32)
    parts = tl.load(at + 4).to(tl.int32)
    all_rows = tl.load(at + 5).to(tl.int32)
    rows = tl.load(at + 6).to(tl.int32)
    width = tl.load(at + 7).to(tl.int32)
    # only parts may lie far apart
    strides = (tl.load(at + 8), tl.load(at + 9).to(tl.int32), tl.load(at + 10).to(tl.int32))
    target_strides = (tl.load(at + 11).to(tl.int32), tl.load(at + 12).to(tl.int32), tl.load(at + 13).to(tl.int32))
    if parts <= FEW:
        i = piece * FLAT + tl.arange(0, FLAT)
        place = (i // width // rows, i // width % rows, i % width)
        _sum_few(source, offset, strides, target, target_strides, parts, place, i // width < all_rows)
    else:
        blocks = tl.cdiv(width, BLOCK)
        row = piece // blocks
        columns = piece % blocks * BLOCK + tl.arange(0, BLOCK)
        at_row = (row // rows, row % rows, columns)
        _sum_many(source, offset, strides, target, target_strides, parts, at_row, width, PARTS, BLOCK)


class Sums(Launch):
    """The launch of sums, called with a tuple of the tensors that hold the parts, and one of those for results."""

    def __init__(self, sums: tuple[Sum, ...], device: torch.device):
        self.sums = sums
        table, programs = [], 0
        for each in sums:
            sizes = each.parts, each.directions * each.rows, each.rows, each.width
            places = each.source, each.target, each.offset
            table.append([programs, *places, *sizes, *each.strides, *each.target_strides])
            programs += each.programs()
        count = triton.next_power_of_2(len(sums))
        table += [[programs] + [0] * (FIELDS - 1)] * (count - len(sums))
        self.table = _keep(table, device)
        options = dict(FIELDS=FIELDS, FEW=FEW, FLAT=FLAT, PARTS=PARTS, BLOCK=BLOCK, num_warps=8)
        super().__init__(_sums_kernel, (programs,), (self.table.data_ptr(),), SUMS=count, **options)


def _keep(table: list[list[int]], device: torch.device) -> Tensor:
    """The table as a tensor that stays. It is made in a thread of its own, in which no mode is on, and memory comes
    from no pool that is set for this one, as while CUDA graphs are prepared: all that lies there must go with these."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(torch.tensor, table, dtype=torch.int64, device=device).result()


@functools.cache
def launch_sums(sums: tuple[Sum, ...], device: torch.device) -> Sums:
    """The launch of these sums, remembered for good: a CUDA graph reads its table whenever it is replayed, and nobody
    knows how long that lives. There are few, since batches of most sizes make equally many parts."""
    return Sums(sums, device)


def sum_parts(parts: Tensor, matrix: Tensor, *vectors: Tensor, transposed: bool = False) -> None:
    """Sums over parts, each written to its tensor, in that one's dtype.

    Args:
        parts: (parts, directions, rows + vectors, E), contiguous; without the second axis for one direction.
        matrix: Contiguous, for the sums of the first rows: (directions, rows, E), or transposed (directions, E, rows).
        vectors: Contiguous, each for the sums of one of the other rows: (directions, E).
    """
    all_rows, width = parts.shape[-2:]
    rows = all_rows - len(vectors)
    directions = matrix.numel() // (width * rows)
    launch = sum_parts_of(len(parts), directions, rows, width, len(vectors), transposed, parts.device)
    launch((parts,), (matrix, *vectors))


def summed(parts: Tensor) -> Tensor:
    """The sums over parts (parts, ...), contiguous, as a tensor (...) in float32."""
    total = torch.empty(parts.shape[1:], dtype=torch.float32, device=parts.device)
    sum_parts(parts.flatten(1).unsqueeze(1), total)
    return total


@functools.lru_cache(MAX_LAUNCHES)
def sum_parts_of(
    parts: int, directions: int, rows: int, width: int, vectors: int, transposed: bool, device: torch.device
) -> Sums:
    """The launch of `sum_parts` for these sizes."""
    all_rows = rows + vectors
    strides = directions * all_rows * width, all_rows * width, width
    place = (rows * width, 1, rows) if transposed else (rows * width, width, 1)
    sums = [Sum(0, 0, 0, parts, directions, rows, width, strides, place)]
    for i in range(vectors):
        sums.append(Sum(0, 1 + i, (rows + i) * width, parts, directions, 1, width, strides, (width, 0, 1)))
    return launch_sums(tuple(sums), device)


@functools.lru_cache(MAX_LAUNCHES)
def copy_of(count: int, device: torch.device) -> Sums:
    """The launch that copies `count` numbers, side by side, to another dtype."""
    return launch_sums((Sum(0, 0, 0, 1, 1, 1, count, (0, 0, 0), (0, 0, 1)),), device)


def together(launches: Sequence[Sums], device: torch.device) -> Sums:
    """The sums of several launches, whose tensors come one behind another."""
    sums, sources, targets = [], 0, 0
    for launch in launches:
        sums += [each._replace(source=each.source + sources, target=each.target + targets) for each in launch.sums]
        sources += 1 + max(each.source for each in launch.sums)
        targets += 1 + max(each.target for each in launch.sums)
    return launch_sums(tuple(sums), device)
