"""Files that always hold the old content or the new, whatever happens while they are written."""

import contextlib
import os
import re
import uuid
from pathlib import Path

try:
    import fcntl
except ImportError:  # there are no such locks on Windows
    fcntl = None

__all__ = ["NotWritten", "remove_leftovers", "try_lock", "write_atomically"]


class NotWritten(OSError):
    """A file that could not be written; what was there before is unchanged. Its `strerror` says so in a sentence."""


def write_atomically(path: str | os.PathLike, data: bytes | str) -> None:
    """Replace a file's content in one step, and remove what earlier writes of it left behind when they were killed.

    Text is encoded as UTF-8. It may hold names of files that are not UTF-8 themselves: their odd bytes, which Python
    keeps as lone surrogates, are written as JSON writes them, such as `\\udce4`.

    Raises:
        NotWritten: The disk is full or cannot be written; what was at `path` is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name)
        with open(temporary, "wb") as file:
            try_lock(file.fileno())  # until it is closed: tells remove_leftovers that somebody writes it
            file.write(data.encode(errors="backslashreplace") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:
                os.replace(temporary, path)
        if fcntl is None:  # Windows renames no open file
            os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise NotWritten(
            error.errno, f"Could not write {path} ({error.strerror}); what was there before is unchanged"
        ) from None


def remove_leftovers(folder: str | os.PathLike, name: str | None = None) -> None:
    """Remove the half-written files that killed `write_atomically` left in a folder.

    A writer locks its file, and the kernel unlocks it when the writer dies: only unlocked files are removed, and none
    where the file system has no locks.

    Args:
        folder: Where to look, without the folders in it.
        name: The file that was to be written; None stands for all.
    """
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = re.fullmatch(r"\.(.+)\.[0-9a-f]{32}", entry.name)
            if not match or name not in (None, match[1]) or not entry.is_file(follow_symlinks=False):
                continue
            with contextlib.suppress(OSError), open(entry.path, "rb+") as file:
                if try_lock(file.fileno()):
                    os.unlink(entry.path)


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file until it is closed, by its process or, when that dies, by the kernel.

    Returns:
        False if somebody else has locked it, in this process or another; None if the system has no such locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # file systems without locks raise different ones
        return None
    return True
