"""Convolutions along sequences in both directions, and SiLU: the public function and the registered operator behind
its kernels, `torch.ops.vim2.directional_conv_silu`, with fake, autograd and FLOP rules."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .backend import autocast_off, resolve_backend
from .operator import operator
from .reference import compute_dtype


def directional_conv_silu(x: Tensor, weight: Tensor, bias: Tensor, backend: str | None = None) -> Tensor:
    """SiLU of two depth-wise convolutions, one causal and one anti-causal, in float32 (float64 if any input is).

    With w taps, the first output at step s looks at steps s - w + 1 ... s, its last tap at s itself; the second is its
    mirror image and looks at s ... s + w - 1, its last tap at s, too. Steps outside the sequence are zero.

    Args:
        x: Sequences, (n, steps, P), with any strides; only where features are not contiguous do kernels copy. Any
            floating dtype; weight and bias may have another.
        weight: (2P, 1, w), as nn.Conv1d(P, 2P, w, groups=P) has it: output channel 2p + k is direction k of feature p.
        bias: (2P,).
        backend: "triton", "torch" or "auto", see `vim2.ops.backend.resolve_backend`.

    Returns:
        (n, steps, 2, P), contiguous, in x's dtype, also under autocast.

    Raises:
        ValueError: Shapes that do not fit together, no sequence at all, or an unknown backend.
        RuntimeError: A backend that is not there.
    """
    if x.dim() != 3 or x.numel() == 0:
        raise ValueError(f"x must be (n, steps, P) and not empty, got {tuple(x.shape)}.")
    outputs = 2 * x.shape[-1]
    if weight.dim() != 3 or weight.shape[:2] != (outputs, 1) or weight.shape[2] < 1 or bias.shape != (outputs,):
        raise ValueError(
            f"weight and bias must be {(outputs, 1)} with any number of taps and {(outputs,)} for P = {outputs // 2}, "
            f"got {tuple(weight.shape)} and {tuple(bias.shape)}."
        )
    if resolve_backend(backend, x, weight, bias) == "triton":
        return torch.ops.vim2.directional_conv_silu(x, weight, bias)
    return _directional_conv_silu_torch(x, weight, bias)


def _directional_conv_silu_torch(x, weight, bias):
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


@operator("vim2::directional_conv_silu")
def _directional_conv_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from .triton_directional_conv import directional_conv_silu_triton

    return directional_conv_silu_triton(x, weight, bias)


@torch.library.register_fake("vim2::directional_conv_silu")
def _(x, weight, bias):
    sequences, steps, features = x.shape
    return x.new_empty(sequences, steps, 2, features)


@torch.library.custom_op("vim2::directional_conv_silu_backward", mutates_args=())
def _directional_conv_silu_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, weight and bias; what SiLU was applied to is computed again."""
    from .triton_directional_conv import directional_conv_silu_triton_backward

    return directional_conv_silu_triton_backward(grad_y, x, weight, bias)


@_directional_conv_silu_backward.register_fake
def _(grad_y, x, weight, bias):
    return tuple(t.new_empty(t.shape) for t in (x, weight, bias))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_y):
    return torch.ops.vim2.directional_conv_silu_backward(grad_y, *ctx.saved_tensors)


torch.library.register_autograd("vim2::directional_conv_silu", _backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.vim2.directional_conv_silu)
def directional_conv_silu_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """A multiplication and an addition a tap, for two outputs a feature."""
    sequences, steps, features = x_shape
    return 2 * 2 * weight_shape[-1] * sequences * steps * features


@register_flop_formula(torch.ops.vim2.directional_conv_silu_backward)
def directional_conv_silu_backward_flops(grad_shape, x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """The convolutions' two adjoints; recomputing them is not counted."""
    return 2 * directional_conv_silu_flops(x_shape, weight_shape)
