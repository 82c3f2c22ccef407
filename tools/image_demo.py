#!/usr/bin/env python
"""`vim2 mm predict` from a checkout."""

import sys

from vim2_cli import main

if __name__ == "__main__":
    sys.exit(main(["mm", "predict", *sys.argv[1:]]))
