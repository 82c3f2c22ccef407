import pytest

pytest.importorskip("pandas", reason="vim2.forecast needs pandas")

import torch
from forecast_helpers import make_frame
from safetensors.torch import load_file, save_file

import vim2.forecast.conformal
from vim2 import TSM2Config
from vim2.forecast import Forecaster, UserError, evaluate, predict
from vim2.forecast.conformal import Conformity, calibrate, conformal_quantile

LEVELS = (0.1, 0.5, 0.9)


def made(windows=4000, variates=2, horizon=3, levels=LEVELS, offset=(-0.1, 0.0, 0.1), seed=0, liveliest=10, **options):
    """Normal truth whose spread is each window's own, from 1 to the liveliest's, and quantiles at given distances from
    its mean."""
    config = TSM2Config(lookback=8, patch=4, stride=2, horizon=horizon, quantiles=levels, **options)
    generator = torch.Generator().manual_seed(seed)
    lively = 1 + (liveliest - 1) * torch.rand(windows, 1, 1, generator=generator)
    x = lively * torch.randn(windows, 8, variates, generator=generator)
    step = torch.arange(1, horizon + 1).view(1, -1, 1)
    y = lively * step * torch.randn(windows, horizon, variates, generator=generator)
    forecast = torch.tensor(offset).expand(windows, horizon, variates, -1).contiguous()
    return config, x, forecast, y


def learn(config, x, forecast, y, batch=256):
    conformity = Conformity(config, len(x), x.shape[2])
    for part in zip(*(t.split(batch) for t in (x, forecast, y)), strict=True):
        conformity.add(*part)
    return conformity.correction()


def coverage(forecast, y, low=0, high=-1):
    return ((forecast[..., low] <= y) & (y <= forecast[..., high])).float().mean(0)


@pytest.mark.parametrize(
    ("distance", "liveliest"), [(0.0, 10), (0.1, 10), (3.0, 1)], ids=["no width", "too narrow", "too wide"]
)
@pytest.mark.parametrize("instance_norm", ["mean", "none"])
def test_bands_cover_what_they_say_at_every_step_of_every_variate(distance, liveliest, instance_norm):
    offset, options = (-distance, 0.0, distance), dict(instance_norm=instance_norm, liveliest=liveliest)
    config, *windows = made(offset=offset, **options)
    correction = learn(config, *windows)
    assert correction.shape == (3, 2, 3) and not correction[..., 1].any()
    _, x, forecast, y = made(offset=offset, seed=1, **options)
    calibrated = calibrate(forecast, x, correction, config)
    assert (calibrated.diff(dim=-1) >= 0).all()
    assert torch.allclose(coverage(calibrated, y), torch.full((3, 2), 0.8), atol=0.04)


def test_each_pair_of_levels_and_a_level_without_counterpart():
    levels, offset = (0.05, 0.25, 0.6, 0.75, 0.95), (-0.3, -0.2, 0.1, 0.2, 0.3)
    config, *windows = made(levels=levels, offset=offset)
    correction = learn(config, *windows)
    _, x, forecast, y = made(levels=levels, offset=offset, seed=1)
    calibrated = calibrate(forecast, x, correction, config)
    assert torch.allclose(coverage(calibrated, y), torch.full((3, 2), 0.9), atol=0.04)
    assert torch.allclose(coverage(calibrated, y, 1, 3), torch.full((3, 2), 0.5), atol=0.04)
    below = (y <= calibrated[..., 2]).float().mean()
    assert below == pytest.approx(0.6, abs=0.04)


def test_few_windows_share_a_correction_over_variates():
    config, *windows = made(windows=59)
    assert learn(config, *windows).shape == (3, 1, 3)
    config, *windows = made(windows=60)
    assert learn(config, *windows).shape == (3, 2, 3)


def test_the_conformal_quantile_is_of_one_score_more():
    scores = torch.arange(1.0, 100.0)[torch.randperm(99)]
    assert conformal_quantile(scores, 0.8) == 80  # of 99, not the 79th or 80th by rounding
    assert conformal_quantile(scores[:5], 0.9) == scores[:5].max()


def test_long_validation_is_thinned_evenly_whatever_the_batch(monkeypatch):
    config, *windows = made(windows=1000)
    monkeypatch.setattr(vim2.forecast.conformal, "MAX_SCORES", 1000 * 3 * 2 * 3 // 7)
    a, b = learn(config, *windows, batch=64), learn(config, *windows, batch=1000)
    assert torch.equal(a, b)
    torch.testing.assert_close(a, learn(config, *(t[::8] for t in windows)))


def test_a_forecaster_keeps_and_applies_its_correction(trained, data, tmp_path, capsys):
    forecaster = Forecaster.from_pretrained(trained)
    assert forecaster.conformal.shape == (12, 1, 3)
    x = torch.randn(2, 48, 3)
    future = torch.randn(2, 12, 3)
    with torch.no_grad():
        raw, calibrated = forecaster.model(x, future=future), forecaster.forecast_windows(x, future)
    torch.testing.assert_close(calibrated, calibrate(raw, x, forecaster.conformal, forecaster.model.config))
    assert not torch.equal(raw, calibrated) and torch.equal(raw[..., 1], calibrated[..., 1])
    result = evaluate(data=str(data), checkpoint=str(trained), output=str(tmp_path), device="cpu")
    assert result["quantiles"] == {name: result["scores"]["committee"][name] for name in ("crps", "coverage")}
    told = f"the band of 80% covers {result['quantiles']['coverage']:.1%}"
    assert told in capsys.readouterr().out
    wanted, before = 0.8, result["without_conformal"]["coverage"]
    assert abs(result["quantiles"]["coverage"] - wanted) < abs(before - wanted)


def test_a_forecaster_of_a_run_that_was_cut_off_is_used_as_it_is_and_that_is_told(trained, data, tmp_path, capsys):
    forecaster = Forecaster.from_pretrained(trained, refitted=False)
    forecaster.conformal = None
    del forecaster.metrics["committee"]
    forecaster.save_pretrained(tmp_path)
    assert "conformal" not in load_file(tmp_path / "model.safetensors")
    result = evaluate(data=str(data), checkpoint=str(tmp_path), device="cpu")
    assert "without_conformal" not in result
    frame = make_frame(412)
    frame.loc[400:, ["north", "south", "level"]] = float("nan")
    predict(data=frame, checkpoint=str(tmp_path), output=str(tmp_path), device="cpu")
    told = "The members have equal weights and the quantiles have no conformal correction, as"
    assert capsys.readouterr().out.count(told) == 2


@pytest.mark.parametrize(
    ("correction", "words"),
    [
        (torch.zeros(12, 2, 3), r"conformal is \(12, 2, 3\), for 12 steps and 3 quantiles"),
        (torch.full((12, 1, 3), torch.nan), "NaN or infinite"),
        (torch.zeros(12, 1, 3, dtype=torch.int32), "int32"),
    ],
    ids=["shape", "nan", "integer"],
)
def test_a_correction_that_no_training_writes(trained, tmp_path, correction, words):
    Forecaster.from_pretrained(trained).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "conformal": correction}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=words):
        Forecaster.from_pretrained(tmp_path)
