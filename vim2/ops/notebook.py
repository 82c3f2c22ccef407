"""A notebook: what a function of tensors does, noted down as the lines of a Python function that does just that.

While a notebook is on, it sees every operator of PyTorch that is called and every kernel of ours that is launched. Each
becomes a line of text, in which tensors have names: `given0`, `given1`, ... came in, `made0`, ... were made by a line,
`part0`, ... are parts of one of these, and `grad`, `other0`, ... come to the backward pass. In short:

    def replay(given0, given1):
        made0 = constant0((3, 32), (32, 1), constant1)           # allocates
        constant2(..., made0.data_ptr(), given0.data_ptr(), ...) # launches a kernel
        del given0
        return constant3(made0, given1)                          # calls an operator
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._dynamo import guards
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from .backend import TRITON_DTYPES
from .observers import ours

MAX_TENSORS = 480  # in a launch of many casts and sums: drivers before CUDA 12.1 take 4 KiB of arguments

NAMES = re.compile(r"\b(?:given|made|part|other)\d+\b|\bgrad\b")  # the names of tensors in lines

aten = torch.ops.aten
ALLOCATIONS = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
# Operators that are made of others, none of which autocast casts.
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
# What allocates on the current device in a fraction of torch.empty's time, as torch.compile's programs do. Other
# versions of PyTorch may have neither it nor `_reinterpret_tensor` below, for both are private.
QUICK_ALLOCATIONS = {
    device: getattr(guards, name)
    for device, name in (("cpu", "_empty_strided_cpu"), ("cuda", "_empty_strided_cuda"))
    if hasattr(guards, name)
}
# The same operators, called in a quicker way.
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
    """The part of a tensor from an offset on. To autograd it is no view."""
    return whole.as_strided(shape, stride, whole.storage_offset() + offset).detach()


take_part = getattr(guards, "_reinterpret_tensor", _take_part)


class NotReplayableError(Exception):
    """A function does what cannot be noted."""


@dataclass(frozen=True)
class BothPasses:
    """A function and its gradients, as they were noted.

    Attributes:
        forward: Takes the function's tensors. Returns its result, and behind it the tensors to save for `backward`.
        given: Which of the function's own tensors are saved as well, by their places; `backward` gets these first.
        layouts: How the gradients that `backward` takes must lie: that of the result, and those of the tensors that
            are handed on behind it.
        backward: Takes these gradients, and a list of what was saved, which it empties, so that each tensor is freed as
            soon as it is not needed any more. Returns a gradient or None for each of the function's tensors.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    given: tuple[int, ...]
    layouts: tuple[tuple, ...]
    backward: Callable[..., tuple[Tensor | None, ...]]


class Together(NamedTuple):
    """A cast or a sum, which one launch can do together with others.

    Attributes:
        launch: The `triton_sums.Sums` that does it alone.
        tensors: The tensors that this was given: sources, and targets.
        given: The same as text.
    """

    launch: Any
    tensors: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
    given: list[tuple[str, ...]]


class Line(NamedTuple):
    """A line of a function: "name = text", or "text" alone.

    Attributes:
        name: The name of the tensor that it makes; None where it makes none.
        text: What it does.
        together: The same, where it can be done together with others.
    """

    name: str | None
    text: str
    together: Together | None = None


@contextmanager
def noting(notebook: "Notebook") -> Iterator[None]:
    """Has a notebook note what this thread does."""
    from .triton_launch import notes

    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # it holds tensors that no line has made
    ours.modes += 1
    notes.take = notebook.note_launch
    try:
        with notebook:
            yield
    finally:
        notes.take = None
        ours.modes -= 1
        torch.set_autocast_cache_enabled(cached)


class Notebook(TorchDispatchMode):
    """Notes what is done while it is on, as the lines of a function of the same tensors.

    Tensors are known by their memory: each is a part, of a size and with strides, from an offset on, of what came in or
    was made by a line. So views need no lines of their own until a part is used.

    Its life: `note_call` and `note_launch` see what the function does. Without gradients, `finish` returns the function
    that was noted. With them, `begin_backward` comes between the passes, and `finish_both` returns `BothPasses`.
    """

    def __init__(self, tensors: Sequence[Tensor | None]):
        super().__init__()
        self.constants: dict[str, Any] = {}
        self.lines: list[Line] = []  # of the pass that is noted
        self.whole: dict[StorageWeakRef, tuple[str, torch.dtype, tuple]] = {}  # by memory: what lies there
        self.parts: dict[tuple, str] = {}
        self.problem = ""
        self.numbers = itertools.count()  # for names of what is made
        self.forward: tuple[str, list[Line]] = "", []  # once that pass is over: its result and its lines
        first = next((t for t in tensors if t is not None), torch.empty(0))
        self.device, self.index = first.device.type, first.get_device()
        self.autocast = torch.is_autocast_enabled(self.device)
        self.given = [f"given{i}" for i in range(len(tensors))]
        self.grads: list[str] = []  # names of those that come to the backward pass
        for name, t in zip(self.given, tensors):
            if t is not None:
                self.whole[memory_of(t)] = name, t.dtype, _extent(t)

    # What is noted

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if self.autocast and function not in MOVES and _has_parts_to_cast(function, self.device):
            raise NotReplayableError(f"{function} comes as a whole, so that autocast does not see its parts")
        result = function(*arguments, **(options or {}))
        try:
            self.note_call(function, arguments, options or {}, result)
        except NotReplayableError as problem:
            self.problem = self.problem or str(problem)
        return result

    def note_call(self, function, arguments, options, result) -> None:
        """Note a call of one of PyTorch's operators, unless all that it returns are parts of what is known."""
        if function._schema.is_mutable:
            self.note_change(function, arguments, options)
            return
        results = result if isinstance(result, list | tuple) else [result]
        if all(isinstance(t, Tensor) and memory_of(t) in self.whole for t in results):
            return
        if not any(isinstance(t, Tensor) for t in (*arguments, *results)):
            return  # such as the question what dtypes are promoted to
        if not isinstance(result, Tensor):
            raise NotReplayableError(f"{function} returns something else than a tensor")
        text = self.allocation(result) if function in ALLOCATIONS else self.call(function, arguments, options)
        name = f"made{next(self.numbers)}"
        self.whole[memory_of(result)] = name, result.dtype, _extent(result)
        self.lines.append(Line(name, text, self.cast(arguments[0], result) if function in CASTS else None))

    def note_change(self, function, arguments, options) -> None:
        """Note a call that changes tensors, all of which must have been made by lines of this pass."""
        values = dict(zip([argument.name for argument in function._schema.arguments], arguments)) | options
        made = {line.name for line in self.lines}
        for argument in function._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = values[argument.name]
                is_known = isinstance(value, Tensor) and memory_of(value) in self.whole
                if not is_known or self.whole[memory_of(value)][0] not in made:
                    raise NotReplayableError(f"{function} changes a tensor")
        self.lines.append(Line(None, self.call(function, arguments, options)))

    def note_launch(self, launch, tensors, form) -> None:
        """Note a launch, of which `triton_launch.notes` tells. The line launches the compiled kernel, `form`, on bare
        addresses, without the checks of what never changes."""
        from .triton_sums import Sums

        try:
            given = self.given_to_kernel(tensors)
            together = Together(launch, tensors, given) if isinstance(launch, Sums) else None
            self.lines.append(Line(None, self.launch(launch, form, given), together))
        except NotReplayableError as problem:
            self.problem = self.problem or str(problem)

    def cast(self, source: Tensor, target: Tensor) -> Together | None:
        """A cast as what can be done together with others; None where it cannot."""
        from .triton_launch import INTERPRETED
        from .triton_sums import FLAT, copy_of

        if INTERPRETED and target.itemsize < source.itemsize:
            return None  # the interpreter cuts digits off, where a GPU rounds as PyTorch does
        tensors = (source,), (target,)
        plain = all(t.dtype in TRITON_DTYPES and t.is_contiguous() for t in (source, target))
        if not plain or source.device != target.device or not 0 < source.numel() < 2**31 - FLAT:
            return None
        return Together(copy_of(source.numel(), source.device), tensors, self.given_to_kernel(tensors))

    # The text of lines

    def allocation(self, t: Tensor) -> str:
        """The text that allocates memory for such a tensor."""
        allocate, extent = torch.empty_strided, f"{tuple(t.shape)}, {t.stride()}"
        kind = f"dtype={self.constant(t.dtype)}, device={self.constant(t.device)}"
        if t.device.type == self.device and self.device in QUICK_ALLOCATIONS:
            allocate, kind = QUICK_ALLOCATIONS[self.device], self.constant(t.dtype)
        return f"{self.constant(allocate)}({extent}, {kind})"

    def call(self, function, arguments, options) -> str:
        """The text that calls an operator."""
        given = [self.text(value) for value in arguments]
        # Options that say nothing are left out: the quicker ways of calling do not know all of them.
        unsaid = None, False, torch.strided
        for argument in function._schema.arguments:
            said = not argument.has_default_value() or argument.default_value not in (None, False)
            if argument.name in options and (said or not any(options[argument.name] is each for each in unsaid)):
                given.append(f"{argument.name}={self.text(options[argument.name])}")
        return f"{self.constant(QUICKER.get(function, function))}({', '.join(given)})"

    def launch(self, launch, form, given: Sequence[str | tuple[str, ...]]) -> str:
        """The text that launches a kernel on what is given, by its compiled form or, without one, as a whole."""
        given = ", ".join(
            f"({''.join(f'{one}, ' for one in each)})" if isinstance(each, tuple) else each for each in given
        )
        if form is None:
            return f"{self.constant(launch)}({given})"
        self.constant(launch)  # keeps alive what the kernel may read
        run, function, metadata = map(self.constant, form)
        first = f"*{launch.grid}, stream, {function}, {metadata}, None, None, None"  # no hooks
        return f"{run}({first}, {given}, *{self.constant(launch.settled)})"

    def given_to_kernel(self, tensors: Sequence) -> list[str | tuple[str, ...]]:
        """The texts of tensors, tuples of them and None as a kernel is given them: addresses, but in Triton's
        interpreter."""
        from .triton_launch import INTERPRETED

        write = self.text if INTERPRETED else self.address
        return [tuple(map(write, t)) if isinstance(t, tuple) else write(t) for t in tensors]

    def address(self, value: Tensor | None) -> str:
        """The text of a tensor's address."""
        if value is None:
            return "None"
        if memory_of(value) not in self.whole:
            raise NotReplayableError("a tensor of unknown origin")
        name, _, (_, _, start) = self.whole[memory_of(value)]
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
        """The text of a value: a tensor's name, a number, ..."""
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
        """The name of a tensor: of what lies in its memory, or of the part that it is of that, which gets a line."""
        name, whole, extent = self.place(t)
        if extent == whole:
            return name
        if (name, extent) not in self.parts:
            if name in self.given + self.grads:
                text = _view(name, whole, extent, from_elsewhere=True)
            else:
                # To autograd this is no view, and it has a version counter of its own. No change between the passes is
                # missed by that: the backward pass takes its parts anew (`begin_backward` empties `parts`), from what
                # is saved whole.
                shape, stride, offset = extent
                text = f"{self.constant(take_part)}({name}, {shape}, {stride}, {offset - whole[2]})"
            self.parts[name, extent] = f"part{next(self.numbers)}"
            self.lines.append(Line(self.parts[name, extent], text))
        return self.parts[name, extent]

    def place(self, t: Tensor) -> tuple[str, tuple, tuple]:
        """The name of what lies in a tensor's memory, its extent, and the extent of the tensor."""
        if memory_of(t) not in self.whole:
            raise NotReplayableError("a tensor of unknown origin")
        name, dtype, whole = self.whole[memory_of(t)]
        if t.dtype != dtype:
            raise NotReplayableError("a view as another dtype")
        return name, whole, _extent(t)

    def result(self, t: Tensor) -> str:
        """The text of a tensor that a forward pass returns. It is no view to autograd, which would not let it be
        changed in place; what is saved of the same memory learns of such changes."""
        name, whole, extent = self.place(t)
        if extent == whole:
            return name
        return f"{_view(name, whole, extent, name in self.given)}.detach()"

    # From lines to functions

    def begin_backward(self, result: Tensor, grads: Sequence[Tensor]) -> None:
        """From here on note the backward pass, which is given the gradient of the result, and others."""
        self.forward = (self.result(result), self.lines)  # in this order, for the result may add a line
        self.lines, self.parts = [], {}
        self.grads = ["grad", *(f"other{i}" for i in range(len(grads) - 1))]
        for name, grad in zip(self.grads, grads):
            self.whole[memory_of(grad)] = name, grad.dtype, _extent(grad)

    def finish(self, result: Tensor | tuple[Tensor, ...]) -> Callable[..., Tensor | tuple[Tensor, ...]]:
        """The function that was noted.

        Raises:
            NotReplayableError: It cannot be replayed.
        """
        if isinstance(result, Tensor):
            returned = self.result(result)
        else:
            returned = f"({''.join(f'{self.result(t)}, ' for t in result)})"
        function = self.write(self.given, returned, self.lines)
        return _without_autocast(function, self.device) if self.autocast else function

    def finish_both(self, grads: Sequence[Tensor | None], layouts: tuple[tuple, ...]) -> BothPasses:
        """The function that was noted, and its gradients.

        Raises:
            NotReplayableError: They cannot be replayed.
        """
        returned = f"({', '.join('None' if grad is None else self.part(grad) for grad in grads)},)"
        made = {line.name for line in self.lines}
        names = dict.fromkeys(NAMES.findall(f"{returned} {' '.join(line.text for line in self.lines)}"))
        given = [name for name in self.given if name in names]
        saved = [name for name in names if name not in made and name not in self.given + self.grads]
        result, lines = self.forward
        forward = self.write(self.given, f"({', '.join([result, *saved])},)", lines)
        backward = self.write(self.grads, returned, self.lines, [*given, *saved])
        return BothPasses(
            forward=_without_autocast(forward, self.device) if self.autocast else forward,
            given=tuple(self.given.index(name) for name in given),
            layouts=layouts,
            backward=_without_autocast(backward, self.device),  # it may be on by the time of that pass
        )

    def write(
        self, arguments: Sequence[str], returned: str, lines: Sequence[Line], handed_over: Sequence[str] | None = None
    ) -> Callable:
        """The function of these lines.

        Args:
            arguments: Names of its arguments.
            returned: What it returns, as text.
            lines: Its lines.
            handed_over: Names of what comes in a list behind the other arguments. The function empties the list.
        """
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

    def gather(self, lines: Sequence[Line]) -> list[Line]:
        """The same lines, but with casts and sums gathered in one launch at the start, of those that read nothing but
        what was given, and in one at the end, of those whose results no line reads. Very many take several launches."""
        at_start, at_end = (group if len(group) > 1 else [] for group in self.choose_gathered(lines))
        start, body = [], []
        for i, line in enumerate(lines):
            if i not in at_start and i not in at_end:
                body.append(line)
            elif line.name:  # a cast makes a tensor, whose memory must be there before the launch
                allocation = Line(line.name, self.allocation(line.together.tensors[1][0]))
                (start if i in at_start else body).append(allocation)
        start += self.launches([lines[i].together for i in at_start])
        return [*start, *body, *self.launches([lines[i].together for i in at_end])]

    def choose_gathered(self, lines: Sequence[Line]) -> tuple[list[int], list[int]]:
        """The places of the lines that can be gathered at the start, and at the end."""
        parts = {line.name: NAMES.findall(line.text) for line in lines if line.name and line.name.startswith("part")}

        def named(*texts: str) -> set[str]:
            """The names in texts, and for parts also those of what they are parts of."""
            names = set(NAMES.findall(" ".join(texts)))
            return names.union(*(parts.get(name, ()) for name in names))

        at_start, at_end = [], []
        touched = set()  # by lines that come later, or read by the launch at the end
        written = set()  # by the launch at the end
        for i in reversed(range(len(lines))):
            line = lines[i]
            if line.name in parts:
                continue
            if line.together:
                sources, targets = (named(*texts) for texts in line.together.given)
                if line.name and sources <= set(self.given):
                    at_start.append(i)
                    continue
                # Nobody knows what one launch does first: what one of it reads no other may write. Two may write parts
                # of one tensor, side by side.
                if not (sources | targets) & touched and not sources & written:
                    at_end.append(i)
                    touched |= sources
                    written |= targets
                    continue
            touched |= named(line.text)
        return at_start, at_end

    def launches(self, members: Sequence[Together]) -> list[Line]:
        """Lines that do all of them, in as few launches as MAX_TENSORS allows."""
        lines, group, count = [], [], 0
        for member in members:
            tensors = sum(map(len, member.tensors))
            if group and count + tensors > MAX_TENSORS:
                lines.append(self.launch_together(group))
                group, count = [], 0
            group.append(member)
            count += tensors
        return [*lines, self.launch_together(group)] if group else lines

    def launch_together(self, members: Sequence[Together]) -> Line:
        """The line that does all of them in one launch."""
        from .triton_sums import together

        launch = together([member.launch for member in members], members[0].tensors[0][0].device)
        tensors, given = (
            [tuple(itertools.chain.from_iterable(kind)) for kind in zip(*kinds)]
            for kinds in zip(*[(member.tensors, member.given) for member in members])
        )
        form = launch.launch(*tensors)  # on the tensors of the call that was noted, whose values it leaves as they are
        return Line(None, self.launch(launch, form, given))


def _without_autocast(function: Callable, device: str) -> Callable:
    """The function with autocast off: the casts are lines of their own."""

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


def memory_of(t: Tensor) -> StorageWeakRef:
    """What tells a tensor's memory from all other, also after it has been freed and its address given away again."""
    return StorageWeakRef(t.untyped_storage())


def share_memory(tensors: Sequence[Tensor | None]) -> bool:
    """Whether two of the tensors share memory, so that a notebook could not tell them apart."""
    memory = [memory_of(t) for t in tensors if t is not None]
    return len(set(memory)) < len(memory)


def _extent(t: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    return tuple(t.shape), t.stride(), t.storage_offset()
