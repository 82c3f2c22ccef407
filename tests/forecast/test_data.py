import zipfile

import pytest

pytest.importorskip("pandas", reason="vim2.forecast needs pandas")

import numpy as np
import pandas as pd
import torch
from forecast_helpers import make_frame, shared_data, write_csv

from vim2.forecast import UserError
from vim2.forecast.data import (
    Scaler,
    Windows,
    calendar_cycles,
    calendar_features,
    make_split,
)
from vim2.forecast.steps import find_step, season_length, to_offset
from vim2.forecast.table import read_table

SUFFIXES = [".csv", *(f".csv.{kind}" for kind in ("xz", "gz", "bz2", "zip", "zst")), ".parquet", ".PARQUET"]


@pytest.mark.parametrize("name", ["series", "series.csv"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_table_from_every_format(tmp_path, suffix, name):
    """As it is called, and where it is called otherwise."""
    frame, path = make_frame(), tmp_path / f"series{suffix}"
    if suffix.lower() == ".parquet":
        pytest.importorskip("pyarrow")
        frame.to_parquet(path)
    else:
        if suffix == ".csv.zst":
            pytest.importorskip("zstandard")
        frame.to_csv(path, index=False)
    path = path.rename(tmp_path / (f"{name}{suffix}" if name == "series" else name))
    table = read_table(path, future_columns=["promotion"])
    assert table.columns == ["north", "south", "level"] and table.future_columns == ["promotion"]
    assert table.step.freqstr == "h" and not table.repairs
    np.testing.assert_allclose(table.values, frame[table.columns].to_numpy())


def test_time_column_wherever_it_stands_and_targets_in_the_order_asked_for(tmp_path):
    frame = make_frame()[["north", "level", "date", "south"]]
    table = read_table(write_csv(tmp_path / "a.csv", frame), targets=["south", "north"])
    assert table.columns == ["south", "north"] and table.times[1] == pd.Timestamp("2024-01-01 01:00")
    renamed = write_csv(tmp_path / "b.csv", frame.rename(columns={"date": "when"}))
    assert read_table(renamed, time_column="when").columns == ["north", "level", "south"]


@pytest.mark.parametrize("form", ["%d/%m/%Y %H:%M", "%d.%m.%Y %H:%M", "%m/%d/%Y %H:%M", "%Y/%m/%d %H:%M"])
def test_dates_are_read_in_one_order(tmp_path, form):
    frame = make_frame(1000)
    dates = frame["date"].dt.strftime(form)
    table = read_table(write_csv(tmp_path / "a.csv", frame.assign(date=dates)))
    assert (table.times == pd.DatetimeIndex(frame["date"])).all()
    assert bool(table.repairs) == form.startswith("%d")


def test_headers_in_the_encoding_of_windows_are_read_and_said(tmp_path):
    frame = make_frame().rename(columns={"north": "T (°C)"})
    table = read_table(write_csv(tmp_path / "a.csv", frame, encoding="latin-1"))
    assert table.columns[0] == "T (°C)" and "windows-1252" in table.repairs[0]
    euros = make_frame().rename(columns={"north": "Umsatz €"})  # which latin-1 lacks
    assert read_table(write_csv(tmp_path / "b.csv", euros, encoding="cp1252")).columns[0] == "Umsatz €"


def test_rows_without_targets_at_the_end_are_the_future(tmp_path):
    frame = make_frame(60)
    frame.loc[50:, ["north", "south", "level"]] = np.nan
    table = read_table(write_csv(tmp_path / "a.csv", frame), future_columns=["promotion"])
    assert len(table) == 50 and len(table.future) == 60 and table.future_times[-1] == frame["date"].iloc[-1]


def damaged(path, change):
    frame = make_frame(100)
    frame = change(frame)
    return write_csv(path, frame)


def with_cell(column, row, value):
    def change(frame):
        return frame.astype({column: object}).assign(
            **{column: [value if i == row else v for i, v in enumerate(frame[column])]}
        )

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_cell("north", 3, "n/a?"), ["north", "row 4", "n/a?", "--targets"]),
        (with_cell("north", 3, "inf"), ["north", "no finite number"]),
        (with_cell("south", 3, ""), ["south (1)", "2024-01-01 03:00", "--missing interpolate"]),
        (with_cell("date", 3, "soon"), ["date", "row 4", "no time stamp", "--time-column"]),
        (lambda f: f.assign(date=["31/01/2024", "01/31/2024"] * 50), ["days before months", "2024-01-31"]),
        (with_cell("level", 3, -9999), ["level", "-9999", "1 rows", "--na-values -9999", "--keep-values"]),
        (
            lambda f: f.drop(index=[10, 11]),
            ["not all 1 hour apart", "1 come after a gap", "2024-01-01 12:00", "--times regular"],
        ),
        (lambda f: pd.concat([f[:5], f[4:]]), ["1 are there twice", "--times regular"]),
        (lambda f: pd.concat([f, f[7:9]]), ["2 are there twice", "1 go back"]),  # not one after the other
        (with_cell("date", 3, ""), ["date", "is empty in row 4"]),
        (lambda f: f[::-1], ["99 go back"]),
        (lambda f: f.assign(level=np.nan), ["level", "no value at all"]),
        (lambda f: f.assign(date=range(100)), ["holds numbers", "--time-column"]),
        (lambda f: f[["date"]], ["one column only"]),
        (lambda f: f[:0], ["no rows"]),
        (lambda f: f.assign(date=f["date"].iloc[0]), ["must tell the rows apart"]),
    ],
)
def test_what_cannot_be_used_as_it_is(tmp_path, change, words):
    path = damaged(tmp_path / "a.csv", change)
    with pytest.raises(UserError) as error:
        read_table(path)
    for word in words:
        assert word in str(error.value)


def test_columns_that_spaces_separate_are_told(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(make_frame(300).to_string(index=False))
    with pytest.raises(UserError, match=r"has one column only, .* must separate columns"):
        read_table(path)


@pytest.mark.parametrize("missing", ["error", "interpolate", "previous", "mask"])
def test_rows_at_the_end_without_values_are_the_time_to_forecast(tmp_path, missing):
    frame = make_frame(100)
    ahead = pd.DataFrame({"date": pd.date_range(frame["date"].iloc[-1], periods=7, freq="h")[1:]})
    path = write_csv(tmp_path / "a.csv", pd.concat([frame, ahead]))
    for data in (path, pd.concat([frame, ahead])):
        table = read_table(data, missing=missing)
        np.testing.assert_allclose(table.values, frame.drop(columns="date"))
        assert table.future_times[100:].tolist() == ahead["date"].tolist()
        assert "6 rows at the end have no value: they are the time to forecast." in table.repairs


@pytest.mark.parametrize("above", ["Report of 2024\n", "# made by hand\n\n", "# made\n# by hand\n"])
def test_lines_above_the_header_are_told(tmp_path, above):
    path = write_csv(tmp_path / "a.csv")
    path.write_text(above + path.read_text())
    with pytest.raises(UserError, match="take out what stands above"):
        read_table(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.xlsx", b"PK\x03\x04\x14"),
        ("a.csv", "[Content_Types].xml"),
        ("a.zip", "mimetype"),
        ("a.json", b'{"a": {"0": 1}}'),
    ],
)
def test_other_files_than_tables_are_told(tmp_path, name, content):
    if isinstance(content, str):  # as workbooks of Excel and LibreOffice
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(content, "")
            archive.writestr("sheet.xml", "")
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="save its table as one of these"):
        read_table(tmp_path / name)


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="no file"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(UserError, match="is empty"):
        read_table(tmp_path / "empty.csv")
    for suffix in ("xz", "gz", "bz2", "zip"):
        make_frame().to_csv(tmp_path / f"a.csv.{suffix}", index=False)
        whole = (tmp_path / f"a.csv.{suffix}").read_bytes()
        for name in (f"cut.csv.{suffix}", "cut.csv"):
            (tmp_path / name).write_bytes(whole[: len(whole) // 2])
            with pytest.raises(UserError, match=f"{name} cannot be read .* whole file"):
                read_table(tmp_path / name)
    (tmp_path / "twice.csv").write_text("date,a,a\n2024-01-01,1,2\n")
    with pytest.raises(UserError, match="two columns a"):
        read_table(tmp_path / "twice.csv")


def test_unknown_columns_suggest_the_one_that_was_meant(data):
    with pytest.raises(UserError, match="no column nroth; did you mean north"):
        read_table(data, targets=["nroth"])
    with pytest.raises(UserError, match="no column promo; did you mean promotion"):
        read_table(data, future_columns=["promo "])
    twice = [(["north", "promotion"], ["promotion"]), (["north"] * 2, []), (["north"], ["promotion"] * 2)]
    for targets, futures in twice:
        with pytest.raises(UserError, match="named twice"):
            read_table(data, targets=targets, future_columns=futures)


def test_missing_values_are_repaired_as_asked_and_told(tmp_path):
    frame = make_frame(100)
    frame.loc[[0, 10, 11], "north"] = np.nan
    frame.loc[20, "north"] = -9999
    path = write_csv(tmp_path / "a.csv", frame)
    table = read_table(path, na_values=[-9999], missing="interpolate")
    a, b = frame["north"][9], frame["north"][12]
    np.testing.assert_allclose(table.values[10:12, 0], [a + (b - a) / 3, a + 2 * (b - a) / 3])
    assert table.values[0, 0] == frame["north"][1]
    assert "1 cells of -9999" in table.repairs[0] and "4 missing values" in table.repairs[1]
    previous = read_table(path, na_values=[-9999], missing="previous").values[:, 0]
    assert previous[10] == previous[11] == frame["north"][9] and previous[20] == frame["north"][19]
    with pytest.raises(UserError, match=r"Column promotion .* holds -9999"):
        read_table(
            write_csv(tmp_path / "b.csv", make_frame().replace({"promotion": {1.0: -9999.0}})),
            future_columns=["promotion"],
        )
    kept = read_table(path, keep_values=[-9999], missing="previous")
    assert kept.values[20, 0] == -9999


def test_stand_ins_and_irregular_times_are_told_together():
    frame = make_frame(100).drop(index=[7])
    frame.loc[20, "north"] = -9999
    with pytest.raises(UserError, match=r"--keep-values -9999\. Time stamps of DataFrame .* Add --times regular"):
        read_table(frame)
    with pytest.raises(UserError, match=r"^Time stamps of"):
        read_table(frame, na_values=[-9999])
    with pytest.raises(UserError, match=r"--keep-values -9999\.$"):
        read_table(frame, times="keep")


@pytest.mark.parametrize("name, value", [("missing", "ffill"), ("times", "sort"), ("dates", "DMY")])
def test_another_way_to_repair_is_refused_and_not_taken_for_one(name, value):
    frame = make_frame(100)
    frame.loc[5, frame.columns[1]] = np.nan
    with pytest.raises(UserError, match=f"--{name} must be one of .*, got '{value}'"):
        read_table(frame, **{name: value})


def test_irregular_times_are_repaired_as_asked_and_told(tmp_path):
    frame = make_frame(100)
    shuffled = pd.concat([frame[50:], frame[:50], frame[7:8].assign(north=-1.0)]).drop(index=[20, 21])
    path = write_csv(tmp_path / "a.csv", shuffled)
    table = read_table(path, times="regular", missing="interpolate")
    assert len(table) == 100 and table.step.freqstr == "h"
    np.testing.assert_allclose(table.values[:20, 0], frame["north"][:20])  # the first of the two rows was kept
    text = " ".join(table.repairs)
    assert "sorted" in text and "1 rows whose time stamp" in text and "2 missing rows were added" in text
    with pytest.raises(UserError, match="missing"):  # the rows that were added hold no values
        read_table(path, times="regular")
    assert len(read_table(path, times="keep")) == len(shuffled)
    frame.loc[5, "date"] += pd.Timedelta("7min")
    with pytest.raises(UserError, match="do not lie whole steps"):
        read_table(write_csv(tmp_path / "b.csv", frame), times="regular", missing="interpolate")


@pytest.mark.parametrize("step", ["15min", "D", "MS", "B", "W-SUN"])
def test_steps_of_the_calendar_are_regular(tmp_path, step):
    table = read_table(write_csv(tmp_path / "a.csv", make_frame(80, step=step)))
    assert table.step is not None and not table.repairs


def test_season_lengths():
    offsets = pd.tseries.frequencies.to_offset
    steps = {"h": 24, "15min": 96, "10min": 144, "D": 7, "MS": 12, "W-SUN": 52, "YS": 1}
    assert {name: season_length(offsets(name)) for name in steps} == steps
    assert {name: season_length(find_step(pd.date_range("2024", periods=40, freq=name))) for name in steps} == steps
    assert season_length(None) == 1


LAST_FRIDAY = pd.offsets.LastWeekOfMonth(weekday=4)


@pytest.mark.parametrize(
    "step, season",
    [("BME", 12), ("BQE", 4), ("10D", 36), ("2W", 26), ("WOM-2FRI", 12), (LAST_FRIDAY, 12), ("SMS", 24), ("bh", 8)],
)
def test_seasons_of_uncommon_steps(step, season):
    frame = make_frame(120, step=step)
    table = read_table(frame, times="keep")
    assert table.season == season and (table.step is None) == (step == "SMS")
    if table.step:
        again = pd.date_range(table.times[0], periods=len(table), freq=to_offset(table.step.freqstr))
        assert (again == table.times).all()


def test_seasons_of_rows_that_are_taken_as_they_are(tmp_path):
    frame = make_frame(400, step="10min").drop(index=[7, 8])
    assert read_table(write_csv(tmp_path / "a.csv", frame), times="keep").season == 144
    holidays = make_frame(400, step="B").drop(index=[50, 99])
    assert read_table(write_csv(tmp_path / "b.csv", holidays), times="keep").season == 5
    assert read_table(write_csv(tmp_path / "c.csv", make_frame()[::-1]), times="keep").season == 1


@pytest.mark.parametrize(
    ("rows", "parts", "horizon", "counts"),
    [
        (17420, (8640, 2880, 2880), 96, (8033, 2785, 2785)),  # ETTh, lookback 512
        (17420, (8640, 2880, 2880), 720, (7409, 2161, 2161)),
        (69680, (34560, 11520, 11520), 336, (33713, 11185, 11185)),  # ETTm
        (7588, (0.7, 0.1, 0.2), 96, (4704, 665, 1422)),  # exchange rates
        (52696, (0.7, 0.1, 0.2), 192, (36184, 5079, 10348)),  # Weather
    ],
)
def test_windows_are_as_many_as_in_the_literature(rows, parts, horizon, counts):
    split, values = make_split(rows, parts, 512, horizon), torch.zeros(rows, 1)
    found = [len(Windows(values, 512, horizon, *split.borders(p, 512))) for p in ("train", "val", "test")]
    assert tuple(found) == counts


def test_windows_hold_consecutive_rows_and_no_batch_is_dropped():
    values, future = torch.arange(40.0).view(20, 2), torch.arange(25.0).view(25, 1) * 10
    windows = Windows(values, 4, 3, 2, 15, future)
    assert len(windows) == 13 - 7 + 1
    x, y, z = windows[torch.tensor([0, 6])]
    torch.testing.assert_close(x, torch.stack([values[2:6], values[8:12]]))
    torch.testing.assert_close(y, torch.stack([values[6:9], values[12:15]]))
    torch.testing.assert_close(z, torch.stack([future[6:9], future[12:15]]))
    assert [len(x) for x, _, _ in windows.batches(3)] == [3, 3, 1]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((0.7, 0.2, 0.2), "sum to 1"),
        ((300, 50, 100), "asks for 450 rows, the file has 400"),
        ((50, 100, 100), "50 rows of training"),
        ((300, 5, 50), "5 rows of validation"),
        ((300, 50, 5), "5 rows of test"),
        ((-1, 1, 1), "three numbers"),
    ],
    ids=str,
)
def test_splits_that_do_not_fit(parts, message):
    with pytest.raises(UserError, match=message):
        make_split(400, parts, 48, 12)


def test_scaler_knows_the_rows_it_was_fitted_to_and_leaves_constants():
    values = np.stack([np.arange(10.0), np.full(10, 0.1)], axis=1)
    scaler = Scaler.fit(values)
    scaled = scaler.transform(values)
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(scaled.std(0), [1, 0], atol=1e-12)
    np.testing.assert_allclose(scaler.inverse(scaled), values)


def test_calendar_features_repeat_with_the_day():
    features = calendar_features(pd.date_range("2024-01-01", periods=49, freq="h"), ["day", "week"])
    assert features.shape == (49, 4) and np.abs(features).max() <= 1
    np.testing.assert_allclose(features[0, :2], features[24, :2], atol=1e-12)
    assert abs(features[6, 0] - 1) < 1e-12 and (features[24, 2:] != features[0, 2:]).all()


@pytest.mark.parametrize(
    ("freq", "rows", "cycles"),
    [
        ("h", 40, []),
        ("h", 14 * 24 - 1, ["day"]),
        ("h", 14 * 24, ["day", "week"]),
        ("h", 731 * 24, ["day", "week", "year"]),
        ("D", 400, ["week"]),
        ("W", 106, ["year"]),
        ("YS", 20, []),
    ],
)
def test_only_cycles_that_come_again_are_features(freq, rows, cycles):
    times = pd.date_range("2024-01-01", periods=rows, freq=freq)
    assert calendar_cycles(times) == calendar_cycles(times[::-1]) == cycles


def test_a_gap_is_no_cycle():
    times = pd.date_range("2020-01-01", periods=72, freq="h")
    assert calendar_cycles(times.append(times + pd.Timedelta(days=1461))) == ["day"]


def test_weather_needs_its_oddities_named():
    path = shared_data("weather.csv.xz")
    with pytest.raises(UserError, match=r"--keep-values -9999\. .* 1 are there twice"):
        read_table(path)
    with pytest.raises(UserError, match="1 are there twice"):
        read_table(path, keep_values=[-9999])
    table = read_table(path, keep_values=[-9999], times="keep")
    assert table.values.shape == (52696, 21)
