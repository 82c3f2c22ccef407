"""Files without time stamps, whose step --freq tells."""

import pytest

pytest.importorskip("pandas", reason="vim2.forecast needs pandas")

import numpy as np
import pandas as pd
from forecast_helpers import make_frame

from vim2.forecast import Forecaster, UserError, fit, predict
from vim2.forecast.table import read_table

OPTIONS = dict(horizon=3, lookback=12, d_model=4, d_state=2, members=2, epochs=1, epoch_steps=1, device="cpu")


@pytest.fixture
def frame():
    return make_frame(100)[["north", "south"]]


def write(path, frame, **options):
    frame.to_csv(path, index=False, **options)
    return path


def test_rows_are_counted_or_begin_at_a_start(tmp_path, frame):
    path = write(tmp_path / "a.csv", frame)
    counted, dated = read_table(path, freq="h"), read_table(path, freq="h", start="2024-01-01")
    for table in (counted, dated, read_table(frame, freq="h")):
        np.testing.assert_allclose(table.values, frame)
        assert table.columns == ["north", "south"] and table.season == 24
    assert counted.labels(98, 102).tolist() == [98, 99, 100, 101]
    assert dated.times.equals(pd.DatetimeIndex(make_frame(100)["date"]).rename(None)) and dated.first_row is None


def test_a_column_that_counts_the_rows_tells_their_numbers(tmp_path, frame):
    numbered = frame.assign(ds=range(7, 107))
    table = read_table(write(tmp_path / "a.csv", numbered), freq="D")
    assert table.columns == ["north", "south"] and table.labels(0, 1)[0] == 7 and table.season == 7
    long = numbered.melt("ds", var_name="unique_id", value_name="y")
    assert read_table(long, freq="D").labels(0, 1)[0] == 7
    yearly = frame.copy()
    yearly.insert(0, "Year", range(1900, 2000))
    table = read_table(write(tmp_path / "b.csv", yearly), freq="YS")
    assert table.columns == ["north", "south"] and table.labels(100, 101)[0] == 2000
    assert "Column Year counts the rows." in table.repairs
    assert read_table(yearly, freq="YS", targets=["Year"]).columns == ["Year"]
    assert read_table(yearly[["north", "Year"]], freq="YS").columns == ["north", "Year"]
    dated = read_table(yearly.rename(columns={"north": "date"}), time_column="Year", freq="YS")
    assert dated.columns == ["date", "south"] and dated.labels(0, 1)[0] == 1900


def test_one_series_without_a_header(tmp_path, frame):
    table = read_table(write(tmp_path / "a.csv", frame[["north"]], header=False), freq="MS", start="2024-01-01")
    assert table.columns == ["1"] and len(table) == 100 and table.step.freqstr == "MS"


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (lambda f: f, {}, "holds numbers, .*--freq"),
        (lambda f: f[["north"]], {}, "one column only, .*--freq"),
        (lambda f: f, {"start": "2024"}, "--start is for rows without time stamps"),
        (lambda f: f, {"freq": "banana"}, "--freq banana is no step that pandas knows: give"),
        (lambda f: f, {"freq": "2M"}, r"no step that pandas knows; did you mean 2MS or 2ME\?: give"),
        (lambda f: f, {"freq": "-1h"}, "does not go forward"),
        (lambda f: f, {"freq": "0h"}, "--freq 0h does not go forward: give"),
        (lambda f: f, {"freq": "MS", "start": "2024-01-15"}, "not lie on a step of MS: .* such as 2024-02-01"),
        (lambda f: f, {"freq": "h", "start": "2024-01-15T00:00+01:00"}, "has a UTC offset: give it without"),
        (lambda f: f, {"freq": "h", "start": "soon"}, "--start soon makes no time stamps"),
        (lambda f: make_frame(100), {"freq": "h"}, "Column date .* does not count the rows"),
        (lambda f: f.assign(time=[0, *range(99)]), {"freq": "h"}, "Column time .* does not count the rows"),
        (
            lambda f: f.set_axis(pd.date_range("2020", periods=100, freq="MS").strftime("%Y%m")).reset_index(
                names="month"
            ),
            {"freq": "MS"},
            "Column month .* does not count the rows, .*: leave --freq out, or if that column is a series, rename it",
        ),
        (lambda f: f.assign(time=[*range(99), np.inf]), {"freq": "h"}, "Column time .* does not count the rows"),
        (lambda f: f.assign(north=[np.nan, *f.north[1:]]), {"freq": "h"}, "north .1.; first at 0"),
    ],
)
def test_what_cannot_be_counted_is_one_clear_error(tmp_path, frame, change, options, words):
    with pytest.raises(UserError, match=words):
        read_table(write(tmp_path / "a.csv", change(frame)), **options)


def test_a_forecast_goes_on_with_the_numbers(tmp_path, frame):
    data = write(tmp_path / "a.csv", frame)
    with pytest.raises(UserError, match="--calendar needs time stamps"):
        fit(data=str(data), output=str(tmp_path), freq="h", calendar=True, **OPTIONS)
    run = fit(data=str(data), output=str(tmp_path), freq="h", experiment="r", **OPTIONS)
    result = predict(data=str(data), checkpoint=run["folder"], output=str(tmp_path))
    written = pd.read_csv(result["csv"])
    assert list(written) == ["row", "north", "south"] and written["row"].tolist() == [100, 101, 102]
    assert (tmp_path / "forecast.png").exists()
    ahead = Forecaster.from_pretrained(run["folder"]).predict(frame, start="2024-01-01")
    np.testing.assert_allclose(ahead.to_numpy(), written[["north", "south"]], rtol=1e-6)
    assert ahead.index[0] == pd.Timestamp("2024-01-05 04:00") and ahead.index.name == "date"
