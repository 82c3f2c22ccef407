"""Programs of PyTorch's own operators, and `.pt2` packages of compiled ones (AOTInductor), which load in Python and C++
without this package."""

import copy
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler
from torch.export import Dim, ExportedProgram
from torch.export.passes import move_to_device_pass

from ..command.errors import UserError
from ..files import write_atomically
from ..ops.backend import HAS_TRITON, IS_ROCM
from .aten_scan import selective_scan
from .examples import examples, unwrapped

__all__ = ["MIN_DYNAMIC", "export_program", "export_pt2"]

# Pixels a side: below, the last stage's map has a side of 1, which programs take as fixed.
MIN_DYNAMIC = 36
_MAX_SIDE, _MAX_COUNT = 4096, 1 << 16
_RANGES = {
    "batch": (1, _MAX_COUNT),
    "variates": (1, _MAX_COUNT),
    "height": (MIN_DYNAMIC, _MAX_SIDE),
    "width": (MIN_DYNAMIC, _MAX_SIDE),
}


def export_program(
    model: nn.Module, img_size: tuple[int, int] | None = None, device: str | torch.device = "cpu"
) -> ExportedProgram:
    """A model as a program of PyTorch's operators alone, for inference, in the dtype of its parameters.

    `torch.export.save` writes it, and `torch.export.load` reads it without this package. Batch, height and width, or
    batch and variates, are dynamic, named so, and have ranges.

    Args:
        model: A ViM2, one of timm's features_only, a TSM2, or a forecaster as `ForecasterModule`, on any device. A copy
            of it is exported in eval mode, without what torch.compile or data parallelism has put around it.
        img_size: Height and width in place of dynamic ones from 36 x 36 to 4096 x 4096; batches stay dynamic.
        device: The device on which the program runs.

    Raises:
        UserError: An img_size below 32 x 32, or one for a TSM2; layers that PyTorch has quantized.
    """
    return _program(model, img_size, device, selective_scan)


def _program(
    model: nn.Module, img_size: tuple[int, int] | None, device: str | torch.device, scan: Callable
) -> ExportedProgram:
    """As `export_program`, with a form of the scan."""
    model = copy.deepcopy(unwrapped(model)).cpu().eval()
    dims = {name: Dim(name, min=least, max=most) for name, (least, most) in _RANGES.items()}
    inputs, axes = zip(*examples(model, img_size).values())
    dynamic = tuple({axis: dims[name] for axis, name in of_input.items()} for of_input in axes)
    with torch.no_grad():
        program = torch.export.export(model, inputs, dynamic_shapes=dynamic)
        program = program.run_decompositions({torch.ops.vim2.selective_scan.default: scan})
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # with paths of the machine that exported
    device = torch.device(device)
    if device.type == "cpu":
        return program
    # with its number, which tensors on it have: the program asserts where they are
    return move_to_device_pass(program, torch.empty(0, device=device).device)


def export_pt2(
    model: nn.Module,
    path: str | os.PathLike,
    img_size: tuple[int, int] | None = None,
    device: str | torch.device = "cpu",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Compile a model to a package for AOTInductor, which `torch._inductor.aoti_load_package(path)` loads, and in C++
    `torch::inductor::AOTIModelPackageLoader`. Inputs and outputs are those of the model's `forward`.

    It is made for processors with the vector instructions of this one, or for this machine's GPU, and for this version
    of PyTorch.

    Args:
        model: As for `export_program`, and so are img_size and device.
        path: The file, NAME.pt2, which is replaced in one step.
        metadata: Text by name to keep in the package, which its `get_metadata()` tells.

    Raises:
        UserError: As `export_program`; a path of another name; no C++ compiler, or one that fails, as where a GPU's
            libraries are not found, or that finds libstdc++ but as an archive; a device that is not there.
        OSError: The file cannot be written; what was at `path` is untouched.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise UserError(f"PyTorch reads packages by the name NAME.pt2, got {path.name}: rename it.")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise UserError("A package for GPUs is compiled on a machine with one, and none is here: use the CPU.")
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError("A .pt2 package is compiled by a C++ compiler, and none is here: install g++.") from None
    program = _program(model, img_size, device, _compiled_scan(device))
    configs = {"aot_inductor.metadata": dict(metadata or {})}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        package = os.path.join(folder, path.name)
        try:
            made = torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=configs)
        except (CppCompileError, InductorError) as error:
            failed = getattr(error, "inner_exception", error)
            if not isinstance(failed, CppCompileError):
                raise
            raise UserError(
                f"The C++ compiler fails, {_first_error(failed.output)}: see docs/export.md for what it needs."
            ) from None
        _require_shared_runtime(made)
        write_atomically(path, Path(made).read_bytes())


def _first_error(said: str) -> str:
    """The linker's own line before that with which the compiler ends."""
    lines = [line for line in said.splitlines() if "error" in line or ("ld: " in line and "warning" not in line)]
    return next((line for line in lines if not line.startswith("collect2: ")), (lines or ["saying nothing"])[0])


def _require_shared_runtime(package: str) -> None:
    """Refuse a package whose library, which never does without C++'s runtime, was linked by GCC and does not name
    libstdc++.so: it holds one of its own, and may end the process that loads it, in which PyTorch has brought another.
    The compiler is not asked beforehand, since it does not tell what a script around it adds."""
    with zipfile.ZipFile(package) as archive:
        libraries = [archive.read(name) for name in archive.namelist() if name.endswith(".so")]
    # what a library of ELF needs stands in it as text
    if any(b"GCC: (" in library and b"libstdc++.so" not in library for library in libraries):
        raise UserError(
            "The C++ compiler linked libstdc++.a into the package, and processes that load it would crash: let it find "
            "libstdc++.so, see docs/export.md."
        )


def _compiled_scan(device: str | torch.device) -> Callable:
    """The form of the scan that a device's compiler makes most of: on GPUs of NVIDIA, where PyTorch has Triton, a
    kernel."""
    if torch.device(device).type != "cuda" or not HAS_TRITON or IS_ROCM:
        return selective_scan
    from . import triton_scan

    return triton_scan.selective_scan
