"""Errors of forecasts over all windows of a part."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from .baselines import Ridge, last_value, seasonal_naive
from .data import Windows

__all__ = ["baseline_scores", "gain", "model_forecast", "pinball", "quantile_scores", "score", "window_losses"]

Forecast = Callable[[Tensor, Tensor | None], Tensor]


def score(forecast: Forecast, windows: Windows, batch: int = 256) -> dict:
    """Mean squared and absolute error over all windows, steps and variates, no window left out.

    Args:
        forecast: (n, L, M) and the future features (n, H, C) or None -> (n, H, M).
        windows: Standardised.
        batch: Windows at once.

    Returns:
        mse, mae, and lists of them by variate and by step of the horizon; windows, their number.
    """
    squared = torch.zeros(windows.horizon, windows.windows.shape[1], dtype=torch.float64, device=windows.device)
    absolute = torch.zeros_like(squared)
    with torch.no_grad():
        for x, y, future in windows.batches(batch):
            error = forecast(x, future).float() - y
            squared += error.square().sum(0)  # at most `batch` terms in float32, the rest in float64
            absolute += error.abs().sum(0)
    squared, absolute = squared / len(windows), absolute / len(windows)
    return {
        "mse": squared.mean().item(),
        "mae": absolute.mean().item(),
        "windows": len(windows),
        "mse_by_variate": squared.mean(0).tolist(),
        "mae_by_variate": absolute.mean(0).tolist(),
        "mse_by_step": squared.mean(1).tolist(),
        "mae_by_step": absolute.mean(1).tolist(),
    }


def model_forecast(model: nn.Module, amp: bool = False) -> Forecast:
    """A model's point forecast: with quantiles, the one nearest to the median."""
    levels = model.config.quantiles
    middle = min(range(len(levels)), key=lambda i: abs(levels[i] - 0.5)) if levels else None

    def forecast(x: Tensor, future: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16) if amp else nullcontext():
            y = model(x, future=future)
        return y if middle is None else y[..., middle]

    return forecast


def baseline_scores(ridge: Ridge, windows: Windows, season: int, batch: int = 256) -> dict[str, dict]:
    """Scores of ridge, the last value and the seasonal naive forecast."""
    horizon = windows.horizon
    return {
        "ridge": score(lambda x, _: ridge(x), windows, batch),
        "last value": score(lambda x, _: last_value(x, horizon), windows, batch),
        "seasonal naive": score(lambda x, _: seasonal_naive(x, horizon, season), windows, batch),
    }


def pinball(forecast: Tensor, y: Tensor, quantiles: tuple[float, ...]) -> Tensor:
    """Mean pinball loss of (n, H, M, Q) for the truth (n, H, M), times two, so that the median's is the absolute
    error."""
    levels = forecast.new_tensor(quantiles)
    error = y.unsqueeze(-1) - forecast
    return 2 * torch.maximum(levels * error, (levels - 1) * error).mean()


def quantile_scores(model: nn.Module, windows: Windows, batch: int = 256) -> dict[str, float]:
    """The pinball loss, and the share of true values between the outermost quantiles."""
    levels = model.config.quantiles
    total = inside = 0.0
    with torch.no_grad():
        for x, y, future in windows.batches(batch):
            forecast = model(x, future=future)
            total += pinball(forecast, y, levels).item() * len(x)
            inside += ((forecast[..., 0] <= y) & (y <= forecast[..., -1])).float().mean().item() * len(x)
    return {"pinball": total / len(windows), "coverage": inside / len(windows)}


def window_losses(model: nn.Module, windows: Windows, amp: bool = False, batch: int = 256) -> Tensor:
    """The loss of every window, (n,), float64 on the CPU: its squared error, with quantiles its pinball loss."""
    levels, losses = model.config.quantiles, []
    with torch.no_grad():
        for x, y, future in windows.batches(batch):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
                forecast = model(x, future=future).float()
            if levels:
                losses.append(torch.stack([pinball(f, t, levels) for f, t in zip(forecast, y)]))
            else:
                losses.append((forecast - y).square().mean((1, 2)))
    return torch.cat(losses).double().cpu()


def gain(before: Tensor, after: Tensor, horizon: int) -> tuple[float, float]:
    """By how much losses fell, and the standard error of that.

    Windows at stride 1 overlap, so their differences are correlated: the error is Diebold and Mariano's (Journal of
    Business & Economic Statistics, 1995), of the autocovariances up to the horizon, which Bartlett's weights keep from
    adding up to less than nothing.

    Args:
        before, after: Losses of the same windows in order of time, (n,), float64.
        horizon: Steps by which windows must lie apart to forecast nothing in common.

    Returns:
        Mean of before - after, and its standard error.
    """
    difference = before - after
    n, mean = len(difference), difference.mean()
    spectrum = torch.fft.rfft(difference - mean, 2 * n)  # padded, or the end would be next to the beginning
    covariance = torch.fft.irfft(spectrum.abs().square(), 2 * n)[: min(horizon, n)] / n
    weights = 1 - torch.arange(len(covariance), dtype=torch.float64) / len(covariance)
    variance = (2 * (weights * covariance).sum() - covariance[0]) / n
    return mean.item(), variance.clamp_min(0).sqrt().item()
