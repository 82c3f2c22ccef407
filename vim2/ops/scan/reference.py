"""The selective scan in plain PyTorch: the literal recurrence, and the chunked form that runs where no kernel does.

Both take the layout of `selective_scan`, with the spatial axes already flattened to L = height * width:

    u                 (batch, L, E), or (batch, L, K, E) where every direction has an input of its own
    delta             (batch, L, K, E), before bias and softplus
    A, D, delta_bias  (K, E, N), (K, E), (K, E)
    B, C              (batch, L, K, N)
    orders            K walks over the height x width map, see `scan_positions`

and compute, along each of the K walks, Mamba's recurrence (arXiv 2312.00752, eq. 2 with its simplified B):

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,      y_t = C_t h_t + D u_t

Reductions are written as products and sums, not as matrix products: those would drop to bfloat16 or TF32 under
autocast and torch.backends.cuda.matmul.allow_tf32.
"""

import math

import torch
import torch.nn.functional as F

from ..backend import compute_dtype
from .orders import scan_positions

# Elements of the largest temporary (states of a batch slice) that the chunked form makes at once: 256 MiB of float32.
MAX_STATE_ELEMENTS = 1 << 26

# Up to this length one walk is scanned step by step: splitting it would do twice the arithmetic to save few steps.
MAX_UNSPLIT_LENGTH = 64


def selective_scan_recurrence(u, delta, A, B, C, D, delta_bias, delta_softplus, orders, height, width):
    """The recurrence, one step after the other, differentiable by autograd: the oracle of every faster form.

    Returns:
        y (batch, L, K, E), one output a direction, and the last states (batch, K, E, N), both in `compute_dtype`.
    """
    dtype = compute_dtype(u, delta, A, B, C)
    u, delta, A, B, C, D, delta_bias = (t.to(dtype) for t in (u, delta, A, B, C, D, delta_bias))
    u = u.unsqueeze(2).expand_as(delta) if u.dim() == 3 else u
    delta = delta + delta_bias
    delta = F.softplus(delta) if delta_softplus else delta
    outputs, last_states = [], []
    for k, order in enumerate(orders):
        positions = scan_positions(order, height, width).tolist()
        h = torch.zeros_like(u[:, 0, k]).unsqueeze(-1) * A[k]
        y = [None] * len(positions)
        for p in positions:
            decay = torch.exp(delta[:, p, k, :, None] * A[k])
            h = decay * h + (delta[:, p, k] * u[:, p, k]).unsqueeze(-1) * B[:, p, k, None, :]
            y[p] = (h * C[:, p, k, None, :]).sum(-1) + D[k] * u[:, p, k]
        outputs.append(torch.stack(y, dim=1))
        last_states.append(h)
    return torch.stack(outputs, dim=2), torch.stack(last_states, dim=1)


def chunk_positions(orders, height, width, device=None):
    """The walks cut into chunks of about sqrt(L) steps, which are scanned side by side.

    Returns:
        positions (K, chunks, steps) int64, where the last chunk may be padded at its end, and the number of real
        steps in that last chunk.
    """
    length = height * width
    steps = length if length <= MAX_UNSPLIT_LENGTH else math.isqrt(length - 1) + 1
    chunks = -(-length // steps)
    positions = torch.stack([scan_positions(order, height, width, device) for order in orders])
    positions = F.pad(positions, (0, chunks * steps - length))
    return positions.view(len(orders), chunks, steps), length - (chunks - 1) * steps


class _Walk:
    """Reads and writes maps by step: at step t, the t-th position of every chunk of every direction at once.

    `fields` are (batch, L, K, X), or (batch, L, X) shared by all directions; a step is (batch, K, chunks, X). The
    padding of the last chunk is never read: at those steps the chunk axis is one shorter.
    """

    def __init__(self, positions: torch.Tensor, last_steps: int, dtype: torch.dtype):
        self.directions, self.chunks, self.steps = positions.shape
        self.dtype = dtype
        self.positions = positions
        self.last_steps = last_steps
        self.direction_index = torch.arange(self.directions, device=positions.device)[:, None]

    def active(self, t: int) -> int:
        return self.chunks if t < self.last_steps else self.chunks - 1

    def read(self, field: torch.Tensor, t: int) -> torch.Tensor:
        positions = self.positions[:, : self.active(t), t]
        step = field[:, positions] if field.dim() == 3 else field[:, positions, self.direction_index]
        return step.to(self.dtype)

    def write(self, field: torch.Tensor, t: int, step: torch.Tensor) -> None:
        field[:, self.positions[:, : self.active(t), t], self.direction_index] = step.to(field.dtype)


def _batch_slices(u, delta, A):
    """Slices of the batch small enough that the states of all their steps fit in MAX_STATE_ELEMENTS."""
    batch, length, directions, features = delta.shape
    size = max(1, MAX_STATE_ELEMENTS // max(1, length * directions * features * A.shape[-1]))
    return [slice(i, min(i + size, batch)) for i in range(0, batch, size)]


def _local_scan(walk, dt, u, B, At):
    """Scan every chunk from a zero state: its end state, and the product of its decays."""
    batch, directions, features, n = dt.shape[0], walk.directions, dt.shape[-1], B.shape[-1]
    h = dt.new_zeros(batch, directions, walk.chunks, n, features)
    total = dt.new_zeros(batch, directions, walk.chunks, features)
    for t in range(walk.steps):
        active = walk.active(t)
        _advance(h[:, :, :active], walk.read(dt, t), walk.read(u, t), walk.read(B, t), At)
        total[:, :, :active] += walk.read(dt, t)
    return h, torch.exp(total.unsqueeze(-2) * At)


def _advance(h, dt, u, B, At):
    """h <- exp(dt A) h + dt B u, in place; states are (batch, K, chunks, N, E), so that E is the contiguous axis."""
    decay = (dt.unsqueeze(-2) * At).exp_()
    h.mul_(decay).addcmul_((dt * u).unsqueeze(-2), B.unsqueeze(-1))


def _chunk_starts(walk, dt, u, B, At):
    """The states at the chunks' starts: every chunk is scanned from a zero state, then their ends are chained."""
    starts = dt.new_zeros(dt.shape[0], walk.directions, walk.chunks, B.shape[-1], dt.shape[-1])
    if walk.chunks > 1:
        ends, decay = _local_scan(walk, dt, u, B, At)
        for c in range(1, walk.chunks):
            starts[:, :, c] = decay[:, :, c - 1] * starts[:, :, c - 1] + ends[:, :, c - 1]
    return starts


def _states_after(walk, starts, dt, u, B, At):
    """The states after every step, (steps, batch, K, chunks, N, E), from those at the chunks' starts."""
    states = starts.new_empty(walk.steps, *starts.shape)
    h = starts.clone()
    for t in range(walk.steps):
        _advance(h[:, :, : walk.active(t)], walk.read(dt, t), walk.read(u, t), walk.read(B, t), At)
        states[t] = h
    return states


def _end_adjoints(walk, dt, C, grad_y, At, grad_last):
    """The adjoints of the states at the chunks' ends, from what follows each chunk: as `_chunk_starts`, but from the
    other end. `grad_last`, (batch, K, E, N), is the gradient of the last states, or None."""
    adjoints = dt.new_zeros(dt.shape[0], walk.directions, walk.chunks, C.shape[-1], dt.shape[-1])
    if grad_last is not None:
        adjoints[:, :, -1] = grad_last.transpose(-1, -2)
    if walk.chunks > 1:
        local = torch.zeros_like(adjoints)  # of the states at the chunks' starts, from their own steps
        total = dt.new_zeros(*local.shape[:3], local.shape[-1])
        for t in reversed(range(walk.steps)):
            g, dtt = local[:, :, : walk.active(t)], walk.read(dt, t)
            g.addcmul_(walk.read(C, t).unsqueeze(-1), walk.read(grad_y, t).unsqueeze(-2))
            g.mul_((dtt.unsqueeze(-2) * At).exp_())
            total[:, :, : walk.active(t)] += dtt
        decay = torch.exp(total.unsqueeze(-2) * At)
        for c in reversed(range(walk.chunks - 1)):
            adjoints[:, :, c] = local[:, :, c + 1] + decay[:, :, c + 1] * adjoints[:, :, c + 1]
    return adjoints


def selective_scan_chunked(u, delta, A, B, C, D, delta_bias, delta_softplus, orders, height, width, with_last):
    """The scan in O(sqrt(L)) sequential steps. No permuted or flipped copy of a map is made. No autograd.

    All chunks first run side by side from a zero state, which gives each chunk's end state; a short loop over chunks
    turns these into the true states at the chunks' starts; then all chunks run side by side once more, from there.

    Args:
        with_last: Whether the last states are wanted.

    Returns:
        y (batch, L, K, E) in `compute_dtype`, and the last states (batch, K, E, N), or (0,) without with_last.
    """
    dtype = compute_dtype(u, delta, A, B, C)
    walk = _Walk(*chunk_positions(orders, height, width, u.device), dtype)
    batch, length, directions, features = delta.shape
    n = A.shape[-1]
    At = A.to(dtype).transpose(-1, -2).unsqueeze(1)
    y = torch.empty(batch, length, directions, features, dtype=dtype, device=u.device)
    last = torch.empty((batch, directions, features, n) if with_last else (0,), dtype=dtype, device=u.device)
    skip = D.to(dtype).unsqueeze(1)
    for s in _batch_slices(u, delta, A):
        dt = _discretisation(delta[s], delta_bias, delta_softplus, dtype)
        h = _chunk_starts(walk, dt, u[s], B[s], At)
        for t in range(walk.steps):
            ht, ut = h[:, :, : walk.active(t)], walk.read(u[s], t)
            _advance(ht, walk.read(dt, t), ut, walk.read(B[s], t), At)
            walk.write(y[s], t, (walk.read(C[s], t).unsqueeze(-1) * ht).sum(-2) + skip * ut)
        if with_last:
            last[s] = h[:, :, -1].transpose(-1, -2)
    return y, last


def selective_scan_chunked_backward(
    grad_y, grad_last, u, delta, A, B, C, D, delta_bias, delta_softplus, orders, height, width
):
    """Gradients of `selective_scan_chunked` for u, delta, A, B, C, D and delta_bias, each in its input's dtype.

    States are recomputed, nothing but the inputs is kept; the adjoint runs the same three passes from the other end.

    Args:
        grad_y: (batch, L, K, E), or (batch, L, E) where the directions' outputs were summed.
        grad_last: (batch, K, E, N), or (0,) where the last states were not wanted.
    """
    dtype = compute_dtype(u, delta, A, B, C)
    walk = _Walk(*chunk_positions(orders, height, width, u.device), dtype)
    At = A.to(dtype).transpose(-1, -2).unsqueeze(1)
    skip = D.to(dtype).unsqueeze(1)
    grad_u = torch.empty(delta.shape, dtype=dtype, device=u.device)
    grad_dt = torch.empty(delta.shape, dtype=dtype, device=u.device)
    grad_B, grad_C = torch.empty_like(B), torch.empty_like(C)
    grad_At, grad_D = torch.zeros_like(At.squeeze(1)), torch.zeros_like(skip.squeeze(1))
    for s in _batch_slices(u, delta, A):
        dt = _discretisation(delta[s], delta_bias, delta_softplus, dtype)
        us, Bs, Cs, gy = u[s], B[s], C[s], grad_y[s]
        starts = _chunk_starts(walk, dt, us, Bs, At)
        states = _states_after(walk, starts, dt, us, Bs, At)
        adjoint = _end_adjoints(walk, dt, Cs, gy, At, grad_last[s] if grad_last.numel() else None)
        for t in reversed(range(walk.steps)):
            active = walk.active(t)
            g, after = adjoint[:, :, :active], states[t][:, :, :active]
            before = (states[t - 1] if t else starts)[:, :, :active]
            dtt, ut, Bt, Ct, gyt = (walk.read(field, t) for field in (dt, us, Bs, Cs, gy))
            g.addcmul_(Ct.unsqueeze(-1), gyt.unsqueeze(-2))
            walk.write(grad_C[s], t, (after * gyt.unsqueeze(-2)).sum(-1))
            walk.write(grad_B[s], t, (g * (dtt * ut).unsqueeze(-2)).sum(-1))
            grad_input = (g * Bt.unsqueeze(-1)).sum(-2)  # of dt * u
            g.mul_((dtt.unsqueeze(-2) * At).exp_())  # now the adjoint of the state before this step
            grad_exponent = g * before
            walk.write(grad_u[s], t, dtt * grad_input + skip * gyt)
            walk.write(grad_dt[s], t, ut * grad_input + (grad_exponent * At).sum(-2))
            grad_At += (grad_exponent * dtt.unsqueeze(-2)).sum((0, 2))
            grad_D += (gyt * ut).sum((0, 2))
        if delta_softplus:
            grad_dt[s] *= torch.sigmoid(delta[s].to(dtype) + delta_bias.to(dtype))
    grad_bias = grad_dt.sum((0, 1))
    return (
        (grad_u if u.dim() == 4 else grad_u.sum(2)).to(u.dtype),
        grad_dt.to(delta.dtype),
        grad_At.transpose(-1, -2).to(A.dtype).contiguous(),
        grad_B,
        grad_C,
        grad_D.to(D.dtype),
        grad_bias.to(delta_bias.dtype),
    )


def _discretisation(delta, delta_bias, delta_softplus, dtype):
    delta = delta.to(dtype) + delta_bias.to(dtype)
    return F.softplus(delta) if delta_softplus else delta
