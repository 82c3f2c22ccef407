"""The command line: `tools/classify.py`, or `python -m vim2.classify`."""

from ..errors import UserError, run_command

__all__ = ["main"]

USAGE = """usage: classify.py {train,validate,predict} ...

  train      train or fine-tune on images (torchrun it for several GPUs)
  validate   top-1 and top-5 accuracy at one or many image sizes
  predict    classes of an image, a folder or a glob

classify.py COMMAND --help lists the options of each; docs/training.md explains them."""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code, see `run_command`."""
    return run_command("classify.py", USAGE, run, "train", argv)


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
