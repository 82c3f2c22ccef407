"""Long tables, of a row for each series and time step, and forecasts as DataFrames."""

import pytest

pytest.importorskip("pandas", reason="vim2.forecast needs pandas")

import numpy as np
import pandas as pd
from forecast_helpers import TINY, ahead, make_frame, write_csv

from vim2.forecast import Forecaster, UserError, fit, predict
from vim2.forecast.cli import main
from vim2.forecast.table import read_table

COLUMNS = ["north", "south", "level"]
FAST = dict(horizon=3, lookback=12, patch=4, stride=2, d_model=4, d_state=2, epochs=1, epoch_steps=1, device="cpu")


def melt(frame, keep=(), ids=COLUMNS):
    wide = frame.rename(columns={"date": "ds"})
    return wide.melt(id_vars=["ds", *keep], value_vars=ids, var_name="unique_id", value_name="y")


def test_a_long_table_is_read_as_its_wide_one(tmp_path):
    frame = make_frame()
    wide = read_table(frame, targets=COLUMNS, future_columns=["promotion"])
    long = melt(frame, ["promotion"])
    shuffled = long.sample(frac=1, random_state=0)
    for given in (long, shuffled, long.set_index("unique_id"), write_csv(tmp_path / "a.csv", long)):
        table = read_table(given, targets=COLUMNS, future_columns=["promotion"])
        assert table.columns == COLUMNS and list(table.ids) == COLUMNS
        np.testing.assert_allclose(table.values, wide.values, rtol=1e-12)
        assert (table.times == wide.times).all() and np.array_equal(table.future, wide.future)
    assert wide.ids is None


def test_other_columns_of_a_long_table_are_left_out_and_that_is_told():
    table = read_table(melt(make_frame(), ["promotion"]))
    assert table.columns == COLUMNS
    assert table.repairs == ["Columns beside unique_id, ds, y were left out: promotion."]


@pytest.mark.parametrize(
    "names, how",
    [
        (["shop", "date", "sales"], "shop to unique_id, date to ds, sales to y"),
        (["shop", "day", "y"], "shop to unique_id, day to ds"),
        (["unique_id", "ds", "sales"], "sales to y"),
    ],
)
def test_a_long_table_of_other_names_is_told_how_to_become_one(names, how, tmp_path, capsys):
    long = melt(make_frame())[["unique_id", "ds", "y"]].set_axis(names, axis=1)
    with pytest.raises(UserError, match=r"^DataFrame looks like a long table.*\.rename\(columns=") as raised:
        fit(data=long)
    assert f"rename {how}, with" in str(raised.value)
    numbered = long.assign(**{names[0]: long[names[0]].map({"north": 3, "south": 1, "level": 7}), "price": 1.5})
    path = write_csv(tmp_path / "a.csv", numbered.sort_values([names[1], names[0]]))
    assert main(["fit", str(path)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and f"rename {how}" in message and "in its first row" in message
    renamed = long.set_axis(["unique_id", "ds", "y"], axis=1)
    assert read_table(renamed).columns == COLUMNS


def test_two_columns_that_tell_series_apart_and_numbers_with_a_point():
    days = pd.date_range("2024-01-01", periods=50)
    rows = [(shop, item, day, 1.0) for shop in "AB" for item in ("pen", "ink") for day in days]
    frame = pd.DataFrame(rows, columns=["shop", "item", "date", "sales"])
    with pytest.raises(UserError, match="join shop and item into one column unique_id, and rename date to ds"):
        read_table(frame)
    with pytest.raises(UserError, match="rename shop to unique_id"):
        read_table(frame[frame["item"] == "pen"].drop(columns="item").replace({"A": 1.0, "B": 2.0}))


@pytest.mark.parametrize("part", ["hour", "load_at", "slot"])
def test_a_part_of_the_time_names_no_series(part):
    times = pd.date_range("2024-01-01", periods=240, freq="h")
    hours = [f"P{hour}" for hour in times.hour] if part == "slot" else times.hour
    frame = pd.DataFrame({"date": times.strftime("%Y-%m-%d"), part: hours, "load": np.arange(240.0)})
    with pytest.raises(UserError, match=f"is a part of the time, write it into date.* rename {part} to"):
        read_table(frame)


def test_rows_that_are_there_twice_are_left_out_where_that_is_asked_for():
    frame = make_frame(60)
    twice = pd.concat([frame.assign(logger=0), frame.assign(logger=1)]).sort_values("date", ignore_index=True)
    assert len(read_table(twice, times="regular")) == 60


def test_rows_of_a_series_that_are_there_twice_are_left_out_where_that_is_asked_for(capsys):
    long = melt(make_frame())
    twice = pd.concat([long, long.iloc[5:7].assign(y=1e3)], ignore_index=True)
    with pytest.raises(UserError, match=r"two rows of series north .* add their values, or .* --times regular"):
        read_table(twice)
    table = read_table(twice, times="regular")
    np.testing.assert_array_equal(table.values, read_table(long).values)
    assert table.repairs == ["2 rows of a series whose time stamp it had already were left out."]
    with pytest.raises(UserError, match="two rows of series north"):
        read_table(pd.concat([long, long.assign(y=0), long.assign(y=1)], ignore_index=True), times="regular")


def test_a_cell_of_a_table_without_time_stamps_is_told_by_the_number_of_its_step():
    long = melt(make_frame(60)).assign(ds=np.tile(np.arange(60), 3))
    for start, at in ((None, "at 13"), ("2024-01-01", "at 2024-01-01 13:00:00")):
        with pytest.raises(UserError, match=f"Column south of DataFrame, {at}: inf is no finite number"):
            read_table(long.assign(y=long["y"].where(long.index != 73, np.inf)), freq="h", start=start)


def test_series_may_be_called_as_columns_of_dates_and_times_are():
    long = melt(make_frame(60, step="D")).replace({"unique_id": {"south": "time", "north": "date"}})
    table = read_table(long.assign(y="18.25"))
    assert table.columns == ["date", "time", "level"] and (table.values == 18.25).all()


def test_static_columns_named_twice_are_refused():
    with pytest.raises(UserError, match="Static columns are named twice: size"):
        fit(data=with_static(melt(make_frame())), static_columns=["size", "size"], **FAST)


def test_a_wide_table_is_taken_for_no_long_one():
    frame = make_frame(60).assign(weekday="Monday", count=np.arange(60) % 2)
    twice = pd.concat([frame, frame.iloc[:20].assign(count=5)]).sort_values("date", ignore_index=True)
    with pytest.raises(UserError, match=r"--times regular"):
        read_table(twice, targets=COLUMNS)


def test_dates_in_the_order_of_a_country_and_numbers_with_commas(tmp_path):
    frame = make_frame(100, step="D")
    frame[COLUMNS] = frame[COLUMNS].round(3)
    long = melt(frame)
    written = long.assign(
        ds=long["ds"].dt.strftime("%d/%m/%Y"), y=long["y"].map(lambda v: f"{v:.3f}".replace(".", ","))
    )
    table = read_table(write_csv(tmp_path / "a.csv", written, sep=";"))
    assert (table.times == frame["date"]).all()
    np.testing.assert_allclose(table.values, frame[COLUMNS])


@pytest.mark.parametrize(
    "write",
    [
        lambda ds: ds.dt.strftime("%d/%m/%Y"),
        lambda ds: ds.dt.strftime("%m/%d/%y"),
        lambda ds: ds.dt.strftime("%d. %b %Y"),
        lambda ds: ds.dt.strftime("%Y-%m-%d").where(ds.dt.day % 2 == 0, ds.dt.strftime("%Y/%m/%d")),
        lambda ds: ds.dt.tz_localize("Europe/Berlin").map(str),
        lambda ds: ds.dt.tz_localize("Europe/Berlin"),
        lambda ds: ds.dt.strftime("%Y%m%d").astype(int),
    ],
    ids=["day first", "month first", "named", "two ways", "offsets", "zone", "compact"],
)
def test_rows_of_a_long_table_may_be_in_any_order_however_dates_are_written(write):
    frame = make_frame(400, step="D")
    shuffled = melt(frame).sample(frac=1, random_state=0, ignore_index=True)
    table = read_table(shuffled.assign(ds=write(shuffled["ds"])), targets=COLUMNS)
    assert (table.times == frame["date"]).all()
    np.testing.assert_array_equal(table.values, frame[COLUMNS])


def test_a_series_is_no_time_column_of_a_long_table():
    long = melt(make_frame())
    assert len(read_table(long, time_column="ds")) == 400
    with pytest.raises(UserError, match="ds is its time column: leave out --time-column north"):
        read_table(long.assign(y="soon"), time_column="north")


def test_years_of_a_long_table_in_any_order():
    years = np.arange(1950, 2010)
    long = pd.DataFrame({"unique_id": np.repeat(["a", "b"], 60), "ds": np.tile(years, 2), "y": np.arange(120.0)})
    table = read_table(long.sample(frac=1, random_state=0), targets=["a"])
    assert table.times.year.tolist() == years.tolist() and table.values[:, 0].tolist() == list(range(60))
    dates = long["ds"].map("{}-02-01".format)
    dates[70] = "1960-02-30"
    with pytest.raises(UserError, match="row 71: '1960-02-30' is no time stamp"):
        read_table(long.assign(ds=dates))


def test_series_of_different_lengths_have_missing_values_as_in_a_wide_table():
    long = melt(make_frame())
    later = long[(long["unique_id"] != "south") | (long["ds"] >= "2024-01-02")]
    assert later["ds"].iloc[0] == pd.Timestamp("2024-01-01")
    with pytest.raises(UserError, match=r"^Values of DataFrame are missing: south \(24\)"):
        read_table(later)
    with pytest.raises(UserError, match=r"^Values of DataFrame are missing: south \(24\)"):
        read_table(later.sort_values("ds", ascending=False))
    assert "24 missing values were filled" in read_table(later, missing="previous").repairs[-1]
    nullable = later.astype({"y": "Float64"})
    nullable.iloc[0, list(nullable).index("y")] = pd.NA
    with pytest.raises(UserError, match=r"missing: north \(1\), south \(24\)"):
        read_table(nullable)


def test_an_index_of_ids_and_time_stamps_is_that_of_a_long_table():
    long = melt(make_frame())
    table, expected = read_table(long.set_index(["unique_id", "ds"])), read_table(long)
    assert table.ids == expected.ids and table.times.equals(expected.times)
    np.testing.assert_array_equal(table.values, expected.values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: pd.concat([f, f.iloc[5:7]]), r"two rows of series north at 2024-01-01 05:00:00 \(2 such rows\)"),
        (lambda f: f.assign(unique_id=f["unique_id"].where(f.index != 7)), "row 8 has no unique_id"),
        (lambda f: f.assign(ds=f["ds"].where(f.index != 7)), "ds of DataFrame is empty in row 8"),
        (lambda f: f.replace({"unique_id": {"south": "ds"}}), "two columns ds"),
        (
            lambda f: f.replace({"unique_id": {"south": 1, "north": "1"}}),
            "two series that are both called 1, as a",
        ),
        (
            lambda f: f.assign(promotion=np.arange(len(f))),
            "promotion of DataFrame differs between series at 2024",
        ),
        (lambda f: f.assign(y=f["y"].astype(object).where(f.index != 403, "many")), "south .* 03:00:00: 'many' is no"),
        (lambda f: f.assign(ds=range(len(f))), "holds numbers, such as 0"),
        (lambda f: f.drop(columns="promotion"), "no column promotion"),
    ],
    ids=["twice", "no id", "no time", "id of a column", "1 and '1'", "differs", "text", "numbers", "lacks future"],
)
def test_long_tables_that_are_none(change, words):
    with pytest.raises(UserError, match=words):
        read_table(change(melt(make_frame(), ["promotion"])), future_columns=["promotion"])


def test_predict_continues_a_wide_frame(trained, tmp_path, capsys):
    forecaster, frame = Forecaster.from_pretrained(trained), ahead()
    forecast = forecaster.predict(frame)
    by_command = predict(data=frame, checkpoint=str(trained), output=str(tmp_path))
    written = pd.read_csv(by_command["csv"], index_col="date", parse_dates=True)
    pd.testing.assert_frame_equal(forecast, written, check_freq=False, check_index_type=False, rtol=1e-6)
    assert list(forecast)[:3] == ["north_q0.1", "north_q0.5", "north_q0.9"]
    assert forecast.index[0] == frame["date"].iloc[400] and isinstance(forecast.index, pd.DatetimeIndex)
    for given in (frame.set_index("date"), write_csv(tmp_path / "a.csv", frame)):
        pd.testing.assert_frame_equal(forecaster.predict(given), forecast, check_freq=False, rtol=1e-4)
    frame.loc[9, "north"] = np.nan
    with pytest.raises(UserError, match=r"^Values of DataFrame are missing: north \(1\)"):
        forecaster.predict(frame)
    capsys.readouterr()
    forecaster.predict(frame, missing="previous")
    assert "1 missing values were filled with the value before" in capsys.readouterr().out
    with pytest.raises(UserError, match="the file has 0"):
        forecaster.predict(make_frame())
    with pytest.raises(UserError, match=r"path or a pandas DataFrame, got list\.$"):
        forecaster.predict([1, 2])


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/Sao_Paulo"])
def test_a_forecast_is_in_the_time_zone_of_the_frame(trained, zone):
    """Over changes to and from summer time, of hours in UTC and of days by the time on the clock."""
    forecaster, frame = Forecaster.from_pretrained(trained), ahead()
    frame["date"] = pd.date_range("2018-10-25", periods=len(frame), freq="h", tz=zone)
    index = forecaster.predict(frame).index
    assert index.equals(pd.DatetimeIndex(frame["date"][400:]).rename("date")) and str(index.tz) == zone
    long = forecaster.predict(melt(frame, ["promotion"], COLUMNS))
    assert str(long["ds"].dt.tz) == zone and (long["ds"][:12].to_numpy() == frame["date"][400:].to_numpy()).all()
    days = pd.date_range("2017-09-24", periods=len(frame), freq="D").tz_localize(zone, nonexistent="shift_forward")
    daily = forecaster.predict(frame.assign(date=days), times="keep")
    assert daily.index.equals(days[400:].rename("date")) and str(daily.index.tz) == zone


@pytest.mark.parametrize("step, rows, ahead", [("B", 5, 3), ("MS", 2, 31), ("ME", 2, 31)])
def test_few_rows_are_continued_by_the_step_of_training(step, rows, ahead, tmp_path):
    """Monday to Friday are days that follow each other, and two months are so many days apart, in a short file."""
    short = dict(FAST, horizon=1, lookback=2, patch=1, stride=1, members=2)
    frame = make_frame(120, step=step)
    run = fit(data=frame, output=tmp_path, **short)
    few = frame[frame["date"] <= ("2024-03-01" if step == "B" else "2025-03-01")].tail(rows)
    forecast = Forecaster.from_pretrained(run["folder"]).predict(few)
    assert forecast.index[0] == few["date"].iloc[-1] + pd.Timedelta(days=ahead)


def test_series_that_a_forecaster_does_not_know_are_left_out_and_that_is_told(trained, capsys):
    forecaster, long = Forecaster.from_pretrained(trained), melt(ahead(), ["promotion"])
    expected = forecaster.predict(long)
    capsys.readouterr()
    north = long[long["unique_id"] == "north"]
    others = [north.assign(unique_id=f"new {i}") for i in range(7)]
    pd.testing.assert_frame_equal(forecaster.predict(pd.concat([*others, long], ignore_index=True)), expected)
    told = "Series that the forecaster was not trained for were left out: new 0, new 1, new 2, new 3, new 4 and 2 more."
    assert told in capsys.readouterr().out
    with pytest.raises(UserError, match=r"has no series south \(of north, level, promotion\)"):
        forecaster.predict(long[long["unique_id"] != "south"])


def test_predict_continues_a_long_frame(trained, tmp_path):
    forecaster, frame = Forecaster.from_pretrained(trained), ahead()
    wide, long = forecaster.predict(frame), forecaster.predict(melt(frame, ["promotion"], COLUMNS[::-1]))
    assert list(long) == ["unique_id", "ds", "TSM2_q0.1", "TSM2_q0.5", "TSM2_q0.9"] and len(long) == 3 * 12
    assert long["ds"].dtype.kind == "M"
    shared = melt(frame, ["promotion"], COLUMNS[::-1])
    shared = shared[(shared["unique_id"] == "level") | (shared["ds"] < wide.index[0])]  # what is known ahead, once
    pd.testing.assert_frame_equal(forecaster.predict(shared), long)
    for name, rows in long.groupby("unique_id"):
        np.testing.assert_allclose(rows["TSM2_q0.9"], wide[f"{name}_q0.9"], rtol=1e-5)
        assert (rows["ds"] == wide.index).all()
    data = write_csv(tmp_path / "long.csv", melt(frame, ["promotion"]))
    result = predict(data=str(data), checkpoint=str(trained), output=str(tmp_path))
    written = pd.read_csv(result["csv"], parse_dates=["ds"])
    pd.testing.assert_frame_equal(written, long, check_dtype=False, rtol=1e-6)


def test_a_model_of_a_long_frame_keeps_the_type_of_its_ids(tmp_path):
    long = melt(make_frame())
    long["unique_id"] = long["unique_id"].map({"north": 7, "south": 30, "level": 4}).astype("int64")
    run = fit(data=long, output=str(tmp_path), **FAST)
    forecast = Forecaster.from_pretrained(run["folder"]).predict(long)
    assert list(forecast) == ["unique_id", "ds", "TSM2"]
    assert forecast["unique_id"].dtype.kind == "i" and forecast["unique_id"].unique().tolist() == [7, 30, 4]
    assert forecast["ds"].iloc[0] == long["ds"].max() + pd.Timedelta("1h")
    only = fit(data=long, output=str(tmp_path), targets=["30"], experiment="one", **FAST)
    assert Forecaster.from_pretrained(only["folder"]).predict(long)["unique_id"].unique().tolist() == [30]


def test_the_whole_way_by_command_with_a_long_file(tmp_path):
    data = write_csv(tmp_path / "long.csv", melt(make_frame()))
    run = ["--output", tmp_path / "runs", "--experiment", "r", "--epochs", "1", "--epoch-steps", "2"]
    checkpoint = ["--checkpoint", tmp_path / "runs" / "r"]
    assert main([str(a) for a in ("fit", data, *TINY, *run)]) == 0
    assert main([str(a) for a in ("evaluate", data, *checkpoint)]) == 0
    assert main([str(a) for a in ("predict", data, *checkpoint, "--output", tmp_path)]) == 0
    assert list(pd.read_csv(tmp_path / "forecast.csv")) == ["unique_id", "ds", "TSM2"]


REGIONS, SIZES = {"north": "hills", "south": "coast", "level": "coast"}, {"north": 1, "south": 2, "level": 6}


def with_static(long):
    return long.assign(region=long["unique_id"].map(REGIONS), size=long["unique_id"].map(SIZES))


def test_static_columns_reach_the_model_and_are_kept_with_it(tmp_path):
    long = with_static(melt(make_frame()))
    options = dict(FAST, data=long.sample(frac=1, random_state=0), output=tmp_path, experiment="run", members=2)
    run = fit(**options, static_columns=["region", "size"])
    forecaster = Forecaster.from_pretrained(run["folder"])
    static, columns = forecaster.model.networks.static, forecaster.columns
    size = np.array([SIZES[c] for c in columns], dtype=float)
    expected = [[REGIONS[c] == "coast", REGIONS[c] == "hills"] for c in columns]
    np.testing.assert_array_equal(static[:, :2], expected)
    np.testing.assert_allclose(static[:, 2], (size - size.mean()) / size.std(), rtol=1e-6)
    forecast = forecaster.predict(long)
    pd.testing.assert_frame_equal(forecaster.predict(long.drop(columns=["region", "size"])), forecast)
    static.zero_()
    assert not np.allclose(forecaster.predict(long)["TSM2"], forecast["TSM2"])
    moved = long.assign(size=long["size"].replace(6, 7))
    with pytest.raises(UserError, match="is not the data that"):
        fit(**{**options, "data": moved}, static_columns=["region", "size"], resume=True)
    assert fit(**options, static_columns=["region", "size"], resume=True)["best"] == run["best"]


@pytest.mark.parametrize(
    "change, name, message",
    [
        (dict(), "regoin", "no column regoin; did you mean region"),
        (dict(region=np.nan), "region", "region of DataFrame holds nothing for series north"),
        (dict(region="hills"), "region", "region is the same for all series"),
        (dict(size=np.inf), "size", r"infinite|the same"),
        (dict(size=[1e300] * 400 + [-1e300] * 400 + [0.0] * 400), "size", "size holds .* a deviation of 0 or inf"),
        (dict(size=[1e-200] * 400 + [2e-200] * 400 + [4e-200] * 400), "size", "size holds .* a deviation of 0 or inf"),
        (dict(size=np.arange(1200)), "size", "size of DataFrame changes for series north"),
    ],
)
def test_static_columns_that_describe_no_series(change, name, message):
    long = with_static(melt(make_frame())).assign(**change)
    with pytest.raises(UserError, match=message):
        fit(data=long, static_columns=[name], **FAST)


def test_static_columns_of_a_wide_table_are_refused():
    with pytest.raises(UserError, match="describe the series of a long table"):
        fit(data=make_frame(), static_columns=["promotion"], **FAST)
