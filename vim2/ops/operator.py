"""How the package's forward operators are registered with PyTorch, and whether what they keep will be needed."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def needs_backward(*tensors: Tensor) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def refuse_transforms(*tensors: Tensor) -> None:
    """Refuse what operators would get wrong without a word, or fail at with a riddle.

    Raises:
        RuntimeError: Within torch.func's vmap, grad, jvp or the like; a tensor with a forward-mode tangent.
    """
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "vim2's scan knows no torch.func transforms (vmap, grad, jvp, jacrev, ...): loop over samples in place of "
            "vmap, and use torch.autograd.grad or backward()."
        )
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError("vim2's scan has no forward-mode derivatives: use backward().")


def refuse_second_derivatives() -> None:
    """Called first in a backward pass.

    Raises:
        RuntimeError: It is to be differentiated itself.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("Gradients of vim2's operators have no gradients: leave out create_graph=True.")


def require_fit(fits: bool, name: str, *tensors: Tensor | None, **sizes) -> None:
    """Refuse tensors and sizes that do not fit together, before a kernel reads memory that is not theirs.

    A graph that was traced or exported holds sizes as they were, and calls an operator with them whatever tensors come.

    Args:
        fits: Whether they do.
        name: Of the operator.
        tensors: Its tensors, for the message.
        sizes: Its numbers, likewise.

    Raises:
        ValueError: They do not.
    """
    if not fits:
        shapes = ", ".join("none" if t is None else str(tuple(t.shape)) for t in tensors)
        numbers = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"vim2::{name}: tensors of {shapes} do not fit together{f', or not {numbers}' if numbers else ''}. A graph "
            "that was traced at one image size works at that size only: give it images of that size, or export it with "
            "dynamic sizes."
        )


def register_operator(name: str) -> Callable:
    """Register the decorated function as an operator that changes none of its arguments.

    It is what `torch.library.custom_op` does, but for a check of every result against aliasing the arguments: at batch
    1 a GPU waits for the host, and these checks are half of what calling an operator costs.

    Args:
        name: With its namespace, such as "vim2::norm_gate"; `torch.library.register_fake` and `register_autograd` take
            the same.
    """

    def register(function: Callable) -> Callable:
        torch.library.define(
            name, torch.library.infer_schema(function, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,)
        )
        torch.library.impl(name, "default", torch.compiler.disable(function))
        return function

    return register
