"""Weighted averaging of earlier features (arXiv 2403.19888, section 3.3), alone and with the LayerNorm that follows.

The operator `torch.ops.vim2.weighted_average` is opaque to torch.compile, torch.export, autocast and activation
checkpointing, and carries its own fake and autograd rules. It keeps the features themselves for the backward pass,
which other mixers keep as well, and never their sum.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import autocast_dtype, compute_dtype, resolve_backend
from ..operator import needs_backward, opaque_on_cpus, refuse_second_derivatives, register_operator, require_fit
from ..replay import replayed
from .affine import (
    check_norm,
    fake_statistics,
    has_statistics,
    is_affine,
    norm_dtypes,
    split_norm_gradient,
)


def weighted_average(features: Sequence[Tensor], weight: Tensor, backend: str | None = None) -> Tensor:
    """The sum of features, each times its own scalar: sum_i weight[i] * features[i].

    Args:
        features: n tensors of one shape, of any floating dtypes.
        weight: (n,), unconstrained (the paper's name is kept although the weights need not sum to one).
        backend: As for `selective_scan`.

    Returns:
        A tensor of the features' shape. Its dtype is that of weight and features promoted, so that under autocast
        the sum is kept in the parameters' float32.

    Raises:
        ValueError: If there are not as many features as weights, or their shapes differ.
        RuntimeError: A backend that is not there.
    """
    _check_features(features, weight)
    if resolve_backend(backend, *features, weight) == "triton" and features[0].dim() > 0:
        return _weighted_average(features, weight, None, None, 0.0, _promoted(features, weight), False)[0]
    return _weighted_average_torch(list(features), weight)


def weighted_average_norm(
    features: Sequence[Tensor],
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm over the last axis of the features' weighted average: the input of every mixer.

    Args:
        features: n tensors (..., C), of any floating dtypes.
        weight: (n,), as for `weighted_average`.
        norm_weight: (C,).
        norm_bias: (C,).
        eps: Added to the variance.
        backend: As for `selective_scan`.

    Returns:
        A contiguous tensor of the features' shape, in autocast's dtype where that is on (a Linear follows), else in
        that of weight and features promoted. Sum and norm are float32 (float64 if any input is).

    Raises:
        ValueError: Shapes that do not fit together.
        RuntimeError: A backend that is not there.
    """
    dtype = _check_and_promote(features, weight, norm_weight, norm_bias)
    tensors = (*features, weight, norm_weight, norm_bias)
    if resolve_backend(backend, *tensors) == "triton":
        keeps = needs_backward(*tensors)
        return _weighted_average(features, weight, norm_weight, norm_bias, float(eps), dtype, keeps)[0]
    return _weighted_average_norm_torch(list(features), weight, norm_weight, norm_bias, float(eps), dtype)


def weighted_average_norm_handing_on(
    features: Sequence[Tensor],
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """`weighted_average_norm`, and the features, all of which want a gradient, to be used from there on in place of
    those that were given: in Triton the backward kernel adds the gradients of their later uses to its own, where
    autograd would take a launch for each, and read and write them once more."""
    tensors = (*features, weight, norm_weight, norm_bias)
    if resolve_backend(backend, *tensors) != "triton":
        return weighted_average_norm(features, weight, norm_weight, norm_bias, eps, backend), *features
    dtype = _check_and_promote(features, weight, norm_weight, norm_bias)
    return _HandingOn.apply(float(eps), dtype, weight, norm_weight, norm_bias, *features)


class _HandingOn(torch.autograd.Function):
    """`_weighted_average` with a norm, which hands its features on."""

    @staticmethod
    def forward(ctx, eps, dtype, weight, norm_weight, norm_bias, *features):
        y, statistics = _weighted_average.function(features, weight, norm_weight, norm_bias, eps, dtype, True)
        ctx.set_materialize_grads(False)
        ctx.operator = "vim2::weighted_average"
        ctx.dtypes = norm_dtypes(norm_weight, norm_bias)
        ctx.save_for_backward(
            *features, weight, norm_weight, statistics
        )  # in the operator's order, see `ConvolvedHalf`
        return y, *features

    @staticmethod
    def backward(ctx, grad, *others):
        refuse_second_derivatives()
        from .triton.weighted_average import weighted_average_triton_backward

        if grad is None:  # nobody used the result
            return *(None,) * 5, *others
        *features, weight, norm_weight, statistics = ctx.saved_tensors
        if any(other is not None for other in others):
            others = [torch.zeros_like(f) if other is None else other for other, f in zip(others, features)]
        else:
            others = ()
        gradients = weighted_average_triton_backward(grad, features, weight, norm_weight, statistics, others)
        return None, None, *_split(gradients, weight, ctx.dtypes)


def _split(gradients: Sequence[Tensor], weight: Tensor, dtypes: Sequence[torch.dtype | None]) -> list[Tensor | None]:
    """Gradients of weight, the norm's, and all features, from what `_weighted_average_backward` returns."""
    *grads, sums = gradients
    width = 0 if dtypes[0] is None else grads[0].shape[-1]
    grad_weight, *grad_norm = sums.split((len(grads), width, width))
    return [grad_weight.to(weight.dtype), *split_norm_gradient(grad_norm, dtypes), *grads]


def _fake_weighted_average_norm_torch(features, weight, norm_weight, norm_bias, eps, dtype):
    return features[0].new_empty(features[0].shape, dtype=dtype)


@opaque_on_cpus("vim2::weighted_average_norm_torch", _fake_weighted_average_norm_torch)
def _weighted_average_norm_torch(
    features: Sequence[Tensor], weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    compute = compute_dtype(*features, weight, norm_weight, norm_bias)
    total = _sum(features, weight.to(compute)).to(compute)
    return F.layer_norm(total, total.shape[-1:], norm_weight.to(compute), norm_bias.to(compute), eps).to(dtype)


def _check_features(features, weight):
    if not features or weight.dim() != 1 or len(features) != len(weight):
        raise ValueError(
            f"{len(features)} features do not fit {weight.numel()} weights: give a vector with one for each."
        )
    if not _are_alike(features):
        raise ValueError(f"Features must be of one shape, got {', '.join(str(tuple(f.shape)) for f in features)}.")


def _check_and_promote(features, weight, norm_weight, norm_bias) -> torch.dtype:
    """The dtype of the norm of a weighted average, of arguments that fit together."""
    _check_features(features, weight)
    if features[0].dim() == 0:
        raise ValueError("Features must be (..., C), got scalars.")
    check_norm(norm_weight, norm_bias, features[0].shape[-1])
    return autocast_dtype(weight) or _promoted(features, weight)


def _are_alike(features: Sequence[Tensor]) -> bool:
    """Whether there are some, all of one shape."""
    return len(features) > 0 and all(f.shape == features[0].shape for f in features)


def _promoted(features: Sequence[Tensor], weight: Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, (f.dtype for f in features), weight.dtype)


def _fake_weighted_average_torch(features, weight):
    return features[0].new_empty(features[0].shape, dtype=_promoted(features, weight))


@opaque_on_cpus("vim2::weighted_average_torch", _fake_weighted_average_torch)
def _weighted_average_torch(features: Sequence[Tensor], weight: Tensor) -> Tensor:
    return _sum(features, weight)


def _sum(features: Sequence[Tensor], weight: Tensor) -> Tensor:
    # reshaped to the features' rank, a weight takes part in type promotion, which a 0-d tensor would not
    scalars = weight.reshape(-1, *(1,) * features[0].dim()).unbind()
    total = features[0] * scalars[0]
    for feature, scalar in zip(features[1:], scalars[1:]):
        total = total + feature * scalar
    return total


def _check(features, weight, norm_weight, norm_bias, *options):
    fits = _are_alike(features) and weight.shape == (len(features),)
    fits = fits and is_affine(norm_weight, norm_bias, features[0].shape[-1])
    require_fit(fits, "weighted_average", *features, weight, norm_weight, norm_bias)


@register_operator("vim2::weighted_average", _check, decorate=replayed)
def _weighted_average(
    features: Sequence[Tensor],
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    keeps: bool,
) -> tuple[Tensor, Tensor]:
    """In Triton. Returns also mean and reciprocal deviation of every row, (2, ...), float32, if there is a norm and it
    `keeps` them."""
    from .triton.weighted_average import weighted_average_triton

    return weighted_average_triton(list(features), weight, norm_weight, norm_bias, eps, dtype, keeps)


@_weighted_average.register_fake
def _(features, weight, norm_weight, norm_bias, eps, dtype, keeps):
    x = features[0]
    return x.new_empty(x.shape, dtype=dtype), fake_statistics(x, keeps and norm_weight is not None)


def _check_backward(grad, features, weight, norm_weight, statistics):
    fits = _are_alike([grad, *features]) and weight.shape == (len(features),)
    fits = fits and (norm_weight is None or norm_weight.shape == grad.shape[-1:])
    fits = fits and has_statistics(statistics, norm_weight, grad.shape[:-1])
    require_fit(fits, "weighted_average_backward", grad, *features, weight, norm_weight, statistics)


@register_operator("vim2::weighted_average_backward", _check_backward, decorate=replayed)
def _weighted_average_backward(
    grad: Tensor,
    features: Sequence[Tensor],
    weight: Tensor,
    norm_weight: Tensor | None,
    statistics: Tensor,
) -> list[Tensor]:
    """Gradients for every feature, and for weight, norm_weight and norm_bias together, (n + 2 C,) in float32, (n,)
    without a norm."""
    from .triton.weighted_average import weighted_average_triton_backward

    return weighted_average_triton_backward(grad, list(features), weight, norm_weight, statistics)


@_weighted_average_backward.register_fake
def _(grad, features, weight, norm_weight, statistics):
    width = 0 if norm_weight is None else grad.shape[-1]
    sums = weight.new_empty(len(features) + 2 * width, dtype=torch.float32)
    return [*(t.new_empty(t.shape) for t in features), sums]


def _setup_context(ctx, inputs, output):
    features, weight, *norm = inputs[:4]
    ctx.n, ctx.dtypes = len(features), norm_dtypes(*norm)
    ctx.save_for_backward(*features, weight, norm[0], output[1])


def _backward(ctx, grad, _):
    refuse_second_derivatives()
    saved = ctx.saved_tensors  # once: checkpointing lets them be unpacked but once
    features, (weight, norm_weight, statistics) = saved[: ctx.n], saved[ctx.n :]
    gradients = _weighted_average_backward(grad, features, weight, norm_weight, statistics)
    gradients = _split(gradients, weight, ctx.dtypes)
    return gradients[3:], *gradients[:3], None, None, None


_weighted_average.register_autograd(_backward, _setup_context)
