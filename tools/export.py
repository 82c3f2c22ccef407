#!/usr/bin/env python
"""`vim2 export` from a checkout."""

import sys

from vim2_cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
