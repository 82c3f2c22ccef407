"""The command line: `vim2 mm`."""

from ..command.main import Command, run_command

__all__ = ["main"]

COMMANDS = {
    "train": Command(resumable=True, extra="mm", one_voice=False),
    "test": Command(extra="mm", one_voice=False),
    "predict": Command(extra="mm"),
}
USAGE = """usage: vim2 mm {train,test,predict} ...

  train      train a detector or a segmenter from a config
  test       evaluate one
  predict    draw boxes, masks or maps on images

vim2 mm COMMAND --help lists the options of each. In vim2's repository, docs/openmmlab.md is the guide."""


def main(argv: list[str]) -> int:
    """Run a command and return its exit code, see `run_command`."""
    return run_command("vim2", USAGE, f"{__package__}.commands", COMMANDS, argv)
