"""Text files as columns that have names: compression, encodings, separators, headers."""

import bz2
import codecs
import csv
import gzip
import io
import lzma
import re
import zipfile
from collections.abc import Sequence
from itertools import chain, islice, zip_longest
from pathlib import Path

import pandas as pd

from ..command.errors import UserError
from .cells import is_number, number_texts, points_of_thousands
from .stamps import is_date

__all__ = ["SAMPLE", "decode", "decompress", "read_csv", "refuse_equal_names"]

# UTF-32's little-endian mark begins with UTF-16's, so it is looked for first
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
IN_WORKBOOKS = {"[Content_Types].xml", "mimetype"}  # of Excel and LibreOffice, which are zip archives
SAMPLE = 100  # rows that show separators, and whether there is a header
SEPARATORS = "\t;|,"  # the comma last: beside another separator it may stand in numbers


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


def decode(content: bytes, path: Path) -> tuple[str, list[str]]:
    """A file's text, whose lines end with a line feed, and a note if it is not UTF-8."""
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
    notes = []
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        try:
            encoding = "windows-1252"  # latin-1 with a euro sign, dashes and curly quotes, as Excel in the west saves
            text = content.decode(encoding)
        except UnicodeDecodeError:
            encoding = "latin-1"  # which has a letter for every byte
            text = content.decode(encoding)
        notes = [f"{path.name} is not UTF-8; it was read as {encoding}: save it as UTF-8 if names look wrong."]
    if "\0" in text:
        raise UserError(f"{path} is no text: is it a .csv file?")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"\A( *\n)+", "", text), notes


def read_csv(text: str, path: Path, untimed: bool = False) -> tuple[pd.DataFrame, list[str]]:
    """A text's columns by name, and what was done, a sentence each.

    Args:
        text: As `decode` has it.
        path: Its file, for messages.
        untimed: As `read_frame` has it.

    Raises:
        UserError: Nothing but spaces; one column only; no rows; a row with more cells than there are names; a name that
            is there twice.
    """
    text, separator = find_separator(text)
    if not text.strip():
        raise UserError(f"{path} is empty.")
    lines = split_cells(text, separator)
    first = [cell.strip() for cell in next(lines)]
    first_ends = lines.line_num  # not 1 where a name has line breaks in it
    rest = text.split("\n", first_ends)[-1]
    if len(first) < 2 and not untimed:
        refuse_one_column(first, rest, path)
    sample = list(islice(filter(None, lines), SAMPLE))
    if untimed and all(is_number(cell) for cell in first if cell.strip()):
        names = number_columns(len(first))
    else:
        names = name_columns(first, sample, path)
    notes = []
    if names:  # which were made up, as the first row is no header
        sample.insert(0, first)
        shown = names if len(names) <= 4 else [*names[:3], "...", names[-1]]
        notes.append(f"{path.name} has no header: its columns are called {', '.join(shown)}.")
    else:
        text, names = rest, name_nameless(first)
    refuse_equal_names(names, path)
    if not sample:
        raise UserError(f"{path} has a header but no rows.")
    widest = refuse_long_rows(chain(sample, filter(None, lines)), len(names), path)
    names += [nameless(i) for i in range(len(names), widest)]
    frame, more = leave_out_empty_rows(read_cells(text, separator, names, sample))
    return frame, notes + more


def split_cells(text: str, separator: str):
    """Python's reader of a text's rows, as lists of cells."""
    return csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True)


def find_separator(text: str) -> tuple[str, str]:
    """A text, without the line that tells Excel its separator, if it has one, and the separator: that which the line
    tells, or which cuts the first row and all that follow into cells; a comma if there is no other."""
    if line := re.match(r'"?sep=(.)"?\n', text):
        return text[line.end() :], line[1]
    for separator in SEPARATORS[:-1]:
        rows = filter(None, islice(split_cells(text, separator), SAMPLE))
        if min(map(len, rows), default=0) > 1:
            return text, separator
    return text, SEPARATORS[-1]


def refuse_one_column(first: list[str], rest: str, path: Path) -> None:
    """Raise for a first row of one cell: whatever the rows after it have, is it a title or the only column?"""
    lines = [line for line in rest.lstrip("\n").split("\n")[:SAMPLE] if line]
    rows = (next(split_cells(line, find_separator(line)[1])) for line in lines)
    longer = next((row for row in rows if len(row) > 1), [])
    if longer and not all(map(is_number, longer)):  # 1,5 is one number
        raise UserError(
            f"{path} begins with a line of one cell, {first[0]!r}, and its rows have more: take out what stands "
            "above the line of names."
        )
    raise UserError(
        f"{path} has one column only, {''.join(first)}: commas, semicolons or tabs must separate columns. One "
        "series without time stamps needs --freq, which says how far apart its rows are."
    )


def number_columns(count: int) -> list[str]:
    """Names of columns that have none."""
    return [str(i + 1) for i in range(count)]


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
    before = [nameless(i) for i in range(places[0])]
    return [*before, "date", *number_columns(len(first) - places[0] - 1)]


def name_nameless(header: list[str]) -> list[str]:
    """A header in which names that are empty are filled in, as pandas does."""
    # an index that was written twice left a column of that name already
    return [name or nameless(i) + ".1" * (nameless(i) in header) for i, name in enumerate(header)]


def nameless(i: int) -> str:
    """What pandas calls a column without a name."""
    return f"Unnamed: {i}"


def refuse_equal_names(names: list[str], source: str | Path) -> None:
    if len(names) > len(set(names)):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise UserError(f"{source} has two columns {twice}: rename one.")


def refuse_long_rows(rows: chain, named: int, path: Path) -> int:
    """Raise for a row with more cells than there are names, empty ones at its end aside; otherwise, how many cells the
    longest row has, or names there are."""
    widest = named
    for number, row in enumerate(rows, 1):
        widest = max(widest, len(row))
        if any(map(str.strip, row[named:])):
            raise UserError(
                f"{path}, row {number} has {len(row)} cells, and the header {named}: give each row as many. "
                "A number with a comma needs quotes, or another separator than the comma."
            )
    return widest


def read_cells(text: str, separator: str, names: list[str], sample: Sequence[list[str]]) -> pd.DataFrame:
    """A text without a header as pandas reads it, but that it decides less about what cells mean: what may be numbers
    with separators of thousands is text, and NA among words is a word.

    Args:
        text: The rows.
        separator: Of their cells.
        names: Of the columns, as many as the longest row has cells.
        sample: The first rows' cells.
    """
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
    return frame


def holds_words(column: pd.Series) -> bool:
    """Whether what a column holds is text, and no numbers."""
    cells = column.dropna().iloc[:SAMPLE]
    return len(cells) > 0 and all(isinstance(cell, str) and not is_number(cell) for cell in cells)


def leave_out_empty_rows(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    empty = frame.isna().all(axis=1)
    if empty.all() or not empty.any():
        return frame, []
    kept = frame[~empty].reset_index(drop=True).infer_objects()
    return kept, [f"{int(empty.sum())} rows without any value were left out."]
