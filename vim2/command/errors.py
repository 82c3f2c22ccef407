"""What the user can put right, and how the command lines say it."""

import difflib
import errno
import gc
import importlib.util
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ..checkpoints import NotWritten

__all__ = [
    "Command",
    "DivergenceError",
    "UserError",
    "did_you_mean",
    "first_line",
    "in_short",
    "missing_package",
    "run_command",
    "run_main",
]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room on the disk, for the user, or in a file


class UserError(ValueError):
    """Something that the user can put right: the message says what is wrong and how, in one line.

    Args:
        message: What is wrong, and the remedy.
        one_process: Only this process of several knows of it, so that it has to speak up itself.
    """

    def __init__(self, message: str, one_process: bool = False):
        # line breaks alone go: a path, and a command to be pasted, may have blanks side by side
        super().__init__(re.sub(r"\s*[\r\n]\s*", " ", str(message).strip()))
        self.one_process = one_process


def first_line(error: BaseException) -> str:
    """What a library's error says first, to stand within a message; its type's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


class DivergenceError(UserError):
    """A loss that became NaN or infinite."""


def in_short(error: BaseException) -> str:
    """All that a library's error says, in one line, but for what is beyond 300 letters of it; its type's name where it
    says nothing."""
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__


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
        extra: The package's extra that brings what it needs beside PyTorch and timm.
        one_voice: Whether, of several processes, only the first says an error that all of them have.
    """

    less_memory: str = "use a smaller --batch-size"
    resumable: bool = False
    extra: str = ""
    one_voice: bool = True


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
        The exit code, see `run_main`.
    """
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage)
        return 0
    command = commands.get(name, Command())

    def main(arguments: list[str]) -> None:
        if name not in commands:
            raise UserError(f"unknown command {name}{did_you_mean(name, commands)} (of {', '.join(commands)})")
        try:
            try:
                function = getattr(importlib.import_module(package), name)
            except ModuleNotFoundError:
                raise
            except ImportError as error:
                raise UserError(str(error)) from None
            function(arguments)
        except ModuleNotFoundError as error:
            if (missing := missing_package(error)) is None:
                raise
            # an extra does not have what a user's own config or data set may ask for
            install = f'"vim2[{command.extra}]", or {missing}' if command.extra else missing
            raise UserError(f"{name} needs {missing}, which is not installed: pip install {install}.") from None
        except torch.OutOfMemoryError:
            raise UserError(f"The GPU's memory is full: {command.less_memory}.", one_process=True) from None

    stopped = f"stopped{'; it goes on with --resume' if command.resumable else ''}"
    return run_main(main, rest, f"{program}: ", stopped, command.one_voice)


def missing_package(error: ModuleNotFoundError) -> str | None:
    """The package that is not installed, for whose lack something could not be imported; None if that is not why."""
    name = (error.name or "").partition(".")[0]
    return name if name and importlib.util.find_spec(name) is None else None


def run_main(
    main: Callable[[list[str] | None], int | None],
    argv: list[str] | None,
    prefix: str = "",
    stopped: str = "stopped",
    one_voice: bool = False,
) -> int:
    """Call a command's function; a UserError, what cannot be written and Ctrl-C become one line on stderr.

    Args:
        main: The function. It may return an exit code.
        argv: Its arguments.
        prefix: What the line begins with.
        stopped: What is said after Ctrl-C.
        one_voice: As in `Command`.

    Returns:
        The exit code: 2 after a UserError or where nothing can be written, 130 where stopped, else that of `main` or 0.
    """
    try:
        code = main(argv)
        if torch.distributed.is_initialized():
            gc.collect()  # MMEngine's Runner, a cycle, holds the group: its threads would outlive it, and abort Python
            torch.distributed.barrier()  # a process that left first would take the others' connections with it
            torch.distributed.destroy_process_group()
    except UserError as error:
        if not one_voice or error.one_process or (os.environ.get("RANK") or "0") == "0":
            # an error of a loader's worker comes with the worker's trace before it
            print(f"{prefix}error: {str(error).rsplit('UserError: ', 1)[-1]}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:
        if error.errno not in _FULL and not isinstance(error, NotWritten):
            raise
        remedy = "make room" if error.errno in _FULL else "choose another folder to write to"
        print(f"{prefix}error: {error.strerror or error}: {remedy}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prefix}{stopped}", file=sys.stderr)
        return 130
    return code or 0
