"""Causal convolutions along sequences, and SiLU: the public function and the registered operator behind causal-conv1d's
kernels, `torch.ops.vim2.causal_conv_silu`, with fake, autograd and FLOP rules."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import compute_dtype, resolve_backend
from ..observers import wants_plain_form
from .operator import register_conv


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor, backend: str | None = None) -> Tensor:
    """SiLU of a depth-wise causal convolution: with w taps, the output at step s looks at steps s - w + 1 ... s, its
    last tap at s itself. Steps before the sequence are zero.

    PyTorch convolves in x's dtype, or in autocast's where that is on; causal-conv1d and Numba in float32.

    Args:
        x: Sequences, (n, steps, P), with any strides. Any floating dtype; weight and bias may have another.
        weight: (P, 1, w), as nn.Conv1d(P, P, w, groups=P) has it.
        bias: (P,).
        backend: "mamba_ssm" is causal-conv1d, see `vim2.ops.backend.resolve_backend`; "numba", for CPUs, has a form of
            its own, and PyTorch's is that of all others.

    Returns:
        (n, steps, P), contiguous, in x's dtype, also under autocast.

    Raises:
        ValueError: Shapes that do not fit together, no sequence at all, or an unknown backend.
        RuntimeError: A backend that is not there.
    """
    if x.dim() != 3 or x.numel() == 0:
        raise ValueError(f"x must be (n, steps, P) and not empty, got {tuple(x.shape)}.")
    features = x.shape[-1]
    if not _weight_fits(x.shape, weight.shape) or bias.shape != (features,):
        raise ValueError(
            f"weight and bias must be {(features, 1)} with any number of taps and {(features,)} for P = {features}, "
            f"got {tuple(weight.shape)} and {tuple(bias.shape)}."
        )
    taps = weight.shape[-1]
    backend = resolve_backend(backend, x, weight, bias, causal_taps=taps)
    if backend == "mamba_ssm":
        return convolve(x, weight, bias)
    if runs_in_numba(backend, x, weight, bias):
        return _convolve_numba(x, weight, bias)
    # 2-D and channels-last, as memory has them: PyTorch's 1-D form is slower on CPUs
    steps = F.pad(x, (0, 0, taps - 1, 0)).transpose(1, 2).unsqueeze(2)
    y = F.conv2d(steps, weight.to(x.dtype).unsqueeze(2), bias.to(x.dtype), groups=features)
    return F.silu(y.squeeze(2)).transpose(1, 2).to(x.dtype).contiguous()


def runs_in_numba(backend: str, *tensors: Tensor) -> bool:
    """Whether Numba's form is to convolve tensors: not float64 ones, which it does not know, nor where somebody looks
    for PyTorch's operators."""
    return backend == "numba" and compute_dtype(*tensors) == torch.float32 and not wants_plain_form()


def _kernels():
    from . import causal_conv1d

    return causal_conv1d


def numba_kernels():
    from . import numba_conv

    return numba_conv


def _flops(x_shape, weight_shape) -> int:
    """A multiplication and an addition a tap."""
    return 2 * weight_shape[-1] * math.prod(x_shape)


def _weight_fits(x_shape, weight_shape) -> bool:
    fits = len(x_shape) == 3 and len(weight_shape) == 3
    return fits and weight_shape[:2] == (x_shape[2], 1) and weight_shape[2] > 0


convolve = register_conv("causal_conv_silu", _kernels, tuple, _weight_fits, _flops)
_convolve_numba = register_conv("causal_conv_silu_numba", numba_kernels, tuple, _weight_fits, _flops)
