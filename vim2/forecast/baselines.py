"""Forecasts that any model has to beat: ridge regression in closed form, the last value, the last season."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..command.errors import UserError
from .data import Windows, where_known
from .significance import gain

__all__ = ["Ridge", "cautious", "joint_map", "last_value", "lowest", "seasonal_naive", "shorter_lookbacks"]

# The heavier the penalty, the nearer to the window's mean, which is a poor forecast, or to its last value, which is a
# good one for series such as exchange rates: there the range ends where nothing but it is left.
PENALTIES = {
    "mean": [10.0 ** (k / 2) for k in range(-4, 9)],
    "last": [10.0 ** (k / 2) for k in range(-4, 25)],
}


def last_value(x: Tensor, horizon: int) -> Tensor:
    """(n, L, M) -> (n, H, M): each variate's last value."""
    return x[:, -1:].expand(-1, horizon, -1)


def seasonal_naive(x: Tensor, horizon: int, season: int) -> Tensor:
    """(n, L, M) -> (n, H, M): each variate's last `season` steps over and over."""
    season = min(season, x.shape[1])
    steps = torch.arange(horizon, device=x.device) % season
    return x[:, x.shape[1] - season + steps]


@dataclass(frozen=True, eq=False)
class Ridge:
    """Linear map from a window's centred history to its centred future, shared by all variates, with a penalty on its
    squared weights that the validation windows choose.

    Args:
        weight: (H, L), float32.
        center: "mean" or "last": what is subtracted from history and future.
        penalty: The one chosen.
        val_mse: Its error on the validation windows.
    """

    weight: Tensor
    center: str
    penalty: float
    val_mse: float

    @classmethod
    def fit(cls, train: Windows, val: Windows, center: str = "mean", batch: int = 256) -> "Ridge":
        """The one of its `path` with the lowest validation error."""
        return lowest(cls.path(train, val, center, batch))

    @classmethod
    def path(cls, train: Windows, val: Windows, center: str = "mean", batch: int = 256) -> list["Ridge"]:
        """One for each penalty, from the lightest: from the moments of all windows, accumulated in float64, and one
        decomposition."""
        gram, cross, _, _ = moments(train, center, batch)
        val_gram, val_cross, val_square, count = moments(val, center, batch)
        ridges = []
        for penalty, weight in zip(PENALTIES[center], solve(gram, cross, PENALTIES[center]), strict=True):
            error = (weight * (val_gram @ weight)).sum() - 2 * (weight * val_cross).sum() + val_square
            ridges.append(cls(weight.T.float().contiguous(), center, penalty, (error / count).item()))
        return ridges

    def losses(self, windows: Windows, batch: int = 256) -> Tensor:
        """Its squared error on each window, (windows,), float64 on the CPU. Where truths are missing, windows weigh as
        much as they hold, so that the mean is that over all known values."""
        squares, share = [], []
        for x, y, _ in windows.batches(batch):
            forecast, y, known = where_known(self(x), y)
            squares.append((forecast - y).square().mean((1, 2)).double().cpu())
            share.append(known.double().mean((1, 2)).cpu())
        return torch.cat(squares) / torch.cat(share).mean()

    def refit(self, windows: Windows, batch: int = 256) -> "Ridge":
        """The same penalty's map for other windows."""
        return replace(self, weight=Ridge.solved(windows, self.center, self.penalty, batch).weight)

    @classmethod
    def solved(cls, windows: Windows, center: str, penalty: float, batch: int = 256) -> "Ridge":
        """The map of a penalty that is known already; none of its errors is."""
        gram, cross, _, _ = moments(windows, center, batch)
        (weight,) = solve(gram, cross, [penalty])
        return cls(weight.T.float().contiguous(), center, penalty, math.nan)

    def __call__(self, x: Tensor, horizon: int | None = None) -> Tensor:
        """(n, L, M) -> (n, H, M)."""
        level = centre(x, self.center)
        return ((x - level).transpose(1, 2) @ self.weight.T.to(x.device)).transpose(1, 2) + level


def lowest(path: Sequence[Ridge]) -> Ridge:
    """The one with the lowest validation error."""
    return min(path, key=lambda ridge: ridge.val_mse)


def cautious(path: Sequence[Ridge], val: Windows) -> Ridge:
    """The one with the heaviest penalty up to which none is worse than the lowest by more than one standard error, see
    `significance.gain` (the rule of Breiman et al., Classification and Regression Trees, 1984).

    Args:
        path: As `Ridge.path` returns it.
        val: The windows that it was validated on.
    """
    chosen = best = lowest(path)
    losses = best.losses(val)
    for heavier in path[path.index(best) + 1 :]:
        worse, error = gain(heavier.losses(val), losses, val.horizon)
        if worse > error:
            break
        chosen = heavier
    return chosen


def shorter_lookbacks(lookback: int) -> list[int]:
    """The lookback L, half of it and a quarter, of each at least a step and none twice, from the longest."""
    return list(dict.fromkeys(max(lookback // part, 1) for part in (1, 2, 4)))


def joint_map(ridges: Sequence[Ridge], lookback: int) -> Tensor:
    """One map that forecasts the mean of what ridges of several lookbacks do.

    Args:
        ridges: About the same centre, none longer than the lookback; each sees the last steps of a window, and centres
            them by themselves.
        lookback: Steps L of a window.

    Returns:
        (H, L), float32, for a window less its own centre, as `Ridge.weight` is.
    """
    joint = ridges[0].weight.new_zeros(len(ridges[0].weight), lookback, dtype=torch.float64)
    for ridge in ridges:
        weight, steps = ridge.weight.double(), ridge.weight.shape[1]
        if ridge.center == "mean":
            # The mean of the last steps is a level of its own beside that of the whole window. It is linear in these
            # steps, so that taking it off before the map and adding it behind are a part of the map.
            weight = weight - weight.mean(1, keepdim=True) + 1 / steps
        joint[:, lookback - steps :] += weight / len(ridges)
    return joint.float()


def centre(x: Tensor, kind: str) -> Tensor:
    return x.mean(1, keepdim=True) if kind == "mean" else x[:, -1:]


def solve(gram: Tensor, cross: Tensor, penalties: Sequence[float]) -> Iterator[Tensor]:
    """(gram + penalty)^-1 cross for each penalty, (L, H), from one decomposition."""
    eigenvalues, vectors = torch.linalg.eigh(gram)
    rotated = vectors.T @ cross
    for penalty in penalties:
        yield vectors @ (rotated / (eigenvalues.clamp_min(0) + penalty).unsqueeze(1))


def moments(windows: Windows, center: str, batch: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Sums over windows and variates of x x', x y' and y'y, centred, float64; and the number of values y. Series of a
    window whose truth is missing in part are left out.

    Raises:
        UserError: That leaves none.
    """
    length, horizon = windows.lookback, windows.horizon
    options = dict(dtype=torch.float64, device=windows.device)
    gram, cross = torch.zeros(length, length, **options), torch.zeros(length, horizon, **options)
    square, count = torch.zeros((), **options), 0
    for x, y, _ in windows.batches(batch):
        level = centre(x, center)
        x, y = ((t - level).transpose(1, 2).flatten(0, 1) for t in (x, y))
        if windows.has_gaps:
            whole = ~y.isnan().any(1)
            x, y = x[whole], y[whole]
        gram += x.T @ x
        cross += x.T @ y
        square += y.double().square().sum()
        count += y.numel()
    if not count:
        raise UserError(
            f"No series has {horizon} known values in a row, after others, in the rows to train or to validate on: "
            "shorten --horizon, choose another --split, or fill values that are missing (--missing interpolate)."
        )
    return gram, cross, square, count
