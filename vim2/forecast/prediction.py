"""Forecasts beyond the end of a file."""

import io
from pathlib import Path
from typing import Any

import pandas as pd

from ..checkpoints import write_atomically
from ..command.figures import figures_if_possible
from ..command.processes import choose_device
from ..command.progress import say
from ..command.runs import explain_disk_errors
from .forecaster import Forecaster, not_calibrated
from .options import PredictOptions, open_options, reading_options
from .plots import plot_prediction

__all__ = ["predict"]


def predict(argv: list[str] | None = None, /, **options) -> dict[str, Any]:
    """Forecast the steps that follow a file's last row, as `tools/forecast.py predict` does.

    Args:
        argv: Command line; or else
        options: the same options by name, with underscores: `predict(data="sales.csv", checkpoint="runs/sales")`.
            The data may be a DataFrame as well.

    Returns:
        The `times` and `values` of `Forecaster.predict`, and the path of the `csv` with them.

    Raises:
        UserError: Anything that the user can put right.
    """
    o, _, data = open_options(PredictOptions, argv, options)
    forecaster = Forecaster.from_pretrained(o.checkpoint, choose_device(o.device))
    table = forecaster.read(data, **reading_options(o))
    for note in table.repairs:
        say(note)
    if forecaster.model.config.quantiles and forecaster.conformal is None:
        say(not_calibrated(o.checkpoint))
    times, values = forecaster.predict(table)
    frame = forecast_frame(forecaster, times, values)
    text = io.StringIO()
    frame.to_csv(text, lineterminator="\n")
    folder = Path(o.output)
    with explain_disk_errors(), figures_if_possible("forecast.png"):
        write_atomically(folder / "forecast.csv", text.getvalue())
        say(f"{len(frame)} steps from {times[0]} to {times[-1]}: {folder / 'forecast.csv'}")
        plot_prediction(forecaster, table, times, values, folder / "forecast.png")
    return {"times": times, "values": values, "csv": folder / "forecast.csv"}


def forecast_frame(forecaster: Forecaster, times: pd.DatetimeIndex, values) -> pd.DataFrame:
    """A column a variate; with quantiles, a column a variate and level, such as sales_q0.1."""
    levels = forecaster.model.config.quantiles
    columns = {}
    for i, name in enumerate(forecaster.columns):
        if levels:
            columns.update({f"{name}_q{level!r}": values[:, i, j] for j, level in enumerate(levels)})
        else:
            columns[name] = values[:, i]
    return pd.DataFrame(columns, index=pd.DatetimeIndex(times, name="date"))
