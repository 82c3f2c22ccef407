"""A model's passes in training as CUDA graphs.

A GPU runs the kernels of a small model faster than its host launches them; a graph of them is launched as a whole.
"""

import warnings

import torch
from torch import Tensor, nn

from .errors import UserError, first_line
from .progress import COMPILING, say_if_slow

__all__ = ["record"]


def record(module: nn.Module, inputs: tuple[Tensor, ...], amp_dtype: torch.dtype | None = None) -> nn.Module:
    """Record a module's forward and backward pass.

    A backward pass leaves the gradients where the next one puts its own: who adds gradients of several passes up has to
    give the parameters gradients beforehand, to add to.

    Args:
        module: On a GPU, its parts in training or evaluation mode as they are to run. Its `forward` becomes the graphs'
            launch; to keep a model's own, wrap it.
        inputs: Contiguous tensors of the shapes that are to come.
        amp_dtype: Precision under autocast; without autocast if None.

    Returns:
        The module. Its weights stay those that optimisers change, and its buffers are as they were before.

    Raises:
        UserError: It does something that cannot be recorded, such as waiting for the GPU.
    """
    if hasattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch"):
        # recorded on a stream of their own and launched on another, graphs are what PyTorch would warn of
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    buffers = [buffer.clone() for buffer in module.buffers()]
    try:
        autocast = torch.autocast("cuda", amp_dtype, enabled=amp_dtype is not None, cache_enabled=False)
        with autocast, say_if_slow(COMPILING), warnings.catch_warnings():
            # The backward pass begins with a matrix product, in a thread that has not used the GPU yet. PyTorch
            # then does what is needed, and warns that it did.
            warnings.filterwarnings("ignore", message="Attempting to run cuBLAS, but there was no current CUDA context")
            graphed = torch.cuda.make_graphed_callables(module, inputs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UserError(
            f"The model cannot be recorded as CUDA graphs ({first_line(error)}): leave out --cuda-graph."
        ) from None
    with torch.no_grad():
        for buffer, before in zip(module.buffers(), buffers):  # recording ran the model, which changed its averages
            buffer.copy_(before)
    return graphed
