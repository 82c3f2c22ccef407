"""How often a scan's forward kernels keep states for its backward kernels, which recompute the others, and in which
dtype."""

import torch

# A multiple of the steps that the Triton kernels take at once: 4 forward and 3 or 4 backward.
TRITON_CHUNK = 36
MAMBA_CHUNK = 2048  # fixed in mamba-ssm's kernels


def kept_every(backend: str, length: int, keeps: bool) -> int:
    """Steps from one kept state to the next; the sequence's length where none inside it is kept: without a backward
    pass, and in PyTorch's and Numba's forms, which recompute all of them."""
    return {"triton": TRITON_CHUNK, "mamba_ssm": MAMBA_CHUNK}.get(backend, length) if keeps else length


def kept_dtype(activations: torch.dtype) -> torch.dtype:
    """The dtype in which the Triton kernels keep states: bfloat16 where activations are, else float32.

    Gradients that are computed from these states are as exact as that. The scan itself goes on in float32.
    """
    return torch.bfloat16 if activations == torch.bfloat16 else torch.float32
