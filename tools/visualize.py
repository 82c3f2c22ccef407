#!/usr/bin/env python
"""`vim2 visualize` from a checkout."""

import sys

from vim2_cli import main

if __name__ == "__main__":
    sys.exit(main(["visualize", *sys.argv[1:]]))
