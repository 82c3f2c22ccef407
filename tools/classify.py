#!/usr/bin/env python
"""`vim2` from a checkout: `classify.py train|validate|predict ...`."""

import sys

from vim2_cli import main

if __name__ == "__main__":
    sys.exit(main())
