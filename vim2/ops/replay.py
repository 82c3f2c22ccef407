"""Inference and training without the Python between their kernels.

Checks, views and layouts take the host longer than a small kernel takes the GPU, and come out the same for every call
with tensors of the same shapes. So what a function of tensors does is noted once (`vim2.ops.notebook`): what it
allocates, which of PyTorch's operators it calls and which kernels it launches, on which parts of which tensors. From
then on just that is done, by a function written for it. In training the backward pass is noted as well, as autograd
made it, and both become one node of its graph. No value is remembered: weights are read at each call, wherever they lie
by then.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Parameter

from .notebook import BothPasses, Notebook, NotReplayableError, noting, share_memory
from .observers import is_autograd_observed, is_captured, is_elsewhere, is_observed
from .operator import refuse_second_derivatives

MAX_REPLAYS = 64  # remembered for an owner: every image may have a size of its own
MAX_OPERATOR_REPLAYS = 1024  # remembered for an operator, which all layers of all models share
# How many calls with such tensors are made as ever before one is noted. Noting takes as long as some calls, and images
# may come in more sizes than can be remembered.
PATIENCE = 3
REFUSED = object()  # stands for the replay of what cannot be noted

# What is known of tensors of a kind, by key: how many calls with such came so far (up to PATIENCE), the replay, or
# REFUSED. Without gradients the replay is a function of the tensors, with them a `BothPasses`.
_Known = dict[Hashable, Any]
_replays: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()


def replay(
    owner: object,
    settings: Hashable,
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    handed_on: int = 0,
) -> Tensor | tuple[Tensor, ...]:
    """function(*tensors), noted the fourth time that such tensors come, and replayed from then on.

    For callers whose operators nobody observes (`observers.is_observed`), and whose kernels are Triton's: what others
    compute cannot be seen here. Where a gradient is wanted, noting takes both passes once more, with the random numbers
    as they were.

    Args:
        owner: Whose replays these are: they live as long as it does.
        settings: All that the function depends on besides the tensors, and besides what was settled on import.
        function: It returns one tensor, or a tuple of them where no gradient is wanted. It changes none of the tensors
            that it is given, and allocates, computes and launches the same for all tensors of the same layouts.
        tensors: Nothing is noted while two of them share memory. Those that the function also knows without being given
            them, as it knows a module's parameters, are `Parameter`s; for gradients, nothing is noted while one of
            these is no leaf of autograd's graph.
        handed_on: How many of the first tensors are handed on: the function returns a tuple of its one result and
            behind it these tensors, or others of the same values in their place. Gradients of what is done with those
            come to this backward pass.
    """
    wants = _wants(tensors)
    if _must_launch(tensors) or (wants and is_autograd_observed()):
        return function(*tensors)
    known = _replays.get(owner)
    if known is None:
        known = _replays[owner] = {}
    key = settings, wants, tuple([None if t is None else _layout(t) for t in tensors])
    entry = known.get(key, 0)
    if entry.__class__ is int:
        if not _is_due(known, key, entry, MAX_REPLAYS):
            return function(*tensors)
        if wants is None:
            known[key], result = note(function, tensors)
            return result
        entry = known[key] = note_both(function, tensors, handed_on)
    if entry is REFUSED or entry.__class__ is int:
        return function(*tensors)
    return entry(*tensors) if wants is None else _Replayed.apply(entry, *tensors)


def replayed(function: Callable) -> Callable:
    """Decorates what an operator does when a compiled graph calls it with Triton as its backend: replayed, it does not
    check and plan at each call what is the same each time, while the GPU waits.

    Args:
        function: It takes tensors, lists of them, and what is no tensor, of which a text names the backend. It returns
            one tensor, or several.
    """
    known: _Known = {}

    @functools.wraps(function)
    def run(*args):
        if is_observed() or torch.is_grad_enabled():
            return function(*args)
        tensors, key = [], []  # written out, since every microsecond here is one of each call
        for argument in args:
            kind = argument.__class__
            if kind is Tensor or kind is Parameter:
                tensors.append(argument)
                key += _layout(argument)
            elif kind is list or kind is tuple:
                key.append(len(argument))
                for each in argument:
                    if isinstance(each, Tensor):
                        tensors.append(each)
                        key += _layout(each)
                    else:
                        key.append(each)
            elif isinstance(argument, Tensor) or (kind is str and argument != "triton"):
                return function(*args)
            else:
                key.append(argument)
        if _must_launch(tensors):
            return function(*args)
        # autocast may cast inputs of some of the operators that the function is made of
        key.append(torch.is_autocast_enabled(tensors[0].device.type))
        key = tuple(key)
        entry = known.get(key, 0)
        if entry.__class__ is not int:
            return function(*args) if entry is REFUSED else entry(*tensors)
        if not _is_due(known, key, entry, MAX_OPERATOR_REPLAYS):
            return function(*args)
        known[key], result = note(_of_tensors_alone(function, args), tensors)
        return result

    return run


def _is_due(known: _Known, key: Hashable, calls: int, most: int) -> bool:
    """Whether a call is to be noted, after `calls` with such tensors before it. If not, it is counted.

    Args:
        known: What is known of all tensors, by key.
        key: The key of such tensors.
        calls: How many calls came before.
        most: How many keys are remembered.
    """
    if calls >= PATIENCE:
        return True
    if calls == 0 and len(known) >= most:
        known.clear()
    known[key] = calls + 1
    return False


def _of_tensors_alone(function: Callable, args: tuple) -> Callable:
    """A function of these arguments, as one of the tensors among them."""

    def call(*tensors):
        rest = iter(tensors)

        def fill(argument):
            if isinstance(argument, list | tuple):
                return [fill(each) for each in argument]
            return next(rest) if isinstance(argument, Tensor) else argument

        return function(*map(fill, args))

    return call


def _wants(tensors: Sequence[Tensor | None]) -> tuple[bool, ...] | None:
    """Which tensors want a gradient; None if no gradient is wanted."""
    if not torch.is_grad_enabled():
        return None
    wants = tuple([t is not None and t.requires_grad for t in tensors])
    return wants if any(wants) else None


def _must_launch(tensors: Sequence[Tensor | None]) -> bool:
    """Whether kernels must be launched as ever: because a notebook is noting what this is a part of, and learns of
    launches from them alone; kernels are only to be compiled; hooks wait for launches; or the tensors are on another
    GPU."""
    from .triton_launch import has_hooks, notes

    return notes.take is not None or notes.compiles_only or has_hooks() or is_elsewhere(tensors)


def _layout(t: Tensor) -> tuple:
    """What a replay depends on of a tensor: all but its values."""
    return t.shape, t.stride(), t.dtype, t.get_device(), t.data_ptr() % 16


def note(function: Callable, tensors: Sequence[Tensor | None]) -> tuple[Any, Tensor | tuple[Tensor, ...]]:
    """The replay of a function, or REFUSED, or PATIENCE if it can be tried again; and its result for these tensors."""
    if share_memory(tensors) or is_captured(tensors):
        return PATIENCE, function(*tensors)
    notebook = Notebook(tensors)
    entry = REFUSED
    try:
        with noting(notebook):
            result = function(*tensors)
    except torch.OutOfMemoryError:
        entry, result = PATIENCE, None
    except Exception:
        result = None
    if result is None:  # outside of the clauses above, which keep all that the error's frames hold from being freed
        return entry, function(*tensors)  # an error that has nothing to do with the notebook is raised again
    try:
        return notebook.finish(result), result
    except NotReplayableError:
        return REFUSED, result


def note_both(function: Callable, tensors: Sequence[Tensor | None], handed_on: int) -> BothPasses | Any:
    """A function's `BothPasses`, REFUSED, or PATIENCE where it can be tried again; `handed_on` as for `replay`."""
    if is_captured(tensors):
        return PATIENCE
    if share_memory(tensors) or any(t is not None and t._backward_hooks for t in tensors):
        return PATIENCE  # hooks would see the gradients that are made here
    if any(isinstance(t, Parameter) and not t.is_leaf for t in tensors):
        return PATIENCE  # the function reads it where it is, and not the leaf below that stands for it
    on_gpu = [t.get_device() for t in tensors if t is not None and t.is_cuda][:1]
    leaves = [t if t is None or t.is_leaf else t.detach().requires_grad_(t.requires_grad) for t in tensors]
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    notebook = Notebook(leaves)
    try:
        with torch.random.fork_rng(on_gpu), torch.autograd.set_multithreading_enabled(False):
            with noting(notebook):
                results = function(*leaves) if handed_on else (function(*leaves),)
            given = [torch.empty_like(t) for t in results]
            notebook.begin_backward(results[0].detach(), given)
            with torch.autocast(notebook.device, enabled=False), noting(notebook):
                grads = iter(torch.autograd.grad(results, wanted, given, allow_unused=True))
        grads = [next(grads) if t is not None and t.requires_grad else None for t in leaves]
        return notebook.finish_both(grads, tuple(map(_layout, given)))
    except torch.OutOfMemoryError:
        return PATIENCE
    except Exception:
        return REFUSED


# Has a node let go of what it has saved, unless its graph is kept. Other versions of PyTorch may not have it.
clear_saved = getattr(torch._C._FunctionBase, "maybe_clear_saved_tensors", lambda ctx: None)


class _Replayed(torch.autograd.Function):
    """Both passes as one node of autograd's graph."""

    @staticmethod
    def forward(ctx, both: BothPasses, *tensors):
        result, *saved = both.forward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.both = both
        ctx.save_for_backward(*[tensors[i] for i in both.given], *saved)
        handed_on = len(both.layouts) - 1
        return (result, *tensors[:handed_on]) if handed_on else result

    @staticmethod
    def backward(ctx, grad, *others):
        refuse_second_derivatives()
        both = ctx.both
        if grad is None:  # nobody used the result
            return None, *others, *(None,) * (len(ctx.needs_input_grad) - 1 - len(others))
        saved = list(ctx.saved_tensors)
        clear_saved(ctx)  # from here on nobody but that list holds them, which the pass empties
        grads = [_laid_out(t, layout, grad) for t, layout in zip((grad, *others), both.layouts)]
        return None, *both.backward(*grads, saved)


def _laid_out(grad: Tensor | None, layout: tuple, other: Tensor) -> Tensor:
    """A gradient in the layout of the one that was noted, on another tensor's device; zeros if there is none."""
    if grad is not None and _layout(grad) == layout:
        return grad
    shape, stride, dtype, *_ = layout
    copy = torch.empty_strided(shape, stride, dtype=dtype, device=other.device)
    return copy.zero_() if grad is None else copy.copy_(grad)
