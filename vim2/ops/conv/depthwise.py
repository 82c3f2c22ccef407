"""Depth-wise 3x3 convolution and SiLU on channels-last maps: the public function and the registered operator behind
its kernels, `torch.ops.vim2.depthwise_conv_silu`, with fake, autograd and FLOP rules."""

import math

import torch.nn.functional as F
from torch import Tensor

from ..backend import autocast_off, compute_dtype, resolve_backend
from ..operator import opaque_on_cpus
from ..replay import replayed
from .operator import ConvolvedHalf, register_conv, takes_halves


def depthwise_conv_silu(x: Tensor, weight: Tensor, bias: Tensor, backend: str | None = None) -> Tensor:
    """SiLU of the depth-wise 3x3 convolution with padding 1, computed in float32 (float64 if any input is).

    Args:
        x: Maps, (batch, H, W, E), with any strides; only where channels are not contiguous do kernels copy. Any
            floating dtype; weight and bias may have another.
        weight: (E, 1, 3, 3), as nn.Conv2d(E, E, 3, groups=E) has it.
        bias: (E,).
        backend: "triton", "torch" or "auto", see `vim2.ops.backend.resolve_backend`.

    Returns:
        (batch, H, W, E), contiguous, in x's dtype, also under autocast.

    Raises:
        ValueError: Shapes that do not fit together, an empty map, or an unknown backend.
        RuntimeError: A backend that is not there.
    """
    _check_arguments(x, weight, bias)
    if resolve_backend(backend, x, weight, bias) == "triton":
        return _convolve(x, weight, bias)
    return _depthwise_conv_silu_torch(x, weight, bias)


def depthwise_conv_silu_of_half(
    projected: Tensor, weight: Tensor, bias: Tensor, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Cut the rows of a projection (batch, H, W, 2 E) in halves: `depthwise_conv_silu` of the first, and the second as
    it is, each (batch, H, W, E). In eager training the gradients of both are written side by side (`vim2.ops.halves`).
    """
    value, gate = projected.chunk(2, dim=-1)
    if resolve_backend(backend, projected, weight, bias) == "triton" and takes_halves(projected, weight, bias):
        _check_arguments(value, weight, bias)
        return ConvolvedHalf.apply(_convolve.name, _kernels(), _as_it_is, projected, weight, bias)
    return depthwise_conv_silu(value, weight, bias, backend), gate


def _as_it_is(half: Tensor) -> Tensor:
    return half


def _check_arguments(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.dim() != 4 or x.numel() == 0:
        raise ValueError(f"x must be (batch, H, W, E) and not empty, got {tuple(x.shape)}.")
    channels = x.shape[-1]
    if not _weight_fits(x.shape, weight.shape) or bias.shape != (channels,):
        raise ValueError(
            f"weight and bias must be {(channels, 1, 3, 3)} and {(channels,)} for {channels} channels, "
            f"got {tuple(weight.shape)} and {tuple(bias.shape)}."
        )


@opaque_on_cpus("vim2::depthwise_conv_silu_torch", lambda x, *_: x.new_empty(x.shape))
def _depthwise_conv_silu_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    dtype = compute_dtype(x, weight, bias)
    with autocast_off(x):
        maps = x.permute(0, 3, 1, 2).to(dtype)
        if weight.stride(1) != 1:
            # the gradient that the convolution gives has the strides of channels last, at whose sight
            # DistributedDataParallel warns; behind these views it has the weight's own
            weight = weight.squeeze(1).unsqueeze(1)
        y = F.silu(F.conv2d(maps, weight.to(dtype), bias.to(dtype), padding=1, groups=maps.shape[1]))
    return y.permute(0, 2, 3, 1).to(x.dtype).contiguous()


def _kernels():
    from .triton import depthwise

    return depthwise


def _flops(x_shape, weight_shape) -> int:
    """Nine multiplications and additions an output, as PyTorch counts a convolution."""
    return 2 * 9 * math.prod(x_shape)


def _weight_fits(x_shape, weight_shape) -> bool:
    return len(x_shape) == 4 and weight_shape == (x_shape[3], 1, 3, 3)


_convolve = register_conv(
    "depthwise_conv_silu", _kernels, lambda x_shape: x_shape, _weight_fits, _flops, decorate=replayed
)
