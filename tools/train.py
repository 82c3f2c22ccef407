#!/usr/bin/env python
"""`vim2 mm train` from a checkout."""

import sys

from vim2_cli import main

if __name__ == "__main__":
    sys.exit(main(["mm", "train", *sys.argv[1:]]))
