"""Where a command writes: folders that are tried before it works, and disks on which it cannot."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError

__all__ = ["MAKE_ROOM", "explain_disk_errors", "explain_folder_errors", "keep_source", "make_folder", "make_folder_of"]

MAKE_ROOM = ". Make room, then go on with --resume"


def make_folder(folder: Path, output: str = "--output") -> None:
    """Make the folder that a command will write to, and try whether one can, before the command has worked in vain.

    Args:
        folder: The folder, made with its parents.
        output: The option that names it, for messages.

    Raises:
        UserError: It cannot be made, or nothing can be written there.
    """
    with explain_folder_errors(folder, output):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def make_folder_of(file: Path, output: str = "--output") -> None:
    """`make_folder`, for the folder of a file that a command will write.

    Args:
        file: The file.
        output: The option that names it, for messages.

    Raises:
        UserError: As `make_folder`; there is a folder of the file's name.
    """
    if file.is_dir():
        raise UserError(f"{file} is a folder: choose another {output}, a file in it.")
    make_folder(file.parent, output)


@contextmanager
def explain_folder_errors(folder: Path, output: str) -> Iterator[None]:
    """Turns an OSError about a folder, which the option `output` names, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"Nothing can be written into {folder} ({error.strerror}): choose another {output}.") from None


def keep_source(source: str | os.PathLike | None, output: str | os.PathLike) -> None:
    """See that a command does not write over the file that it reads.

    Args:
        source: The file that it reads, if it is one.
        output: The file that it will write.

    Raises:
        UserError: They are the same, by whatever names.
    """
    if source is not None and os.path.exists(source) and os.path.exists(output) and os.path.samefile(source, output):
        raise UserError(f"{output} is what is read, and would be written over: choose another output.")


@contextmanager
def explain_disk_errors(remedy: str = ": choose another --output") -> Iterator[None]:
    """Turns an error of `write_atomically` and `save_checkpoint` into a UserError that ends with a remedy."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.strerror}{remedy}.", one_process=True) from None
