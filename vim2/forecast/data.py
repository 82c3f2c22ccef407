"""Time series: read from files and DataFrames with stated repairs, split, standardised, cut into windows."""

import datetime
from collections.abc import Collection, Sequence
from copy import copy
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..command.errors import UserError, did_you_mean
from .cells import parse_numbers, refuse_extremes, refuse_sentinels, rewrite, to_float64
from .frames import LONG, describe, is_of_dates, leave_out_index, read_frame, refuse_renamed_long, widen
from .stamps import (
    DATES,
    TIME_NAMES,
    TIMES,
    ParsedTimes,
    find_step,
    holds_stamps,
    join_time_of_day,
    number_cells,
    parse_times,
    repair_times,
    stamp_rows,
    to_step,
    usual_gap,
    years_or_months,
)

__all__ = [
    "Scaler",
    "Split",
    "Table",
    "Windows",
    "calendar_cycles",
    "calendar_features",
    "last_known",
    "make_split",
    "read_table",
    "split_rows",
    "static_features",
    "where_known",
]

MISSING = ("error", "interpolate", "previous", "mask")
SEASONS = {"h": 24, "min": 1440, "s": 86400, "D": 7, "B": 5, "W": 52}
SEASONS |= {"MS": 12, "ME": 12, "BMS": 12, "BME": 12, "QS": 4, "QE": 4, "BQS": 4, "BQE": 4}


@dataclass(frozen=True)
class Table:
    """Series that share their time stamps.

    Args:
        times: Time stamps of the rows.
        values: Targets, (rows, M), float64; NaN where a value is missing and masked.
        columns: M names.
        future: Known-future features, (rows + further, C), float64, C may be 0; NaN where one is missing and masked.
        future_columns: C names.
        future_times: Time stamps of the rows of `future`: those of the targets, and any that follow.
        repairs: What was changed in the file's data, a sentence each.
        dates: Order in which its dates were read, an option of `read_table`.
        ids: Of a long table, the series' ids by the name of their column; None of a wide one.
        first_row: The first row's number, where rows are counted and their time stamps stand for none.
        static: Of a long table, the columns that were asked for as static, a row for each target.
        zone: Time zone of a DataFrame's time stamps, which are in UTC here, or the time on the clock without it.
    """

    times: pd.DatetimeIndex
    values: np.ndarray
    columns: list[str]
    future: np.ndarray
    future_columns: list[str]
    future_times: pd.DatetimeIndex
    repairs: list[str] = field(default_factory=list)
    dates: str = "detect"
    ids: dict[str, Any] | None = None
    first_row: int | None = None
    static: pd.DataFrame | None = None
    zone: datetime.tzinfo | None = None

    def __len__(self) -> int:
        return len(self.values)

    def labels(self, start: int, end: int) -> pd.Index:
        """What rows are called, from one to before another: by their time stamps, or by their numbers, where they are
        counted, which go on behind the last."""
        if self.first_row is not None:
            return pd.RangeIndex(self.first_row + start, self.first_row + end, name="row")
        return self.times[start:end].rename("date")

    def in_zone(self, times: pd.Index) -> pd.Index:
        """Labels as `labels` has them, time stamps in the DataFrame's own time zone if it has one."""
        if self.zone is None or not isinstance(times, pd.DatetimeIndex):
            return times
        if times.tz is not None:
            return times.tz_convert(self.zone)
        # a midnight that a change of the clock skips, or has twice
        return times.tz_localize(self.zone, nonexistent="shift_forward", ambiguous=np.ones(len(times), dtype=bool))

    @property
    def step(self) -> pd.offsets.BaseOffset | None:
        """From one row to the next, None where that is not the same throughout."""
        return find_step(self.times)

    @property
    def season(self) -> int:
        """Rows after which a season repeats: `season_length`; where steps are not the same, or are of another kind, as
        many rows as there usually are in that time, such as 5 in a week without weekends, 8 in a day of business hours.
        """
        if step_name(self.step) in SEASONS or (usual := usual_gap(self.times)) is None:
            return season_length(self.step)
        times, length = self.times.sort_values(), season_length(to_step(usual))
        after = times.searchsorted(times + length * usual)
        rows = (after - np.arange(len(times)))[after < len(times)]
        return max(int(np.median(rows)), 1) if len(rows) else length


def read_table(
    data: str | PathLike | pd.DataFrame,
    time_column: str | None = None,
    targets: Sequence[str] | None = None,
    future_columns: Sequence[str] = (),
    na_values: Sequence[float] = (),
    keep_values: Sequence[float] = (),
    missing: str = "error",
    times: str = "error",
    dates: str = "detect",
    freq: str | None = None,
    start: str | None = None,
    static_columns: Sequence[str] = (),
) -> Table:
    """Read series from a file of one row a time step. Nothing is repaired, or left out, without being asked for.

    Rows at the end that hold no target, with known-future columns or without, are the future to forecast. A table with
    the columns unique_id, ds and y is taken as a long one, of a row for each series and time step, in any order.

    Args:
        data: .csv, also compressed (xz, gzip, bzip2, zip, zstd, whatever it is called), or .parquet; or a DataFrame,
            which is not changed.
        time_column: Name; by default the index of a DataFrame if it holds time stamps, else a column called date,
            datetime, time, timestamp or ds, else the first.
        targets: Names; by default all other columns. Of a long table, ids.
        future_columns: Names of columns that are known for the time to forecast.
        na_values: Numbers that stand for a missing value.
        keep_values: Numbers that look as if they did, but are to be taken as they are.
        missing: What becomes of missing values: "error", "interpolate" (linearly between neighbours, ends repeated),
            "previous" (the value before, where there is none the one after) or "mask" (they stay missing: of targets,
            forecasts see the value before, and none is trained or scored by them, so that series may begin and end at
            different times; known-future features are then at their mean).
        times: What becomes of time stamps that are out of order, twice there, or not a constant step apart: "error",
            "regular" (sort, keep the first of equal ones, add missing rows, whose values `missing` then fills), or
            "keep" (take the rows as they are, each as one step).
        dates: Order of dates such as 01/02/24: "day-first", "month-first", "year-first", or "detect": the one that is
            possible in all rows, of several the one in which rows are a constant step apart.
        freq: Of a table without time stamps, how far apart its rows are, as pandas names it: "h", "15min", "MS". A time
            column then need not be there, or counts the rows.
        start: The time stamp of such a table's first row; by default rows are counted, from 0, or as their time column,
            or the first, counts them.
        static_columns: Of a long table, names of columns that describe a series, such as its region.

    Raises:
        UserError: Anything in the file that cannot be used as it is.
    """
    source = describe(data)
    for name, value, known in (("missing", missing, MISSING), ("times", times, TIMES), ("dates", dates, DATES)):
        if value not in known:
            raise UserError(f"--{name} must be one of {', '.join(known)}, got {value!r}.")
    if start and not freq:
        raise UserError("--start is for rows without time stamps: say with --freq how far apart they are.")
    frame, index, repairs = read_frame(data, untimed=freq is not None)
    # as names are read; forecasters from before have them with the spaces around them
    time_column = time_column and time_column.strip()
    targets = None if targets is None else [name.strip() for name in targets]
    future_columns, static_columns = ([name.strip() for name in names] for names in (future_columns, static_columns))
    asked = [*(targets or ()), *future_columns]
    if twice := sorted({c for c in asked if asked.count(c) > 1}):
        raise UserError(f"Columns are named twice as targets or future columns: {', '.join(twice)}. Name each once.")
    if twice := sorted({c for c in static_columns if static_columns.count(c) > 1}):
        raise UserError(f"Static columns are named twice: {', '.join(twice)}. Name each once.")
    asked += static_columns
    frame, more = leave_out_index(frame, [c for c in (time_column, *asked) if c])
    repairs += more
    ids = static = parsed = None
    if set(LONG) <= set(frame.columns):
        frame, parsed = parse_long_times(frame, source, dates, time_column is not None, freq is not None)
        frame, ids, static, more = widen(frame, future_columns, source, static_columns, times == "regular")
        repairs += more
        index = LONG[1]
    first_row, named = None, time_column is not None
    if freq:
        frame, first_row, more = stamp_frame(frame, time_column or index, freq, start, source, asked)
        repairs += more
        time_column = "date"
    index = time_column or index
    time_column = choose_time_column(frame, index, source)
    if ids is None:  # series of a long table may be called so
        frame, time_column, more = join_time_of_day(frame, time_column, asked)
        repairs += more
    if ids is None and not freq and times == "error":
        is_known = index is not None or time_column.lower() in TIME_NAMES
        refuse_renamed_long(frame, time_column if is_known else None, source)
    if static_columns and static is None:
        raise UserError(
            f"Static columns describe the series of a long table, with columns {', '.join(LONG)}, and {source} is none."
        )
    names = [c for c in frame.columns if c != time_column]
    targets = [c for c in names if c not in future_columns] if targets is None else targets
    for name in (*targets, *future_columns):
        if name not in names:
            kind = "column" if ids is None or name in future_columns else "series"
            raise UserError(f"{source} has no {kind} {name}{did_you_mean(name, names)} (of {', '.join(names)})")
    if not targets:
        raise UserError(f"{source} has no column to forecast beside {time_column}.")
    if parsed is None:
        try:
            parsed = parse_times(frame[time_column], source, dates, named)
        except UserError as error:
            begins = is_of_dates(frame[time_column].iloc[:1])  # a column of dates, but for what is told
            dated = [] if index or begins else [c for c in names if is_of_dates(frame[c])]
            raise UserError(f"{error} {dated[0]} holds dates: --time-column {dated[0]}." if dated else error) from None
        stamps = parsed.times
    else:
        stamps = pd.DatetimeIndex(frame[time_column])
    repairs += parsed.notes
    cells, more = rewrite(frame[[*targets, *future_columns]], source)
    repairs += more
    rows = None
    if ids is not None:  # of a long table, a row here is none of its own
        rows = stamps if first_row is None else pd.RangeIndex(first_row, first_row + len(stamps))
    numbers = {c: parse_numbers(cells[c], source, c in future_columns, rows) for c in cells}
    numbers = pd.DataFrame(numbers, index=stamps)
    for value in na_values:
        found = int((numbers == value).sum().sum())
        numbers = numbers.mask(numbers == value)
        repairs.append(f"{found} cells of {value:g} are taken as missing.")
    refuse_sentinels(numbers, keep_values, source)
    refuse_extremes(numbers, source, rows)
    numbers, more = repair_times(numbers, times, source)
    repairs += more
    filled = np.flatnonzero(numbers[targets].notna().any(axis=1).to_numpy())
    if not len(filled):
        raise UserError(f"{source} has no row with a value of {', '.join(targets[:3])}.")
    rows = int(filled[-1]) + 1
    if rows < len(numbers) and not future_columns:  # which otherwise say what these rows are for
        repairs.append(f"{len(numbers) - rows} rows at the end have no value: they are the time to forecast.")
    index = numbers.index
    if first_row is not None:  # what messages call the rows
        numbers.index = pd.RangeIndex(first_row, first_row + len(index))
    values, more = repair_missing(numbers[targets].iloc[:rows], missing, source)
    repairs += more
    future, more = repair_missing(numbers[future_columns], missing, source, targets=False)
    repairs += more
    static = static.loc[targets] if static_columns else None
    return Table(
        index[:rows],
        values,
        targets,
        future,
        future_columns,
        index,
        repairs,
        parsed.dates,
        ids,
        first_row,
        static,
        parsed.zone,
    )


def parse_long_times(
    frame: pd.DataFrame, source: str, dates: str, named: bool, untimed: bool
) -> tuple[pd.DataFrame, ParsedTimes | None]:
    """A long table whose time column can be put in order, as it holds time stamps, and how they were read; or, of one
    without time stamps, as it holds numbers, or text if there are others.

    Raises:
        UserError: As `parse_times`.
    """
    time = frame[LONG[1]]
    if untimed:
        numbers = to_float64(time)
        others = np.isnan(numbers) & time.notna().to_numpy()
        return frame.assign(**{LONG[1]: time.astype(str) if others.any() else numbers}), None
    # each time is read once, whatever the number of series
    parsed = parse_times(time.drop_duplicates(), source, dates, named, ordered=False)
    return frame.assign(**{LONG[1]: parsed.times[pd.factorize(time)[0]]}), parsed


def stamp_frame(
    frame: pd.DataFrame, named: str | None, freq: str, start: str | None, source: str, wanted: Collection[str] = ()
) -> tuple[pd.DataFrame, int | None, list[str]]:
    """A table without time stamps with a column of them, date; the number of its first row if it has no start; what was
    left out.

    Args:
        frame: As read.
        named: Its column that counts the rows, if it is known; otherwise one of TIME_NAMES, or the first, such as year,
            if that counts them. Months, 202401, do not, and are refused there, so that they are not forecast.
        freq, start, source: As in `read_table`.
        wanted: Columns that were asked for as series.

    Raises:
        UserError: As `stamp_rows`; the column does not count the rows.
    """
    named = named or next((c for c in frame.columns if c.lower() in TIME_NAMES), None)
    if named is None and len(frame.columns) > 1 and len(frame) > 1:
        leading = frame.columns[0]
        told = counted(frame[leading]) is not None or years_or_months(number_cells(frame[leading]), leading) is not None
        named = leading if leading not in wanted and told else None
    first, notes = 0, []
    if named is not None:
        if named not in frame.columns:
            raise UserError(f"{source} has no column {named}{did_you_mean(named, frame.columns)}")
        numbers = counted(frame[named])
        if numbers is None:
            raise UserError(
                f"Column {named} of {source} does not count the rows, one by one, and --freq is for rows without time "
                "stamps: leave --freq out, or if that column is a series, rename it and name it with --targets."
            )
        first = int(numbers[0])
        frame = frame.drop(columns=named)
        notes.append(f"Column {named} counts the rows.")
    frame = frame.copy()
    frame.insert(0, "date", stamp_rows(len(frame), freq, start))
    return frame, None if start else first, notes


def counted(column: pd.Series) -> np.ndarray | None:
    """The numbers of a column that counts the rows, one by one from any of them; None of another."""
    if holds_stamps(column) or pd.api.types.is_complex_dtype(column):
        return None
    numbers = to_float64(column)
    if np.isinf(numbers).any():
        return None
    return numbers if (numbers % 1 == 0).all() and (np.diff(numbers) == 1).all() else None


def choose_time_column(frame: pd.DataFrame, name: str | None, source: str) -> str:
    if frame.columns.empty:
        raise UserError(f"{source} has no columns but an index that counts the rows.")
    if name is None:
        return next((c for c in frame.columns if c.lower() in TIME_NAMES), frame.columns[0])
    if name not in frame.columns:
        names = ", ".join(frame.columns)
        raise UserError(f"{source} has no column {name}{did_you_mean(name, frame.columns)} (of {names})")
    return name


def repair_missing(numbers: pd.DataFrame, how: str, source: str, targets: bool = True) -> tuple[np.ndarray, list[str]]:
    counts, option = numbers.isna().sum(), "--targets" if targets else "--future-columns"
    counts = counts[counts > 0]
    if counts.empty:
        return numbers.to_numpy(dtype=np.float64), []
    if len(empty := counts[counts == len(numbers)]):
        raise UserError(
            f"Column {empty.index[0]} of {source} holds no value at all: leave it out with {option}, or where a "
            "forecaster needs it, give rows that reach back to its last value."
        )
    listed = ", ".join(f"{name} ({count})" for name, count in counts.iloc[:5].items())
    listed += f" and {len(counts) - 5} more columns" if len(counts) > 5 else ""
    if how == "error":
        row = numbers.index[numbers.isna().any(axis=1)][0]
        mostly = counts[2 * counts > len(numbers)].index
        known = {name: np.flatnonzero(numbers[name].notna()) for name in mostly}  # by number: stamps may be there twice
        held = {name: rows[-1] + 1 - rows[0] for name, rows in known.items()}
        sparse = [name for name in mostly if 2 * len(known[name]) < held[name]]
        if sparse:
            remedy = f"Leave {sparse[0]} out with {option}: most of it would be made up"
        elif held:
            remedy = f"Add --missing mask, to learn from what is there: {mostly[0]} begins late or ends early"
        else:
            masked = "learn from the others alone" if targets else "have them at their mean"
            remedy = "Add --missing interpolate or --missing previous to fill them, or --missing mask to "
            remedy += f"{masked}, or choose columns with {option}"
        raise UserError(f"Values of {source} are missing: {listed}; first at {row}. {remedy}.")
    if how == "mask":
        masked = "are masked, neither learned from nor scored" if targets else "of known columns stand at their mean"
        return numbers.to_numpy(dtype=np.float64), [f"{int(counts.sum())} missing values {masked}: {listed}."]
    # by rows, not by time: rows are the model's steps
    filled = numbers.interpolate(limit_direction="both") if how == "interpolate" else numbers.ffill().bfill()
    verb = "interpolated" if how == "interpolate" else "filled with the value before"
    return filled.to_numpy(dtype=np.float64), [f"{int(counts.sum())} missing values were {verb}: {listed}."]


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


CYCLES = {"day": pd.Timedelta(days=1), "week": pd.Timedelta(days=7), "year": pd.Timedelta(days=365)}


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


def season_length(step: pd.offsets.BaseOffset | None) -> int:
    """Steps after which a season repeats: a day of shorter steps, a week of days, a year of a week and longer steps;
    else 1."""
    if isinstance(step, pd.offsets.Day) and step.n >= 7:
        return max(round(365 / step.n), 1)
    return 1 if step is None else max(SEASONS.get(step_name(step), 1) // step.n, 1)


def step_name(step: pd.offsets.BaseOffset | None) -> str | None:
    """pandas' name of a step, without a count and what it is anchored to."""
    return None if step is None else step.freqstr.split("-")[0].lstrip("0123456789")


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
