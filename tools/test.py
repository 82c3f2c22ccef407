#!/usr/bin/env python
"""`vim2 mm test` from a checkout."""

import sys

from vim2_cli import main

if __name__ == "__main__":
    sys.exit(main(["mm", "test", *sys.argv[1:]]))
