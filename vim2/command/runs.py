"""A run of training: its folder, going on with it from its last.pth, and the seeds of its random numbers."""

import os
import random
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoints import read_checkpoint
from .errors import UserError
from .processes import Processes
from .progress import say

__all__ = ["explain_disk_errors", "find_last", "make_folder", "read_last", "read_saved", "seed_everything"]

MAKE_ROOM = ". Make room, then go on with --resume"


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


def read_last(path: Path, keys: Set[str], instead: str = "") -> dict[str, Any]:
    """Read a last.pth.

    Args:
        path: Where it lies.
        keys: What it must hold.
        instead: What to do with a file that is none, a sentence.

    Raises:
        UserError: As `read_saved`; it is something else.
    """
    saved = read_saved(path)
    if not (isinstance(saved, dict) and keys <= saved.keys()):
        raise UserError(f"{path} cannot be resumed: it is not a last.pth of this command. {instead}")
    return saved


def make_folder(folder: Path) -> None:
    """Make a run's folder before it trains, so that one which cannot be made does not cost an epoch.

    Raises:
        UserError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"Cannot make the folder {folder} ({error.strerror}): choose another --output.", one_process=True
        ) from None


@contextmanager
def explain_disk_errors(remedy: str = ": choose another --output") -> Iterator[None]:
    """Turns an error of `write_atomically` and `save_checkpoint` into a UserError that ends with a remedy."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.strerror}{remedy}.", one_process=True) from None


def seed_everything(*numbers: int) -> None:
    """Seed Python, NumPy and PyTorch, on every device; the loader's workers draw their seeds from PyTorch's."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
