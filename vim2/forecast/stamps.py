"""Time stamps: orders of day and month, UTC offsets, the step from row to row, and the table that has no gap."""

import calendar
import datetime
import re
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..command.errors import UserError, first_line
from .cells import is_number, is_text

__all__ = [
    "DATES",
    "TIME_NAMES",
    "ParsedTimes",
    "find_step",
    "follow",
    "holds_stamps",
    "is_date",
    "join_time_of_day",
    "number_cells",
    "parse_times",
    "repair_times",
    "stamp_rows",
    "to_offset",
    "to_step",
    "usual_gap",
    "usual_step",
    "years_or_months",
]

TIMES = ("error", "regular", "keep")
ORDERS = {"day-first": "DMY", "month-first": "MDY", "year-first": "YMD"}
DATES = ("detect", *ORDERS)
TIME_NAMES = ("date", "datetime", "time", "timestamp", "ds")
WORDS = {"D": "day", "M": "month", "Y": "year"}
# What pandas called steps before 2.2, and calls them now.
OLD_STEPS = {"H": ["h"], "T": ["min"], "S": ["s"], "L": ["ms"], "BM": ["BMS", "BME"], "M": ["MS", "ME"]}
OLD_STEPS |= {"Q": ["QS", "QE"], "A": ["YS", "YE"], "Y": ["YS", "YE"]}
DATE = re.compile(
    r"\s*(?:[A-Za-z]{2,9}[.,]?\s+)?"  # a weekday
    r"(?P<time>\d{1,2}:\d{2}(?::\d{2})?\s+)?"
    r"(?P<first>\d{1,4})(?P<sign>[/.-])(?P<second>\d{1,2})(?P=sign)(?P<third>\d{1,4})(?!\d)(?P<rest>.*)",
    re.DOTALL,
)
# 31-Jan-24, and Jan-24, which is no day of an unknown year
NAMED = re.compile(r"\s*(?:(\d{1,2})[-/ .]+([A-Za-z]{3,9})[-/ .]+(\d{2})(?!\d)(.*)|([A-Za-z]{3,9})[-/ .']+(\d{2})\s*)")
OFFSET = re.compile(
    r"((?::\d{2}|T\d{2,6})(?:[.,]\d+)?(?:\s*[AaPp][Mm])?)"
    r"\s*(Z|UTC|GMT|(?:UTC|GMT)?\s*([+-])(\d{1,2}):?(\d{2})?)\s*(?:\(.*\)\s*)?$"
)
ZONE_NAME = re.compile(r":\d{2}(?:[.,]\d+)?\s*(?![AP]M)[A-Z]{2,}")  # 13:00 CET, but not 13:00 Jan 5
TIME_OF_DAY = re.compile(r"\s*\d{1,2}([:.])\d{2}(\1\d{2})?\s*")  # 18:00 or 18.00.00
COMPACT = re.compile(r"(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])")  # 20240131
# Spans that stand for their first day: 2024-W05 and 2024-W05-3 (of ISO 8601), 2024M01 or 2024M1 of statistics offices,
# Q1 2024 and 2024-Q1.
WEEK = re.compile(r"(\d{4})[ -]?[Ww](\d{1,2})(?:-?([1-7]))?")
MONTH = re.compile(r"(\d{4})[ -]?[Mm](\d{1,2})")
QUARTER = re.compile(r"[Qq](?P<quarter>[1-4])[ /-]?(?P<year>\d{4})|(?P<first>\d{4})[ :/-]?[Qq](?P<then>[1-4])")
SPANS = ("year", "years", "yr", "month", "months", "yyyymm")  # words in the names of columns that surely hold these
YEARS = (*SPANS, "date", "ds", "time", "period")  # and in those of columns that may hold years
ZERO = pd.Timedelta(0)


def holds_stamps(column: pd.Series) -> bool:
    """Whether a column's type is one of time stamps, with a time zone or without, Arrow's among them."""
    return column.dtype.kind == "M"


def is_date(text: str) -> bool:
    """Whether a cell is a date, in any way of writing it, and no other number."""
    if COMPACT.fullmatch(text.strip()) or any(span.fullmatch(text.strip()) for span in (WEEK, MONTH, QUARTER)):
        return True
    if is_number(text) or not any(c.isdigit() for c in text):
        return False
    match = DATE.fullmatch(text)
    return bool(match and 4 in (len(match["first"]), len(match["third"]))) or to_stamps([text])[0] is not pd.NaT


def to_stamps(cells: list[str]) -> pd.DatetimeIndex:
    """Time stamps without offset, NaT for what is none; a cell without a year is none, which pandas would say is of
    today, and one with a zone's name, which pandas 2 leaves out."""
    cells = [with_century(cell) for cell in cells]
    try:
        with warnings.catch_warnings():  # of quarters, which pandas 4 will not read
            warnings.simplefilter("ignore")
            stamps = pd.DatetimeIndex(pd.to_datetime(cells, errors="coerce", format="mixed"))
    except ValueError:  # offsets of a kind that is not known here
        stamps = pd.DatetimeIndex([pd.NaT] * len(cells))
    dated = [bool(re.search(r"\d{4}", cell)) and not ZONE_NAME.search(cell) for cell in cells]
    return stamps.where(np.array(dated) & (stamps.tz is None))


def with_century(cell: str) -> str:
    """A date with the month's name and a year of two digits, with four."""
    match = NAMED.fullmatch(cell) if not re.search(r"\d{4}", cell) else None
    if match is None:
        return cell
    day, month, year, rest = match.group(1, 2, 3, 4) if match[1] else ("1", match[5], match[6], "")
    return f"{day} {month} {full_year(year)}{rest}"


def full_year(year: str) -> int:
    """Of two digits, as POSIX has it: 1969 to 2068."""
    return int(year) + (0 if len(year) > 2 else 1900 if int(year) > 68 else 2000)


def join_time_of_day(frame: pd.DataFrame, time: str, wanted: Sequence[str]) -> tuple[pd.DataFrame, str, list[str]]:
    """Columns date and time as one, where one has days and the other the times of day.

    Args:
        frame: As read.
        time: Its time column.
        wanted: Columns that were asked for, which stay.

    Returns:
        The frame, its time column, and a note if two became one.
    """
    names = {name.lower(): name for name in frame.columns if name not in wanted}
    date, hours = (time, names.get("time")) if time.lower() != "time" else (names.get("date"), time)
    if date is None or hours is None:
        return frame, time, []
    days, clock = (written(frame[name]) for name in (date, hours))
    if not all(isinstance(cell, str) and TIME_OF_DAY.fullmatch(cell) for cell in clock):
        return frame, time, []
    if not all(isinstance(cell, str) and not re.search(r"\d\s*[:T]", cell) for cell in days):
        return frame, time, []
    joined = days + " " + clock.str.strip().str.replace(".", ":")
    frame = frame.assign(**{date: joined}).drop(columns=hours)
    return frame, date, [f"Columns {date} and {hours} were read together as the time stamps."]


def written(column: pd.Series) -> pd.Series | list[None]:
    """A column of dates or times of day as text, such as spreadsheets are read to; of others, one cell that is none."""
    if holds_stamps(column) and column.dt.tz is None and (column == column.dt.normalize()).all():
        return column.dt.strftime("%Y-%m-%d").astype(object)
    if not is_text(column):
        return [None]
    parts = (datetime.date, datetime.time)
    return column.astype(object).map(lambda cell: str(cell) if type(cell) in parts else cell)


class ParsedTimes(NamedTuple):
    """What a column of time stamps was read as.

    Args:
        times: Without a time zone, or in UTC.
        dates: The order that dates were read in, of DATES; "detect" where there was no choice.
        notes: What was done, a sentence each.
        zone: Time zone of a DataFrame's time stamps, which are in UTC here, or the time on the clock without it.
    """

    times: pd.DatetimeIndex
    dates: str = "detect"
    notes: Sequence[str] = ()
    zone: datetime.tzinfo | None = None


def parse_times(
    column: pd.Series, name: str, dates: str = "detect", named: bool = False, ordered: bool = True
) -> ParsedTimes:
    """Time stamps of a column, those with an offset in UTC.

    Where dates can be read in several orders, that is taken in which they are a constant step apart; likewise the time
    on the clock rather than in UTC, if rows go by that, as days at midnight do.

    Args:
        column: Dates as text or as pandas has them; its index numbers the rows, as messages tell them.
        name: What messages call the file.
        dates: One of DATES.
        named: The column was named as that of the time stamps.
        ordered: Its order may tell that numbers are years or months, as these only rise or fall.

    Raises:
        UserError: Cells that are no time stamps, or may be several.
    """
    called = f"The time column {column.name} of {name}"
    if isinstance(column.dtype, pd.PeriodDtype):
        column = column.dt.to_timestamp()
    refuse_missing(column.isna().to_numpy(), column, called)
    if holds_stamps(column):
        local = pd.DatetimeIndex(column)
        if local.tz is None:
            return ParsedTimes(local)
        stamps, notes = choose_clock(local.tz_convert("UTC"), local.tz_localize(None))
        return ParsedTimes(stamps, notes=notes, zone=local.tz)
    texts = number_cells(column)
    if all(COMPACT.fullmatch(cell) for cell in texts):
        stamps = pd.DatetimeIndex(pd.to_datetime(texts, format="%Y%m%d", errors="coerce"))
        refuse_missing(stamps.isna(), column, called)
        return ParsedTimes(stamps)
    if (spans := first_days(texts)) is not None:
        refuse_missing(spans.isna(), column, called)
        return ParsedTimes(spans, notes=[f"Of spans of time such as {texts[0]}, the first day is the time stamp."])
    if (spans := years_or_months(texts, column.name, named, ordered)) is not None:
        of = "years" if len(texts[0]) == 4 else "months"
        return ParsedTimes(spans, notes=[f"Column {column.name} holds {of}, such as {texts[0]}."])
    if pd.api.types.is_numeric_dtype(column) or pd.to_numeric(column, errors="coerce").notna().all():
        spans = years_or_months(texts, column.name, True, ordered) is not None
        years = f"if they are years or months, say so with --time-column {column.name}; " if spans else ""
        raise UserError(
            f"{called} holds numbers, such as {column.iloc[0]}: {years}give dates such as 2024-01-31 13:00:00, name "
            "another column with --time-column, or say with --freq how far apart rows without time stamps are."
        )
    with suppress(ValueError), warnings.catch_warnings():  # mixed offsets, which pandas 2 warns of
        warnings.simplefilter("ignore", FutureWarning)
        iso = pd.DatetimeIndex(pd.to_datetime(column, format="ISO8601", errors="coerce"))
        if iso.tz is None and not iso.hasnans:
            return ParsedTimes(iso)
    cells = [str(cell) for cell in column]
    if all(":" in cell and TIME_OF_DAY.fullmatch(cell) for cell in cells):
        raise UserError(f"{called} holds times without dates, such as {cells[0]}: give dates such as 2024-01-31 13:00.")
    marks = [OFFSET.search(cell) for cell in cells]
    if any(marks) and not all(marks):
        row = next(i for i, mark in enumerate(marks) if mark is None)
        raise UserError(
            f"{called}, row {column.index[row] + 1}: {cells[row]!r} has no UTC offset, as others have: give all or "
            "none."
        )
    offsets = None
    if marks and marks[0]:
        cells = [cell[: mark.end(1)] for cell, mark in zip(cells, marks, strict=True)]
        offsets = pd.to_timedelta([minutes(*mark.group(3, 4, 5)) for mark in marks], unit="min")
    matches = [DATE.fullmatch(cell) for cell in cells]
    clocks = {
        order: to_stamps([rewritten(cell, match, order) for cell, match in zip(cells, matches, strict=True)])
        for order in find_orders([m for m in matches if m], dates)
    }
    readings = {}
    for order, clock in clocks.items():
        if not clock.isna().any():
            utc = None if offsets is None else (clock - offsets).tz_localize("UTC")
            readings[order] = (clock, []) if utc is None else choose_clock(utc, clock)
    if readings:
        return choose_order(readings, called, column)
    refuse_missing(np.all([clock.isna() for clock in clocks.values()], axis=0), column, called)
    raise UserError(
        f"{called} has days before months in some rows and after them in others: give dates such as 2024-01-31."
    )


def number_cells(column: pd.Series) -> list[str]:
    """Cells as text, whole numbers without the zero that a column of floats writes behind them, such as 2019.0."""
    cells = [str(cell).strip() for cell in column]
    whole = all(re.fullmatch(r"\d+\.0+", cell) for cell in cells)
    return [cell.partition(".")[0] for cell in cells] if whole else cells


def first_days(cells: list[str]) -> pd.DatetimeIndex | None:
    """First days of weeks, months or quarters, NaT for one that is none; None where the first cell is none of them."""
    if not any(span.fullmatch(cells[0]) for span in (WEEK, MONTH, QUARTER)):
        return None
    days = []
    for cell in cells:
        day = pd.NaT
        with suppress(ValueError):  # of a week or month that the year has not
            if match := WEEK.fullmatch(cell):
                day = datetime.date.fromisocalendar(*(int(part or 1) for part in match.groups()))
            elif match := MONTH.fullmatch(cell):
                day = datetime.date(int(match[1]), int(match[2]), 1)
            elif match := QUARTER.fullmatch(cell):
                year, quarter = match["year"] or match["first"], match["quarter"] or match["then"]
                day = datetime.date(int(year), 3 * int(quarter) - 2, 1)
        days.append(day)
    return pd.DatetimeIndex(pd.to_datetime(pd.Series(days, dtype=object), errors="coerce"))


def years_or_months(cells: list[str], name: str, named: bool = False, ordered: bool = True) -> pd.DatetimeIndex | None:
    """First days of years, 1990, or months, 199001, that are written as numbers; None where cells may be other numbers:
    they must rise or fall throughout, or if not `ordered` differ, by equal steps unless the column is called so or was
    `named` as that of the time stamps, and years need a column that is called a time."""
    if re.fullmatch(r"\d{4}(\d\d)?", name.strip()):  # a first row in the place of a header
        return None
    words = set(re.findall("[a-z]+", name.lower()))
    of_years = named or not words.isdisjoint(YEARS)
    of_years = of_years and all(re.fullmatch(r"1[5-9]\d\d|2[01]\d\d", cell) for cell in cells)
    if not of_years and not all(re.fullmatch(r"(19|20)\d\d(0[1-9]|1[0-2])", cell) for cell in cells):
        return None
    months = np.array([12 * int(cell[:4]) + int(cell[4:] or 1) for cell in cells])
    steps = np.diff(months if ordered else np.sort(months))
    if len(steps) == 0 or not ((steps > 0).all() or (steps < 0).all()):
        return None
    if not named and words.isdisjoint(SPANS) and (steps != steps[0]).any():
        return None
    return pd.DatetimeIndex(pd.to_datetime([f"{cell[:4]}-{cell[4:] or '01'}-01" for cell in cells], format="ISO8601"))


def minutes(sign: str | None, hours: str | None, rest: str | None) -> int:
    """Of an offset such as +02:00; none of Z."""
    return 0 if sign is None else int(sign + "1") * (60 * int(hours) + int(rest or 0))


def refuse_missing(missing: np.ndarray, column: pd.Series, called: str) -> None:
    if missing.any():
        first = int(np.flatnonzero(missing)[0])
        cell, row = column.iloc[first], column.index[first] + 1
        if pd.isna(cell):
            raise UserError(f"{called} is empty in row {row}: fill it in, or leave the row out.")
        raise UserError(
            f"{called}, row {row}: '{cell}' is no time stamp. Correct it, or name the time column with --time-column."
        )


def find_orders(matches: list[re.Match], dates: str) -> list[str | None]:
    """Orders that dates of numbers may be in, or that which was asked for; None where the year of four digits stands
    first in all, which the month then follows."""
    last = [m for m in matches if len(m["first"]) <= 2]
    if not last:
        return [None]
    orders = [o for o in ORDERS.values() if o != "YMD" or all(len(m["third"]) == 2 for m in last)]
    return [o for o in orders if o == ORDERS.get(dates)] or orders


def rewritten(cell: str, match: re.Match | None, order: str | None) -> str:
    """A date of numbers with the year first, which pandas reads in one way alone."""
    if match is None:
        return cell
    order = order if len(match["first"]) <= 2 else "YMD"
    part = dict(zip(order, match.group("first", "second", "third"), strict=True))
    year, month, day = full_year(part["Y"]), int(part["M"]), int(part["D"])
    if len(part["Y"]) % 2 or not 1 <= month <= 12 or not 1 <= day <= calendar.monthrange(max(year, 1), month)[1]:
        return ""
    return f"{year:04}-{month:02}-{day:02}{match['rest']} {match['time'] or ''}".rstrip()


def choose_clock(utc: pd.DatetimeIndex, clock: pd.DatetimeIndex) -> tuple[pd.DatetimeIndex, list[str]]:
    """UTC, unless the time on the clock is more regular, or as regular and the step is of days, which begin by it."""
    if (utc.tz_localize(None) == clock).all():
        return utc, []
    gap, *irregular = usual_gap(clock.sort_values()), *(irregular_steps(t.sort_values()) for t in (clock, utc))
    of_days = gap is not None and gap % pd.Timedelta(days=1) == ZERO
    if irregular[0] < irregular[1] + of_days:
        return clock, ["UTC offsets of the time stamps were left out: rows go by the clock."]
    return utc, ["Time stamps were converted to UTC."]


def choose_order(readings: dict, called: str, column: pd.Series) -> ParsedTimes:
    """Of readings by order, (time stamps, notes) each, that in which the rows are most regular, as they stand or, where
    that does not tell, sorted."""
    names = {order: name for name, order in ORDERS.items()}
    first, *others = readings
    stamps, notes = readings[first]
    if not others:
        odd = ["Dates were read as day, month, year."] if first == "DMY" else []
        return ParsedTimes(stamps, names.get(first, "detect"), [*odd, *notes])
    if all(stamps.equals(readings[order][0]) for order in others):
        return ParsedTimes(stamps, notes=notes)
    for arrange in (lambda times: times, pd.DatetimeIndex.sort_values):
        irregular = {order: irregular_steps(arrange(times)) for order, (times, _) in readings.items()}
        first, second, *_ = sorted(irregular, key=irregular.get)
        best = irregular[first]
        if best < irregular[second] and 3 * best <= irregular[second]:
            stamps, notes = readings[first]
            words = ", ".join(WORDS[letter] for letter in first)
            apart = "a constant step apart" if not best else f"a constant step apart but for {best} rows"
            return ParsedTimes(stamps, names[first], [f"Dates were read as {words}: so they are {apart}.", *notes])
    row = int(np.flatnonzero(np.any([stamps != readings[order][0] for order in others], axis=0))[0])
    days = " or ".join(str(times[row].date()) for times, _ in readings.values())
    raise UserError(
        f"{called}: {column.iloc[row]!r} may be {days}, and the steps do not tell. Add "
        f"{' or '.join(f'--dates {names[o]}' for o in readings)}, or write dates as 2024-01-31."
    )


def stamp_rows(rows: int, freq: str, start: str | None) -> pd.DatetimeIndex:
    """Time stamps of rows that have none.

    Args:
        rows: How many.
        freq: pandas' name of their step, such as "h", "15min" or "MS".
        start: The first's; by default one that stands for none.

    Raises:
        UserError: A step or start that is none, or that do not fit together; more rows than there is time.
    """
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


def find_step(times: pd.DatetimeIndex) -> pd.offsets.BaseOffset | None:
    """The step from each time stamp to the next, None where it is not the same, not forward, or there is but one."""
    if len(times) < 2 or not times.is_monotonic_increasing:
        return None
    steps = times[1:] - times[:-1]
    if (steps == steps[0]).all() and steps[0] > ZERO:
        return to_step(steps[0])
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
    if gap % pd.Timedelta(days=1) == ZERO:
        return pd.offsets.Day(gap.days)
    return pd.tseries.frequencies.to_offset(gap)


def in_words(gap: pd.Timedelta) -> str:
    """A time as people say it, "1 day" or "1 hour 30 minutes"."""
    parts = ((unit, count) for unit, count in gap.components._asdict().items() if count)
    return " ".join(f"{count} {unit if count > 1 else unit.removesuffix('s')}" for unit, count in parts)


def usual_gap(times: pd.DatetimeIndex) -> pd.Timedelta | None:
    """The most frequent time from a row to a later one that follows; None if there are none."""
    gaps = pd.Series(times[1:] - times[:-1])
    gaps = gaps[gaps > ZERO]
    return None if gaps.empty else gaps.mode().iloc[0]


def usual_step(times: pd.DatetimeIndex) -> pd.offsets.BaseOffset | pd.Timedelta | None:
    """The `usual_gap`, in months where rows lie on one day of these."""
    gap = usual_gap(times)
    if gap is not None and gap > pd.Timedelta(days=27) and on_one_day(times):
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
    return (times.is_month_end.all() or times.day.nunique() == 1) and (times - times.normalize()).nunique() == 1


def find_grid(times: pd.DatetimeIndex) -> tuple[pd.offsets.BaseOffset, int]:
    """The step of a table without gaps, for time stamps in order, and how many rows it would have."""
    usual, day, first = usual_gap(times), pd.Timedelta(days=1), times[0]
    if usual > 27 * day and (times - times.normalize()).nunique() == 1:
        o, weekday = pd.offsets, first.weekday()
        kinds = [o.MonthBegin(), o.MonthEnd(), o.BMonthBegin(), o.BMonthEnd(), o.LastWeekOfMonth(weekday=weekday)]
        kinds.append(o.WeekOfMonth(week=min((first.day - 1) // 7, 3), weekday=weekday))
        if (kind := next((kind for kind in kinds if all(map(kind.is_on_offset, times))), None)) is not None:
            months, count = count_months(times)
            return count * kind, int(months[-1] - months[0]) // count + 1
    if usual == day and times[-1] - times[0] > 7 * day and (times.day_of_week < 5).all():
        return pd.offsets.BusinessDay(), int(np.busday_count(times[0].date(), times[-1].date())) + 1
    return to_step(usual), int((times[-1] - times[0]) // usual) + 1


def repair_times(numbers: pd.DataFrame, how: str, name: str) -> tuple[pd.DataFrame, list[str]]:
    """Rows that are a constant step apart, or as they are.

    Args:
        numbers: By time stamp.
        how: One of TIMES.
        name: What messages call the file.

    Raises:
        UserError: Irregular rows, where it was not said what to do, or would be mostly left out or made up.
    """
    times = numbers.index
    if how == "keep" or len(times) < 2 or find_step(times) is not None:
        return numbers, []
    distinct = times.unique().sort_values()
    if len(distinct) == 1:
        raise UserError(f"All time stamps of {name} are {times[0]}: they must tell the rows apart.")
    step = find_step(distinct)
    step, rows = find_grid(distinct) if step is None else (step, len(distinct))
    even = isinstance(step, pd.offsets.Tick | pd.offsets.Day)
    shown = in_words(usual_gap(distinct)) if even else step.freqstr
    follows = followers(times, step)
    if (times[1:] == follows).all():  # a step for which pandas has no name
        return numbers, []
    twice, added, back = len(times) - len(distinct), rows - len(distinct), int((times[1:] < times[:-1]).sum())
    fault = None
    if 2 * twice > len(times):
        fault = (
            f"{twice} of {len(times)} rows have the time stamp of another: is the time of day in another column, or "
            "does the file hold several series, one below the other? Give each a column"
        )
    elif 2 * added > len(distinct):
        fault = (
            f"A table without gaps would have {rows} rows, most of them made up: are the dates read rightly, the first "
            f"as {', '.join(str(t) for t in times[:3])}? If not, say how with --dates, or write them as 2024-01-31; if "
            "they are, add --times keep to take every row as one step"
        )
    else:
        grid = pd.date_range(distinct[0], distinct[-1], freq=step)
        if len(strays := distinct.difference(grid)):
            fault = (
                f"{len(strays)}, such as {strays[0]}, do not lie whole steps of {shown} after {distinct[0]}: resample "
                "the file, or add --times keep to take every row as one step"
            )
    if how == "error" or fault:
        wrong = int(np.flatnonzero(times[1:] != follows)[0])
        remedy = fault or (
            "Add --times regular to sort, keep the first of equal ones and add the missing rows, or --times keep to "
            "take every row as one step"
        )
        raise UserError(
            f"Time stamps of {name} are not all {shown} apart: {twice} are there twice, "
            f"{back} go back, {int((times[1:] > follows).sum())} come after a gap; first, row {wrong + 2} "
            f"({times[wrong + 1]}) follows {times[wrong]}. {remedy}."
        )
    repairs = []
    if back:
        numbers = numbers.sort_index(kind="stable")
        repairs.append(f"Rows were sorted by time: {back} went back.")
    if twice:
        repairs.append(f"{twice} rows whose time stamp was there already were left out.")
        numbers = numbers[~numbers.index.duplicated()]
    if added:
        repairs.append(f"{added} missing rows were added, {shown} apart.")
        numbers = numbers.reindex(grid)
    return numbers, repairs
