"""A trained committee together with what it needs to know of the series: saved, loaded, applied to files."""

import json
import os
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..checkpoints import check_weights
from ..command.errors import UserError, did_you_mean, first_line
from ..command.options import REQUIRED, Count, Options, Positive, PositiveFloat, as_saved, length, option, resolve
from ..command.places import is_on_hub
from ..command.processes import choose_device
from ..command.progress import say
from ..files import write_atomically
from ..tsm2 import TSM2Config
from .baselines import shorter_lookbacks
from .committee import Committee
from .conformal import calibrate
from .data import (
    CYCLES,
    Scaler,
    Split,
    calendar_features,
    last_known,
    make_split,
    standardise,
)
from .frames import describe
from .long_tables import LONG
from .options import ReadingOptions, TrainingOptions
from .scores import model_forecast
from .steps import follow, to_offset, usual_step
from .table import Table, read_table

__all__ = ["BEST", "REFITTED", "Forecaster"]

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
CONFORMAL = "conformal"  # its name among the weights
BEST, REFITTED = "best", "refitted"  # folders within a run's


@dataclass
class Forecaster:
    """A committee of TSM2 and ridge regression, the scale and order of its series, and their time step.

    Args:
        model: On any device.
        columns: Names of the M variates, in the order that the model's scan along variates has learned.
        scaler: Of the variates.
        future_columns: Names of the known-future features that the file brings.
        future_scaler: Of those.
        calendar: Cycles whose `calendar_features` follow them.
        step: pandas' name of the time step, such as "h" or "15min"; None if rows were not a constant step apart.
        season: Steps of a season, for the seasonal naive forecast.
        split: Rows that it was trained, validated and is to be tested on.
        reading: Options of `read_table` that it was trained with, but for the columns.
        metrics: What training reported of the chosen epoch, and its seed.
        training: `TrainingOptions` of its TSM2, nothing left open, which fitting again goes by; {} for forecasters from
            before that.
        penalties: Of its ridges, by their centre, from the longest lookback.
        refitted: Rows that its members were fitted to again, see `refitting`; None if they know the training rows
            alone.
        conformal: Correction of the quantiles that the validation windows taught, (H, M or 1, Q), float32 on the
            model's device, see `conformal.Conformity`; None without quantiles, and for forecasters from before.
        static_columns: Names of the columns that its static features were made of; these are among the weights.
    """

    model: Committee
    columns: list[str]
    scaler: Scaler
    future_columns: list[str] = field(default_factory=list)
    future_scaler: Scaler | None = None
    calendar: list[str] = field(default_factory=list)
    step: str | None = None
    season: int = 1
    split: Split | None = None
    reading: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    penalties: dict[str, list[float]] = field(default_factory=dict)
    refitted: int | None = None
    conformal: Tensor | None = None
    static_columns: list[str] = field(default_factory=list)

    def read(self, data: str | Path | pd.DataFrame, **changes) -> Table:
        """Read a file or a DataFrame with this forecaster's columns, in its order.

        Args:
            data: As for `read_table`.
            changes: Options of `read_table` to use instead of those of training, but for the columns.

        Raises:
            UserError: As `read_table`; rows that are another step apart; an option that is none.
        """
        return self._read("read", data, changes)

    def _read(self, method: str, data: str | Path | pd.DataFrame, changes: dict[str, Any]) -> Table:
        """As `read`, on behalf of a method of this name."""
        known = ReadingOptions.__dataclass_fields__
        for name in changes:
            if name not in known:
                meant = did_you_mean(name, known)
                raise UserError(f"Forecaster.{method} has no option {name}{meant} (of {', '.join(known)})")
        options, _ = resolve(ReadingOptions, given={**self.reading, **changes})  # one number stands for a list
        reading = {name: getattr(options, name) for name in self.reading.keys() | changes}
        table = read_table(data, targets=self.columns, future_columns=self.future_columns, **reading)
        if others := [str(i) for name, i in (table.ids or {}).items() if name not in table.columns]:
            named = ", ".join(others[:5]) + f" and {len(others) - 5} more" * (len(others) > 5)
            table.repairs.append(f"Series that the forecaster was not trained for were left out: {named}.")
        step = self.step_of(table)
        # a single row has none, and is too short for what follows, which says so
        if self.step and step != self.step and reading.get("times") != "keep" and len(table.values) > 1:
            raise UserError(
                f"Rows of {describe(data)} are {step or 'not a constant step'} apart, the model was trained on "
                f"{self.step}: resample the file, or add --times keep if it is to be taken as it is."
            )
        return table

    def step_of(self, table: Table) -> str | None:
        """pandas' name of a table's step, None if it has none: that of training where the rows are these steps apart as
        well, such as five business days without a weekend."""
        step = table.step.freqstr if table.step else None
        if step and self.step and step != self.step and follow(table.times, to_offset(self.step)):
            return self.step
        return step

    @property
    def called(self) -> str:
        """What forecasts: a committee, or a TSM2 alone."""
        return "committee" if self.model.linear else "TSM2"

    @property
    def doubts(self) -> list[str]:
        """What is to be known of its forecasts beforehand, a sentence each."""
        missing = []
        if self.model.linear and self.metrics and "committee" not in self.metrics:
            missing.append("the members have equal weights")
        if self.model.config.quantiles and self.conformal is None:
            missing.append("the quantiles have no conformal correction")
        if not missing:
            return []
        found = " and ".join(missing)
        return [f"{found[0].upper()}{found[1:]}, as a run finds them when it is over: go on with `fit --resume`."]

    @property
    def knowledge(self) -> str:
        """Which rows its members were fitted to, a sentence."""
        if self.refitted:
            return f"The members know {self.refitted:,} rows: they were fitted again to all that training's file had."
        of_training = "training rows" if self.split is None else f"{self.split.train:,} training rows"
        return f"The members know the {of_training} alone: `fit --resume --refit` fits them again to all."

    def tensors(self, table: Table, device: torch.device | str) -> tuple[Tensor, Tensor | None]:
        """Standardised variates (rows, M), NaN where they are missing, and future features (rows and more, C) or None,
        float32, on a device.

        Raises:
            UserError: As `standardise`.
        """
        values = standardise(self.scaler, table.values, self.columns)
        values = torch.tensor(values, dtype=torch.float32, device=device)
        features = self.future_features(table.future, table.future_times)
        if features is None:
            return values, None
        return values, torch.tensor(features, dtype=torch.float32, device=device)

    def future_features(self, future: np.ndarray, times: pd.DatetimeIndex) -> np.ndarray | None:
        # 0, the mean of the training rows, is what says least of a feature that is missing
        parts = []
        if self.future_columns:
            parts.append(np.nan_to_num(standardise(self.future_scaler, future, self.future_columns), nan=0.0))
        if self.calendar:
            parts.append(calendar_features(times, self.calendar))
        return np.concatenate(parts, axis=1) if parts else None

    def predict(self, data: str | Path | pd.DataFrame, horizon: int | None = None, **changes) -> pd.DataFrame:
        """Forecast the steps that follow the last row of a DataFrame or file, and say what was repaired in it.

        Args:
            data: As for `read_table`, wide or long, with the same columns, at least a lookback long.
            horizon: Steps h to forecast, no more than it was trained for, H, which is the default.
            changes: Options of `read_table` to use instead of those of training, but for the columns.

        Returns:
            As `frame` makes it, h rows, or h for each series of a long table.

        Raises:
            UserError: As `read` and `forecast`.
        """
        table = self._read("predict", data, changes)
        for note in [*table.repairs, *self.doubts]:
            say(note)
        return self.frame(table, *self.forecast(table, horizon))

    def frame(self, table: Table, times: pd.Index, values: np.ndarray) -> pd.DataFrame:
        """A forecast in the form of the table that it continues, in its units, float64.

        Args:
            table: As `read` returns it.
            times: As `forecast` returns them.
            values: As `forecast` returns them.

        Returns:
            Of a wide table, a column a variate by time stamps, an index called date, or by numbers of rows that are
            counted, called row; with quantiles a column a variate and level, such as sales_q0.1. Of a long one, columns
            unique_id, ds and TSM2, with quantiles TSM2_q0.1 and so on, series after series. Time stamps are in the time
            zone of the DataFrame's, if these have one.
        """
        levels = [f"_q{level!r}" for level in self.model.config.quantiles] or [""]
        times = table.in_zone(times)
        values = values.reshape(len(times), len(self.columns), len(levels))
        if table.ids is None:
            columns = {f"{c}{q}": values[:, i, j] for i, c in enumerate(self.columns) for j, q in enumerate(levels)}
            return pd.DataFrame(columns, index=times.rename("date" if table.first_row is None else "row"))
        series, time, _ = LONG
        ids = [table.ids[c] for c in table.columns for _ in times]
        columns = {series: ids, time: times.append([times] * (len(self.columns) - 1))}
        columns |= {f"TSM2{q}": values[:, :, j].T.flatten() for j, q in enumerate(levels)}
        return pd.DataFrame(columns)

    def forecast(self, table: Table, horizon: int | None = None) -> tuple[pd.Index, np.ndarray]:
        """Forecast beyond the last row of a table. Each step has a forecast of its own, so fewer steps are the first
        of more, and known-future columns are needed for all H.

        Args:
            table: As `read` returns it.
            horizon: Steps h, no more than it was trained for, H, which is the default.

        Returns:
            Time stamps (h,), or the numbers of rows that are counted, and values (h, M), with quantiles (h, M, Q), in
            the units of the file.

        Raises:
            UserError: Another horizon; fewer rows than the lookback, no rows of known-future columns for the trained
                horizon, time stamps that cannot be continued, or values too far from those of training.
        """
        c = self.model.config
        horizon = c.horizon if horizon is None else horizon
        if isinstance(horizon, bool) or not isinstance(horizon, Integral) or not 1 <= horizon <= c.horizon:
            raise UserError(
                f"The forecaster was trained for {c.horizon} steps and forecasts 1 to {c.horizon}, not {horizon!r}: "
                "fit one with a longer horizon for more."
            )
        if len(table) < c.lookback:
            raise UserError(f"{len(table)} rows are too few: the model looks back over {c.lookback}.")
        times = self.times_ahead(table)
        future = None
        if self.future_columns:
            known = table.future[len(table) : len(table) + c.horizon]
            if len(known) < c.horizon:
                raise UserError(
                    f"The forecast needs {', '.join(self.future_columns)} for {c.horizon} further rows, and the file "
                    f"has {len(known)}: append rows with time stamp and these columns, and no value of the targets."
                )
            future = known
        if self.future_columns or self.calendar:
            features = self.future_features(future, times)
            future = torch.tensor(features, dtype=torch.float32)
        device = next(self.model.parameters()).device
        rows = table.values[-c.lookback :]
        if np.isnan(rows[0]).any():  # the value before may lie anywhere
            rows = table.values
        values = standardise(self.scaler, rows, self.columns)
        x = last_known(torch.tensor(values, dtype=torch.float32, device=device))[-c.lookback :]
        self.model.eval()
        with torch.no_grad():
            y = self.forecast_windows(x[None], None if future is None else future[None].to(device))[0]
        y = y.double().cpu().numpy()
        values = self.scaler.inverse(y.transpose(0, 2, 1)).transpose(0, 2, 1) if c.quantiles else self.scaler.inverse(y)
        if not np.isfinite(values).all():
            raise UserError("The forecast is NaN or infinite: the forecaster is damaged. Fit it again.")
        if table.first_row is not None:
            times = table.labels(len(table), len(table) + len(times))
        return times[:horizon], values[:horizon]

    def forecast_windows(self, x: Tensor, future: Tensor | None, amp: bool = False) -> Tensor:
        """Forecasts of standardised windows, quantiles with their conformal correction.

        Args:
            x: (n, L, M), on the model's device.
            future: Future features, (n, H, C) or None.
            amp: Under autocast to bfloat16.

        Returns:
            (n, H, M), with quantiles (n, H, M, Q), float32.
        """
        return self.correct(model_forecast(self.model, amp)(x, future), x)

    def correct(self, y: Tensor, x: Tensor) -> Tensor:
        """The model's forecasts of windows with their conformal correction, float32; shapes as in
        `forecast_windows`."""
        return y.float() if self.conformal is None else calibrate(y, x, self.conformal, self.model.config)

    def times_ahead(self, table: Table) -> pd.DatetimeIndex:
        horizon = self.model.config.horizon
        given = table.future_times[len(table) : len(table) + horizon]
        if len(given) == horizon:
            return given
        name = self.step_of(table)
        step = to_offset(name) if name else usual_step(table.times)  # of rows taken as they are
        if step is None:
            raise UserError(
                "The time stamps tell no step to continue with: there is one row only, or none is later than the one "
                "before. Sort the rows by time, or add --times regular."
            )
        try:
            return pd.date_range(table.times[-1], periods=horizon + 1, freq=step)[1:]
        except (pd.errors.OutOfBoundsDatetime, OverflowError):
            raise UserError(
                f"pandas has no time stamps for {horizon} steps after {table.times[-1]}: is the last date a year too "
                "late?"
            ) from None

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write config.json and model.safetensors, each in one step. The conformal correction and the members' weights
        lie among the weights, so that they are never of two epochs.

        Raises:
            OSError: The disk is full or cannot be written.
        """
        folder = Path(folder)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        if self.conformal is not None:
            weights[CONFORMAL] = self.conformal.cpu().contiguous()
        write_atomically(folder / WEIGHTS_NAME, save(weights, metadata={"format": "pt"}))
        write_atomically(folder / CONFIG_NAME, json.dumps(self.to_dict(), indent=1) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """Everything but the weights, as JSON has it."""
        return {
            "model_type": "tsm2",
            "model": self.model.config.to_dict(),
            "members": len(self.model.networks),
            "columns": self.columns,
            "mean": self.scaler.mean.tolist(),
            "std": self.scaler.std.tolist(),
            "future_columns": self.future_columns,
            "future_mean": self.future_scaler.mean.tolist() if self.future_scaler else [],
            "future_std": self.future_scaler.std.tolist() if self.future_scaler else [],
            "static_columns": self.static_columns,
            "calendar": self.calendar,
            "step": self.step,
            "season": self.season,
            "split": [self.split.train, self.split.val, self.split.test] if self.split else None,
            "reading": self.reading,
            "metrics": self.metrics,
            "training": self.training,
            "penalties": self.penalties,
            "refitted": self.refitted,
        }

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, device: torch.device | str = "cpu", refitted: bool = True
    ) -> "Forecaster":
        """Read what `save_pretrained` wrote, or the forecaster of a run's folder. No pickle is read.

        Args:
            folder: Of a saved forecaster, or of a run; or "hf-hub:OWNER/NAME" of a saved one on the Hugging Face Hub,
                or "hf-hub:OWNER/NAME@REVISION".
            device: To put it on, such as "cuda:0".
            refitted: Of a run, read the one that was fitted again to all rows, where there is one, rather than the best
                epoch, which knows the training rows alone.

        Raises:
            UserError: No such folder, or none that can be downloaded; damaged files, in which something cannot be true;
                weights of another configuration; a device that is not there.
        """
        device = choose_device(str(device))
        folder = _download(str(folder)) if is_on_hub(folder) else Path(folder)
        if not (folder / CONFIG_NAME).is_file():
            parts = [folder / part for part in ([REFITTED] if refitted else []) + [BEST]]
            folder = next((part for part in parts if (part / CONFIG_NAME).is_file()), folder)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise UserError(f"There is no {name} in {folder}: give the folder of a run, or of a saved forecaster.")
        try:
            saved, config = _read_config(json.loads((folder / CONFIG_NAME).read_text()))
        except (UserError, OSError, RecursionError, ValueError) as error:  # of JSON, and of its encoding
            reason = first_line(error)
            raise UserError(
                f"{folder / CONFIG_NAME} is damaged, or of something else, or of an earlier version ({reason}): "
                "fit it again."
            ) from None
        try:
            weights = load((folder / WEIGHTS_NAME).read_bytes())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / WEIGHTS_NAME} is truncated or no safetensors file ({error}).") from None
        try:
            # without memory until it is known to fit, and no deeper than there are weights for
            limit = len(weights) + 1
            of_model = replace(config, depth=min(config.depth, limit)), min(saved.members, limit)
            model = Committee(*of_model, device="meta", variates=len(saved.columns))
            wanted = {**model.state_dict(), CONFORMAL: torch.zeros(0)}
            check_weights(weights, wanted, folder / WEIGHTS_NAME)
            weights = {n: v.to(wanted.get(n, v).dtype, copy=True) for n, v in weights.items()}
            conformal = weights.pop(CONFORMAL, None)
            check_conformal(conformal, config, len(saved.columns))
            check_mixture(weights.get("weights"))
            model.load_state_dict(weights, assign=True)
        except (OverflowError, RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            raise UserError(f"{folder / WEIGHTS_NAME} does not fit {CONFIG_NAME} beside it: {reason}") from None
        except ValueError as error:
            raise UserError(error) from None
        forecaster = cls(
            model,
            saved.columns,
            Scaler(np.array(saved.mean), np.array(saved.std)),
            saved.future_columns,
            Scaler(np.array(saved.future_mean), np.array(saved.future_std)),
            saved.calendar,
            saved.step,
            saved.season,
            Split(*saved.split) if saved.split else None,
            saved.reading,
            saved.metrics,
            saved.training,
            saved.penalties,
            saved.refitted,
            None if conformal is None else conformal.float().to(device),
            saved.static_columns,
        )
        model.to(device).eval()
        return forecaster


def check_conformal(correction: Tensor | None, config: TSM2Config, variates: int) -> None:
    """Raise a RuntimeError, as `load_state_dict` does, for a correction that is not of this model's quantiles."""
    horizon, levels = config.horizon, len(config.quantiles)
    fitting = {(horizon, v, levels) for v in (1, variates)} if levels else set()
    if correction is not None and tuple(correction.shape) not in fitting:
        raise RuntimeError(f"conformal is {tuple(correction.shape)}, for {horizon} steps and {levels} quantiles.")


def check_mixture(weights: Tensor | None) -> None:
    """Raise a RuntimeError for weights of members that are not those of a mean."""
    if weights is not None and ((weights < 0).any() or abs(weights.double().sum() - 1) > 1e-4):
        raise RuntimeError("weights of members are negative, or their sum is not 1.")


@dataclass(frozen=True, kw_only=True)
class SavedConfig(Options):
    """What a config.json holds beside the model's own options, which `TSM2Config` checks."""

    program = CONFIG_NAME
    model_type: str = option("tsm2", "what it is of", choices=("tsm2",))
    model: dict[str, Any] = option(REQUIRED, "options of each TSM2")
    members: Positive = option(REQUIRED, "TSM2")
    columns: list[str] = option(REQUIRED, "names of the variates")
    mean: list[float] = option(REQUIRED, "of the variates")
    std: list[PositiveFloat] = option(REQUIRED, "of the variates")
    future_columns: list[str] = option(REQUIRED, "names of known-future features", nargs="*")
    future_mean: list[float] = option(REQUIRED, "of those", nargs="*")
    future_std: list[PositiveFloat] = option(REQUIRED, "of those", nargs="*")
    static_columns: list[str] = option([], "that static features were made of", nargs="*")
    calendar: list[str] = option(REQUIRED, "cycles", nargs="*", choices=tuple(CYCLES))
    step: str | None = option(REQUIRED, "time step")
    season: Positive = option(REQUIRED, "steps of a season")
    split: Annotated[list[Count], length(3)] | None = option(REQUIRED, "rows")
    reading: dict[str, Any] = option(REQUIRED, "options of read_table")
    metrics: dict[str, Any] = option(REQUIRED, "of the chosen epoch")
    training: dict[str, Any] = option({}, "options of training")
    penalties: dict[str, Any] = option({}, "of the ridges, by their centre")
    refitted: Positive | None = option(None, "rows that the members were fitted to again")


@dataclass(frozen=True, kw_only=True)
class Penalties(Options):
    """Those of ridges in a config.json."""

    program = CONFIG_NAME
    mean: list[PositiveFloat] = option(REQUIRED, "about a window's mean, from the longest lookback")
    last: list[PositiveFloat] = option(REQUIRED, "about its last value")


def _read_config(saved: Any) -> tuple[SavedConfig, TSM2Config]:
    """The content of a config.json.

    Raises:
        UserError, ValueError: Something that cannot be true.
    """
    if not isinstance(saved, dict):
        raise UserError("it is no JSON object")
    config, _ = resolve(SavedConfig, given=as_saved(SavedConfig, saved))
    known = TSM2Config.__dataclass_fields__
    for name in config.model.keys() - known:
        raise UserError(f"it has an unknown option {name}{did_you_mean(name, known)}")
    model = TSM2Config(**config.model)
    for names, mean, std in (
        (config.columns, config.mean, config.std),
        (config.future_columns, config.future_mean, config.future_std),
    ):
        if not len(names) == len(mean) == len(std):
            raise UserError(f"it has {len(names)} columns with {len(mean)} means and {len(std)} deviations")
    names = [*config.columns, *config.future_columns]
    if len(set(names)) < len(names) or len(set(config.calendar)) < len(config.calendar):
        raise UserError("it names a column or cycle twice")
    features = len(config.future_columns) + 2 * len(config.calendar)
    if model.future_features != features:
        raise UserError(f"its columns make {features} future features, its model takes {model.future_features}")
    if not len(config.static_columns) <= model.static_features <= len(config.static_columns) * len(config.columns):
        raise UserError(
            f"its {len(config.static_columns)} static columns cannot make {model.static_features} features of "
            f"{len(config.columns)} series"
        )
    if features and model.future_steps != model.horizon:
        raise UserError(f"its model takes future features of {model.future_steps} steps, and forecasts {model.horizon}")
    if config.split is not None:
        make_split(sum(config.split), config.split, model.lookback, model.horizon)
    resolve(ReadingOptions, given=config.reading)
    if config.training:
        trained = as_saved(TrainingOptions, config.training)
        training, _ = resolve(TrainingOptions, given=trained)
        if None in (training.batch_size, training.epoch_steps):
            raise UserError("its training leaves open how many windows an update has, or how many updates an epoch")
        penalties, _ = resolve(Penalties, given=config.penalties)
        ridges = len(shorter_lookbacks(model.lookback))  # about the mean; those of before had one, and its number
        if len(penalties.mean) not in (1, ridges) or len(penalties.last) != 1:
            raise UserError(
                f"it has {len(penalties.mean)} and {len(penalties.last)} penalties of ridges, for {ridges} and 1"
            )
        config = replace(config, training=trained, penalties={"mean": penalties.mean, "last": penalties.last})
    if config.step is not None:
        to_offset(config.step)
    return config, model


def _download(name: str) -> Path:
    """The folder of a forecaster on the Hub, as it is kept on the disk.

    Raises:
        UserError: There is none, or no way to it.
    """
    repository, _, revision = name.partition(":")[2].partition("@")
    try:
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME])
        )
    except (OSError, ValueError) as error:  # of HTTP, of offline mode, of names
        raise UserError(
            f"{name} cannot be downloaded ({first_line(error)}): check the name, and the way to the Hub."
        ) from None
