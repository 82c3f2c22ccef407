"""Causal convolutions by the CUDA kernels of causal-conv1d (1.6 or later), where that package is installed: to compare
with. `causal.py` says what is computed.

causal-conv1d takes (batch, channels, steps) in either of two layouts: channels together, in whole groups of 8, or
steps together. What lies in neither is copied. Weights go in as float32. Their gradients are added up atomically,
unless `torch.use_deterministic_algorithms(True)` is on, which its kernels obey.
"""

import causal_conv1d
import torch
from causal_conv1d.cpp_functions import causal_conv1d_bwd_function, causal_conv1d_fwd_function
from torch import Tensor

GROUP = 8  # channels that lie side by side
ALIGNMENT = 16  # bytes that a thread loads at once
MAX_OFFSET = 2**32  # of a sequence's first element, which the kernels work out in 32 bits

if tuple(map(int, causal_conv1d.__version__.split(".")[:2])) < (1, 6):
    raise RuntimeError(
        f"The mamba_ssm backend needs causal-conv1d 1.6 or later, and {causal_conv1d.__version__} is installed: "
        "pip install --no-build-isolation --upgrade causal-conv1d."
    )


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU of the convolution, (n, steps, P) -> (n, steps, P), with weight (P, 1, w) and bias (P,)."""
    parts = x.split(_sequences_a_call(x))
    if len(parts) > 1:
        return torch.cat([convolve(part, weight, bias) for part in parts])
    y = causal_conv1d_fwd_function(_channels_first(x), *_parameters(weight, bias), None, None, None, True)
    return y.transpose(1, 2).contiguous()


def convolve_backward(grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for x, weight and bias, each in its input's dtype."""
    sequences = min(map(_sequences_a_call, (grad_y, x)))
    if sequences < len(x):
        parts = zip(grad_y.split(sequences), x.split(sequences), strict=True)
        grads_x, *others = zip(*(convolve_backward(*part, weight.float(), bias.float()) for part in parts), strict=True)
        grad_weight, grad_bias = (sum(grads) for grads in others)
    else:
        laid_out = (_channels_first(x), *_parameters(weight, bias), _channels_first(grad_y.to(x.dtype)))
        options = (None, None, None, None, False, True)  # no state at either end, no memory for the result; SiLU
        grad_x, grad_weight, grad_bias, _ = causal_conv1d_bwd_function(*laid_out, *options)
        grads_x = (grad_x.transpose(1, 2),)
    grad_x = torch.cat(grads_x) if len(grads_x) > 1 else grads_x[0].contiguous()
    return grad_x, grad_weight.view(weight.shape).to(weight.dtype), grad_bias.to(bias.dtype)


def _sequences_a_call(t: Tensor) -> int:
    return max(1, (MAX_OFFSET - 1) // max(t.stride(0), t.shape[1] * t.shape[2]))


def _channels_first(t: Tensor) -> Tensor:
    """(n, steps, P) -> (n, P, steps) in a layout that the kernels know, which depends on the sizes alone: channels lie
    together where they are whole groups and there are steps between which they can lie, else steps do."""
    if t.shape[2] % GROUP:
        return torch.empty_like(t.mT, memory_format=torch.contiguous_format).copy_(t.mT)
    in_groups = t.stride(2) == 1 and t.stride(1) > 1 and t.stride(0) % GROUP == 0 and t.stride(1) % GROUP == 0
    if not in_groups or t.data_ptr() % ALIGNMENT:
        t = torch.empty_like(t, memory_format=torch.contiguous_format).copy_(t)
    return t.mT


def _parameters(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    # Copies in any case: what PyTorch calls contiguous may have any stride along an axis of one element, and the
    # kernels want 1.
    return tuple(t.float().clone(memory_format=torch.contiguous_format) for t in (weight.squeeze(1), bias))
