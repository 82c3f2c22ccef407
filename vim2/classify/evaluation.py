"""Accuracy of a model on images, over all processes."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..command.processes import Processes
from ..command.progress import progress_bar

__all__ = ["evaluate"]


@torch.inference_mode()
def evaluate(
    model: Callable[[Tensor], Tensor],
    loader,
    processes: Processes,
    autocast: Callable[[], Any],
    description: str = "validate",
) -> dict[str, float]:
    """Loss and accuracy over every readable image, each counted once.

    Args:
        model: Images (batch, C, H, W) to logits (batch, classes), in eval mode.
        loader: Batches of this process's share; the target -1 marks an unreadable image.
        processes: The processes that share the images.
        autocast: Context for the model.
        description: What the progress bar says.

    Returns:
        Cross-entropy `loss`, `top1` and `top5` in percent, number of `images`, `seconds`. With no image at all, NaN.
    """
    if isinstance(model, nn.Module):
        model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=processes.device)  # loss, top-1, top-5, images
    start = time.perf_counter()
    for images, target in progress_bar(loader, description, processes):
        with autocast():
            logits = model(images)
        readable = target >= 0
        logits, target = logits[readable].float(), target[readable]
        ranked = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
        loss = F.cross_entropy(logits, target, reduction="sum")
        batch = torch.stack((loss.double(), ranked[:, 0].sum(), ranked.sum(), readable.sum()))
        totals += batch
    totals = processes.sum(totals).tolist()
    loss, top1, top5, images = totals
    whole = images or float("nan")
    return {
        "loss": loss / whole,
        "top1": 100 * top1 / whole,
        "top5": 100 * top5 / whole,
        "images": int(images),
        "seconds": time.perf_counter() - start,
    }
