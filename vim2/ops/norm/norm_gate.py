"""The gate of the mixers (arXiv 2403.19888, section 3): LayerNorm of the scan's output, times SiLU of the gate branch.

The operator `torch.ops.vim2.norm_gate` is opaque to torch.compile, torch.export, autocast and activation checkpointing,
and carries its own fake and autograd rules.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import autocast_dtype, compute_dtype, resolve_backend
from ..halves import room_of
from ..observers import is_observed
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


def norm_gate(
    y: Tensor,
    gate: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm(y) * SiLU(gate), the norm over the last axis; without a norm_weight, y * SiLU(gate).

    Args:
        y: (..., E), any floating dtype; or (..., G, K, P) with E = G P, the outputs of K directions in G groups of P
            channels, of which the sum over K is taken first.
        gate: (..., E); it may be a slice of wider rows, as half of a projection's output is. Of any floating dtype.
        norm_weight: (E,).
        norm_bias: (E,), with norm_weight only.
        eps: Added to the variance.
        backend: As for `selective_scan`.

    Returns:
        A contiguous tensor of gate's shape, in autocast's dtype where that is on, else in that of y and gate promoted.
        Arithmetic is float32 (float64 if any input is).

    Raises:
        ValueError: Shapes that do not fit together, norm_weight without norm_bias or the other way round.
        RuntimeError: A backend that is not there.
    """
    if not _gate_fits(y, gate):
        raise ValueError(
            f"y and gate must both be (..., E), or y (..., G, K, P) with E = G P, "
            f"got {tuple(y.shape)} and {tuple(gate.shape)}."
        )
    check_norm(norm_weight, norm_bias, gate.shape[-1])
    tensors = (y, gate) if norm_weight is None else (y, gate, norm_weight, norm_bias)
    dtype = autocast_dtype(y) or torch.promote_types(y.dtype, gate.dtype)
    if resolve_backend(backend, *tensors) == "triton":
        options = (float(eps), dtype, needs_backward(*tensors))
        return _norm_gate(y, gate, norm_weight, norm_bias, *options)[0]
    return _norm_gate_torch(y, gate, norm_weight, norm_bias, float(eps), dtype)


def _fake_norm_gate_torch(y, gate, norm_weight, norm_bias, eps, dtype):
    return gate.new_empty(gate.shape, dtype=dtype)


@opaque_on_cpus("vim2::norm_gate_torch", _fake_norm_gate_torch)
def _norm_gate_torch(
    y: Tensor, gate: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    compute = compute_dtype(*(t for t in (y, gate, norm_weight, norm_bias) if t is not None))
    per_direction = y.dim() > gate.dim()
    y = y.to(compute)
    if per_direction:
        y = y.sum(-2).flatten(-2)
    if norm_weight is not None:
        y = F.layer_norm(y, y.shape[-1:], norm_weight.to(compute), norm_bias.to(compute), eps)
    return (y * F.silu(gate.to(compute))).to(dtype)


def _gate_fits(y: Tensor, gate: Tensor) -> bool:
    """Whether the gate is of y's shape, or of its shape summed over directions."""
    width = y.shape[-3] * y.shape[-1] if y.dim() == gate.dim() + 2 else y.shape[-1:].numel()
    return gate.dim() > 0 and gate.shape == (*y.shape[: gate.dim() - 1], width)


def _check(y, gate, norm_weight, norm_bias, *options):
    fits = _gate_fits(y, gate) and is_affine(norm_weight, norm_bias, gate.shape[-1])
    require_fit(fits, "norm_gate", y, gate, norm_weight, norm_bias)


@register_operator("vim2::norm_gate", _check, decorate=replayed)
def _norm_gate(
    y: Tensor,
    gate: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    keeps: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """In Triton. Returns also, for the backward pass, if it `keeps` that, mean and reciprocal deviation of every row,
    (2, ...), float32, where there is a norm, and y's sum over directions, where there are some."""
    from .triton.norm_gate import norm_gate_triton

    return norm_gate_triton(y, gate, norm_weight, norm_bias, eps, dtype, keeps)


@_norm_gate.register_fake
def _(y, gate, norm_weight, norm_bias, eps, dtype, keeps):
    sums = keeps and y.dim() > gate.dim()
    total = y.new_empty(gate.shape) if sums else y.new_empty(0, dtype=torch.float32)
    out = gate.new_empty(gate.shape, dtype=dtype)
    return out, fake_statistics(out, keeps and norm_weight is not None), total


def _check_backward(grad, y, gate, norm_weight, norm_bias, statistics):
    fits = grad.shape == y.shape == gate.shape and is_affine(norm_weight, norm_bias, gate.shape[-1])
    fits = fits and has_statistics(statistics, norm_weight, gate.shape[:-1])
    require_fit(fits, "norm_gate_backward", grad, y, gate, norm_weight, norm_bias, statistics)


@register_operator("vim2::norm_gate_backward", _check_backward, decorate=replayed)
def _norm_gate_backward(
    grad: Tensor,
    y: Tensor,
    gate: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    statistics: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for y, which is (..., E) here, gate, and norm_weight and norm_bias together, (2, E) in float32, (2, 0)
    without a norm."""
    from .triton.norm_gate import norm_gate_triton_backward

    return norm_gate_triton_backward(grad, y, gate, norm_weight, norm_bias, statistics)


@_norm_gate_backward.register_fake
def _(grad, y, gate, norm_weight, norm_bias, statistics):
    return y.new_empty(y.shape), gate.new_empty(gate.shape), fake_norm_gradient(statistics, norm_weight)


def _setup_context(ctx, inputs, output):
    y, gate, *norm, _, _, _ = inputs
    _, statistics, total = output
    ctx.summed = y.shape[-3:] if y.dim() > gate.dim() else None
    ctx.room = None if is_observed() else room_of(gate)
    ctx.save_for_backward(total if ctx.summed else y, gate, *norm, statistics)


def _backward(ctx, grad, *_):
    refuse_second_derivatives()
    y, gate, *norm, statistics = ctx.saved_tensors
    tensors = (grad, y, gate, *norm, statistics)
    if ctx.room is None or is_observed():
        grad_y, grad_gate, grad_norm = _norm_gate_backward(*tensors)
    else:
        from .triton.norm_gate import norm_gate_triton_backward

        grad_y, grad_gate, grad_norm = norm_gate_triton_backward(*tensors, ctx.room.second_half(gate))
    if ctx.summed:  # one gradient for all directions
        groups, directions, patch = ctx.summed
        grad_y = grad_y.unflatten(-1, (groups, 1, patch)).expand(*grad_y.shape[:-1], groups, directions, patch)
    return grad_y, grad_gate, *split_norm_gradient(grad_norm, norm_dtypes(*norm)), None, None, None


_norm_gate.register_autograd(_backward, _setup_context)
