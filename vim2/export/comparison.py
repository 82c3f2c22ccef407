"""What other runtimes make of an exported model, beside PyTorch."""

import statistics
import timeit
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..command.errors import UserError
from ..command.tables import table
from .examples import examples
from .forecaster import ForecasterModule

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["ONNX_RUNTIMES", "SIZES", "compare", "run_onnxruntime", "run_pt2"]

SIZES = ((224, 224), (256, 320), (97, 131))  # the last has odd sides, and rounds up in every stage
# Runs that are not timed: in the fourth, a ViM2 notes what its layers launch, and from then on repeats it.
_WARM_UPS, _WARM_UPS_EXPORTED = 5, 2


def run_onnxruntime(path: Path, device: str) -> tuple[str, Callable[..., list[Tensor]]]:
    """onnxruntime's name and version, and an ONNX file as a function of its inputs: on the CPU with as many threads as
    PyTorch has, on a GPU from and to its memory.

    Raises:
        UserError: onnxruntime is not installed, or not for this device.
    """
    try:
        import numpy
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
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    chosen = {"cpu": provider, "cuda": (provider, {"use_tf32": 0})}[device]  # products of float32 in full
    session = onnxruntime.InferenceSession(path, options, providers=[chosen])
    if provider not in session.get_providers():  # it goes on without one that does not start
        raise UserError(f"onnxruntime's {provider} does not start here, see what it says above: leave --device out.")

    names = [i.name for i in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        return [torch.from_numpy(t) for t in session.run(None, {name: t.numpy() for name, t in zip(names, inputs)})]

    def run_there(*inputs: Tensor) -> list[Tensor]:
        binding = session.io_binding()
        for name, t in zip(names, inputs):
            dtype = numpy.dtype(str(t.dtype).removeprefix("torch."))
            binding.bind_input(name, device, t.device.index, dtype, list(t.shape), t.data_ptr())
        for output in session.get_outputs():
            binding.bind_output(output.name, device)
        torch.cuda.current_stream().synchronize()  # its stream is another
        session.run_with_iobinding(binding)
        return [torch.from_numpy(t) for t in binding.copy_outputs_to_cpu()]

    version = f"onnxruntime {onnxruntime.__version__}"
    return (f"{version} ({provider})", run) if device == "cpu" else (f"{version} ({_shares(session)})", run_there)


def _shares(session: "onnxruntime.InferenceSession") -> str:
    """How many of a file's operators, those in its scans' steps included, each provider runs."""
    counts = Counter()
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] += len(part.get_nodes())
    return ", ".join(f"{provider}: {count} operators" for provider, count in counts.items())


def run_openvino(path: Path, device: str) -> tuple[str, Callable[..., list[Tensor]]]:
    """OpenVINO's name and version, and an ONNX file as a function of its inputs, in float32 on the CPU with as many
    threads as PyTorch has.

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

    def run(*inputs: Tensor) -> list[Tensor]:
        return [torch.from_numpy(t) for t in compiled([t.numpy() for t in inputs]).values()]

    return f"OpenVINO {openvino.__version__.partition('-')[0]}", run


ONNX_RUNTIMES = {"onnxruntime": run_onnxruntime, "openvino": run_openvino}


def run_pt2(path: Path, device: str) -> tuple[str, Callable[..., Tensor | list[Tensor]]]:
    """AOTInductor's name, and a package as a function of its inputs, on the device that it was compiled for."""
    return "AOTInductor", torch._inductor.aoti_load_package(str(path))


@torch.no_grad()
def compare(
    model: nn.Module,
    name: str,
    other: Callable[..., Tensor | list[Tensor]],
    sizes: Sequence[tuple[int, int] | None],
    batches: Sequence[int] = (1,),
    repeats: int = 9,
) -> str:
    """Run an exported model beside its model in eager mode. From then on convolutions of float32 are in full, not in
    TF32, as products of matrices are anyway.

    Args:
        model: The model, in eval mode.
        name: The runtime's name, with its version.
        other: The exported model.
        sizes: Height and width of images; of a forecaster [None].
        batches: Sizes of batches, of random images or windows.
        repeats: Timed runs of each, in turn, after some that are not.

    Raises:
        UserError: The outputs are of other shapes.

    Returns:
        A table: the largest difference of an output and the largest output, medians of times.
    """
    torch.backends.cudnn.allow_tf32 = False
    runtime = name.partition(" ")[0]
    header = ["size", "batch", "largest difference", "largest output", "eager, ms", f"{runtime}, ms", "ratio"]
    rows = []
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        for batch in batches:
            inputs = _inputs(model, size, batch, generator)
            runs = (partial(_outputs, model, inputs), partial(_outputs, other, inputs))
            for _ in range(_WARM_UPS):
                expected = runs[0]()
            for _ in range(_WARM_UPS_EXPORTED):
                given = runs[1]()
            for a, b in zip(given, expected, strict=True):
                if a.shape != b.shape:
                    shapes = f"{tuple(a.shape)}, and the model {tuple(b.shape)}"
                    raise UserError(f"{runtime} gives {shapes}: the file is of another model, or other classes.")
            times = [[timeit.timeit(run, number=1) for run in runs] for _ in range(repeats)]
            difference = max((a - b).abs().max().item() for a, b in zip(given, expected, strict=True))
            largest = max(t.abs().max().item() for t in expected)
            eager, exported = (1000 * statistics.median(taken) for taken in zip(*times))
            shape = " x ".join(str(side) for side in size or inputs[0].shape[1:])
            cells = [shape, str(batch), f"{difference:.1e}", f"{largest:.2f}", f"{eager:.3g}", f"{exported:.3g}"]
            rows.append([*cells, f"{exported / eager:.2f}"])
    return f"{name}, PyTorch {torch.__version__}, {_machine(inputs[0].device)}\n{table(header, rows)}"


def _inputs(
    model: nn.Module, size: tuple[int, int] | None, batch: int, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Random ones, on the model's device. A forecaster's history has the means and deviations that it knows."""
    like = [t for t, _ in examples(model, size).values()]
    inputs = [torch.randn(batch, *t.shape[1:], generator=generator, dtype=t.dtype).to(t.device) for t in like]
    if isinstance(model, ForecasterModule):
        inputs[0] = inputs[0] * model.std + model.mean
    return tuple(inputs)


def _machine(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"threads: {torch.get_num_threads()}"


def _outputs(run: Callable[..., Tensor | Sequence[Tensor]], inputs: Sequence[Tensor]) -> list[Tensor]:
    results = run(*inputs)
    return [t.cpu() for t in ([results] if isinstance(results, Tensor) else results)]
