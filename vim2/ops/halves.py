"""The gradients of both halves of a projection's rows, written side by side as the projection's own gradient. Where one
half goes into a convolution and the other is the gate of what comes of it, autograd would copy them together."""

import torch
from torch import Tensor


class Room:
    """Memory for such a gradient, of one walk back through autograd's graph: the gate's half is written first.

    A node of the graph that has one is found by `room_of` what it has put out.
    """

    def __init__(self):
        self.whole: Tensor | None = None

    def second_half(self, gate: Tensor) -> Tensor:
        """Where the gradient of the gate is to be written."""
        self.whole = torch.empty(*gate.shape[:-1], 2 * gate.shape[-1], dtype=gate.dtype, device=gate.device)
        return _second_half(self.whole)

    def take(self, grad_gate: Tensor | None) -> Tensor | None:
        """All of the memory, if the gate's gradient is what was written there, and nothing that others made of it."""
        whole, self.whole = self.whole, None
        if whole is None or grad_gate is None:
            return None
        second = _second_half(whole)
        is_there = grad_gate.data_ptr() == second.data_ptr() and grad_gate.dtype == second.dtype
        return whole if is_there and grad_gate.stride() == second.stride() else None


def _second_half(whole: Tensor) -> Tensor:
    return whole[..., whole.shape[-1] // 2 :]


def room_of(gate: Tensor) -> Room | None:
    """That of the node which has put out a gate."""
    room = getattr(gate.grad_fn, "room", None)
    return room if isinstance(room, Room) else None
