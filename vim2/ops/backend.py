"""Which implementation runs an operator: Triton kernels on CUDA, plain PyTorch everywhere."""

import importlib.util
import os
import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")
DEFAULT_BACKEND = os.environ.get("VIM2_SCAN_BACKEND", "auto")  # as it was on import
HAS_TRITON = importlib.util.find_spec("triton") is not None

_warned = set()


@torch.compiler.disable
def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=4)


def resolve_backend(backend: str | None, *tensors: Tensor) -> str:
    """The backend that runs an operator on these tensors, "triton" or "torch".

    Args:
        backend: One of BACKENDS; None is the environment's VIM2_SCAN_BACKEND, else "auto". "auto" is Triton for CUDA
            tensors where Triton is installed, but for float64, which its kernels do not know.

    Raises:
        ValueError: Another name.
        RuntimeError: "triton" where it is not installed.
    """
    backend = backend or DEFAULT_BACKEND
    if backend not in BACKENDS:
        raise ValueError(f"The backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if backend == "triton" and not HAS_TRITON:
        raise RuntimeError("The Triton backend needs the package triton, which is not installed.")
    if backend != "auto":
        return backend
    if not tensors[0].is_cuda or any(t.dtype == torch.float64 for t in tensors):
        return "torch"
    if not HAS_TRITON:
        _warn_once("vim2: Triton is not installed; operators run in plain PyTorch, which is slow on a GPU.")
        return "torch"
    return "triton"


def autocast_off(tensor: Tensor) -> AbstractContextManager:
    """Autocast off on this tensor's device; meta tensors, for which PyTorch knows no autocast, need nothing."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives to linear layers on this tensor's device, None where it is off."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
