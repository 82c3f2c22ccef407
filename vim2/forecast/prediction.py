"""Forecasts beyond the end of a file."""

import io
from os import PathLike
from pathlib import Path
from typing import Any

from ..command.figures import figures_if_possible
from ..command.outputs import explain_disk_errors, keep_source, make_folder
from ..command.processes import choose_device
from ..command.progress import say
from ..files import write_atomically
from .forecaster import Forecaster
from .options import PredictOptions, open_options, reading_options
from .plots import plot_prediction

__all__ = ["predict"]


def predict(argv: list[str] | None = None, /, **options) -> dict[str, Any]:
    """Forecast the steps that follow a file's last row, as `vim2 forecast predict` does.

    Args:
        argv: Command line; or else
        options: the same options by name, with underscores: `predict(data="sales.csv", checkpoint="runs/sales")`.
            The data may be a DataFrame as well.

    Returns:
        The `times` and `values` of `Forecaster.forecast`, and the path of the `csv` with them.

    Raises:
        UserError: Anything that the user can put right.
    """
    o, _, data = open_options(PredictOptions, argv, options)
    folder = Path(o.output)
    if isinstance(data, str | PathLike):
        keep_source(data, folder / "forecast.csv")
    forecaster = Forecaster.from_pretrained(o.checkpoint, choose_device(o.device))
    table = forecaster.read(data, **reading_options(o))
    for note in [*table.repairs, *forecaster.doubts]:
        say(note)
    make_folder(folder)
    times, values = forecaster.forecast(table, o.horizon)
    say(forecaster.knowledge)  # of a forecast that there is
    frame = forecaster.frame(table, times, values)
    text = io.StringIO()
    frame.to_csv(text, lineterminator="\n", index=table.ids is None)
    with explain_disk_errors(), figures_if_possible("forecast.png"):
        write_atomically(folder / "forecast.csv", text.getvalue())
        when = f"{len(times)} steps from {times[0]} to {times[-1]}" if len(times) > 1 else f"1 step, {times[0]}"
        say(f"{when}: {folder / 'forecast.csv'}")
        plot_prediction(forecaster, table, times, values, folder / "forecast.png")
    return {"times": times, "values": values, "csv": folder / "forecast.csv"}
