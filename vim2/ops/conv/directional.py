"""Convolutions along sequences in both directions, and SiLU: the public function and the registered operator behind
its kernels, `torch.ops.vim2.directional_conv_silu`, with fake, autograd and FLOP rules."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import autocast_off, compute_dtype, resolve_backend
from ..operator import opaque_on_cpus
from ..replay import replayed
from .causal import convolve as convolve_causally
from .causal import numba_kernels, runs_in_numba
from .operator import ConvolvedHalf, register_conv, takes_halves


def directional_conv_silu(x: Tensor, weight: Tensor, bias: Tensor, backend: str | None = None) -> Tensor:
    """SiLU of two depth-wise convolutions, one causal and one anti-causal, in float32 (float64 if any input is).

    With w taps, the first output at step s looks at steps s - w + 1 ... s, its last tap at s itself; the second is its
    mirror image and looks at s ... s + w - 1, its last tap at s, too. Steps outside the sequence are zero.

    Args:
        x: Sequences, (n, steps, P), with any strides; only where features are not contiguous do kernels copy. Any
            floating dtype; weight and bias may have another.
        weight: (2P, 1, w), as nn.Conv1d(P, 2P, w, groups=P) has it: output channel 2p + k is direction k of feature p.
        bias: (2P,).
        backend: "triton", "numba", "torch", "mamba_ssm", which is causal-conv1d, or "auto", see
            `vim2.ops.backend.resolve_backend`.

    Returns:
        (n, steps, 2, P), contiguous, in x's dtype, also under autocast.

    Raises:
        ValueError: Shapes that do not fit together, no sequence at all, or an unknown backend.
        RuntimeError: A backend that is not there.
    """
    _check_arguments(x, weight, bias)
    backend = resolve_backend(backend, x, weight, bias, causal_taps=weight.shape[-1])
    if backend == "triton":
        return _convolve(x, weight, bias)
    if backend == "mamba_ssm":
        return _directional_conv_silu_causal(x, weight, bias)
    if runs_in_numba(backend, x, weight, bias):
        return _convolve_numba(x, weight, bias)
    return _directional_conv_silu_torch(x, weight, bias)


def directional_conv_silu_of_half(
    projected: Tensor, weight: Tensor, bias: Tensor, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Cut the rows of a projection (..., 2 E) in halves: `directional_conv_silu` of the first, each of whose rows is a
    sequence of E / P steps, (rows, E / P, 2, P), and the second as it is, (..., E). In eager training the gradients of
    both are written side by side (`vim2.ops.halves`)."""
    value, gate = projected.chunk(2, dim=-1)
    as_sequences = functools.partial(_as_sequences, features=weight.shape[0] // 2)
    x = as_sequences(value)
    fast = resolve_backend(backend, projected, weight, bias, causal_taps=weight.shape[-1]) == "triton"
    if fast and takes_halves(projected, weight, bias):
        _check_arguments(x, weight, bias)
        return ConvolvedHalf.apply(_convolve.name, _kernels(), as_sequences, projected, weight, bias)
    return directional_conv_silu(x, weight, bias, backend), gate


def _as_sequences(half: Tensor, features: int) -> Tensor:
    """(..., E) -> (rows, E / P, P)."""
    return half.unflatten(-1, (-1, features)).flatten(0, -3)


def _check_arguments(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.dim() != 3 or x.numel() == 0:
        raise ValueError(f"x must be (n, steps, P) and not empty, got {tuple(x.shape)}.")
    outputs = 2 * x.shape[-1]
    if not _weight_fits(x.shape, weight.shape) or bias.shape != (outputs,):
        raise ValueError(
            f"weight and bias must be {(outputs, 1)} with any number of taps and {(outputs,)} for P = {outputs // 2}, "
            f"got {tuple(weight.shape)} and {tuple(bias.shape)}."
        )


def _directional_conv_silu_causal(x, weight, bias):
    """Each direction as a causal convolution of its own, the second on a copy of the sequences from their ends, whose
    results are copied back: what causal-conv1d asks for."""
    forward = convolve_causally(x, weight[0::2], bias[0::2])
    backward = convolve_causally(x.flip(1), weight[1::2], bias[1::2])
    return torch.stack((forward, backward.flip(1)), dim=2)


@opaque_on_cpus("vim2::directional_conv_silu_torch", lambda x, *_: x.new_empty(_output_shape(x.shape)))
def _directional_conv_silu_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Both directions run as one convolution whose kernels are zero on the other side."""
    dtype = compute_dtype(x, weight, bias)
    features, width = x.shape[-1], weight.shape[-1]
    forward, backward = weight.to(dtype).unflatten(0, (features, 2)).unbind(1)
    kernel = torch.stack((F.pad(forward, (0, width - 1)), F.pad(backward.flip(-1), (width - 1, 0))), dim=1)
    with autocast_off(x):
        # 2-D and channels-last, as memory has them: PyTorch's 1-D form takes up to 8 times as long on a CPU
        steps = x.transpose(1, 2).unsqueeze(2).to(dtype).contiguous(memory_format=torch.channels_last)
        kernel = kernel.flatten(0, 1).unsqueeze(2)
        y = F.silu(F.conv2d(steps, kernel, bias.to(dtype), padding=(0, width - 1), groups=features)).squeeze(2)
    return y.unflatten(1, (features, 2)).permute(0, 3, 2, 1).to(x.dtype).contiguous()


def _kernels():
    from .triton import directional

    return directional


def _output_shape(x_shape) -> tuple[int, ...]:
    sequences, steps, features = x_shape
    return sequences, steps, 2, features


def _flops(x_shape, weight_shape) -> int:
    """A multiplication and an addition a tap, for two outputs a feature."""
    return 2 * 2 * weight_shape[-1] * math.prod(x_shape)


def _weight_fits(x_shape, weight_shape) -> bool:
    fits = len(x_shape) == 3 and len(weight_shape) == 3
    return fits and weight_shape[:2] == (2 * x_shape[2], 1) and weight_shape[2] > 0


_convolve = register_conv("directional_conv_silu", _kernels, _output_shape, _weight_fits, _flops, decorate=replayed)
_convolve_numba = register_conv("directional_conv_silu_numba", numba_kernels, _output_shape, _weight_fits, _flops)
