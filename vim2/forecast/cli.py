"""The command line: `tools/forecast.py`, or `python -m vim2.forecast`."""

from ..classify.options import did_you_mean
from ..errors import UserError, run_command

__all__ = ["main"]

COMMANDS = ("fit", "evaluate", "predict")
USAGE = """usage: forecast.py {fit,evaluate,predict} DATA ...

  fit        train a TSM2 on the series of a file
  evaluate   its errors, and the baselines', on the rows set aside for testing
  predict    forecast beyond the end of a file

forecast.py COMMAND --help lists the options of each; docs/forecasting.md explains them."""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code, see `run_command`."""
    return run_command("forecast.py", USAGE, run, "fit", argv)


def run(command: str, argv: list[str]) -> None:
    if command not in COMMANDS:
        raise UserError(f"unknown command {command}{did_you_mean(command, COMMANDS)} (of {', '.join(COMMANDS)})")
    try:
        from . import evaluate, fit, predict
    except ImportError as error:
        raise UserError(str(error)) from None
    import torch

    try:
        {"fit": fit, "evaluate": evaluate, "predict": predict}[command](argv)
    except torch.OutOfMemoryError:
        raise UserError("The GPU's memory is full: use a smaller --batch-size.") from None
