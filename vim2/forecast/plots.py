"""Pictures: a forecast beside the truth, a forecast of what is to come, variates' errors, a committee's weights."""

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..command.figures import figure, from_zero, save, shorten
from .forecaster import Forecaster
from .scores import nearest_to_median
from .table import Table

__all__ = ["plot_errors", "plot_forecast", "plot_prediction", "plot_weights"]

HISTORY, TRUTH, FORECAST = "#555555", "#1a7f37", "#c02626"
MAX_PANELS = 8
MAX_BARS = 30  # variates


def from_best_to_worst(errors: Sequence[float], most: int) -> np.ndarray:
    """Places of variates to draw, in the order of their errors and evenly among them; all, as they stand, of no more
    than may be drawn."""
    if len(errors) <= most:
        return np.arange(len(errors))
    return np.argsort(errors, kind="stable")[np.linspace(0, len(errors) - 1, most).round().astype(int)]


def plot_forecast(
    forecaster: Forecaster,
    times: Sequence,
    history: np.ndarray,
    truth: np.ndarray | None,
    forecast: np.ndarray,
    path: str | os.PathLike,
    errors: Sequence[float] | None = None,
) -> None:
    """History, truth and forecast of up to eight variates, with a band between outer quantiles.

    Args:
        forecaster: Names its variates and quantiles.
        times: Time stamps of history and forecast, or numbers of their rows, (rows + H,).
        history: (rows, M), in the units of the file.
        truth: (H, M), None where it is still to come.
        forecast: (H, M), with quantiles (H, M, Q).
        path: PNG to write.
        errors: Of the variates: where there are more, the eight are drawn evenly from the best to the worst, otherwise
            the first.
    """
    names, levels = forecaster.columns, forecaster.model.config.quantiles
    fig = figure()  # says so if matplotlib is missing
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    panels = min(len(names), MAX_PANELS)
    shown = range(panels) if errors is None else from_best_to_worst(errors, MAX_PANELS)
    columns = 1 if panels == 1 else 2
    lines = math.ceil(panels / columns)
    fig.set_size_inches(6.5 * columns, 2.6 * lines + 0.4)
    grid = fig.subplots(lines, columns, squeeze=False).flatten()
    past, ahead = times[: len(history)], times[len(history) :]
    for i, axes in zip(shown, grid):
        axes.plot(past, history[:, i], color=HISTORY, linewidth=1, label="history")
        if truth is not None:
            axes.plot(ahead, truth[:, i], color=TRUTH, linewidth=1, label="truth")
        line = forecast[:, i, nearest_to_median(levels)] if levels else forecast[:, i]
        axes.plot(ahead, line, color=FORECAST, linewidth=1.2, label="forecast")
        if len(levels) > 1:
            label = f"quantiles {levels[0]!r} to {levels[-1]!r}"
            axes.fill_between(
                ahead, forecast[:, i, 0], forecast[:, i, -1], color=FORECAST, alpha=0.2, lw=0, label=label
            )
        axes.set_title(shorten(names[i]), fontsize=9)
        axes.grid(alpha=0.3)
        axes.margins(x=0.01)
        if isinstance(times[0], pd.Timestamp):  # and no row's number
            locator = AutoDateLocator(minticks=3, maxticks=8)  # with five at least, it finds none for some spans
            axes.xaxis.set_major_locator(locator)
            axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
        axes.tick_params(labelsize=8)
    for axes in grid[panels:]:
        axes.axis("off")
    handles, labels = grid[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=9)
    if len(names) > panels:
        which = f"the first {panels} of {len(names)} variates"
        if errors is not None:
            which = f"{panels} of {len(names)} variates, evenly from the best forecast to the worst"
        fig.supxlabel(which, fontsize=8)
    save(fig, path)


def plot_prediction(forecaster: Forecaster, table: Table, times: Any, values: np.ndarray, path: str | os.PathLike):
    """The end of a table, twice the horizon of it but no more than the lookback, and the forecast that follows."""
    config = forecaster.model.config
    rows = min(config.lookback, max(2 * config.horizon, 24))
    history = table.labels(len(table) - rows, len(table))
    plot_forecast(forecaster, [*history, *times], table.values[-rows:], None, values, path)


def plot_errors(names: Sequence[str], scores: dict[str, dict], path: str | os.PathLike) -> None:
    """Mean squared error by variate, and of every step ahead, of the model and the baselines. Of more than 30 variates,
    30 are drawn, evenly from the one that the model forecasts best to the worst. Both panels have one scale, a
    logarithmic one where errors of variates or steps lie far apart.

    Args:
        names: Of the M variates.
        scores: As `scores.score` returns them, by the name of the forecast, the model's first.
        path: PNG to write.
    """
    by_variate = {name: np.array(row["mse_by_variate"]) for name, row in scores.items()}
    shown = from_best_to_worst(next(iter(by_variate.values())), MAX_BARS)
    fig = figure(figsize=(12, max(3.5, 0.3 * len(shown) + 1)))
    bars, curve = fig.subplots(1, 2)
    height = 0.8 / len(scores)
    for k, (name, row) in enumerate(scores.items()):
        places = np.arange(len(shown)) + (k - (len(scores) - 1) / 2) * height
        bars.barh(places, by_variate[name][shown], height, label=name)
        steps = np.arange(1, len(row["mse_by_step"]) + 1)
        curve.plot(steps, row["mse_by_step"], label=name, linestyle="-" if k else "--", zorder=2 if k else 3)
    bars.set_yticks(range(len(shown)), [shorten(names[i]) for i in shown], fontsize=8)
    bars.invert_yaxis()
    every = np.concatenate([*(e[shown] for e in by_variate.values()), *(row["mse_by_step"] for row in scores.values())])
    if np.nanmax(every) > 20 * np.nanmin(every) > 0:  # of a variate without a truth, there is no error
        bars.set_xscale("log")
        curve.set_yscale("log")
    else:
        from_zero(curve)
    some = "" if len(shown) == len(names) else f": {len(shown)} of {len(names)}, evenly from the best to the worst"
    bars.set_xlabel(f"MSE of standardised values, by variate{some}")
    curve.set_xlabel("step ahead")
    curve.set_ylabel("MSE of standardised values")
    for axes in (bars, curve):
        axes.grid(alpha=0.3)
    # above the panels, where it hides no curve
    fig.legend(*bars.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=9)
    save(fig, path)


def plot_weights(names: Sequence[str], weights: Sequence[float], path: str | os.PathLike) -> None:
    """The weights of a committee.

    Args:
        names: Of its members.
        weights: One for each, of sum 1.
        path: PNG to write.
    """
    fig = figure(figsize=(6.5, 0.35 * len(names) + 1))
    axes = fig.subplots()
    bars = axes.barh(range(len(names)), weights, color=[FORECAST if n.startswith("TSM2") else HISTORY for n in names])
    axes.bar_label(bars, [f"{weight:.2f}" for weight in weights], padding=3, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(weights))
    axes.set_xlabel("weight in the forecast")
    save(fig, path)
