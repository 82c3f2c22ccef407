"""What the user can put right."""

import difflib
import re
import textwrap
from collections.abc import Iterable

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
    """What a library's error says first, to stand within a message; its type's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def in_short(error: BaseException) -> str:
    """All that a library's error says, in one line, but for what is beyond 300 letters of it; its type's name where it
    says nothing."""
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """A suggestion to append to a message, or nothing."""
    close = difflib.get_close_matches(given, list(known), n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""
