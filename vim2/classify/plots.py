"""Pictures: training curves, accuracy over image size, predictions. They need matplotlib."""

import math
import os
from collections.abc import Sequence
from typing import Any

from ..command.figures import figure, save, shorten, whole_numbers

__all__ = ["plot_curves", "plot_input_scaling", "plot_predictions"]

GOOD, BAD, PLAIN = "#1a7f37", "#c02626", "#3465a4"


def plot_curves(history: Sequence[dict[str, Any]], path: str | os.PathLike) -> None:
    """Loss and accuracy over epochs.

    Args:
        history: A dictionary an epoch, as in metrics.json.
        path: PNG to write.
    """
    fig = figure(figsize=(10, 4))
    losses, accuracies = fig.subplots(1, 2)
    for axes, columns in (
        (losses, (("train_loss", "training"), ("val_loss", "validation"), ("ema_val_loss", "validation, EMA"))),
        (accuracies, (("top1", "top-1"), ("top5", "top-5"), ("ema_top1", "top-1, EMA"), ("ema_top5", "top-5, EMA"))),
    ):
        for column, label in columns:
            points = [(row["epoch"], row[column]) for row in history if row.get(column) is not None]
            if points:
                axes.plot(*zip(*points), label=label, marker="." if len(points) < 40 else None)
        axes.set_xlabel("epoch")
        whole_numbers(axes.xaxis)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    losses.set_ylabel("loss")
    accuracies.set_ylabel("accuracy, %")
    save(fig, path)


def plot_input_scaling(rows: Sequence[dict[str, Any]], label: str, path: str | os.PathLike) -> None:
    """Accuracy over image size, the paper's figure of input scaling.

    Args:
        rows: As in validation.json.
        label: Name of the model.
        path: PNG to write.
    """
    fig = figure(figsize=(6, 4))
    axes = fig.subplots()
    rows = sorted(rows, key=lambda row: row["img_size"])
    sizes = [row["img_size"] for row in rows]
    axes.plot(sizes, [row["top1"] for row in rows], marker="o", label=f"{label}, top-1")
    axes.plot(sizes, [row["top5"] for row in rows], marker="s", linestyle="--", label=f"{label}, top-5")
    axes.set_xticks(sizes)
    axes.set_xlabel("image size, pixels")
    axes.set_ylabel("accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend()
    save(fig, path)


def plot_predictions(images: Sequence[Any], predictions: Sequence[dict[str, Any]], path: str | os.PathLike) -> None:
    """One image beside bars for its classes, or several in a grid, each under its first class.

    A title is green or red where the true class is known.

    Args:
        images: Pillow images.
        predictions: As in predictions.json, one an image.
        path: PNG to write.
    """
    if len(images) == 1:
        fig = figure(figsize=(9, 4))
        picture, bars = fig.subplots(1, 2)
        draw(picture, images[0], predictions[0])
        top = predictions[0]["top"][::-1]
        bars.barh([shorten(t["label"]) for t in top], [100 * t["probability"] for t in top], color=PLAIN)
        bars.set_xlim(0, 100)
        bars.set_xlabel("probability, %")
    else:
        columns = min(6, math.ceil(math.sqrt(len(images))))
        lines = math.ceil(len(images) / columns)
        fig = figure(figsize=(2.2 * columns, 2.5 * lines))
        grid = fig.subplots(lines, columns, squeeze=False).flatten()
        for axes, image, prediction in zip(grid, images, predictions):
            draw(axes, image, prediction)
        for axes in grid[len(images) :]:
            axes.axis("off")
    save(fig, path)


def draw(axes, image, prediction: dict[str, Any]) -> None:
    best, true = prediction["top"][0], prediction.get("true_label")
    title = f"{shorten(best['label'])}, {100 * best['probability']:.0f} %"
    if true is not None:
        title += f"\ntrue: {shorten(true)}"
    axes.imshow(image, cmap="gray" if image.mode == "L" else None)
    axes.set_title(title, fontsize=9, color="black" if true is None else GOOD if best["label"] == true else BAD)
    axes.axis("off")
