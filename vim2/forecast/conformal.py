"""Bands that cover what they say: a split-conformal correction of quantiles, learned on validation windows.

Romano, Patterson, Candès: Conformalized Quantile Regression, NeurIPS 2019, for every step of the horizon. Scores are
divided by the deviation that instance normalisation gives each window, as Lei et al. (JASA, 2018, section 5.2) do with
a local scale: so the correction widens the bands of a lively window more than those of a calm one.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..tsm2 import TSM2Config, instance_normalise

__all__ = ["Conformity", "calibrate"]

# Scores that are kept for one correction; beyond, windows are left out evenly: neighbours overlap and say the same.
MAX_SCORES = 2**25
# Windows that do not overlap for which each variate has a correction of its own. With m of them, the true coverage of a
# band of 80 % deviates from it by sqrt(.16 / (m + 2)); below, variates share one, for which there are more.
MIN_INDEPENDENT = 20


class Conformity:
    """How far true values of validation windows lie beyond each quantile, collected batch by batch.

    Args:
        config: Of the model whose forecasts these are, with quantiles.
        windows: How many will come, at stride 1 in order of time.
        variates: M.
    """

    def __init__(self, config: TSM2Config, windows: int, variates: int):
        self.config = config
        self.every = math.ceil(windows * config.horizon * variates * len(config.quantiles) / MAX_SCORES)
        self.by_variate = windows >= MIN_INDEPENDENT * config.horizon
        self.seen, self.scores = 0, []

    def add(self, x: Tensor, forecast: Tensor, y: Tensor) -> None:
        """Of n windows: history (n, L, M), quantiles (n, H, M, Q) and truth (n, H, M), standardised, NaN where it is
        missing."""
        _, _, scale = instance_normalise(x, self.config.instance_norm)
        first = -self.seen % self.every
        scores = (forecast - y.unsqueeze(-1)) / scale.unsqueeze(-1)
        self.scores.append(scores[first :: self.every].float().cpu())
        self.seen += len(x)

    def correction(self) -> Tensor:
        """What `calibrate` adds, (H, M or 1, Q), float32 on the CPU, in deviations of a window.

        Levels t and 1 - t are moved apart, or together, by the same distance, so that the band between them covers
        1 - 2 t; a level without its counterpart is moved alone; the median stays.
        """
        levels, scores = self.config.quantiles, torch.cat(self.scores)
        if not self.by_variate:
            scores = scores.transpose(1, 2).flatten(0, 1).unsqueeze(2)
        shift = torch.zeros(scores.shape[1:])
        for i, level in enumerate(levels):
            if level == 0.5:
                continue
            above = scores[..., i] if level < 0.5 else -scores[..., i]  # how far the truth lies on the wrong side
            share, other = max(level, 1 - level), counterpart(levels, level)
            if other is not None:
                beyond = scores[..., other] if level > 0.5 else -scores[..., other]
                above, share = torch.maximum(above, beyond), 2 * share - 1
            distance = conformal_quantile(above, share)
            shift[..., i] = -distance if level < 0.5 else distance
        return shift


def counterpart(levels: Sequence[float], level: float) -> int | None:
    """The place of 1 - level, None if it is not there."""
    return next((i for i, other in enumerate(levels) if math.isclose(other, 1 - level, abs_tol=1e-9)), None)


def conformal_quantile(scores: Tensor, share: float) -> Tensor:
    """The ceil((n + 1) share)-th smallest of scores (n, ...), or the largest where that is more than there are. Missing
    ones, NaN, do not count; of none, it is 0."""
    known = ~scores.isnan()
    n = len(scores)
    # less a hair, or 0.8 of 99 + 1 would be the 81st
    if known.all():
        return scores.kthvalue(min(math.ceil((n + 1) * share - 1e-9), n), dim=0).values
    counts = known.sum(0, keepdim=True)
    place = ((counts + 1) * share - 1e-9).ceil().long().minimum(counts).sub(1).clamp_min(0)
    return scores.sort(0).values.gather(0, place).nan_to_num(0.0).squeeze(0)  # NaN are sorted last


def calibrate(forecast: Tensor, x: Tensor, correction: Tensor, config: TSM2Config) -> Tensor:
    """Quantiles with their correction, in order again where narrowing a band made them cross: it then covers more than
    the empty one would.

    Args:
        forecast: (n, H, M, Q), standardised.
        x: History that they were forecast from, (n, L, M).
        correction: As `Conformity.correction` returns it, on the same device.
        config: Of the model.

    Returns:
        (n, H, M, Q), float32.
    """
    _, _, scale = instance_normalise(x, config.instance_norm)
    return (forecast.float() + correction * scale.unsqueeze(-1)).sort(dim=-1).values
