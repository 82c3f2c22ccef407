"""Tables: time series read from files and DataFrames, nothing repaired without being asked for and told."""

import datetime
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ..command.errors import UserError, did_you_mean
from .cells import parse_numbers, refuse_extremes, refuse_sentinels, rewrite, to_whole
from .frames import describe, is_of_dates, leave_out_index, read_frame
from .long_tables import LONG, TIME, parse_long_times, refuse_renamed_long, widen
from .stamps import (
    DATES,
    TIME_NAMES,
    ParsedTimes,
    join_time_of_day,
    number_cells,
    parse_times,
    years_or_months,
)
from .steps import TIMES, find_step, repair_times, season_length, seasonal, stamp_rows, to_step, usual_gap

__all__ = ["MISSING", "Table", "read_table"]

MISSING = ("error", "interpolate", "previous", "mask")


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
        if seasonal(self.step) or (usual := usual_gap(self.times)) is None:
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
    frame, time, notes = read_frame(data, untimed=freq is not None)
    wanted = want_columns(time_column, targets, future_columns, static_columns)
    frame, more = leave_out_index(frame, [wanted.time, *wanted.beside_time])
    notes += more
    if set(LONG) <= set(frame.columns):
        cells = stamp_long(frame, wanted, source, dates, freq, start, leave_out_repeated=times == "regular")
    elif freq:
        cells = number_wide(frame, wanted, time, source, freq, start)
    else:
        cells = stamp_wide(frame, wanted, time, source, dates, refuse_long=times == "error")
    notes += cells.notes

    numbers, more = read_numbers(cells, wanted, na_values, source)
    notes += more
    faults = []
    with collect(faults):
        refuse_sentinels(numbers, keep_values, source)
        refuse_extremes(numbers, source, cells.row_names)
    with collect(faults):
        numbers, more = repair_times(numbers, times, source)
        notes += more
    if faults:
        raise UserError(" ".join(faults))

    stamps, rows = numbers.index, count_known_rows(numbers[cells.targets], source)
    if rows < len(numbers) and not wanted.future:  # which otherwise say what these rows are for
        notes.append(f"{len(numbers) - rows} rows at the end have no value: they are the time to forecast.")
    if cells.first_row is not None:  # what messages call the rows
        numbers.index = number_rows(cells.first_row, len(numbers))
    values, more = repair_missing(numbers[cells.targets].iloc[:rows], missing, source)
    notes += more
    future, more = repair_missing(numbers[wanted.future], missing, source, targets=False)
    notes += more
    return Table(
        times=stamps[:rows],
        values=values,
        columns=cells.targets,
        future=future,
        future_columns=wanted.future,
        future_times=stamps,
        repairs=notes,
        dates=cells.times.dates,
        ids=cells.ids,
        first_row=cells.first_row,
        static=cells.static.loc[cells.targets] if wanted.static else None,
        zone=cells.times.zone,
    )


# Columns and rows


class WantedColumns(NamedTuple):
    """Columns that were asked for by name."""

    time: str | None
    targets: list[str] | None
    future: list[str]
    static: list[str]

    @property
    def beside_time(self) -> list[str]:
        return [*(self.targets or ()), *self.future, *self.static]


def want_columns(
    time: str | None, targets: Sequence[str] | None, future: Sequence[str], static: Sequence[str]
) -> WantedColumns:
    """Columns without the spaces around their names, which those of a file lose, too; forecasters from before have them
    with these.

    Raises:
        UserError: A name that is there twice.
    """
    wanted = WantedColumns(
        time and time.strip(),
        None if targets is None else [name.strip() for name in targets],
        [name.strip() for name in future],
        [name.strip() for name in static],
    )
    if twice := find_twice([*(wanted.targets or ()), *wanted.future]):
        raise UserError(f"Columns are named twice as targets or future columns: {', '.join(twice)}. Name each once.")
    if twice := find_twice(wanted.static):
        raise UserError(f"Static columns are named twice: {', '.join(twice)}. Name each once.")
    return wanted


def find_twice(names: list[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


class Cells(NamedTuple):
    """A wide table before its cells are taken for numbers.

    Args:
        frame: The columns beside that of time.
        times: Of its rows.
        targets: Names of the columns to forecast.
        notes: What was done, a sentence each.
        first_row: Number of the first row, where rows are counted.
        row_names: What messages call the rows of a table that was a long one; None of others, whose rows have the
            numbers that they have in the file.
        ids, static: As `Table` has them, the static columns of all series.
    """

    frame: pd.DataFrame
    times: ParsedTimes
    targets: list[str]
    notes: list[str]
    first_row: int | None = None
    row_names: pd.Index | None = None
    ids: dict[str, Any] | None = None
    static: pd.DataFrame | None = None


def stamp_long(
    frame: pd.DataFrame,
    wanted: WantedColumns,
    source: str,
    dates: str,
    freq: str | None,
    start: str | None,
    leave_out_repeated: bool,
) -> Cells:
    """The wide table of a long one; options as `read_table` has them."""
    if wanted.time not in (None, TIME):
        raise UserError(
            f"{source} is a long table, with columns {', '.join(LONG)}, and {TIME} is its time column: leave out "
            f"--time-column {wanted.time}."
        )
    frame, times = parse_long_times(frame, source, dates, wanted.time is not None, untimed=freq is not None)
    long = widen(frame, wanted.future, source, wanted.static, leave_out_repeated)
    if freq:
        frame, first_row, stamps, notes = stamp_frame(long.frame, TIME, freq, start, source)
        row_names = stamps if first_row is None else number_rows(first_row, len(stamps))
        times = ParsedTimes(stamps)
    else:
        frame, first_row, notes = long.frame.drop(columns=TIME), None, times.notes
        row_names = pd.DatetimeIndex(long.frame[TIME])
        times = times._replace(times=row_names)
    targets = choose_targets(list(frame.columns), wanted, "series", TIME, source)
    return Cells(frame, times, targets, [*long.notes, *notes], first_row, row_names, long.ids, long.static)


def stamp_wide(
    frame: pd.DataFrame, wanted: WantedColumns, time: str | None, source: str, dates: str, refuse_long: bool
) -> Cells:
    """A wide table with a column of time stamps, the one that was asked for or else `time`, if it is known."""
    known = wanted.time or time
    time = choose_time_column(frame, known, source)
    frame, time, notes = join_time_of_day(frame, time, wanted.beside_time)
    if refuse_long:
        refuse_renamed_long(frame, time if known is not None or time.lower() in TIME_NAMES else None, source)
    refuse_static(wanted, source)
    cells = frame.drop(columns=time)
    targets = choose_targets(list(cells.columns), wanted, "column", time, source)
    try:
        times = parse_times(frame[time], source, dates, wanted.time is not None)
    except UserError as error:
        other = other_time_column(frame, time) if known is None else None
        raise UserError(f"{error} {other} holds dates: --time-column {other}." if other else error) from None
    return Cells(cells, times, targets, [*notes, *times.notes])


def number_wide(
    frame: pd.DataFrame, wanted: WantedColumns, time: str | None, source: str, freq: str, start: str | None
) -> Cells:
    """A wide table whose rows have no time stamps, and at most a column that counts them; arguments as of `stamp_wide`
    and `read_table`."""
    cells, first_row, stamps, notes = stamp_frame(frame, wanted.time or time, freq, start, source, wanted.beside_time)
    refuse_static(wanted, source)
    targets = choose_targets(list(cells.columns), wanted, "column", "date", source)
    return Cells(cells, ParsedTimes(stamps), targets, notes, first_row)


def refuse_static(wanted: WantedColumns, source: str) -> None:
    if wanted.static:
        raise UserError(
            f"Static columns describe the series of a long table, with columns {', '.join(LONG)}, and {source} is none."
        )


def choose_time_column(frame: pd.DataFrame, name: str | None, source: str) -> str:
    if frame.columns.empty:
        raise UserError(f"{source} has no columns but an index that counts the rows.")
    if name is None:
        return next((c for c in frame.columns if c.lower() in TIME_NAMES), frame.columns[0])
    refuse_unknown_column(name, list(frame.columns), source)
    return name


def other_time_column(frame: pd.DataFrame, time: str) -> str | None:
    """A column of dates, where the one that was taken for the time holds none, or not as the first."""
    if is_of_dates(frame[time].iloc[:1]):  # a column of dates, but for what is told
        return None
    return next((name for name in frame.columns if name != time and is_of_dates(frame[name])), None)


def choose_targets(names: list[str], wanted: WantedColumns, kind: str, time: str, source: str) -> list[str]:
    """The columns to forecast, of those beside the time column; a target is called a column or, of a long table, a
    series.

    Raises:
        UserError: There is none, or no column of a name that was asked for.
    """
    targets = wanted.targets
    if targets is None:
        targets = [name for name in names if name not in wanted.future]
    for name in targets:
        refuse_unknown_column(name, names, source, kind)
    for name in wanted.future:
        refuse_unknown_column(name, names, source)
    if not targets:
        raise UserError(f"{source} has no column to forecast beside {time}.")
    return targets


def refuse_unknown_column(name: str, names: Sequence[str], source: str, kind: str = "column") -> None:
    if name not in names:
        raise UserError(f"{source} has no {kind} {name}{did_you_mean(name, names)} (of {', '.join(names)})")


# Rows without time stamps


def stamp_frame(
    frame: pd.DataFrame, named: str | None, freq: str, start: str | None, source: str, wanted: Collection[str] = ()
) -> tuple[pd.DataFrame, int | None, pd.DatetimeIndex, list[str]]:
    """A table without time stamps: what is left of it without a column that counts the rows; the number of its first
    row if it has no start; time stamps for its rows; what was left out.

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
    return frame, None if start else first, stamp_rows(len(frame), freq, start), notes


def counted(column: pd.Series) -> np.ndarray | None:
    """The numbers of a column that counts the rows, one by one from any of them; None of another."""
    numbers = to_whole(column)
    return numbers if numbers is not None and (np.diff(numbers) == 1).all() else None


def number_rows(first: int, count: int) -> pd.RangeIndex:
    return pd.RangeIndex(first, first + count)


# Numbers, and repairs


def read_numbers(
    cells: Cells, wanted: WantedColumns, na_values: Sequence[float], source: str
) -> tuple[pd.DataFrame, list[str]]:
    """Targets and future columns as float64 by time stamp, NaN where a cell is empty or holds one of `na_values`."""
    frame, notes = rewrite(cells.frame[[*cells.targets, *wanted.future]], source)
    columns = {name: parse_numbers(frame[name], source, name in wanted.future, cells.row_names) for name in frame}
    numbers = pd.DataFrame(columns, index=cells.times.times)
    for value in na_values:
        found = numbers == value
        numbers = numbers.mask(found)
        notes.append(f"{int(found.sum().sum())} cells of {value:g} are taken as missing.")
    return numbers, notes


@contextmanager
def collect(faults: list[str]) -> Iterator[None]:
    """Keep what a check refuses, so that it is told together with what others do."""
    try:
        yield
    except UserError as error:
        faults.append(str(error))


def count_known_rows(targets: pd.DataFrame, source: str) -> int:
    """Rows up to the last that holds a value of a target: what comes after it is the time to forecast."""
    known = np.flatnonzero(targets.notna().any(axis=1).to_numpy())
    if not len(known):
        raise UserError(f"{source} has no row with a value of {', '.join(targets.columns[:3])}.")
    return int(known[-1]) + 1


def repair_missing(numbers: pd.DataFrame, how: str, source: str, targets: bool = True) -> tuple[np.ndarray, list[str]]:
    """Values in which missing ones were filled, or stay as NaN, and what was done.

    Args:
        numbers: Targets or future columns; the index is what messages call the rows.
        how: One of MISSING.
        source: What messages call the file.
        targets: They are targets.

    Raises:
        UserError: A column that holds nothing; missing values, where it was not said what to do.
    """
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
        remedy = how_to_fill(numbers[counts.index], option)
        raise UserError(f"Values of {source} are missing: {listed}; first at {row}. {remedy}.")
    count = int(counts.sum())
    if how == "mask":
        masked = "are masked, neither learned from nor scored" if targets else "of known columns stand at their mean"
        return numbers.to_numpy(dtype=np.float64), [f"{count} missing values {masked}: {listed}."]
    # by rows, not by time: rows are the model's steps
    if how == "interpolate":
        filled, verb = numbers.interpolate(limit_direction="both"), "interpolated"
    else:
        filled, verb = numbers.ffill().bfill(), "filled with the value before"
    return filled.to_numpy(dtype=np.float64), [f"{count} missing values were {verb}: {listed}."]


def how_to_fill(numbers: pd.DataFrame, option: str) -> str:
    """What to do about columns with missing values, of which each has some; `option` names columns such as these."""
    mostly = [name for name in numbers if 2 * numbers[name].isna().sum() > len(numbers)]
    for name in mostly:
        known = np.flatnonzero(numbers[name].notna())
        if 2 * len(known) < known[-1] + 1 - known[0]:  # between its first and its last value, too
            return f"Leave {name} out with {option}: most of it would be made up"
    if mostly:
        return f"Add --missing mask, to learn from what is there: {mostly[0]} begins late or ends early"
    masked = "learn from the others alone" if option == "--targets" else "have them at their mean"
    return (
        f"Add --missing interpolate or --missing previous to fill them, or --missing mask to {masked}, or choose "
        f"columns with {option}"
    )
