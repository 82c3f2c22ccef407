"""What a run says while it goes on."""

import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TextIO

from .processes import Processes

__all__ = ["COMPILING", "has_bar", "progress_bar", "reader_may_leave", "say", "say_if_slow"]

SLOW = 3.0  # seconds
COMPILING = "The first step takes longer: kernels may have to be compiled, which is done once."

_started = False  # whether this process has made a first step


def has_bar(processes: Processes) -> bool:
    """Whether `progress_bar` shows a bar: for the first process on a terminal, if tqdm is installed."""
    return processes.is_first and sys.stderr is not None and sys.stderr.isatty() and find_spec("tqdm") is not None


def progress_bar(iterable: Iterable, description: str, processes: Processes, has_kernels: bool = True) -> Iterator:
    """Iterate with a bar, where `has_bar` says so. If the first step of this process that `has_kernels` takes long, as
    where they are compiled, a line says why."""
    if has_bar(processes):
        from tqdm import tqdm

        iterable = tqdm(iterable, desc=description, leave=False, dynamic_ncols=True)
    global _started
    for item in iterable:
        if _started or not has_kernels:
            yield item
            continue
        with say_if_slow(COMPILING, processes):
            yield item
        _started = True


@contextmanager
def say_if_slow(text: str, processes: Processes | None = None, seconds: float = SLOW) -> Iterator[None]:
    """Print a line while what is done here goes on, if it takes longer than these seconds."""
    timer = threading.Timer(seconds, say, (text, processes))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def say(text: str, processes: Processes | None = None, *, as_error: bool = False) -> None:
    """Print a line, once for all processes, on stdout or, as an error, on stderr. What the output cannot write, such as
    odd names of files, is escaped; where its reader has left, the command goes on, see `reader_may_leave`."""
    stream = sys.stderr if as_error else sys.stdout
    if stream is None or not (processes is None or processes.is_first):
        return
    with reader_may_leave(stream):
        try:
            print(text, file=stream, flush=True)
        except UnicodeEncodeError as error:
            print(text.encode(error.encoding, "backslashreplace").decode(error.encoding), file=stream, flush=True)


@contextmanager
def reader_may_leave(stream: TextIO) -> Iterator[None]:
    """Where the reader of an output leaves, as `head` does, what is printed is lost from then on, and is no error."""
    try:
        yield
    except BrokenPipeError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
