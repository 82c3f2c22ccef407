"""A committee of forecasters that is one model: linear maps in closed form and independently trained TSM2, mixed by
weights that validation windows find."""

from collections.abc import Sequence
from itertools import combinations_with_replacement

import torch
from torch import Tensor, nn

from ..tsm2 import TSM2, TSM2Config
from .baselines import Ridge, centre, joint_map
from .scores import nearest_to_median
from .significance import covariance_of_means

__all__ = ["Committee", "Networks", "Products", "find_weights", "mixture_losses"]

# The linear members: their names, and about what of a window they map it. The last season is one too.
LINEAR = {"ridges about the mean": "mean", "ridge about the last value": "last", "last season": "mean"}
RIDGES = tuple(name for name in LINEAR if name.startswith("ridge"))
PARTS = 10  # in which `find_weights` hands out the forecast
SAMPLES = 1000  # that it asks
CAUTION = 0.5  # standard errors that it adds


class Linear(nn.Module):
    """A linear map from a window's centred history to its centred future, shared by all variates, which is not trained.

    Args:
        center: "mean" or "last": what of the history is subtracted, and added again.
        lookback, horizon: Steps L and H.
    """

    def __init__(self, center: str, lookback: int, horizon: int, device=None):
        super().__init__()
        self.center = center
        self.register_buffer("weight", torch.zeros(horizon, lookback, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """(n, L, M) -> (n, H, M), in the weight's dtype, under autocast too."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.weight.dtype)
            level = centre(x, self.center)
            return ((x - level).transpose(1, 2) @ self.weight.T).transpose(1, 2) + level


class Networks(nn.ModuleList):
    """TSM2 of one configuration, each with weights of its own.

    Args:
        config: Of each.
        count: How many, k.
        variates: M, where they have static features.

    Attributes:
        static: Those features, (M, C_S), which training sets; None without.
    """

    def __init__(self, config: TSM2Config, count: int, device=None, variates: int = 0):
        super().__init__(TSM2(config, device=device) for _ in range(count))
        width = config.static_features
        self.register_buffer("static", torch.zeros(variates, width, device=device) if width else None)

    def forward(self, x: Tensor, future: Tensor | None = None) -> Tensor:
        """(n, L, M), and future features as TSM2 takes them -> each one's forecast, (k, n, H, M) or (k, n, H, M, Q)."""
        return torch.stack([network(x, self.static, future) for network in self])


class Committee(nn.Module):
    """The weighted sum of several forecasts.

    Members are ridges of several lookbacks about a window's mean, whose forecasts are averaged, ridge regression about
    its last value, the last season over and over, and k TSM2; of a committee of one, the TSM2 alone. With quantiles,
    members are mixed as points, the TSM2's by the quantile nearest to the median; its distances to the other quantiles,
    the mean over all TSM2, are then added.

    Args:
        config: Of each TSM2.
        networks: How many TSM2, k.
        variates: M, where they have static features.

    Attributes:
        weights: One for each of `names`, not negative, of sum 1, float32: the prior until they are found.
    """

    def __init__(self, config: TSM2Config, networks: int = 3, device=None, variates: int = 0):
        super().__init__()
        self.config = config
        linear = LINEAR.values() if networks > 1 else ()
        self.linear = nn.ModuleList(Linear(center, config.lookback, config.horizon, device) for center in linear)
        self.networks = Networks(config, networks, device, variates)
        self.register_buffer("weights", self.prior().to(device))

    @property
    def names(self) -> list[str]:
        """Of the members, in the order of their weights."""
        return [*list(LINEAR)[: len(self.linear)], *(f"TSM2 {i + 1}" for i in range(len(self.networks)))]

    @property
    def groups(self) -> Tensor:
        """Members that share one weight, for `find_weights`: (groups, K), float64, a row the mean of its members. The
        TSM2, which differ by chance only, are one group; so validation has four weights to find, however many there
        are."""
        linear, count = len(self.linear), len(self.networks)
        groups = torch.zeros(linear + 1, linear + count, dtype=torch.float64)
        groups[:linear, :linear] = torch.eye(linear)
        groups[linear, linear:] = 1 / count
        return groups

    def prior(self, kinds: Sequence[str] = ("ridge", "TSM2")) -> Tensor:
        """Weights that need no data: as much for each kind, which are the first words of names, and equal ones within
        it, (K,), float32."""
        of_kind = [torch.tensor([name.startswith(kind) for name in self.names]).float() for kind in kinds]
        shares = [chosen / chosen.sum() for chosen in of_kind if chosen.any()]
        return torch.stack(shares).mean(0)

    def set_linear(self, ridges: dict[str, Sequence[Ridge]], season: int) -> None:
        """Give the linear members their maps.

        Args:
            ridges: Of each centre, "mean" and "last", those whose forecasts are averaged.
            season: Steps of a season; no more than the lookback are repeated.
        """
        for member, name in zip(self.linear, LINEAR):
            horizon, lookback = member.weight.shape
            if name in RIDGES:
                member.weight.copy_(joint_map(ridges[member.center], lookback))
            else:
                steps, season = torch.arange(horizon, device=member.weight.device), min(season, lookback)
                member.weight[steps, lookback - season + steps % season] = 1.0

    def forward(
        self, x: Tensor, static: None = None, future: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """Forecast.

        Args:
            x: History, (n, L, M), standardised.
            static: None: the committee knows those of its variates.
            future: (n, H, C), or None.
            weights: Other weights than the committee's, (K,).

        Returns:
            (n, H, M), with quantiles (n, H, M, Q), ascending along Q.
        """
        return self.mixture(*self.members(x, future), weights)

    def mixture(self, points: Tensor, spread: Tensor | None, weights: Tensor | None = None) -> Tensor:
        """The forecast that members make, as `members` returns them, by the committee's weights or others, (K,)."""
        weights = (self.weights if weights is None else weights).to(points)
        y = (weights.view(-1, 1, 1, 1) * points).sum(0)  # no matrix product, which autocast would round
        return y if spread is None else y.unsqueeze(-1) + spread

    def members(self, x: Tensor, future: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Each member's forecast, (K, n, H, M), and with quantiles their distances to these, (n, H, M, Q)."""
        y, levels, spread = self.networks(x, future), self.config.quantiles, None
        if levels:
            point = y[..., nearest_to_median(levels)]
            spread, y = (y - point.unsqueeze(-1)).mean(0), point
        return torch.cat((*self.linear_members(x), y)), spread

    def linear_members(self, x: Tensor) -> list[Tensor]:
        """The forecast of each linear member, (1, n, H, M)."""
        return [member(x).unsqueeze(0) for member in self.linear]


class Products:
    """Products of the members' errors on windows, collected batch by batch: they tell the squared error of every
    mixture of the members.

    Args:
        known: Standardised rows to train and validate on, (rows, M), NaN where values are missing. Errors of variates
            that vary more than in training are divided by their deviation there: otherwise one that left its scale
            would speak for all.
    """

    def __init__(self, known: Tensor):
        self.batches: list[Tensor] = []
        self.squares: list[Tensor] = []
        self.shares: list[Tensor] = []
        deviation = (known - known.nanmean(0)).square().nanmean(0).sqrt()
        self.scale = deviation.nan_to_num(1.0).clamp_min(1.0)  # of variates that hold nothing there are no errors

    def add(self, points: Tensor, y: Tensor) -> None:
        """The members' forecasts of n windows, (K, n, H, M), as `Committee.members` returns them, and the truth
        (n, H, M), NaN where it is missing."""
        known = ~y.isnan()
        errors = (points.float() - y).where(known, 0.0)
        self.squares.append(errors.square().mean((2, 3)).double().cpu())
        errors = (errors / self.scale).flatten(2).transpose(0, 1)
        self.batches.append((errors @ errors.transpose(1, 2) / errors.shape[2]).double().cpu())
        self.shares.append(known.double().mean((1, 2)).cpu())

    @property
    def share(self) -> Tensor:
        """Of the truths, how many are known. Windows weigh as much as they hold, so that means are over these."""
        return torch.cat(self.shares).mean()

    def result(self) -> Tensor:
        """(windows, K, K), float64: means over steps and variates."""
        return torch.cat(self.batches) / self.share

    def errors(self) -> Tensor:
        """The members' mean squared errors, (K,), float64, undivided."""
        return torch.cat(self.squares, dim=1).mean(1) / self.share


def find_weights(products: Tensor, groups: Tensor, linear: int, horizon: int) -> Tensor:
    """Weights of a mixture that validation windows choose, as far as they are sure of it.

    Of all mixtures in tenths, that one is the best whose error is lowest when half a standard error is added: that of
    the difference to the linear member with the lowest error. Which one that is, is asked of many samples that could
    as well have been drawn as the windows there are, and the weights are the mean of the answers (Breiman, Bagging
    predictors, Machine Learning, 1996): a choice among mixtures that windows cannot tell apart becomes a mean of
    them, and weights are continuous in the errors. A block bootstrap would draw such samples from the windows; as an
    error is the mean of products of members' errors, it is simpler to draw these means, by a normal distribution of
    their covariance, see `significance.covariance_of_means`.

    Args:
        products: As `Products.result` returns them, (windows, K, K), of windows in order of time at stride 1.
        groups: Members that share one weight, as `Committee.groups`, (G, K).
        linear: How many of them, the first ones, are linear; if none is, the first stands for the best of them.
        horizon: Steps by which windows must lie apart to forecast nothing in common.

    Returns:
        (K,), float64, the same for the same products.

    Raises:
        ValueError: A member's errors are not finite.
    """
    if not products.isfinite().all():
        raise ValueError("A member's forecasts of the validation windows are not finite: no weights can be found.")
    products = groups @ products @ groups.T
    count = len(groups)
    i, j = torch.triu_indices(count, count)
    products = products[:, i, j]
    means, covariance = products.mean(0), covariance_of_means(products, horizon)
    mixtures = torch.stack(
        [
            torch.bincount(torch.tensor(parts), minlength=count)
            for parts in combinations_with_replacement(range(count), PARTS)
        ]
    )
    mixtures = mixtures.double() / PARTS
    terms = mixtures[:, i] * mixtures[:, j] * torch.where(i == j, 1.0, 2.0)  # times products: a mixture's error
    trusted = mixtures.new_zeros(count)
    trusted[means[i == j][: max(linear, 1)].argmin()] = 1.0
    away = terms - trusted[i] * trusted[j]
    errors = ((away @ covariance) * away).sum(1).clamp_min(0).sqrt()
    # of correlations: beside those of a member that diverged, covariances of the others are lost by rounding
    deviations = covariance.diagonal().sqrt()
    scale = deviations.clamp_min(torch.finfo(torch.float64).tiny)
    variances, directions = torch.linalg.eigh(covariance / scale / scale.unsqueeze(1))
    noise = torch.randn(SAMPLES, len(means), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = means + noise @ (directions * variances.clamp_min(0).sqrt()).T * deviations
    best = (samples @ terms.T + CAUTION * errors).argmin(1)
    return mixtures[best].mean(0) @ groups


def mixture_losses(products: Tensor, weights: Tensor) -> Tensor:
    """The squared error of a mixture on each window, (windows,)."""
    return torch.einsum("i,nij,j->n", weights, products, weights)
