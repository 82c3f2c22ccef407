"""Fitting a committee's members once more, to more rows than validation could leave them.

The rows that validate and test a forecaster are the latest, so what is forecast beyond them is best learned from them,
too. What validation chose stays: penalties, members' weights, the conformal correction of quantiles, and the scale of
the series, in whose units they were found. Ridges are solved anew, exactly. TSM2 go on from their weights for one epoch
over which the learning rate falls again: see docs/forecasting.md for what else was tried.
"""

from copy import deepcopy
from dataclasses import replace

from torch import Tensor

from ..command.errors import UserError
from ..command.options import resolve
from .baselines import Ridge, shorter_lookbacks
from .data import Windows
from .forecaster import Forecaster
from .options import TrainingOptions
from .trainer import Trainer

__all__ = ["refit"]


def refit(
    forecaster: Forecaster, values: Tensor, future: Tensor | None, rows: int, amp: bool = False, called: str = "refit"
) -> Forecaster:
    """A forecaster whose members are fitted to all windows of the first rows as well.

    Args:
        forecaster: Of a run that is over, on the device of the values; it is not changed.
        values: Standardised variates by its scale, (rows or more, M), float32.
        future: Future features, (rows or more, C), or None.
        rows: Those to fit to; none behind them is looked at.
        amp: Under autocast to bfloat16.
        called: What the progress bar is called.

    Returns:
        The new one, which says so in `refitted`.

    Raises:
        UserError: The forecaster does not say how it was trained; its loss becomes NaN or infinite.
    """
    if not forecaster.training:
        raise UserError(
            "The forecaster does not say how it was trained, so it cannot be fitted to more rows: fit anew."
        )
    config = forecaster.model.config
    windows = Windows(values, config.lookback, config.horizon, 0, rows, future)
    given, _ = resolve(TrainingOptions, given=forecaster.training)
    options = replace(given, epochs=1, warmup_epochs=min(given.warmup_epochs, 0.5))
    model = deepcopy(forecaster.model)
    if model.linear:
        lookbacks = shorter_lookbacks(config.lookback)
        ridges = {
            center: [
                Ridge.solved(windows.shorter(n), center, penalty) for n, penalty in zip(lookbacks, penalties)
            ]  # about the last value, the longest alone
            for center, penalties in forecaster.penalties.items()
        }
        model.set_linear(ridges, forecaster.season)
    trainer = Trainer(model.networks, windows, options, amp)
    trainer.epoch(0, called)
    model.networks = trainer.averages
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise UserError(f"Fitting again to {rows} rows, the loss became NaN or infinite: train with a lower --lr.")
    return replace(forecaster, model=model.eval(), refitted=rows)
