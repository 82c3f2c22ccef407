"""Running a tool."""

from collections.abc import Callable

from vim2.command.main import run_main
from vim2_cli import loaded

__all__ = ["run_tool"]


def run_tool(
    main: Callable[[list[str] | None], int | None], argv: list[str] | None = None, stopped: str = "stopped"
) -> int:
    """Run a tool's main; `argv` None takes the process's arguments. Returns the exit code, see `run_main`, which also
    says what `stopped` is."""
    loaded()
    return run_main(main, argv, stopped=stopped)
