"""The pictures. They need matplotlib; their colours go from dark to light, which every eye can tell apart."""

import os
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..command.figures import figure, save, shorten, whole_numbers
from .layers import StageWeights

__all__ = [
    "plot_averaging_weights",
    "plot_channel_mixing",
    "plot_grad_cam",
    "plot_receptive_field",
    "plot_token_attention",
]

SEQUENTIAL, DIVERGING = "cividis", "PuOr"
NOT_SEEN = "#d0d0d0"
MARK = "#ff2d2d"
DECADES = 4  # at most, on a logarithmic scale
MAX_NUMBERED = 10  # rows of cells that still leave room for numbers
ORDERS = {
    "forward": "along rows, from the top left",
    "columns": "along columns, from the top left",
    "backward": "along rows, from the bottom right",
    "columns_backward": "along columns, from the bottom right",
}


def plot_receptive_field(
    field: Tensor, token: tuple[float, float, float, float], whose: str, path: str | os.PathLike
) -> None:
    """The effective receptive field, on a logarithmic scale.

    Args:
        field: (H, W), see `receptive_field`.
        token: Left, top, width and height in pixels of the token itself.
        whose: Which token this is, for the title.
        path: PNG to write.
    """
    fig = figure(figsize=(6, 5.4))
    axes = fig.subplots()
    values = field.double().numpy()
    scale = _Scale([values])
    drawn = scale.draw(axes, values)
    _outline(axes, *token)
    axes.set_xlabel("pixel column")
    axes.set_ylabel("pixel row")
    axes.set_title(f"Effective receptive field of {whose}", fontsize=10)
    fig.colorbar(drawn, ax=axes, label="magnitude of the gradient, of its maximum", shrink=0.9, extend=scale.extend)
    save(fig, path)


def plot_token_attention(
    image: np.ndarray,
    weights: Tensor,
    seen: Tensor,
    orders: Sequence[str],
    token: tuple[int, int],
    layer: str,
    path: str | os.PathLike,
) -> None:
    """What one token takes from all tokens through each scan, beside the image, on one logarithmic scale.

    Args:
        image: (H, W, 3) or (H, W), what the model sees.
        weights: (K, H', W', E), see `token_attention`.
        seen: (K, H', W') bool, whether a walk comes to a token before or at the one that is looked at.
        orders: The K scans' directions.
        token: Row and column of that token.
        layer: Its name.
        path: PNG to write.
    """
    rows, columns = weights.shape[1:3]
    fig = figure(figsize=(11, 7.2))
    grid = fig.subplots(2, 3)
    height, width = image.shape[:2]
    grid[0, 0].imshow(image, cmap="gray", vmin=0, vmax=1)
    _outline(grid[0, 0], token[1] * width / columns, token[0] * height / rows, width / columns, height / rows)
    grid[0, 0].set_title(f"what the model sees, and token ({token[0]}, {token[1]})", fontsize=10)
    grid[0, 0].set_axis_off()
    panels = [
        *((ORDERS[order], weights[k].abs().mean(-1), seen[k]) for k, order in enumerate(orders)),
        ("all four scans, summed", weights.sum(0).abs().mean(-1), seen.any(0)),
    ]
    maps = [np.ma.masked_where(~mask.numpy(), values.numpy()) for _, values, mask in panels]
    scale = _Scale(maps)
    places = [grid[0, 1], grid[0, 2], grid[1, 1], grid[1, 2], grid[1, 0]]
    for axes, (title, _, _), values in zip(places, panels, maps):
        drawn = scale.draw(axes, values)
        _outline(axes, token[1], token[0], 1, 1)
        _ticks(axes, rows, columns)
        axes.set_title(title, fontsize=10)
    for axes in grid[0]:
        axes.tick_params(labelbottom=False)  # the same as below
    for axes in grid[1]:
        axes.set_xlabel("token column")
    grid[1, 0].set_ylabel("token row")
    fig.suptitle(
        f"What token ({token[0]}, {token[1]}) takes from all tokens in {layer} "
        f"(mean magnitude over {weights.shape[-1]} features; grey: not seen by the scan)",
        fontsize=11,
    )
    label = "weight in the scan's output, of the largest"
    fig.colorbar(drawn, ax=grid, label=label, shrink=0.7, extend=scale.extend)
    save(fig, path)


def plot_channel_mixing(
    weights: Tensor, channel_patch: int, token: tuple[int, int], layer: str, path: str | os.PathLike
) -> None:
    """The matrices that mix one token's channels, forward and backward, on one logarithmic scale.

    Args:
        weights: (2, steps, steps, P), see `channel_attention`.
        channel_patch: Channels a step, P.
        token: Its row and column.
        layer: Name of the layer.
        path: PNG to write.
    """
    steps = weights.shape[1]
    values = weights.abs().mean(-1).numpy()
    seen = np.tril(np.ones((steps, steps), dtype=bool))
    matrices = [np.ma.masked_where(~mask, matrix) for matrix, mask in zip(values, (seen, seen.T))]
    scale = _Scale(matrices)
    fig = figure(figsize=(10, 4.9))
    grid = fig.subplots(1, 2)
    for axes, matrix, title in zip(grid, matrices, ("forward scan", "backward scan")):
        drawn = scale.draw(axes, matrix)
        _ticks(axes, steps, steps)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(f"step that is read ({channel_patch} channel{'s' if channel_patch > 1 else ''} each)")
    grid[0].set_ylabel("step that is put out")
    fig.suptitle(
        f"Channel mixing of token ({token[0]}, {token[1]}) in {layer} (mean magnitude within a step)", fontsize=11
    )
    fig.colorbar(drawn, ax=grid, label="weight, of the largest", shrink=0.8, extend=scale.extend)
    save(fig, path)


def plot_averaging_weights(stages: Sequence[StageWeights], path: str | os.PathLike) -> None:
    """Which layer reads which earlier feature of its stage, and with what weight: a triangle of cells a stage.

    Args:
        stages: See `averaging_weights`.
        path: PNG to write.
    """
    columns = min(2, len(stages))
    lines = -(-len(stages) // columns)
    fig = figure(figsize=(5.5 * columns, 4.6 * lines))
    grid = fig.subplots(lines, columns, squeeze=False).flatten()
    deviation = max(float((row - 1).abs().max()) for stage in stages for row in stage.rows)
    deviation = max(deviation, 0.01)  # all are 1 before training
    for number, (axes, stage) in enumerate(zip(grid, stages), 1):
        size = len(stage.features)
        # zeros below the mask, since matplotlib computes with what is there
        cells = np.ma.array(np.zeros((len(stage.rows), size)), mask=True)
        for i, row in enumerate(stage.rows):
            cells[i, : len(row)] = row.numpy()
        drawn = axes.imshow(cells, cmap=DIVERGING, vmin=1 - deviation, vmax=1 + deviation)
        step = -(-size // MAX_NUMBERED)
        axes.set_xticks(range(0, size, step), stage.features[::step], rotation=45, ha="right", fontsize=8)
        # the last reader, the stage's output, is always named
        named = sorted({*range(0, size - step + 1, step), size - 1})
        axes.set_yticks(named, [stage.readers[i] for i in named], fontsize=8)
        if size <= MAX_NUMBERED:
            for i, row in enumerate(stage.rows):
                for j, weight in enumerate(row.tolist()):
                    colour = "white" if abs(weight - 1) > 0.6 * deviation else "black"
                    axes.text(j, i, f"{weight:.2f}", ha="center", va="center", fontsize=8, color=colour)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"stage {number}", fontsize=10)
        axes.set_ylabel("reader")
        axes.set_xlabel("feature that is read")
    for axes in grid[len(stages) :]:
        axes.axis("off")
    fig.suptitle("Learned averaging weights: which layer reads which earlier feature (1 before training)", fontsize=11)
    fig.colorbar(drawn, ax=grid, label="weight", shrink=0.6)
    save(fig, path)


def plot_grad_cam(
    image: np.ndarray, heat: np.ndarray, label: str, probability: float, stage: int, path: str | os.PathLike
) -> None:
    """An image beside itself under Grad-CAM.

    Args:
        image: (H, W, 3) or (H, W), what the model sees.
        heat: (H, W), see `grad_cam`.
        label: The class's.
        probability: The class's, 0 to 1.
        stage: The stage whose map it is, from 1 on.
        path: PNG to write.
    """
    fig = figure(figsize=(9, 4.4))
    grid = fig.subplots(1, 2)
    for axes in grid:
        axes.set_axis_off()
    grey = image if image.ndim == 2 else image.mean(-1)
    grid[0].imshow(image, cmap="gray", vmin=0, vmax=1)
    grid[1].imshow(0.4 + 0.6 * grey, cmap="gray", vmin=0, vmax=1)  # on black, all colours would look alike
    drawn = grid[1].imshow(heat, cmap=SEQUENTIAL, vmin=0, vmax=1, alpha=0.65)
    grid[0].set_title("what the model sees", fontsize=10)
    grid[1].set_title(f"Grad-CAM, stage {stage}: {shorten(label)}, {100 * probability:.0f} %", fontsize=10)
    fig.colorbar(drawn, ax=grid, label="evidence for the class, of its maximum", shrink=0.8)
    save(fig, path)


class _Scale:
    """A logarithmic scale of colours down from the largest of some maps, which it is relative to.

    It reaches to their smallest value that is seen, over one decade at least and DECADES at most.

    Args:
        maps: Maps of numbers from 0 on; masked ones are not seen.
    """

    def __init__(self, maps: Sequence[np.ndarray]):
        self.largest = max(float(values.max()) for values in maps) or 1.0
        smallest = min(float(values.min()) for values in maps) / self.largest
        self.least = min(max(smallest, 10.0**-DECADES), 0.1)
        self.extend = "min" if smallest < self.least else "neither"

    def draw(self, axes, values: np.ndarray):
        """Draw one of the maps, grey where it is masked, and return what a colour bar is made of."""
        from matplotlib.colors import LogNorm

        axes.set_facecolor(NOT_SEEN)
        shown = np.ma.maximum(values / self.largest, self.least)
        return axes.imshow(shown, cmap=SEQUENTIAL, norm=LogNorm(self.least, 1))


def _outline(axes, left: float, top: float, width: float, height: float) -> None:
    """A frame around cells or pixels, which lie half a one before and behind their coordinates."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor=MARK, linewidth=1.5))


def _ticks(axes, rows: int, columns: int) -> None:
    """Whole numbers alone."""
    for axis, size in ((axes.yaxis, rows), (axes.xaxis, columns)):
        whole_numbers(axis, min(size, 8))
