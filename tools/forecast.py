#!/usr/bin/env python
"""Forecast time series: `forecast.py fit|evaluate|predict --help`; docs/forecasting.md explains."""

import os
import sys

# On a CPU that other programs use as well, OpenMP's threads would otherwise burn the time in which they wait for one
# another. This has to be said before PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from vim2.forecast.cli import main

if __name__ == "__main__":
    sys.exit(main())
