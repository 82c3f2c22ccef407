"""What the user can put right."""

import difflib
import re
import textwrap
import traceback
from collections.abc import Iterable
from pathlib import Path

__all__ = ["DivergenceError", "UserError", "did_you_mean", "first_line", "in_short"]


class UserError(ValueError):
    """Something that the user can put right: the message says what is wrong and how, in one line.

    Args:
        message: What is wrong, and the remedy.
        one_process: Only this process of several knows of it, so that it has to speak up itself.
    """

    def __init__(self, message: str, one_process: bool = False):
        # line breaks alone go: a path, and a command to be pasted, may have blanks side by side
        message = re.sub(r"\s*[\r\n]\s*", " ", str(message).strip())
        name = type(self).__name__
        if message.startswith(f"Caught {name} in DataLoader worker"):
            # a loader makes an error of its worker anew, of what the worker's traceback says
            message, one_process = message.rsplit(f"{name}: ", 1)[-1], True
        super().__init__(message)
        self.one_process = one_process


class DivergenceError(UserError):
    """A loss that became NaN or infinite."""


def first_line(error: BaseException) -> str:
    """What a library's error says first, to stand within a message; where it says nothing, its type's name and the line
    of code that raised it, which for an assertion is what it asks for."""
    return (str(error).strip() or _describe(error)).splitlines()[0].rstrip(".")


def in_short(error: BaseException) -> str:
    """All that a library's error says, in one line, but for what is beyond 300 letters of it; where it says nothing, as
    `first_line`."""
    return textwrap.shorten(str(error), 300, placeholder=" ...") or _describe(error)


def _describe(error: BaseException) -> str:
    """An error that says nothing, by its type and where it comes from."""
    frames = traceback.extract_tb(error.__traceback__, -1)
    code = f": {frames[-1].line} ({Path(frames[-1].filename).name})" if frames and frames[-1].line else ""
    return f"{type(error).__name__}{code}"


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """A suggestion to append to a message, or nothing."""
    close = difflib.get_close_matches(given, list(known), n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""
