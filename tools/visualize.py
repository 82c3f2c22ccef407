#!/usr/bin/env python
"""Draw what a ViM2 has learned and what it does with images: `visualize.py --help`; docs/training.md explains."""

from common.command import run_tool

import sys

from vim2.visualize import visualize


def main(argv: list[str] | None = None) -> None:
    visualize(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(run_tool(main))
