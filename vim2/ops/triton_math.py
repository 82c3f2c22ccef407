"""Arithmetic of the Triton kernels: powers of two and sigmoids, with NVIDIA's approximate instructions where FAST."""

import triton
import triton.language as tl

LANES = tl.constexpr(32)  # of a warp
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp2(x, FAST: tl.constexpr):
    # one instruction; without ftz three more guard it against denormals
    if FAST:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    e = exp2(x * -LOG2E, FAST)
    if FAST:  # division guards against denormals with many more instructions
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + e], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / (1.0 + e)
