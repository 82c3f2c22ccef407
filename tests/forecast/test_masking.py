"""Missing values that are masked: series of different lengths, and gaps, that nothing is learned from or scored by."""

import json

import pytest
from devices import DEVICE, needs_gpu

pytest.importorskip("pandas", reason="vim2.forecast needs pandas")

import numpy as np
import pandas as pd
import torch
from forecast_helpers import make_frame

from vim2.command.options import resolve
from vim2.forecast import Forecaster, UserError, evaluate, fit
from vim2.forecast.baselines import Ridge, cautious
from vim2.forecast.committee import Networks, Products
from vim2.forecast.conformal import conformal_quantile
from vim2.forecast.data import Scaler, Windows, last_known
from vim2.forecast.options import TrainingOptions
from vim2.forecast.scores import Errors, naive_errors
from vim2.forecast.table import read_table
from vim2.forecast.trainer import LOSS, Trainer
from vim2.tsm2 import TSM2Config

COLUMNS = ["north", "south", "level"]
OPTIONS = dict(horizon=6, lookback=24, d_model=4, d_state=2, members=2, epochs=1, epoch_steps=4, device=DEVICE)


@pytest.fixture
def frame():
    """North begins late, south has a gap in the rows to train on and one in those to test on, level ends early."""
    frame = make_frame().drop(columns="promotion")
    frame.loc[:99, "north"] = np.nan
    frame.loc[150:170, "south"] = frame.loc[350:357, "south"] = np.nan
    frame.loc[380:, "level"] = np.nan
    return frame


@pytest.fixture
def values(frame):
    table = read_table(frame, missing="mask")
    return torch.tensor(Scaler.fit(table.values[:280]).transform(table.values), dtype=torch.float32)


def pairs(values, start, end, lookback=24, horizon=6):
    """History and truth of every window and series that can be learned from, one by one."""
    filled = pd.DataFrame(values.numpy()).ffill().fillna(0.0).to_numpy()
    for i in range(start, end - lookback - horizon + 1):
        for j in range(values.shape[1]):
            x, y = values[i : i + lookback, j], values[i + lookback : i + lookback + horizon, j]
            if x.isfinite().any():
                yield i - start, j, torch.tensor(filled[i : i + lookback, j]), y


def test_a_scale_is_that_of_the_known_values(frame):
    table = read_table(frame, missing="mask")
    assert "149 missing values are masked" in table.repairs[-1]
    scaler = Scaler.fit(table.values)
    np.testing.assert_allclose(scaler.mean, frame[COLUMNS].mean())
    np.testing.assert_allclose(scaler.std, frame[COLUMNS].std(ddof=0))


def test_windows_know_nothing_of_later_values(values):
    known = last_known(values)
    np.testing.assert_array_equal(known, pd.DataFrame(values.numpy()).ffill().fillna(0.0))
    windows = Windows(values, 24, 6, 0, 400)
    assert windows.has_gaps and not Windows(known, 24, 6, 0, 400).has_gaps
    x, y, _ = windows[:]
    expected = {(i, j): (history, truth) for i, j, history, truth in pairs(values, 0, 400)}
    for i in range(len(windows)):
        for j in range(3):
            if (i, j) in expected:
                torch.testing.assert_close(x[i, :, j], expected[i, j][0])
                torch.testing.assert_close(y[i, :, j], expected[i, j][1], equal_nan=True)
            else:
                assert y[i, :, j].isnan().all()
    part = windows.stretch(140, 150).shorter(8)
    torch.testing.assert_close(part[:][0], x[140:150, -8:])
    assert y[147, :, 1].isfinite().all()  # behind a gap of 21 rows, of which the last 8 are all that is seen here
    assert part[torch.tensor([7])][1][0, :, 1].isnan().all() and part[8:9][1][0, :, 1].isfinite().all()


def test_ridges_are_fitted_to_series_that_are_known_throughout(values):
    train, val = Windows(values, 24, 6, 0, 280), Windows(values, 24, 6, 256, 400)
    path = Ridge.path(train, val, "last", batch=7)
    sides = [[(x, y) for _, _, x, y in pairs(values, *rows) if y.isfinite().all()] for rows in ((0, 280), (256, 400))]
    (a, b), (c, d) = (
        (torch.stack([x - x[-1] for x, _ in side]).double(), torch.stack([y - x[-1] for x, y in side]).double())
        for side in sides
    )
    for ridge in path[::7]:
        weight = torch.linalg.solve(a.T @ a + ridge.penalty * torch.eye(24, dtype=torch.float64), a.T @ b)
        torch.testing.assert_close(ridge.weight, weight.T.float(), rtol=1e-3, atol=1e-4)
        assert ridge.val_mse == pytest.approx((c @ weight - d).square().mean().item(), rel=1e-4)
    every = torch.cat(
        [(path[3](x[None, :, None].float())[0, :, 0] - y)[y.isfinite()] for _, _, x, y in pairs(values, 256, 400)]
    )
    assert path[3].losses(val).mean().item() == pytest.approx(every.square().mean().item(), rel=1e-4)
    assert cautious(path, val) in path


def test_errors_are_means_over_known_values():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(9, 5, 3, generator=generator)
    forecast = torch.randn(9, 5, 3, 3, generator=generator).sort(-1).values
    missing = torch.rand(9, 5, 3, generator=generator) < 0.4
    missing[:, :, 1] = True
    y[missing] = torch.nan
    errors = Errors((0.1, 0.5, 0.9))
    for part in (slice(0, 4), slice(4, 9)):
        errors.add(forecast[part], y[part])
    result, e = errors.result(), forecast[..., 1] - y
    assert result["mse"] == pytest.approx(e.square().nanmean().item(), rel=1e-6)
    assert result["mae"] == pytest.approx(e.abs().nanmean().item(), rel=1e-6)
    np.testing.assert_allclose(result["mse_by_variate"], e.square().nanmean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(result["mae_by_step"], e.abs().nanmean((0, 2)), rtol=1e-5)
    inside = ((forecast[..., 0] <= y) & (y <= forecast[..., -1]))[~missing].float().mean()
    assert result["coverage"] == pytest.approx(inside.item(), rel=1e-6)
    tau, beyond = torch.tensor([0.1, 0.5, 0.9]), y.unsqueeze(-1) - forecast
    assert result["crps"] == pytest.approx(
        (2 * torch.maximum(tau * beyond, (tau - 1) * beyond)).nanmean().item(), rel=1e-5
    )


def test_members_are_compared_by_known_values(values):
    generator = torch.Generator().manual_seed(0)
    _, y, _ = Windows(values, 24, 6, 0, 400)[:]
    points = torch.randn(4, *y.shape, generator=generator)
    products = Products(values[:320])
    for start in range(0, len(y), 100):
        products.add(points[:, start : start + 100], y[start : start + 100])
    errors = points - y
    np.testing.assert_allclose(products.errors(), errors.square().nanmean((1, 2, 3)), rtol=1e-5)
    scaled = errors / torch.tensor(np.nanstd(values[:320], axis=0)).clamp_min(1)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    mixed = (weights.view(-1, 1, 1, 1) * scaled).sum(0)
    found = weights.double() @ products.result().mean(0) @ weights.double()
    assert found.item() == pytest.approx(mixed.square().nanmean().item(), rel=1e-5)


@pytest.mark.parametrize("loss", [*LOSS, "pinball"])
def test_nothing_is_learned_from_missing_values(values, loss):
    quantiles = (0.1, 0.5, 0.9) if loss == "pinball" else ()
    config = TSM2Config(lookback=24, horizon=6, patch=6, stride=6, d_model=4, d_state=2, quantiles=quantiles)
    given = dict(epochs=1, epoch_steps=1, batch_size=4, loss="mse" if quantiles else loss)
    windows = Windows(values, 24, 6, 0, 280)
    trainer = Trainer(Networks(config, 2), windows, resolve(TrainingOptions, given=given)[0])
    x, y, _ = windows[100:180]
    forecast = torch.randn(2, *y.shape, *(3 for _ in quantiles[:1]), requires_grad=True)
    trainer.graphed = lambda x: forecast
    value = trainer.loss(x, y, None)
    value.backward()
    missing = y.isnan()
    assert 0 < missing.float().mean() < 1
    assert not forecast.grad[:, missing].any() and forecast.grad[:, ~missing].all()
    e = (forecast - (y.unsqueeze(-1) if quantiles else y)).detach()
    if loss in ("mse", "mae"):
        assert value.item() == pytest.approx((e.square() if loss == "mse" else e.abs()).nanmean().item(), rel=1e-5)
    with torch.no_grad():  # whatever is forecast there
        forecast[:, missing] = 1e6
    assert trainer.loss(x, y, None).item() == pytest.approx(value.item())


def test_bands_are_corrected_by_known_values():
    scores = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    scores[:30, 1] = scores[5:, 2] = scores[:, 3] = torch.nan
    expected = [conformal_quantile(c[c.isfinite()].unsqueeze(1), 0.8)[0] for c in scores.T[:3]]
    torch.testing.assert_close(conformal_quantile(scores, 0.8), torch.stack([*expected, torch.tensor(0.0)]))


@pytest.mark.parametrize("options", [{}, {"quantiles": [0.1, 0.5, 0.9]}, {"members": 1}], ids=str)
def test_series_of_different_lengths_are_forecast_together(tmp_path, frame, options):
    options = {**OPTIONS, **options}
    long = frame.melt("date", var_name="unique_id", value_name="y").dropna().rename(columns={"date": "ds"})
    run = fit(data=long, missing="mask", output=str(tmp_path), experiment="long", **options)
    wide = fit(data=frame, missing="mask", output=str(tmp_path), experiment="wide", **options)
    assert run["committee"] == wide["committee"] and run["history"][0]["val_mse"] == wide["history"][0]["val_mse"]
    result = evaluate(data=frame, checkpoint=wide["folder"], output=str(tmp_path), device=DEVICE, refits=2)
    scaled = (frame[COLUMNS] - frame[COLUMNS][:280].mean()) / frame[COLUMNS][:280].std(ddof=0)
    now, truth = scaled.ffill().to_numpy()[319:394], scaled.to_numpy()
    errors = np.stack([truth[320 + k : 395 + k] - now for k in range(6)], axis=1)
    assert errors.shape == (75, 6, 3)
    assert result["scores"]["last value"]["mse"] == pytest.approx(np.nanmean(errors**2), rel=1e-4)
    saved = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert saved["scores"]["last value"]["mse"] == result["scores"]["last value"]["mse"]
    # what is forecast of a series that has ended goes on from its last value
    forecaster = Forecaster.from_pretrained(wide["folder"])
    filled = frame.assign(**{c: frame[c].ffill().bfill() for c in COLUMNS})
    ahead = forecaster.predict(frame)
    assert np.isfinite(ahead.to_numpy()).all()
    pd.testing.assert_frame_equal(ahead, forecaster.predict(filled))


def test_a_series_without_truths_in_the_test_rows_has_no_error(tmp_path, frame):
    frame.loc[310:, "level"] = np.nan
    run = fit(data=frame, missing="mask", output=str(tmp_path), **OPTIONS)
    result = evaluate(data=frame, checkpoint=run["folder"], output=str(tmp_path), device=DEVICE)
    row = result["scores"]["committee"]
    assert np.isnan(row["mse_by_variate"]).tolist() == [False, False, True] and np.isfinite(row["mase"])
    saved = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert saved["scores"]["committee"]["mse_by_variate"][2] is None
    assert (tmp_path / "errors.png").exists()


def test_a_series_that_begins_with_the_test_rows_of_another_file_is_scored_there(tmp_path, frame):
    """It was trained on, but the later file has none of it before."""
    run = fit(data=frame, missing="mask", output=str(tmp_path), experiment="r", **OPTIONS)
    later = frame.assign(south=frame["south"].where(frame.index >= 360))
    scores = evaluate(data=later, checkpoint=run["folder"], output=str(tmp_path), device=DEVICE)["scores"]
    assert np.isfinite(scores["committee"]["mse_by_variate"]).all()


def test_what_cannot_be_masked_is_told(tmp_path, frame):
    options = dict(OPTIONS, missing="mask", output=str(tmp_path))
    with pytest.raises(UserError, match="280 rows to train on hold no value of north: leave it out"):
        fit(data=frame.assign(north=frame["north"].where(frame.index >= 280)), **options)
    sparse = frame.assign(**{c: frame[c].where(frame.index % 4 > 0) for c in COLUMNS})
    with pytest.raises(UserError, match="No series has 6 known values in a row"):
        fit(data=sparse, **options)
    known = make_frame()
    known.loc[:290, "promotion"] = np.nan
    with pytest.raises(UserError, match="hold no value of promotion: leave it out with --future-columns"):
        fit(data=known, future_columns=["promotion"], **options)
    known.loc[3:, "promotion"] = 0.0
    with pytest.raises(UserError, match="to have them at their mean, or choose columns with --future-"):
        read_table(known, future_columns=["promotion"])


@pytest.mark.parametrize("members", [1, 2])
def test_known_columns_stand_at_their_mean_where_they_are_missing(tmp_path, members):
    frame = make_frame()
    frame.loc[390:, ["north", "south", "level"]] = np.nan
    frame.loc[[100, 101, 200, 310, 393], "promotion"] = np.nan
    frame.loc[150:160, "south"] = np.nan
    options = {**OPTIONS, "members": members, "future_columns": ["promotion"], "missing": "mask"}
    run = fit(data=frame, output=str(tmp_path), **options)
    assert "5 missing values of known columns stand at their mean: promotion (5)." in run["repairs"]
    forecaster = Forecaster.from_pretrained(run["folder"])
    mean = frame["promotion"][: run["rows"]["train"]].mean()
    assert forecaster.future_scaler.mean == pytest.approx([mean])
    table = forecaster.read(frame)
    _, features = forecaster.tensors(table, "cpu")
    assert features.isfinite().all() and not features[[100, 101, 200, 310, 393]].any()
    ahead = forecaster.predict(frame)
    assert len(ahead) == 6 and np.isfinite(ahead.to_numpy()).all()
    pd.testing.assert_frame_equal(ahead, forecaster.predict(frame.fillna({"promotion": mean})), rtol=1e-4)
    other = forecaster.predict(frame.fillna({"promotion": 5.0}))
    assert not np.allclose(ahead, other)
    scores = evaluate(data=frame, checkpoint=run["folder"], output=str(tmp_path), device=DEVICE)["scores"]
    assert all(np.isfinite(row["mse"]) for row in scores.values())


@needs_gpu
@pytest.mark.parametrize("options", [{}, {"quantiles": [0.1, 0.5, 0.9]}, {"loss": "mse"}], ids=str)
def test_masks_train_the_same_on_a_gpu(tmp_path, frame, options):
    """Without chance, with CUDA graphs and without, and much as on the CPU."""
    given = {**OPTIONS, "dropout": 0.0, "head_dropout": 0.0, "frequency_mask": 0.0, "missing": "mask", **options}
    runs = [
        fit(data=frame, output=str(tmp_path), experiment=f"{device} {graph}", **given | how)
        for device, graph in (("cuda", False), ("cuda", True), ("cpu", False))
        for how in [dict(device=device, cuda_graph=graph)]
    ]
    for run in runs[1:]:
        assert run["history"][0]["train_loss"] == pytest.approx(runs[0]["history"][0]["train_loss"], rel=1e-3)
        assert run["committee"]["val_mse"] == pytest.approx(runs[0]["committee"]["val_mse"], rel=1e-2)


def test_who_begins_late_is_advised_to_mask(frame):
    frame.loc[:250, "north"] = np.nan
    with pytest.raises(UserError, match="Add --missing mask, to learn from what is there: north begins late"):
        read_table(frame)


def test_series_are_known_late_by_rows_though_stamps_are_there_twice(frame):
    frame.loc[:250, "north"] = np.nan
    twice = pd.concat([frame, frame.iloc[251:255]])
    with pytest.raises(UserError, match="north begins late"):
        read_table(twice, times="keep")


def test_naive_errors_are_of_known_values(values):
    expected = np.nanmean(np.abs(values[24:].double().numpy() - values[:-24].double().numpy()), axis=0)
    np.testing.assert_allclose(naive_errors(values, 24), expected, rtol=1e-6)
