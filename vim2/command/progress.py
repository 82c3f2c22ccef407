"""What a run says while it goes on."""

import sys
from collections.abc import Iterable

from .processes import Processes

__all__ = ["progress_bar", "say"]


def progress_bar(iterable: Iterable, description: str, processes: Processes) -> Iterable:
    """The same things with a bar, for the first process on a terminal, if tqdm is installed."""
    if not (processes.is_first and sys.stderr.isatty()):
        return iterable
    try:
        from tqdm import tqdm
    except ImportError:
        return iterable
    return tqdm(iterable, desc=description, leave=False, dynamic_ncols=True)


def say(text: str, processes: Processes | None = None) -> None:
    """Print a line, once for all processes."""
    if processes is None or processes.is_first:
        print(text, flush=True)
