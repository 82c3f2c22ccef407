"""The benchmark data sets: how the field splits and reads them. Everything else is as for any other file."""

from typing import Any

__all__ = ["RECIPES"]

# Nobody forecasts beyond the end of these: they are tested, by members that know the training rows alone.
_TESTED = dict(lookback=512, refit=False)
_HOURLY = dict(_TESTED, split=[8640.0, 2880.0, 2880.0])
_QUARTER_HOURLY = dict(_TESTED, split=[34560.0, 11520.0, 11520.0])
_SHARES = dict(_TESTED, split=[0.7, 0.1, 0.2])
RECIPES: dict[str, dict[str, Any]] = {
    "ETTh1": _HOURLY,
    "ETTh2": _HOURLY,
    "ETTm1": _QUARTER_HOURLY,
    "ETTm2": _QUARTER_HOURLY,
    "Exchange": _SHARES,
    # The field's file as it is: with -9999 in two columns, and a time stamp that is there twice.
    "Weather": dict(_SHARES, times="keep", keep_values=[-9999.0]),
}
