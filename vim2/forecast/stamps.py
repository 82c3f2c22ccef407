"""Time stamps as people write them: orders of day and month, UTC offsets, and spans of time such as weeks."""

import calendar
import datetime
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..command.errors import UserError
from .cells import is_number, is_text, to_float64
from .steps import irregular_steps, is_whole_days, usual_gap

__all__ = [
    "DATES",
    "TIME_NAMES",
    "ParsedTimes",
    "holds_stamps",
    "is_date",
    "join_time_of_day",
    "number_cells",
    "parse_times",
    "years_or_months",
]

ORDERS = {"day-first": "DMY", "month-first": "MDY", "year-first": "YMD"}
ORDER_NAMES = {letters: name for name, letters in ORDERS.items()}
DATES = ("detect", *ORDERS)
TIME_NAMES = ("date", "datetime", "time", "timestamp", "ds")
WORDS = {"D": "day", "M": "month", "Y": "year"}
DATE = re.compile(
    r"\s*(?:[A-Za-z]{2,9}[.,]?\s+)?"  # a weekday
    r"(?P<time>\d{1,2}:\d{2}(?::\d{2})?\s+)?"
    r"(?P<first>\d{1,4})(?P<sign>[/.-])(?P<second>\d{1,2})(?P=sign)(?P<third>\d{1,4})(?!\d)(?P<rest>.*)",
    re.DOTALL,
)
# 31-Jan-24, and Jan-24, which is no day of an unknown year
NAMED = re.compile(r"\s*(?:(\d{1,2})[-/ .]+([A-Za-z]{3,9})[-/ .]+(\d{2})(?!\d)(.*)|([A-Za-z]{3,9})[-/ .']+(\d{2})\s*)")
# What stands before an offset, minutes or ISO 8601's compact time of day, stays a part of the time on the clock.
OFFSET = re.compile(
    r"(?P<before>(?::\d{2}|T\d{2,6})(?:[.,]\d+)?(?:\s*[AaPp][Mm])?)"
    r"\s*(?:Z|UTC|GMT|(?:UTC|GMT)?\s*(?P<sign>[+-])(?P<hours>\d{1,2}):?(?P<minutes>\d{2})?)\s*(?:\(.*\)\s*)?$"
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


def holds_stamps(column: pd.Series) -> bool:
    """Whether a column's type is one of time stamps, with a time zone or without, Arrow's among them."""
    return column.dtype.kind == "M"


def is_date(text: str) -> bool:
    """Whether a cell is a date, in any way of writing it, and no other number."""
    if COMPACT.fullmatch(text.strip()) or is_span(text.strip()):
        return True
    if is_number(text) or not any(c.isdigit() for c in text):
        return False
    match = DATE.fullmatch(text)
    return bool(match and 4 in (len(match["first"]), len(match["third"]))) or to_stamps([text])[0] is not pd.NaT


# Columns date and time


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
    if holds_stamps(column):
        stamps = pd.DatetimeIndex(column)  # also of Arrow's dates, whose .dt has less
        if stamps.tz is None and (stamps == stamps.normalize()).all():
            return pd.Series(stamps.strftime("%Y-%m-%d"), column.index, dtype=object)
        return [None]
    if not is_text(column):
        return [None]
    parts = (datetime.date, datetime.time)
    return column.astype(object).map(lambda cell: str(cell) if type(cell) in parts else cell)


# A column of time stamps


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
    column: pd.Series, source: str, dates: str = "detect", named: bool = False, ordered: bool = True
) -> ParsedTimes:
    """Time stamps of a column, those with an offset in UTC.

    Where dates can be read in several orders, that is taken in which they are a constant step apart; likewise the time
    on the clock rather than in UTC, if rows go by that, as days at midnight do.

    Args:
        column: Dates as text or as pandas has them; its index numbers the rows, as messages tell them.
        source: What messages call the file.
        dates: One of DATES.
        named: The column was named as that of the time stamps.
        ordered: Its order may tell that numbers are years or months, as these only rise or fall.

    Raises:
        UserError: Cells that are no time stamps, or may be several.
    """
    called = f"The time column {column.name} of {source}"
    if isinstance(column.dtype, pd.PeriodDtype):
        column = column.dt.to_timestamp()
    refuse_missing(column.isna().to_numpy(), column, called)
    if holds_stamps(column):
        return parse_typed(column)
    if (parsed := parse_spans(column, named, ordered)) is not None:
        refuse_missing(parsed.times.isna(), column, called)
        return parsed
    refuse_numbers(column, ordered, called)
    if (stamps := parse_iso(column)) is not None:
        return ParsedTimes(stamps)
    cells = [str(cell) for cell in column]
    refuse_times_of_day(cells, called)
    cells, offsets = cut_offsets(cells, column, called)
    return choose_order(read_in_orders(cells, offsets, dates, column, called), column, called)


def refuse_missing(missing: np.ndarray, column: pd.Series, called: str) -> None:
    if missing.any():
        first = int(np.flatnonzero(missing)[0])
        cell, row = column.iloc[first], column.index[first] + 1
        if pd.isna(cell):
            raise UserError(f"{called} is empty in row {row}: fill it in, or leave the row out.")
        raise UserError(
            f"{called}, row {row}: '{cell}' is no time stamp. Correct it, or name the time column with --time-column."
        )


def parse_typed(column: pd.Series) -> ParsedTimes:
    """Time stamps that are of such a type already."""
    stamps = pd.DatetimeIndex(column)
    if stamps.tz is None:
        return ParsedTimes(stamps)
    chosen, notes = choose_clock(stamps.tz_convert("UTC"), stamps.tz_localize(None))
    return ParsedTimes(chosen, notes=notes, zone=stamps.tz)


def choose_clock(utc: pd.DatetimeIndex, clock: pd.DatetimeIndex) -> tuple[pd.DatetimeIndex, list[str]]:
    """UTC, unless the time on the clock is more regular, or as regular and the step is of days, which begin by it."""
    if (utc.tz_localize(None) == clock).all():
        return utc, []
    gap = usual_gap(clock.sort_values())
    of_days = gap is not None and is_whole_days(gap)
    if irregular_steps(clock.sort_values()) < irregular_steps(utc.sort_values()) + of_days:
        return clock, ["UTC offsets of the time stamps were left out: rows go by the clock."]
    return utc, ["Time stamps were converted to UTC."]


# Days and spans of time that are written without separators, or as numbers


def parse_spans(column: pd.Series, named: bool, ordered: bool) -> ParsedTimes | None:
    """First days of spans of time, NaT for a cell that is none; None where a column holds other things than days such
    as 20240131, weeks, months, quarters and years."""
    cells = number_cells(column)
    if all(COMPACT.fullmatch(cell) for cell in cells):
        return ParsedTimes(pd.DatetimeIndex(pd.to_datetime(cells, format="%Y%m%d", errors="coerce")))
    if is_span(cells[0]):
        notes = [f"Of spans of time such as {cells[0]}, the first day is the time stamp."]
        return ParsedTimes(first_days(cells), notes=notes)
    if (days := years_or_months(cells, column.name, named, ordered)) is not None:
        of = "years" if len(cells[0]) == 4 else "months"
        return ParsedTimes(days, notes=[f"Column {column.name} holds {of}, such as {cells[0]}."])
    return None


def number_cells(column: pd.Series) -> list[str]:
    """Cells as text, whole numbers without the zero that a column of floats writes behind them, such as 2019.0."""
    cells = [str(cell).strip() for cell in column]
    whole = all(re.fullmatch(r"\d+\.0+", cell) for cell in cells)
    return [cell.partition(".")[0] for cell in cells] if whole else cells


def is_span(cell: str) -> bool:
    """Whether a cell is a week, month or quarter such as 2024-W05, 2024M01 or 2024-Q1."""
    return any(span.fullmatch(cell) for span in (WEEK, MONTH, QUARTER))


def first_days(cells: list[str]) -> pd.DatetimeIndex:
    """First days of weeks, months or quarters, NaT for one that is none."""
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
    may_be_years = named or not words.isdisjoint(YEARS)
    are_years = may_be_years and all(re.fullmatch(r"1[5-9]\d\d|2[01]\d\d", cell) for cell in cells)
    if not are_years and not all(re.fullmatch(r"(19|20)\d\d(0[1-9]|1[0-2])", cell) for cell in cells):
        return None
    months = np.array([12 * int(cell[:4]) + int(cell[4:] or 1) for cell in cells])
    steps = np.diff(months if ordered else np.sort(months))
    if len(steps) == 0 or not ((steps > 0).all() or (steps < 0).all()):
        return None
    surely = named or not words.isdisjoint(SPANS)
    if not surely and (steps != steps[0]).any():
        return None
    return pd.DatetimeIndex(pd.to_datetime([f"{cell[:4]}-{cell[4:] or '01'}-01" for cell in cells], format="ISO8601"))


def refuse_numbers(column: pd.Series, ordered: bool, called: str) -> None:
    """Raise for numbers, which may be anything."""
    if not pd.api.types.is_numeric_dtype(column) and np.isnan(to_float64(column)).any():
        return
    spans = years_or_months(number_cells(column), column.name, True, ordered) is not None
    years = f"if they are years or months, say so with --time-column {column.name}; " if spans else ""
    raise UserError(
        f"{called} holds numbers, such as {column.iloc[0]}: {years}give dates such as 2024-01-31 13:00:00, name "
        "another column with --time-column, or say with --freq how far apart rows without time stamps are."
    )


# Dates as text


def parse_iso(column: pd.Series) -> pd.DatetimeIndex | None:
    """Time stamps as ISO 8601 has them, without offsets: the most frequent form, and quickly read; None of others."""
    with suppress(ValueError), warnings.catch_warnings():  # mixed offsets, which pandas 2 warns of
        warnings.simplefilter("ignore", FutureWarning)
        stamps = pd.DatetimeIndex(pd.to_datetime(column, format="ISO8601", errors="coerce"))
        if stamps.tz is None and not stamps.hasnans:
            return stamps
    return None


def refuse_times_of_day(cells: list[str], called: str) -> None:
    if all(":" in cell and TIME_OF_DAY.fullmatch(cell) for cell in cells):
        raise UserError(f"{called} holds times without dates, such as {cells[0]}: give dates such as 2024-01-31 13:00.")


def cut_offsets(cells: list[str], column: pd.Series, called: str) -> tuple[list[str], pd.TimedeltaIndex | None]:
    """Cells without the UTC offsets that they end with, and these; None if they have none."""
    marks = [OFFSET.search(cell) for cell in cells]
    if not any(marks):
        return cells, None
    if not all(marks):
        row = next(i for i, mark in enumerate(marks) if mark is None)
        raise UserError(
            f"{called}, row {column.index[row] + 1}: {cells[row]!r} has no UTC offset, as others have: give all or "
            "none."
        )
    clock = [cell[: mark.end("before")] for cell, mark in zip(cells, marks, strict=True)]
    return clock, pd.to_timedelta([offset_minutes(mark) for mark in marks], unit="min")


def offset_minutes(mark: re.Match) -> int:
    """Of an offset such as +02:00; none of Z."""
    if mark["sign"] is None:
        return 0
    return int(mark["sign"] + "1") * (60 * int(mark["hours"]) + int(mark["minutes"] or 0))


# Time stamps, and what was done to them, by the order that dates were read in; None where that is no question
Readings = dict[str | None, tuple[pd.DatetimeIndex, list[str]]]


def read_in_orders(
    cells: list[str], offsets: pd.TimedeltaIndex | None, dates: str, column: pd.Series, called: str
) -> Readings:
    """Time stamps in each order of `find_orders` in which all cells are some."""
    matches = [DATE.fullmatch(cell) for cell in cells]
    clocks = {
        order: to_stamps([with_year_first(cell, match, order) for cell, match in zip(cells, matches, strict=True)])
        for order in find_orders([m for m in matches if m], dates)
    }
    readings = {}
    for order, clock in clocks.items():
        if not clock.isna().any():
            utc = None if offsets is None else (clock - offsets).tz_localize("UTC")
            readings[order] = (clock, []) if utc is None else choose_clock(utc, clock)
    if not readings:
        refuse_missing(np.all([clock.isna() for clock in clocks.values()], axis=0), column, called)
        raise UserError(
            f"{called} has days before months in some rows and after them in others: give dates such as 2024-01-31."
        )
    return readings


def find_orders(matches: list[re.Match], dates: str) -> list[str | None]:
    """Orders that dates of numbers may be in, or that which was asked for; None where the year of four digits stands
    first in all, which the month then follows."""
    last = [m for m in matches if len(m["first"]) <= 2]
    if not last:
        return [None]
    orders = [o for o in ORDERS.values() if o != "YMD" or all(len(m["third"]) == 2 for m in last)]
    return [o for o in orders if o == ORDERS.get(dates)] or orders


def with_year_first(cell: str, match: re.Match | None, order: str | None) -> str:
    """A date of numbers with the year first, which pandas reads in one way alone; empty if it is none in this order.
    Others, which `DATE` does not match, as they are."""
    if match is None:
        return cell
    order = order if len(match["first"]) <= 2 else "YMD"
    part = dict(zip(order, match.group("first", "second", "third"), strict=True))
    year, month, day = full_year(part["Y"]), int(part["M"]), int(part["D"])
    if len(part["Y"]) % 2 or not 1 <= month <= 12 or not 1 <= day <= calendar.monthrange(max(year, 1), month)[1]:
        return ""
    return f"{year:04}-{month:02}-{day:02}{match['rest']} {match['time'] or ''}".rstrip()


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


def choose_order(readings: Readings, column: pd.Series, called: str) -> ParsedTimes:
    """The reading in which the rows are most regular, as they stand or, where that does not tell, sorted.

    Raises:
        UserError: The readings differ, and none is much more regular than the others.
    """
    first, *others = readings
    stamps, notes = readings[first]
    if not others:
        odd = ["Dates were read as day, month, year."] if first == "DMY" else []
        return ParsedTimes(stamps, ORDER_NAMES.get(first, "detect"), [*odd, *notes])
    if all(stamps.equals(readings[order][0]) for order in others):
        return ParsedTimes(stamps, notes=notes)
    for arrange in (lambda times: times, pd.DatetimeIndex.sort_values):
        if (parsed := most_regular(readings, arrange)) is not None:
            return parsed
    row = int(np.flatnonzero(np.any([stamps != readings[order][0] for order in others], axis=0))[0])
    days = " or ".join(str(times[row].date()) for times, _ in readings.values())
    raise UserError(
        f"{called}: {column.iloc[row]!r} may be {days}, and the steps do not tell. Add "
        f"{' or '.join(f'--dates {ORDER_NAMES[o]}' for o in readings)}, or write dates as 2024-01-31."
    )


def most_regular(readings: Readings, arrange: Callable[[pd.DatetimeIndex], pd.DatetimeIndex]) -> ParsedTimes | None:
    """The reading that, its rows arranged, has a third of the irregular steps of any other, or fewer; None if there is
    no such."""
    irregular = {order: irregular_steps(arrange(times)) for order, (times, _) in readings.items()}
    order, second, *_ = sorted(irregular, key=irregular.get)
    rows = irregular[order]
    if not (rows < irregular[second] and 3 * rows <= irregular[second]):
        return None
    stamps, notes = readings[order]
    words = ", ".join(WORDS[letter] for letter in order)
    apart = "a constant step apart" if not rows else f"a constant step apart but for {rows} rows"
    return ParsedTimes(stamps, ORDER_NAMES[order], [f"Dates were read as {words}: so they are {apart}.", *notes])
