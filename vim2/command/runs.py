"""A run of training: its folder, going on with it from its last.pth, and the seeds of its random numbers."""

import math
import os
import random
import weakref
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoints import check_weights, read_checkpoint
from ..files import remove_leftovers, try_lock
from .errors import UserError, in_short
from .outputs import explain_folder_errors, make_folder
from .processes import Processes
from .progress import say

__all__ = [
    "find_last",
    "identity",
    "own_folder",
    "read_last",
    "read_saved",
    "restore_optimizer",
    "restore_weights",
    "seed_everything",
]


def find_last(folder: Path, resume: bool, processes: Processes | None = None) -> Path | None:
    """The last.pth of the run in a folder, to go on from; None where there is none yet.

    Raises:
        UserError: There is one, and it was not asked to go on with it.
    """
    path = folder / "last.pth"
    if path.exists() and not resume:
        raise UserError(f"{folder} holds a run already: add --resume to go on with it, or choose another --experiment.")
    if resume and not path.exists():
        say(f"No {path} yet: starting from the beginning.", processes)
    return path if path.exists() else None


def read_saved(path: str | os.PathLike) -> Any:
    """Read a checkpoint.

    Raises:
        UserError: It is missing, truncated, or a pickle of more than weights.
    """
    try:
        return read_checkpoint(path)
    except (ValueError, OSError) as error:
        raise UserError(error) from None


def read_last(path: Path, content: Mapping[str, type | tuple], columns: Set[str], instead: str = "") -> dict[str, Any]:
    """Read a last.pth.

    Args:
        path: Where it lies.
        content: What it must hold, by name, of which type.
        columns: What each row of its `history` must hold, beside the epoch's number.
        instead: What to do with a file that is none, a sentence.

    Raises:
        UserError: As `read_saved`; it is something else.
    """
    saved = read_saved(path)
    if not (isinstance(saved, dict) and content.keys() <= saved.keys()):
        raise UserError(
            f"{path} cannot be resumed: it is not a last.pth of this command, or of another version. {instead}"
        )
    for name, kind in content.items():
        if not isinstance(saved[name], kind):
            raise UserError(f"{path} cannot be resumed: its {name} is damaged. {instead}")
    rows = saved["history"]
    whole = all(_is_row(row, columns | {"epoch"}) for row in rows)
    if not whole or [row["epoch"] for row in rows] != list(range(1, len(rows) + 1)):
        raise UserError(f"{path} cannot be resumed: its history is damaged. {instead}")
    return saved


def _is_row(row: Any, columns: Set[str]) -> bool:
    """Whether it is numbers, or None, by name, with these columns."""
    return (
        isinstance(row, dict)
        and columns <= row.keys()
        and all(isinstance(n, str) and isinstance(v, int | float | None) for n, v in row.items())
    )


def restore_weights(model: nn.Module, weights: Any, called: str) -> None:
    """Load a model's weights from a last.pth, which a message calls `called`.

    Raises:
        UserError: They are another model's, or `check_weights` refuses them.
    """
    items = weights.items() if isinstance(weights, dict) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in items):
        raise UserError(f"{called} cannot be resumed: it lacks weights.")
    try:
        check_weights(weights, model.state_dict(), called)
    except ValueError as error:
        raise UserError(error) from None
    with _explain_misfit(called):
        model.load_state_dict(weights)


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Any, called: str) -> None:
    """Load an optimiser's state from a last.pth, which a message calls `called`.

    Of its groups' options only numbers, which may be counters, are taken: the others are what the run's options, and
    the device, have made of the optimiser. Each family keeps other things in its state, so whether they are whole is
    seen in the first step, which raises the same error.

    Raises:
        UserError: It is another optimiser's, or of other parameters, or holds NaN or infinite values.
    """
    with _explain_damage(called):
        for group, own in zip(state["param_groups"], optimizer.param_groups):
            given = {name for name, value in group.items() if _is_number(value) and _is_number(own.get(name))}
            group.update({name: value for name, value in own.items() if name not in given | {"params"}})
        optimizer.load_state_dict(state)
        inner = getattr(optimizer, "_base_optimizer", optimizer)  # of timm's Lookahead, which has no state itself
        kept = [values[name] for values in inner.state.values() for name in _NORMS & values.keys()]
        moments = _MOMENTS - _NORMS if kept and not any(norm.dim() for norm in kept) else _MOMENTS
        for parameter, values in inner.state.items():
            for name, value in values.items():
                if name in moments and value is not None and value.shape != parameter.shape:
                    raise ValueError(f"{name} of the optimiser has the shape {tuple(value.shape)}")
                if isinstance(value, Tensor) and not value.isfinite().all():
                    raise ValueError(f"{name} of the optimiser holds NaN or infinite values")
    own = weakref.ref(optimizer)  # which would otherwise hold itself, and the memory of its state after its run

    def first_step(*args, **kwargs) -> Any:
        optimizer = own()
        del optimizer.step
        with _explain_damage(called):
            return optimizer.step(*args, **kwargs)

    optimizer.step = first_step


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# what optimisers keep of the shape of a parameter
_MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg"}
# what an optimiser may keep as one number for a whole parameter instead, as NovoGrad does
_NORMS = {"exp_avg_sq"}


# PyTorch's, of what is not so
_MISFITS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@contextmanager
def _explain_misfit(called: str) -> Iterator[None]:
    try:
        yield
    except _MISFITS as error:
        raise UserError(f"{called} does not fit the model of these options: {in_short(error)}") from None


@contextmanager
def _explain_damage(called: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _MISFITS as error:
        reason = in_short(error).rstrip(".")
        raise UserError(
            f"{called} cannot be resumed: its optimiser's state is damaged, or of other parameters ({reason}). Copy "
            "the file again, or start another run."
        ) from None


def identity(path: Path) -> tuple[int, ...] | None:
    """What tells a file's content from what replaced it; None where there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


_locks: set[int] = set()  # descriptors of the folders that this process has locked


def _leave_locks() -> None:
    """In a forked process, such as a loader's worker: it shall not hold the lock of a run that has been killed."""
    while _locks:
        os.close(_locks.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_locks)


@contextmanager
def own_folder(
    folder: Path,
    last: tuple[int, ...] | None,
    processes: Processes | None = None,
    output: str = "--output",
    then: str = "then add --resume",
) -> Iterator[None]:
    """Make a run's folder, keep other runs out of it, and remove what killed ones left half-written.

    The first of several processes locks the folder's file .lock for all of them. When it ends, however it does, the
    kernel unlocks it. Where the file system has no locks, nothing keeps others out.

    Args:
        folder: The run's.
        last: The `identity` of the folder's last.pth that the run goes on from.
        processes: Those of the run.
        output: What messages call the folder.
        then: What they say to do after the end of another run.

    Raises:
        UserError: Another run is there, or has been there since `last`; the folder cannot be made.
    """
    path, descriptor, refused = folder / ".lock", None, torch.zeros((), dtype=torch.int64)
    if processes is None or processes.is_first:
        make_folder(folder, output)
        with explain_folder_errors(folder, output):
            descriptor = _lock(path)
        if descriptor is None or identity(folder / "last.pth") != last:
            refused += 1
    try:
        if (refused if processes is None else processes.maximum(refused)).item():
            raise UserError(f"Another run is writing to {folder}: wait for its end, {then}, or choose another folder.")
        if descriptor is not None:
            remove_leftovers(folder)
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                path.unlink()
            _locks.discard(descriptor)
            os.close(descriptor)


def _lock(path: Path) -> int | None:
    """The descriptor of a locked file, which is made; None if another has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if try_lock(descriptor) is False:
            os.close(descriptor)
            return None
        found = identity(path)
        if found and found[0] == os.fstat(descriptor).st_ino:
            _locks.add(descriptor)
            return descriptor
        os.close(descriptor)  # the run that had it has just removed it


def seed_everything(*numbers: int) -> None:
    """Seed Python, NumPy and PyTorch, on every device; the loader's workers draw their seeds from PyTorch's."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
