import logging

import pytest

pytest.importorskip("neuralforecast", reason="neuralforecast is not installed: pip install neuralforecast")

import numpy as np
import pandas as pd
from neuralforecast import NeuralForecast
from neuralforecast.losses.pytorch import MSE, DistributionLoss, MQLoss

from vim2.forecast.neuralforecast import TSM2

OPTIONS = dict(
    h=12,
    input_size=48,
    n_series=3,
    d_model=8,
    d_state=4,
    max_steps=30,
    learning_rate=5e-3,
    scaler_type="standard",
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=False,
)


@pytest.fixture(scope="module", autouse=True)
def silence():
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def frames():
    """Three series that jump where `sale`, known ahead, is 1; their static features; the frame to forecast."""
    t, frames = np.arange(212), []
    for i, name in enumerate("abc"):
        noise, sale = np.random.default_rng(i).normal(size=(2, 212)), (t % 31 < 6).astype(float)
        y = np.sin(2 * np.pi * (t + 3 * i) / 24) + 2 * sale + 0.1 * noise[0]
        columns = dict(ds=pd.date_range("2024-01-01", periods=212, freq="h"), y=y, clicks=noise[1], sale=sale)
        frames.append(pd.DataFrame({"unique_id": name, **columns}))
    static = pd.DataFrame({"unique_id": list("abc"), "size": [1.0, 2.0, 3.0], "city": [0.0, 1.0, 0.0]})
    history = pd.concat([f[:200] for f in frames], ignore_index=True)
    future = pd.concat([f[200:][["unique_id", "ds", "sale"]] for f in frames], ignore_index=True)
    return history, static, future


@pytest.fixture(scope="module")
def fitted(frames):
    history, static, _ = frames
    exogenous = dict(futr_exog_list=["sale"], hist_exog_list=["clicks"], stat_exog_list=["size", "city"])
    models = [TSM2(loss=MQLoss(level=[80]), **exogenous, **OPTIONS), TSM2(loss=MSE(), alias="plain", **OPTIONS)]
    forecasts = NeuralForecast(models, freq="h")
    forecasts.fit(history, static_df=static)
    return forecasts


@pytest.mark.filterwarnings("ignore")
def test_it_trains_predicts_saves_and_loads(fitted, frames, tmp_path):
    _, _, future = frames
    forecast = fitted.predict(futr_df=future)
    assert list(forecast) == ["unique_id", "ds", "TSM2-median", "TSM2-lo-80", "TSM2-hi-80", "plain"]
    assert len(forecast) == 36 and forecast.notna().all().all()
    assert (forecast["TSM2-lo-80"] < forecast["TSM2-hi-80"]).mean() > 0.9
    fitted.save(str(tmp_path / "saved"))
    again = NeuralForecast.load(str(tmp_path / "saved")).predict(futr_df=future)
    pd.testing.assert_frame_equal(again, forecast)


@pytest.mark.filterwarnings("ignore")
def test_exogenous_columns_reach_the_forecast(fitted, frames):
    history, static, future = frames
    forecast = fitted.predict(futr_df=future)
    for changed in (
        fitted.predict(futr_df=future.assign(sale=1 - future["sale"])),
        fitted.predict(history.assign(clicks=-history["clicks"]), static, future),
        fitted.predict(history, static.assign(size=static["size"] + 5), future),
    ):
        assert not np.allclose(changed["TSM2-median"], forecast["TSM2-median"], atol=1e-4)
        np.testing.assert_allclose(changed["plain"], forecast["plain"], atol=1e-5)  # the model that has none


@pytest.mark.filterwarnings("ignore")
def test_categorical_columns_reach_the_forecast(frames, tmp_path):
    """Of all three kinds, beside columns of numbers."""
    history, static, future = frames
    history, future = (f.assign(hour=f["ds"].dt.hour.astype(str)) for f in (history, future))
    history["weather"] = np.where(history["clicks"] > 0, "fair", "foul")
    static["city"] = ["Bonn", "Oslo", "Bonn"]
    columns = dict(
        futr_exog_list=["sale", "hour"], hist_exog_list=["clicks", "weather"], stat_exog_list=["size", "city"]
    )
    columns |= dict(cat_exog_list=["hour", "weather", "city"])
    model = TSM2(**columns, categorical_cardinalities={"hour": 25, "weather": 3, "city": 3}, **OPTIONS)
    forecasts = NeuralForecast([model], freq="h")
    forecasts.fit(history, static_df=static)
    forecast = forecasts.predict(futr_df=future)
    for changed in (
        forecasts.predict(futr_df=future.assign(hour="0")),
        forecasts.predict(history.assign(weather="foul"), static, future),
        forecasts.predict(history, static.assign(city="Oslo"), future),
    ):
        assert not np.allclose(changed["TSM2"], forecast["TSM2"], atol=1e-4)
    forecasts.save(str(tmp_path / "saved"))
    pd.testing.assert_frame_equal(NeuralForecast.load(str(tmp_path / "saved")).predict(futr_df=future), forecast)


@pytest.mark.filterwarnings("ignore")
def test_a_lookback_of_three_horizons_where_it_is_left_open():
    assert TSM2(**{**OPTIONS, "input_size": -1}).model.config.lookback == 36


@pytest.mark.filterwarnings("ignore")
def test_cross_validation(frames):
    history, _, _ = frames
    rows = NeuralForecast([TSM2(**{**OPTIONS, "max_steps": 2})], freq="h").cross_validation(history, n_windows=2)
    assert len(rows) == 3 * 2 * 12 and rows["TSM2"].notna().all()


@pytest.mark.filterwarnings("ignore")
def test_distributions_are_refused():
    with pytest.raises(ValueError, match="not what DistributionLoss needs: use a point loss"):
        TSM2(loss=DistributionLoss("Normal"), **OPTIONS)
