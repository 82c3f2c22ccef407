"""Numbers as people write them: decimal commas, thousands separators, and values that cannot be meant."""

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pandas as pd

from ..command.errors import UserError

__all__ = [
    "is_number",
    "is_text",
    "number_texts",
    "parse_numbers",
    "points_of_thousands",
    "refuse_extremes",
    "refuse_sentinels",
    "rewrite",
    "to_float64",
    "to_whole",
]

SENTINELS = (-9999.0, -999.0, -99999.0, -999.9, -9999.9, 9999.0, 99999.0, 999999.0)
SPACES = re.compile(r"(?<=\d)[ '\u2019\u00a0\u202f](?=\d{3}(?!\d))")  # between thousands
POWER = r"(?:[eE][+-]?\d+)?"
# 1,234 and 1,234.5; 1,5 and 1.234,5: an integer may be either
THOUSANDS_COMMA = re.compile(r"[+-]?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d*)?")
DECIMAL_COMMA = re.compile(rf"[+-]?(?:\d*|[1-9]\d{{0,2}}(?:\.\d{{3}})+),\d+{POWER}")
THOUSANDS_POINT = re.compile(r"[+-]?[1-9]\d{0,2}(?:\.\d{3})+")
# Squares of larger numbers overflow in their sum.
LARGEST = 1e150
# A float32 has 24 bits: what lies closer together than this share of the deviation becomes one value.
RESOLUTION = 1e-6


def is_number(text: str) -> bool:
    """Whether a cell is a number, however it is written."""
    text = SPACES.sub("", text.strip())
    try:
        return np.isfinite(float(text))
    except ValueError:
        return any(form.fullmatch(text) for form in (THOUSANDS_COMMA, DECIMAL_COMMA, THOUSANDS_POINT))


def is_text(column: pd.Series) -> bool:
    """Whether a column may hold text."""
    return column.dtype == object or pd.api.types.is_string_dtype(column)


def texts(column: pd.Series) -> list[str]:
    """What cells hold that are text, each once."""
    cells = column if is_text(column) else ()
    return list(dict.fromkeys(cell.strip() for cell in cells if isinstance(cell, str)))


def number_texts(column: pd.Series) -> np.ndarray:
    """What cells hold that are numbers, but only without their separators, each once."""
    cells = texts(column)
    separated = (c for c in cells if "," in c or c.count(".") > 1 or SPACES.search(c))
    return np.array([*filter(is_number, separated), *points_of_thousands(cells)], dtype=object)


def rewrite(frame: pd.DataFrame, source: str) -> tuple[pd.DataFrame, list[str]]:
    """Numbers that are written with decimal commas or thousands separators, as Python's.

    Args:
        frame: Columns of numbers; those that hold text are changed.
        source: What messages call the file.

    Raises:
        UserError: Commas that may be either, or are both.
    """
    separated = [cell for c in frame for cell in number_texts(frame[c])]
    if not separated:
        return frame, []
    cells = {c: [SPACES.sub("", cell) for cell in texts(frame[c])] for c in frame if is_text(frame[c])}
    decimal = find_decimal(cells, source)
    other = "." if decimal == "," else ","

    def python(cell: str) -> str:
        return SPACES.sub("", cell.strip()).replace(other, "").replace(decimal, ".")

    @lru_cache(maxsize=2**16)
    def number(cell: str) -> float | str:
        return float(python(cell)) if is_number(cell) else cell

    for c in cells:
        read = [number(cell) if isinstance(cell, str) else cell for cell in frame[c]]
        frame = frame.assign(**{c: pd.Series(read, frame.index, dtype=object)})
    return frame, [
        f"Numbers were read with a decimal {'comma' if decimal == ',' else 'point'}: {separated[0]} is "
        f"{python(separated[0])}."
    ]


def find_decimal(cells: dict[str, list[str]], source: str) -> str:
    """The decimal sign that the cells of all columns, without spaces between thousands, have in common."""
    every = [cell for column in cells.values() for cell in column]
    comma = [c for c in every if "," in c and is_number(c)]
    point = [c for c in every if "." in c and "," not in c and is_number(c)]
    thousands = [c for c in comma if not DECIMAL_COMMA.fullmatch(c)]
    decimals = [c for c in comma if not THOUSANDS_COMMA.fullmatch(c)]
    either = [c for c in comma if DECIMAL_COMMA.fullmatch(c) and THOUSANDS_COMMA.fullmatch(c)]
    points = [c for c in point if not THOUSANDS_POINT.fullmatch(c)]  # which can only be decimal
    groups = [c for c in every if c.count(".") > 1 or ("." in c and DECIMAL_COMMA.fullmatch(c))]
    groups += [cell for column in cells.values() for cell in points_of_thousands(column)]
    as_comma, as_point = [*decimals, *groups], [*thousands, *points]
    if as_comma and as_point:
        raise UserError(f"{source} writes numbers in two ways, {as_comma[0]} and {as_point[0]}: write them in one.")
    if as_comma:
        if (doubtful := [c for c in point if c not in groups]) and not groups:
            raise UserError(
                f"{source} has decimal commas ({as_comma[0]}), and {doubtful[0]}: write it without the point."
            )
        return ","
    if either and not as_point and not any(beside_integers(column, THOUSANDS_COMMA) for column in cells.values()):
        text = either[0]
        raise UserError(
            f"{source} holds {text}, which may be {text.replace(',', '')} or {text.replace(',', '.')}: "
            "write thousands without separators, and decimals with a point."
        )
    return "."


def points_of_thousands(cells: Sequence[str]) -> list[str]:
    """Those of a column that Python would read as decimals, such as 1.230, where they are thousands."""
    pointed = [c for c in cells if "." in c]
    thousands = all(map(THOUSANDS_POINT.fullmatch, pointed)) and beside_integers(cells, THOUSANDS_POINT)
    return pointed if thousands else []


def beside_integers(cells: Sequence[str], form: re.Pattern) -> bool:
    """Whether 1,230 stands beside 987. With three decimals that would be 987,000, and with no more than needed 1,23."""
    whole = [c for c in cells if re.fullmatch(r"[+-]?\d+", c)]
    grouped = [c for c in cells if form.fullmatch(c)]
    return bool(whole) and all(len(c.lstrip("+-")) <= 3 for c in whole) and any(c.endswith("0") for c in grouped)


def to_float64(column: pd.Series) -> np.ndarray:
    """Cells as float64, NaN for those that are missing or no numbers."""
    # what holds numbers is not parsed: pandas loses the missing ones of Arrow's decimals there
    if not pd.api.types.is_any_real_numeric_dtype(column):
        column = pd.to_numeric(column.astype(object) if is_text(column) else column, errors="coerce")
    return column.to_numpy(dtype=np.float64, na_value=np.nan)


def to_whole(column: pd.Series) -> np.ndarray | None:
    """Cells as float64 where all are whole numbers, as text or as such; None of another column."""
    if not (is_text(column) or pd.api.types.is_any_real_numeric_dtype(column)):
        return None
    numbers = to_float64(column)
    with np.errstate(invalid="ignore"):  # of infinity
        return numbers if (numbers % 1 == 0).all() else None


def name_row(row: int, names: pd.Index | None) -> str:
    """What messages call a row: by its number, from 1, or as it is named."""
    return f"row {row + 1}" if names is None else f"at {names[row]}"


def parse_numbers(column: pd.Series, source: str, future: bool = False, rows: pd.Index | None = None) -> np.ndarray:
    """A column as float64, NaN where it is empty.

    Args:
        column: As read.
        source: What messages call the file.
        future: It is a known-future column.
        rows: What messages call the rows, if not by number.

    Raises:
        UserError: A cell that is no finite number.
    """
    kind, option = pd.api.types, "--future-columns" if future else "--targets"
    if not (is_text(column) or kind.is_bool_dtype(column) or kind.is_any_real_numeric_dtype(column)):
        if not isinstance(column.dtype, pd.CategoricalDtype):
            raise UserError(
                f"Column {column.name} of {source} holds {column.dtype}, no numbers: leave it out with {option}."
            )
        column = column.astype(object)
    numbers = to_float64(column)
    wrong = np.flatnonzero((np.isnan(numbers) & column.notna().to_numpy()) | np.isinf(numbers))
    if len(wrong):
        cell = column.iloc[wrong[0]]
        shown = repr(cell) if isinstance(cell, str) else cell
        raise UserError(
            f"Column {column.name} of {source}, {name_row(wrong[0], rows)}: {shown} is no finite number ({len(wrong)} "
            f"such cells). Correct them, leave them empty, or choose other columns with {option}."
        )
    return numbers


def refuse_sentinels(numbers: pd.DataFrame, keep: Sequence[float], source: str) -> None:
    """Raise for -9999 and its like where it lies far outside the column's other values."""
    for name, column in numbers.items():
        for value in SENTINELS:
            others = column[(column != value) & column.notna()]
            count = int((column == value).sum())
            if not count or value in keep or others.empty:
                continue
            if min(abs(others.min() - value), abs(others.max() - value)) > 2 * (others.max() - others.min()):
                fill = " --missing interpolate" if 2 * count <= len(column) else ", or leave it out with --targets"
                raise UserError(
                    f"Column {name} of {source} holds {value:g} in {count} rows, its other values lie between "
                    f"{others.min():g} and {others.max():g}: does it stand for a missing value? "
                    f"Then add --na-values {value:g}{fill}; if not, --keep-values {value:g}."
                )


def refuse_extremes(numbers: pd.DataFrame, source: str, rows: pd.Index | None = None) -> None:
    """Raise for a value beside which a column's others cannot be told apart once they are standardised; messages call
    rows as `rows` does, or by number."""
    for name, column in numbers.items():
        values = column.to_numpy()
        known = np.flatnonzero(~np.isnan(values))
        if not len(known) or values[known].min() == values[known].max():
            continue
        # halves, since the difference of the largest numbers is infinite
        distance = np.abs(values[known] / 2 - np.median(values[known]) / 2)
        order = np.argsort(distance, kind="stable")
        middle = values[known[order[: len(known) - max(len(known) // 100, 1)]]]
        spread = middle.max() / 2 - middle.min() / 2 if len(middle) else 0.0
        with np.errstate(over="ignore", under="ignore"):
            deviation = values[known].std()
        row = int(known[order[-1]])
        value, usual = float(values[row]), float(np.median(values[known]))
        if deviation == 0 or abs(usual) > LARGEST:
            raise UserError(
                f"Column {name} of {source} holds values of about {usual:g}, whose deviation is 0 or infinite in "
                "float64: give it in other units, or leave it out with --targets."
            )
        if np.abs(values[known]).max() > LARGEST or 0 < spread < RESOLUTION * deviation:
            raise UserError(
                f"Column {name} of {source}, {name_row(row, rows)}: beside {value!r} the other values, about "
                f"{usual:g}, cannot be told apart. Correct it, or add --na-values {value!r} --missing interpolate if "
                "it stands for a missing value."
            )
