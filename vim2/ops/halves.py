"""The gradients of both halves of a projection's rows, written side by side, as the gradient of the projection.

In a mixer one half goes into a convolution, and the other gates what comes of it. Autograd would make the gradients of
both and then copy them into one tensor.
"""

import torch
from torch import Tensor


class Room:
    """Memory for the gradient of a projection, in one backward pass. The gate's half is written first.

    It belongs to the node of autograd's graph that has put out both halves, and is found from the gate by `room_of`.
    """

    def __init__(self):
        self.whole: Tensor | None = None

    def second_half(self, gate: Tensor) -> Tensor:
        """Where the gradient of the gate is to be written."""
        self.whole = torch.empty(*gate.shape[:-1], 2 * gate.shape[-1], dtype=gate.dtype, device=gate.device)
        return _second_half(self.whole)

    def take(self, grad_gate: Tensor | None) -> Tensor | None:
        """All of the memory, if the gate's gradient is what was written there, and not something made of it since."""
        whole, self.whole = self.whole, None
        if whole is None or grad_gate is None:
            return None
        second = _second_half(whole)
        is_there = grad_gate.data_ptr() == second.data_ptr() and grad_gate.dtype == second.dtype
        return whole if is_there and grad_gate.stride() == second.stride() else None


def _second_half(whole: Tensor) -> Tensor:
    return whole[..., whole.shape[-1] // 2 :]


def room_of(gate: Tensor) -> Room | None:
    """The room of the node that has put out a gate, if it has one."""
    room = getattr(gate.grad_fn, "room", None)
    return room if isinstance(room, Room) else None
