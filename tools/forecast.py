#!/usr/bin/env python
"""Forecast time series: `forecast.py fit|evaluate|predict --help`; docs/forecasting.md explains."""

import common

import sys

from vim2.forecast.cli import main

if __name__ == "__main__":
    common.imported()
    sys.exit(main())
