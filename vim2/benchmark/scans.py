"""The selective scan alone, on every backend, at the same work."""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from ..ops import CROSS_SCAN, selective_scan
from ..ops.backend import HAS_MAMBA_SSM, HAS_NUMBA, HAS_TRITON
from .measuring import AMP, measure

SCAN_SHAPES = ((192, 56), (384, 28), (768, 14), (1536, 7))  # E and the map's side, in the stages of vim2_tiny at 224
D_STATE = 16
MAMBA_KERNELS = "mamba_ssm, kernels alone"


def scan_backends(device_type: str) -> list[str]:
    """What --ops measures by default: all that run here, but for PyTorch's form on a GPU, which takes minutes."""
    if device_type == "cuda":
        return ["triton"] * HAS_TRITON + ["mamba_ssm"] * HAS_MAMBA_SSM or ["torch"]
    return ["numba"] * HAS_NUMBA + ["torch"]


def scan_inputs(batch: int, features: int, side: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Random inputs of `selective_scan` over a side x side map; the parameters in float32, as in a model."""
    generator = torch.Generator(device).manual_seed(0)
    lanes = len(CROSS_SCAN)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    map_shape = (batch, side, side)
    inputs = {
        "u": random(*map_shape, features).to(dtype),
        "delta": random(*map_shape, lanes, features).to(dtype),
        "A": -torch.arange(1.0, D_STATE + 1, device=device).expand(lanes, features, -1).contiguous(),
        "B": random(*map_shape, lanes, D_STATE).to(dtype),
        "C": random(*map_shape, lanes, D_STATE).to(dtype),
        "D": random(lanes, features),
        "delta_bias": random(lanes, features) - 4,  # steps around 0.02, as a model has
    }
    return {name: t.requires_grad_() for name, t in inputs.items()}


def mamba_kernels(inputs: dict[str, Tensor]) -> dict[str, Callable[[], None]]:
    """mamba-ssm's kernels alone at the same work: directions as groups of channels, their copies already made."""
    import selective_scan_cuda

    from ..ops.scan.mamba_ssm_scan import kernel_arguments

    side = inputs["u"].shape[1]
    inputs = {name: t.detach() for name, t in inputs.items()}
    maps = {name: inputs[name].flatten(1, 2) for name in ("u", "delta", "B", "C")}
    arguments = kernel_arguments(**inputs | maps, orders=CROSS_SCAN, height=side, width=side)

    def infer() -> None:
        selective_scan_cuda.fwd(*arguments, True)

    def train() -> None:
        out, states = selective_scan_cuda.fwd(*arguments, True)
        selective_scan_cuda.bwd(*arguments, out, states, None, None, True, False)

    return {"infer": infer, "train": train}


def scan_steps(name: str, inputs: dict[str, Tensor]) -> dict[str, Callable[[], None]]:
    """Forward, and forward + backward, of one backend."""
    if name == MAMBA_KERNELS:
        return mamba_kernels(inputs)

    def infer() -> None:
        with torch.no_grad():
            selective_scan(**inputs, orders=CROSS_SCAN, backend=name)

    grad = torch.ones_like(inputs["u"])

    def train() -> None:
        y = selective_scan(**inputs, orders=CROSS_SCAN, backend=name)
        torch.autograd.grad(y, list(inputs.values()), grad)

    return {"infer": infer, "train": train}


def measure_scan(name: str, features: int, side: int, batch: int, args: argparse.Namespace) -> dict:
    steps = scan_steps(name, scan_inputs(batch, features, side, AMP[args.amp] or torch.float32, args.device))
    row = {"scan": name, "features": features, "length": side * side, "batch": batch}
    return row | {mode: measure(steps[mode], args) for mode in args.modes}
