"""Inference and training without the Python between their kernels.

Checks, views and layouts take the host longer than a small kernel takes the GPU, and come out the same for every call
with tensors of the same shapes. So what a function of tensors does is noted once: what it allocates, which of PyTorch's
operators it calls and which kernels it launches, on which parts of which tensors. From then on just that is done, by a
function written for it. In training the backward pass is noted as well, as autograd made it, and both become one
node of its graph. No value is remembered: weights are read at each call, wherever they lie by then.
"""

import functools
import itertools
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._dynamo import guards
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from .backend import TRITON_DTYPES
from .operator import hands_out_what_is_saved, is_observed, own, refuse_second_derivatives

MAX_REPLAYS = 64  # of an owner, where every image has a size of its own
MAX_OPERATOR_REPLAYS = 1024  # of an operator, which all layers of all models share
# Calls with such tensors that are made as ever before one is noted, which takes as long as some: images may come in
# more sizes than can be remembered.
PATIENCE = 3
MAX_TENSORS = 480  # of a launch of many: of arguments of a kernel, drivers before CUDA 12.1 take 4 KiB
REFUSED = object()  # in place of the replay of what cannot be noted

NAMES = re.compile(r"\b(?:given|made|part|other)\d+\b|\bgrad\b")  # of tensors, in lines

_replays: WeakKeyDictionary[Any, dict[Hashable, Any]] = WeakKeyDictionary()

aten = torch.ops.aten
ALLOCATIONS = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
# operators made of others, none of which autocast casts
MOVES = {
    aten.chunk.default,
    aten.contiguous.default,
    aten.flatten.using_ints,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.narrow.default,
    aten.promote_types.default,
    aten.reshape.default,
    aten.split.sizes,
    aten.tensor_split.sections,
    aten.to.dtype,
    aten.unflatten.int,
}
CASTS = {aten._to_copy.default, aten.to.dtype}
# What allocates on the current device in a fraction of torch.empty's time, as for torch.compile's programs. Other
# versions of PyTorch may not have it, nor `_reinterpret_tensor` below, for both are its own affair.
QUICK_ALLOCATIONS = {
    device: getattr(guards, name)
    for device, name in (("cpu", "_empty_strided_cpu"), ("cuda", "_empty_strided_cuda"))
    if hasattr(guards, name)
}
# operators, called with less ado
QUICKER = {
    aten._to_copy.default: functools.partial(torch.Tensor.to, copy=True),
    aten.addmm.default: torch.addmm,
    aten.addmm_.default: torch.Tensor.addmm_,
    aten.linear.default: F.linear,
    aten.mm.default: torch.mm,
    aten.sum.IntList_out: torch.sum,
    aten.sum.dim_IntList: torch.sum,
    aten.to.dtype: torch.Tensor.to,
}


def _take_part(whole: Tensor, shape: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Tensor:
    """The part of a tensor from an offset on, no view to autograd."""
    return whole.as_strided(shape, stride, whole.storage_offset() + offset).detach()


take_part = getattr(guards, "_reinterpret_tensor", _take_part)


class NotReplayableError(Exception):
    """A function does what cannot be noted."""


def replay(
    owner: object,
    settings: Hashable,
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    passes: int = 0,
) -> Tensor | tuple[Tensor, ...]:
    """function(*tensors), noted the fourth time that such tensors come, and replayed from then on.

    For callers whose operators nobody observes (`operator.is_observed`), and whose kernels are Triton's: what others
    compute cannot be seen here. Where a gradient is wanted, noting takes both passes once more, with the random numbers
    as they were.

    Args:
        owner: Whose replays these are: they go with it.
        settings: All that the function reads besides the tensors, and besides what was settled on import.
        function: It returns one tensor, or a tuple of them where no gradient is wanted, changes none that it is given,
            and allocates, computes and launches the same for all tensors that lie alike.
        tensors: Nothing is noted while two of them share memory. Those of which the function knows without being given
            them, as of a module's parameters, are `Parameter`s; for gradients nothing is noted while one is no leaf of
            autograd's graph.
        passes: So many of the first tensors are handed on: the function returns them, or others of the same values in
            their place, in a tuple behind its one result. Gradients of what is done with those come to this backward
            pass.
    """
    wants = _wants(tensors)
    if _must_launch(tensors) or (wants and is_watched()):
        return function(*tensors)
    known = _replays.get(owner)
    if known is None:
        known = _replays[owner] = {}
    key = settings, wants, tuple([None if t is None else _layout(t) for t in tensors])
    way = known.get(key, 0)
    if way.__class__ is int:
        if not _is_due(known, key, way, MAX_REPLAYS):
            return function(*tensors)
        if wants is None:
            known[key], result = note(function, tensors)
            return result
        way = known[key] = note_both(function, tensors, passes)
    if way is REFUSED or way.__class__ is int:
        return function(*tensors)
    return way(*tensors) if wants is None else _Replayed.apply(way, *tensors)


def replayed(function: Callable) -> Callable:
    """Decorates what an operator of Triton's kernels does when a compiled graph calls it: replayed, it does not check
    and plan at each call what is the same each time, for which the GPU would wait.

    Args:
        function: It takes tensors, lists of them, and what is no tensor, of which a text names the backend. It returns
            one tensor, or several.
    """
    known: dict[Hashable, Any] = {}  # as an owner's of `replay`

    @functools.wraps(function)
    def run(*args):
        if is_observed() or torch.is_grad_enabled():
            return function(*args)
        tensors, key = [], []  # what is quick here is what makes replays so
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
        # of the operators that a function is made of, autocast may cast some
        key.append(torch.is_autocast_enabled(tensors[0].device.type))
        key = tuple(key)
        way = known.get(key, 0)
        if way.__class__ is not int:
            return function(*args) if way is REFUSED else way(*tensors)
        if not _is_due(known, key, way, MAX_OPERATOR_REPLAYS):
            return function(*args)
        known[key], result = note(_of_tensors_alone(function, args), tensors)
        return result

    return run


def _is_due(known: dict[Hashable, Any], key: Hashable, calls: int, most: int) -> bool:
    """Whether it is time to note what `calls` calls with such tensors came before; if not, counts one more.

    Args:
        known: The replays, and the calls so far of what is not noted, by key.
        key: Of such tensors.
        calls: Known of the key.
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
    """Which tensors want a gradient, if any does."""
    if not torch.is_grad_enabled():
        return None
    wants = tuple([t is not None and t.requires_grad for t in tensors])
    return wants if any(wants) else None


def _must_launch(tensors: Sequence[Tensor | None]) -> bool:
    """Whether kernels must be launched as ever: what this is part of is noted, too, by the launches that a replay does
    not tell of, kernels are only to be compiled, hooks wait for launches, or the tensors are on another GPU."""
    from .triton_launch import has_hooks, notes

    return notes.take is not None or notes.compiles_only or has_hooks() or is_elsewhere(tensors)


def is_elsewhere(tensors: Sequence[Tensor | None]) -> bool:
    """Whether tensors are on another GPU than the current one."""
    first = next((t for t in tensors if t is not None), None)
    return first is not None and first.is_cuda and first.get_device() != torch._C._cuda_getDevice()


def is_captured(tensors: Sequence[Tensor | None]) -> bool:
    """Whether what is done with tensors becomes part of a CUDA graph, in which there is no place for what noting does
    besides: it launches more, and prepares memory that the graph must not own."""
    return any(t is not None and t.is_cuda for t in tensors) and torch.cuda.is_current_stream_capturing()


def is_watched() -> bool:
    """Whether autograd is asked for what one node cannot give: what is saved between the passes to be handed to others,
    or an error traced to where it arose."""
    return hands_out_what_is_saved() or torch.is_anomaly_enabled()


def _layout(t: Tensor) -> tuple:
    return t.shape, t.stride(), t.dtype, t.get_device(), t.data_ptr() % 16


def note(function: Callable, tensors: Sequence[Tensor | None]) -> tuple[Any, Tensor | tuple[Tensor, ...]]:
    """The replay of a function, or REFUSED, or PATIENCE if it can be tried again; and its result for these tensors."""
    if _share_memory(tensors) or is_captured(tensors):
        return PATIENCE, function(*tensors)
    notebook = Notebook(tensors)
    way = REFUSED
    try:
        with noting(notebook):
            result = function(*tensors)
    except torch.OutOfMemoryError:
        way, result = PATIENCE, None
    except Exception:
        result = None
    if result is None:  # outside of the clauses above, which keep all that the error's frames hold from being freed
        return way, function(*tensors)  # which raises again what is an error without a notebook, too
    try:
        return notebook.replay(result), result
    except NotReplayableError:
        return REFUSED, result


@dataclass(frozen=True)
class BothPasses:
    """A function and its gradients, as they were noted.

    Attributes:
        forward: Takes the function's tensors. Returns its result, and what else `backward` wants.
        given: Which of the function's tensors `backward` wants first.
        layouts: Of the gradients of the result, and of the tensors that are handed on behind it.
        backward: Takes these gradients, and a list of what it wants, which it empties, so that each of them is freed
            as soon as it is not needed any more. Returns one or None for each of the function's tensors.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    given: tuple[int, ...]
    layouts: tuple[tuple, ...]
    backward: Callable[..., tuple[Tensor | None, ...]]


def note_both(function: Callable, tensors: Sequence[Tensor | None], passes: int) -> Any:
    """A function's `BothPasses`, REFUSED, or PATIENCE where this is no time to note. It `passes` on the first tensors
    as that of `replay` does."""
    if is_captured(tensors):
        return PATIENCE
    if _share_memory(tensors) or any(t is not None and t._backward_hooks for t in tensors):
        return PATIENCE  # hooks would see gradients of ours
    if any(isinstance(t, Parameter) and not t.is_leaf for t in tensors):
        return PATIENCE  # the function reads it where it is, and not the leaf below that stands for it
    on_gpu = [t.get_device() for t in tensors if t is not None and t.is_cuda][:1]
    leaves = [t if t is None or t.is_leaf else t.detach().requires_grad_(t.requires_grad) for t in tensors]
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    notebook = Notebook(leaves)
    try:
        with torch.random.fork_rng(on_gpu), torch.autograd.set_multithreading_enabled(False):
            with noting(notebook):
                results = function(*leaves) if passes else (function(*leaves),)
            given = [torch.empty_like(t) for t in results]
            notebook.turn(results[0].detach(), given)
            with torch.autocast(notebook.device, enabled=False), noting(notebook):
                grads = iter(torch.autograd.grad(results, wanted, given, allow_unused=True))
        grads = [next(grads) if t is not None and t.requires_grad else None for t in leaves]
        return notebook.both_passes(grads, tuple(map(_layout, given)))
    except torch.OutOfMemoryError:
        return PATIENCE
    except Exception:
        return REFUSED


# Has a node let go of what it has saved, unless its graph is kept. Other versions of PyTorch may not have it.
clear_saved = getattr(torch._C._FunctionBase, "maybe_clear_saved_tensors", lambda ctx: None)


class _Replayed(torch.autograd.Function):
    """Both passes as one node of autograd's graph."""

    @staticmethod
    def forward(ctx, way, *tensors):
        result, *saved = way.forward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.way = way
        ctx.save_for_backward(*[tensors[i] for i in way.given], *saved)
        passes = len(way.layouts) - 1
        return (result, *tensors[:passes]) if passes else result

    @staticmethod
    def backward(ctx, grad, *others):
        refuse_second_derivatives()
        way = ctx.way
        if grad is None:  # nobody used the result
            return None, *others, *(None,) * (len(ctx.needs_input_grad) - 1 - len(others))
        saved = list(ctx.saved_tensors)
        clear_saved(ctx)  # from here on nobody but that list holds them, which the pass empties
        grads = [_laid_out(t, layout, grad) for t, layout in zip((grad, *others), way.layouts)]
        return None, *way.backward(*grads, saved)


def _laid_out(grad: Tensor | None, layout: tuple, other: Tensor) -> Tensor:
    """A gradient as the noted one lay, on another's device; zero if there is none."""
    if grad is not None and _layout(grad) == layout:
        return grad
    shape, stride, dtype, *_ = layout
    copy = torch.empty_strided(shape, stride, dtype=dtype, device=other.device)
    return copy.zero_() if grad is None else copy.copy_(grad)


@contextmanager
def noting(notebook: "Notebook") -> Iterator[None]:
    """Has a notebook note what this thread does."""
    from .triton_launch import notes

    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # which holds tensors that no line has made
    own.modes += 1
    notes.take = notebook.take_launch
    try:
        with notebook:
            yield
    finally:
        notes.take = None
        own.modes -= 1
        torch.set_autocast_cache_enabled(cached)


class Together(NamedTuple):
    """What one launch can do together with others of its kind.

    Attributes:
        launch: A `triton_sums.Sums`.
        tensors: That it was given, sources and targets.
        given: How lines give them.
    """

    launch: Any
    tensors: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
    given: list[tuple[str, ...]]


class Line(NamedTuple):
    """Of a function.

    Attributes:
        name: Of what it makes, if it makes anything.
        text: How.
        together: The same as what can be done together with others.
    """

    name: str | None
    text: str
    together: Together | None = None


class Notebook(TorchDispatchMode):
    """Notes what is done while it is on, as the lines of a function of the same tensors.

    Tensors are known by their memory: each is the part of a size and with strides, from an offset on, of a tensor that
    was given, or made by one of the lines. So views need no lines of their own until a part is used.
    """

    def __init__(self, tensors: Sequence[Tensor | None]):
        super().__init__()
        self.constants: dict[str, Any] = {}
        self.lines: list[Line] = []
        self.whole: dict[StorageWeakRef, tuple[str, torch.dtype, tuple]] = {}  # by memory: what lies there
        self.parts: dict[tuple, str] = {}
        self.problem = ""
        self.numbers = itertools.count()  # of the names of what is made
        self.forward: tuple[str, list[Line]] = "", []  # that pass's result and lines
        first = next((t for t in tensors if t is not None), torch.empty(0))
        self.device, self.index = first.device.type, first.get_device()
        self.autocast = torch.is_autocast_enabled(self.device)
        self.given = [f"given{i}" for i in range(len(tensors))]
        self.grads: list[str] = []  # that come to the backward pass
        for name, t in zip(self.given, tensors):
            if t is not None:
                self.whole[_memory(t)] = name, t.dtype, _extent(t)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if self.autocast and function not in MOVES and _has_parts_to_cast(function, self.device):
            raise NotReplayableError(f"{function} comes as a whole, so that autocast does not see its parts")
        result = function(*arguments, **(options or {}))
        try:
            self.take_call(function, arguments, options or {}, result)
        except NotReplayableError as problem:
            self.problem = self.problem or str(problem)
        return result

    def take_call(self, function, arguments, options, result) -> None:
        """Note a call of one of PyTorch's operators, unless all that it returns are parts of what is known."""
        if function._schema.is_mutable:
            self.take_change(function, arguments, options)
            return
        results = result if isinstance(result, list | tuple) else [result]
        if all(isinstance(t, Tensor) and _memory(t) in self.whole for t in results):
            return
        if not any(isinstance(t, Tensor) for t in (*arguments, *results)):
            return  # as of what dtypes are promoted to
        if not isinstance(result, Tensor):
            raise NotReplayableError(f"{function} returns something else than a tensor")
        text = self.allocation(result) if function in ALLOCATIONS else self.call(function, arguments, options)
        name = f"made{next(self.numbers)}"
        self.whole[_memory(result)] = name, result.dtype, _extent(result)
        self.lines.append(Line(name, text, self.copy(arguments[0], result) if function in CASTS else None))

    def allocation(self, t: Tensor) -> str:
        """Of memory for such a tensor."""
        allocate, extent = torch.empty_strided, f"{tuple(t.shape)}, {t.stride()}"
        kind = f"dtype={self.constant(t.dtype)}, device={self.constant(t.device)}"
        if t.device.type == self.device and self.device in QUICK_ALLOCATIONS:
            allocate, kind = QUICK_ALLOCATIONS[self.device], self.constant(t.dtype)
        return f"{self.constant(allocate)}({extent}, {kind})"

    def copy(self, source: Tensor, target: Tensor) -> Together | None:
        """A copy in another dtype, where it can be done together with others."""
        from .triton_launch import INTERPRETED
        from .triton_sums import FLAT, copy_of

        if INTERPRETED and target.itemsize < source.itemsize:
            return None  # it cuts digits off, where a GPU rounds as PyTorch does
        tensors = (source,), (target,)
        plain = all(t.dtype in TRITON_DTYPES and t.is_contiguous() for t in (source, target))
        if not plain or source.device != target.device or not 0 < source.numel() < 2**31 - FLAT:
            return None
        return Together(copy_of(source.numel(), source.device), tensors, self.given_to_kernel(tensors))

    def take_change(self, function, arguments, options) -> None:
        """Note a call that changes tensors, all of them made by the lines of this pass."""
        values = dict(zip([argument.name for argument in function._schema.arguments], arguments)) | options
        for argument in function._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = values[argument.name]
                name = (
                    self.whole[_memory(value)][0] if isinstance(value, Tensor) and _memory(value) in self.whole else ""
                )
                if name not in {line.name for line in self.lines}:
                    raise NotReplayableError(f"{function} changes a tensor")
        self.lines.append(Line(None, self.call(function, arguments, options)))

    def call(self, function, arguments, options) -> str:
        given = [self.text(value) for value in arguments]
        # left out is what says nothing, which not all ways of calling take
        unsaid = None, False, torch.strided
        for argument in function._schema.arguments:
            said = not argument.has_default_value() or argument.default_value not in (None, False)
            if argument.name in options and (said or not any(options[argument.name] is each for each in unsaid)):
                given.append(f"{argument.name}={self.text(options[argument.name])}")
        return f"{self.constant(QUICKER.get(function, function))}({', '.join(given)})"

    def take_launch(self, launch, tensors, form) -> None:
        """Note a launch, which `triton_launch.notes` tells of: of its kernel's form, which takes addresses, without a
        check of what never changes."""
        from .triton_sums import Sums

        try:
            given = self.given_to_kernel(tensors)
            together = Together(launch, tensors, given) if isinstance(launch, Sums) else None
            self.lines.append(Line(None, self.launch(launch, form, given), together))
        except NotReplayableError as problem:
            self.problem = self.problem or str(problem)

    def launch(self, launch, form, given: Sequence[str | tuple[str, ...]]) -> str:
        """Of a kernel's form that takes what is given."""
        given = ", ".join(
            f"({''.join(f'{one}, ' for one in each)})" if isinstance(each, tuple) else each for each in given
        )
        if form is None:
            return f"{self.constant(launch)}({given})"
        self.constant(launch)  # which may hold what the kernel reads
        run, function, metadata = map(self.constant, form)
        first = f"*{launch.grid}, stream, {function}, {metadata}, None, None, None"  # no hooks
        return f"{run}({first}, {given}, *{self.constant(launch.settled)})"

    def given_to_kernel(self, tensors: Sequence) -> list[str | tuple[str, ...]]:
        """Tensors, tuples of them and None as a kernel is given them: addresses, but in Triton's interpreter."""
        from .triton_launch import INTERPRETED

        write = self.text if INTERPRETED else self.address
        return [tuple(map(write, t)) if isinstance(t, tuple) else write(t) for t in tensors]

    def address(self, value: Tensor | None) -> str:
        """Of a tensor that a kernel is given."""
        if value is None:
            return "None"
        if _memory(value) not in self.whole:
            raise NotReplayableError("a tensor of unknown origin")
        name, _, (_, _, start) = self.whole[_memory(value)]
        offset = (value.storage_offset() - start) * value.itemsize
        return f"{name}.data_ptr() + {offset}" if offset else f"{name}.data_ptr()"

    def constant(self, value) -> str:
        """The name of a value that the lines use as it is."""
        for name, known in self.constants.items():
            if known is value:
                return name
        name = f"constant{len(self.constants)}"
        self.constants[name] = value
        return name

    def text(self, value) -> str:
        """A value as the lines have it."""
        if isinstance(value, Tensor):
            return self.part(value)
        if isinstance(value, list | tuple):
            inside = "".join(f"{self.text(each)}, " for each in value)
            return f"[{inside}]" if isinstance(value, list) else f"({inside})"
        if value is None or isinstance(value, bool | int | str):
            return repr(value)
        if isinstance(value, float | torch.dtype | torch.device | torch.layout | torch.memory_format):
            return self.constant(value)
        raise NotReplayableError(f"a value of {type(value)}")

    def part(self, t: Tensor) -> str:
        """A tensor as the lines have it: by the name of what lies in its memory, or of a part that a line takes."""
        name, whole, extent = self.place(t)
        if extent == whole:
            return name
        if (name, extent) not in self.parts:
            if name in self.given + self.grads:
                text = _view(name, whole, extent, from_elsewhere=True)
            else:
                # No view for autograd, and with a version counter of its own. That may miss no change between the
                # passes: the backward pass takes its parts anew (`turn` empties `parts`), from what is saved whole.
                shape, stride, offset = extent
                text = f"{self.constant(take_part)}({name}, {shape}, {stride}, {offset - whole[2]})"
            self.parts[name, extent] = f"part{next(self.numbers)}"
            self.lines.append(Line(self.parts[name, extent], text))
        return self.parts[name, extent]

    def place(self, t: Tensor) -> tuple[str, tuple, tuple]:
        """What lies in a tensor's memory, its extent, and that of the tensor."""
        if _memory(t) not in self.whole:
            raise NotReplayableError("a tensor of unknown origin")
        name, dtype, whole = self.whole[_memory(t)]
        if t.dtype != dtype:
            raise NotReplayableError("a view as another dtype")
        return name, whole, _extent(t)

    def result(self, t: Tensor) -> str:
        """The tensor that the lines of a forward pass return: no view to autograd, which as the part that it may be of
        what was made could not be changed in place. Of changes, what is saved of the same memory learns."""
        name, whole, extent = self.place(t)
        if extent == whole:
            return name
        return f"{_view(name, whole, extent, name in self.given)}.detach()"

    def turn(self, result: Tensor, grads: Sequence[Tensor]) -> None:
        """From the forward pass to the backward pass, which is given the gradient of the result, and others."""
        self.forward = (self.result(result), self.lines)  # in this order: a part of what was made is a line, too
        self.lines, self.parts = [], {}
        self.grads = ["grad", *(f"other{i}" for i in range(len(grads) - 1))]
        for name, grad in zip(self.grads, grads):
            self.whole[_memory(grad)] = name, grad.dtype, _extent(grad)

    def replay(self, result: Tensor | tuple[Tensor, ...]) -> Callable[..., Tensor | tuple[Tensor, ...]]:
        """The function that was noted.

        Raises:
            NotReplayableError: It cannot be.
        """
        if isinstance(result, Tensor):
            returned = self.result(result)
        else:
            returned = f"({''.join(f'{self.result(t)}, ' for t in result)})"
        replay = self.function(self.given, returned, self.lines)
        return _without_autocast(replay, self.device) if self.autocast else replay

    def both_passes(self, grads: Sequence[Tensor | None], layouts: tuple[tuple, ...]) -> BothPasses:
        """The function that was noted, and its gradients.

        Raises:
            NotReplayableError: They cannot be.
        """
        returned = f"({', '.join('None' if grad is None else self.part(grad) for grad in grads)},)"
        made = {line.name for line in self.lines}
        names = dict.fromkeys(NAMES.findall(f"{returned} {' '.join(line.text for line in self.lines)}"))
        given = [name for name in self.given if name in names]
        saved = [name for name in names if name not in made and name not in self.given + self.grads]
        result, lines = self.forward
        forward = self.function(self.given, f"({', '.join([result, *saved])},)", lines)
        backward = self.function(self.grads, returned, self.lines, [*given, *saved])
        return BothPasses(
            forward=_without_autocast(forward, self.device) if self.autocast else forward,
            given=tuple(self.given.index(name) for name in given),
            layouts=layouts,
            backward=_without_autocast(backward, self.device),  # whether it is on when that pass comes, nobody knows
        )

    def gather(self, lines: Sequence[Line]) -> list[Line]:
        """The same, but of what may be done together that which wants nothing but what was given is done at the start,
        in one launch, and that which nobody waits for at the end, in another; very many tensors, in several."""
        parts = {line.name: NAMES.findall(line.text) for line in lines if line.name and line.name.startswith("part")}

        def named(*texts: str) -> set[str]:
            names = set(NAMES.findall(" ".join(texts)))
            return names.union(*(parts.get(name, ()) for name in names))

        first, last, awaited, written = [], [], set(), set()
        for i in reversed(range(len(lines))):
            line = lines[i]
            if line.name in parts:
                continue
            if line.together:
                sources, targets = (named(*texts) for texts in line.together.given)
                if line.name and sources <= set(self.given):
                    first.append(i)
                    continue
                # Of one launch, nobody knows what is done first: what one reads none of the others writes. Two may
                # write parts of one tensor, side by side.
                if not (sources | targets) & awaited and not sources & written:
                    last.append(i)
                    awaited |= sources
                    written |= targets
                    continue
            awaited |= named(line.text)
        groups = [group if len(group) > 1 else [] for group in (first, last)]
        at_start, body, at_end = [], [], []
        for i, line in enumerate(lines):
            if not any(i in group for group in groups):
                body.append(line)
            elif line.name:
                allocation = Line(line.name, self.allocation(line.together.tensors[1][0]))
                (at_start if i in groups[0] else body).append(allocation)
        for group, where in zip(groups, (at_start, at_end)):
            part, count = [], 0
            for i in group:
                tensors = sum(map(len, lines[i].together.tensors))
                if part and count + tensors > MAX_TENSORS:
                    where.append(self.together(part))
                    part, count = [], 0
                part.append(lines[i].together)
                count += tensors
            if part:
                where.append(self.together(part))
        return [*at_start, *body, *at_end]

    def together(self, each: Sequence[Together]) -> Line:
        """What all of them do, in one launch."""
        from .triton_sums import together

        launch = together([one.launch for one in each], each[0].tensors[0][0].device)
        tensors, given = (
            [tuple(itertools.chain.from_iterable(kind)) for kind in zip(*kinds)]
            for kinds in zip(*[(one.tensors, one.given) for one in each])
        )
        return Line(None, self.launch(launch, launch.launch(*tensors), given))  # of the same tensors, as they are still

    def function(
        self, arguments: Sequence[str], returned: str, lines: Sequence[Line], handed_over: Sequence[str] | None = None
    ) -> Callable:
        """A function of these lines. What is `handed_over` comes behind the other arguments in a list, which is left
        empty."""
        if self.problem:
            raise NotReplayableError(self.problem)
        # From the end to the start: what nobody uses is not made, and what nobody uses any more makes room for others.
        used = set(NAMES.findall(returned))
        written = [f"    return {returned}"]
        for name, text, _ in reversed(self.gather(lines)):
            if name and name not in used:
                continue
            names = set(NAMES.findall(text))
            if last := sorted(names - used - set(arguments)):
                written.append(f"    del {', '.join(last)}")
            used |= names
            written.append(f"    {name} = {text}" if name else f"    {text}")
        if self.index >= 0:
            written.append(f"    stream = {self.constant(torch._C._cuda_getCurrentRawStream)}({self.index})")
        if handed_over is not None:
            written += ["    handed_over.clear()", f"    [{', '.join(handed_over)}] = handed_over"]
            arguments = [*arguments, "handed_over"]
        written.append(f"def replay({', '.join(arguments)}):")
        scope = dict(self.constants)
        exec("\n".join(reversed(written)), scope)
        return scope["replay"]


def _without_autocast(function: Callable, device: str) -> Callable:
    """The same with autocast off: the casts are lines of their own."""

    def replay(*tensors):
        if not torch.is_autocast_enabled(device):
            return function(*tensors)
        torch.set_autocast_enabled(device, False)
        try:
            return function(*tensors)
        finally:
            torch.set_autocast_enabled(device, True)

    return replay


def _has_parts_to_cast(function, device: str) -> bool:
    """Whether an operator is made of others, which autocast may cast, but not the operator itself. In inference mode it
    comes to a notebook as a whole, and autocast is off there."""
    has_kernel, name = torch._C._dispatch_has_kernel_for_dispatch_key, function.name()
    return has_kernel(name, "CompositeImplicitAutograd") and not has_kernel(name, f"Autocast{device.upper()}")


def _view(name: str, whole: tuple, extent: tuple, from_elsewhere: bool) -> str:
    """The text of a part of what has a name; what comes from elsewhere may start anywhere in its memory."""
    shape, stride, offset = extent
    offset -= whole[2]
    return f"{name}.as_strided({shape}, {stride}, {f'{name}.storage_offset() + ' * from_elsewhere}{offset})"


def _memory(t: Tensor) -> StorageWeakRef:
    """Of whatever age: what is freed is known as such, and no other's."""
    return StorageWeakRef(t.untyped_storage())


def _share_memory(tensors: Sequence[Tensor | None]) -> bool:
    """Whether some do, so that a notebook could not tell them apart. Others that lie alike may not."""
    memory = [_memory(t) for t in tensors if t is not None]
    return len(set(memory)) < len(memory)


def _extent(t: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    return tuple(t.shape), t.stride(), t.storage_offset()
