"""How sure windows that overlap can be of a difference."""

import math

import torch
from torch import Tensor

__all__ = ["covariance_of_means", "gain"]


def gain(before: Tensor, after: Tensor, horizon: int) -> tuple[float, float]:
    """By how much losses fell, and the standard error of that.

    Windows at stride 1 overlap, so their differences are correlated: the error is Diebold and Mariano's (Journal of
    Business & Economic Statistics, 1995), of the autocovariances up to the horizon, which Bartlett's weights keep from
    adding up to less than nothing. Where the horizon is no small part of all windows, these are too small, and
    `overlap` makes up for that.

    Args:
        before, after: Losses of the same windows in order of time, (n,), float64.
        horizon: Steps by which windows must lie apart to forecast nothing in common.

    Returns:
        Mean of before - after, and its standard error.
    """
    difference = (before - after).unsqueeze(1)
    return difference.mean().item(), covariance_of_means(difference, horizon).sqrt().item()


def covariance_of_means(values: Tensor, horizon: int) -> Tensor:
    """How sure windows that overlap are of means over them, with the error that `gain` describes.

    Args:
        values: Several of each window, in order of time, (n, k), float64.
        horizon: As for `gain`.

    Returns:
        (k, k), float64, positive semi-definite.
    """
    n = len(values)
    reach = min(horizon, n)
    spectrum = torch.fft.rfft((values - values.mean(0)).T, 2 * n)  # padded, or the end would be next to the beginning
    weights = 1 - torch.arange(reach, dtype=torch.float64) / reach
    weights[0] = 0.5  # the others stand for two, before and after
    rows = []
    for each in spectrum:
        covariances = torch.fft.irfft(each * spectrum.conj(), 2 * n)[:, :reach] / n
        rows.append((weights * covariances).sum(1))
    half = torch.stack(rows)
    return (half + half.T) / n * overlap(horizon, n) ** 2


def overlap(horizon: int, windows: int) -> float:
    """How many times too small Diebold and Mariano's error is for windows at stride 1.

    A mean over a horizon moves little from one window to the next, and the fewer windows there are, the less they tell
    how far it moves. Kiefer and Vogelsang (Econometric Theory, 2005) give critical values for autocovariances over a
    share of the sample. What is in common here reaches as far as they do, for which we found these by simulation: with
    them, the mean of white noise lies within one error in 68 % of samples, for horizons of up to 17 times the windows.
    """
    share = horizon / windows
    inside = min(share, 1.0)
    of_bartlett = math.sqrt(3 * horizon**2 / (2 * horizon**2 + 1))  # his weights take a third of a mean's variance off
    return (of_bartlett + 1.5 * inside + 3.2 * inside**2) * max(share, 1.0) ** 0.6
