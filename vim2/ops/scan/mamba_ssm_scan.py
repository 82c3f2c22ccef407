"""The selective scan by the CUDA kernels of mamba-ssm 2.3, `selective_scan_cuda`, where that package is installed: to
compare with. `reference.py` says what is computed.

mamba-ssm scans (batch, channels, L) from the left to the right and knows no directions. So every direction's walk is
copied out of the maps, the directions stand side by side as groups of channels, and the results are copied back. Its
backward kernels add parts of gradients atomically: two runs agree to rounding only.
"""

import warnings

import selective_scan_cuda
import torch

from .chunks import MAMBA_CHUNK
from .orders import scan_positions


def _walks(t, orders, height, width):
    """(batch, L, K, X), or (batch, L, X) for all, -> (batch, K, X, L), contiguous, every direction in its own order."""
    shared = t.dim() == 3
    if set(orders) == {"forward"}:
        t = t.unsqueeze(2).expand(-1, -1, len(orders), -1) if shared else t
        return t.permute(0, 2, 3, 1).contiguous()
    walks = t.new_empty(t.shape[0], len(orders), t.shape[-1], t.shape[1])
    for k, order in enumerate(orders):
        positions = scan_positions(order, height, width, t.device)
        walks[:, k] = (t[:, positions] if shared else t[:, positions, k]).mT
    return walks


def _maps(t, orders, height, width):
    """The inverse: (batch, K, X, L) -> (batch, L, K, X)."""
    if set(orders) == {"forward"}:
        return t.permute(0, 3, 1, 2).contiguous()
    maps = t.new_empty(t.shape[0], t.shape[3], t.shape[1], t.shape[2])
    for k, order in enumerate(orders):
        maps[:, scan_positions(order, height, width, t.device), k] = t[:, k].mT
    return maps


def kernel_arguments(u, delta, A, B, C, D, delta_bias, orders, height, width):
    """The kernels' tensors, activations in one dtype, parameters in float32: u and delta (batch, K * E, L),
    A (K * E, N), B and C (batch, K, N, L), D (K * E,), no gate, delta_bias (K * E,)."""
    dtype = torch.promote_types(torch.promote_types(u.dtype, delta.dtype), torch.promote_types(B.dtype, C.dtype))
    if dtype == torch.float64:
        raise ValueError("mamba-ssm's kernels know no float64; use backend='torch'.")
    u, delta, B, C = (_walks(t.to(dtype), orders, height, width) for t in (u, delta, B, C))
    A, D, delta_bias = (t.float().flatten(0, 1).contiguous() for t in (A, D, delta_bias))
    return u.flatten(1, 2), delta.flatten(1, 2), A, B, C, D, None, delta_bias


def selective_scan_mamba(u, delta, A, B, C, D, delta_bias, *, delta_softplus, orders, height, width, chunk, with_last):
    """y (batch, L, K, E), the last states, or (0,), and the states before every `chunk` steps but the first,
    (batch, K, chunks - 1, N, E), where chunk is MAMBA_CHUNK or the whole length."""
    directions, features, _ = A.shape
    arguments = kernel_arguments(u, delta, A, B, C, D, delta_bias, orders, height, width)
    y, ends = selective_scan_cuda.fwd(*arguments, delta_softplus)
    # of every chunk of channel k * E + e: the product of its decays and the state at its end, for n = 0, 1, ...
    states = ends[..., 1::2].unflatten(1, (directions, features))
    last = states[:, :, :, -1] if with_last else states.new_empty(0)
    starts = states[:, :, :, : -(-delta.shape[1] // chunk) - 1].permute(0, 1, 3, 4, 2)
    last, starts = (t.clone(memory_format=torch.contiguous_format) for t in (last, starts))
    return _maps(y.unflatten(1, (directions, features)), orders, height, width), last, starts


def selective_scan_mamba_backward(
    grad_y, starts, u, delta, A, B, C, D, delta_bias, *, delta_softplus, orders, height, width
):
    """Gradients for u, delta, A, B, C, D and delta_bias, each in its input's dtype. The last states have none here."""
    if torch.are_deterministic_algorithms_enabled():
        message = "mamba-ssm's scan has no deterministic backward pass; use backend='triton' or 'torch'."
        if not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError(message)
        warnings.warn(message, stacklevel=2)
    batch, length = delta.shape[:2]
    directions, features, n = A.shape
    arguments = kernel_arguments(u, delta, A, B, C, D, delta_bias, orders, height, width)
    grad = _walks(grad_y.to(arguments[0].dtype), orders, height, width).flatten(1, 2)
    ends = None  # one chunk does not need them
    if length > MAMBA_CHUNK:
        ends = starts.new_zeros(batch, directions * features, starts.shape[2] + 1, 2 * n)
        ends[:, :, :-1, 1::2] = starts.permute(0, 1, 4, 2, 3).flatten(1, 2)
    gu, gdelta, gA, gB, gC, gD, gbias = selective_scan_cuda.bwd(
        *arguments, grad, ends, None, None, delta_softplus, False
    )
    gu, gdelta = (_maps(t.unflatten(1, (directions, features)), orders, height, width) for t in (gu, gdelta))
    gB, gC = (_maps(t, orders, height, width) for t in (gB, gC))
    return (
        (gu if u.dim() == 4 else gu.sum(2)).to(u.dtype),
        gdelta.to(delta.dtype),
        gA.view(A.shape).to(A.dtype),
        gB.to(B.dtype),
        gC.to(C.dtype),
        gD.view(D.shape).to(D.dtype),
        gbias.view(D.shape).to(delta_bias.dtype),
    )
