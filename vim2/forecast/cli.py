"""The command line: `vim2 forecast`."""

from ..command.main import Command, run_command

__all__ = ["main"]

COMMANDS = {
    "fit": Command(resumable=True, extra="forecast"),
    "evaluate": Command(extra="forecast"),
    "predict": Command(extra="forecast"),
}
USAGE = """usage: vim2 forecast {fit,evaluate,predict} DATA ...

  fit        train a TSM2 on the series of a file
  evaluate   its errors, and the baselines', on the rows set aside for testing
  predict    forecast beyond the end of a file

vim2 forecast COMMAND --help lists the options of each. In vim2's repository, docs/forecasting.md is the guide."""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code, see `run_command`."""
    return run_command("vim2", USAGE, __package__, COMMANDS, argv)
