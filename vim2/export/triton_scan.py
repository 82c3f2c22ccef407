"""The scan as one small Triton kernel: `torch.ops.vim2.selective_scan` for packages that run on a GPU without this
package. AOTInductor compiles the kernel into them.

The kernels of `vim2.ops.scan.triton` choose their tiles by each call's sizes, in Python. This one has a single form for
all sizes: a program of one warp walks one direction of one sequence, with the states of a few channels in registers.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from ..ops.scan.operands import Call
from ..ops.scan.orders import ORDERS
from ..ops.scan.triton.walk import next_position, pack_orders, start_walk
from .aten_scan import in_full

__all__ = ["selective_scan"]

# States that a warp keeps, 8 in each of its lanes, and steps whose inputs it reads before it computes them, so that it
# waits for memory once and not at every step.
_TILE, _AHEAD = 256, 8


@triton.jit
def _scan_kernel(
    dt_ptr, x_ptr, B_ptr, C_ptr, A_ptr, y_ptr,  # (batch, L, K, E) twice, (batch, L, K, N) twice, (K, N, E), as dt
    orders,  # two bits a direction
    length, height, width,
    directions, features, states,
    CHANNELS: tl.constexpr, STATES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """y: (batch, L, K, E)."""
    blocks = tl.cdiv(features, CHANNELS)
    k = tl.program_id(0) // blocks % directions
    first_row = (tl.program_id(0) // blocks // directions).to(tl.int64) * length * directions + k
    e = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, STATES)
    in_e, in_n = e < features, n < states
    A_at = A_ptr + (k * states + n[:, None]) * features + e[None, :]
    A = tl.load(A_at, mask=in_n[:, None] & in_e[None, :], other=0.0)
    h = tl.zeros((STATES, CHANNELS), dt_ptr.dtype.element_ty)
    p, left, inner, stride, turn = start_walk(0, orders >> (2 * k) & 3, length, height, width, True)
    for t in range(0, length, AHEAD):
        ahead = ()
        for i in tl.static_range(AHEAD):
            row = first_row + p * directions
            live_e, live_n = e < tl.where(t + i < length, features, 0), n < tl.where(t + i < length, states, 0)
            dt = tl.load(dt_ptr + row * features + e, mask=live_e, other=0.0)
            x = tl.load(x_ptr + row * features + e, mask=live_e, other=0.0)
            B = tl.load(B_ptr + row * states + n, mask=live_n, other=0.0)
            C = tl.load(C_ptr + row * states + n, mask=live_n, other=0.0)
            ahead = ahead + ((row, live_e, dt, x, B, C),)  # noqa: RUF005  (Triton knows no starred tuples)
            p, left = next_position(p, left, inner, stride, turn)
        for i in tl.static_range(AHEAD):
            row, live_e, dt, x, B, C = ahead[i]
            h = tl.exp(dt[None, :] * A) * h + x[None, :] * B[:, None]
            y = tl.sum(h * C[:, None], 0)
            tl.store(y_ptr + row * features + e, y, mask=live_e)


@triton_op("vim2::exported_scan", mutates_args=())
def _scan(
    dt: Tensor, x: Tensor, B: Tensor, C: Tensor, A: Tensor, orders: Sequence[int], height: int, width: int
) -> Tensor:
    """Launch the kernel, for contiguous tensors of its shapes. PyTorch's exporter leaves the operator as it is, and its
    compiler takes the kernel out of it."""
    batch, length, directions, features = dt.shape
    states = B.shape[-1]
    block = triton.next_power_of_2(states)
    channels = min(max(_TILE // block, 1), triton.next_power_of_2(features))
    y = torch.empty_like(dt)
    wrap_triton(_scan_kernel)[(batch * directions * triton.cdiv(features, channels),)](
        dt, x, B, C, A, y,
        pack_orders(tuple(ORDERS[i] for i in orders)),
        length, height, width,
        directions, features, states,
        CHANNELS=channels, STATES=block, AHEAD=_AHEAD, num_warps=1,
    )  # fmt: skip
    return y


def selective_scan(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """As `aten_scan.selective_scan`, for CUDA.

    Raises:
        NotImplementedError: The last states are wanted.
    """
    call = Call.of(arguments)
    if call.with_last:
        raise NotImplementedError("An exported scan does not return its last state.")
    x, dt, A, B, C, D = in_full(call.operands, call.delta_softplus)
    read = (t.contiguous() for t in (dt, dt * x, B, C, A.transpose(1, 2)))
    y = _scan(*read, call.orders, call.height, call.width) + x * D
    nothing = dt.new_empty(0)
    return (y.sum(2) if call.merge else y).to(call.operands.u.dtype).contiguous(), nothing, nothing
