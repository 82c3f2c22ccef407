"""The M5 competition's hierarchy and its weighted root mean squared scaled error (Makridakis et al., 2022)."""

import numpy as np
import pandas as pd

__all__ = ["M5_LEVELS", "aggregate_m5", "wrmsse"]

# The columns whose combinations are the series of each of the twelve levels.
M5_LEVELS: tuple[tuple[str, ...], ...] = (
    (),
    ("state_id",),
    ("store_id",),
    ("cat_id",),
    ("dept_id",),
    ("state_id", "cat_id"),
    ("state_id", "dept_id"),
    ("store_id", "cat_id"),
    ("store_id", "dept_id"),
    ("item_id",),
    ("item_id", "state_id"),
    ("item_id", "store_id"),
)


def aggregate_m5(bottom: np.ndarray, ids: pd.DataFrame) -> np.ndarray:
    """Sums of the bottom series at every level, one level after the other, each in the order of its sorted keys.

    Args:
        bottom: (series, days), or any other quantity that adds up, in the order of `ids`.
        ids: A row a series, with the columns that M5_LEVELS names: item_id, dept_id, cat_id, store_id, state_id.

    Returns:
        (series of all levels, days), float64: 42,840 for M5's 30,490 series.

    Raises:
        ValueError: Another number of rows than of series, or a column missing.
    """
    if len(bottom) != len(ids):
        raise ValueError(f"bottom has {len(bottom)} rows, ids {len(ids)}: there must be one each a series.")
    if missing := sorted({c for level in M5_LEVELS for c in level} - set(ids.columns)):
        raise ValueError(f"ids has no column {', '.join(missing)}.")
    frame = pd.DataFrame(np.asarray(bottom, dtype=np.float64))
    levels = []
    for columns in M5_LEVELS:
        keys = [ids[c].to_numpy() for c in columns] or [np.zeros(len(ids))]
        levels.append(frame.groupby(keys, sort=True).sum().to_numpy())
    return np.concatenate(levels)


def wrmsse(forecast: np.ndarray, truth: np.ndarray, scales: np.ndarray, weights: np.ndarray) -> float:
    """Weighted root mean squared scaled error.

    Args:
        forecast: (series of all levels, days).
        truth: As forecast.
        scales: (series,): mean squared difference of consecutive days in training, from each series' first sale on.
        weights: (series,), that sum to 1 over all levels.

    Raises:
        ValueError: Shapes that do not fit together, weights that do not sum to 1, a weighted series without a scale.
    """
    forecast, truth, scales, weights = (np.asarray(a, dtype=np.float64) for a in (forecast, truth, scales, weights))
    if forecast.shape != truth.shape or forecast.ndim != 2 or not scales.shape == weights.shape == forecast.shape[:1]:
        shapes = ", ".join(str(a.shape) for a in (forecast, truth, scales, weights))
        raise ValueError(f"forecast, truth, scales and weights must be (n, days), (n, days), (n,), (n,); got {shapes}.")
    if abs(weights.sum() - 1) > 1e-6:
        raise ValueError(f"weights must sum to 1 over all levels, got {weights.sum():g}.")
    used = weights > 0
    if not (scales[used] > 0).all():
        raise ValueError(f"{int((scales[used] <= 0).sum())} series with a weight have no positive scale.")
    errors = np.square(forecast - truth).mean(axis=1)
    return float((weights[used] * np.sqrt(errors[used] / scales[used])).sum())
