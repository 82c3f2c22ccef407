"""The command line: `tools/classify.py`, or `python -m vim2.classify`."""

import os
import sys

from .errors import UserError

__all__ = ["main"]

USAGE = """usage: classify.py {train,validate,predict} ...

  train      train or fine-tune on images (torchrun it for several GPUs)
  validate   top-1 and top-5 accuracy at one or many image sizes
  predict    classes of an image, a folder or a glob

classify.py COMMAND --help lists the options of each; docs/training.md explains them."""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code: 0, or 2 after one line on stderr for what the user can put right."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        run(command, rest)
    except UserError as error:
        # one line from one process; a worker's error comes with the worker's trace before it
        if error.one_process or os.environ.get("RANK", "0") == "0":
            print(f"classify.py: error: {str(error).rsplit('UserError: ', 1)[-1]}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print(f"classify.py: stopped{'; it goes on with --resume' if command == 'train' else ''}", file=sys.stderr)
        return 130
    return 0


def run(command: str, argv: list[str]) -> None:
    if command not in ("train", "validate", "predict"):
        from .options import did_you_mean

        known = ("train", "validate", "predict")
        raise UserError(f"unknown command {command}{did_you_mean(command, known)} (of {', '.join(known)})")
    import torch

    from . import predict, train, validate

    commands = {"train": train, "validate": validate, "predict": predict}
    try:
        commands[command](argv)
    except torch.OutOfMemoryError:
        remedy = ", with more --grad-accum-steps, or add --grad-checkpointing" if command == "train" else ""
        raise UserError(f"The GPU's memory is full: use a smaller --batch-size{remedy}.", one_process=True) from None
