"""How Triton kernels are launched, and what they want of the tensors that they are given."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret  # kernels run in Python, on the CPU

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


def last_axis_contiguous(*tensors: Tensor) -> list[Tensor]:
    """The tensors, copied where neighbours along the last axis are not neighbours in memory."""
    return [t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in tensors]


def column_block(width: int) -> int:
    """Columns that a program takes of rows this wide: a power of 2 from 16 to 256 that leaves as little as possible of
    the last block empty."""
    return min(max(width & -width, 16), 256)
