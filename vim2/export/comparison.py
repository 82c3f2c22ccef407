"""What other runtimes make of an exported model, beside PyTorch."""

import statistics
import timeit
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..command.errors import UserError
from ..command.tables import table

__all__ = ["SIZES", "compare", "run_onnx", "run_pt2"]

SIZES = ((224, 224), (256, 320), (97, 131))  # the last has odd sides, and rounds up in every stage


def run_onnx(path: Path) -> tuple[str, Callable[[Tensor], list[Tensor]]]:
    """onnxruntime's name and version, and an ONNX file as a function of images, on the CPU with as many threads as
    PyTorch has.

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

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(t) for t in session.run(None, {"images": images.numpy()})]

    return f"onnxruntime {onnxruntime.__version__}", run


def run_pt2(path: Path) -> tuple[str, Callable[[Tensor], Tensor | list[Tensor]]]:
    """AOTInductor's name, and a package as a function of images."""
    return "AOTInductor", torch._inductor.aoti_load_package(str(path))


@torch.no_grad()
def compare(
    model: nn.Module,
    name: str,
    other: Callable[[Tensor], Tensor | list[Tensor]],
    sizes: Sequence[tuple[int, int]],
    channels: int,
    repeats: int = 9,
) -> str:
    """Run an exported model beside its model in eager mode.

    Args:
        model: In eval mode.
        name: Of the runtime, with its version.
        other: The exported model.
        sizes: Height and width of the images, one in a batch, random.
        channels: Of the images.
        repeats: Timed runs of each, in turn, after two that are not.

    Returns:
        A table: the largest difference of an output and the largest output, medians of times.
    """
    runtime = name.partition(" ")[0]
    header = ["size", "largest difference", "largest output", "eager, ms", f"{runtime}, ms", "ratio"]
    rows = []
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    for height, width in sizes:
        images = torch.randn(1, channels, height, width, generator=generator).to(device)
        runs = (partial(_outputs, model, images), partial(_outputs, other, images))
        for _ in range(2):
            expected, given = (run() for run in runs)
        times = [[timeit.timeit(run, number=1) for run in runs] for _ in range(repeats)]
        difference = max((a - b).abs().max().item() for a, b in zip(given, expected, strict=True))
        largest = max(t.abs().max().item() for t in expected)
        eager, exported = (1000 * statistics.median(taken) for taken in zip(*times))
        cells = [f"{height} x {width}", f"{difference:.1e}", f"{largest:.2f}", f"{eager:.0f}", f"{exported:.0f}"]
        rows.append([*cells, f"{exported / eager:.2f}"])
    return f"{name}, PyTorch {torch.__version__}, threads: {torch.get_num_threads()}\n{table(header, rows)}"


def _outputs(run: Callable[[Tensor], Tensor | Sequence[Tensor]], images: Tensor) -> list[Tensor]:
    results = run(images)
    return [t.cpu() for t in ([results] if isinstance(results, Tensor) else results)]
