"""What the user can put right, and how the command lines say it."""

import difflib
import importlib
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch

__all__ = ["Command", "DivergenceError", "UserError", "did_you_mean", "first_line", "run_command"]


class UserError(ValueError):
    """Something that the user can put right: the message says what is wrong and how, in one line.

    Args:
        message: What is wrong, and the remedy.
        one_process: Only this process of several knows of it, so that it has to speak up itself.
    """

    def __init__(self, message: str, one_process: bool = False):
        super().__init__(" ".join(str(message).split()))
        self.one_process = one_process


def first_line(error: BaseException) -> str:
    """What a library's error says first, to stand within a message; its type's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


class DivergenceError(UserError):
    """A loss that became NaN or infinite."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """A suggestion to append to a message, or nothing."""
    close = difflib.get_close_matches(given, list(known), n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


@dataclass(frozen=True)
class Command:
    """What is said of a command of a program when it ends early.

    Args:
        less_memory: What to do where the GPU's memory is full.
        resumable: Whether it goes on with --resume where it was stopped.
    """

    less_memory: str = "use a smaller --batch-size"
    resumable: bool = False


def run_command(program: str, usage: str, package: str, commands: dict[str, Command], argv: list[str] | None) -> int:
    """Run a command of a program that has several.

    Args:
        program: Its name, which errors begin with.
        usage: What it says without a command.
        package: The package that has a function for each command, of a list of its arguments. It is imported only now,
            and may say in an ImportError what it needs to have installed.
        commands: By the name of their function.
        argv: The command and its arguments; None takes the process's.

    Returns:
        The exit code: 0; 2 after one line on stderr for what the user can put right; 130 where stopped.
    """
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage)
        return 0
    command = commands.get(name)
    try:
        if command is None:
            raise UserError(f"unknown command {name}{did_you_mean(name, commands)} (of {', '.join(commands)})")
        try:
            function = getattr(importlib.import_module(package), name)
        except ImportError as error:
            raise UserError(str(error)) from None
        try:
            function(rest)
        except torch.OutOfMemoryError:
            raise UserError(f"The GPU's memory is full: {command.less_memory}.", one_process=True) from None
    except UserError as error:
        # one line from one process; a worker's error comes with the worker's trace before it
        if error.one_process or (os.environ.get("RANK") or "0") == "0":
            print(f"{program}: error: {str(error).rsplit('UserError: ', 1)[-1]}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: stopped{'; it goes on with --resume' if command.resumable else ''}", file=sys.stderr)
        return 130
    return 0
