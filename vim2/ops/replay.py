"""Inference without the Python between its kernels.

Checks, views and layouts take the host longer than a small kernel takes the GPU, and come out the same for every call
with tensors of the same shapes. So what a function of tensors does is noted once: what it allocates, which of PyTorch's
operators it calls and which kernels it launches, on which parts of which tensors. From then on just that is done, by a
function written for it. No value is remembered: weights are read at each call, wherever they lie by then.
"""

import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from .operator import own

MAX_REPLAYS = 64  # of an owner, where every image has a size of its own
SEEN, REFUSED = object(), object()  # in place of the replay of what has come but once, and of what cannot be noted

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
    aten.reshape.default,
    aten.split.sizes,
    aten.tensor_split.sections,
    aten.to.dtype,
    aten.unflatten.int,
}
# operators, called with less ado
QUICKER = {
    aten._to_copy.default: torch.Tensor.to,
    aten.addmm.default: torch.addmm,
    aten.linear.default: F.linear,
    aten.mm.default: torch.mm,
    aten.to.dtype: torch.Tensor.to,
}


class NotReplayableError(Exception):
    """A function does what cannot be noted."""


def replay(
    owner: object, settings: Hashable, function: Callable[..., Tensor], tensors: Sequence[Tensor | None]
) -> Tensor:
    """function(*tensors), noted the second time that such tensors come, and replayed from then on.

    For callers that want no gradient, whose operators nobody observes (`operator.is_observed`), and whose kernels are
    Triton's: what others compute cannot be seen here.

    Args:
        owner: Whose replays these are: they go with it.
        settings: All that the function reads besides the tensors, and besides what was settled on import.
        function: It returns one tensor, changes none that it is given, and allocates, computes and launches the same
            for all tensors that lie alike.
        tensors: No two of which share memory.
    """
    known = _replays.get(owner)
    if known is None:
        known = _replays[owner] = {}
    key = settings, tuple([None if t is None else _layout(t) for t in tensors])
    way = known.get(key)
    if way is None:
        if len(known) >= MAX_REPLAYS:
            known.clear()
        known[key] = SEEN
        return function(*tensors)
    if way is REFUSED:
        return function(*tensors)
    if way is SEEN:
        known[key], result = note(function, tensors)
        return result
    return way(*tensors)


def _layout(t: Tensor) -> tuple:
    return t.shape, t.stride(), t.dtype, t.get_device(), t.data_ptr() % 16


def note(function: Callable[..., Tensor], tensors: Sequence[Tensor | None]) -> tuple[Any, Tensor]:
    """The replay of a function, or REFUSED, and its result for these tensors."""
    from .triton_launch import notes

    if notes.take is not None:
        return SEEN, function(*tensors)  # what this is part of is being noted
    notebook = Notebook(tensors)
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # which holds tensors that no line has made
    own.modes += 1
    notes.take = notebook.take_launch
    try:
        with notebook:
            result = function(*tensors)
    except Exception:
        result = None
    finally:
        notes.take = None
        own.modes -= 1
        torch.set_autocast_cache_enabled(cached)
    if result is None:
        return REFUSED, function(*tensors)  # which raises again what is an error without a notebook, too
    try:
        return notebook.replay(result), result
    except NotReplayableError:
        return REFUSED, result


class Notebook(TorchDispatchMode):
    """Notes what is done while it is on, as the lines of a function of the same tensors.

    Tensors are known by their memory: each is the part of a size and with strides, from an offset on, of a tensor that
    was given, or made by one of the lines. So views need no lines of their own until a part is used.
    """

    def __init__(self, tensors: Sequence[Tensor | None]):
        super().__init__()
        self.constants: dict[str, Any] = {}
        self.lines: list[tuple[str | None, str]] = []  # the name of what is made, if anything is, and how
        self.whole: dict[StorageWeakRef, tuple[str, torch.dtype, tuple]] = {}  # by memory: what lies there
        self.parts: dict[tuple, str] = {}
        self.problem = ""
        self.device = next((t.device.type for t in tensors if t is not None), "cpu")
        self.autocast = torch.is_autocast_enabled(self.device)
        self.given = [f"given{i}" for i in range(len(tensors))]
        for name, t in zip(self.given, tensors):
            if t is not None:
                self.problem = self.problem or ("tensors share memory" if _memory(t) in self.whole else "")
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
            raise NotReplayableError(f"{function} changes a tensor")
        results = result if isinstance(result, list | tuple) else [result]
        if all(isinstance(t, Tensor) and _memory(t) in self.whole for t in results):
            return
        if not any(isinstance(t, Tensor) for t in (*arguments, *results)):
            return  # as of what dtypes are promoted to
        if not isinstance(result, Tensor):
            raise NotReplayableError(f"{function} returns something else than a tensor")
        if function in ALLOCATIONS:
            kind = f"dtype={self.constant(result.dtype)}, device={self.constant(result.device)}"
            if result.is_contiguous():
                text = f"{self.constant(torch.empty)}({tuple(result.shape)}, {kind})"
            else:
                text = f"{self.constant(torch.empty_strided)}({tuple(result.shape)}, {result.stride()}, {kind})"
        else:
            given = [self.text(value) for value in arguments]
            given += [f"{name}={self.text(value)}" for name, value in options.items()]
            text = f"{self.constant(QUICKER.get(function, function))}({', '.join(given)})"
        name = f"made{len(self.lines)}"
        self.whole[_memory(result)] = name, result.dtype, _extent(result)
        self.lines.append((name, text))

    def take_launch(self, launch, tensors) -> None:
        """Note a launch, which `triton_launch.notes` tells of."""
        try:
            text = ", ".join(map(self.text, tensors))
            self.lines.append((None, f"{self.constant(launch)}({text})"))
        except NotReplayableError as problem:
            self.problem = self.problem or str(problem)

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
        if _memory(t) not in self.whole:
            raise NotReplayableError("a tensor of unknown origin")
        name, dtype, whole = self.whole[_memory(t)]
        shape, stride, offset = extent = _extent(t)
        if t.dtype != dtype:
            raise NotReplayableError("a view as another dtype")
        if extent == whole:
            return name
        if (name, extent) not in self.parts:
            offset -= whole[2]
            at = f"{name}.storage_offset() + {offset}" if name in self.given else f"{offset}"
            self.parts[name, extent] = f"part{len(self.lines)}"
            self.lines.append((self.parts[name, extent], f"{name}.as_strided({shape}, {stride}, {at})"))
        return self.parts[name, extent]

    def replay(self, result: Tensor) -> Callable[..., Tensor]:
        """The function that was noted.

        Raises:
            NotReplayableError: It cannot be.
        """
        returned = self.part(result)
        if self.problem:
            raise NotReplayableError(self.problem)
        # From the end to the start: what nobody uses is not made, and what nobody uses any more makes room for others.
        lines, used = [f"    return {returned}"], {returned}
        for name, text in reversed(self.lines):
            if name and name not in used:
                continue
            names = set(re.findall(r"\b(?:made|part)\d+", text))
            if names - used:
                lines.append(f"    del {', '.join(sorted(names - used))}")
            used |= names
            lines.append(f"    {name} = {text}" if name else f"    {text}")
        lines.append(f"def replay({', '.join(self.given)}):")
        scope = dict(self.constants)
        exec("\n".join(reversed(lines)), scope)
        return _without_autocast(scope["replay"], self.device) if self.autocast else scope["replay"]


def _without_autocast(function: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    """The same with autocast off: the casts are lines of their own."""

    def replay(*tensors):
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


def _memory(t: Tensor) -> StorageWeakRef:
    """Of whatever age: what is freed is known as such, and no other's."""
    return StorageWeakRef(t.untyped_storage())


def _extent(t: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    return tuple(t.shape), t.stride(), t.storage_offset()
