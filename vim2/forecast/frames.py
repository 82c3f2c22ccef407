"""Files and DataFrames as columns that have names: encodings, separators, headers, columns that are an index."""

import bz2
import codecs
import csv
import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Collection, Sequence
from itertools import chain, islice, zip_longest
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..command.errors import UserError, did_you_mean
from .cells import is_number, is_text, number_texts, points_of_thousands
from .stamps import TIME_NAMES, holds_stamps, is_date, number_cells, years_or_months

__all__ = [
    "LONG",
    "describe",
    "is_of_dates",
    "leave_out_index",
    "read_frame",
    "refuse_renamed_long",
    "require_data",
    "widen",
]

LONG = ("unique_id", "ds", "y")  # columns of a long table, as neuralforecast names them
# UTF-32's little-endian mark begins with UTF-16's, so it is looked for first
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
OTHERS = (".xlsx", ".xlsm", ".xls", ".ods", ".numbers", ".json", ".jsonl", ".feather", ".arrow", ".h5", ".npy", ".npz")
# of Excel and LibreOffice, also where they were named .csv
OLD_WORKBOOK, IN_WORKBOOKS = b"\xd0\xcf\x11\xe0", {"[Content_Types].xml", "mimetype"}
SAMPLE = 100  # rows that show separators, and whether there is a header
SEPARATORS = "\t;|,"  # the comma last: beside another separator it may stand in numbers
PARTS_OF_TIME = {
    "time",
    "hour",
    "hours",
    "hr",
    "h",
    "minute",
    "minutes",
    "min",
    "halfhour",
    "slot",
    "period",
    "interval",
}
PARTS_OF_TIME |= {"day", "weekday", "dow", "week", "month", "quarter", "season", "shift", "year"}
NAMELESS = re.compile(r"Unnamed: \d+(\.\d+)*")  # as pandas calls a column without a name


def require_data(data: object) -> None:
    """Raise for data that are neither a path nor a DataFrame."""
    if not isinstance(data, str | PathLike | pd.DataFrame):
        kind = type(data)
        called = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__.split('.')[0]}.{kind.__name__}"
        remedy = next((f": give its .{how}()" for how in ("to_frame", "to_pandas") if hasattr(data, how)), "")
        raise UserError(f"data must be a file's path or a pandas DataFrame, got {called}{remedy}.")


def describe(data: str | PathLike | pd.DataFrame) -> str:
    """What messages call it: a file's path, or DataFrame."""
    return "DataFrame" if isinstance(data, pd.DataFrame) else str(data)


def read_frame(
    data: str | PathLike | pd.DataFrame, untimed: bool = False
) -> tuple[pd.DataFrame, str | None, list[str]]:
    """Columns by name, which of them holds the time stamps where an index tells, and what was done, a sentence each.

    Args:
        data: A file's path or a DataFrame.
        untimed: There need be no column of time stamps beside the others, and none tells whether there is a header.

    Raises:
        UserError: A file that is missing, damaged or no table; names that are there twice; data of another type.
    """
    require_data(data)
    if isinstance(data, pd.DataFrame):
        return index_to_column(data, describe(data))
    path = Path(data)
    if path.is_dir():
        raise UserError(f"{path} is a folder: give a file, .csv or .parquet.")
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        content = path.read_bytes()
        if path.suffix.lower() in OTHERS or content.startswith(OLD_WORKBOOK):
            raise UserError(f"{path} is no .csv or .parquet file: save its table as one of these.")
        content = decompress(content, path)
        if path.suffix.lower() in (".parquet", ".pq") or content[:4] == content[-4:] == b"PAR1":
            return index_to_column(pd.read_parquet(io.BytesIO(content)), str(path))
        text, notes = decode(content, path)
        frame, more = read_csv(text, path, untimed)
        return frame, None, notes + more
    except ImportError as error:
        raise UserError(f"{path} needs {error.name or 'pyarrow'} to be read: install it with pip.") from None
    except UserError:
        raise
    except (
        csv.Error,
        zipfile.BadZipFile,
        lzma.LZMAError,
        zlib.error,
        EOFError,
        OSError,
        RuntimeError,
        ValueError,
    ) as error:
        raise UserError(f"{path} cannot be read ({str(error).strip()}): is it a whole file?") from None


def index_to_column(frame: pd.DataFrame, name: str) -> tuple[pd.DataFrame, str | None, list[str]]:
    """A DataFrame whose index of time stamps became its first column; one that counts the rows is left out."""
    if frame.columns.nlevels > 1:
        raise UserError(f"{name} has columns of several levels: give them one, as .droplevel(0, axis=1) does.")
    if frame.index.nlevels > 1:  # such as unique_id and ds
        levels = list(frame.index.names)
        if None in levels or set(levels) & set(frame.columns) or len(set(levels)) < len(levels):
            raise UserError(
                f"{name} has an index of several levels: give it one, or name them as no column is, to be columns."
            )
        frame = frame.reset_index()
    index, time, notes = frame.index, None, []
    frame = frame.set_axis([str(c).strip() for c in frame.columns], axis=1).reset_index(drop=True)
    if isinstance(index, pd.PeriodIndex):
        index = index.to_timestamp()
    dated = isinstance(index, pd.DatetimeIndex) or holds_years(index, frame)
    if dated or not pd.api.types.is_numeric_dtype(index):
        column = str(index.name if index.name is not None else "date" if dated else "index").strip()
        if column in frame.columns:
            raise UserError(f"{name} has an index and a column that are both called {column}: drop or rename one.")
        frame.insert(0, column, index)
        time = column if dated else None
    elif not isinstance(index, pd.RangeIndex):
        notes.append("The index, which holds numbers, is left out.")
    refuse_equal_names(list(frame.columns), name)
    if frame.empty:
        raise UserError(f"{name} has no rows.")
    return frame, time, notes


def holds_years(index: pd.Index, frame: pd.DataFrame) -> bool:
    """Whether an index of numbers holds years, as one called year does, or months, for a table without time stamps."""
    if not pd.api.types.is_numeric_dtype(index) or (isinstance(index, pd.RangeIndex) and index.name is None):
        return False
    timed = any(c.lower() in TIME_NAMES or holds_stamps(frame[c]) for c in frame.columns)
    name = "" if index.name is None else str(index.name)
    return not timed and years_or_months(number_cells(index), name) is not None


def refuse_equal_names(names: list[str], source: str | Path) -> None:
    if len(names) > len(set(names)):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise UserError(f"{source} has two columns {twice}: rename one.")


def decompress(content: bytes, path: Path) -> bytes:
    """A file's content without the compression that its first bytes tell, whatever the file is called."""
    if content.startswith(b"\x1f\x8b"):
        return gzip.decompress(content)
    if re.match(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", content):
        return bz2.decompress(content)
    if content.startswith((b"\xfd7zXZ\0", b"]\0\0")):  # and its older form, .lzma
        return lzma.decompress(content)
    if content.startswith(b"(\xb5/\xfd"):
        import zstandard

        try:
            with zstandard.open(io.BytesIO(content), "rb") as file:
                return file.read()
        except zstandard.ZstdError as error:
            raise ValueError(error) from None
    if content.startswith((b"PK\3\4", b"PK\5\6")):  # the second where it holds nothing
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [n for n in archive.namelist() if not n.endswith("/") and not n.startswith("__MACOSX/")]
            if IN_WORKBOOKS & set(names):
                raise UserError(f"{path} is a workbook, no .csv or .parquet file: save its table as one of these.")
            if len(names) != 1:
                raise UserError(f"{path} holds {len(names)} files: give an archive of one.")
            return archive.read(names[0])
    return content


def decode(data: bytes, path: Path) -> tuple[str, list[str]]:
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8")
    notes = []
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        try:
            encoding = "windows-1252"  # latin-1 with a euro sign, dashes and curly quotes, as Excel in the west saves
            text = data.decode(encoding)
        except UnicodeDecodeError:
            encoding = "latin-1"
            text = data.decode(encoding)
        notes = [f"{path.name} is not UTF-8; it was read as {encoding}: save it as UTF-8 if names look wrong."]
    if "\0" in text:
        raise UserError(f"{path} is no text: is it a .csv file?")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"\A( *\n)+", "", text)
    if not text.strip():
        raise UserError(f"{path} is empty.")
    return text, notes


def read_csv(text: str, path: Path, untimed: bool = False) -> tuple[pd.DataFrame, list[str]]:
    separator = re.match(r'"?sep=(.)"?\n', text)  # a line for Excel
    if separator:
        text, separator = text[separator.end() :], separator[1]
    else:
        separator = find_separator(text)
    lines = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
    header, notes = [cell.strip() for cell in next(lines)], []
    header_lines = lines.line_num
    if len(header) < 2 and not untimed:
        rest = text.split("\n", header_lines)[-1].lstrip("\n")
        rows = (next(csv.reader([row], delimiter=find_separator(row))) for row in rest.split("\n")[:SAMPLE] if row)
        second = next((row for row in rows if len(row) > 1), [])
        if second and not all(map(is_number, second)):  # 1,5 is one number
            raise UserError(
                f"{path} begins with a line of one cell, {header[0]!r}, and its rows have more: take out what stands "
                "above the line of names."
            )
        raise UserError(
            f"{path} has one column only, {''.join(header)}: commas, semicolons or tabs must separate columns. One "
            "series without time stamps needs --freq, which says how far apart its rows are."
        )
    sample = list(islice(filter(None, lines), SAMPLE))
    if untimed and all(is_number(cell) for cell in header if cell.strip()):
        names = [str(i + 1) for i in range(len(header))]
        sample.insert(0, header)
    else:
        names = name_columns(header, sample, path)
    if names:
        called = names if len(names) <= 4 else [*names[:3], "...", names[-1]]
        notes.append(f"{path.name} has no header: its columns are called {', '.join(called)}.")
    else:
        names = []
        for i, name in enumerate(header):  # an index that was written twice left a column of that name already
            names.append(name or f"Unnamed: {i}" + ".1" * (f"Unnamed: {i}" in header))
        text = text.split("\n", header_lines)[-1]
    refuse_equal_names(names, path)
    if not sample:
        raise UserError(f"{path} has a header but no rows.")
    widest = len(names)
    for number, row in enumerate(chain(sample, filter(None, lines)), 1):
        widest = max(widest, len(row))
        if any(map(str.strip, row[len(names) :])):
            raise UserError(
                f"{path}, row {number} has {len(row)} cells, and the header {len(names)}: give each row as many. "
                "A number with a comma needs quotes, or another separator than the comma."
            )
    names += [f"Unnamed: {i}" for i in range(len(names), widest)]
    how = dict(sep=separator, header=None, names=names, index_col=False, skipinitialspace=True, low_memory=False)
    if int(pd.__version__.partition(".")[0]) < 3:  # whose last bits are others, unless it is told
        how["float_precision"] = "round_trip"
    frame = pd.read_csv(io.StringIO(text), **how)
    columns = zip_longest(*sample, fillvalue="")
    if any(number_texts(frame[name]).size for name in names) or any(map(points_of_thousands, columns)):
        # whether 1.234 is a thousand depends on cells of other columns, so none may be taken for a number yet
        frame = pd.read_csv(io.StringIO(text), dtype=str, **how)
    if words := [name for name in names if frame[name].isna().any() and holds_words(frame[name])]:
        kept = dict(dtype=str, keep_default_na=False, na_values=[""])
        frame[words] = pd.read_csv(io.StringIO(text), **how, **kept)[words]  # NA may be Namibia, or North America
    empty = frame.isna().all(axis=1)
    if empty.any() and not empty.all():
        frame = frame[~empty].reset_index(drop=True).infer_objects()
        notes.append(f"{int(empty.sum())} rows without any value were left out.")
    return frame, notes


def holds_words(column: pd.Series) -> bool:
    """Whether what a column holds is text, and no numbers."""
    cells = column.dropna().iloc[:SAMPLE]
    return len(cells) > 0 and all(isinstance(cell, str) and not is_number(cell) for cell in cells)


def find_separator(text: str) -> str:
    """That which cuts the first row and all that follow into cells; a comma if there is no other."""
    for separator in SEPARATORS[:-1]:
        lines = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
        rows = filter(None, islice(lines, SAMPLE))
        if min(map(len, rows), default=0) > 1:
            return separator
    return SEPARATORS[-1]


def name_columns(first: list[str], rows: list[list[str]], path: Path) -> list[str]:
    """Names where the first row is no header, but holds a date where the next ones do; empty if it is a header.

    Raises:
        UserError: It is none, and which column is the time is not to be seen.
    """
    places = [i for i, cell in enumerate(first) if is_date(cell)]
    places = [i for i in places if rows and all(is_date(row[i]) for row in rows if len(row) > i and row[i].strip())]
    if not places:
        return []
    others = [cell for i, cell in enumerate(first) if i not in places]
    if len(places) > 1 or not all(not cell.strip() or is_number(cell) for cell in others):
        raise UserError(
            f"{path} has no header, its first row holds values ({', '.join(first[:3])}): add a row of names."
        )
    # as pandas writes it without a header, an index stands before the dates
    before = [f"Unnamed: {i}" for i in range(places[0])]
    return [*before, "date", *(str(i + 1) for i in range(len(first) - places[0] - 1))]


def leave_out_index(frame: pd.DataFrame, wanted: Collection[str]) -> tuple[pd.DataFrame, list[str]]:
    """A frame without columns that only count its rows, as pandas writes an index, and without nameless empty ones.

    Args:
        frame: As read.
        wanted: Names of columns that were asked for, which stay.
    """
    notes, leading = [], True
    for name in list(frame.columns):
        column, nameless = frame[name], bool(NAMELESS.fullmatch(name))
        leading &= nameless
        if name in wanted:
            continue
        if nameless and column.isna().all():
            frame = frame.drop(columns=name)
            notes.append("A column without a name and values was left out.")
        elif leading or name in ("index", "level_0"):
            counts = pd.to_numeric(column.astype(object) if is_text(column) else column, errors="coerce")
            if holds_stamps(column) or counts.isna().any() or (counts % 1 != 0).any():
                continue
            if all(is_date(str(cell)) for cell in column):  # 20240131
                continue
            if (counts.to_numpy() == np.arange(len(counts))).all() or (nameless and counts.is_unique):
                frame = frame.drop(columns=name)
                notes.append(f"Column {name}, which counts the rows, was left out.")
    return frame, notes


def refuse_renamed_long(frame: pd.DataFrame, time: str | None, source: str) -> None:
    """Raise for a long table whose columns have other names than LONG: with a column of dates, most of which are there
    more than once, and a column of text or whole numbers which tells the rows of one date apart.

    Args:
        frame: As read.
        time: Its column of time stamps, if that is known.
        source: What messages call it.
    """
    rows, ids, stamps = len(frame), [], None
    for stamps in [time] if time in frame else filter(lambda c: is_of_dates(frame[c]), frame):
        counts = frame[stamps].value_counts()
        if 2 * len(counts) <= rows:
            ids = find_ids(frame, stamps, counts.max())
            break
    if not ids:
        return
    others = [c for c in frame if c not in (*ids, stamps)]
    values = [c for c in others if pd.api.types.is_numeric_dtype(frame[c])] or others
    if not values:
        return
    value = LONG[2] if LONG[2] in values else values[0]
    if len(ids) == 1:
        renamed = {old: new for old, new in zip((ids[0], stamps, value), LONG) if old != new}
        verb, how = "tells", ""
    else:
        renamed = {old: new for old, new in zip((stamps, value), LONG[1:]) if old != new}
        verb, how = "tell", f"join {' and '.join(ids)} into one column {LONG[0]}" + ", and " * bool(renamed)
    if renamed:
        how += "rename " + ", ".join(f"{old} to {new}" for old, new in renamed.items())
    how += f", or another column than {value} if that is to be forecast" if len(values) > 1 and value in renamed else ""
    if renamed:
        how += f", with .rename(columns={renamed})" if source == "DataFrame" else ", in its first row"
    if may_be_time(frame[ids[0]]):
        raise UserError(
            f"Rows of {source} share the time stamps of {stamps}, and {ids[0]} tells them apart. If it is a part of "
            f"the time, write it into {stamps}, as in 2024-01-31 13:00. If it names series, one below the other: {how}."
        )
    raise UserError(
        f"{source} looks like a long table, a row for each series and time step: {' and '.join(ids)} {verb} series "
        f"apart, and {stamps} holds the same time stamps for each. It is read as one if its columns are called "
        f"{', '.join(LONG)}: {how}."
    )


def find_ids(frame: pd.DataFrame, time: str, most: int) -> list[str]:
    """The column that tells apart the rows of each time stamp, of which there are at most as many as `most`, or two of
    text that do together."""
    others = [c for c in frame if c != time]
    for column in others:
        if names_series(frame, column, time, most):
            return [column]
    words = [c for c in others if is_name(frame[c]) and not may_be_time(frame[c])]
    pairs = ([a, b] for i, a in enumerate(words) for b in words[i + 1 :])
    return next((pair for pair in pairs if not frame.duplicated([*pair, time]).any()), [])


def may_be_time(column: pd.Series) -> bool:
    """Whether a column may hold a part of the time, such as the hour, by its name or as it counts from 0 or 1."""
    if PARTS_OF_TIME & set(re.findall(r"[a-z]+", str(column.name).lower())):
        return True
    found = [re.fullmatch(r"[^\d-]{0,2}(\d{1,4})(\.0)?", str(cell)) for cell in column.unique()]
    if len(found) < 4 or not all(found):
        return False
    numbers = sorted(int(match[1]) for match in found)
    return numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def is_of_dates(column: pd.Series) -> bool:
    """Whether a column holds time stamps, or text that does."""
    if holds_stamps(column):
        return True
    cells = column.iloc[:SAMPLE]
    return is_text(column) and all(isinstance(cell, str) and is_date(cell) for cell in cells)


def names_series(frame: pd.DataFrame, column: str, time: str, most: int) -> bool:
    """Whether a column tells apart the rows of each time stamp, of which there are as many as `most`."""
    cells = frame[column]
    number = pd.api.types.is_any_real_numeric_dtype(cells) and not pd.api.types.is_bool_dtype(cells)
    if not (is_name(cells) or (number and cells.notna().all() and (cells % 1 == 0).all())):
        return False
    kinds = cells.nunique()
    fits = kinds == most if number else most <= kinds <= len(frame) // 2
    return fits and kinds > 1 and not frame.duplicated([column, time]).any()


def is_name(cells: pd.Series) -> bool:
    """Whether cells are text, and no numbers."""
    if isinstance(cells.dtype, pd.CategoricalDtype):
        return True
    return is_text(cells) and not any(isinstance(cell, str) and is_number(cell) for cell in cells.iloc[:SAMPLE])


def widen(
    frame: pd.DataFrame, future: Sequence[str], name: str, static: Sequence[str] = (), repeated: bool = False
) -> tuple[pd.DataFrame, dict[str, Any], pd.DataFrame, list[str]]:
    """A long table, a row for each series and time step, as a wide one.

    Args:
        frame: With the columns LONG, in any order of rows; ds holds time stamps as `parse_times` has them, or numbers.
        future: Further columns that are known beforehand, the same for all series.
        name: What messages call it.
        static: Further columns that describe a series, whatever the time.
        repeated: Of rows of one series at one time, the first is taken, where these are no more than half.

    Returns:
        Column ds in order of time, then a column for each series, then the future ones; the series' ids by the name of
        their column; the static columns, a row for each series, by the same names; what was left out, a sentence each.

    Raises:
        UserError: A row without id or time, two rows of one series at one time, ids that are no names of
            columns, future columns that differ between series, static ones that differ within one or are missing.
    """
    identity, time, value = LONG
    for column in (identity, time):
        if frame[column].isna().any():
            row = int(np.flatnonzero(frame[column].isna())[0])
            raise UserError(f"{name}, row {row + 1} has no {column}: fill it in, or leave the row out.")
    notes, twice = [], frame.duplicated([identity, time])
    if twice.any():
        first, count = frame[twice].iloc[0], int(twice.sum())
        if not repeated or 2 * count > len(frame):
            remedy = "" if repeated else ", or add --times regular to keep the first of each"
            raise UserError(
                f"{name} has two rows of series {first[identity]} at {first[time]} ({count} such rows): leave one out, "
                f"or add their values{remedy}."
            )
        frame = frame[~twice].reset_index(drop=True)
        notes.append(f"{count} rows of a series whose time stamp it had already were left out.")
    series, ids = pd.factorize(frame[identity])
    rows, stamps = pd.factorize(frame[time], sort=True)
    names = [str(i).strip() for i in ids]
    if len(names) > len(set(names)):
        refused = next(one for i, one in enumerate(names) if one in names[:i])
        raise UserError(
            f"{name} has two series that are both called {refused}, as a number and as text, or with spaces around it: "
            "rename one."
        )
    refuse_equal_names([time, *names, *future], name)
    number = pd.api.types.is_any_real_numeric_dtype(frame[value])
    kind = dict(dtype=np.float64, na_value=np.nan) if number else dict(dtype=object)
    cells = np.full((len(stamps), len(names)), np.nan, dtype=kind["dtype"])
    cells[rows, series] = frame[value].to_numpy(**kind)
    columns = {time: stamps, **{column: cells[:, i] for i, column in enumerate(names)}}
    for column in future:
        if column not in frame:
            continue  # told where wide tables lack one
        known = frame[[column]].assign(row=rows).dropna().drop_duplicates()
        if (differs := known["row"].duplicated()).any():
            at = stamps[known["row"][differs].iloc[0]]
            raise UserError(
                f"Column {column} of {name} differs between series at {at}: what is known beforehand is shared by all."
            )
        columns[column] = known.set_index("row")[column].reindex(range(len(stamps)))
    described = pd.DataFrame(index=names)
    for column in static:
        if column not in frame:
            raise UserError(f"{name} has no column {column}{did_you_mean(column, frame.columns)}")
        kinds = frame.groupby(series)[column].nunique()
        if (kinds != 1).any():
            at, what = names[int(np.argmax(kinds != 1))], "holds nothing" if kinds.min() == 0 else "changes"
            raise UserError(
                f"Column {column} of {name} {what} for series {at}: a static column says one thing of each series."
            )
        described[column] = frame.groupby(series)[column].first().to_numpy()
    left = [column for column in frame.columns if column not in (*LONG, *future, *static)]
    notes += [f"Columns beside {', '.join(LONG)} were left out: {', '.join(left)}."] if left else []
    return pd.DataFrame(columns), dict(zip(names, ids, strict=True)), described, notes
