"""The options of fit, evaluate and predict. A value comes from, first to last: its default, the recipe, the run that
is resumed, the command line."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pandas as pd

from ..command.errors import UserError
from ..command.options import (
    REQUIRED,
    Count,
    DeviceOptions,
    NotNegative,
    Options,
    Positive,
    PositiveFloat,
    Rate,
    RunOptions,
    Share,
    length,
    option,
    resolve,
    unset,
)
from ..tsm2 import INSTANCE_NORMS, NORMS, TIME_MIXERS, VARIATE_MIXERS, TSM2Config
from .data import split_rows
from .frames import describe, require_data
from .recipes import RECIPES
from .stamps import DATES
from .steps import TIMES
from .table import MISSING

__all__ = [
    "AUTO",
    "LOSSES",
    "MAY_CHANGE",
    "EvaluateOptions",
    "FitOptions",
    "PredictOptions",
    "ReadingOptions",
    "TrainingOptions",
    "fill_open",
    "model_config",
    "open_options",
    "reading_options",
]

# What a resumed run may change: where it runs and writes, and where its file lies.
MAY_CHANGE = {"data", "device", "experiment", "output", "refit", "resume"}
MODEL = TSM2Config()
AUTO = "auto"
LOSSES = ("mse", "mae", "huber", "spectral")
# What `fill_open` goes by: variates from which on mixing them pays; windows to train on from which on a model is wider;
# the least updates of a training, and of an epoch that sees every window once; the windows that an update may have, and
# the series in them, windows times variates: windows of one file overlap, so that many variates need fewer of them.
MANY_VARIATES = 20
WIDTHS = {0: 16, 20_000: 32}
MIN_UPDATES, EPOCH_UPDATES = 1000, 125
MIN_BATCH, MAX_BATCH, MAX_SERIES = 16, 128, 2700


@dataclass(frozen=True, kw_only=True)
class SeriesOptions(Options, group="series"):
    targets: list[str] | None = option(None, "columns to forecast; default: all", metavar="NAME")
    future_columns: list[str] = option([], "columns known for the time to forecast", metavar="NAME")
    static_columns: list[str] = option(
        [], "of a long table, columns that describe its series, such as a region", metavar="NAME"
    )
    calendar: bool = option(
        False, "time of day, week and year as known features, where the training rows hold two of them", negatable=True
    )
    split: Annotated[list[NotNegative], length(3)] = option(
        [0.7, 0.1, 0.2], "shares, or numbers of rows from the first on", metavar=("TRAIN", "VAL", "TEST")
    )


NEEDLESS = dict.fromkeys(("sep", "delimiter"), "what separates columns is found")
NEEDLESS |= dict.fromkeys(("decimal", "thousands"), "decimal commas and separators of thousands are found")
NEEDLESS |= dict.fromkeys(("compression", "encoding", "header"), "it is found")


@dataclass(frozen=True, kw_only=True)
class ReadingOptions(Options, group="reading"):
    needless = NEEDLESS
    time_column: str | None = option(None, "default: date, time, timestamp, ds, or the first column", metavar="NAME")
    na_values: list[float] = option([], "numbers that stand for a missing value", nargs="*", metavar="X")
    keep_values: list[float] = option([], "numbers such as -9999 to take as they are", nargs="*", metavar="X")
    missing: str = option(
        "error", "what becomes of missing values; mask: none is learned from or scored by them", choices=MISSING
    )
    times: str = option(
        "error",
        "what becomes of irregular time stamps: regular sorts them, keeps the first of equal ones and adds rows "
        "where some are missing; keep takes each row as one step",
        choices=TIMES,
    )
    dates: str = option("detect", "order of dates such as 01/02/24", choices=DATES)
    freq: str | None = option(
        None, "step of rows without time stamps, as pandas names it: h, 15min, D, W, MS, ...", metavar="STEP"
    )
    start: str | None = option(
        None, "time stamp of the first row, with --freq; default: rows are counted", metavar="STAMP"
    )


@dataclass(frozen=True, kw_only=True)
class SameReadingOptions(Options, group="reading; by default, as in training"):
    needless = NEEDLESS
    time_column: str | None = unset(ReadingOptions, "time_column")
    na_values: list[float] | None = unset(ReadingOptions, "na_values")
    keep_values: list[float] | None = unset(ReadingOptions, "keep_values")
    missing: str | None = unset(ReadingOptions, "missing")
    times: str | None = unset(ReadingOptions, "times")
    dates: str | None = unset(ReadingOptions, "dates")
    freq: str | None = unset(ReadingOptions, "freq")
    start: str | None = unset(ReadingOptions, "start")


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options, group="model"):
    horizon: Positive | None = option(None, "steps to forecast; default: 96, fewer for short files", metavar="STEPS")
    lookback: Positive | None = option(None, "steps it sees; default: 512, fewer for short files", metavar="STEPS")
    patch: Positive | None = option(None, "steps a patch; default: an eighth of the lookback", metavar="STEPS")
    stride: Positive | None = option(None, "steps between patches; default: half a patch", metavar="STEPS")
    d_model: Positive | None = option(None, "features of a patch; default: 16, 32 for long files", metavar="N")
    depth: Positive = option(MODEL.depth, "MambaMixer blocks", metavar="N")
    d_state: Positive = option(8, "state size of the scans", metavar="N")
    expand: PositiveFloat = option(MODEL.expand, "inner width over --d-model", metavar="F")
    d_conv: Positive = option(MODEL.d_conv, "width of the convolutions", metavar="N")
    time_mixer: str = option(MODEL.time_mixer, "along time", choices=TIME_MIXERS)
    variate_mixer: str = option(
        AUTO, "along variates; auto: s6 for 20 variates or more, else none", choices=(AUTO, *VARIATE_MIXERS)
    )
    norm: str = option(MODEL.norm, "of patches, or the paper's 2-D one", choices=NORMS)
    instance_norm: str = option(
        AUTO,
        "of each window; auto: about its mean or its last value, about whichever ridge regression validates better",
        choices=(AUTO, *INSTANCE_NORMS),
    )
    dropout: Rate = option(0.2, "in the mixers", metavar="RATE")
    head_dropout: Rate = option(0.2, "at the end", metavar="RATE")
    quantiles: list[Share] = option([], "levels, such as .1 .5 .9", metavar="Q")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Options, group="training"):
    members: Positive = option(
        3, "TSM2 that are trained side by side and mixed with ridge regression; 1: a TSM2 alone", metavar="N"
    )
    epochs: Positive = option(8, "at most", metavar="N")
    batch_size: Positive | None = option(
        None, "windows an update; default: 16 to 128, by the size of the file", short="-b", metavar="N"
    )
    epoch_steps: Positive | None = option(
        None, "updates an epoch; default: all windows, and 1,000 updates in all or more", metavar="N"
    )
    loss: str = option("spectral", "to train with; spectral: .65 MAE and .35 of that of the spectrum", choices=LOSSES)
    frequency_mask: Rate = option(
        0.2,
        "share of frequencies that half of the windows lose in training, to learn from more of them; 0: none",
        metavar="RATE",
        before=0.0,
    )
    lr: PositiveFloat = option(2e-3, "peak learning rate of AdamW, cosine to zero")
    ema: Rate = option(0.998, "decay of the averaged weights, which forecast; shorter averages at first")
    warmup_epochs: NotNegative = option(0.5, "epochs of linear warm-up", metavar="N")
    weight_decay: NotNegative = option(1e-4, "of matrices")
    clip_grad: NotNegative = option(1.0, "clip each TSM2's gradients to this norm; 0: do not", metavar="NORM")
    patience: Positive = option(3, "epochs without progress to stop after", metavar="N")
    seed: Count = option(0, "of weights, order and dropout")
    cuda_graph: bool = option(False, "record the models' passes as CUDA graphs", negatable=True)


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(DeviceOptions, group="device"):
    amp: bool = option(False, "bfloat16 outside the scan, on GPUs", negatable=True)


@dataclass(frozen=True, kw_only=True)
class TrainingRunOptions(RunOptions, group="run"):
    refit: bool = option(
        True, "in the end, fit all members again to all rows, for `predict`; off with --recipe", negatable=True
    )
    resume: bool = option(False, "go on with the run in that folder")


@dataclass(frozen=True, kw_only=True)
class FitOptions(SeriesOptions, ReadingOptions, ModelOptions, TrainingOptions, ComputeOptions, TrainingRunOptions):
    """Train a committee of TSM2 on the series of a file, and mix it with ridge regression."""

    program = "vim2 forecast fit"
    data: str = option(
        REQUIRED,
        ".csv or .parquet, one row a time step; compression, separators and decimal commas are found",
        metavar="DATA",
        positional=True,
    )
    recipe: str | None = option(None, "split and frozen settings of a benchmark data set", choices=tuple(RECIPES))

    @property
    def default_name(self) -> str:
        name = f"tsm2-{Path(self.data).name.split('.')[0]}"
        return name if self.horizon is None else f"{name}-{self.horizon}"


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(SameReadingOptions, ComputeOptions):
    """Errors of a trained committee and of the baselines on the test split."""

    program = "vim2 forecast evaluate"
    data: str = option(REQUIRED, "the file it was trained on", metavar="DATA", positional=True)
    checkpoint: str = option(REQUIRED, "folder of a run, or hf-hub:OWNER/NAME", metavar="DIR")
    part: str = option("test", "of the split", choices=("test", "val"))
    batch_size: Positive = option(256, "windows at once", short="-b", metavar="N")
    refits: Count = option(
        0,
        "fit again before each of N stretches of the windows, to all rows until then: a rolling backtest",
        metavar="N",
    )
    window: int = option(-1, "window to draw; -1: the last", metavar="I")
    output: str | None = option(None, "folder to write to; default: the checkpoint's", metavar="DIR")


@dataclass(frozen=True, kw_only=True)
class PredictOptions(SameReadingOptions, DeviceOptions):
    """Forecast beyond the end of a file."""

    program = "vim2 forecast predict"
    data: str = option(
        REQUIRED, "a file with the same columns, at least a lookback long", metavar="DATA", positional=True
    )
    checkpoint: str = option(REQUIRED, "folder of a run, or hf-hub:OWNER/NAME", metavar="DIR")
    horizon: Positive | None = option(
        None, "steps to forecast; default: all that it was trained for, and no more than these", metavar="STEPS"
    )
    output: str = option("forecast", "folder for forecast.csv and forecast.png", metavar="DIR")


OptionsT = TypeVar("OptionsT", FitOptions, EvaluateOptions, PredictOptions)


def open_options(
    cls: type[OptionsT], argv: Sequence[str] | None, given: Mapping[str, Any]
) -> tuple[OptionsT, set[str], str | pd.DataFrame]:
    """All options of a command, the names of those that were given, and the data: a path, or the DataFrame that was
    given by name, for which the options say DataFrame.

    Raises:
        UserError: As `resolve`; data of another type.
    """
    data = given.get("data", "")
    require_data(data)
    options, explicit = resolve(cls, argv, {**given, "data": describe(data)} if "data" in given else given)
    return options, explicit, data if isinstance(data, pd.DataFrame) else options.data


def reading_options(options: ReadingOptions | SameReadingOptions) -> dict[str, Any]:
    """Those of `read_table` that were given."""
    given = {name: getattr(options, name) for name in ReadingOptions.__dataclass_fields__}
    return {name: value for name, value in given.items() if value is not None}


def fill_open(options: FitOptions, rows: int, variates: int) -> FitOptions:
    """Options in which nothing is left open but the centre of instance normalisation: what was not given is chosen by
    the size of the file.

    Args:
        options: As given.
        rows: Of the file.
        variates: To forecast.

    Raises:
        UserError: A split that cannot be made; a horizon that leaves no row of training to look back over.
    """
    o, split = options, split_rows(rows, options.split)
    shortest = min(split.val, split.test or split.val)
    horizon = o.horizon or max(min(MODEL.horizon, shortest // 2), 1)
    if o.lookback is None and split.train <= horizon:
        raise UserError(
            f"{split.train} rows of training (of {rows} in the file) are too few for a horizon of {horizon}: shorten "
            "it, or choose another --split."
        )
    lookback = o.lookback or max(min(MODEL.lookback, (split.train - horizon) // 3), 1)
    patch = o.patch or max(lookback // 8, 1)
    windows = max(split.train - lookback - horizon + 1, 1)
    whole = o.batch_size or min(max(windows // EPOCH_UPDATES, MIN_BATCH), MAX_BATCH)
    batch_size = o.batch_size or min(whole, max(MAX_SERIES // variates, MIN_BATCH))
    return replace(
        o,
        horizon=horizon,
        lookback=lookback,
        patch=patch,
        stride=o.stride or max(patch // 2, 1),
        d_model=o.d_model or next(width for size, width in reversed(WIDTHS.items()) if windows >= size),
        variate_mixer=("s6" if variates >= MANY_VARIATES else "none") if o.variate_mixer == AUTO else o.variate_mixer,
        batch_size=batch_size,
        epoch_steps=o.epoch_steps or max(math.ceil(windows / whole), math.ceil(MIN_UPDATES / o.epochs)),
    )


def model_config(options: ModelOptions, future_features: int, static_features: int = 0) -> TSM2Config:
    """The model that options with nothing left open ask for; with `AUTO`, instance normalised about the mean, until
    ridge has told.

    Raises:
        UserError: Values that do not fit together.
    """
    chosen = {name: getattr(options, name) for name in ModelOptions.__dataclass_fields__}
    if chosen["instance_norm"] == AUTO:
        chosen["instance_norm"] = "mean"
    try:
        return TSM2Config(future_features=future_features, static_features=static_features, **chosen)
    except ValueError as error:
        raise UserError(str(error)) from None
