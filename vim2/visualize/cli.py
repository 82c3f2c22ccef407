"""The command line: `vim2 visualize` and `vim2 demo`."""

from ..command.main import Command, run_command

__all__ = ["main"]

COMMANDS = {"visualize": Command(extra="visualize"), "demo": Command("use a smaller --img-size", extra="demo")}


def main(argv: list[str]) -> int:
    """Run a command and return its exit code, see `run_command`."""
    return run_command("vim2", "", __package__, COMMANDS, argv)
