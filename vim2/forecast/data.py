"""What models are given of a table: features of series and of the calendar, splits, standardised values, windows."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..command.errors import UserError
from .steps import usual_gap

__all__ = [
    "CYCLES",
    "Scaler",
    "Split",
    "Windows",
    "calendar_cycles",
    "calendar_features",
    "is_constant",
    "last_known",
    "make_split",
    "split_rows",
    "standardise",
    "static_features",
    "where_known",
]

FARTHEST = 1e15  # deviations
CYCLES = {"day": pd.Timedelta(days=1), "week": pd.Timedelta(days=7), "year": pd.Timedelta(days=365)}


def static_features(static: pd.DataFrame) -> np.ndarray:
    """Features of series, (M, C), float32: numbers, standardised over the series, and for text a column of 0 and 1 for
    each of its values.

    Args:
        static: As `Table` has it.

    Raises:
        UserError: The same of all series, or infinite numbers.
    """
    parts = []
    for name, column in static.items():
        if column.nunique() < 2:
            raise UserError(
                f"Static column {name} is the same for all series, and tells nothing of them: leave it out."
            )
        if pd.api.types.is_any_real_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
            numbers = column.to_numpy(np.float64)[:, None]
            with np.errstate(over="ignore", invalid="ignore"):
                scaler = Scaler.fit(numbers)
            if not (np.isfinite(numbers).all() and np.isfinite(scaler.std).all() and scaler.std.all()):
                raise UserError(
                    f"Static column {name} holds infinite numbers, or such as have a deviation of 0 or infinity in "
                    "float64: correct them, or leave it out."
                )
            parts.append(scaler.transform(numbers))
        else:
            parts.append(pd.get_dummies(column.astype(str)).to_numpy(np.float64))
    return np.concatenate(parts, axis=1).astype(np.float32)


def calendar_cycles(times: pd.DatetimeIndex) -> list[str]:
    """Of day, week and year those of more than one step that the rows hold at least twice, gaps not counted: nothing
    can be learned of another but what does not come again."""
    step = usual_gap(times.sort_values())
    if step is None:
        return []
    held = min(times.max() - times.min() + step, len(times) * step)
    return [name for name, length in CYCLES.items() if step < length and 2 * length <= held]


def calendar_features(times: pd.DatetimeIndex, cycles: Sequence[str]) -> np.ndarray:
    """Sine and cosine of the time of day, of week or of year, (rows, 2 cycles), which are known for any future time."""
    day = (times.hour * 3600 + times.minute * 60 + times.second) / 86400
    phases = {"day": day, "week": (times.day_of_week + day) / 7, "year": (times.day_of_year - 1 + day) / 366}
    angles = 2 * np.pi * np.stack([phases[name] for name in cycles], axis=1)
    return np.stack([np.sin(angles), np.cos(angles)], axis=2).reshape(len(times), -1)


@dataclass(frozen=True)
class Split:
    """Rows to train on, to validate on and to test on, one after the other from the first row."""

    train: int
    val: int
    test: int

    def borders(self, part: str, lookback: int) -> tuple[int, int]:
        """First and last row (exclusive) of a part; validation and test reach back by the lookback, so that their
        first forecast begins with their first row."""
        ends = {"train": self.train, "val": self.train + self.val, "test": self.train + self.val + self.test}
        starts = {"train": 0, "val": self.train - lookback, "test": self.train + self.val - lookback}
        return starts[part], ends[part]


def split_rows(rows: int, parts: Sequence[float]) -> Split:
    """A split by shares, (0.7, 0.1, 0.2), rounded as the field does, or by rows, (8640, 2880, 2880).

    Raises:
        UserError: Numbers that are none of both, or more rows than there are.
    """
    if len(parts) != 3 or any(p < 0 for p in parts):
        raise UserError(f"A split is three numbers, of training, validation and test, got {list(parts)}.")
    if all(float(p).is_integer() for p in parts) and sum(parts) > 1:
        train, val, test = map(int, parts)
    elif abs(sum(parts) - 1) < 1e-6:
        train, test = int(rows * parts[0]), int(rows * parts[2])
        val = rows - train - test
    else:
        raise UserError(f"The shares of a split must sum to 1, or be whole numbers of rows; got {list(parts)}.")
    if train + val + test > rows:
        raise UserError(f"The split asks for {train + val + test} rows, the file has {rows}: choose another --split.")
    return Split(train, val, test)


def make_split(rows: int, parts: Sequence[float], lookback: int, horizon: int) -> Split:
    """The `split_rows` for windows of a lookback and a horizon.

    Raises:
        UserError: As `split_rows`; too few rows for lookback and horizon.
    """
    split = split_rows(rows, parts)
    of_horizon = f"a horizon of {horizon}"  # windows to validate and to test reach back into the rows before
    for name, size, what, needed in (
        ("training", split.train, f"a lookback of {lookback} and {of_horizon}, which need", lookback + horizon),
        ("validation", split.val, f"{of_horizon}, which needs", horizon),
        ("test", split.test, f"{of_horizon}, which needs", horizon if split.test else 0),
    ):
        if size < needed:
            raise UserError(
                f"{size} rows of {name} (of {rows} in the file) are too few for {what} {needed}: shorten "
                f"{'them' if 'lookback' in what else 'it'}, or choose another --split."
            )
    return split


@dataclass(frozen=True)
class Scaler:
    """Standardisation by the mean and deviation of the training rows, (M,), float64 each."""

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def fit(cls, values: np.ndarray) -> "Scaler":
        """From (rows, M), of which missing ones are left out, but no column may be without any; a column that does not
        vary keeps its scale, as in scikit-learn."""
        return cls(np.nanmean(values, axis=0), np.where(is_constant(values), 1.0, np.nanstd(values, axis=0)))

    def transform(self, values: Any) -> Any:
        """(..., M) -> (..., M), standardised."""
        return (values - self.mean) / self.std

    def inverse(self, values: Any) -> Any:
        """(..., M) -> (..., M), in the units of the file."""
        return values * self.std + self.mean


def standardise(scaler: Scaler, values: np.ndarray, columns: Sequence[str]) -> np.ndarray:
    """(rows, M), float64.

    Raises:
        UserError: A value so far from those of training that sums of its squares overflow in float32.
    """
    with np.errstate(over="ignore"):
        scaled = scaler.transform(values)
    far = np.argwhere(np.abs(scaled) > FARTHEST)
    if len(far):
        row, column = far[0]
        raise UserError(
            f"Column {columns[column]} holds {values[row, column]:g}, too far from the rows of training, of mean "
            f"{scaler.mean[column]:g} and deviation {scaler.std[column]:g}: give it in the same units as there, or "
            "correct it."
        )
    return scaled


def is_constant(values: np.ndarray) -> np.ndarray:
    """Which columns of (rows, M) hold one value only, (M,); missing ones are none."""
    return np.nanmax(values, axis=0) == np.nanmin(values, axis=0)


def last_known(values: Tensor) -> Tensor:
    """Standardised values (rows, M) in which the value before stands for missing ones, and the mean, 0, for those
    before a series begins: nothing that comes later."""
    rows = torch.arange(len(values), device=values.device).unsqueeze(1)
    latest = torch.where(values.isnan(), -1, rows).cummax(0).values
    return values.gather(0, latest.clamp_min(0)).where(latest >= 0, 0.0)


def where_known(forecast: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Forecast (..., H, M), or (..., H, M, Q), and truth (..., H, M), both 0 where the truth is missing, NaN, so that
    there is no error there; and where it is known, (..., H, M)."""
    known = ~y.isnan()
    over = known if forecast.dim() == y.dim() else known.unsqueeze(-1)
    return forecast.where(over, 0.0), y.where(known, 0.0), known


class Windows:
    """All windows of a stretch of rows, at stride 1, cut out of one tensor by their index.

    Args:
        values: Standardised targets, (rows, M), on the device that is to train; NaN where they are missing.
        lookback: Steps L of history.
        horizon: Steps H to forecast.
        start: First row.
        end: Row after the last.
        future: Known-future features, (rows or more, C), on the same device; None if there are none.
    """

    def __init__(self, values: Tensor, lookback: int, horizon: int, start: int, end: int, future: Tensor | None = None):
        self.lookback, self.horizon = lookback, horizon
        self.windows = values[start:end].unfold(0, lookback + horizon, 1)  # a view: (windows, M, L + H)
        self.known = None  # what histories are cut from, where values are missing
        if values[start:end].isnan().any():
            self.known = last_known(values)[start:end].unfold(0, lookback + horizon, 1)
        self.future = None if future is None else future[start + lookback : end].unfold(0, horizon, 1)

    def __len__(self) -> int:
        return len(self.windows)

    def shorter(self, lookback: int) -> "Windows":
        """The same windows without the first steps of their history."""
        part = copy(self)
        part.lookback, part.windows = lookback, self.windows[..., self.lookback - lookback :]
        part.known = None if self.known is None else self.known[..., self.lookback - lookback :]
        return part

    def stretch(self, start: int, end: int) -> "Windows":
        """The windows from one number to before another."""
        part = copy(self)
        part.windows = self.windows[start:end]
        part.known = None if self.known is None else self.known[start:end]
        part.future = None if self.future is None else self.future[start:end]
        return part

    @property
    def device(self) -> torch.device:
        return self.windows.device

    @property
    def has_gaps(self) -> bool:
        """Whether values are missing, so that truths may be NaN."""
        return self.known is not None

    def __getitem__(self, index: Tensor | slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """History (n, L, M), truth (n, H, M) and future features (n, H, C) or None. The truth is NaN where it is
        missing, and for series of which the history holds nothing; the history, where it is missing, `last_known`."""
        x, y = self.windows[index].transpose(1, 2).split((self.lookback, self.horizon), dim=1)
        if self.known is not None:
            y = y.where(x.isfinite().any(1, keepdim=True), torch.nan)
            x = self.known[index].transpose(1, 2)[:, : self.lookback]
        return x, y, None if self.future is None else self.future[index].transpose(1, 2)

    def batches(self, size: int):
        """All windows in order, the last batch with what remains."""
        for start in range(0, len(self), size):
            yield self[start : start + size]
