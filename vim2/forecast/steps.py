"""Steps: how far apart rows are, after how many of them a season repeats, and the table that has no gap."""

import re
import warnings
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..command.errors import UserError, first_line

__all__ = [
    "TIMES",
    "find_step",
    "follow",
    "irregular_steps",
    "is_whole_days",
    "repair_times",
    "season_length",
    "seasonal",
    "stamp_rows",
    "to_offset",
    "to_step",
    "usual_gap",
    "usual_step",
]

TIMES = ("error", "regular", "keep")
ZERO, DAY = pd.Timedelta(0), pd.Timedelta(days=1)
MONTHS_FROM = 27 * DAY  # steps that are longer may be of months, which have 28 days or more
SEASONS = {"h": 24, "min": 1440, "s": 86400, "D": 7, "B": 5, "W": 52}
SEASONS |= {"MS": 12, "ME": 12, "BMS": 12, "BME": 12, "QS": 4, "QE": 4, "BQS": 4, "BQE": 4}
# What pandas called steps before 2.2, and calls them now.
OLD_STEPS = {"H": ["h"], "T": ["min"], "S": ["s"], "L": ["ms"], "BM": ["BMS", "BME"], "M": ["MS", "ME"]}
OLD_STEPS |= {"Q": ["QS", "QE"], "A": ["YS", "YE"], "Y": ["YS", "YE"]}


def to_offset(name: str) -> pd.offsets.BaseOffset:
    """The step of a name that pandas gives one: of LWOM-FRI, too, the last Fridays of months, which pandas 2 does not
    read.

    Raises:
        ValueError: It is the name of none.
    """
    last = re.fullmatch("LWOM-(.*)", name)
    step = pd.tseries.frequencies.to_offset(f"W-{last[1]}" if last else name)
    return pd.offsets.LastWeekOfMonth(weekday=step.weekday) if last else step


def to_step(gap: pd.Timedelta) -> pd.offsets.BaseOffset:
    """Whole days as days, for which pandas 3 would say 24 hours and pandas 2 did not."""
    return pd.offsets.Day(gap.days) if is_whole_days(gap) else pd.tseries.frequencies.to_offset(gap)


def is_whole_days(gap: pd.Timedelta) -> bool:
    return gap % DAY == ZERO


def in_words(gap: pd.Timedelta) -> str:
    """A time as people say it, "1 day" or "1 hour 30 minutes"."""
    parts = ((unit, count) for unit, count in gap.components._asdict().items() if count)
    return " ".join(f"{count} {unit if count > 1 else unit.removesuffix('s')}" for unit, count in parts)


# The step of rows


def find_step(times: pd.DatetimeIndex) -> pd.offsets.BaseOffset | None:
    """The step from each time stamp to the next, None where it is not the same, not forward, or there is but one."""
    if len(times) < 2 or not times.is_monotonic_increasing:
        return None
    gaps = times[1:] - times[:-1]
    if (gaps == gaps[0]).all() and gaps[0] > ZERO:
        return to_step(gaps[0])
    with warnings.catch_warnings():  # of pandas 4's other type of the result, which to_offset takes as well
        warnings.simplefilter("ignore")
        frequency = pd.infer_freq(times) if len(times) > 2 else None  # months, business days
    step = pd.tseries.frequencies.to_offset(frequency)
    # pandas does not look at the time of the day, and takes the last Friday of each month, which may be the fifth, for
    # the fourth
    last = [pd.offsets.LastWeekOfMonth(weekday=step.weekday)] if isinstance(step, pd.offsets.WeekOfMonth) else []
    return next((s for s in (step, *last) if s is not None and follow(times, s)), None)


def follow(times: pd.DatetimeIndex, step: pd.offsets.BaseOffset) -> bool:
    """Whether each time stamp is the one before and a step."""
    return bool((times[1:] == followers(times, step)).all())


def followers(times: pd.DatetimeIndex, step: pd.offsets.BaseOffset) -> pd.DatetimeIndex:
    """What comes a step after each time stamp but the last."""
    with warnings.catch_warnings():  # of steps that pandas adds one by one
        warnings.simplefilter("ignore")
        return times[:-1] + step


def usual_gap(times: pd.DatetimeIndex) -> pd.Timedelta | None:
    """The most frequent time from a row to a later one that follows; None if there are none."""
    gaps = pd.Series(times[1:] - times[:-1])
    gaps = gaps[gaps > ZERO]
    return None if gaps.empty else gaps.mode().iloc[0]


def usual_step(times: pd.DatetimeIndex) -> pd.offsets.BaseOffset | pd.Timedelta | None:
    """The `usual_gap`, in months where rows lie on one day of these."""
    gap = usual_gap(times)
    if gap is not None and gap > MONTHS_FROM and on_one_day(times):
        return pd.DateOffset(months=count_months(times.unique().sort_values())[1])
    return gap


def irregular_steps(times: pd.DatetimeIndex) -> int:
    """How many steps are not the usual one; none where the rows are regular, oldest or newest first."""
    if len(times) < 3 or find_step(times) is not None or find_step(times[::-1]) is not None:
        return 0
    steps = [pd.Series(times[1:] - times[:-1])]
    if on_one_day(times):
        steps.append(pd.Series(np.diff(count_months(times)[0])))
    return min(len(s) - int(s.value_counts().iloc[0]) for s in steps)


def count_months(times: pd.DatetimeIndex) -> tuple[np.ndarray, int]:
    """Months since the year 0, and how many there usually are from one time stamp to the next."""
    months = (12 * times.year + times.month).to_numpy()
    return months, int(pd.Series(np.diff(months)).mode().iloc[0])


def on_one_day(times: pd.DatetimeIndex) -> bool:
    """Whether all time stamps are of one day of the month, or of its last day, at one time of the day."""
    return (times.is_month_end.all() or times.day.nunique() == 1) and at_one_time_of_day(times)


def at_one_time_of_day(times: pd.DatetimeIndex) -> bool:
    return (times - times.normalize()).nunique() == 1


# Seasons


def season_length(step: pd.offsets.BaseOffset | None) -> int:
    """Steps after which a season repeats: a day of shorter steps, a week of days, a year of a week and longer steps;
    else 1."""
    if isinstance(step, pd.offsets.Day) and step.n >= 7:
        return max(round(365 / step.n), 1)
    return 1 if step is None else max(SEASONS.get(step_name(step), 1) // step.n, 1)


def seasonal(step: pd.offsets.BaseOffset | None) -> bool:
    """Whether `season_length` knows steps of this kind."""
    return step is not None and step_name(step) in SEASONS


def step_name(step: pd.offsets.BaseOffset) -> str:
    """pandas' name of a step, without a count and what it is anchored to."""
    return step.freqstr.split("-")[0].lstrip("0123456789")


# Rows without time stamps


def stamp_rows(rows: int, freq: str, start: str | None) -> pd.DatetimeIndex:
    """Time stamps of rows that have none.

    Args:
        rows: How many.
        freq: pandas' name of their step, such as "h", "15min" or "MS".
        start: The first's; by default one that stands for none.

    Raises:
        UserError: A step or start that is none, or that do not fit together; more rows than there is time.
    """
    step = parse_freq(freq)
    try:
        first = pd.Timestamp(start or 0)
        stamps = pd.date_range(first, periods=rows, freq=step)
    except (ValueError, OverflowError, pd.errors.OutOfBoundsDatetime) as error:
        what = f"--freq {freq}" + (f" with --start {start}" if start else "")
        raise UserError(
            f"{what} makes no time stamps for {rows} rows ({first_line(error)}): give a step such as h, 15min, D, W or "
            "MS, and a start such as 2024-01-31."
        ) from None
    if start and first.tz is not None:
        raise UserError(f"--start {start} has a UTC offset: give it without, or write time stamps into the file.")
    if start and stamps[0] != first:
        raise UserError(f"--start {start} does not lie on a step of {freq}: give another, such as {stamps[0]}.")
    return stamps


def parse_freq(freq: str) -> pd.offsets.BaseOffset:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # by which pandas 2 tells old names
            step = to_offset(freq)
    except (ValueError, FutureWarning):
        count, name = re.fullmatch(r"(\d*)(.*)", freq, re.DOTALL).groups()
        now = " or ".join(count + each for each in OLD_STEPS.get(name, ()))
        meant = f"; did you mean {now}?" if now else ""
        raise UserError(
            f"--freq {freq} is no step that pandas knows{meant}: give one such as h, 15min, D, W or MS."
        ) from None
    if step.n < 1:
        raise UserError(f"--freq {freq} does not go forward: give a step such as h, 15min, D, W or MS.")
    return step


# The table without gaps


def repair_times(numbers: pd.DataFrame, how: str, source: str) -> tuple[pd.DataFrame, list[str]]:
    """Rows that are a constant step apart, or as they are.

    Args:
        numbers: By time stamp.
        how: One of TIMES.
        source: What messages call the file.

    Raises:
        UserError: Irregular rows, where it was not said what to do, or would be mostly left out or made up.
    """
    times = numbers.index
    if how == "keep" or len(times) < 2 or find_step(times) is not None:
        return numbers, []
    distinct = times.unique().sort_values()
    if len(distinct) == 1:
        raise UserError(f"All time stamps of {source} are {times[0]}: they must tell the rows apart.")
    grid = find_grid(distinct)
    if follow(times, grid.step):  # a step for which pandas has no name
        return numbers, []
    fault = why_no_grid(times, distinct, grid)
    if how == "error" or fault:
        refuse_irregular(times, grid, fault, source)
    return fill_grid(numbers, distinct, grid)


class Grid(NamedTuple):
    """The time stamps that a table without gaps would have, from the first to the last.

    Args:
        step: From one to the next.
        rows: How many there are.
        shown: What messages call the step.
    """

    step: pd.offsets.BaseOffset
    rows: int
    shown: str


def find_grid(times: pd.DatetimeIndex) -> Grid:
    """The grid on which time stamps lie that are in order, each there once, most of them the usual step apart."""
    usual = usual_gap(times)
    if (step := find_step(times)) is not None:
        rows = len(times)
    elif usual > MONTHS_FROM and (kind := find_day_of_month(times)) is not None:
        months, count = count_months(times)
        step, rows = count * kind, int(months[-1] - months[0]) // count + 1
    elif usual == DAY and times[-1] - times[0] > 7 * DAY and (times.day_of_week < 5).all():
        step, rows = pd.offsets.BusinessDay(), int(np.busday_count(times[0].date(), times[-1].date())) + 1
    else:
        step, rows = to_step(usual), int((times[-1] - times[0]) // usual) + 1
    is_even = isinstance(step, pd.offsets.Tick | pd.offsets.Day)
    return Grid(step, rows, in_words(usual) if is_even else step.freqstr)


def find_day_of_month(times: pd.DatetimeIndex) -> pd.offsets.BaseOffset | None:
    """The day of the month, such as the first, the last business day or the second Friday, that all time stamps are of,
    at one time of the day; None if there is no such day."""
    if not at_one_time_of_day(times):
        return None
    o, first = pd.offsets, times[0]
    nth = o.WeekOfMonth(week=min((first.day - 1) // 7, 3), weekday=first.weekday())
    last = o.LastWeekOfMonth(weekday=first.weekday())
    kinds = (o.MonthBegin(), o.MonthEnd(), o.BMonthBegin(), o.BMonthEnd(), last, nth)
    return next((kind for kind in kinds if all(map(kind.is_on_offset, times))), None)


def why_no_grid(times: pd.DatetimeIndex, distinct: pd.DatetimeIndex, grid: Grid) -> str | None:
    """Why --times regular would make nothing of the rows that can be meant, and what to do; None if it would."""
    twice, missing = len(times) - len(distinct), grid.rows - len(distinct)
    if 2 * twice > len(times):
        return (
            f"{twice} of {len(times)} rows have the time stamp of another: is the time of day in another column, or "
            "does the file hold several series, one below the other? Give each a column"
        )
    if 2 * missing > len(distinct):
        return (
            f"A table without gaps would have {grid.rows} rows, most of them made up: are the dates read rightly, the "
            f"first as {', '.join(str(t) for t in times[:3])}? If not, say how with --dates, or write them as "
            "2024-01-31; if they are, add --times keep to take every row as one step"
        )
    strays = distinct.difference(grid_stamps(distinct, grid))
    if len(strays):
        return (
            f"{len(strays)}, such as {strays[0]}, do not lie whole steps of {grid.shown} after {distinct[0]}: resample "
            "the file, or add --times keep to take every row as one step"
        )
    return None


def grid_stamps(distinct: pd.DatetimeIndex, grid: Grid) -> pd.DatetimeIndex:
    return pd.date_range(distinct[0], distinct[-1], freq=grid.step)


def refuse_irregular(times: pd.DatetimeIndex, grid: Grid, remedy: str | None, source: str) -> None:
    follows = followers(times, grid.step)
    twice, back = len(times) - times.nunique(), count_back(times)
    wrong = int(np.flatnonzero(times[1:] != follows)[0])
    remedy = remedy or (
        "Add --times regular to sort, keep the first of equal ones and add the missing rows, or --times keep to "
        "take every row as one step"
    )
    raise UserError(
        f"Time stamps of {source} are not all {grid.shown} apart: {twice} are there twice, "
        f"{back} go back, {int((times[1:] > follows).sum())} come after a gap; first, row {wrong + 2} "
        f"({times[wrong + 1]}) follows {times[wrong]}. {remedy}."
    )


def count_back(times: pd.DatetimeIndex) -> int:
    """How many time stamps are earlier than the one before."""
    return int((times[1:] < times[:-1]).sum())


def fill_grid(numbers: pd.DataFrame, distinct: pd.DatetimeIndex, grid: Grid) -> tuple[pd.DataFrame, list[str]]:
    """The first row of each time stamp in order, and empty ones where a time stamp of the grid is missing."""
    notes = []
    if back := count_back(numbers.index):
        numbers = numbers.sort_index(kind="stable")
        notes.append(f"Rows were sorted by time: {back} went back.")
    if twice := len(numbers) - len(distinct):
        numbers = numbers[~numbers.index.duplicated()]
        notes.append(f"{twice} rows whose time stamp was there already were left out.")
    if missing := grid.rows - len(distinct):
        numbers = numbers.reindex(grid_stamps(distinct, grid))
        notes.append(f"{missing} missing rows were added, {grid.shown} apart.")
    return numbers, notes
