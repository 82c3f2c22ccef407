"""How Triton kernels are launched, and what they want of the tensors that they are given."""

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

INTERPRETED = triton.knobs.runtime.interpret  # kernels run in Python, on the CPU
MAX_LAUNCHES = 4096  # remembered for a kernel: every image may have a size of its own


class Form(NamedTuple):
    """A compiled kernel, and what its launcher wants first."""

    run: Callable
    function: int
    metadata: tuple


class _Notes(threading.local):
    """What this thread's launches do besides, or instead of, launching kernels.

    Attributes:
        take: Who notes launches down (`vim2.ops.notebook`): called after each with the `Launch`, its tensors, and the
            form of the kernel that they took, or None in Triton's interpreter.
        compiles_only: Whether kernels are compiled, and not launched (`vim2.ops.ahead`).
    """

    take: Callable[["Launch", tuple, Form | None], None] | None = None
    compiles_only: bool = False


notes = _Notes()


class Launch:
    """The launch of a kernel, with everything settled but its tensors.

    At every launch Triton works out which of a kernel's compiled forms fits the arguments, calls hooks, and asks the
    driver about each address. Here the form is remembered by the tensors' types, alignment and device, hooks are called
    only where a tool has set some, and addresses are known to be good, which costs the host a fraction of that.

    Args:
        kernel: Its arguments are tensors (also tuples of them, and None), then numbers, then constants.
        grid: Programs along one to three axes.
        numbers: All of them, in their order.
        options: The constants by name, and Triton's own options.
    """

    def __init__(self, kernel: triton.JITFunction, grid: Sequence[int], numbers: Sequence[int | float], **options):
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.numbers = numbers
        self.options = options
        constants = [options[name] for name in kernel.arg_names if name in options]
        self.settled = (*numbers, *constants)
        self.compiled = {}

    def __call__(self, *tensors: Tensor | tuple[Tensor, ...] | None) -> None:
        if notes.compiles_only:
            self.kernel.run(*tensors, *self.numbers, grid=self.grid, warmup=True, **self.options)
            return
        form = self.launch(*tensors)
        if notes.take:
            notes.take(self, tensors, form)

    def launch(self, *tensors: Tensor | tuple[Tensor, ...] | None) -> Form | None:
        """Launch, and tell nobody. Returns the form of the kernel that the tensors took, or None in Triton's
        interpreter."""
        if INTERPRETED:
            with _disable_current_modes():  # the interpreter works with tensors of its own
                self.kernel[self.grid](*tensors, *self.numbers, **self.options)
            return None
        key, addresses, device, misaligned = [], [], None, 0
        for t in tensors:
            if t is None:
                key.append(None)
                addresses.append(None)
                continue
            if t.__class__ is tuple:
                address = tuple([each.data_ptr() for each in t])
                key.extend([each.dtype for each in t])
                for one in address:
                    misaligned |= one
                t = t[0]
            else:
                address = t.data_ptr()
                key.append(t.dtype)
                misaligned |= address
            addresses.append(address)
            device = t.get_device()
        key.append(device)
        if misaligned % 16:
            key.append(tuple([_alignment(address) for address in addresses]))
        key = tuple(key)
        with nullcontext() if device == torch.cuda.current_device() else torch.cuda.device(device):
            form = self.compiled.get(key)
            if form is None or has_hooks():
                compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.options)
                form = self.compiled[key] = Form(compiled.run, compiled.function, compiled.packed_metadata)
                return form
            run, function, metadata = form
            stream = torch._C._cuda_getCurrentRawStream(device)
            run(*self.grid, stream, function, metadata, None, None, None, *addresses, *self.settled)  # no hooks
            return form


def _alignment(address: int | tuple[int, ...] | None) -> bool | tuple[bool, ...] | None:
    """Whether 16 divides an address, which lets a kernel read whole words."""
    if isinstance(address, tuple):
        return tuple(map(_alignment, address))
    return address if address is None else address % 16 == 0


def has_hooks() -> bool:
    """Whether a tool, such as Triton's profiler, wants to see launches. (Hooks come in chains; in older versions of
    Triton there is one of each.)"""
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class Layout(NamedTuple):
    """How a tensor lies in memory, which decides how a kernel reads it.

    Attributes:
        shape: As the tensor's.
        stride: As the tensor's, in elements.
        size: Bytes of an element.
        address: The first element's, modulo 16.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    size: int
    address: int


def layout(t: Tensor) -> Layout:
    return Layout(t.shape, t.stride(), t.itemsize, t.data_ptr() % 16)


def last_axis_contiguous(*tensors: Tensor) -> list[Tensor]:
    """The tensors, copied where neighbours along the last axis are not neighbours in memory."""
    return [t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in tensors]


def column_block(width: int) -> int:
    """Columns that a program takes of rows this wide: a power of 2 from 16 to 256 that leaves as little as possible of
    the last block empty."""
    return min(max(width & -width, 16), 256)
