"""Who looks on while an operator is called, and therefore wants it called in the ordinary way.

Compilers, exporters, tracers, dispatch modes, transforms, profilers and hooks of autograd each want to see something
else. Where nobody looks on, an operator is called without PyTorch's dispatcher (`vim2.ops.operator`), and whole layers
are replayed without the Python between their kernels (`vim2.ops.replay`).
"""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext


class _Ours(threading.local):
    """What this package has itself turned on in a thread, and what is therefore no observer.

    Attributes:
        modes: How many dispatch modes of this package are on.
        profiler: Whether the profiler that is on asks for nothing but what the GPU is given to do.
    """

    modes = 0
    profiler = False


ours = _Ours()


def is_observed() -> bool:
    """Whether somebody wants to see operators called: a compiler, a tracer, another's mode or profiler, a transform,
    or forward-mode derivatives."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > ours.modes
        or (torch._C._len_torch_function_stack() > 0 and _does_a_function_mode_look())
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or (torch._C._autograd._profiler_enabled() and not ours.profiler)
        or forward_ad._current_level >= 0
    )


def _does_a_function_mode_look() -> bool:
    """Whether a function mode is on that is more than `torch.set_default_device`, in which there is nothing to see."""
    modes = map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))
    return any(mode.__class__ is not DeviceContext for mode in modes)


def is_compiling_to_run() -> bool:
    """Whether torch.compile is at work, and not torch.export, whose programs must run without this package.

    (`torch.compiler.is_exporting` of PyTorch 2.11 is true while torch.compile works, too.)
    """
    return torch.compiler.is_compiling() and not torch.compiler._is_exporting_flag


def wants_plain_form() -> bool:
    """Whether somebody wants to look inside operators, at PyTorch's own: torch.export, whose programs must run without
    this package, a tracer, a transform, or forward-mode derivatives."""
    return (
        (torch.compiler.is_compiling() and torch.compiler._is_exporting_flag)
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def saves_for_others() -> bool:
    """Whether hooks get what autograd saves between the passes, as checkpoints without reentrance set them, which want
    the same tensors saved in each of their forward passes. A compiler sees to that itself, and is not asked."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def is_autograd_observed() -> bool:
    """Whether autograd is asked for what one node for many operators cannot give: each tensor that is saved, or the
    operator in whose gradient an error arose."""
    return saves_for_others() or torch.is_anomaly_enabled()


def is_captured(tensors: Sequence[Tensor | None]) -> bool:
    """Whether what is done with these tensors becomes part of a CUDA graph, whose memory nothing else may use."""
    return any(t is not None and t.is_cuda for t in tensors) and torch.cuda.is_current_stream_capturing()


def is_elsewhere(tensors: Sequence[Tensor | None]) -> bool:
    """Whether tensors are on another GPU than the current one."""
    first = next((t for t in tensors if t is not None), None)
    return first is not None and first.is_cuda and first.get_device() != torch._C._cuda_getDevice()
