"""What the tools that are no commands of `vim2` share. Each imports it before anything else, to start as those do."""

import sys
from pathlib import Path

import vim2_cli

# it changes the process: a tool alone may do that, no program that imports it
if Path(sys.argv[0]).resolve().is_relative_to(Path(__file__).resolve().parents[1]):
    vim2_cli.start()
