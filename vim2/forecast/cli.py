"""The command line: `tools/forecast.py`, or `python -m vim2.forecast`."""

from ..command.errors import Command, run_command

__all__ = ["main"]

COMMANDS = {"fit": Command(resumable=True), "evaluate": Command(), "predict": Command()}
USAGE = """usage: forecast.py {fit,evaluate,predict} DATA ...

  fit        train a TSM2 on the series of a file
  evaluate   its errors, and the baselines', on the rows set aside for testing
  predict    forecast beyond the end of a file

forecast.py COMMAND --help lists the options of each; docs/forecasting.md explains them."""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code, see `run_command`."""
    return run_command("forecast.py", USAGE, __package__, COMMANDS, argv)
