"""What the user can put right, and how the command lines say it."""

import os
import sys
from collections.abc import Callable

__all__ = ["UserError", "run_command"]


class UserError(ValueError):
    """Something that the user can put right: the message says what is wrong and how, in one line.

    Args:
        message: What is wrong, and the remedy.
        one_process: Only this process of several knows of it, so that it has to speak up itself.
    """

    def __init__(self, message: str, one_process: bool = False):
        super().__init__(" ".join(str(message).split()))
        self.one_process = one_process


def run_command(
    program: str, usage: str, run: Callable[[str, list[str]], None], resumable: str, argv: list[str] | None
) -> int:
    """Run a command of a program that has several.

    Args:
        program: Its name, which errors begin with.
        usage: What it says without a command.
        run: Runs a command with its arguments.
        resumable: The command that goes on with --resume where it was stopped.
        argv: The command and its arguments; None takes the process's.

    Returns:
        The exit code: 0; 2 after one line on stderr for what the user can put right; 130 where stopped.
    """
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(usage)
        return 0
    try:
        run(command, rest)
    except UserError as error:
        # one line from one process; a worker's error comes with the worker's trace before it
        if error.one_process or os.environ.get("RANK", "0") == "0":
            print(f"{program}: error: {str(error).rsplit('UserError: ', 1)[-1]}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: stopped{'; it goes on with --resume' if command == resumable else ''}", file=sys.stderr)
        return 130
    return 0
