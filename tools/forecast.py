#!/usr/bin/env python
"""`vim2 forecast` from a checkout."""

import sys

from vim2_cli import main

if __name__ == "__main__":
    sys.exit(main(["forecast", *sys.argv[1:]]))
