import pytest

pytest.importorskip("pandas", reason="vim2.forecast needs pandas")

import torch
from forecast_helpers import shared_data

from vim2.forecast.baselines import (
    PENALTIES,
    Ridge,
    cautious,
    joint_map,
    last_value,
    lowest,
    seasonal_naive,
    shorter_lookbacks,
)
from vim2.forecast.data import Scaler, Windows, make_split
from vim2.forecast.scores import mase, naive_errors, pinball, pinball_losses, score
from vim2.forecast.significance import covariance_of_means, gain
from vim2.forecast.table import read_table


def test_naive_forecasts():
    x = torch.arange(12.0).view(1, 6, 2)
    assert last_value(x, 3)[0, :, 1].tolist() == [11, 11, 11]
    assert seasonal_naive(x, 5, 2)[0, :, 0].tolist() == [8, 10, 8, 10, 8]
    assert seasonal_naive(x, 2, 24)[0, :, 0].tolist() == [0, 2]  # a season longer than the history


@pytest.mark.parametrize("center", ["mean", "last"])
def test_ridge_solves_the_penalised_least_squares_of_centred_windows(center):
    values = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).cumsum(0)
    train, val = Windows(values, 8, 4, 0, 150), Windows(values, 8, 4, 142, 200)
    ridge = Ridge.fit(train, val, center, batch=7)
    errors = {}
    for penalty in PENALTIES[center]:
        x, y, _ = (t if t is None else t.double().transpose(1, 2).flatten(0, 1) for t in train[:])
        level = x.mean(1, keepdim=True) if center == "mean" else x[:, -1:]
        x, y = x - level, y - level
        weight = torch.linalg.solve(x.T @ x + penalty * torch.eye(8), x.T @ y).T
        fitted = Ridge(weight.float(), center, penalty, 0.0)
        errors[penalty] = score(lambda x, _, f=fitted: f(x), val)["mse"]
        if penalty == ridge.penalty:
            torch.testing.assert_close(ridge.weight.double(), weight, rtol=1e-3, atol=1e-5)
    assert ridge.penalty == min(errors, key=errors.get)
    assert ridge.val_mse == pytest.approx(min(errors.values()), rel=1e-4)


def test_scores_count_every_window_step_and_variate_once():
    values = torch.randn(50, 3)
    windows = Windows(values, 6, 4, 0, 50)
    row = score(lambda x, _: last_value(x, 4), windows, batch=7)
    x, y, _ = windows[:]
    error = (last_value(x, 4) - y).double()
    assert row["windows"] == 41
    assert row["mse"] == pytest.approx(error.square().mean().item()) and row["mae"] == pytest.approx(
        error.abs().mean().item()
    )
    assert row["mse_by_variate"] == pytest.approx(error.square().mean((0, 1)).tolist())
    assert row["mae_by_step"] == pytest.approx(error.abs().mean((0, 2)).tolist())


def test_pinball_of_the_median_is_the_absolute_error_and_of_others_lopsided():
    y, forecast = torch.zeros(1, 1, 1), torch.full((1, 1, 1, 1), 3.0)
    assert pinball(forecast, y, (0.5,)).item() == 3
    assert pinball(forecast, y, (0.1,)).item() == pytest.approx(2 * 0.9 * 3)
    assert pinball(-forecast, y, (0.1,)).item() == pytest.approx(2 * 0.1 * 3)


def test_sorting_quantiles_that_cross_lowers_the_pinball_loss_of_every_window():
    forecast, y = torch.randn(1000, 4, 2, 3), torch.randn(1000, 4, 2)
    both = (pinball_losses(f, y, (0.1, 0.5, 0.9)) for f in (forecast, forecast.sort(-1).values))
    before, after = (losses.flatten(1).mean(1) for losses in both)
    assert (after < before).all()


def test_crps_and_coverage_are_of_all_windows_by_hand():
    levels, values = (0.1, 0.5, 0.8), torch.randn(50, 3)
    windows = Windows(values, 6, 4, 0, 50)

    def forecast(x, _):
        return last_value(x, 4).unsqueeze(-1) + torch.tensor([-1.0, 0.0, 0.5])

    row = score(forecast, windows, batch=7, levels=levels)
    x, y, _ = windows[:]
    low, middle, high = forecast(x, None).unbind(-1)
    assert row["coverage"] == pytest.approx(((low <= y) & (y <= high)).double().mean().item())
    assert row["mse"] == pytest.approx((middle - y).square().mean().item(), rel=1e-5)
    losses = [
        max(t * (a - b), (t - 1) * (a - b))
        for t, q in zip(levels, (low, middle, high))
        for a, b in zip(y.flatten().tolist(), q.flatten().tolist())
    ]
    assert row["crps"] == pytest.approx(2 * sum(losses) / len(losses), rel=1e-5)


def test_mase_is_one_for_the_seasonal_naive_forecast_of_the_training_rows():
    values = torch.randn(60, 2).cumsum(0) * torch.tensor([1.0, 9.0])
    flat = torch.cat((values, torch.ones(60, 1)), dim=1)
    naive = naive_errors(flat, 4)
    assert naive[2] == 0 and naive[1] == pytest.approx((values[4:, 1] - values[:-4, 1]).abs().mean().item())
    row = score(lambda x, _: seasonal_naive(x, 1, 4), Windows(flat, 4, 1, 0, 60))
    assert mase(row, naive) == pytest.approx(1)  # whose third variate, the same throughout, does not count
    assert mase(row, torch.zeros(3)) is None
    assert torch.equal(naive_errors(values, 60), naive_errors(values, 1))


def test_the_protocol_gives_ridge_its_known_error_on_etth1():
    table = read_table(shared_data("ETTh1.csv.xz"))
    split = make_split(len(table), (8640, 2880, 2880), 512, 96)
    values = torch.tensor(Scaler.fit(table.values[:8640]).transform(table.values), dtype=torch.float32)
    windows = {part: Windows(values, 512, 96, *split.borders(part, 512)) for part in ("train", "val", "test")}
    assert [len(w) for w in windows.values()] == [8033, 2785, 2785]
    ridge = Ridge.fit(windows["train"], windows["val"])
    assert score(lambda x, _: ridge(x), windows["test"])["mse"] == pytest.approx(0.367, abs=1e-3)


def test_the_error_of_a_gain_counts_what_windows_have_in_common():
    noise = torch.randn(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    after = torch.zeros_like(noise)
    mean, error = gain(noise + 0.5, after, 1)
    assert mean == pytest.approx(0.5, abs=0.03) and error == pytest.approx(20000**-0.5, rel=0.03)
    overlapping = noise.unfold(0, 24, 1).mean(-1)  # every value is in 24 windows; the mean's error stays what it is
    assert gain(overlapping, after[:19977], 1)[1] < 0.3 * error
    assert gain(overlapping, after[:19977], 200)[1] == pytest.approx(error, rel=0.25)
    assert gain(after, after, 24) == (0, 0)


@pytest.mark.parametrize("windows, horizon", [(600, 30), (300, 100), (100, 100), (25, 100)])
def test_a_mean_lies_within_one_error_in_two_of_three_samples_however_few_windows_there_are(windows, horizon):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1000, windows + horizon - 1, generator=generator, dtype=torch.float64)
    gains = [gain(of_run, torch.zeros(()), horizon) for of_run in noise.unfold(1, horizon, 1).mean(-1)]
    assert sum(abs(mean) <= error for mean, error in gains) / 1000 == pytest.approx(0.68, abs=0.04)


def test_a_cautious_ridge_has_a_heavier_penalty_that_validation_cannot_tell_from_the_lowest():
    walks = torch.randn(700, 2, generator=torch.Generator().manual_seed(0)).cumsum(0)  # all there is is the last value
    train, val = Windows(walks, 24, 12, 0, 500), Windows(walks, 24, 12, 476, 700)
    path = Ridge.path(train, val, "last")
    light, heavy = lowest(path), cautious(path, val)
    assert light.penalty < heavy.penalty
    worse, error = gain(heavy.losses(val), light.losses(val), 12)
    assert 0 < worse <= error
    waves = torch.arange(700.0).view(-1, 1).mul(0.3).sin()  # all of it is linear, and a heavier penalty shows
    train, val = Windows(waves, 24, 12, 0, 500), Windows(waves, 24, 12, 476, 700)
    path = Ridge.path(train, val, "last")
    assert cautious(path, val).penalty <= 10 * lowest(path).penalty < 1
    x, _, _ = val[:]
    torch.testing.assert_close(path[-1](x), last_value(x, 12))  # the heaviest penalty leaves nothing but that


def test_the_covariance_of_means_tells_the_error_of_every_sum():
    values = torch.randn(90, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(0)
    sums = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    covariance = covariance_of_means(values, 12)
    assert (sums @ covariance @ sums).sqrt().item() == pytest.approx(gain(values @ sums, torch.zeros(90), 12)[1])


def test_shorter_windows_are_the_same_without_their_first_steps():
    values, future = torch.randn(40, 3), torch.randn(40, 2)
    windows = Windows(values, 8, 4, 5, 38, future)
    x, y, z = windows[3:7]
    for got, whole in zip(windows.shorter(3)[3:7], (x[:, 5:], y, z), strict=True):
        assert torch.equal(got, whole)
    assert len(windows.shorter(3)) == len(windows) and windows[3:7][0].shape[1] == 8
    assert torch.equal(windows.shorter(8)[3:7][0], x)
    assert [shorter_lookbacks(steps) for steps in (512, 19, 2, 1)] == [[512, 256, 128], [19, 9, 4], [2, 1], [1]]


@pytest.mark.parametrize("center", ["mean", "last"])
def test_a_joint_map_forecasts_the_mean_of_what_ridges_of_several_lookbacks_do(center):
    x = torch.randn(5, 12, 3).cumsum(1)
    ridges = [Ridge(torch.randn(4, steps), center, 1.0, 0.0) for steps in (12, 6, 1)]
    joint = Ridge(joint_map(ridges, 12), center, 1.0, 0.0)
    by_hand = torch.stack([ridge(x[:, -ridge.weight.shape[1] :]) for ridge in ridges]).mean(0)
    torch.testing.assert_close(joint(x), by_hand, rtol=1e-4, atol=1e-4)
