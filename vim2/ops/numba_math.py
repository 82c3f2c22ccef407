"""What kernels for CPUs, compiled by Numba, share: how they are compiled, exponentials, numbers of threads.

Exponentials and logarithms are polynomials here, since calls into libm would not be vectorised; they are as accurate as
float32. What Numba keeps on disk of a kernel is compiled anew when the kernel's own file changes: touch those files
after a change here.
"""

import math
import pickle

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic

from .backend import note_numba

__all__ = ["FAST", "LOG2E", "exp2", "fma", "jit", "kernel", "threads_to_use"]

LOG2E = np.float32(1 / math.log(2))
# 2^f for |f| <= 1/2, 1 at 0, with the least maximal relative error (2e-9, by Lawson's iteration)
_EXP2 = (1.0, 0.6931472028551514, 0.24022647913622175, 0.05550332470912951)
_EXP2 += (0.009618437357889663, 0.0013398874505576273, 0.00015353362043456914)
_EXP2 = tuple(map(np.float32, _EXP2))
_WHOLE = np.float32(1.5 * 2**23 + 127)  # added to a number, leaves its nearest integer + 127 in the last bits

# Loops are compiled in two forms, by vectors and not, and addresses decide between them. To round alike in both, sums
# of products are fused where `fma` says so; the compiler may neither fuse others ("contract") nor reorder ("reassoc").
FAST = {"nsz"}
jit = numba.njit(fastmath=FAST, error_model="numpy", inline="always")


def kernel(function):
    """A function that is compiled when it is first called, and kept on disk for other processes where that works."""
    options = dict(fastmath=FAST, error_model="numpy", parallel=True)
    try:
        compiled = numba.njit(**options, cache=True)(function)
    except RuntimeError:  # there is no folder that can be written to
        return numba.njit(**options)(function)

    def call(*args):
        nonlocal compiled
        known = len(compiled.signatures)
        try:
            return compiled(*args)
        except (OSError, EOFError, pickle.PickleError):
            if len(compiled.signatures) == known:  # what is kept is damaged; else there is no room, and it is compiled
                compiled = numba.njit(**options)(function)
            return compiled(*args)

    return call


@intrinsic
def fma(context, a, b, c):
    """a b + c, rounded once; by software, and slow, on an x86 processor from before 2013."""

    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@jit
def exp2(x):
    """2^x, to one unit in the last place; 0 from x = -127 down, infinite from x = 127.5 up."""
    x = min(max(x, np.float32(-127.0)), np.float32(128.0))
    whole = x + _WHOLE
    f = x - (whole - _WHOLE)
    p = _EXP2[6]
    p = fma(p, f, _EXP2[5])
    p = fma(p, f, _EXP2[4])
    p = fma(p, f, _EXP2[3])
    p = fma(p, f, _EXP2[2])
    p = fma(p, f, _EXP2[1])
    p = fma(p, f, _EXP2[0])
    return p * np.int32(np.float32(whole).view(np.int32) << np.int32(23)).view(np.float32)


def threads_to_use() -> int:
    """PyTorch's number of threads, as far as Numba has as many."""
    note_numba()
    wanted = torch.get_num_threads()
    threads = min(wanted, numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(threads)
    if torch.get_num_threads() != wanted:  # Numba started its threads by the OpenMP that PyTorch uses, all that it may
        torch.set_num_threads(wanted)
    return threads
