"""The directions of a scan: ways to walk over a map, or along a sequence, which is a map of height 1."""

from collections.abc import Sequence

import torch

ORDERS = ("forward", "columns", "backward", "columns_backward")  # kernels know them by their index here

FORWARD = ("forward",)
"""One walk, row by row."""
BIDIRECTIONAL = ("forward", "backward")
"""Row by row, and the same from the end."""
CROSS_SCAN = ("forward", "columns", "backward", "columns_backward")
"""Rows, columns, and both from their ends, in VMamba's order of directions."""


def check_orders(orders: Sequence[str]) -> None:
    """Raise a ValueError unless all are known, and there is one."""
    if not orders or any(order not in ORDERS for order in orders):
        raise ValueError(f"orders must name one or more of {', '.join(ORDERS)}, got {tuple(orders)}.")


def scan_positions(order: str, height: int, width: int, device=None) -> torch.Tensor:
    """The flat (row-major) positions of a height x width map in the order in which a walk visits them.

    Args:
        order: "forward" goes row by row, "columns" column by column, "backward" and "columns_backward" are the same
            walks from their ends. A sequence is a map of height 1.

    Returns:
        (height * width,) int64.
    """
    return walk(torch.arange(height * width, device=device), order, height, width)


def walk(rows: torch.Tensor, order: str, height: int, width: int) -> torch.Tensor:
    """What lies at the flat (row-major) positions of a map, (height * width, ...), in the order in which a walk visits
    them, see `scan_positions`."""
    if order.startswith("columns"):
        rows = rows.unflatten(0, (height, width)).transpose(0, 1).flatten(0, 1)
    return rows.flip(0) if order.endswith("backward") else rows
