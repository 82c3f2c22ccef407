#!/usr/bin/env python
"""Forecast time series: `forecast.py fit|evaluate|predict --help`; docs/forecasting.md explains."""

import common  # noqa: F401  (for what it sets)

import sys

from vim2.forecast.cli import main

if __name__ == "__main__":
    sys.exit(main())
