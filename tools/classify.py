#!/usr/bin/env python
"""Train, validate and predict on images: `classify.py train|validate|predict --help`; docs/training.md explains."""

import os
import sys

# On a CPU that other programs use as well, OpenMP's threads would otherwise burn the time in which they wait for one
# another, and a step take 2 to 20 times as long. This has to be said before PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from vim2.classify.cli import main

if __name__ == "__main__":
    sys.exit(main())
