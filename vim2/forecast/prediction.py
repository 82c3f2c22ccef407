"""Forecasts beyond the end of a file."""

import io
from pathlib import Path
from typing import Any

import pandas as pd

from ..checkpoints import write_atomically
from ..classify.options import resolve
from ..classify.progress import say
from ..errors import UserError
from .forecaster import Forecaster
from .options import predict_parser, reading_options
from .plots import plot_prediction
from .training import choose_device

__all__ = ["predict"]


def predict(argv: list[str] | None = None, /, **options) -> dict[str, Any]:
    """Forecast the steps that follow a file's last row, as `tools/forecast.py predict` does.

    Args:
        argv: Command line; or else
        options: the same options by name, with underscores: `predict(data="sales.csv", checkpoint="runs/sales")`.

    Returns:
        The `times` and `values` of `Forecaster.predict`, and the path of the `csv` with them.

    Raises:
        UserError: Anything that the user can put right.
    """
    options, _ = resolve(predict_parser(), options if argv is None else argv)
    for name in ("data", "checkpoint"):
        if not options[name]:
            raise UserError(f"predict needs {name}.")
    forecaster = Forecaster.from_pretrained(options["checkpoint"], choose_device(options["device"]))
    table = forecaster.read(options["data"], **reading_options(options))
    for note in table.repairs:
        say(note)
    times, values = forecaster.predict(table)
    frame = forecast_frame(forecaster, times, values)
    text = io.StringIO()
    frame.to_csv(text, lineterminator="\n")
    folder = Path(options["output"])
    try:
        write_atomically(folder / "forecast.csv", text.getvalue())
        say(f"{len(frame)} steps from {times[0]} to {times[-1]}: {folder / 'forecast.csv'}")
        plot_prediction(forecaster, table, times, values, folder / "forecast.png")
    except OSError as error:
        raise UserError(f"{error.strerror}: choose another --output.") from None
    except UserError as error:  # matplotlib is optional
        say(f"No forecast.png: {error}")
    return {"times": times, "values": values, "csv": folder / "forecast.csv"}


def forecast_frame(forecaster: Forecaster, times: pd.DatetimeIndex, values) -> pd.DataFrame:
    """A column a variate; with quantiles, a column a variate and level, such as sales_q0.1."""
    levels = forecaster.model.config.quantiles
    columns = {}
    for i, name in enumerate(forecaster.columns):
        if levels:
            columns.update({f"{name}_q{level:g}": values[:, i, j] for j, level in enumerate(levels)})
        else:
            columns[name] = values[:, i]
    return pd.DataFrame(columns, index=pd.DatetimeIndex(times, name="date"))
