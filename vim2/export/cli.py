"""The command line: `vim2 export`."""

from ..command.main import Command, run_command

__all__ = ["main"]

COMMANDS = {"export": Command(extra="export")}


def main(argv: list[str]) -> int:
    """Run the command and return its exit code, see `run_command`."""
    return run_command("vim2", "", f"{__package__}.command", COMMANDS, argv)
