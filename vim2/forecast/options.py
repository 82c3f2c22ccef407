"""The options of fit, evaluate and predict. A value comes from, first to last: its default, the recipe, the run that
is resumed, the command line."""

import argparse
from argparse import BooleanOptionalAction
from pathlib import Path
from typing import Any

from ..classify.options import Parser, count, positive, share_or_zero
from ..errors import UserError
from ..tsm2 import INSTANCE_NORMS, NORMS, TIME_MIXERS, VARIATE_MIXERS, TSM2Config
from .data import MISSING, TIMES
from .recipes import RECIPES

__all__ = ["evaluate_parser", "fit_parser", "model_config", "predict_parser", "reading_options", "resume_options"]

# What a resumed run may change: where it runs and writes, and where its file lies.
MAY_CHANGE = {"data", "device", "experiment", "output", "resume"}
READING = ("time_column", "na_values", "keep_values", "missing", "times")


def add_reading_options(parser: argparse.ArgumentParser, defaults: bool) -> None:
    """Options of `read_table`; without defaults, those of training hold."""
    group = parser.add_argument_group("reading" if defaults else "reading; by default, as in training")
    group.add_argument("--time-column", metavar="NAME", help="default: date, time, timestamp, ds, or the first column")
    numbers = dict(type=float, nargs="*", metavar="X", default=[] if defaults else None)
    group.add_argument("--na-values", **numbers, help="numbers that stand for a missing value")
    group.add_argument("--keep-values", **numbers, help="numbers such as -9999 to take as they are")
    group.add_argument(
        "--missing", choices=MISSING, default="error" if defaults else None, help="what becomes of missing values"
    )
    group.add_argument(
        "--times",
        choices=TIMES,
        default="error" if defaults else None,
        help="what becomes of irregular time stamps: regular sorts them, keeps the first of equal ones and adds rows "
        "where some are missing; keep takes each row as one step",
    )


def add_device_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("device")
    group.add_argument("--device", help="cuda, cuda:1, cpu, ...; default: a GPU if there is one")
    group.add_argument("--amp", action=BooleanOptionalAction, default=False, help="bfloat16 outside the scan, on GPUs")


def fit_parser(prog: str = "forecast.py fit") -> Parser:
    """Options of `vim2.forecast.fit`."""
    c = TSM2Config()
    parser = Parser(prog=prog, description="Train a TSM2 on the series of a file, and choose its best epoch.")
    parser.add_argument("data", metavar="DATA", help=".csv (also .xz, .gz, ...) or .parquet, one row a time step")
    parser.add_argument("--recipe", choices=tuple(RECIPES), help="split and frozen settings of a benchmark data set")
    group = parser.add_argument_group("series")
    group.add_argument("--targets", nargs="+", metavar="NAME", help="columns to forecast; default: all")
    group.add_argument(
        "--future-columns", nargs="+", default=[], metavar="NAME", help="columns known for the time to forecast"
    )
    group.add_argument(
        "--calendar",
        action=BooleanOptionalAction,
        default=False,
        help="time of day, week and year as known features, where the training rows hold two of them",
    )
    group.add_argument(
        "--split",
        type=float,
        nargs=3,
        default=[0.7, 0.1, 0.2],
        metavar=("TRAIN", "VAL", "TEST"),
        help="shares, or numbers of rows from the first on",
    )
    add_reading_options(parser, True)

    group = parser.add_argument_group("model")
    group.add_argument("--horizon", type=positive, default=c.horizon, metavar="STEPS", help="steps to forecast")
    group.add_argument("--lookback", type=positive, default=c.lookback, metavar="STEPS", help="steps it sees")
    group.add_argument("--patch", type=positive, default=c.patch, metavar="STEPS", help="steps a patch")
    group.add_argument("--stride", type=positive, default=c.stride, metavar="STEPS", help="steps between patches")
    group.add_argument("--d-model", type=positive, default=c.d_model, metavar="N", help="features of a patch")
    group.add_argument("--depth", type=positive, default=c.depth, metavar="N", help="MambaMixer blocks")
    group.add_argument("--d-state", type=positive, default=c.d_state, metavar="N", help="state size of the scans")
    group.add_argument("--expand", type=float, default=c.expand, metavar="F", help="inner width over --d-model")
    group.add_argument("--d-conv", type=positive, default=c.d_conv, metavar="N", help="width of the convolutions")
    group.add_argument("--time-mixer", choices=TIME_MIXERS, default=c.time_mixer, help="along time")
    group.add_argument("--variate-mixer", choices=VARIATE_MIXERS, default=c.variate_mixer, help="along variates")
    group.add_argument("--norm", choices=NORMS, default=c.norm, help="of patches, or the paper's 2-D one")
    group.add_argument("--instance-norm", choices=INSTANCE_NORMS, default=c.instance_norm, help="of each window")
    group.add_argument("--dropout", type=share_or_zero, default=c.dropout, metavar="RATE", help="in the mixers")
    group.add_argument("--head-dropout", type=share_or_zero, default=c.head_dropout, metavar="RATE", help="at the end")
    group.add_argument(
        "--linear-path",
        action=BooleanOptionalAction,
        default=c.linear_path,
        help="add a linear map that starts at ridge regression; not in the paper",
    )
    group.add_argument("--quantiles", type=float, nargs="+", default=[], metavar="Q", help="levels, such as .1 .5 .9")

    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=positive, default=10, metavar="N", help="at most")
    group.add_argument("-b", "--batch-size", type=positive, default=64, metavar="N", help="windows an update")
    group.add_argument("--epoch-steps", type=positive, metavar="N", help="updates an epoch; default: all windows")
    group.add_argument(
        "--loss", choices=("mse", "mae", "huber"), default="mse", help="to train with; epochs are chosen by the MSE"
    )
    group.add_argument("--lr", type=float, default=2e-4, help="peak learning rate of AdamW, cosine to zero")
    group.add_argument(
        "--linear-path-lr", type=float, default=0.0, metavar="F", help="factor on it for the linear path; 0: fixed"
    )
    group.add_argument("--warmup-epochs", type=float, default=0.2, metavar="N", help="epochs of linear warm-up")
    group.add_argument("--weight-decay", type=float, default=1e-4, help="of matrices")
    group.add_argument("--clip-grad", type=float, default=1.0, metavar="NORM", help="clip gradients to this norm")
    group.add_argument("--sam", type=float, default=0.0, metavar="RHO", help="sharpness-aware minimisation; 0: none")
    group.add_argument(
        "--patience", type=positive, default=3, metavar="N", help="epochs without progress to stop after"
    )
    group.add_argument("--seed", type=count, default=0, help="of weights, order and dropout")
    group.add_argument(
        "--cuda-graph", action=BooleanOptionalAction, default=False, help="record the model's passes as CUDA graphs"
    )
    add_device_options(parser)

    group = parser.add_argument_group("files")
    group.add_argument("--output", default="runs", metavar="DIR", help="folder of the runs")
    group.add_argument("--experiment", metavar="NAME", help="folder of this run; default: named after data and horizon")
    group.add_argument("--resume", action="store_true", help="go on with the run in that folder")
    return parser


def evaluate_parser(prog: str = "forecast.py evaluate") -> Parser:
    """Options of `vim2.forecast.evaluate`."""
    parser = Parser(prog=prog, description="Errors of a trained TSM2 and of the baselines on the test split.")
    parser.add_argument("data", metavar="DATA", help="the file it was trained on")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="folder of a run")
    parser.add_argument("--part", choices=("test", "val"), default="test", help="of the split")
    parser.add_argument("-b", "--batch-size", type=positive, default=256, metavar="N", help="windows at once")
    parser.add_argument("--window", type=int, default=-1, metavar="I", help="window to draw; -1: the last")
    add_reading_options(parser, False)
    add_device_options(parser)
    parser.add_argument("--output", metavar="DIR", help="folder to write to; default: the checkpoint's")
    return parser


def predict_parser(prog: str = "forecast.py predict") -> Parser:
    """Options of `vim2.forecast.predict`."""
    parser = Parser(prog=prog, description="Forecast beyond the end of a file.")
    parser.add_argument("data", metavar="DATA", help="a file with the same columns, at least a lookback long")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="folder of a run")
    add_reading_options(parser, False)
    parser.add_argument("--device", help="cuda, cuda:1, cpu, ...; default: a GPU if there is one")
    parser.add_argument("--output", default="forecast", metavar="DIR", help="folder for forecast.csv and forecast.png")
    return parser


def reading_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those of `read_table` that were given."""
    return {name: options[name] for name in READING if options[name] is not None}


def model_config(options: dict[str, Any], future_features: int) -> TSM2Config:
    """The model that the options ask for.

    Raises:
        UserError: Values that do not fit together.
    """
    names = TSM2Config.__dataclass_fields__.keys() & options.keys()
    try:
        return TSM2Config(future_features=future_features, **{name: options[name] for name in names})
    except ValueError as error:
        raise UserError(str(error)) from None


def resume_options(options: dict[str, Any], explicit: set[str], saved: dict[str, Any], path: Path) -> dict[str, Any]:
    """The options of a run that goes on: those it was started with, and of those given now the ones it may change.

    Raises:
        UserError: An option that would make it another run.
    """
    for name in sorted(explicit - MAY_CHANGE):
        if name in saved and options[name] != saved[name]:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{path} is of a run with {flag} {saved[name]}, not {options[name]}: leave {flag} out to go on with "
                "that run, or choose another --experiment."
            )
    return {**options, **{name: value for name, value in saved.items() if name not in MAY_CHANGE}}
