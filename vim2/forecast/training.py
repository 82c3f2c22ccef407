"""Training.

When the TSM2 of a committee have been trained, it is mixed on the validation windows. The test rows are never looked at
here.

A run lives in one folder: best/ (config.json and model.safetensors of the best epoch, mixed when the run is over),
last.pth (everything that is needed to go on) and metrics.json. Every epoch begins with random states that depend on
(seed, epoch) alone and ends with last.pth, so that a run which was cut off goes on as if it had not been.
"""

import hashlib
import json
import math
import platform
import shutil
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import torch

import vim2

from ..checkpoints import save_checkpoint
from ..command.errors import UserError
from ..command.options import fill_in, plain, resume_options
from ..command.outputs import MAKE_ROOM, explain_disk_errors, make_folder
from ..command.processes import choose_device
from ..command.progress import say
from ..command.runs import find_last, identity, own_folder, read_last, seed_everything
from ..files import remove_leftovers, write_atomically
from .baselines import Ridge, cautious, lowest, shorter_lookbacks
from .committee import Committee, Products, find_weights
from .conformal import Conformity
from .data import (
    Scaler,
    Windows,
    calendar_cycles,
    is_constant,
    make_split,
    static_features,
)
from .forecaster import BEST, REFITTED, Forecaster
from .options import (
    AUTO,
    MAY_CHANGE,
    FitOptions,
    TrainingOptions,
    fill_open,
    model_config,
    open_options,
    reading_options,
)
from .recipes import RECIPES
from .refitting import refit
from .scores import Errors, baseline_forecasts, model_forecast, score, score_all
from .steps import follow, to_offset
from .table import Table, read_table
from .trainer import Trainer

__all__ = ["fit"]

# What a last.pth holds at least; since its table's fingerprint is kept, that too.
LAST = {"ema": dict, "forecaster": dict, "history": list, "optimizer": dict, "options": dict, "state_dict": dict}
COLUMNS = {"train_loss", "val_loss", "val_mse", "val_mae"}
VALIDATION_BATCH = 256  # windows
LEAST_WINDOWS, FEW_WINDOWS = 4, 20  # below the one a run is refused, below the other warned of


def fit(argv: list[str] | None = None, /, **options) -> dict[str, Any]:
    """Train a committee of TSM2, as `vim2 forecast fit` does.

    Args:
        argv: Command line; or else
        options: the same options by name, with underscores: `fit(data="sales.csv", horizon=28, lookback=112)`. The
            data may be a DataFrame as well.

    Returns:
        What metrics.json holds, and the run's `folder`.

    Raises:
        UserError: Anything that the user can put right. What was saved before is kept.
    """
    given, explicit, data = open_options(FitOptions, argv, options)
    run = Run(*recall(given, explicit), data)
    run.fit()
    return {**run.metrics(), "folder": str(run.folder)}


def recall(options: FitOptions, explicit: set[str]) -> tuple[FitOptions, dict[str, Any] | None]:
    """The options to train with and, for a run that goes on, its checkpoint."""
    if options.recipe:
        options = fill_in(options, RECIPES[options.recipe], explicit)
    options = replace(options, **strip_names(options.to_dict()))
    path = find_last(options.folder, options.resume)
    if path is None:
        return options, None
    saved = read_last(path, LAST, COLUMNS)
    for part in ("options", "forecaster"):
        saved[part] = {**saved[part], **strip_names(saved[part])}
    return resume_options(options, explicit, saved["options"], path, MAY_CHANGE, "choose another --experiment"), saved


def strip_names(values: dict[str, Any]) -> dict[str, Any]:
    """Of options, or of a forecaster's config, the names of columns as `read_table` has them, without the spaces around
    them that earlier versions left there."""

    def strip(names: Any) -> Any:
        if isinstance(names, list):
            return [strip(name) for name in names]
        return names.strip() if isinstance(names, str) else names

    columns = ("columns", "targets", "future_columns", "static_columns", "time_column")
    return {name: strip(values[name]) for name in columns if name in values}


class Run:
    """One training run.

    Args:
        options: Resolved.
        saved: Checkpoint to go on from.
        data: The DataFrame to train on, instead of the options' file.

    Raises:
        UserError: Data or options that do not fit.
    """

    def __init__(
        self, options: FitOptions, saved: dict[str, Any] | None = None, data: str | pd.DataFrame | None = None
    ):
        self.options = o = options
        self.data = o.data if data is None else data
        self.folder = options.folder
        self.last = identity(self.folder / "last.pth")
        self.device = choose_device(o.device)
        self.amp = o.amp and self.device.type == "cuda"
        self.history: list[dict[str, Any]] = list(saved["history"]) if saved else []
        self.committee: dict[str, Any] | None = None
        self.refitted: str | None = None  # the fingerprint of all rows, once they have been fitted to
        self.open_data()
        seed_everything(o.seed, 0)
        self.create_model()
        if saved:
            self.restore(saved)

    def open_data(self) -> None:
        o, futures = self.options, self.options.future_columns
        columns = dict(targets=o.targets, future_columns=futures, static_columns=o.static_columns)
        self.table = read_table(self.data, **columns, **reading_options(o))
        self.static = None if self.table.static is None else torch.tensor(static_features(self.table.static))
        given, o = o, fill_open(o, len(self.table), len(self.table.columns))
        self.options = o
        split = make_split(len(self.table), o.split, o.lookback, o.horizon)
        if not split.val:
            raise UserError("There are no rows to validate on: choose another --split.")
        for values, names, named in (
            (self.table.values, self.table.columns, "--targets"),
            (self.table.future, self.table.future_columns, "--future-columns"),
        ):
            without = np.isnan(values[: split.train]).all(axis=0)
            if without.any():
                raise UserError(
                    f"The {split.train} rows to train on hold no value of {', '.join(np.array(names)[without])}: leave "
                    f"it out with {named}, or choose another --split."
                )
        scaler = Scaler.fit(self.table.values[: split.train])
        self.notes = list(self.table.repairs)
        by_size = [name for name in o.to_dict() if getattr(o, name) != getattr(given, name)]
        if by_size:
            chosen = ", ".join(f"{name.replace('_', ' ')} {getattr(o, name)}" for name in by_size)
            self.notes.append(f"Chosen by the size of the file: {chosen}.")
        constant = is_constant(self.table.values[: split.train])
        if constant.any():
            names = ", ".join(np.array(self.table.columns)[constant])
            self.notes.append(f"Constant in training, so centred but not scaled: {names}.")
        if unused := len(self.table) - split.train - split.val - split.test:
            self.notes.append(f"The last {unused} rows are not used: the split ends before them.")
        future_scaler = Scaler.fit(self.table.future[: split.train]) if futures else None
        if o.calendar and self.table.first_row is not None:
            raise UserError("--calendar needs time stamps: say with --start when the first row was.")
        cycles = calendar_cycles(self.table.times[: split.train]) if o.calendar else []
        if o.calendar and not cycles:
            raise UserError(
                "The rows to train on hold no cycle of the calendar (day, week, year) twice: leave out --calendar."
            )
        static = 0 if self.static is None else self.static.shape[1]
        if static:
            self.notes.append(f"Static columns make {static} features of each series: {', '.join(o.static_columns)}.")
        config = model_config(o, len(futures) + 2 * len(cycles), static)
        step = self.table.step
        self.forecaster = Forecaster(
            Committee(config, o.members, device="meta", variates=len(self.table.columns)),
            self.table.columns,
            scaler,
            self.table.future_columns,
            future_scaler,
            cycles,
            step.freqstr if step else None,
            self.table.season,
            split,
            {**reading_options(o), "dates": self.table.dates},
            training={name: getattr(o, name) for name in TrainingOptions.__dataclass_fields__},
            static_columns=o.static_columns,
        )
        trained, validated = (rows - o.horizon + 1 for rows in (split.train - o.lookback, split.val))
        if trained < LEAST_WINDOWS:
            raise UserError(
                f"{len(self.table)} rows make {trained} windows of {o.lookback} + {o.horizon} steps to train on, too "
                f"few to learn anything from: {LEAST_WINDOWS} are the least. Give more rows, or shorten --lookback or "
                "--horizon."
            )
        if min(trained, validated) < FEW_WINDOWS:
            self.notes.append(
                f"Warning: {trained} windows to train on and {validated} to validate on are few. What the members "
                "learn, and their weights and errors, is mostly chance: do not rely on it. More rows would help, or a "
                "shorter --lookback or --horizon."
            )
        self.fingerprint = fingerprint(self.table, split.train + split.val)
        values, future = self.tensors = self.forecaster.tensors(self.table, self.device)
        self.windows = {
            part: Windows(values, o.lookback, o.horizon, *split.borders(part, o.lookback), future)
            for part in ("train", "val")
        }

    def create_model(self) -> None:
        o, config = self.options, self.forecaster.model.config
        paths = {center: Ridge.path(*self.windows.values(), center=center) for center in ("mean", "last")}
        self.ridge = lowest(paths["mean"])  # the baseline, and the longest of those that make a member
        shorter = ([w.shorter(steps) for w in self.windows.values()] for steps in shorter_lookbacks(o.lookback)[1:])
        of_mean = [self.ridge, *(Ridge.fit(*windows) for windows in shorter)]
        ridges = {"mean": of_mean, "last": [cautious(paths["last"], self.windows["val"])]}
        self.forecaster.penalties = {center: [r.penalty for r in group] for center, group in ridges.items()}
        if o.instance_norm == AUTO:
            # About the mean, a short training leaves a jump between the last row and the first step of series that
            # wander; what is linear tells beforehand which they are, in closed form.
            errors = {center: lowest(path).val_mse for center, path in paths.items()}
            chosen = min(errors, key=errors.get)
            config = replace(config, instance_norm=chosen)
            self.notes.append(
                f"Instance normalisation is about the {chosen}{' value' * (chosen == 'last')}: ridge regression has "
                f"validation MSE {errors['mean']:.4f} about the mean, {errors['last']:.4f} about the "
                "last value."
            )
        # made on the CPU, so that a seed means the same weights everywhere
        committee = Committee(config, o.members, variates=len(self.table.columns))
        if self.static is not None:
            committee.networks.static.copy_(self.static)
        self.model = self.forecaster.model = committee.to(self.device)
        self.model.set_linear(ridges, self.forecaster.season)
        self.trainer = Trainer(self.model.networks, self.windows["train"], o, self.amp)
        self.model.networks = self.trainer.averages  # they forecast, the others are trained

    def restore(self, saved: dict[str, Any]) -> None:
        same = saved.get("table", self.fingerprint) == self.fingerprint
        before = saved["forecaster"]
        # earlier versions had no static columns, and told other seasons of some steps; the quarters that pandas 2 calls
        # QS-OCT are QS-JAN to pandas 3
        with suppress(TypeError, ValueError):  # of what is no step, or none
            if follow(self.table.times, to_offset(before.get("step"))):
                self.forecaster.step = before["step"]
        before = {"static_columns": [], **plain(before), "season": self.forecaster.season}
        if not same or before != plain(described(self.forecaster)):
            raise UserError(
                f"{self.options.data} is not the data that {self.folder / 'last.pth'} was trained on: its columns, "
                "rows or values differ. Give the run its old file, or start another --experiment."
            )
        self.trainer.restore(saved, str(self.folder / "last.pth"))
        self.refitted = saved.get("refitted")

    @property
    def best(self) -> dict[str, Any] | None:
        """The row of the lowest validation loss."""
        return min(self.history, key=lambda row: row["val_loss"], default=None)

    @property
    def is_finished(self) -> bool:
        waited = len(self.history) - self.best["epoch"] if self.history else 0
        return len(self.history) >= self.options.epochs or waited >= self.options.patience

    def fit(self) -> None:
        """Train until there is no more progress, or the last epoch.

        Raises:
            UserError: The loss became NaN, or a file could not be written, and the last good checkpoint is kept; or
                another run is in the folder.
        """
        o, split = self.options, self.forecaster.split
        for note in self.notes:
            say(note)
        if cycles := self.forecaster.calendar:
            say(f"Calendar features: {', '.join(f'time of {name}' for name in cycles)}.")
        counts = f"{len(self.windows['train']):,} to train on, {len(self.windows['val']):,} to validate on"
        parameters = sum(p.numel() for p in self.model.networks.parameters())
        say(
            f"{o.members} TSM2: {parameters:,} parameters, {len(self.table.columns)} variates, {o.lookback} steps -> "
            f"{o.horizon}; {split.train} / {split.val} / {split.test} rows; windows: {counts}; {self.folder}"
        )
        make_folder(self.folder)
        horizon, season = o.horizon, self.forecaster.season
        baselines = partial(baseline_forecasts, self.ridge, horizon=horizon, season=season)
        self.baselines = score_all([(baselines, self.windows["val"])])
        for name, row in self.baselines.items():
            say(f"{name:<26} validation MSE {row['mse']:.4f}  MAE {row['mae']:.4f}")
        if self.history:
            begun = f"after epoch {len(self.history)} of {o.epochs}"
            begun += ", without progress for --patience" * (self.is_finished and len(self.history) < o.epochs)
            over = f"Nothing is left to train {begun}: the members are mixed again."
            say(over if self.is_finished else f"Going on {begun}.")
        with own_folder(self.folder, self.last):
            for part in (BEST, REFITTED):
                remove_leftovers(self.folder / part)
            if not self.history:  # of an earlier run whose last.pth was removed
                shutil.rmtree(self.folder / REFITTED, ignore_errors=True)
            if o.cuda_graph and self.device.type == "cuda" and not self.is_finished:
                self.trainer.capture()
            while not self.is_finished:
                epoch = len(self.history)
                row = self.trainer.epoch(epoch)
                row.update(self.validate())
                self.require_finite(epoch, row["train_loss"], row["val_loss"])
                self.history.append(row)
                self.write()
                crps = f"CRPS {row['val_crps']:.4f}  " if "val_crps" in row else ""  # by which the epoch is chosen
                say(
                    f"epoch {row['epoch']:>3}/{o.epochs} · loss {row['train_loss']:.4f} · validation "
                    f"{crps}MSE {row['val_mse']:.4f}  MAE {row['val_mae']:.4f} · {row['seconds']:.1f} s"
                )
            self.mix()
            with explain_disk_errors(MAKE_ROOM):
                self.forecaster.save_pretrained(self.folder / BEST)
                self.write_metrics()
            self.report()
            if o.refit:
                self.refit()

    def validate(self) -> dict[str, Any]:
        """Errors of the mean of all TSM2 on the validation windows."""
        networks, levels = model_forecast(self.model.networks.eval(), self.amp), self.model.config.quantiles
        scores = score(lambda x, future: networks(x, future).float().mean(0), self.windows["val"], levels=levels)
        row = {"val_loss": scores["mse"], "val_mse": scores["mse"], "val_mae": scores["mae"]}
        if levels:
            row |= {"val_loss": scores["crps"], "val_crps": scores["crps"], "val_coverage": scores["coverage"]}
        return row

    def mix(self) -> None:
        """Make a committee of the best epoch: weights and, with quantiles, conformal correction."""
        windows, config = self.windows["val"], self.model.config
        best = Forecaster.from_pretrained(self.folder / BEST, self.device)
        self.model = self.forecaster.model = model = best.model
        # of its linear members, which an earlier version may have made
        self.forecaster.penalties, self.forecaster.season = best.penalties, best.season
        split = self.forecaster.split
        products, of_networks = Products(self.tensors[0][: split.train + split.val]), []
        for x, y, future in windows.batches(VALIDATION_BATCH):
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16) if self.amp else nullcontext():
                points, spread = model.members(x, future)
            products.add(points, y)
            # of the networks, whose weights are equal, the mean is enough to mix them once the weights are known
            mean = points[len(model.linear) :].float().mean(0, keepdim=True)
            of_networks.append([None if t is None else t.cpu() for t in (mean, spread)])
        weights = find_weights(products.result(), model.groups, len(model.linear), config.horizon)
        model.weights.copy_(weights)
        conformity = Conformity(config, len(windows), len(self.table.columns)) if config.quantiles else None
        errors, shared = Errors(config.quantiles), model.groups.sign().to(weights) @ weights
        for (x, y, _), (mean, spread) in zip(windows.batches(VALIDATION_BATCH), of_networks, strict=True):
            points = torch.cat((*model.linear_members(x), mean.to(x.device)))
            forecast = model.mixture(points, None if spread is None else spread.to(x.device), shared).float()
            errors.add(forecast, y)
            if conformity:
                conformity.add(x, forecast, y)
        scores = errors.result()
        alone = products.errors().tolist()
        self.committee = {f"val_{name}": scores[name] for name in ("mse", "mae", "crps", "coverage") if name in scores}
        self.committee["members"] = {
            name: {"weight": weight, "val_mse": error}
            for name, weight, error in zip(model.names, model.weights.tolist(), alone, strict=True)
        }
        self.forecaster.metrics = {**self.best, "committee": self.committee, "seed": self.options.seed}
        if conformity:
            self.forecaster.conformal = conformity.correction().to(self.device)

    def report(self) -> None:
        """Say who carries the forecast, and how good it is."""
        committee, levels = self.committee, self.model.config.quantiles
        carried = f"of epoch {self.best['epoch']}"
        if self.model.linear:
            for name, row in committee["members"].items():
                say(f"{name:<26} validation MSE {row['val_mse']:.4f}  weight {row['weight']:.2f}")
            share = sum(row["weight"] for name, row in committee["members"].items() if name.startswith("TSM2"))
            carried = f"TSM2, {carried}, carry {share:.0%} of it"
        errors = f"validation MSE {committee['val_mse']:.4f}  MAE {committee['val_mae']:.4f}"
        say(f"{self.forecaster.called:<26} {errors}: {carried}; {self.folder}")
        if len(levels) > 1:
            say(
                f"The band of {levels[-1] - levels[0]:.0%} covers {committee['val_coverage']:.1%} of the validation "
                "values; the forecaster corrects its quantiles by that (conformal correction)."
            )

    def refit(self) -> None:
        """Fit the members again to all rows, for forecasts beyond them."""
        rows = len(self.table)
        everything = fingerprint(self.table, rows)
        if self.refitted != everything or not (self.folder / REFITTED).is_dir():
            start = time.perf_counter()
            forecaster = refit(self.forecaster, *self.tensors, rows, self.amp)
            with explain_disk_errors(MAKE_ROOM):
                forecaster.save_pretrained(self.folder / REFITTED)
            self.refitted = everything
            self.write_last()
            say(f"All members were fitted again to all rows, {time.perf_counter() - start:.1f} s.")
        say(
            f"`predict` uses {self.folder / REFITTED}, whose members know all {rows:,} rows; `evaluate` uses "
            f"{self.folder / BEST}, whose members know the training rows alone."
        )

    def require_finite(self, epoch: int, *losses: float) -> None:
        if all(map(math.isfinite, losses)):
            return
        kept = f"Epoch {epoch} is kept in {self.folder}." if epoch else "Nothing was saved yet."
        raise UserError(f"The loss became NaN or infinite in epoch {epoch + 1}. {kept} Start again with a lower --lr.")

    def save_best(self, row: dict[str, Any]) -> None:
        """Save the epoch that was validated last, its members with equal weights."""
        self.forecaster.metrics = {**row, "seed": self.options.seed}
        with explain_disk_errors(MAKE_ROOM):
            self.forecaster.save_pretrained(self.folder / BEST)

    def write(self) -> None:
        """Write the run's files. If it is cut off anywhere here, nothing is lost."""
        # best/ first: a run cut off in between repeats the epoch, and writes it again
        if self.best is self.history[-1]:
            self.save_best(self.history[-1])
        self.write_last()

    def write_last(self) -> None:
        checkpoint = {
            "options": self.options.to_dict(),
            "forecaster": described(self.forecaster),
            "table": self.fingerprint,
            "history": self.history,
            "refitted": self.refitted,
            **self.trainer.state(),
        }
        with explain_disk_errors(MAKE_ROOM):
            save_checkpoint(checkpoint, self.folder / "last.pth")
            self.write_metrics()

    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json."""
        split = self.forecaster.split
        return {
            "best": self.best,
            "refitted": len(self.table) if self.refitted else None,
            "committee": self.committee,
            "baselines": {name: {"val_mse": row["mse"], "val_mae": row["mae"]} for name, row in self.baselines.items()},
            "ridge_penalty": self.ridge.penalty,
            "history": self.history,
            "seed": self.options.seed,
            "options": self.options.to_dict(),
            "parameters": sum(p.numel() for p in self.model.networks.parameters()),
            "variates": len(self.table.columns),
            "rows": {"train": split.train, "val": split.val, "test": split.test},
            "windows": {part: len(windows) for part, windows in self.windows.items()},
            "calendar": self.forecaster.calendar,
            "repairs": self.notes,
            "versions": versions(),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine(),
        }

    def write_metrics(self) -> None:
        write_atomically(self.folder / "metrics.json", json.dumps(self.metrics(), indent=1) + "\n")


def fingerprint(table: Table, rows: int) -> str:
    """Text that depends on the first rows of a table, which a run is trained and validated on."""
    digest = hashlib.sha256(str(table.times[0]).encode())
    for values in (table.values, table.future):
        digest.update(np.ascontiguousarray(values[:rows]).tobytes())
    if table.static is not None:
        digest.update(static_features(table.static).tobytes())
    return digest.hexdigest()


def described(forecaster: Forecaster) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    later = ("metrics", "training", "penalties", "refitted")
    return {name: value for name, value in forecaster.to_dict().items() if name not in later}


def versions() -> dict[str, str]:
    names = {name: version(name) for name in ("torch", "timm", "numpy", "pandas")}
    return {"vim2": vim2.__version__, **names, "python": platform.python_version()}
