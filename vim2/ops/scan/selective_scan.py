"""Selective scan (S6), the public function."""

from collections.abc import Sequence

from torch import Tensor

from ..operator import needs_backward
from .operands import Operands
from .operator import flatten_as_traced, scan
from .orders import FORWARD, check_orders


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    orders: Sequence[str] = FORWARD,
    delta_weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Scan a sequence or a map in several directions at once and sum the directions' outputs.

    Along each direction k (arXiv 2403.19888 section 3.1; arXiv 2312.00752 eq. 2):
    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t and y_t = C_t h_t + D u_t. Directions are ways to walk over the same
    memory: no permuted or flipped copies are made. States and decays are float32 (float64 if any input is).

    Args:
        u: Input, (batch, L, E) for a sequence or (batch, H, W, E) for a map; or, where every direction has an input of
            its own, (batch, L, K, E) or (batch, H, W, K, E). Any floating dtype.
        delta: Step sizes before bias and softplus, (batch, *spatial, K, E).
        A: Decay rates, (K, E, N), negative.
        B: Input weights, (batch, *spatial, K, N).
        C: Output weights, (batch, *spatial, K, N).
        D: Skip weights, (K, E).
        delta_bias: (K, E).
        delta_softplus: Apply softplus to delta + delta_bias.
        orders: K of "forward" (row by row), "columns" (column by column), "backward" and "columns_backward" (the same
            walks from their ends). The same order may stand more than once.
        delta_weight: (K, E, R); delta is then its low-rank factor (batch, *spatial, K, R), and the step sizes before
            bias and softplus are delta_weight @ delta. They are not kept for the backward pass.
        backend: See `vim2.ops.backend.resolve_backend`.

    Returns:
        (batch, *spatial, E) in u's dtype.

    Raises:
        ValueError: Shapes that do not fit together, an unknown order or backend, an empty batch or map.
        RuntimeError: A backend that is not there.
    """
    if delta.dim() not in (4, 5):
        raise ValueError(
            f"delta must be (batch, L, K, E) for a sequence or (batch, H, W, K, E) for a map, got {tuple(delta.shape)}."
        )
    spatial = delta.shape[1:-2]
    _check_arguments(u, delta, A, B, C, orders, spatial, delta_weight)
    D, delta_bias = (A.new_zeros(A.shape[:2]) if t is None else t for t in (D, delta_bias))
    for name, t in (("D", D), ("delta_bias", delta_bias)):
        if t.shape != A.shape[:2]:
            raise ValueError(f"{name} must be (K, E) = {tuple(A.shape[:2])}, got {tuple(t.shape)}.")
    if delta_weight is None:
        delta_weight = A.new_empty(0)
    delta = flatten_as_traced(delta, spatial)
    u, B, C = (t if len(spatial) == 1 else t.flatten(1, 2) for t in (u, B, C))
    operands = Operands(u, delta, A, B, C, D, delta_bias, delta_weight)
    keeps = needs_backward(*operands)
    y, _, _ = scan(
        operands, orders=orders, spatial=spatial, delta_softplus=delta_softplus, backend=backend, keeps=keeps
    )
    return y.unflatten(1, spatial)


def _check_arguments(u, delta, A, B, C, orders, spatial, delta_weight):
    check_orders(orders)
    batch, directions, features = delta.shape[0], *delta.shape[-2:]
    if len(orders) != directions:
        raise ValueError(f"delta has {directions} directions, but orders names {len(orders)}: {tuple(orders)}.")
    if delta_weight is not None:
        if delta_weight.dim() != 3 or (delta_weight.shape[0], delta_weight.shape[2]) != (directions, features):
            raise ValueError(
                f"delta_weight must be (K, E, R) with K, R = {directions}, {features} as in delta, "
                f"got {tuple(delta_weight.shape)}."
            )
        features = delta_weight.shape[1]
    full = (batch, *spatial, directions, features)
    if u.shape not in ((batch, *spatial, features), full):
        raise ValueError(
            f"u must be {(batch, *spatial, features)}, shared by all directions, or {full}, got {tuple(u.shape)}."
        )
    if A.dim() != 3 or A.shape[:2] != (directions, features):
        raise ValueError(f"A must be (K, E, N) with K, E = {directions}, {features}, got {tuple(A.shape)}.")
    if A.shape[2] < 1:
        raise ValueError("A must hold a state or more for each channel, got none.")
    for name, t in (("B", B), ("C", C)):
        if t.shape != (batch, *spatial, directions, A.shape[-1]):
            raise ValueError(f"{name} must be {(batch, *spatial, directions, A.shape[-1])}, got {tuple(t.shape)}.")
    if u.numel() == 0:
        raise ValueError(f"There is nothing to scan: u is {tuple(u.shape)}.")
