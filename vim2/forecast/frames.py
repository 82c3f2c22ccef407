"""Files and DataFrames as columns that have names, and columns that are an index."""

import csv
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Collection, Hashable
from os import PathLike
from pathlib import Path

import numpy as np
import pandas as pd

from ..command.errors import UserError
from .cells import is_text, to_whole
from .stamps import TIME_NAMES, holds_stamps, is_date, number_cells, years_or_months
from .text_files import SAMPLE, decode, decompress, read_csv, refuse_equal_names

__all__ = ["describe", "is_of_dates", "leave_out_index", "read_frame", "require_data"]

OTHERS = (".xlsx", ".xlsm", ".xls", ".ods", ".numbers", ".json", ".jsonl", ".feather", ".arrow", ".h5", ".npy", ".npz")
OLD_WORKBOOK = b"\xd0\xcf\x11\xe0"  # how those of Excel begin that are no zip archives, also where they were named .csv
DAMAGED = (csv.Error, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, OSError, RuntimeError, ValueError)
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
        return read_file(path, untimed)
    except ImportError as error:
        raise UserError(f"{path} needs {error.name or 'pyarrow'} to be read: install it with pip.") from None
    except UserError:
        raise
    except DAMAGED as error:
        raise UserError(f"{path} cannot be read ({str(error).strip()}): is it a whole file?") from None


def read_file(path: Path, untimed: bool) -> tuple[pd.DataFrame, str | None, list[str]]:
    """As `read_frame`, by what the file holds rather than what it is called."""
    content = path.read_bytes()
    if path.suffix.lower() in OTHERS or content.startswith(OLD_WORKBOOK):
        raise UserError(f"{path} is no .csv or .parquet file: save its table as one of these.")
    content = decompress(content, path)
    if path.suffix.lower() in (".parquet", ".pq") or content[:4] == content[-4:] == b"PAR1":
        return index_to_column(pd.read_parquet(io.BytesIO(content)), str(path))
    text, notes = decode(content, path)
    frame, more = read_csv(text, path, untimed)
    return frame, None, notes + more


def index_to_column(frame: pd.DataFrame, source: str) -> tuple[pd.DataFrame, str | None, list[str]]:
    """A DataFrame whose index of time stamps became its first column; one that counts the rows is left out."""
    if frame.columns.nlevels > 1:
        raise UserError(f"{source} has columns of several levels: give them one, as .droplevel(0, axis=1) does.")
    if frame.index.nlevels > 1:  # such as unique_id and ds
        levels = list(frame.index.names)
        if None in levels or set(levels) & set(frame.columns) or len(set(levels)) < len(levels):
            raise UserError(
                f"{source} has an index of several levels: give it one, or name them as no column is, to be columns."
            )
        frame = frame.reset_index()
    index, time, notes = frame.index, None, []
    frame = frame.set_axis([str(c).strip() for c in frame.columns], axis=1).reset_index(drop=True)
    if isinstance(index, pd.PeriodIndex):
        index = index.to_timestamp()
    dated = isinstance(index, pd.DatetimeIndex) or holds_years(index, frame)
    if dated or not pd.api.types.is_numeric_dtype(index):
        name = str(index.name if index.name is not None else "date" if dated else "index").strip()
        if name in frame.columns:
            raise UserError(f"{source} has an index and a column that are both called {name}: drop or rename one.")
        frame.insert(0, name, index)
        time = name if dated else None
    elif not isinstance(index, pd.RangeIndex):
        notes.append("The index, which holds numbers, is left out.")
    refuse_equal_names(list(frame.columns), source)
    if frame.empty:
        raise UserError(f"{source} has no rows.")
    # lists and the like, as Parquet files may hold, can be neither counted nor compared, but told as text
    nested = {name: column.map(str) for name, column in frame.items() if holds_unhashable(column)}
    return frame.assign(**nested), time, notes


def holds_unhashable(column: pd.Series) -> bool:
    """Whether a column holds lists, dictionaries or arrays."""
    if column.dtype.kind != "O" or isinstance(column.dtype, pd.StringDtype | pd.CategoricalDtype):
        return False
    return not all(issubclass(kind, Hashable) for kind in set(map(type, column)))


def holds_years(index: pd.Index, frame: pd.DataFrame) -> bool:
    """Whether an index of numbers holds years, as one called year does, or months, for a table without time stamps."""
    if not pd.api.types.is_numeric_dtype(index) or (isinstance(index, pd.RangeIndex) and index.name is None):
        return False
    timed = any(c.lower() in TIME_NAMES or holds_stamps(frame[c]) for c in frame.columns)
    name = "" if index.name is None else str(index.name)
    return not timed and years_or_months(number_cells(index), name) is not None


def leave_out_index(frame: pd.DataFrame, wanted: Collection[str]) -> tuple[pd.DataFrame, list[str]]:
    """A frame without columns that only count its rows, as pandas writes an index, and without nameless empty ones.

    Args:
        frame: As read.
        wanted: Names of columns that were asked for, which stay.
    """
    left, notes, leading = [], [], True
    for name in frame.columns:
        column, nameless = frame[name], bool(NAMELESS.fullmatch(name))
        leading &= nameless
        if name in wanted:
            continue
        if nameless and column.isna().all():
            left.append(name)
            notes.append("A column without a name and values was left out.")
        elif (leading or name in ("index", "level_0")) and may_be_index(column, nameless):
            left.append(name)
            notes.append(f"Column {name}, which counts the rows, was left out.")
    return frame.drop(columns=left), notes


def may_be_index(column: pd.Series, nameless: bool) -> bool:
    """Whether a column holds whole numbers, but no dates such as 20240131, that count the rows; those of one without a
    name may leave some out, as of chosen rows."""
    counts = to_whole(column)
    if counts is None or all(is_date(str(cell)) for cell in column):
        return False
    return bool((counts == np.arange(len(counts))).all() or (nameless and len(np.unique(counts)) == len(counts)))


def is_of_dates(column: pd.Series) -> bool:
    """Whether a column holds time stamps, or text that does."""
    if holds_stamps(column):
        return True
    cells = column.iloc[:SAMPLE]
    return is_text(column) and all(isinstance(cell, str) and is_date(cell) for cell in cells)
