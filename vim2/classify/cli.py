"""The command line: `tools/classify.py`, or `python -m vim2.classify`."""

from ..command.errors import Command, run_command

__all__ = ["main"]

COMMANDS = {
    "train": Command(
        "use a smaller --batch-size, with more --grad-accum-steps, or add --grad-checkpointing",
        resumable=True,
    ),
    "validate": Command(),
    "predict": Command(),
}
USAGE = """usage: classify.py {train,validate,predict} ...

  train      train or fine-tune on images (torchrun it for several GPUs)
  validate   top-1 and top-5 accuracy at one or many image sizes
  predict    classes of an image, a folder or a glob

classify.py COMMAND --help lists the options of each; docs/training.md explains them."""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code, see `run_command`."""
    return run_command("classify.py", USAGE, __package__, COMMANDS, argv)
