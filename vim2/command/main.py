"""How a command is run from the command line, and how it ends: an exit code and, where it failed, one line."""

import errno
import gc
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..files import NotWritten
from .errors import UserError, did_you_mean, first_line
from .progress import reader_may_leave, say

__all__ = ["Command", "run_command", "run_main"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room on the disk, for the user, or in a file

# PyTorch's, of memory that is not a GPU's, and of more than there can be
_NO_MEMORY = ("DefaultCPUAllocator", "Storage size calculation overflowed")


@dataclass(frozen=True)
class Command:
    """A command of a program, and what is said when it ends early.

    Args:
        less_memory: What to do where the memory is full, the GPU's or the machine's.
        resumable: Whether it goes on with --resume where it was stopped.
        extra: vim2's extra that brings what it needs beside PyTorch and timm.
        one_voice: Whether an error that all of several processes meet is printed by the first alone.
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
        package: The package that has a function for each command, which takes the list of its arguments. It is imported
            only now, and may say in an ImportError what it needs to have installed.
        commands: By the name of their function.
        argv: The command and its arguments; None takes the process's.

    Returns:
        The exit code, see `run_main`.
    """
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        say(usage)
        return 0
    command = commands.get(name, Command())

    def main(arguments: list[str]) -> None:
        if name not in commands:
            raise UserError(f"unknown command {name}{did_you_mean(name, commands)} (of {', '.join(commands)})")
        try:
            _import_function(package, name)(arguments)
        except ModuleNotFoundError as error:
            if (missing := _missing_package(error)) is None:
                raise
            # an extra does not have what a user's own config or data set may ask for
            install = f'"vim2[{command.extra}]", or {missing}' if command.extra else missing
            raise UserError(f"{name} needs {missing}, which is not installed: pip install {install}.") from None
        except torch.OutOfMemoryError:
            raise UserError(f"The GPU's memory is full: {command.less_memory}.", one_process=True) from None
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
                wanted = re.search(r"allocate (\d+) bytes", str(error))
                needed = f": {int(wanted[1]) / 1e9:.1f} GB more are needed" if wanted else ""
                remedy = f"{command.less_memory}, or a smaller model"
                raise UserError(f"The memory is full{needed}; {remedy}.", one_process=True) from None
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            raise UserError(
                f"A process that reads data was ended from outside, as where memory is full ({first_line(error)}): "
                "use fewer of them, or make memory free.",
                one_process=True,
            ) from None

    stopped = f"stopped{'; it goes on with --resume' if command.resumable else ''}"
    return run_main(main, rest, f"{program}: ", stopped, command.one_voice)


def _import_function(package: str, name: str) -> Callable[[list[str]], None]:
    """A command's function. What its package says in an ImportError of its own becomes a UserError."""
    try:
        return getattr(importlib.import_module(package), name)
    except ModuleNotFoundError:
        raise
    except ImportError as error:
        raise UserError(str(error)) from None


def _missing_package(error: ModuleNotFoundError) -> str | None:
    """The package whose lack is the reason that an import failed; None if the reason is another."""
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
            say(f"{prefix}error: {error}", as_error=True)
        return 2
    except OSError as error:
        if error.errno not in _FULL and not isinstance(error, NotWritten):
            raise
        remedy = "make room" if error.errno in _FULL else "choose another folder to write to"
        say(f"{prefix}error: {error.strerror or error}: {remedy}.", as_error=True)
        return 2
    except KeyboardInterrupt:
        say(f"{prefix}{stopped}", as_error=True)
        return 130
    finally:
        if sys.stdout is not None:
            with reader_may_leave(sys.stdout):
                sys.stdout.flush()  # of what argparse, or a library, has printed
    return code or 0
