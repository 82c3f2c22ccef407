#!/usr/bin/env python
"""`vim2 benchmark` from a checkout."""

import sys

from vim2_cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
