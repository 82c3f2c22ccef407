"""Running a command."""

import gc
import sys
from collections.abc import Callable

import torch

from vim2.command.errors import UserError

__all__ = ["run_tool"]


def run_tool(main: Callable[[list[str] | None], int | None], argv: list[str] | None = None) -> int:
    """Run a command; a UserError becomes one line on stderr.

    Args:
        main: The command. It gets `argv`, and may return an exit code.
        argv: Its arguments; None takes the process's.

    Returns:
        The exit code: 2 after a UserError, else that of `main`, or 0.
    """
    try:
        code = main(argv)
        if torch.distributed.is_initialized():
            gc.collect()  # MMEngine's Runner, a cycle, holds the group: its threads would outlive it, and abort Python
            torch.distributed.barrier()  # a process that left first would take the others' connections with it
            torch.distributed.destroy_process_group()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code or 0
