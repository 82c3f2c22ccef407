"""What other runtimes make of an exported model, beside PyTorch."""

import statistics
import timeit
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..command.errors import UserError
from ..command.tables import table

__all__ = ["SIZES", "compare_onnx"]

SIZES = ((224, 224), (256, 320), (97, 131))  # the last has odd sides, and rounds up in every stage


@torch.no_grad()
def compare_onnx(
    model: nn.Module, path: Path, sizes: Sequence[tuple[int, int]], channels: int, repeats: int = 9
) -> str:
    """Run an ONNX file in onnxruntime on the CPU beside its model in eager mode, with as many threads as PyTorch has.

    Args:
        model: On the CPU, in eval mode.
        path: The file that was written of it.
        sizes: Height and width of the images, one in a batch, random.
        channels: Of the images.
        repeats: Timed runs of each, in turn, after two that are not.

    Returns:
        A table: the largest difference of an output and the largest output, medians of times.

    Raises:
        UserError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise UserError("--compare needs the package onnxruntime: pip install onnxruntime.") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    header = ["size", "largest difference", "largest output", "eager, ms", "onnxruntime, ms", "ratio"]
    rows = []
    generator = torch.Generator().manual_seed(0)
    for height, width in sizes:
        images = torch.randn(1, channels, height, width, generator=generator)
        runs = (partial(model, images), partial(session.run, None, {"images": images.numpy()}))
        for _ in range(2):
            results = [run() for run in runs]
        times = [[timeit.timeit(run, number=1) for run in runs] for _ in range(repeats)]
        expected = results[0] if isinstance(results[0], list) else [results[0]]
        given = [torch.from_numpy(t) for t in results[1]]
        difference = max((a - b).abs().max().item() for a, b in zip(given, expected, strict=True))
        largest = max(t.abs().max().item() for t in expected)
        eager, other = (1000 * statistics.median(taken) for taken in zip(*times))
        cells = [f"{height} x {width}", f"{difference:.1e}", f"{largest:.2f}", f"{eager:.0f}", f"{other:.0f}"]
        rows.append([*cells, f"{other / eager:.2f}"])
    threads = f"threads: {torch.get_num_threads()}"
    return f"onnxruntime {onnxruntime.__version__}, PyTorch {torch.__version__}, {threads}\n{table(header, rows)}"
