#!/usr/bin/env python
"""`vim2 convert` from a checkout."""

import sys

from vim2_cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
