"""What the Triton kernels share."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret

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


_compiled = {}


def launch(kernel: triton.JITFunction, grid: tuple[int, ...], arguments: Sequence, **options) -> None:
    """kernel[grid](*arguments, **options) on the tensors' device, at half of what that costs the host.

    Triton works out at every launch which of a kernel's compiled forms fits the arguments. Which one did is remembered
    here, for tensors by type, alignment and device, for everything else by value.

    Args:
        arguments: The kernel's first ones: tensors, tuples of tensors, None and numbers.
        options: Its others, in their order, all of them constants, and Triton's own.
    """
    first = next(a for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device_of(first):
        if INTERPRETED:
            kernel[grid](*arguments, **options)
            return
        key = (id(kernel), first.get_device(), *map(_kind, arguments), *options.values())
        if key in _compiled:
            compiled, constants = _compiled[key]
            compiled[(*grid, 1, 1)](*arguments, *constants)
            return
        if len(_compiled) > 10000:  # as when every image has a size of its own
            _compiled.clear()
        constants = [options[name] for name in kernel.arg_names[len(arguments) :]]
        _compiled[key] = kernel[grid](*arguments, **options), constants


def _kind(argument):
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return tuple(map(_kind, argument)) if isinstance(argument, tuple) else argument
