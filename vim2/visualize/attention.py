"""The matrices that a selective scan multiplies its input with, its implicit attention."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..mixers import S6
from ..ops.scan.orders import scan_positions

__all__ = ["channel_attention", "scan_attention", "scan_inputs", "token_attention", "tokens_seen"]


def scan_attention(s6: S6, u: Tensor, rows: Tensor) -> Tensor:
    """Rows of the matrices by which S6 maps its input, a matrix a direction and feature (Ali, Zimerman, Wolf, 2024: The
    Hidden Attention of Mamba Models, arXiv 2403.01590, section 3):

        y_t = sum_{s <= t} C_t (prod_{s < r <= t} exp(delta_r A)) delta_s B_s u_s + D u_t

    where s, r and t count along the direction's walk. The last term, which mixes nothing, is left out.

    Args:
        s6: The scan; what it computes delta, A, B and C from is taken from it as it is, in float64.
        u: Its input, (H, W, E) of a map or (L, E) of a sequence, or with `separate_inputs` (..., K, E).
        rows: (T,) int64, flat positions t of the map or sequence, whose outputs are asked for.

    Returns:
        (K, T, H * W or L, E) float64 on the CPU: by how much each position's input enters the output at each of `rows`.
        0 where a walk comes to a position only later.
    """
    u, rows = u.detach().cpu().double(), rows.cpu()
    spatial = u.shape[: -2 if s6.separate_inputs else -1]
    height, width = spatial if len(spatial) == 2 else (1, *spatial)
    u = u.flatten(0, 1) if len(spatial) == 2 else u
    weight, dt_weight, dt_bias, A_log = (
        parameter.detach().cpu().double()
        for parameter in (s6.x_proj_weight, s6.dt_proj_weight, s6.dt_proj_bias, s6.A_log)
    )
    A = -A_log.exp()
    matrices = []
    for k, order in enumerate(s6.orders):
        walk = scan_positions(order, height, width)
        step = walk.argsort()  # when the walk comes to each position
        uk = u[:, k] if s6.separate_inputs else u
        low_rank, B, C = (uk @ weight[k].T).split((s6.dt_rank, s6.d_state, s6.d_state), dim=-1)
        delta = F.softplus(low_rank @ dt_weight[k].T + dt_bias[k])
        # a product of exponentials is the exponential of a difference of running sums
        total = delta[walk].cumsum(0)[step]
        elapsed = total[rows, None] - total[None]
        seen = (step[rows, None] >= step[None]).unsqueeze(-1)
        elapsed = elapsed.masked_fill(~seen, 0.0)  # later positions' would be negative, and their decays overflow
        matrix = torch.zeros_like(elapsed)
        for n in range(s6.d_state):  # one by one: all states at once would be N times the memory
            matrix += torch.exp(elapsed * A[k, :, n]) * (C[rows, n, None] * B[None, :, n]).unsqueeze(-1)
        matrices.append(matrix * delta * seen)
    return torch.stack(matrices)


def token_attention(s6: S6, u: Tensor, token: tuple[int, int]) -> Tensor:
    """What one token takes from all tokens through each scan of a token mixer.

    Args:
        s6: A token mixer's scan.
        u: Its input, (H, W, E).
        token: Its row and column.

    Returns:
        (K, H, W, E) float64 on the CPU, see `scan_attention`.
    """
    height, width, _ = u.shape
    row, column = token
    return scan_attention(s6, u, torch.tensor([row * width + column]))[:, 0].unflatten(1, (height, width))


def tokens_seen(orders: Sequence[str], size: tuple[int, int], token: tuple[int, int]) -> Tensor:
    """(K, H, W) bool: the tokens of a map to which each of K walks has come when it is at this one."""
    steps = torch.stack([scan_positions(order, *size).argsort().view(size) for order in orders])
    return steps <= steps[:, token[0], token[1], None, None]


def channel_attention(s6: S6, u: Tensor) -> Tensor:
    """The matrices that mix one token's channels, one for each of a channel mixer's directions.

    Args:
        s6: A channel mixer's scan.
        u: Its input at one token, (steps, K, P), where a step is P channels.

    Returns:
        (K, steps, steps, P) float64 on the CPU, see `scan_attention`: rows are steps put out, columns those taken in.
    """
    return scan_attention(s6, u, torch.arange(u.shape[0]))


@contextmanager
def scan_inputs(mixers: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Keeps the inputs of mixers' scans while their model computes.

    Args:
        mixers: Token and channel mixers, by any names.

    Yields:
        By the same names, the input of the scan in the model's last call: (batch, H, W, E) of a token mixer, and
        (batch * H * W, steps, K, P) of a channel mixer.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = inputs[0].detach()

        return hook

    handles = [mixer.s6.register_forward_pre_hook(keep(name)) for name, mixer in mixers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
