"""Depth-wise convolutions along sequences, and SiLU, for CPUs, compiled by Numba: K = 1 causal one of each feature, or
K = 2, a causal and an anti-causal one.

Features are the vector lanes. Both passes go over a sequence once; the backward pass convolves again.
"""

import numba
import numpy as np
import torch
from torch import Tensor

from ..numba_math import LOG2E, exp2, fma, jit, kernel, threads_to_use

PARTS = 64  # of the sequences, each with its own sums for weight and bias: as many, however many threads there are
STEPS = 128  # that are summed in float32; the sums of these are added up in float64


@jit
def _convolve(out, x, weight, bias, s, k):
    """The convolution at step s of x (L, P), in direction k by weight (w, P) and bias (P,)."""
    taps = weight.shape[0]
    for e in range(out.shape[0]):
        out[e] = bias[e]
    for j in range(taps):
        p = s + (taps - 1 - j if k == 1 else j + 1 - taps)
        if p >= 0 and p < x.shape[0]:
            row, w = x[p], weight[j]
            for e in range(out.shape[0]):
                out[e] = fma(row[e], w[e], out[e])


@jit
def _sigmoid(z):
    return np.float32(1) / (np.float32(1) + exp2(-z * LOG2E))


@kernel
def _forward(x, weight, bias, y, threads):
    """x (n, L, P), weight (K, w, P), bias (K, P), y (n, L, K, P)."""
    sequences, length, directions, features = y.shape
    for worker in numba.prange(threads):
        for i in range(worker, sequences, threads):
            for s in range(length):
                for k in range(directions):
                    out = y[i, s, k]
                    _convolve(out, x[i], weight[k], bias[k], s, k)
                    for e in range(features):
                        out[e] = out[e] * _sigmoid(out[e])


@kernel
def _backward(gy, x, weight, bias, gx, gweight, gbias, threads):
    """Gradients; gx is added to, and gweight (parts, K, w, P) and gbias (parts, K, P), float64, too."""
    sequences, length, directions, features = gy.shape
    parts, _, taps, _ = gweight.shape
    for worker in numba.prange(threads):
        gz = np.empty(features, np.float32)
        gw = np.empty((directions, taps, features), np.float32)
        gb = np.empty((directions, features), np.float32)
        for part in range(worker, parts, threads):
            for i in range(part, sequences, parts):
                for first in range(0, length, STEPS):
                    gw[:] = 0
                    gb[:] = 0
                    for s in range(first, min(first + STEPS, length)):
                        for k in range(directions):
                            _convolve(gz, x[i], weight[k], bias[k], s, k)
                            g, b = gy[i, s, k], gb[k]
                            for e in range(features):
                                z = gz[e]
                                sigmoid = _sigmoid(z)
                                # sigmoid first: z (1 - sigmoid) times 0 is 0 however large z is
                                gz[e] = g[e] * fma(sigmoid * z, np.float32(1) - sigmoid, sigmoid)
                                b[e] += gz[e]
                            for j in range(taps):
                                p = s + (taps - 1 - j if k == 1 else j + 1 - taps)
                                if p >= 0 and p < length:
                                    row, to, w, sums = x[i, p], gx[i, p], weight[k, j], gw[k, j]
                                    for e in range(features):
                                        sums[e] = fma(row[e], gz[e], sums[e])
                                        to[e] = fma(w[e], gz[e], to[e])
                    for k in range(directions):
                        for e in range(features):
                            gbias[part, k, e] += gb[k, e]
                        for j in range(taps):
                            for e in range(features):
                                gweight[part, k, j, e] += gw[k, j, e]


def _arrays(x: Tensor, weight: Tensor, bias: Tensor) -> list[np.ndarray]:
    """x, the weight as (K, w, P) and the bias as (K, P); copies, where x is not contiguous or of another dtype."""
    features = x.shape[-1]
    by_direction = weight.detach().float().reshape(features, -1, weight.shape[-1]).permute(1, 2, 0).contiguous()
    biases = bias.detach().float().view(features, -1).t().clone(memory_format=torch.contiguous_format)
    return [x.detach().float().contiguous().numpy(), by_direction.numpy(), biases.numpy()]


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU of the convolutions of x, (n, L, P), by weight (K P, 1, w) and bias (K P,), whose output channel K p + k is
    direction k of feature p.

    Returns:
        (n, L, P) for K = 1, (n, L, 2, P) for K = 2, in x's dtype, computed in float32.
    """
    sequences, length, features = x.shape
    arrays = _arrays(x, weight, bias)
    y = torch.empty(sequences, length, len(arrays[2]), features)
    _forward(*arrays, y.numpy(), threads_to_use())
    return (y if y.shape[2] > 1 else y.squeeze(2)).to(x.dtype)


def convolve_backward(grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias, in their dtypes."""
    arrays = _arrays(x, weight, bias)
    directions, taps, features = arrays[1].shape
    grad_y = grad_y.detach().float().contiguous().view(*x.shape[:2], directions, features)
    parts = min(PARTS, len(x))
    grad_x = torch.zeros(x.shape)
    grad_weight = torch.zeros(parts, directions, taps, features, dtype=torch.float64)
    grad_bias = torch.zeros(parts, directions, features, dtype=torch.float64)
    outputs = [t.numpy() for t in (grad_x, grad_weight, grad_bias)]
    _backward(grad_y.numpy(), *arrays, *outputs, threads_to_use())
    return (
        grad_x.to(x.dtype),
        grad_weight.sum(0).permute(2, 0, 1).reshape(weight.shape).to(weight.dtype),
        grad_bias.sum(0).t().reshape(bias.shape).to(bias.dtype),
    )
