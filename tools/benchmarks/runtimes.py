"""What other runtimes make of an exported model, beside PyTorch."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from vim2.command.errors import UserError

SIZES = ((224, 224), (256, 320), (97, 131))  # the last has odd sides, and rounds up in every stage


@torch.no_grad()
def compare_onnx(
    model: nn.Module, path: Path, sizes: Sequence[tuple[int, int]], channels: int, repeats: int = 9
) -> list[str]:
    """Run an ONNX file in onnxruntime on the CPU beside its model in eager mode, with as many threads as PyTorch has.

    Args:
        model: On the CPU, in eval mode.
        path: The file that was written of it.
        sizes: Height and width of the images, one in a batch, random.
        channels: Of the images.
        repeats: Timed runs of each, in turn, after two that are not.

    Returns:
        Lines of a table: the largest difference of an output and the largest output, medians of times.

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
    rows = [
        f"onnxruntime {onnxruntime.__version__}, PyTorch {torch.__version__}, threads: {torch.get_num_threads()}",
        "| size | largest difference | largest output | eager, ms | onnxruntime, ms | ratio |",
        "|---|---|---|---|---|---|",
    ]
    generator = torch.Generator().manual_seed(0)
    for height, width in sizes:
        images = torch.randn(1, channels, height, width, generator=generator)
        runs = (partial(model, images), partial(session.run, None, {"images": images.numpy()}))
        times = ([], [])
        for i in range(repeats + 2):
            results = []
            for run, taken in zip(runs, times):
                seconds, result = _timed(run)
                results.append(result)
                if i >= 2:
                    taken.append(1000 * seconds)
        expected = results[0] if isinstance(results[0], list) else [results[0]]
        given = [torch.from_numpy(t) for t in results[1]]
        difference = max((a - b).abs().max().item() for a, b in zip(given, expected, strict=True))
        largest = max(t.abs().max().item() for t in expected)
        eager, other = map(statistics.median, times)
        cells = f"{height} x {width}", f"{difference:.1e}", f"{largest:.2f}", f"{eager:.0f}", f"{other:.0f}"
        rows.append(f"| {' | '.join(cells)} | {other / eager:.2f} |")
    return rows


def _timed(run: Callable) -> tuple[float, object]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result
