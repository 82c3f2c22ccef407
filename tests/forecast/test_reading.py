"""Files as people write them, and DataFrames: read where they can mean one thing only, else one line."""

import bz2
import io
import lzma
import zipfile
from contextlib import suppress

import pytest

pytest.importorskip("pandas", reason="vim2.forecast needs pandas")

import numpy as np
import pandas as pd
from forecast_helpers import make_frame, write_csv

from vim2.forecast import UserError, fit
from vim2.forecast.cli import main
from vim2.forecast.steps import to_offset
from vim2.forecast.table import read_table


@pytest.fixture
def frame():
    """Numbers with two decimals, some above a thousand, and integers, whose dates have no day after the twelfth."""
    values = np.round(np.random.default_rng(0).normal(0, 2000, 60), 2)
    dates = pd.date_range("2024-02-10", periods=60, freq="h")
    return pd.DataFrame({"date": dates, "a": values, "b": np.arange(60)})


def read(tmp_path, text, **options):
    path = tmp_path / "a.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_table(path, **options)


def refusal(tmp_path, text, **options):
    with pytest.raises(UserError) as error:
        read(tmp_path, text, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def grouped(value, decimal=".", thousands=","):
    return f"{value:,.2f}".replace(",", "_").replace(".", decimal).replace("_", thousands)


def text(frame, **options):
    return frame.to_csv(index=False, **options)


FORMS = {
    "semicolons": lambda f: text(f, sep=";"),
    "semicolons and decimal commas": lambda f: text(f, sep=";", decimal=","),
    "a separator that is named": lambda f: "sep=;\n" + text(f, sep=";", decimal=","),
    "quoted decimal commas": lambda f: text(f, decimal=","),
    "thousands": lambda f: text(f.assign(a=f["a"].map(grouped))),
    "thousands with points": lambda f: text(f.assign(a=[grouped(v, ",", ".") for v in f["a"]]), sep=";"),
    "thousands with spaces": lambda f: text(f.assign(a=[grouped(v, ",", "\u202f") for v in f["a"]]), sep=";"),
    "tabs": lambda f: text(f, sep="\t"),
    "bars": lambda f: text(f, sep="|"),
    "a byte order mark": lambda f: text(f).encode("utf-8-sig"),
    "UTF-16 and tabs": lambda f: text(f, sep="\t").encode("utf-16"),
    "old line ends": lambda f: text(f, lineterminator="\r"),
    "commas at the end of rows": lambda f: text(f).replace("\n", ",\n").replace("b,\n", "b\n", 1),
    "commas at the end of all lines": lambda f: text(f).replace("\n", ",,\n"),
    "empty lines of commas": lambda f: text(f) + ",,\n" * 3,
    "an index": lambda f: f.to_csv(),
    "an index of chosen rows": lambda f: f.set_axis(f.index * 2).to_csv(),
    "an index written twice": lambda f: pd.read_csv(io.StringIO(f.to_csv())).to_csv(),
    "an index that became a column": lambda f: text(f.reset_index()),
    "date and time apart": lambda f: text(
        f.assign(date=f["date"].dt.strftime("%d/%m/%Y")).assign(Time=f["date"].dt.strftime("%H.%M.%S"))
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_can_mean_one_thing_only_is_read(tmp_path, frame, form):
    table = read(tmp_path, FORMS[form](frame))
    assert table.columns == ["a", "b"] and table.times.equals(pd.DatetimeIndex(frame["date"], name=table.times.name))
    np.testing.assert_allclose(table.values, frame[["a", "b"]].to_numpy(), rtol=1e-15)
    plain = ("semicolons", "tabs", "bars", "a byte order mark", "UTF-16 and tabs", "old line ends")
    assert bool(table.repairs) != (form in plain)


def test_an_index_that_was_asked_for_stays(tmp_path, frame):
    assert read(tmp_path, frame.to_csv(), targets=["Unnamed: 0", "a"]).columns == ["Unnamed: 0", "a"]


def test_numbers_are_read_to_their_last_bit(tmp_path, frame):
    frame["a"] = np.random.default_rng(0).normal(size=60)  # of 17 digits, of which pandas 2 loses the last
    for options in ({}, {"sep": ";", "decimal": ","}):
        assert (read(tmp_path, text(frame, **options)).values[:, 0] == frame["a"]).all()


@pytest.mark.parametrize("index", [False, True])
def test_without_a_header_no_row_is_lost_and_columns_are_numbered(tmp_path, frame, index):
    table = read(tmp_path, frame.to_csv(header=False, index=index))
    assert table.columns == ["1", "2"] and len(table) == 60 and "no header" in table.repairs[0]
    np.testing.assert_allclose(table.values, frame[["a", "b"]].to_numpy(), rtol=1e-15)


def test_numbers_and_nothing_are_names_too(tmp_path, frame):
    for name in ("date", None):
        numbered = frame.set_index("date").set_axis([0, 1], axis=1).rename_axis(name)
        table = read(tmp_path, numbered.to_csv())
        assert table.columns == ["0", "1"] and len(table) == 60 and not table.repairs


@pytest.mark.parametrize("thousands", [",", "."])
def test_integers_with_thousands(tmp_path, frame, thousands):
    written = frame.assign(a=[f"{v:,}".replace(",", thousands) for v in range(990, 1050)])
    for given in (written, written[::-1].reset_index(drop=True).assign(date=frame["date"])):
        table = read(tmp_path, text(given, sep=";"))
        assert sorted(table.values[:, 0]) == list(range(990, 1050)) and f"1{thousands}0" in table.repairs[0]
        assert (table.values[:, 1] == given["b"]).all()
    decimal = "point" if thousands == "," else "comma"
    assert f"decimal {decimal}" in table.repairs[0]
    # three decimals of each, as many as there are, and with other decimals are no thousands
    for cells in ([f"{v / 1000:.3f}" for v in range(990, 1050)], [*range(100, 130), *(f"{v}.5" for v in range(30))]):
        table = read(tmp_path, text(frame.assign(a=cells), sep=";"))
        assert table.values[:, 0].tolist() == [float(c) for c in cells] and not table.repairs


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: text(f.assign(s="x"), header=False), ["no header", "2024-02-10 00:00:00"]),
        (lambda f: text(f) + "2024-02-12 12:00:00,1,5,2\n", ["row 61 has 4 cells", "the header 3"]),
        (lambda f: text(f, header=False) + "2024-02-12 12:00:00,1,5,2\n", ["row 61 has 4 cells", "the header 3"]),
        (lambda f: text(f.assign(a=[f"1,{100 + i}" for i in f.b])), ["1,100", "may be 1100 or 1.100"]),
        (lambda f: text(f.assign(a="1,5", b="1,234.5")), ["two ways", "1,5 and 1,234.5"]),
        (lambda f: text(f.assign(a="1,871"), sep=";"), ["may be 1871 or 1.871", "decimals with a point"]),
        (lambda f: text(f.assign(a="1,5", b="1.25")), ["two ways", "1,5 and 1.25"]),
        (lambda f: text(f.assign(a="1,5", b="1.234")), ["decimal commas (1,5)", "1.234"]),
        (lambda f: text(f.assign(date=f.date.dt.strftime("%H:%M"))), ["times without dates", "00:00"]),
        (lambda f: text(f.assign(date=f.date.astype(str) + " CET")), ["row 1", "CET", "no time stamp"]),
        (lambda f: text(f.assign(date=f.date.dt.strftime("%d.%m.%Y %H:%M MEZ"))), ["row 1", "MEZ", "no time stamp"]),
        (lambda f: text(f.assign(date=["45/99/2024", *f.date[1:].dt.strftime("%d/%m/%Y")])), ["row 1", "45/99/2024"]),
        (lambda f: text(f) + '2024-02-12 12:00:00,"' + "x" * 200_000, ["field larger", "a whole file"]),
        (lambda f: b"\x00\x01\x02\x00\x00", ["no text"]),
        (lambda f: "sep=;\n", ["is empty"]),
    ],
)
def test_what_may_mean_several_things_is_refused(tmp_path, frame, change, words):
    error = refusal(tmp_path, change(frame))
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    "form",
    ["%d-%b-%y %H:%M", "%d %B %Y %H:%M", "%H:%M %d/%m/%Y", "%a %d/%m/%Y %H:%M", "%d/%m/%y %I:%M %p", "%Y/%m/%d %H"],
)
def test_dates_in_other_forms(tmp_path, frame, form):
    frame["date"] += pd.Timedelta(days=1)  # to the thirteenth
    table = read(tmp_path, text(frame.assign(date=frame["date"].dt.strftime(form))))
    assert (table.times == frame["date"]).all()


def test_a_month_and_two_digits_are_of_a_year(tmp_path):
    months = make_frame(120, start="1995-01-01", step="MS")
    table = read(tmp_path, text(months.assign(date=months["date"].dt.strftime("%b-%y"))))
    assert (table.times == months["date"]).all()


@pytest.mark.parametrize(
    ("form", "order"),
    [("%d/%m/%Y", "day"), ("%d.%m.%y", "day"), ("%m/%d/%Y", "month"), ("%m-%d-%y", "month"), ("%y/%m/%d", "year")],
)
def test_of_two_readings_of_dates_the_one_with_a_constant_step_is_taken(tmp_path, form, order):
    months = make_frame(120, start="2010-01-01", step="MS")
    table = read(tmp_path, text(months.assign(date=months["date"].dt.strftime(form))))
    assert (table.times == months["date"]).all() and table.step.freqstr == "MS" and table.dates == f"{order}-first"
    assert f"Dates were read as {order}, " in table.repairs[0] and "a constant step" in table.repairs[0]


def test_months_with_a_gap_are_still_months(tmp_path):
    months = make_frame(120, start="2010-01-01", step="MS")
    written = text(months.drop(index=50).assign(date=months["date"].dt.strftime("%d/%m/%Y")))
    assert "not all MS apart" in refusal(tmp_path, written)
    table = read(tmp_path, written, times="regular", missing="interpolate")
    assert (table.times == months["date"]).all()
    assert "but for 1 rows" in table.repairs[0] and "1 missing rows were added" in table.repairs[1]


def test_where_steps_do_not_tell_the_order_must_be_said(tmp_path):
    days = make_frame(12, start="2024-01-01", step="D")  # or the first days of twelve months
    written = text(days.assign(date=days["date"].dt.strftime("%d/%m/%Y")).iloc[1:])
    error = refusal(tmp_path, written)
    assert "'02/01/2024' may be 2024-01-02 or 2024-02-01" in error
    assert "--dates day-first or --dates month-first" in error
    assert read(tmp_path, written, dates="day-first").step.freqstr == "D"
    assert read(tmp_path, written, dates="month-first").step.freqstr == "MS"
    iso = text(days)
    assert read(tmp_path, iso, dates="month-first").times.equals(read(tmp_path, iso).times)


def test_months_on_another_day_than_the_first(tmp_path):
    months = make_frame(120, start="2010-01-01", step="MS")
    fifth = months.assign(date=(months["date"] + pd.Timedelta(days=4)))
    table = read(tmp_path, text(fifth.assign(date=fifth["date"].dt.strftime("%d/%m/%Y"))), times="keep")
    assert (table.times == fifth["date"]).all() and "day, month, year" in table.repairs[0]
    error = refusal(tmp_path, text(fifth))
    assert "do not lie whole steps" in error and "--times keep" in error and "--times regular" not in error


def test_days_without_separators(tmp_path):
    days = make_frame(60, step="D")
    written = days.assign(date=days["date"].dt.strftime("%Y%m%d"))
    for given in (written, written.astype({"date": int})):
        assert (read_table(given).times == days["date"]).all()
    indexed = read(tmp_path, written.set_index("date").rename_axis(None).to_csv())
    assert (indexed.times == days["date"]).all() and not indexed.repairs
    table = read(tmp_path, text(written, header=False))
    assert len(table) == 60 and (table.times == days["date"]).all()
    assert "'20240230' is no time stamp" in refusal(tmp_path, text(written.replace({"date": {"20240229": "20240230"}})))


@pytest.mark.parametrize("step", ["BMS", "BME", "BQE", "QE-JAN", "YS-APR", "WOM-2FRI", "WOM-4TUE", "LWOM-FRI"])
def test_a_gap_in_months_of_any_kind_is_filled(step):
    times = pd.date_range("1990-01-01", periods=61, freq=to_offset(step))
    frame = make_frame(61).assign(date=times)
    table = read_table(frame.drop(index=[9, 30]), times="regular", missing="interpolate")
    assert (table.times == times).all() and "2 missing rows were added" in " ".join(table.repairs)


def test_na_is_a_word_among_words_and_missing_among_numbers(tmp_path, frame):
    long = frame.rename(columns={"date": "ds"}).melt(id_vars="ds", var_name="unique_id", value_name="y")
    long["unique_id"] = long["unique_id"].map({"a": "NA", "b": "DE"})  # Namibia and Germany
    long["continent"] = long["unique_id"].map({"NA": "null", "DE": "Europe"})
    table = read(tmp_path, text(long), static_columns=["continent"])
    assert table.columns == ["NA", "DE"] and table.static["continent"].tolist() == ["null", "Europe"]
    for missing in ("NA", "null", ""):
        for others in (frame["b"], frame["b"] > 7, [f"{b},5" for b in frame["b"]]):
            cells = pd.Series(others, dtype=object).where(frame.index != 3, missing)
            table = read(tmp_path, text(frame.assign(a=cells)[["date", "a"]], sep=";"), missing="mask")
            assert np.flatnonzero(np.isnan(table.values[:, 0])).tolist() == [3]
    assert "'NULL' is no time stamp" in refusal(tmp_path, text(frame.assign(date=[*frame["date"][1:], "NULL"])))


def test_business_days_with_holidays_do_not_become_weekends(tmp_path):
    days = make_frame(90, step="B")
    table = read(tmp_path, text(days.drop(index=[20, 40])), times="regular", missing="interpolate")
    assert (table.times == days["date"]).all() and "2 missing rows were added" in table.repairs[0]


@pytest.mark.parametrize("start", ["2024-03-30", "2024-10-26"])
def test_offsets_over_a_change_to_summer_time_and_back(tmp_path, frame, start):
    times = pd.date_range(start, periods=60, freq="h", tz="Europe/Berlin")
    table = read(tmp_path, text(frame.assign(date=[t.isoformat() for t in times])))
    assert table.step.freqstr == "h" and (table.times == times).all() and str(table.times.tz) == "UTC"
    assert table.repairs == ["Time stamps were converted to UTC."]
    for given in (frame.assign(date=times), frame.set_index(times)[["a", "b"]]):
        assert read_table(given).times.equals(table.times) and read_table(given).repairs == table.repairs
    utc = frame.assign(date=[t.tz_convert("UTC").strftime("%Y-%m-%dT%H:%M:%SZ") for t in times])
    assert read(tmp_path, text(utc)).times.equals(table.times) and not read(tmp_path, text(utc)).repairs


@pytest.mark.parametrize("form", ["%d/%m/%Y %H:%M %z", "%m/%d/%Y %I:%M %p %z", "%a %b %d %Y %H:%M:%S GMT%z (CET)"])
def test_offsets_after_other_forms(tmp_path, frame, form):
    times = pd.date_range("2024-03-30", periods=60, freq="h", tz="Europe/Berlin")
    table = read(tmp_path, text(frame.assign(date=times.strftime(form))))
    assert (table.times == times).all() and "Time stamps were converted to UTC." in table.repairs


def test_midnights_over_a_change_to_summer_time_stay_days(tmp_path, frame):
    times = pd.date_range("2024-03-01", periods=60, freq="D", tz="Europe/Berlin")
    table = read(tmp_path, text(frame.assign(date=[t.isoformat() for t in times])))
    assert table.step.freqstr == "D" and (table.times == times.tz_localize(None)).all()
    assert "offsets of the time stamps were left out" in table.repairs[0]


@pytest.mark.parametrize(
    ("start", "step", "clock"),
    [
        ("2024-01-01", "D", True),  # without a change of the clock, too: a day's name is that of its midnight
        ("2024-02-20", "D", True),
        ("2010-01-01", "MS", True),
        ("2010-01-01", "YS", True),
        ("2024-03-30", "h", False),
        ("2024-01-10", "6h", False),
    ],
)
@pytest.mark.parametrize("gaps", [[], [7, 40]])
def test_days_go_by_the_clock_and_hours_by_utc_in_any_order_with_gaps(tmp_path, frame, start, step, clock, gaps):
    times = pd.date_range(start, periods=60, freq=step).tz_localize("Europe/Berlin" if clock else "UTC")
    expected, frame = times.tz_localize(None) if clock else times, frame.assign(date=times.tz_convert("Europe/Berlin"))
    shuffled = frame.drop(index=gaps).sample(frac=1, random_state=0)
    for given in (shuffled, write_csv(tmp_path / "a.csv", shuffled)):
        table = read_table(given, times="regular", missing="interpolate")
        assert table.times.tolist() == expected.tolist()
        if not gaps:
            np.testing.assert_array_equal(table.values, frame[["a", "b"]])
    table = read_table(frame)
    last = pd.date_range(table.times[-1], periods=4, freq=table.step)  # over a change of the clock
    assert (table.in_zone(last) == pd.date_range(times[-1], periods=4, freq=step)).all()


def test_some_offsets_are_none(tmp_path, frame):
    dates = frame["date"].astype(str).tolist()
    assert "row 2" in refusal(tmp_path, text(frame.assign(date=[dates[0] + "+01:00", *dates[1:]])))


@pytest.mark.parametrize("value", [9e307, -1.7976931348623157e308, 1e30, 1e200])
def test_a_value_beside_which_the_others_vanish_is_named(tmp_path, frame, value):
    frame.loc[7, "a"] = value
    error = refusal(tmp_path, text(frame))
    assert "Column a" in error and "row 8" in error and f"--na-values {value!r}" in error
    table = read(tmp_path, text(frame), na_values=[value], missing="interpolate")
    assert np.abs(table.values).max() < 1e5


@pytest.mark.parametrize("factor", [1e-200, 1e300])
def test_columns_of_values_without_a_deviation_are_named(tmp_path, frame, factor):
    error = refusal(tmp_path, text(frame.assign(a=frame["a"].abs() * factor)))
    assert "Column a" in error and "other units" in error


@pytest.mark.parametrize("times", ["error", "regular"])
def test_no_table_is_mostly_made_up(tmp_path, times):
    months = make_frame(120, start="2010-01-01", step="MS")
    written = text(months.assign(date=months["date"].dt.strftime("%d/%m/%Y")))
    options = dict(times=times, missing="interpolate")
    misread = refusal(tmp_path, written, dates="month-first", **options)
    assert "most of them made up" in misread and "--dates" in misread and "--times regular" not in misread
    hours = make_frame(80)
    gaps = refusal(tmp_path, text(hours[(hours.index < 10) | (hours.index > 60)]), **options)
    assert "most of them made up" in gaps and "--times regular" not in gaps
    below = refusal(tmp_path, text(pd.concat([make_frame(50, seed=i) for i in range(3)])), **options)
    assert "100 of 150 rows" in below and "several series" in below and "--times regular" not in below
    days = refusal(tmp_path, text(hours.assign(date=hours["date"].dt.date)), **options)
    assert "time of day in another column" in days


def test_mostly_empty_columns_are_not_advised_to_be_filled(tmp_path, frame):
    frame.loc[frame.index % 3 > 0, "a"] = np.nan
    error = refusal(tmp_path, text(frame))
    assert "a (40)" in error and "Leave a out with --targets" in error and "--missing" not in error
    error = refusal(tmp_path, text(frame.fillna(-99999)))
    assert "--na-values -99999" in error and "--missing" not in error


def test_data_frames(frame):
    expected = read_table(frame)
    assert expected.columns == ["a", "b"] and (expected.times == frame["date"]).all() and not expected.repairs
    indexed = frame.set_index("date")
    periods = indexed.set_axis(indexed.index.to_period("h"))
    for given in (indexed, indexed.rename_axis(None), periods, frame.assign(date=frame["date"].astype(str))):
        before = given.copy()
        table = read_table(given)
        assert table.columns == ["a", "b"] and table.times.equals(expected.times.rename(table.times.name))
        assert (table.values == expected.values).all()
        pd.testing.assert_frame_equal(given, before)
    # the index of time stamps is the time, whatever a column is called
    assert read_table(indexed.assign(time=1.0)).columns == ["a", "b", "time"]
    assert read_table(frame[frame.index % 2 == 0]).columns == ["a", "b"]
    numbered = frame.set_axis(["date", 1, 2], axis=1)
    assert read_table(numbered).columns == ["1", "2"]
    nullable = read_table(frame.assign(b=frame["b"].astype("Int64")))
    assert (nullable.values == expected.values).all()


@pytest.mark.parametrize(
    ("write", "step", "told"),
    [
        (lambda d: d.strftime("%G-W%V"), "7D", "Of spans of time such as 2019-W01, the first day"),
        (lambda d: d.strftime("%GW%V"), "7D", "such as 2019W01"),
        (lambda d: d.strftime("%G-W%V-%u"), "7D", "such as 2019-W01-1"),
        (lambda d: d.strftime("%YM%m"), "MS", "such as 2019M01"),
        (lambda d: f"{d.year}M{d.month}", "MS", "such as 2019M1"),
        (lambda d: f"Q{d.quarter} {d.year}", "QS", "such as Q1 2019"),
        (lambda d: f"{d.year}-Q{d.quarter}", "QS", "such as 2019-Q1"),
        (lambda d: f"{d.year} Q{d.quarter}", "QS", "such as 2019 Q1"),
        (lambda d: d.strftime("%b %Y"), "MS", ""),
        (lambda d: d.strftime("%Y%m"), "MS", "Column year holds months, such as 201901."),
        (lambda d: d.year, "YS", "Column year holds years, such as 2019."),
        (lambda d: float(d.year), "YS", "Column year holds years, such as 2019."),
    ],
    ids=[
        *(
            "week",
            "compact week",
            "day of a week",
            "month",
            "short month",
            "quarter",
            "year and quarter",
            "spaced quarter",
        ),
        *("name of a month", "month in digits", "year", "year as a float"),
    ],
)
def test_weeks_months_quarters_and_years(tmp_path, write, step, told):
    start = "2018-12-31" if step == "7D" else "2019-01-01"  # the Monday of the first week
    times = pd.date_range(start, periods=100, freq=step)
    frame = pd.DataFrame({"year": [write(d) for d in times], "a": np.arange(100) ** 0.5})
    for data in (frame, write_csv(tmp_path / "a.csv", frame)):
        table = read_table(data)
        assert table.times.tolist() == times.tolist() and table.columns == ["a"] and told in " ".join(table.repairs)
    indexed = read_table(frame.set_index("year"))
    assert indexed.times.equals(times) and indexed.columns == ["a"] and told in " ".join(indexed.repairs)
    long = frame.rename(columns={"year": "ds", "a": "y"})
    long = pd.concat([long.assign(unique_id="late")[50:], long.assign(unique_id="early")])
    for rows in (long, long[::-1], long.sample(frac=1, random_state=0)):
        assert read_table(rows, missing="mask").times.tolist() == times.tolist()


@pytest.mark.parametrize(
    ("name", "step", "form"), [("Fiscal Year", "YS", "%Y"), ("month", "MS", "%Y%m"), ("Jahr", "YS", "%Y")]
)
def test_years_and_months_with_gaps_or_backwards_where_the_column_is_surely_one(name, step, form):
    times = pd.date_range("1990-01-01", periods=30, freq=step)
    frame = pd.DataFrame({name: times.strftime(form).astype(int), "a": np.arange(30.0) ** 0.5})
    column = name if name == "Jahr" else None
    if column:
        with pytest.raises(UserError, match="if they are years or months, say so with --time-column Jahr; give"):
            read_table(frame)
    for rows, words in ((frame.drop(index=7), "1 come after a gap"), (frame[::-1], "29 go back")):
        with pytest.raises(UserError, match=words):
            read_table(rows, time_column=column)
        table = read_table(rows, times="regular", missing="interpolate", time_column=column)
        assert table.times.tolist() == times.tolist()
    twice = pd.concat([frame, frame]).sort_values(name)  # such as years beside a column of quarters
    with pytest.raises(UserError, match="holds numbers"):
        read_table(twice, time_column=column)


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (["2020-W52", "2020-W53", "2021-W53"], "row 3: '2021-W53' is no time stamp"),
        (["2020M11", "2020M12", "2020M13"], "row 3: '2020M13' is no time stamp"),
        ([2000, 2001, 2003], "holds numbers, such as 2000"),
        ([201911, 201912, 201913], "holds numbers, such as 201911"),
        ([2000.0, np.nan, 2002.0], "is empty in row 2"),
    ],
)
def test_spans_of_time_that_are_none(cells, words):
    with pytest.raises(UserError, match=words):
        read_table(pd.DataFrame({"date": cells, "a": [1.0, 2.0, 4.0]}))


def test_months_without_a_header_lose_no_row(tmp_path):
    rows = "".join(f"{month},{month % 7}\n" for month in (*range(202301, 202313), *range(202401, 202413)))
    assert "holds numbers, such as 202302" in refusal(tmp_path, rows)
    assert len(read(tmp_path, "month,a\n" + rows).values) == 24


def test_an_index_of_years_beside_time_stamps_is_left_out(frame):
    years = frame.set_index(pd.Index(range(1950, 2010), name="year"))
    assert read_table(years).columns == ["a", "b"]


@pytest.mark.parametrize("first", ["meter", "value"])
def test_a_column_of_dates_that_is_not_the_first_is_named_where_that_is_wanted(tmp_path, frame, first):
    given = frame.rename(columns={"date": "read_at", "a": "value"}).assign(meter="M7")[[first, "read_at", "b"]]
    assert refusal(tmp_path, text(given)).endswith(" read_at holds dates: --time-column read_at.")
    assert read(tmp_path, text(given), time_column="read_at", targets=["b"]).columns == ["b"]


def test_where_a_date_is_mistyped_no_other_column_is_named(tmp_path, frame):
    other = frame.assign(changed=frame["date"], date=frame["date"].astype(str).where(frame.index != 7, "2024-13-01"))
    assert refusal(tmp_path, text(other)).endswith("or name the time column with --time-column.")


@pytest.mark.parametrize("write", ["%H:%M %b %d, %Y", "%H:%M %a %Y-%m-%d", "%I:%M %p %d %B %Y"])
def test_dates_may_come_after_the_time_of_day(tmp_path, frame, write):
    table = read(tmp_path, text(frame.assign(date=frame["date"].dt.strftime(write))))
    assert (table.times == frame["date"]).all()


def test_a_date_that_two_orders_read_differently_is_the_one_shown(tmp_path, frame):
    same = frame.iloc[:4].assign(date=["01/01/2024", "02/02/2024", "05/03/2024", "03/05/2024"])
    assert "'05/03/2024' may be 2024-03-05 or 2024-05-03" in refusal(tmp_path, text(same))


def test_spaces_around_names_are_no_part_of_them(tmp_path, frame):
    table = read(tmp_path, text(frame).replace("date,a,b", " date , a ,b ", 1), targets=["b", "a"])
    assert table.columns == ["b", "a"]


def test_columns_of_arrow_are_those_of_numpy(frame):
    pa = pytest.importorskip("pyarrow", reason="Arrow's types need it")
    frame = frame.assign(a=frame["a"].astype(float).round(2).where(frame.index != 3), b=frame["b"].astype(float))
    expected = read_table(frame, missing="mask")
    as_arrow = frame.assign(a=frame["a"].astype(pd.ArrowDtype(pa.decimal128(20, 2))))
    for given in (as_arrow, frame.convert_dtypes(dtype_backend="pyarrow")):
        table = read_table(given, missing="mask")
        np.testing.assert_array_equal(table.values, expected.values)
        assert table.times.equals(expected.times)
    for form in ("%Y-%m-%d %H:%M", "%d/%m/%Y %H:%M"):
        texts = (frame["date"] + pd.Timedelta(days=9)).dt.strftime(form)
        plain, table = (
            read_table(frame.assign(date=texts.astype(kind)), missing="mask")
            for kind in (object, pd.ArrowDtype(pa.string()))
        )
        assert table.times.equals(plain.times)
    zoned = frame.assign(date=frame["date"].dt.tz_localize("Europe/Berlin"))
    expected, table = (read_table(f, missing="mask") for f in (zoned, zoned.convert_dtypes(dtype_backend="pyarrow")))
    assert str(table.zone) == str(expected.zone) == "Europe/Berlin" and table.times.equals(expected.times)


@pytest.mark.parametrize("kind", ["list", "array", "dictionary", "Arrow's list"])
def test_nested_columns_are_told_and_stand_in_nobodys_way(kind):
    """Parquet files may hold them. They can be neither counted nor compared."""
    frame = make_frame(60)[["date", "north"]]
    make = {"list": lambda i: [i], "array": lambda i: np.array([i, 1.0]), "dictionary": lambda i: {"x": i}}
    frame["x"] = [make.get(kind, make["list"])(i) for i in range(60)]
    if kind == "Arrow's list":
        pa = pytest.importorskip("pyarrow", reason="Arrow's types need it")
        frame["x"] = frame["x"].astype(pd.ArrowDtype(pa.list_(pa.int64())))
    assert read_table(frame, targets=["north"]).columns == ["north"]
    long = pd.concat([frame, frame]).rename(columns={"date": "ds", "north": "y"})
    long["unique_id"] = np.repeat(["a", "b"], 60)
    assert read_table(long, targets=["b"]).columns == ["b"]
    for given, options, words in (
        (frame, {}, "Column x of DataFrame, row 1: .* is no finite number"),
        (frame, {"time_column": "x"}, "time column x of DataFrame, row 1: .* is no time stamp"),
        (frame.drop(columns="date"), {"freq": "h", "time_column": "x"}, "Column x .* does not count the rows"),
        (pd.concat([frame, frame]), {"targets": ["north"]}, "are there twice"),
        (long, {"static_columns": ["x"]}, "Column x of DataFrame changes for series a"),
        (long, {"future_columns": ["x"]}, "Column x of DataFrame, at .* is no finite number"),
        (long.assign(ds=long["x"]), {}, "time column ds of DataFrame, row 1: .* is no time stamp"),
    ):
        with pytest.raises(UserError, match=words):
            read_table(given, **options)


def test_days_and_times_of_day_as_a_spreadsheet_is_read():
    frame = make_frame(100)
    expected = read_table(frame)
    date = frame["date"]
    kinds = [date.dt.normalize(), date.dt.date, date.dt.strftime("%d/%m/%Y")]
    with suppress(ImportError):
        kinds.append(date.dt.date.astype("date32[pyarrow]"))
    for days in kinds:
        table = read_table(frame.assign(date=days, Time=date.dt.time))
        assert table.times.equals(expected.times) and table.columns == expected.columns
        assert any("Columns date and Time were read together" in note for note in table.repairs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.set_index([f["date"], pd.Index(range(60))]), "an index of several levels: give it one"),
        (lambda f: f.set_index(["date", "a"], drop=False), "an index of several levels: .* as no column is"),
        (lambda f: pd.concat({"x": f}, axis=1), "columns of several levels: give them one, as .droplevel"),
        (lambda f: f.set_axis(["date", "a", "a"], axis=1), "two columns a"),
        (lambda f: f.set_index("date", drop=False), "both called date"),
        (lambda f: f.assign(c=f["date"]), "Column c of DataFrame holds datetime64"),
        (lambda f: f.assign(c=1j), "Column c of DataFrame holds complex128"),
        (lambda f: f[:0], "no rows"),
        (lambda f: f[[]], "no rows"),
        (lambda f: f.assign(date=range(60)), "holds numbers"),
    ],
)
def test_data_frames_that_cannot_be_used(frame, change, words):
    with pytest.raises(UserError, match=words):
        read_table(change(frame))


@pytest.mark.parametrize("command", ["fit", "evaluate", "predict"])
def test_what_users_of_pandas_would_say_is_found(command, failing):
    """The suggestion was --seed."""
    checkpoint = [] if command == "fit" else ["--checkpoint", "x"]
    for option, words in (
        ("--sep", "what separates columns is found, so leave it out"),
        ("--decimal=,", "unknown option --decimal: decimal commas and separators of thousands are found"),
        ("--sed", "did you mean --seed" if command == "fit" else "unknown option --sed"),
    ):
        assert words in failing(main, "vim2")(command, "a.csv", *checkpoint, option, ";")
    with pytest.raises(UserError, match="unknown option sep: what separates columns is found, so leave it out"):
        fit(data="a.csv", sep=";")


def test_zip_archives_of_one_file(tmp_path, frame):
    frame.to_csv(tmp_path / "a.zip", index=False, compression={"method": "zip", "archive_name": "a.csv"})
    assert len(read_table(tmp_path / "a.zip")) == 60
    for name in ("a", "b"):
        with zipfile.ZipFile(tmp_path / "two.zip", "a") as archive:
            archive.writestr(f"{name}.csv", text(frame))
    with pytest.raises(UserError, match="holds 2 files"):
        read_table(tmp_path / "two.zip")


def test_rare_first_bytes(tmp_path, frame):
    """xz's older form; archives of nothing; a column that is called as Parquet files begin."""
    assert len(read(tmp_path, lzma.compress(text(frame).encode(), format=lzma.FORMAT_ALONE)).values) == 60
    assert list(read(tmp_path, text(frame.rename(columns={"date": "PAR1"}))).columns) == ["a", "b"]
    assert "is empty" in refusal(tmp_path, bz2.compress(b""))
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    assert "holds 0 files" in refusal(tmp_path, empty.getvalue())
