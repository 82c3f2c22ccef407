#!/usr/bin/env python
"""Train, validate and predict on images: `classify.py train|validate|predict --help`; docs/training.md explains."""

import common

import sys

from vim2.classify.cli import main

if __name__ == "__main__":
    common.imported()
    sys.exit(main())
