"""Fitting again to all rows, for forecasts beyond them and in rolling backtests."""

import json

import pytest

pytest.importorskip("pandas", reason="vim2.forecast needs pandas")

import torch
from forecast_helpers import make_frame
from safetensors.torch import load_file

from vim2.forecast import Forecaster, UserError, evaluate, fit, predict
from vim2.forecast.baselines import Ridge, moments
from vim2.forecast.data import Windows
from vim2.forecast.refitting import refit
from vim2.forecast.scores import score

OPTIONS = dict(horizon=6, lookback=24, d_model=4, d_state=2, members=2, epochs=1, epoch_steps=4, device="cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return fit(data=make_frame().drop(columns="promotion"), output=str(folder), experiment="run", **OPTIONS)


@pytest.fixture
def known(run):
    """The forecaster that knows the training rows alone, and the standardised series."""
    forecaster = Forecaster.from_pretrained(run["folder"], refitted=False)
    return forecaster, forecaster.tensors(forecaster.read(make_frame()), "cpu")[0]


def test_members_know_the_rows_until_then_and_none_behind_them(known):
    forecaster, values = known
    before = {name: value.clone() for name, value in forecaster.model.state_dict().items()}
    hidden = values.clone()
    hidden[350:] = torch.nan
    again = refit(forecaster, hidden, None, 350)
    assert again.refitted == 350 and forecaster.refitted is None
    windows = Windows(values, 24, 6, 0, 350)
    x = windows[:50][0]
    for member, lookbacks in zip(again.model.linear, ((24, 12, 6), (24,))):
        forecasts = []
        for steps, penalty in zip(lookbacks, forecaster.penalties[member.center], strict=True):
            gram, cross, _, _ = moments(windows.shorter(steps), member.center, 256)
            solved = torch.linalg.solve(gram + penalty * torch.eye(steps, dtype=torch.float64), cross).T.float()
            forecasts.append(Ridge(solved, member.center, penalty, 0.0)(x[:, -steps:]))
        torch.testing.assert_close(member(x), torch.stack(forecasts).mean(0), rtol=1e-4, atol=1e-4)
    after = again.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"linear.0.weight", "linear.1.weight", *(n for n in before if n.startswith("networks."))}
    assert again.scaler is forecaster.scaler
    assert all(torch.equal(before[name], value) for name, value in forecaster.model.state_dict().items())


def test_a_forecaster_of_before_has_one_ridge_about_the_mean_and_is_fitted_again_with_it(known, tmp_path):
    """Its config.json has a number where there is a list now."""
    forecaster, values = known
    forecaster.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["penalties"] = {center: penalties[0] for center, penalties in config["penalties"].items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = refit(Forecaster.from_pretrained(tmp_path), values, None, 350)
    for member in again.model.linear[:2]:
        (penalty, *_) = forecaster.penalties[member.center]
        x, _, _ = (windows := Windows(values, 24, 6, 0, 350))[:50]
        expected = Ridge.solved(windows, member.center, penalty)(x)
        torch.testing.assert_close(member(x), expected, rtol=1e-4, atol=1e-4)


def test_the_same_penalty_on_the_same_windows_is_the_same_map(known):
    _, values = known
    train, val = Windows(values, 24, 6, 0, 280), Windows(values, 24, 6, 256, 320)
    ridge = Ridge.fit(train, val)
    torch.testing.assert_close(ridge.refit(train).weight, ridge.weight)


def test_predict_uses_all_rows_and_evaluate_those_of_training(run, tmp_path, capsys):
    frame = make_frame()
    kept = fit(data=frame.drop(columns="promotion"), output=str(tmp_path), experiment="kept", refit=False, **OPTIONS)
    assert run["refitted"] == 400 and kept["refitted"] is None
    assert run["committee"] == kept["committee"] and not (tmp_path / "kept" / "refitted").exists()
    a, b = (evaluate(data=frame, checkpoint=r["folder"], output=str(tmp_path))["scores"] for r in (run, kept))
    assert a == b
    capsys.readouterr()
    a, b = (predict(data=frame, checkpoint=r["folder"], output=str(tmp_path))["values"] for r in (run, kept))
    out = capsys.readouterr().out
    assert (a != b).all() and "know 400 rows" in out and "know the 280 training rows alone" in out
    with pytest.raises(UserError, match="fitted again to all of 400 rows"):
        evaluate(data=frame, checkpoint=f"{run['folder']}/refitted")
    # the run may be fitted again later
    later = fit(
        data=frame.drop(columns="promotion"),
        output=str(tmp_path),
        experiment="kept",
        refit=True,
        resume=True,
        **OPTIONS,
    )
    assert later["refitted"] == 400
    a, b = (load_file(f"{r['folder']}/refitted/model.safetensors") for r in (run, later))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_rolling_backtest_fits_again_before_each_stretch(run, known, tmp_path, capsys):
    result = evaluate(data=make_frame(), checkpoint=run["folder"], refits=2, output=str(tmp_path), device="cpu")
    assert result["windows"] == 75 and result["refits"] == [320, 358]
    assert "Fitted again to the 358 rows before 2024-01-15 22:00:00." in capsys.readouterr().out
    forecaster, values = known
    errors = 0.0
    for rows, start, end in ((320, 0, 38), (358, 38, 75)):
        again, windows = refit(forecaster, values, None, rows), Windows(values, 24, 6, 296, 400).stretch(start, end)
        errors += len(windows) * score(again.forecast_windows, windows)["mse"] / 75
    assert result["scores"]["committee"]["mse"] == pytest.approx(errors, rel=1e-5)
    assert json.loads((tmp_path / "evaluation.json").read_text())["refits"] == [320, 358]


def test_a_backtest_has_as_many_fits_as_it_says(run, tmp_path):
    common = dict(data=make_frame(), checkpoint=run["folder"], output=str(tmp_path), device="cpu")
    assert len(evaluate(refits=20, **common)["refits"]) == 20  # of 75 windows
    with pytest.raises(UserError, match="more than there are windows, 75"):
        evaluate(refits=76, **common)


def test_a_forecaster_that_does_not_say_how_it_was_trained(run, known, tmp_path):
    forecaster, _ = known
    forecaster.training = {}
    forecaster.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not say how it was trained"):
        evaluate(data=make_frame(), checkpoint=str(tmp_path), refits=2)
