"""Triton's kernels compiled before they are first launched, many at a time.

A kernel is compiled where it is first launched: one after the other, which takes a model most of a minute on a new
machine. Which ones a model launches is found out by calling it. So it is called once with all launches left out, and
what it would have launched is compiled in threads. (Triton's passes and assemblers let other threads run.)
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from .backend import autocast_off
from .observers import is_autograd_observed, is_captured, is_elsewhere

MAX_THREADS = 16


def compile_ahead(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> None:
    """Compile what `function(*tensors)` launches and, where a gradient is wanted, what its backward pass does.

    Nothing else comes of it: results are thrown away, random numbers are as before, and no gradient is kept. The
    function must not change anything itself, such as a batch norm's statistics. Where this fails, it does so without a
    word, for the function will fail, too, and say why. Triton before 3.6 cannot do it: nothing is compiled ahead then.

    Args:
        function: It returns one tensor. Those that it uses without being given them, as a module's parameters, are
            among `tensors` if they want a gradient.
        tensors: On one GPU.
    """
    try:
        from triton import AsyncCompileMode
    except ImportError:  # before 3.5; from there to 3.6 the mode takes no ignore_errors, and fails below
        return
    from .triton_launch import INTERPRETED, has_hooks, notes

    gpus = [t.get_device() for t in tensors if t.is_cuda][:1]
    if INTERPRETED or has_hooks() or is_elsewhere(tensors) or is_captured(tensors):
        return
    if is_autograd_observed() or any(t._backward_hooks for t in tensors):  # they would see what is thrown away
        return
    threads = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), MAX_THREADS)
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # it would hold weights with this graph's history
    notes.compiles_only = True
    try:
        with (
            torch.random.fork_rng(gpus),
            torch.autograd.set_multithreading_enabled(False),  # this thread's launches are left out
            ThreadPoolExecutor(threads) as pool,
            AsyncCompileMode(_Loading(pool, gpus), ignore_errors=True),
        ):
            leaves = [t if t.is_leaf else t.detach().requires_grad_(t.requires_grad) for t in tensors]
            result = function(*leaves)
            wanted = [t for t in leaves if t.requires_grad]
            if result.requires_grad:
                with autocast_off(result):
                    torch.autograd.grad(result, wanted, torch.empty_like(result), allow_unused=True)
    except Exception:
        pass
    finally:
        notes.compiles_only = False
        torch.set_autocast_cache_enabled(cached)


class _Loading:
    """An executor whose kernels are also loaded to the GPU, with what launches them, by the thread that has compiled
    them."""

    def __init__(self, pool: ThreadPoolExecutor, gpus: Sequence[int]):
        self.pool = pool
        self.gpus = gpus

    def submit(self, compile_kernel: Callable) -> Future:
        def compile_and_load():
            kernel = compile_kernel()
            for gpu in self.gpus:
                with torch.cuda.device(gpu):
                    kernel.run  # noqa: B018
            return kernel

        return self.pool.submit(compile_and_load)
