# ruff: noqa: RUF005  (Triton knows no starred tuples)
"""A program's room, of the backward scan (`backward.py`): its shared memory, for which Triton has no words and the
assembler does. In Triton's interpreter it is a part of a tensor.

A program is one warp. An address for each lane: of a byte where FAST, elsewhere a pointer to a word of 32 bits.
"""

import triton
import triton.language as tl

from ...triton_math import LANES
from .words import pack_word, unpack_word


@triton.jit
def shared_memory(lane, SIZE: tl.constexpr):
    """The address of that many bytes of shared memory. Triton has no word for it, but the assembler does."""
    return tl.inline_asm_elementwise(
        f"{{ .shared .align 16 .b8 room[{SIZE}]; mov.u32 $0, room; }}",
        "=r,r",
        [lane],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def wait(lane, COPIES: tl.constexpr, FAST: tl.constexpr):
    """Wait until all lanes see what each has written to the program's room, with COPIES also by asynchronous copies."""
    if FAST:
        tl.inline_asm_elementwise(
            "cp.async.wait_all; bar.warp.sync 0xffffffff; mov.u32 $0, 0;"
            if COPIES
            else "bar.warp.sync 0xffffffff; mov.u32 $0, 0;",
            "=r,r",
            [lane],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.debug_barrier()


@triton.jit
def fetch(at, address, there, FAST: tl.constexpr):
    """Copies 16 bytes of each lane's own from global memory to the program's room, or zeros where `there` says that
    there are none. The copy goes on in the background, see `wait`."""
    if FAST:
        tl.inline_asm_elementwise(
            "cp.async.cg.shared.global [$1], [$2], 16, $3; mov.u32 $0, 0;",
            "=r,r,l,r",
            [at, address.to(tl.uint64), there.to(tl.int32) * 16],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        at = at.to(tl.pointer_type(tl.int64))
        for i in tl.static_range(2):
            tl.store(at + i, tl.load(address + i, mask=there, other=0))


@triton.jit
def send(address, at, there, FAST: tl.constexpr):
    """Copies 16 bytes of each lane's own from the program's room to global memory, where `there` says so."""
    if FAST:
        tl.inline_asm_elementwise(
            "{ .reg .pred %e; .reg .b64 %x, %y; setp.ne.s32 %e, $3, 0; "
            "@%e ld.shared.v2.b64 {%x, %y}, [$2]; @%e st.global.v2.b64 [$1], {%x, %y}; mov.u32 $0, 0; }",
            "=r,l,r,r",
            [address.to(tl.uint64), at, there.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        at = at.to(tl.pointer_type(tl.int64))
        for i in tl.static_range(2):
            tl.store(address + i, tl.load(at + i), mask=there)


@triton.jit
def put_zero(at, FAST: tl.constexpr):
    """Writes the zero that `unknown_zero` reads, 4 bytes of each lane's own."""
    if FAST:
        tl.inline_asm_elementwise(
            "st.volatile.shared.b32 [$1], 0; mov.u32 $0, 0;", "=r,r", [at], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def unknown_zero(at, FAST: tl.constexpr):
    """Zero, which the compiler cannot know to be. What is computed with it in a loop is computed there, each time: kept
    in registers over all of the loop, it would drive out what is needed more often, and come back from far away."""
    if FAST:
        return tl.inline_asm_elementwise(
            "ld.volatile.shared.b32 $0, [$1];", "=r,r", [at], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        return tl.zeros([LANES], dtype=tl.int32)


@triton.jit
def take(at, turn, COUNT: tl.constexpr, FAST: tl.constexpr):
    """COUNT bfloat16, 2 or 4, of the program's room, in float32: the i-th is that at i ^ turn, with a turn for each
    lane."""
    far = turn // 2
    odd = turn % 2 == 1
    values = ()
    for i in tl.static_range(COUNT // 2):
        if FAST:
            word = tl.inline_asm_elementwise(
                "ld.shared.b32 $0, [$1];", "=r,r", [at + (far ^ i) * 4], dtype=tl.int32, is_pure=False, pack=1
            )
            for j in tl.static_range(2):
                bits = tl.inline_asm_elementwise(  # the lower or the upper half, above zeros
                    "prmt.b32 $0, $1, 0, $2;",
                    "=r,r,r",
                    [word, tl.where(odd, 0x1044, 0x3244) if j == 1 else tl.where(odd, 0x3244, 0x1044)],
                    dtype=tl.int32,
                    is_pure=True,
                    pack=1,
                )
                values = values + (bits.to(tl.float32, bitcast=True),)
        else:
            low, high = unpack_word(tl.load(at + (far ^ i)), tl.bfloat16)
            values = values + (tl.where(odd, high, low), tl.where(odd, low, high))
    return values


@triton.jit
def put_element(at, i, value, mask, FAST: tl.constexpr):
    """Writes the value to the i-th bfloat16 from `at` on in the program's room, where the mask says so."""
    value = value.to(tl.bfloat16)
    if FAST:
        tl.inline_asm_elementwise(
            "{ .reg .pred %e; setp.ne.s32 %e, $3, 0; @%e st.shared.b16 [$1], $2; mov.u32 $0, 0; }",
            "=r,r,h,r",
            [at + i * 2, value.to(tl.int16, bitcast=True), mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(at.to(tl.pointer_type(tl.bfloat16)) + i, value, mask=mask)


@triton.jit
def put_tile(at, tile, COUNT: tl.constexpr, NARROW: tl.constexpr, FAST: tl.constexpr):
    """Keeps the COUNT values of a tile in the program's room; with NARROW in bfloat16."""
    words = ()
    if NARROW:
        for i in tl.static_range(COUNT // 2):
            words = words + (pack_word(tile[2 * i], tile[2 * i + 1], FAST),)
    else:
        for i in tl.static_range(COUNT):
            words = words + (tile[i].to(tl.uint32, bitcast=True),)
    WORDS: tl.constexpr = COUNT // 2 if NARROW else COUNT
    ROW: tl.constexpr = WORDS if WORDS < 4 else 4
    for i in tl.static_range(0, WORDS, ROW):
        if FAST:
            row = (at + i * (LANES * 4),)
            for j in tl.static_range(ROW):
                row = row + (words[i + j],)
            tl.inline_asm_elementwise(
                "st.shared.b32 [$1], $2; mov.u32 $0, 0;"
                if ROW == 1
                else (
                    "st.shared.v2.b32 [$1], {$2, $3}; mov.u32 $0, 0;"
                    if ROW == 2
                    else "st.shared.v4.b32 [$1], {$2, $3, $4, $5}; mov.u32 $0, 0;"
                ),
                "=r,r,r" if ROW == 1 else ("=r,r,r,r" if ROW == 2 else "=r,r,r,r,r,r"),
                row,
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        else:
            for j in tl.static_range(ROW):
                tl.store(at + (i * LANES + j), words[i + j].to(tl.int32, bitcast=True))


@triton.jit
def take_tile(at, COUNT: tl.constexpr, NARROW: tl.constexpr, FAST: tl.constexpr):
    """The values that the same thread has kept in its program's room."""
    WORDS: tl.constexpr = COUNT // 2 if NARROW else COUNT
    ROW: tl.constexpr = WORDS if WORDS < 4 else 4
    words = ()
    for i in tl.static_range(0, WORDS, ROW):
        if FAST:
            here = at + i * (LANES * 4)
            if ROW == 1:
                first = tl.inline_asm_elementwise(
                    "ld.shared.b32 $0, [$1];", "=r,r", [here], dtype=tl.int32, is_pure=False, pack=1
                )
                words = words + (first,)
            elif ROW == 2:
                first, second = tl.inline_asm_elementwise(
                    "ld.shared.v2.b32 {$0, $1}, [$2];",
                    "=r,=r,r",
                    [here],
                    dtype=(tl.int32, tl.int32),
                    is_pure=False,
                    pack=1,
                )
                words = words + (first, second)
            else:
                first, second, third, fourth = tl.inline_asm_elementwise(
                    "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];",
                    "=r,=r,=r,=r,r",
                    [here],
                    dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                    is_pure=False,
                    pack=1,
                )
                words = words + (first, second, third, fourth)
        else:
            for j in tl.static_range(ROW):
                words = words + (tl.load(at + (i * LANES + j)),)
    tile = ()
    for i in tl.static_range(WORDS):
        tile = tile + (unpack_word(words[i], tl.bfloat16) if NARROW else (words[i].to(tl.float32, bitcast=True),))
    return tile
