"""How a depth-wise convolution with SiLU is registered: a forward and a backward operator with their fake, autograd and
FLOP rules."""

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.flop_counter import register_flop_formula

from ..halves import Room
from ..observers import is_observed
from ..operator import Operator, needs_backward, refuse_second_derivatives, register_operator, require_fit


def register_conv(
    name: str,
    kernels: Callable[[], ModuleType],
    output_shape: Callable[[Sequence[int]], Sequence[int]],
    weight_fits: Callable[[Sequence[int], Sequence[int]], bool],
    flops: Callable[[Sequence[int], Sequence[int]], int],
    **options,
) -> Operator:
    """The operator `torch.ops.vim2.<name>` of x, weight and bias; `<name>_backward` computes again what
    SiLU was applied to.

    Args:
        name: The forward operator's, without the namespace.
        kernels: Imports the module whose `convolve(x, weight, bias)` is the forward pass, and whose
            `convolve_backward(grad_y, x, weight, bias)` returns the gradients for x, weight and bias.
        output_shape: From x's shape to the output's.
        weight_fits: Whether a weight of a shape fits x of another.
        flops: From the shapes of x and weight, two a multiply-add. The backward pass counts as the convolution's two
            adjoints, without what it computes again.
        options: Options of both operators, see `vim2.ops.operator.Operator`.
    """

    def check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
        fits = x.numel() > 0 and weight_fits(x.shape, weight.shape) and bias.shape == weight.shape[:1]
        require_fit(fits, name, x, weight, bias)

    def check_backward(grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
        check(x, weight, bias)
        require_fit(grad_y.shape == tuple(output_shape(x.shape)), f"{name}_backward", grad_y, x)

    @register_operator(f"vim2::{name}", check, **options)
    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return kernels().convolve(x, weight, bias)

    @run.register_fake
    def _(x, weight, bias):
        return x.new_empty(output_shape(x.shape))

    @register_operator(f"vim2::{name}_backward", check_backward, **options)
    def run_backward(grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return kernels().convolve_backward(grad_y, x, weight, bias)

    @run_backward.register_fake
    def _(grad_y, x, weight, bias):
        return tuple(t.new_empty(t.shape) for t in (x, weight, bias))

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def differentiate(ctx, grad_y):
        refuse_second_derivatives()
        return run_backward(grad_y, *ctx.saved_tensors)

    run.register_autograd(differentiate, setup_context)

    @register_flop_formula(getattr(torch.ops.vim2, name))
    def _(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
        return flops(x_shape, weight_shape)

    @register_flop_formula(getattr(torch.ops.vim2, f"{name}_backward"))
    def _(grad_shape, x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
        return 2 * flops(x_shape, weight_shape)

    return run


def takes_halves(projected: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether `ConvolvedHalf` may stand for a convolution of Triton's: a backward pass will follow, and nobody wants to
    see operators called."""
    tensors = projected, weight, bias
    plain = all(t.__class__ in (Tensor, Parameter) and not t.is_meta for t in tensors)
    return plain and needs_backward(*tensors) and not is_observed()


class ConvolvedHalf(torch.autograd.Function):
    """Cuts the rows of a projection in halves: the first is convolved, and the second stays as it is.

    The gradients of both are written side by side, as the projection's, if a `norm_gate` has made the second's.
    """

    @staticmethod
    def forward(ctx, operator, kernels, as_input, projected, weight, bias):
        """
        Args:
            operator: The name of the operator that this stands for.
            kernels: As those of `register_conv`, imported; the backward pass also takes where to write x's gradient.
            as_input: From the first half of rows to a view of it that kernels take.
            projected: (..., 2 E).
        """
        ctx.set_materialize_grads(False)
        ctx.kernels, ctx.as_input, ctx.room, ctx.operator = kernels, as_input, Room(), operator
        ctx.shape = projected.shape
        width = projected.shape[-1] // 2
        x = as_input(projected[..., :width])
        ctx.save_for_backward(x, weight, bias)  # what the operator saves: a checkpoint's second pass may go either way
        return kernels.convolve(x, weight, bias), projected[..., width:]

    @staticmethod
    def backward(ctx, grad_y, grad_gate):
        refuse_second_derivatives()
        x, weight, bias = ctx.saved_tensors
        width = ctx.shape[-1] // 2
        whole = ctx.room.take(grad_gate)
        if whole is None:
            whole = torch.empty(ctx.shape, dtype=x.dtype, device=x.device)
            whole[..., width:] = 0 if grad_gate is None else grad_gate
        if grad_y is None:
            whole[..., :width] = 0
            return None, None, None, whole, None, None
        grad_x = ctx.as_input(whole[..., :width])
        _, grad_weight, grad_bias = ctx.kernels.convolve_backward(grad_y, x, weight, bias, grad_x)
        return None, None, None, whole, grad_weight, grad_bias
