"""Running a command."""

import errno
import gc
import sys
from collections.abc import Callable

import torch

from vim2.command.errors import UserError

from . import imported

__all__ = ["run_tool"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room on the disk, for the user, or in a file


def run_tool(main: Callable[[list[str] | None], int | None], argv: list[str] | None = None) -> int:
    """Run a command; a UserError, a full disk and Ctrl-C become one line on stderr.

    Args:
        main: The command. It gets `argv`, and may return an exit code.
        argv: Its arguments; None takes the process's.

    Returns:
        The exit code: 2 after a UserError or with a full disk, 130 where stopped, else that of `main`, or 0.
    """
    imported()
    try:
        code = main(argv)
        if torch.distributed.is_initialized():
            gc.collect()  # MMEngine's Runner, a cycle, holds the group: its threads would outlive it, and abort Python
            torch.distributed.barrier()  # a process that left first would take the others' connections with it
            torch.distributed.destroy_process_group()
    except UserError as error:
        # one of a loader's worker comes with the worker's trace before it
        print(f"error: {str(error).rsplit('UserError: ', 1)[-1]}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in _FULL:
            raise
        print(f"error: {error.strerror or error}: make room.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return code or 0
