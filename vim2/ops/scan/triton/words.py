"""Single elements and words of several, to and from memory: by PTX where FAST."""

import triton
import triton.language as tl


@triton.jit
def load_word(address, mask, COUNT: tl.constexpr):
    """COUNT elements of 16 bits, two or four, as one word from each address, or zero where the mask says so: by what
    Triton makes of `tl.load`.

    For all that Triton knows as a load or store, it walks through the whole kernel to find the best layout: in the
    backward scan that was nine tenths of the time to compile, and vectors of 32 lanes have but one layout.
    """
    return tl.inline_asm_elementwise(
        "{ .reg .pred %e; setp.ne.s32 %e, $2, 0; mov.u64 $0, 0; @%e ld.global.b64 $0, [$1]; }"
        if COUNT == 4
        else "{ .reg .pred %e; setp.ne.s32 %e, $2, 0; mov.u32 $0, 0; @%e ld.global.b32 $0, [$1]; }",
        "=l,l,r" if COUNT == 4 else "=r,l,r",
        [address.to(tl.uint64), mask.to(tl.int32)],
        dtype=tl.int64 if COUNT == 4 else tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def load_element(address, mask, FAST: tl.constexpr):
    """An element from each address, or zero where the mask says so; as `load_word` where FAST."""
    ELEMENT: tl.constexpr = address.dtype.element_ty
    BITS: tl.constexpr = ELEMENT.primitive_bitwidth
    if FAST and (BITS == 16 or BITS == 32):
        bits = tl.inline_asm_elementwise(
            f"{{ .reg .pred %e; setp.ne.s32 %e, $2, 0; mov.b{BITS} $0, 0; @%e ld.global.b{BITS} $0, [$1]; }}",
            "=h,l,r" if BITS == 16 else "=f,l,r",
            [address.to(tl.uint64), mask.to(tl.int32)],
            dtype=tl.int16 if BITS == 16 else tl.float32,
            is_pure=False,
            pack=1,
        )
        return bits.to(ELEMENT, bitcast=True)
    else:
        return tl.load(address, mask=mask, other=0.0)


@triton.jit
def load_bits(address, mask, FAST: tl.constexpr):
    """As `load_element`, but one of 16 bits stays in a register of 32 where FAST, for `element_of`.

    Of elements in registers of 16, the assembler packs two to a register at the end of a loop, and waits there for
    loads whose results are wanted in the next round.
    """
    if FAST and address.dtype.element_ty.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise(
            "{ .reg .pred %e; setp.ne.s32 %e, $2, 0; mov.b32 $0, 0; @%e ld.global.b16 $0, [$1]; }",
            "=r,l,r",
            [address.to(tl.uint64), mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        return load_element(address, mask, FAST)


@triton.jit
def store_word(address, word, mask):
    """A word of 32 or 64 bits to each address where the mask says so; see `load_word`."""
    tl.inline_asm_elementwise(
        "{ .reg .pred %e; setp.ne.s32 %e, $3, 0; @%e st.global.b64 [$1], $2; mov.u32 $0, 0; }"
        if word.dtype == tl.int64
        else "{ .reg .pred %e; setp.ne.s32 %e, $3, 0; @%e st.global.b32 [$1], $2; mov.u32 $0, 0; }",
        "=r,l,l,r" if word.dtype == tl.int64 else "=r,l,r,r",
        [address.to(tl.uint64), word, mask.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def pack_word(low, high, FAST: tl.constexpr):
    """Two elements as bfloat16 in a word of 32 bits: `unpack_word` has them again."""
    if FAST:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        low = low.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
        return low | (high.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32) << 16)


@triton.jit
def unpack_word(word, ELEMENT: tl.constexpr):
    """The two elements of 16 bits of a word of 32, in float32."""
    if ELEMENT.is_bf16():
        return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
    else:
        low = word.to(tl.int16).to(ELEMENT, bitcast=True).to(tl.float32)
        return low, (word >> 16).to(tl.int16).to(ELEMENT, bitcast=True).to(tl.float32)


@triton.jit
def element_of(bits, ELEMENT: tl.constexpr):
    """What `load_bits` has loaded, in float32."""
    if bits.dtype != tl.int32:
        return bits.to(tl.float32)
    elif ELEMENT.is_bf16():
        return (bits << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.int16).to(ELEMENT, bitcast=True).to(tl.float32)
