"""A whole forecaster, from values to values in the units of its series, as one module that can be exported."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..forecast.conformal import calibrate

if TYPE_CHECKING:
    from ..forecast import Forecaster

__all__ = ["ForecasterModule"]


class ForecasterModule(nn.Module):
    """What `Forecaster.forecast` computes of a table's last rows, without the table: standardising, every member of the
    committee, the conformal correction of quantiles, and the way back.

    Args:
        forecaster: On any device. Its model is shared, not copied.
    """

    def __init__(self, forecaster: "Forecaster"):
        super().__init__()
        self.committee = forecaster.model
        self.config = forecaster.model.config
        for name in ("mean", "std"):
            self.register_buffer(name, torch.as_tensor(getattr(forecaster.scaler, name), dtype=torch.float64))
        self.register_buffer("conformal", forecaster.conformal)

    def forward(self, x: Tensor, future: Tensor | None = None) -> Tensor:
        """Forecast.

        Args:
            x: History, (batch, L, M), float64, in the units and the order of the forecaster's columns.
            future: Where it has known-future columns or a calendar, `Forecaster.future_features` of the H steps ahead,
                (batch, H, C), float32.

        Returns:
            (batch, H, M), with quantiles (batch, H, M, Q), ascending along Q, float64, in the units of the columns.
        """
        x = ((x - self.mean) / self.std).float()
        y = self.committee(x, future=future)
        if self.conformal is not None:
            y = calibrate(y, x, self.conformal, self.config)
        mean, std = (t.unsqueeze(-1) if self.config.quantiles else t for t in (self.mean, self.std))
        return y.double() * std + mean
