"""Errors of forecasts over all windows of a part."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from .baselines import Ridge, last_value, seasonal_naive
from .data import Windows, where_known

__all__ = [
    "Errors",
    "Forecasts",
    "baseline_forecasts",
    "mase",
    "model_forecast",
    "naive_errors",
    "nearest_to_median",
    "pinball",
    "pinball_losses",
    "score",
    "score_all",
]

Forecast = Callable[[Tensor, Tensor | None], Tensor]
Forecasts = Callable[[Tensor, Tensor | None], dict[str, Tensor]]


class Errors:
    """Errors of a forecast over windows that come batch by batch.

    Args:
        levels: Of the Q quantiles that are forecast, ascending; squared and absolute errors are then of the one nearest
            to the median.
    """

    def __init__(self, levels: Sequence[float] = ()):
        self.levels, self.windows, self.sums = levels, 0, {}

    def add(self, forecast: Tensor, y: Tensor) -> None:
        """A forecast of n windows, (n, H, M), with levels (n, H, M, Q), and the truth, (n, H, M), NaN where it is
        missing."""
        levels = self.levels
        forecast, y, known = where_known(forecast.float(), y)
        error = (forecast[..., nearest_to_median(levels)] if levels else forecast) - y
        # at most a batch of terms in float32, the rest in float64
        new = {"squared": error.square().sum(0).double(), "absolute": error.abs().sum(0).double()}
        new["known"] = known.sum(0).double()
        if levels:
            new["crps"] = pinball(forecast, y, levels).double() * y.numel()
            new["inside"] = ((forecast[..., 0] <= y) & (y <= forecast[..., -1]) & known).sum(0).double()
        self.sums = {name: value + self.sums.get(name, 0) for name, value in new.items()}
        self.windows += len(y)

    def result(self) -> dict:
        """mse, mae, and lists of them by variate and by step of the horizon, NaN where no truth is known; windows,
        their number. With levels, also crps, see `pinball`, and coverage, the share of true values between the
        outermost quantiles."""
        sums = dict(self.sums)
        known = sums.pop("known")
        result = {"windows": self.windows}
        for name, errors in (("mse", sums["squared"]), ("mae", sums["absolute"])):
            result[name] = (errors.sum() / known.sum()).item()
            result[f"{name}_by_variate"] = (errors.sum(0) / known.sum(0)).tolist()
            result[f"{name}_by_step"] = (errors.sum(1) / known.sum(1)).tolist()
        if self.levels:
            inside, crps = sums["inside"].sum() / known.sum(), sums["crps"] / known.sum()
            result |= {"crps": crps.item(), "coverage": inside.item()}
        return result


def score(forecast: Forecast, windows: Windows, batch: int = 256, levels: Sequence[float] = ()) -> dict:
    """The `Errors` of a forecast over all windows, steps and variates, no window left out.

    Args:
        forecast: (n, L, M) and the future features (n, H, C) or None -> (n, H, M), with levels (n, H, M, Q).
        windows: Standardised.
        batch: Windows at once.
        levels: As for `Errors`.
    """
    return score_all([(lambda x, future: {"": forecast(x, future)}, windows)], batch, levels)[""]


def score_all(
    parts: Iterable[tuple[Forecasts, Windows]], batch: int = 256, levels: Sequence[float] = ()
) -> dict[str, dict]:
    """As `score`, of several forecasts by name from one pass over the windows.

    Args:
        parts: What makes the forecasts, as `score` takes them, and the windows that it makes them for, one after the
            other. Those of points, (n, H, M), have no levels.
        batch, levels: As in `score`.
    """
    errors: dict[str, Errors] = {}
    for forecasts, windows in parts:
        for x, y, future in windows.batches(batch):
            with torch.no_grad():
                made = forecasts(x, future)
            for name, forecast in made.items():
                errors.setdefault(name, Errors(levels if forecast.dim() > y.dim() else ())).add(forecast, y)
    return {name: each.result() for name, each in errors.items()}


def nearest_to_median(levels: Sequence[float]) -> int:
    """The quantile that stands for a point forecast, by its place among the levels."""
    return min(range(len(levels)), key=lambda i: abs(levels[i] - 0.5))


def model_forecast(model: nn.Module, amp: bool = False) -> Forecast:
    """A model's forecast for `score`, under autocast to bfloat16 if asked for."""

    def forecast(x: Tensor, future: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16) if amp else nullcontext():
            return model(x, future=future)

    return forecast


def baseline_forecasts(ridge: Ridge, x: Tensor, future: Tensor | None, horizon: int, season: int) -> dict[str, Tensor]:
    """Forecasts (n, H, M) of ridge, the last value and the seasonal naive forecast, for histories (n, L, M); they take
    no future features."""
    return {
        "ridge": ridge(x),
        "last value": last_value(x, horizon),
        "seasonal naive": seasonal_naive(x, horizon, season),
    }


def pinball(forecast: Tensor, y: Tensor, levels: Sequence[float]) -> Tensor:
    """Mean of twice the pinball losses of (..., H, M, Q) for the truth (..., H, M), a scalar. The median's is the
    absolute error, and the mean over levels the usual estimate of the CRPS from quantiles (Gneiting and Raftery, JASA,
    2007): that of a point forecast is its MAE."""
    return pinball_losses(forecast, y, levels).mean()


def pinball_losses(forecast: Tensor, y: Tensor, levels: Sequence[float]) -> Tensor:
    """(..., H, M, Q), each loss twice."""
    tensor = forecast.new_tensor(levels)
    error = y.unsqueeze(-1) - forecast
    return 2 * torch.maximum(tensor * error, (tensor - 1) * error)


def naive_errors(values: Tensor, season: int) -> Tensor:
    """What MASE divides by (Hyndman and Koehler, International Journal of Forecasting, 2006): each variate's mean
    absolute error when the value one season before is the forecast.

    Args:
        values: Standardised training rows, (rows, M), NaN where they are missing.
        season: Steps; one is taken instead if there are no more rows than that.

    Returns:
        (M,), float64 on the CPU; 0 for a variate that repeats itself, NaN for one without two values a season apart.
    """
    season = season if season < len(values) else 1
    return (values[season:] - values[:-season]).abs().double().nanmean(0).cpu()


def mase(row: dict, naive: Tensor) -> float | None:
    """Mean absolute scaled error of a `score`: the MAE over that of `naive_errors`, averaged over the variates that do
    not repeat themselves in training; None if all do."""
    absolute = torch.tensor(row["mae_by_variate"], dtype=torch.float64)
    varies = (naive > 0) & absolute.isfinite()
    return (absolute[varies] / naive[varies]).mean().item() if varies.any() else None
