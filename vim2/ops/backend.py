"""Which implementation runs an operator: Triton kernels on CUDA, Numba's on CPUs, plain PyTorch everywhere, and on
request the kernels of Mamba's authors, mamba-ssm's scan and causal-conv1d's convolutions."""

import importlib.util
import os
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TRITON_DTYPES = DTYPES[:3]
BACKENDS = ("auto", "triton", "numba", "mamba_ssm", "torch")
DEFAULT_BACKEND = os.environ.get("VIM2_SCAN_BACKEND") or "auto"  # as it was on import; empty is unset
HAS_TRITON = importlib.util.find_spec("triton") is not None
IS_ROCM = torch.version.hip is not None  # PyTorch's build for AMD's GPUs
HAS_NUMBA = importlib.util.find_spec("numba") is not None
# their compiled parts, by the names that these have
HAS_MAMBA_SSM = importlib.util.find_spec("selective_scan_cuda") is not None
HAS_CAUSAL_CONV1D = importlib.util.find_spec("causal_conv1d_cuda") is not None
CAUSAL_CONV1D_TAPS = (2, 3, 4)  # widths of convolutions that its kernels know

_warned = set()

# Numba's threads do not outlive a fork: a child that starts them anew dies or hangs.
_numba = {"has run": False, "is lost": False}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _numba.update({"is lost": _numba["has run"]}))
FORKED = "This process was forked after Numba's scan had run, and cannot use Numba"


def note_numba() -> None:
    """Remember that Numba has started its threads in this process."""
    _numba["has run"] = True


@torch.compiler.disable
def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=4)


def check_tensors(*tensors: Tensor) -> None:
    """Raise a ValueError unless all are of floating dtypes that operators know, and on one device."""
    for t in tensors:
        if t.dtype not in DTYPES:
            raise ValueError(f"Tensors must be float16, bfloat16, float32 or float64, got {t.dtype}: convert it first.")
        if t.device != tensors[0].device:
            raise ValueError(
                f"Tensors must be on one device, got {tensors[0].device} and {t.device}: move them with .to(device)."
            )


def check_backend(backend: str | None, device: str, scan: bool = True) -> str:
    """The name of a backend, once it is known that it can run here.

    Args:
        backend: As in `resolve_backend`.
        device: Type of device that it is to run on, such as "cuda"; on "meta", where nothing is computed, all run.
        scan: Whether it is to run the scan, for which alone "mamba_ssm" has to have a GPU.

    Returns:
        One of BACKENDS.

    Raises:
        ValueError: Another name.
        RuntimeError: A backend that is not installed, or that does not know the device.
    """
    backend = backend or DEFAULT_BACKEND
    if backend not in BACKENDS:
        raise ValueError(f"The backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if device == "meta":
        return backend
    if backend == "mamba_ssm" and not HAS_MAMBA_SSM:
        raise RuntimeError(
            "The mamba_ssm backend needs the package mamba-ssm with its CUDA kernels, which are not installed: "
            "pip install --no-build-isolation \"vim2[mamba]\" (they want nvcc), or use the backend 'auto'."
        )
    if backend == "mamba_ssm" and scan and device != "cuda":
        raise RuntimeError("The mamba_ssm backend needs tensors on a GPU; use the backend 'auto' elsewhere.")
    if backend == "triton" and not HAS_TRITON:
        raise RuntimeError("The Triton backend needs the package triton, which is not installed.")
    if backend == "triton" and IS_ROCM:
        raise RuntimeError("The Triton kernels hold instructions of NVIDIA's GPUs: use the backend 'torch' on AMD's.")
    if backend == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("The Triton backend needs tensors on a GPU; for its interpreter, set TRITON_INTERPRET=1.")
    if backend == "numba" and _numba["is lost"]:
        raise RuntimeError(f"{FORKED}: use another backend here, or start processes by spawn.")
    if backend == "numba" and (not HAS_NUMBA or device != "cpu"):
        raise RuntimeError("The Numba backend needs the package numba, and tensors on the CPU.")
    return backend


def resolve_backend(backend: str | None, *tensors: Tensor, scan: bool = False, causal_taps: int = 0) -> str:
    """The backend that runs an operator on these tensors: "triton", "numba" (in which the scan and convolutions along
    sequences have a form; other operators then run in PyTorch) or "torch"; for both of these, also "mamba_ssm".

    Args:
        backend: One of BACKENDS; None is the environment's VIM2_SCAN_BACKEND, else "auto". "auto" is Triton for CUDA
            tensors on NVIDIA's GPUs and Numba for the CPU's, where they are installed, but for float64, which neither
            knows. It never is "mamba_ssm", whose package needs Triton, too. Other operators take "mamba_ssm" as "auto",
            and so do causal convolutions off a GPU, in float64, with taps that causal-conv1d does not know and, said
            once, where that package is not installed.
        scan: Whether the operator is the scan.
        causal_taps: The taps of the causal convolutions that the operator is made of, if it is.

    Raises:
        ValueError: Another name; tensors that are not of a floating dtype, or on several devices.
        RuntimeError: A backend that is not installed, or that does not know the tensors' device or dtype.
    """
    if HAS_TRITON and backend is None and DEFAULT_BACKEND == "auto" and not IS_ROCM and _are_for_triton(tensors):
        return "triton"  # as what follows would find, in a fraction of its time
    check_tensors(*tensors)
    backend = check_backend(backend, tensors[0].device.type, scan)
    if tensors[0].is_meta:
        return "torch"  # nothing is computed, and any backend gives tensors of these shapes
    is_double = any(t.dtype == torch.float64 for t in tensors)
    if backend == "mamba_ssm" and not scan:
        if causal_taps in CAUSAL_CONV1D_TAPS and tensors[0].device.type == "cuda" and not is_double:
            if HAS_CAUSAL_CONV1D:
                return backend
            _warn_once(
                "vim2: causal-conv1d is not installed: with the backend mamba_ssm, the scan alone runs on the kernels "
                "of Mamba's authors, and convolutions as with auto. pip install --no-build-isolation causal-conv1d"
            )
        backend = "auto"
    if is_double and (backend == "triton" or (backend == "numba" and scan)):
        raise RuntimeError(f"The {backend} backend computes in float32, and a tensor is float64: use backend='torch'.")
    if backend != "auto":
        return backend
    device = tensors[0].device.type
    if device not in ("cuda", "cpu") or is_double:
        return "torch"
    if device == "cpu":
        if scan and _numba["is lost"]:
            _warn_once(f"vim2: {FORKED}; it scans in plain PyTorch, slowly. Processes started by spawn can.")
        return "numba" if HAS_NUMBA and not _numba["is lost"] else "torch"
    if not HAS_TRITON:
        _warn_once("vim2: Triton is not installed; operators run in plain PyTorch, which is slow on a GPU.")
        return "torch"
    if IS_ROCM:
        _warn_once("vim2: its Triton kernels are for NVIDIA's GPUs; on AMD's, operators run in plain PyTorch, slowly.")
        return "torch"
    return "triton"


def _are_for_triton(tensors: Sequence[Tensor]) -> bool:
    """Whether all are on one GPU, and of dtypes that Triton's kernels take."""
    device = tensors[0].get_device()
    return all(t.is_cuda and t.get_device() == device and t.dtype in TRITON_DTYPES for t in tensors)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of an operator's arithmetic: float64 where any input is float64, else float32. States, sums and
    statistics never live in half precision."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def autocast_off(tensor: Tensor) -> AbstractContextManager:
    """Autocast off on this tensor's device. Meta tensors, for which PyTorch knows no autocast, need nothing, nor does
    eager mode where it is off, as in most backward passes; a graph may be called with it on."""
    if tensor.is_meta or not (torch.compiler.is_compiling() or torch.is_autocast_enabled(tensor.device.type)):
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype in which linear layers take this tensor under autocast, None where they take it as it is: with autocast
    off, and float64."""
    device = tensor.device.type
    # not by is_autocast_available, which breaks graphs of 2.11
    if tensor.is_meta or tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
