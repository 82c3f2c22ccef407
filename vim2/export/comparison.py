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
from .examples import first_convolution

__all__ = ["ONNX_RUNTIMES", "SIZES", "compare", "run_onnxruntime", "run_pt2"]

SIZES = ((224, 224), (256, 320), (97, 131))  # the last has odd sides, and rounds up in every stage


def run_onnxruntime(path: Path, device: str) -> tuple[str, Callable[[Tensor], list[Tensor]]]:
    """onnxruntime's name and version, and an ONNX file as a function of images: on the CPU with as many threads as
    PyTorch has, on a GPU with its copies of images and results.

    Raises:
        UserError: onnxruntime is not installed, or not for this device.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise UserError("--compare needs the package onnxruntime: pip install onnxruntime.") from None
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    if provider not in (available := onnxruntime.get_available_providers()):
        raise UserError(
            f"onnxruntime has no {provider} here, only {', '.join(available)}: pip install onnxruntime-gpu, or leave "
            "--device out."
        )
    if device == "cuda":
        onnxruntime.preload_dlls()  # of CUDA, from where PyTorch has them
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    chosen = {"cpu": provider, "cuda": (provider, {"use_tf32": 0})}[device]  # products of float32 in full
    session = onnxruntime.InferenceSession(path, options, providers=[chosen])
    if provider not in session.get_providers():  # it goes on without one that does not start
        raise UserError(f"onnxruntime's {provider} does not start here, see what it says above: leave --device out.")

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(t) for t in session.run(None, {"images": images.cpu().numpy()})]

    return f"onnxruntime {onnxruntime.__version__} ({provider})", run


def run_openvino(path: Path, device: str) -> tuple[str, Callable[[Tensor], list[Tensor]]]:
    """OpenVINO's name and version, and an ONNX file as a function of images, in float32 on the CPU with as many threads
    as PyTorch has.

    Raises:
        UserError: OpenVINO is not installed; another device.
    """
    try:
        import openvino
    except ModuleNotFoundError:
        raise UserError("--compare openvino needs the package openvino: pip install openvino.") from None
    if device != "cpu":
        raise UserError("OpenVINO is compared on the CPU: leave --device out.")
    # where processors can, it would compute in bfloat16
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(str(path), "CPU", options)

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(t) for t in compiled(images.numpy()).values()]

    return f"OpenVINO {openvino.__version__.partition('-')[0]}", run


ONNX_RUNTIMES = {"onnxruntime": run_onnxruntime, "openvino": run_openvino}


def run_pt2(path: Path, device: str) -> tuple[str, Callable[[Tensor], Tensor | list[Tensor]]]:
    """AOTInductor's name, and a package as a function of images, on the device that it was compiled for."""
    return "AOTInductor", torch._inductor.aoti_load_package(str(path))


@torch.no_grad()
def compare(
    model: nn.Module,
    name: str,
    other: Callable[[Tensor], Tensor | list[Tensor]],
    sizes: Sequence[tuple[int, int]],
    repeats: int = 9,
) -> str:
    """Run an exported model beside its model in eager mode.

    Args:
        model: In eval mode.
        name: Of the runtime, with its version.
        other: The exported model.
        sizes: Height and width of the images, one in a batch, random.
        repeats: Timed runs of each, in turn, after two that are not.

    Returns:
        A table: the largest difference of an output and the largest output, medians of times.
    """
    runtime = name.partition(" ")[0]
    header = ["size", "largest difference", "largest output", "eager, ms", f"{runtime}, ms", "ratio"]
    rows = []
    generator = torch.Generator().manual_seed(0)
    device, channels = next(model.parameters()).device, first_convolution(model).shape[1]
    for height, width in sizes:
        images = torch.randn(1, channels, height, width, generator=generator).to(device)
        runs = (partial(_outputs, model, images), partial(_outputs, other, images))
        for _ in range(2):
            expected, given = (run() for run in runs)
        times = [[timeit.timeit(run, number=1) for run in runs] for _ in range(repeats)]
        difference = max((a - b).abs().max().item() for a, b in zip(given, expected, strict=True))
        largest = max(t.abs().max().item() for t in expected)
        eager, exported = (1000 * statistics.median(taken) for taken in zip(*times))
        cells = [f"{height} x {width}", f"{difference:.1e}", f"{largest:.2f}", f"{eager:.3g}", f"{exported:.3g}"]
        rows.append([*cells, f"{exported / eager:.2f}"])
    return f"{name}, PyTorch {torch.__version__}, threads: {torch.get_num_threads()}\n{table(header, rows)}"


def _outputs(run: Callable[[Tensor], Tensor | Sequence[Tensor]], images: Tensor) -> list[Tensor]:
    results = run(images)
    return [t.cpu() for t in ([results] if isinstance(results, Tensor) else results)]
