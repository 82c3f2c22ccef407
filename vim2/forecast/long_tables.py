"""Long tables, a row for each series and time step: as wide ones, and those that need other names to be read so."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ..command.errors import UserError, did_you_mean
from .cells import is_number, is_text, to_float64, to_whole
from .frames import is_of_dates
from .stamps import ParsedTimes, parse_times
from .text_files import SAMPLE, refuse_equal_names

__all__ = ["ID", "LONG", "TIME", "VALUE", "LongTable", "parse_long_times", "refuse_renamed_long", "widen"]

LONG = ID, TIME, VALUE = ("unique_id", "ds", "y")  # columns of a long table, as neuralforecast names them
# Words in the names of columns that hold a part of the time.
PARTS_OF_TIME = {"time", "hour", "hours", "hr", "h", "minute", "minutes", "min", "halfhour", "slot", "period"}
PARTS_OF_TIME |= {"interval", "day", "weekday", "dow", "week", "month", "quarter", "season", "shift", "year"}


# As a wide table


def parse_long_times(
    frame: pd.DataFrame, source: str, dates: str, named: bool, untimed: bool
) -> tuple[pd.DataFrame, ParsedTimes | None]:
    """A long table whose time column can be put in order, as it holds time stamps, and how they were read; or, of one
    without time stamps, as it holds numbers, or text if there are others.

    Raises:
        UserError: As `parse_times`.
    """
    time = frame[TIME]
    if untimed:
        numbers = to_float64(time)
        others = np.isnan(numbers) & time.notna().to_numpy()
        return frame.assign(**{TIME: time.astype(str) if others.any() else numbers}), None
    # each time is read once, whatever the number of series
    parsed = parse_times(time.drop_duplicates(), source, dates, named, ordered=False)
    return frame.assign(**{TIME: parsed.times[pd.factorize(time)[0]]}), parsed


class LongTable(NamedTuple):
    """What a long table was read as.

    Args:
        frame: Column `TIME` in order, then a column for each series, then the future ones.
        ids: The series' ids by the name of their column.
        static: The static columns, a row for each series, by the same names.
        notes: What was left out, a sentence each.
    """

    frame: pd.DataFrame
    ids: dict[str, Any]
    static: pd.DataFrame
    notes: list[str]


def widen(
    frame: pd.DataFrame, future: Sequence[str], source: str, static: Sequence[str] = (), repeated: bool = False
) -> LongTable:
    """A long table as a wide one.

    Args:
        frame: With the columns LONG, in any order of rows; ds as `parse_long_times` has it.
        future: Further columns that are known beforehand, the same for all series.
        source: What messages call it.
        static: Further columns that describe a series, whatever the time.
        repeated: Of rows of one series at one time, the first is taken, where these are no more than half.

    Raises:
        UserError: A row without id or time, two rows of one series at one time, ids that are no names of
            columns, future columns that differ between series, static ones that differ within one or are missing.
    """
    for column in (ID, TIME):
        if frame[column].isna().any():
            row = int(np.flatnonzero(frame[column].isna())[0])
            raise UserError(f"{source}, row {row + 1} has no {column}: fill it in, or leave the row out.")
    frame, notes = leave_out_repeated(frame, source, repeated)
    series, ids = pd.factorize(frame[ID])  # of each row the number of its series, and of its time stamp
    rows, stamps = pd.factorize(frame[TIME], sort=True)
    names = series_names(ids, source)
    refuse_equal_names([TIME, *names, *future], source)
    cells = spread(frame[VALUE], rows, series, (len(stamps), len(names)))
    columns = {TIME: stamps, **{name: cells[:, i] for i, name in enumerate(names)}}
    for column in future:
        if column in frame:  # told where wide tables lack one
            columns[column] = share(frame[column], rows, stamps, source)
    described = pd.DataFrame(index=names)
    for column in static:
        described[column] = describe_series(frame, column, series, names, source)
    left = [column for column in frame.columns if column not in (*LONG, *future, *static)]
    notes += [f"Columns beside {', '.join(LONG)} were left out: {', '.join(left)}."] if left else []
    return LongTable(pd.DataFrame(columns), dict(zip(names, ids, strict=True)), described, notes)


def leave_out_repeated(frame: pd.DataFrame, source: str, repeated: bool) -> tuple[pd.DataFrame, list[str]]:
    """The first row of each series at each time stamp."""
    twice = frame.duplicated([ID, TIME])
    if not twice.any():
        return frame, []
    first, count = frame[twice].iloc[0], int(twice.sum())
    if not repeated or 2 * count > len(frame):
        remedy = "" if repeated else ", or add --times regular to keep the first of each"
        raise UserError(
            f"{source} has two rows of series {first[ID]} at {first[TIME]} ({count} such rows): leave one out, "
            f"or add their values{remedy}."
        )
    notes = [f"{count} rows of a series whose time stamp it had already were left out."]
    return frame[~twice].reset_index(drop=True), notes


def series_names(ids: Sequence[Any], source: str) -> list[str]:
    names = [str(i).strip() for i in ids]
    if len(names) > len(set(names)):
        refused = next(name for i, name in enumerate(names) if name in names[:i])
        raise UserError(
            f"{source} has two series that are both called {refused}, as a number and as text, or with spaces around "
            "it: rename one."
        )
    return names


def spread(values: pd.Series, rows: np.ndarray, series: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Values at their rows and series, float64, or objects if they are no numbers; NaN where there is none."""
    is_numeric = pd.api.types.is_any_real_numeric_dtype(values)
    kind = dict(dtype=np.float64, na_value=np.nan) if is_numeric else dict(dtype=object)
    cells = np.full(shape, np.nan, dtype=kind["dtype"])
    cells[rows, series] = values.to_numpy(**kind)
    return cells


def share(column: pd.Series, rows: np.ndarray, stamps: pd.Index, source: str) -> pd.Series:
    """A future column's value at each time stamp, which all series share."""
    known = pd.DataFrame({"value": column, "row": rows}).dropna().drop_duplicates()
    if (differs := known["row"].duplicated()).any():
        at = stamps[known["row"][differs].iloc[0]]
        raise UserError(
            f"Column {column.name} of {source} differs between series at {at}: what is known beforehand is shared by "
            "all."
        )
    return known.set_index("row")["value"].reindex(range(len(stamps)))


def describe_series(
    frame: pd.DataFrame, column: str, series: np.ndarray, names: Sequence[str], source: str
) -> np.ndarray:
    """A static column's value of each series."""
    if column not in frame:
        raise UserError(f"{source} has no column {column}{did_you_mean(column, frame.columns)}")
    kinds = frame.groupby(series)[column].nunique()
    if (kinds != 1).any():
        at, what = names[int(np.argmax(kinds != 1))], "holds nothing" if kinds.min() == 0 else "changes"
        raise UserError(
            f"Column {column} of {source} {what} for series {at}: a static column says one thing of each series."
        )
    return frame.groupby(series)[column].first().to_numpy()


# Long tables whose columns have other names


def refuse_renamed_long(frame: pd.DataFrame, time: str | None, source: str) -> None:
    """Raise for a long table whose columns have other names than LONG: with a column of dates, most of which are there
    more than once, and a column of text or whole numbers which tells the rows of one date apart.

    Args:
        frame: As read.
        time: Its column of time stamps, if that is known.
        source: What messages call it.
    """
    ids, stamps = find_long_columns(frame, time)
    others = [c for c in frame if c not in (*ids, stamps)]
    values = [c for c in others if pd.api.types.is_numeric_dtype(frame[c])] or others
    if not ids or not values:
        return
    how = how_to_rename(ids, stamps, values, source)
    if may_be_time(frame[ids[0]]):
        raise UserError(
            f"Rows of {source} share the time stamps of {stamps}, and {ids[0]} tells them apart. If it is a part of "
            f"the time, write it into {stamps}, as in 2024-01-31 13:00. If it names series, one below the other: {how}."
        )
    raise UserError(
        f"{source} looks like a long table, a row for each series and time step: {' and '.join(ids)} "
        f"{'tells' if len(ids) == 1 else 'tell'} series apart, and {stamps} holds the same time stamps for each. It is "
        f"read as one if its columns are called {', '.join(LONG)}: {how}."
    )


def find_long_columns(frame: pd.DataFrame, time: str | None) -> tuple[list[str], str | None]:
    """The columns that tell series apart, none if it is no long table, and the column of time stamps."""
    for stamps in [time] if time in frame else filter(lambda c: is_of_dates(frame[c]), frame):
        counts = frame[stamps].value_counts()
        if 0 < 2 * len(counts) <= len(frame):
            return find_ids(frame, stamps, counts.max()), stamps
    return [], None


def find_ids(frame: pd.DataFrame, time: str, most: int) -> list[str]:
    """The column that tells apart the rows of each time stamp, of which there are at most as many as `most`, or two of
    text that do together."""
    others = [c for c in frame if c != time]
    for column in others:
        if tells_series_apart(frame, column, time, most):
            return [column]
    words = [c for c in others if is_name(frame[c]) and not may_be_time(frame[c])]
    pairs = ([a, b] for i, a in enumerate(words) for b in words[i + 1 :])
    return next((pair for pair in pairs if not frame.duplicated([*pair, time]).any()), [])


def tells_series_apart(frame: pd.DataFrame, column: str, time: str, most: int) -> bool:
    """Whether a column tells apart the rows of each time stamp, of which there are as many as `most`."""
    cells = frame[column]
    is_numeric = pd.api.types.is_any_real_numeric_dtype(cells)
    if not (is_name(cells) or (is_numeric and to_whole(cells) is not None)):
        return False
    kinds = cells.nunique()
    fits = kinds == most if is_numeric else most <= kinds <= len(frame) // 2
    return fits and kinds > 1 and not frame.duplicated([column, time]).any()


def is_name(cells: pd.Series) -> bool:
    """Whether cells are text, and no numbers."""
    if isinstance(cells.dtype, pd.CategoricalDtype):
        return True
    return is_text(cells) and not any(isinstance(cell, str) and is_number(cell) for cell in cells.iloc[:SAMPLE])


def may_be_time(column: pd.Series) -> bool:
    """Whether a column may hold a part of the time, such as the hour, by its name or as it counts from 0 or 1."""
    if PARTS_OF_TIME & set(re.findall(r"[a-z]+", str(column.name).lower())):
        return True
    found = [re.fullmatch(r"[^\d-]{0,2}(\d{1,4})(\.0)?", str(cell)) for cell in column.unique()]
    if len(found) < 4 or not all(found):
        return False
    numbers = sorted(int(match[1]) for match in found)
    return numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def how_to_rename(ids: Sequence[str], stamps: str, values: Sequence[str], source: str) -> str:
    """What makes the columns of a table those of a long one, "rename shop to unique_id, ..."."""
    value = VALUE if VALUE in values else values[0]
    pairs = [(stamps, TIME), (value, VALUE)] if len(ids) > 1 else zip((ids[0], stamps, value), LONG, strict=True)
    renamed = {old: new for old, new in pairs if old != new}
    steps = [] if len(ids) == 1 else [f"join {' and '.join(ids)} into one column {ID}"]
    if renamed:
        steps.append("rename " + ", ".join(f"{old} to {new}" for old, new in renamed.items()))
    how = ", and ".join(steps)
    if len(values) > 1 and value in renamed:
        how += f", or another column than {value} if that is to be forecast"
    if renamed:
        how += f", with .rename(columns={renamed})" if source == "DataFrame" else ", in its first row"
    return how
