"""The command line: `vim2 train`, `validate`, `predict` and `convert`."""

from ..command.main import Command, run_command

__all__ = ["main"]

COMMANDS = {
    "train": Command(
        "use a smaller --batch-size, with more --grad-accum-steps, or add --grad-checkpointing",
        resumable=True,
    ),
    "validate": Command(),
    "predict": Command(),
    "convert": Command(),
}


def main(argv: list[str]) -> int:
    """Run a command and return its exit code, see `run_command`."""
    return run_command("vim2", "", __package__, COMMANDS, argv)
