"""The scan in PyTorch's own operators: `torch.ops.vim2.selective_scan` for programs that run without this package.

Its recurrence (see `vim2.ops.selective_scan`) is PyTorch's `scan` of one step at a time, over all directions, batch and
states at once, as in `vim2.export.onnx_scan`. Compilers make a loop of it, whose length may be dynamic.
"""

import torch
import torch.nn.functional as F
from torch import SymInt, Tensor
from torch._higher_order_ops.scan import scan_op

from ..ops.backend import compute_dtype
from ..ops.scan.operands import Call, Operands
from ..ops.scan.orders import ORDERS, walk

__all__ = ["in_full", "selective_scan"]


def in_full(operands: Operands, delta_softplus: bool) -> tuple[Tensor, ...]:
    """The input, (batch, L, K or 1, E), the step sizes, (batch, L, K, E), and A, B, C and D as operands have them, in
    the dtype of the arithmetic."""
    u, delta, A, B, C, D, bias = operands.with_full_delta()
    # the product of a low-rank factor comes permuted, and to compare its strides, tracing would guard against batches
    # of 1: torch.export.load(...).module() refused them
    delta = delta.contiguous()
    dtype = compute_dtype(u, delta, A, B, C)
    u, delta, A, B, C, D, bias = (t.to(dtype) for t in (u, delta, A, B, C, D, bias))
    delta = delta + bias
    return u.unsqueeze(2) if u.dim() == 3 else u, F.softplus(delta) if delta_softplus else delta, A, B, C, D


def selective_scan(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """For `ExportedProgram.run_decompositions`, with the arguments and results of the registered operator.

    Arguments are those of `vim2.ops.scan.operands.Call`, operands first. States and decays are float32, float64 where
    any input is. No states are kept for a backward pass.
    """
    call = Call.of(arguments)
    u, orders, height, width = call.operands.u, call.orders, call.height, call.width
    x, dt, A, B, C, D = in_full(call.operands, call.delta_softplus)
    directions, features, states = A.shape

    def steps_of(field: Tensor) -> Tensor:
        """(batch, L, K, X) -> (L, K, batch, X), each direction in the order of its steps."""
        field = field.permute(1, 2, 0, 3)
        return torch.stack([walk(field[:, k], ORDERS[i], height, width) for k, i in enumerate(orders)], 1)

    def step(h: Tensor, dt: Tensor, x: Tensor, B: Tensor, C: Tensor, A: Tensor, *sizes: int) -> tuple[Tensor, Tensor]:
        """h is (K, batch, N, E), so that channels are the vector lanes; dt and x are (K, batch, E), B and C (K, batch,
        N)."""
        h = torch.exp(dt.unsqueeze(2) * A) * h + x.unsqueeze(2) * B.unsqueeze(3)
        return h, (h * C.unsqueeze(3)).sum(2)

    start = dt.new_zeros(directions, u.shape[0], states, features)
    fields = [steps_of(field).contiguous() for field in (dt, dt * x, B, C)]
    rates = A.transpose(1, 2).contiguous().unsqueeze(1)
    last, y = scan_op(step, [start], fields, (rates, *_symbols(dt)))
    y = torch.stack([_walk_back(y[:, k], ORDERS[i], height, width) for k, i in enumerate(orders)], 1)
    y = y.permute(2, 0, 1, 3) + x * D
    last = last.permute(1, 0, 3, 2).contiguous() if call.with_last else dt.new_empty(0)
    kept = dt.new_empty(u.shape[0], directions, 0, states, features)
    return (y.sum(2) if call.merge else y).to(u.dtype).contiguous(), last, kept


def _walk_back(steps: Tensor, order: str, height: int, width: int) -> Tensor:
    """The inverse of `vim2.ops.scan.orders.walk`."""
    steps = steps.flip(0) if order.endswith("backward") else steps
    return steps.unflatten(0, (width, height)).transpose(0, 1).flatten(0, 1) if order.startswith("columns") else steps


def _symbols(field: Tensor) -> list[SymInt]:
    """The dynamic sizes of the program's inputs on which a field's sizes depend. PyTorch's compiler works out the size
    of the loop's results from them, and must find them among the loop's inputs."""
    sizes = [size.node for size in field.shape if isinstance(size, SymInt)]
    symbols = sorted({symbol for node in sizes for symbol in node.expr.free_symbols}, key=str)
    return [sizes[0].shape_env.create_symintnode(symbol, hint=None) for symbol in symbols]
