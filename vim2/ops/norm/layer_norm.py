"""LayerNorm of rows, and of the 2 x 2 patches that patch merging joins, which is never copied together.

The operator `torch.ops.vim2.layer_norm` is opaque to torch.compile, torch.export, autocast and activation
checkpointing, and carries its own fake and autograd rules.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import autocast_dtype, compute_dtype, resolve_backend
from ..operator import needs_backward, opaque_on_cpus, refuse_second_derivatives, register_operator, require_fit
from ..replay import replayed
from .affine import (
    check_norm,
    fake_norm_gradient,
    fake_statistics,
    has_statistics,
    is_affine,
    norm_dtypes,
    split_norm_gradient,
)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, backend: str | None = None) -> Tensor:
    """LayerNorm over the last axis, in the dtype that the Linear behind it wants: PyTorch's puts out float32 under
    autocast, to be converted in a step of its own.

    Args:
        x: (..., C), of any floating dtype.
        weight: (C,).
        bias: (C,).
        eps: Added to the variance.
        backend: As for `selective_scan`.

    Returns:
        A contiguous tensor of x's shape, in autocast's dtype where that is on, else in x's, whatever that of the
        parameters; of these mixtures PyTorch's takes half-precision x with float32 parameters alone, and on CPUs only.
        Arithmetic is float32 (float64 if any input is).

    Raises:
        ValueError: Shapes that do not fit together.
        RuntimeError: A backend that is not there.
    """
    if x.dim() == 0:
        raise ValueError("x must be (..., C), got a scalar.")
    return _norm(x, weight, bias, eps, 1, backend)


def patch_merging_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, backend: str | None = None
) -> Tensor:
    """LayerNorm of 2 x 2 patches, as Swin's patch merging has it: a patch is the channels of its upper left, lower
    left, upper right and lower right position, in this order, zero where it sticks out of the map.

    Args:
        x: Maps (batch, H, W, C), of any floating dtype.
        weight: (4 C,).
        bias: (4 C,).
        eps: Added to the variance.
        backend: As for `selective_scan`.

    Returns:
        (batch, H / 2, W / 2, 4 C), halves rounded up, contiguous, with dtypes as for `layer_norm`.

    Raises:
        ValueError: Shapes that do not fit together.
        RuntimeError: A backend that is not there.
    """
    if x.dim() != 4:
        raise ValueError(f"x must be (batch, H, W, C), got {tuple(x.shape)}.")
    return _norm(x, weight, bias, eps, 2, backend)


def _norm(x, weight, bias, eps, patch, backend):
    check_norm(weight, bias, x.shape[-1] * patch * patch)
    dtype = autocast_dtype(x) or x.dtype
    if resolve_backend(backend, x, weight, bias) == "triton":
        return _layer_norm(x, weight, bias, float(eps), dtype, patch, needs_backward(x, weight, bias))[0]
    return _layer_norm_torch(x, weight, bias, float(eps), dtype, patch)


def _fake_layer_norm_torch(x, weight, bias, eps, dtype, patch):
    return x.new_empty(_shape(x, patch), dtype=dtype)


@opaque_on_cpus("vim2::layer_norm_torch", _fake_layer_norm_torch)
def _layer_norm_torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, patch: int) -> Tensor:
    compute = compute_dtype(x, weight, bias)
    x = x.to(compute)
    if patch == 2:
        # by the halves, not by remainders, which compilers and torch.export could not simplify with dynamic sizes
        _, rows, columns, _ = _shape(x, 2)
        x = F.pad(x, (0, 0, 0, 2 * columns - x.shape[2], 0, 2 * rows - x.shape[1]))
        x = x.reshape(x.shape[0], rows, 2, columns, 2, x.shape[3]).permute(0, 1, 3, 4, 2, 5).flatten(3)
    return F.layer_norm(x, x.shape[-1:], weight.to(compute), bias.to(compute), eps).to(dtype)


def _shape(x: Tensor, patch: int) -> list[int]:
    """The shape of the result."""
    if patch == 1:
        return list(x.shape)
    batch, height, width, channels = x.shape
    return [batch, (height + patch - 1) // patch, (width + patch - 1) // patch, patch * patch * channels]


def _check(x, weight, bias, eps, dtype, patch, keeps):
    fits = x.dim() == 4 or (patch == 1 and x.dim() > 0)
    require_fit(fits and is_affine(weight, bias, _shape(x, patch)[-1]), "layer_norm", x, weight, bias, patch=patch)


@register_operator("vim2::layer_norm", _check, decorate=replayed)
def _layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, patch: int, keeps: bool
) -> tuple[Tensor, Tensor]:
    """In Triton. Returns also mean and reciprocal deviation of every row, (2, ...), float32, if it `keeps` them."""
    from .triton.layer_norm import layer_norm_triton

    return layer_norm_triton(x, weight, bias, eps, dtype, patch, _shape(x, patch), keeps)


@_layer_norm.register_fake
def _(x, weight, bias, eps, dtype, patch, keeps):
    out = x.new_empty(_shape(x, patch), dtype=dtype)
    return out, fake_statistics(out, keeps)


def _check_backward(grad, x, weight, statistics, patch):
    shape = _shape(x, patch)
    fits = list(grad.shape) == shape and weight.shape == (shape[-1],) and has_statistics(statistics, weight, shape[:-1])
    require_fit(fits, "layer_norm_backward", grad, x, weight, statistics, patch=patch)


@register_operator("vim2::layer_norm_backward", _check_backward, decorate=replayed)
def _layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, statistics: Tensor, patch: int
) -> tuple[Tensor, Tensor]:
    """Gradients for x, and for weight and bias together, (2, width) in float32."""
    from .triton.layer_norm import layer_norm_triton_backward

    return layer_norm_triton_backward(grad, x, weight, statistics, patch)


@_layer_norm_backward.register_fake
def _(grad, x, weight, statistics, patch):
    return x.new_empty(x.shape), fake_norm_gradient(statistics, weight)


def _setup_context(ctx, inputs, output):
    x, weight, bias, _, _, ctx.patch, _ = inputs
    ctx.dtypes = norm_dtypes(weight, bias)
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx, grad, _):
    refuse_second_derivatives()
    x, weight, statistics = ctx.saved_tensors
    grad_x, grad_norm = _layer_norm_backward(grad, x, weight, statistics, ctx.patch)
    return grad_x, *split_norm_gradient(grad_norm, ctx.dtypes), None, None, None, None


_layer_norm.register_autograd(_backward, _setup_context)
