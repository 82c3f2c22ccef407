"""What the user can put right."""

import difflib
from collections.abc import Iterable

__all__ = ["DivergenceError", "UserError", "did_you_mean", "first_line"]


class UserError(ValueError):
    """Something that the user can put right: the message says what is wrong and how, in one line.

    Args:
        message: What is wrong, and the remedy.
        one_process: Only this process of several knows of it, so that it has to speak up itself.
    """

    def __init__(self, message: str, one_process: bool = False):
        super().__init__(" ".join(str(message).split()))
        self.one_process = one_process


class DivergenceError(UserError):
    """A loss that became NaN or infinite."""


def first_line(error: BaseException) -> str:
    """What a library's error says first, to stand within a message; its type's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """A suggestion to append to a message, or nothing."""
    close = difflib.get_close_matches(given, list(known), n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""
