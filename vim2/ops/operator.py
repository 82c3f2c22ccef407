"""How the package's operators are registered with PyTorch, called, and refused where they would be wrong."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils import _pytree as pytree

from .observers import is_compiling_to_run, is_observed


def needs_backward(*tensors: Tensor) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def refuse_transforms(*tensors: Tensor) -> None:
    """Refuse calls whose results would be wrong without a warning, or that would fail with an error nobody understands.

    Raises:
        RuntimeError: Within torch.func's vmap, grad, jvp or the like; a tensor with a forward-mode tangent.
    """
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "vim2's operators know no torch.func transforms (vmap, grad, jvp, jacrev, ...): loop over samples in place "
            "of vmap, and use torch.autograd.grad or backward()."
        )
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError("vim2's operators have no forward-mode derivatives: use backward().")


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
        name: The operator's name.
        tensors: Its tensors, for the message.
        sizes: Its numbers, for the message.

    Raises:
        ValueError: They do not fit.
    """
    if not fits:
        shapes = ", ".join("none" if t is None else str(tuple(t.shape)) for t in tensors)
        numbers = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"vim2::{name}: tensors of {shapes} do not fit together{f', or not {numbers}' if numbers else ''}. A graph "
            "that was traced at one image size works at that size only: give it images of that size, or export it with "
            "dynamic sizes."
        )


class Operator:
    """An operator that is registered with PyTorch, and in eager mode called without it.

    PyTorch's dispatcher and the rules around it take the host longer than a small kernel takes the GPU. They are for
    those who look at operators: compilers, tracers, tensor subclasses, modes. Where nobody does, a call goes straight
    to the function, or to an autograd function of the same rules.

    Args:
        name: Its name with its namespace, such as "vim2::norm_gate".
        function: What runs. It returns a tensor, or a tuple of tensors and, for results that were not asked for, None.
            PyTorch, whose operators return tensors alone, is given an empty float32 tensor for each None.
        check: Called with the arguments before the function, where the call came through PyTorch: a graph that was
            traced at one size may call with any.
        mutates_args: Names of arguments that the function writes to; others must stay as they are.
        decorate: A decorator of check and function together, for calls that come through PyTorch.
    """

    def __init__(
        self,
        name: str,
        function: Callable,
        check: Callable,
        mutates_args: Sequence[str] = (),
        decorate: Callable[[Callable], Callable] = lambda function: function,
    ):
        self.name = name
        self.function = function
        self.differentiable = None

        @decorate
        @functools.wraps(function)
        def checked(*args):
            check(*args)
            return _all_tensors(function(*args))

        if mutates_args:
            torch.library.custom_op(name, checked, mutates_args=mutates_args)
        else:
            _define(name, torch.library.infer_schema(function, mutates_args=()), checked)
        self.registered = getattr(torch.ops.vim2, name.removeprefix("vim2::"))

    def __call__(self, *args):
        if is_observed():
            refuse_transforms(*(t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)))
            return self.registered(*args)
        needs_gradient = False
        for argument in args:
            for t in argument if argument.__class__ in (list, tuple) else (argument,):
                kind = t.__class__
                if kind is Tensor or kind is Parameter:
                    if t.is_meta:
                        return self.registered(*args)
                    needs_gradient = needs_gradient or t.requires_grad
                elif kind not in _NO_TENSORS:
                    return self.registered(*args)
        if needs_gradient and self.differentiable and torch.is_grad_enabled():
            return self.differentiable(*args)
        return self.function(*args)

    def register_fake(self, function: Callable) -> Callable:
        """Decorates the rule for tensors without data."""
        return torch.library.register_fake(self.name)(function)

    def register_autograd(self, backward: Callable, setup_context: Callable) -> None:
        """As torch.library.register_autograd, with one difference: gradients of results that nobody used are None,
        unless all are, in which case the first is zero.

        A first argument that is a list of tensors may have gradients, which `backward` returns as a list.
        """

        def set_up(ctx, inputs, output):
            ctx.set_materialize_grads(False)
            first = output[0] if isinstance(output, tuple) else output
            ctx.first_result = first.shape, first.dtype, first.device
            setup_context(ctx, inputs, output)

        def differentiate(ctx, *grads):
            if all(grad is None for grad in grads):  # as where what follows has no gradient itself
                shape, dtype, device = ctx.first_result
                grads = (torch.zeros(shape, dtype=dtype, device=device), *grads[1:])
            return backward(ctx, *grads)

        torch.library.register_autograd(self.name, differentiate, setup_context=set_up)
        function, name = self.function, self.name

        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(ctx, length, *args):
                if length is not None:
                    args = (args[:length], *args[length:])
                # The same tensors are saved either way: a backward pass, or a checkpoint's second forward pass, may go
                # the other.
                output = _all_tensors(function(*args))
                set_up(ctx, args, output)
                ctx.length, ctx.operator = length, name
                return output

            @staticmethod
            def backward(ctx, *grads):
                first, *others = differentiate(ctx, *grads)
                return None, *([first] if ctx.length is None else first), *others

        def differentiable(first, *args):
            if isinstance(first, Tensor):
                return Differentiable.apply(None, first, *args)
            return Differentiable.apply(len(first), *first, *args)

        self.differentiable = differentiable


def _all_tensors(results: Tensor | tuple[Tensor | None, ...]) -> Tensor | tuple[Tensor, ...]:
    """An operator's results, with an empty tensor for each None."""
    if not isinstance(results, tuple) or all(t is not None for t in results):
        return results
    first = next(t for t in results if t is not None)
    return tuple(first.new_empty(0, dtype=torch.float32) if t is None else t for t in results)


_NO_TENSORS = {int, float, bool, str, type(None), torch.dtype}


def register_operator(name: str, check: Callable, **options) -> Callable[[Callable], Operator]:
    """A decorator that makes an `Operator` of a function; the options are `Operator`'s."""
    return lambda function: Operator(name, function, check, **options)


def opaque_on_cpus(name: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Decorates the plain form of an operator: torch.compile sees one call of it on a CPU, as it does on a GPU.

    Else the compiler would make some fifty C++ programs of a small model's plain forms, which take most of a minute to
    compile, and longer with dynamic sizes. torch.export still looks inside: its programs must run without this package.

    Args:
        name: Its name with its namespace, such as "vim2::norm_gate_torch". The backward pass, which computes the form
            again, is registered as that and "_backward". The form's arguments are annotated, for the schema; its
            results are new tensors, and become contiguous.
        fake: The rule for tensors without data. The form itself would be slow, and its convolutions' own rules ask
            how large maps are, which makes a compiled graph unfit for other sizes.
    """

    def decorate(function: Callable) -> Callable:
        schema = torch.library.infer_schema(function, mutates_args=())
        registered = _register_plain(name, schema, function, fake)
        recomputed = _register_plain_backward(f"{name}_backward", schema, function)

        def derive(ctx, *grads):
            refuse_second_derivatives()
            gradients = recomputed(list(grads), *_arguments(ctx, ctx.saved_tensors, ctx.others))
            return tuple(_arguments(ctx, gradients, [None] * len(ctx.others)))

        torch.library.register_autograd(name, derive, setup_context=_save_arguments)

        @functools.wraps(function)
        def call(*args):
            first = args[0] if isinstance(args[0], Tensor) else args[0][0]
            if first.device.type == "cpu" and is_compiling_to_run():
                return registered(*args)
            return function(*args)

        return call

    return decorate


def _register_plain(name: str, schema: str, function: Callable, fake: Callable) -> Callable:
    """Register an operator that runs a function of plain PyTorch, whose results it makes contiguous. Returns it."""

    def run(*args):
        return pytree.tree_map(Tensor.contiguous, function(*args))

    _define(name, schema, run)
    torch.library.register_fake(name)(fake)
    return getattr(torch.ops.vim2, name.removeprefix("vim2::"))


def _register_plain_backward(name: str, schema: str, function: Callable) -> Callable:
    """Register the backward pass of such an operator, which runs the function once more. Returns it: a function of the
    list of the results' gradients and the operator's arguments, to the list of their tensors' gradients."""

    def differentiate(grads, *args):
        leaves, structure = pytree.tree_flatten(args)
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() if isinstance(t, Tensor) else t for t in leaves]
            outputs = pytree.tree_leaves(function(*pytree.tree_unflatten(leaves, structure)))
        return list(torch.autograd.grad(outputs, [t for t in leaves if isinstance(t, Tensor)], grads))

    def fake(grads, *args):
        return [t.new_empty(t.shape) for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]

    arguments, _ = schema.split(" -> ")
    return _register_plain(name, f"(Tensor[] grads, {arguments[1:]} -> Tensor[]", differentiate, fake)


def _save_arguments(ctx, inputs, output) -> None:
    """Save an operator's arguments, tensors and others, lists of them too, for `_arguments`."""
    leaves, ctx.structure = pytree.tree_flatten(inputs)
    ctx.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    ctx.is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
    ctx.save_for_backward(*(leaf for leaf in leaves if isinstance(leaf, Tensor)))


def _arguments(ctx, tensors: Sequence[Tensor], others: Sequence) -> Sequence:
    """Arguments of the structure that `_save_arguments` has seen, from these tensors and, elsewhere, these others."""
    tensors = iter(tensors)
    leaves = [next(tensors) if is_tensor else other for is_tensor, other in zip(ctx.is_tensor, others)]
    return pytree.tree_unflatten(leaves, ctx.structure)


def _define(name: str, schema: str, function: Callable) -> None:
    """What torch.library.custom_op does, but for a check of every result against aliasing the arguments, which is half
    of what a call costs."""
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "default", torch.compiler.disable(function))
