"""Errors over all windows of a split, of a model and of the baselines."""

import json
import math
import warnings
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..command.errors import UserError
from ..command.figures import figures_if_possible
from ..command.outputs import explain_disk_errors, make_folder
from ..command.places import is_on_hub
from ..command.processes import choose_device
from ..command.progress import say
from ..files import write_atomically
from .baselines import Ridge
from .committee import Committee, Products, find_weights
from .data import Scaler, Windows
from .forecaster import BEST, Forecaster
from .options import EvaluateOptions, open_options, reading_options
from .plots import plot_errors, plot_forecast, plot_weights
from .refitting import refit
from .scores import Forecasts, baseline_forecasts, mase, naive_errors, score_all
from .table import Table
from .training import VALIDATION_BATCH, versions

__all__ = ["evaluate"]

SAME = 1e-6  # share of a deviation by which means of the same rows may differ, as numbers are read and added up
UNCORRECTED = "without conformal correction"
TSM2_ALONE, LINEAR_ALONE = "TSM2 members alone", "linear members alone"


def evaluate(argv: list[str] | None = None, /, **options) -> dict[str, Any]:
    """Errors of a trained committee and of the baselines, as `vim2 forecast evaluate` prints them.

    Args:
        argv: Command line; or else
        options: the same options by name, with underscores: `evaluate(data="sales.csv", checkpoint="runs/sales")`.
            The data may be a DataFrame as well.

    Returns:
        What evaluation.json holds.

    Raises:
        UserError: Anything that the user can put right.
    """
    o, _, data = open_options(EvaluateOptions, argv, options)
    if is_on_hub(o.checkpoint) and o.output is None:
        raise UserError(f"Nothing is written to {o.checkpoint}: give --output, a folder.")
    device = choose_device(o.device)
    forecaster = Forecaster.from_pretrained(o.checkpoint, device, refitted=False)
    table = forecaster.read(data, **reading_options(o))
    for note in [*table.repairs, *forecaster.doubts]:
        say(note)
    if forecaster.refitted:
        raise UserError(
            f"{o.checkpoint} was fitted again to all of {forecaster.refitted} rows, and knows those that it would be "
            f"tested on: give the folder of its run, where {BEST} does not."
        )
    model, split, part = forecaster.model, forecaster.split, o.part
    config = model.config
    if split is None:
        raise UserError(f"{o.checkpoint} does not say which rows are its test rows.")
    rows = split.train + split.val + split.test
    if len(table) < rows:
        raise UserError(f"{o.data} has {len(table)} rows, the split {rows}: give the file of training.")
    if getattr(split, part) < config.horizon:
        raise UserError(f"The split has no {part} rows: train with another --split.")
    if not has_training_rows(forecaster, table):
        say(
            f"The first {split.train:,} rows of {o.data} are not those of training, their means or deviations differ: "
            f"where rows came before them, the {part} rows may be some that the members know."
        )
    values, future = forecaster.tensors(table, device)
    windows = {
        p: Windows(values, config.lookback, config.horizon, *split.borders(p, config.lookback), future)
        for p in dict.fromkeys(("train", "val", part))
    }
    amp, levels = o.amp and device.type == "cuda", config.quantiles
    index = o.window if o.window >= 0 else len(windows[part]) + o.window
    if not 0 <= index < len(windows[part]):
        raise UserError(f"There is no window {o.window}: there are {len(windows[part])}.")
    if o.refits > len(windows[part]):
        raise UserError(
            f"--refits {o.refits} are more than there are windows, {len(windows[part])}: one fit serves one or more."
        )
    folder = Path(o.output or o.checkpoint)
    make_folder(folder)
    ridge = Ridge.fit(windows["train"], windows["val"])
    parts, known = {}, values[: split.train + split.val]
    if model.linear:
        parts = {TSM2_ALONE: model.prior(["TSM2"]), LINEAR_ALONE: linear_weights(model, windows["val"], known)}
    first = split.borders(part, config.lookback)[0] + config.lookback  # row of the first forecast
    count = max(o.refits, 1)
    ends = [math.ceil(len(windows[part]) * i / count) for i in range(1, count + 1)]  # of the windows that a fit serves
    fits = []

    def stretches() -> Iterator[tuple[Forecasts, Windows]]:
        for start, end in zip([0, *ends], ends):
            fitted, of_ridge, known = forecaster, ridge, first + start
            if o.refits:
                fitted = refit(forecaster, values, future, known, amp, f"fit {len(fits) + 1} of {o.refits}")
                of_ridge = ridge.refit(Windows(values, config.lookback, config.horizon, 0, known))
                say(f"Fitted again to the {known:,} rows before {table.labels(known, known + 1)[0]}.")
            fits.append(fitted)
            yield partial(all_forecasts, fitted, parts, of_ridge, amp), windows[part].stretch(start, end)

    scores = score_all(stretches(), o.batch_size, levels)
    if math.isnan(scores[forecaster.called]["mse"]):
        raise UserError(f"The {part} rows hold no value that could be scored: all are missing.")
    before = scores.pop(UNCORRECTED, None)
    naive = naive_errors(values[: split.train], forecaster.season)
    say(f"{part}: {len(windows[part]):,} windows of {config.horizon} steps, standardised")
    for name, row in scores.items():
        row["mase"] = mase(row, naive)
        scaled = "" if row["mase"] is None else f"  MASE {row['mase']:.4f}"
        say(f"{name:<20} MSE {row['mse']:.4f}  MAE {row['mae']:.4f}{scaled}")
    if model.linear:
        say("Committee: " + ", ".join(f"{w:.2f} {name}" for name, w in zip(model.names, model.weights.tolist())))
    result = {
        "part": part,
        "windows": len(windows[part]),
        "columns": forecaster.columns,
        "scores": scores,
        "ridge_penalty": ridge.penalty,
        "weights": dict(zip(model.names, model.weights.tolist(), strict=True)),
        "chosen": forecaster.metrics,
        "config": config.to_dict(),
        "refits": [fitted.refitted for fitted in fits] if o.refits else [],
        "rows": {"train": split.train, "val": split.val, "test": split.test},
        "versions": versions(),
    }
    if levels:
        result["quantiles"] = {name: scores[forecaster.called][name] for name in ("crps", "coverage")}
        say(describe_quantiles("Quantiles", result["quantiles"], levels))
        if before is not None:
            result["without_conformal"] = {name: before[name] for name in ("crps", "coverage")}
            say(describe_quantiles("Without the conformal correction", result["without_conformal"], levels))
    with explain_disk_errors():
        write_atomically(folder / "evaluation.json", json.dumps(without_nan(result), indent=1) + "\n")
        draw(fits[bisect_right(ends, index)], table, windows[part], index, scores, part, folder)
    return result


def has_training_rows(forecaster: Forecaster, table: Table) -> bool:
    """Whether the rows that stand where the training rows stood have their means and deviations, but for rounding."""
    with warnings.catch_warnings():  # of columns without any value there
        warnings.simplefilter("ignore", RuntimeWarning)
        found, known = Scaler.fit(table.values[: forecaster.split.train]), forecaster.scaler
    apart = SAME * known.std + 1e-12 * abs(known.mean)
    return bool((abs(found.mean - known.mean) <= apart).all() and (abs(found.std - known.std) <= apart).all())


def linear_weights(model: Committee, val: Windows, known: Tensor) -> Tensor:
    """What the weights would be if the committee had no TSM2, (K,), float32: those that the validation windows find for
    its linear members. The rows that are known are those for `Products`."""
    products, count = Products(known), len(model.linear)
    for x, y, _ in val.batches(VALIDATION_BATCH):
        products.add(torch.cat(model.linear_members(x)), y)
    weights = torch.zeros_like(model.weights)
    groups = torch.eye(count, dtype=torch.float64)
    weights[:count] = find_weights(products.result(), groups, count, model.config.horizon)
    return weights


def all_forecasts(
    forecaster: Forecaster, parts: dict[str, Tensor], ridge: Ridge, amp: bool, x: Tensor, future: Tensor | None
) -> dict[str, Tensor]:
    """Of the committee and of parts of it, by their weights, from one pass of the members; of a TSM2 alone, its own.
    With quantiles, also that without conformal correction. Then those of the baselines."""
    model = forecaster.model
    with torch.autocast(x.device.type, torch.bfloat16) if amp else nullcontext():
        members = model.members(x, future)
    mixed = model.mixture(*members)
    result = {forecaster.called: forecaster.correct(mixed, x)}
    result |= {name: model.mixture(*members, weights) for name, weights in parts.items()}
    if forecaster.conformal is not None:
        result[UNCORRECTED] = mixed
    return result | baseline_forecasts(ridge, x, future, model.config.horizon, forecaster.season)


def without_nan(value: Any) -> Any:
    """None for NaN, which JSON has not: errors of variates that have no truth."""
    if isinstance(value, dict):
        return {name: without_nan(v) for name, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def describe_quantiles(what: str, row: dict[str, float], levels: tuple[float, ...]) -> str:
    """CRPS, and how much the outermost band covers of what it should."""
    if len(levels) == 1:
        return f"{what}: CRPS {row['crps']:.4f}."
    return f"{what}: CRPS {row['crps']:.4f}, the band of {levels[-1] - levels[0]:.0%} covers {row['coverage']:.1%}."


def draw(
    forecaster: Forecaster, table: Table, windows: Windows, index: int, scores: dict, part: str, folder: Path
) -> None:
    """The pictures: a window's forecast by the forecaster that was scored on it, all errors, the members' weights."""
    config, split = forecaster.model.config, forecaster.split
    x, _, future = windows[index : index + 1]
    with torch.no_grad():
        y = forecaster.forecast_windows(x, future)[0].double().cpu().numpy()
    units = forecaster.scaler.inverse
    forecast = units(y.transpose(0, 2, 1)).transpose(0, 2, 1) if config.quantiles else units(y)
    start = split.borders(part, config.lookback)[0] + index
    now, end = start + config.lookback, start + config.lookback + config.horizon
    first = now - min(config.lookback, max(2 * config.horizon, 24))
    model = forecaster.model
    with figures_if_possible("forecast.png, errors.png and weights.png"):
        history, truth = table.values[first:now], table.values[now:end]
        errors = scores[forecaster.called]["mse_by_variate"]
        times = table.labels(first, end)
        plot_forecast(forecaster, times, history, truth, forecast, folder / "forecast.png", errors)
        plot_errors(forecaster.columns, scores, folder / "errors.png")
        if model.linear:
            plot_weights(model.names, model.weights.tolist(), folder / "weights.png")
