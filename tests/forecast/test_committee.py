from itertools import pairwise

import pytest

pytest.importorskip("pandas", reason="vim2.forecast needs pandas")

import numpy as np
import pandas as pd
import torch
from forecast_helpers import make_frame, write_csv

from vim2 import TSM2Config
from vim2.forecast import Forecaster, fit
from vim2.forecast.baselines import Ridge, last_value, seasonal_naive
from vim2.forecast.committee import Committee, Products, find_weights, mixture_losses
from vim2.forecast.data import Windows
from vim2.forecast.significance import gain
from vim2.forecast.trainer import mask_frequencies, spectral_loss

SMALL = dict(lookback=24, horizon=6, patch=6, stride=3, d_model=4, d_state=2)
RIDGES = ("ridges about the mean", "ridge about the last value")


def make(networks=2, season=4, **options):
    torch.manual_seed(0)
    values = torch.randn(120, 3).cumsum(0)
    windows = [Windows(values, 24, 6, *rows) for rows in ((0, 90), (60, 120))]
    committee = Committee(TSM2Config(**SMALL, **options), networks).eval()
    of_mean = [Ridge.fit(*(w.shorter(steps) for w in windows)) for steps in (24, 12, 6)]
    ridges = {"mean": of_mean, "last": [Ridge.fit(*windows, center="last")]}
    committee.set_linear(ridges, season)
    return committee, ridges, windows[1]


def about_mean(ridges, x):
    """By hand: the mean of ridges each of which sees the last steps and centres them by themselves."""
    return torch.stack([ridge(x[:, -steps:]) for ridge, steps in zip(ridges["mean"], (24, 12, 6), strict=True)]).mean(0)


def random_weights(committee):
    weights = torch.rand(len(committee.names))
    return weights / weights.sum()


@torch.no_grad()
def test_the_forecast_is_the_weighted_sum_of_members_by_hand():
    committee, ridges, windows = make()
    committee.weights.copy_(random_weights(committee))
    x, _, _ = windows[:5]
    members = [about_mean(ridges, x), ridges["last"][0](x), seasonal_naive(x, 6, 4)]
    members += [tsm2(x) for tsm2 in committee.networks]
    assert committee.names == [*RIDGES, "last season", "TSM2 1", "TSM2 2"]
    by_hand = sum(w * y for w, y in zip(committee.weights, members, strict=True))
    torch.testing.assert_close(committee(x), by_hand)
    with torch.autocast("cpu", torch.bfloat16):  # which rounds no linear member
        alone = committee(x, weights=committee.prior(["ridge"]))
    torch.testing.assert_close(alone, (members[0] + members[1]) / 2)


@torch.no_grad()
def test_quantiles_are_those_of_the_networks_about_the_mixed_point():
    committee, ridges, windows = make(quantiles=(0.1, 0.4, 0.9))
    x, _, _ = windows[:5]
    quantiles = torch.stack([tsm2(x) for tsm2 in committee.networks])
    y = committee(x)
    assert (y.diff(dim=-1) >= 0).all()
    points = (about_mean(ridges, x) + ridges["last"][0](x)) / 4 + quantiles[..., 1].mean(0) / 2
    torch.testing.assert_close(y[..., 1], points)
    mean = quantiles.mean(0)
    torch.testing.assert_close(y.diff(dim=-1), mean.diff(dim=-1), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(committee(x, weights=committee.prior(["TSM2"])), mean, rtol=1e-4, atol=1e-5)


def test_a_season_of_one_step_is_the_last_value_and_a_long_one_what_there_is():
    for season, steps in ((1, 1), (100, 24)):
        committee, _, windows = make(season=season)
        x, _, _ = windows[:5]
        torch.testing.assert_close(committee.linear[2](x), seasonal_naive(x, 6, steps))
    assert torch.equal(seasonal_naive(x, 6, 1), last_value(x, 6))


def test_a_committee_of_one_is_the_plain_model():
    committee, _, windows = make(networks=1)
    x, _, _ = windows[:5]
    assert committee.names == ["TSM2 1"] and committee.weights.tolist() == [1.0]
    torch.testing.assert_close(committee(x), committee.networks[0](x), rtol=0, atol=0)


@torch.no_grad()
def test_products_tell_the_error_of_every_mixture():
    committee, _, windows = make()
    for known, scale in ((torch.ones(9, 3), torch.ones(3)), (torch.tensor([[4.0, 1, 0], [-4, -1, 0]]), [4, 1, 1])):
        products = Products(known)
        for x, y, future in windows.batches(7):
            products.add(committee.members(x, future)[0], y)
        weights = random_weights(committee)
        x, y, _ = windows[:]
        errors = ((committee(x, weights=weights) - y) / torch.as_tensor(scale)).square().flatten(1).mean(1)
        torch.testing.assert_close(
            mixture_losses(products.result(), weights.double()).float(), errors, rtol=1e-4, atol=1e-6
        )
        plain = [(y - member).square().mean() for member in committee.members(x)[0]]
        torch.testing.assert_close(products.errors().float(), torch.stack(plain))


def products_of(errors):
    """Of members' errors (K, windows, steps)."""
    return torch.einsum("ins,jns->nij", errors, errors).double() / errors.shape[-1]


def test_networks_have_weight_as_far_as_windows_show_that_they_deserve_it():
    groups, generator = make()[0].groups, torch.Generator().manual_seed(0)
    errors = torch.randn(5, 400, 6, generator=generator)

    def weights_of(scale):
        weights = find_weights(products_of(errors * torch.tensor(scale).view(5, 1, 1)), groups, 3, horizon=6)
        assert (weights >= 0).all() and weights.sum().item() == pytest.approx(1) and weights[3] == weights[4]
        return weights.tolist()

    for i in range(3):  # a linear member alone, if it is much the best
        assert weights_of([0.01 if j == i else 3 for j in range(5)]) == [float(j == i) for j in range(5)]
    assert weights_of([3, 3, 3, 0.01, 0.01]) == [0, 0, 0, 0.5, 0.5]
    # errors that are independent and alike: all share, as windows are sure of it
    assert all(weight > 0.1 for weight in weights_of([1, 1, 1, 1, 1]))


def overlapping(scale, common, windows, horizon, seed=0):
    """Errors (K, windows, horizon) of windows at stride 1: each step's, of a deviation for each member, beside what all
    of them have in common."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(len(scale), windows + horizon - 1, generator=generator) * torch.tensor(scale).view(-1, 1)
    steps = steps + common * torch.randn(windows + horizon - 1, generator=generator)
    return steps.unfold(1, horizon, 1)


def share_of_networks(errors):
    return find_weights(products_of(errors), make()[0].groups, 3, errors.shape[2])[3:].sum().item()


@pytest.mark.parametrize("seed", range(3))
def test_networks_that_halve_the_error_have_most_of_the_weight_of_few_windows_too(seed):
    errors = overlapping([1.0, 1.1, 1.2, 0.1, 0.1], 1.0, 39, 12, seed)  # 1 + 1 for 1 + 0.01
    assert share_of_networks(errors) > 0.5
    assert share_of_networks(overlapping([1.0, 1.1, 1.2, 0.1, 0.1], 1.0, 1000, 12, seed)) > 0.9


@pytest.mark.parametrize("windows", [150, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_networks_that_only_add_noise_have_little_weight(seed, windows):
    assert share_of_networks(overlapping([0.1, 1.0, 1.0, 1.0, 1.0], 1.0, windows, 12, seed)) < 0.15


def test_weights_are_continuous_in_the_errors():
    bad, good = (overlapping([0.5, 1.0, 1.0, s, s], 1.0, 600, 24) for s in (1.0, 0.1))
    shares = [share_of_networks(bad + t * (good - bad)) for t in torch.linspace(0, 1, 21)]
    assert shares[0] < 0.3 and shares[-1] > 0.6
    assert all(0 <= after - before < 0.1 for before, after in pairwise(shares))


@pytest.mark.parametrize("seed", range(3))
def test_a_network_that_diverged_leaves_the_weights_of_the_others_as_they_are(seed):
    errors = overlapping([1.0, 1.0, 1.0], 0.5, 400, 24, seed).double()
    others = find_weights(products_of(errors[:2]), torch.eye(2).double(), 1, 24)
    errors = errors * torch.tensor([1.0, 1.0, 1e12]).view(3, 1, 1)
    weights = find_weights(products_of(errors), torch.eye(3).double(), 1, 24)
    torch.testing.assert_close(weights[:2], others, rtol=0, atol=0.01)


def test_a_forecast_that_is_not_finite_is_told():
    products = products_of(torch.randn(5, 50, 6))
    products[:, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        find_weights(products, torch.eye(5, dtype=torch.float64), 3, horizon=6)


def test_a_committee_of_one_has_one_weight():
    committee, _, _ = make(networks=1)
    assert find_weights(products_of(torch.randn(1, 50, 6)), committee.groups, 0, horizon=6).tolist() == [1.0]


def test_the_mixture_is_no_worse_than_the_best_linear_member_and_than_networks_within_a_standard_error():
    generator, (committee, _, _) = torch.Generator().manual_seed(0), make()
    for _ in range(10):
        scale = 0.5 + torch.rand(5, 1, 1, generator=generator)
        common = torch.randn(200, 6, generator=generator)
        products = products_of(common + scale * torch.randn(5, 200, 6, generator=generator))
        mixture = mixture_losses(products, find_weights(products, committee.groups, 3, horizon=6))
        members = products.diagonal(dim1=1, dim2=2)
        networks = mixture_losses(products, committee.prior(["TSM2"]).double())
        for other in (members[:, members[:, :3].mean(0).argmin()], networks):
            better, error = gain(other, mixture, 6)
            assert better >= -error


def test_the_spectral_loss_adds_the_magnitudes_of_the_errors_spectrum():
    assert spectral_loss(torch.ones(2, 16, 3), torch.zeros(2, 16, 3)).item() == pytest.approx(0.65 + 0.35 * 4 / 9)
    y = torch.randn(2, 16, 3)
    assert spectral_loss(y, y) == 0
    spike = torch.zeros(1, 16, 1)
    spike[0, 3] = 1.0  # equally much of each frequency
    assert spectral_loss(spike, torch.zeros(1, 16, 1)).item() == pytest.approx(0.65 / 16 + 0.35 / 4)


def test_half_of_the_windows_lose_a_share_of_their_frequencies_history_and_future_alike():
    torch.manual_seed(0)
    x, y = torch.randn(400, 24, 3), torch.randn(400, 9, 3)
    masked_x, masked_y = mask_frequencies(x, y, 0.3)
    assert masked_x.shape == x.shape and masked_y.shape == y.shape
    before, after = (torch.cat(pair, dim=1) for pair in ((x, y), (masked_x, masked_y)))
    changed = (before != after).flatten(1).any(1)
    assert 0.4 < changed.float().mean() < 0.6
    spectra = [torch.fft.rfft(steps[changed], dim=1) for steps in (before, after)]
    lost = spectra[1].abs() < 1e-4
    torch.testing.assert_close(spectra[1], spectra[0] * ~lost, rtol=1e-3, atol=1e-4)  # what is kept is as it was
    assert not lost[:, 0].any()  # the level
    assert lost[:, 1:].float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert (lost[..., 0] != lost[..., 1]).any()  # each variate others


def test_a_series_that_ridge_knows_perfectly_ends_on_ridge(tmp_path):
    t = np.arange(400)
    waves = {name: np.sin(2 * np.pi * t / period) for name, period in (("a", 24), ("b", 17.3))}
    data = write_csv(tmp_path / "a.csv", pd.DataFrame({"date": pd.date_range("2024", periods=400, freq="h"), **waves}))
    options = dict(horizon=12, lookback=72, d_model=4, d_state=2, epochs=2, epoch_steps=4, device="cpu")
    run = fit(data=str(data), output=str(tmp_path), **options)
    members = run["committee"]["members"]
    assert sum(members[name]["weight"] for name in RIDGES) > 0.99
    assert run["committee"]["val_mse"] <= 1.01 * run["baselines"]["ridge"]["val_mse"] + 1e-6
    assert members["TSM2 1"]["val_mse"] > 100 * members[RIDGES[0]]["val_mse"]


def test_a_variate_that_leaves_its_scale_does_not_speak_for_all_others():
    known = torch.tensor([[50.0, 1, 1, 1], [-50, -1, -1, -1]])
    y = torch.randn(200, 6, 4, generator=torch.Generator().manual_seed(0)) * known[0]
    # one member knows three variates and misses the first by its deviation, the other has half of that and no other
    points = torch.stack((y * torch.tensor([0.0, 1, 1, 1]), y * torch.tensor([0.5, 0, 0, 0])))
    products = Products(known)
    products.add(points, y)
    assert products.errors()[1] < products.errors()[0]
    assert find_weights(products.result(), torch.eye(2).double(), 2, horizon=6)[0] > 0.5


def test_a_short_file_needs_no_options(tmp_path, capsys):
    frame = make_frame(90, step="MS").drop(columns="promotion")
    run = fit(data=frame, output=str(tmp_path), device="cpu", epochs=2, epoch_steps=3)
    filled = {name: run["options"][name] for name in ("horizon", "lookback", "patch", "stride", "batch_size")}
    assert filled == {"horizon": 5, "lookback": 19, "patch": 2, "stride": 1, "batch_size": 16}
    assert run["options"]["variate_mixer"] == "none" and run["folder"].endswith("tsm2-DataFrame")
    out = capsys.readouterr().out
    (told,) = (line for line in out.splitlines() if line.startswith("Chosen by the size of the file: "))
    assert all(f"{name.replace('_', ' ')} {value}" in told for name, value in filled.items())
    for name, row in run["committee"]["members"].items():
        assert f"{name:<26} validation MSE {row['val_mse']:.4f}  weight {row['weight']:.2f}" in out
    forecaster = Forecaster.from_pretrained(run["folder"])
    weights = dict(zip(forecaster.model.names, forecaster.model.weights.tolist(), strict=True))
    assert weights == {name: row["weight"] for name, row in run["committee"]["members"].items()}
    assert forecaster.predict(frame).shape == (5, 3)


def test_long_files_get_the_usual_sizes_and_short_trainings_enough_updates():
    from vim2.command.options import resolve
    from vim2.forecast.options import FitOptions, fill_open

    given, _ = resolve(FitOptions, given={"data": "a.csv"})
    filled = fill_open(given, rows=17420, variates=21)
    assert (filled.horizon, filled.lookback, filled.patch, filled.stride) == (96, 512, 64, 32)
    assert (filled.variate_mixer, filled.batch_size, filled.d_model) == ("s6", 92, 16)
    assert filled.epoch_steps * filled.batch_size >= 11587
    assert fill_open(given, rows=50_000, variates=7).d_model == 32
    few, many = (fill_open(given, rows=34_000, variates=variates) for variates in (21, 207))
    assert (few.batch_size, many.batch_size) == (128, 16) and few.epoch_steps == many.epoch_steps
    short = fill_open(given, rows=966, variates=7)
    assert (short.variate_mixer, short.batch_size, short.d_model) == ("none", 16, 16)
    assert short.epoch_steps * short.epochs == 1000
