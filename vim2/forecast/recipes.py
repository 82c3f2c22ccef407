"""The benchmark data sets: how they are split, and settings.

Those of ETTh1, ETTh2 and Exchange were chosen on their validation splits alone. Those of ETTm1, ETTm2 and Weather are a
first guess, not chosen by anything yet.
"""

from typing import Any

__all__ = ["RECIPES"]

_HOURLY = dict(
    split=[8640.0, 2880.0, 2880.0],
    lookback=512,
    patch=64,
    stride=32,
    d_state=8,
    linear_path=True,
    dropout=0.3,
    head_dropout=0.7,
    lr=5e-4,
    epochs=4,
    patience=2,
)
_QUARTER_HOURLY = dict(
    split=[34560.0, 11520.0, 11520.0],
    lookback=512,
    d_model=32,
    depth=2,
    d_state=8,
    linear_path=True,
    dropout=0.2,
    head_dropout=0.3,
    batch_size=128,
    lr=5e-4,
    epochs=6,
    patience=2,
    amp=True,
)
RECIPES: dict[str, dict[str, Any]] = {
    "ETTh1": {**_HOURLY, "head_dropout": 0.5, "lr": 1e-4},
    "ETTh2": _HOURLY,
    "ETTm1": _QUARTER_HOURLY,
    "ETTm2": _QUARTER_HOURLY,
    "Exchange": {**_HOURLY, "split": [0.7, 0.1, 0.2], "instance_norm": "last"},
    # The field's Weather file is used as it is: with -9999 in two columns, and a time stamp that is there twice.
    "Weather": dict(
        split=[0.7, 0.1, 0.2],
        times="keep",
        keep_values=[-9999.0],
        lookback=512,
        patch=32,
        stride=16,
        d_model=64,
        depth=2,
        d_state=8,
        linear_path=True,
        dropout=0.2,
        head_dropout=0.3,
        batch_size=128,
        lr=5e-4,
        epochs=6,
        patience=2,
        amp=True,
    ),
}
