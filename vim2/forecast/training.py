"""Training.

A run lives in one folder: best/ (the best epoch's config.json and model.safetensors), last.pth (everything that is
needed to go on) and metrics.json. Every epoch begins with random states that depend on (seed, epoch) alone and ends
with last.pth, so that a run which was cut off goes on as if it had not been. The test rows are never looked at here.
"""

import hashlib
import json
import math
import platform
import time
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

import vim2

from ..checkpoints import remove_leftovers, save_checkpoint, write_atomically
from ..command.errors import UserError
from ..command.graphs import record
from ..command.options import fill_in, plain, resume_options
from ..command.processes import Processes, choose_device
from ..command.progress import progress_bar, say
from ..command.runs import (
    MAKE_ROOM,
    explain_disk_errors,
    find_last,
    identity,
    own_folder,
    read_last,
    restore_optimizer,
    restore_weights,
    seed_everything,
)
from ..tsm2 import TSM2
from .baselines import Ridge
from .conformal import Conformity
from .data import Scaler, Table, Windows, calendar_cycles, is_constant, make_split, read_table
from .forecaster import Forecaster
from .options import AUTO, MAY_CHANGE, FitOptions, model_config, open_options, reading_options
from .recipes import RECIPES
from .scores import baseline_scores, gain, model_forecast, pinball, score, window_losses

__all__ = ["fit"]

# What a last.pth holds at least; since its table's fingerprint is kept, that too.
LAST = {
    "forecaster": dict,
    "history": list,
    "optimizer": dict,
    "options": dict,
    "start": dict | None,
    "start_losses": Tensor | None,
    "state_dict": dict,
}
COLUMNS = {"train_loss", "val_loss", "val_mse", "val_mae"}
START = {"epoch", "val_loss", "val_mse"}
LOSSES = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.huber_loss}


def fit(argv: list[str] | None = None, /, **options) -> dict[str, Any]:
    """Train a TSM2, as `vim2 forecast fit` does.

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
    path = find_last(options.folder, options.resume)
    if path is None:
        return options, None
    saved = read_last(path, LAST, COLUMNS)
    return resume_options(options, explicit, saved["options"], path, MAY_CHANGE, "choose another --experiment"), saved


class Positional(nn.Module):
    """A TSM2 whose arguments have no names, as CUDA graphs want it: history, and future features if there are some."""

    def __init__(self, model: TSM2):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, future: Tensor | None = None) -> Tensor:
        return self.model(x, future=future)


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
        self.start: dict[str, Any] | None = saved["start"] if saved else None
        self.start_losses: Tensor | None = saved["start_losses"] if saved else None
        self.graphed: nn.Module | None = None
        self.conformity: Conformity | None = None
        self.open_data()
        seed_everything(o.seed, 0)
        self.create_model()
        if saved:
            self.restore(saved)

    def open_data(self) -> None:
        o = self.options
        targets, futures = o.targets, o.future_columns
        self.table = read_table(self.data, targets=targets, future_columns=futures, **reading_options(o))
        split = make_split(len(self.table), o.split, o.lookback, o.horizon)
        if not split.val:
            raise UserError("There are no rows to validate on: choose another --split.")
        scaler = Scaler.fit(self.table.values[: split.train])
        self.notes = list(self.table.repairs)
        constant = is_constant(self.table.values[: split.train])
        if constant.any():
            names = ", ".join(np.array(self.table.columns)[constant])
            self.notes.append(f"Constant in training, so centred but not scaled: {names}.")
        if unused := len(self.table) - split.train - split.val - split.test:
            self.notes.append(f"The last {unused} rows are not used: the split ends before them.")
        future_scaler = Scaler.fit(self.table.future[: split.train]) if futures else None
        cycles = calendar_cycles(self.table.times[: split.train]) if o.calendar else []
        if o.calendar and not cycles:
            raise UserError(
                "The rows to train on hold no cycle of the calendar (day, week, year) twice: leave out --calendar."
            )
        config = model_config(o, len(futures) + 2 * len(cycles))
        step = self.table.step
        self.forecaster = Forecaster(
            TSM2(config, device="meta"),
            self.table.columns,
            scaler,
            self.table.future_columns,
            future_scaler,
            cycles,
            step.freqstr if step else None,
            self.table.season,
            split,
            {**reading_options(o), "dates": self.table.dates},
        )
        self.fingerprint = fingerprint(self.table, split.train + split.val)
        values, future = self.forecaster.tensors(self.table, self.device)
        self.windows = {
            part: Windows(values, o.lookback, o.horizon, *split.borders(part, o.lookback), future)
            for part in ("train", "val")
        }

    def create_model(self) -> None:
        o = self.options
        config = self.forecaster.model.config
        train, val = self.windows["train"], self.windows["val"]
        self.ridge = Ridge.fit(train, val)
        ridges = {"mean": self.ridge}
        if o.instance_norm == AUTO or (config.linear_path and config.instance_norm == "last"):
            ridges["last"] = Ridge.fit(train, val, center="last")
        if o.instance_norm == AUTO:
            # About the mean, a short training leaves a jump between the last row and the first step of series that
            # wander; what is linear tells beforehand which they are, in closed form.
            chosen = min(ridges, key=lambda center: ridges[center].val_mse)
            config = replace(config, instance_norm=chosen)
            self.notes.append(
                f"Instance normalisation is about the {chosen}{' value' * (chosen == 'last')}: ridge regression has "
                f"validation MSE {ridges['mean'].val_mse:.4f} about the mean, {ridges['last'].val_mse:.4f} about the "
                "last value."
            )
        # made on the CPU, so that a seed means the same weights everywhere
        self.model = self.forecaster.model = TSM2(config).to(self.device)
        if config.linear_path:
            with torch.no_grad():
                self.model.linear_path.weight.copy_(ridges[config.instance_norm].weight)
        path = [p for name, p in self.model.named_parameters() if name.startswith("linear_path.")]
        rest = [p for name, p in self.model.named_parameters() if not name.startswith("linear_path.")]
        groups = [
            {"params": [p for p in rest if p.dim() > 1], "weight_decay": o.weight_decay},
            {"params": [p for p in rest if p.dim() <= 1]},
        ]
        for parameter in path:
            parameter.requires_grad_(o.linear_path_lr > 0)
        if path and o.linear_path_lr > 0:
            groups.append({"params": path, "lr": o.lr * o.linear_path_lr})
        self.parameters = [p for group in groups for p in group["params"]]
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=o.lr, weight_decay=0.0, fused=fused)
        windows = len(self.windows["train"])
        self.batch_size = min(o.batch_size, windows)
        self.steps = min(math.ceil(windows / self.batch_size), o.epoch_steps or windows)
        warmup = min(round(o.warmup_epochs * self.steps), self.steps * o.epochs - 1)
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=self.steps * o.epochs - warmup,
            warmup_t=warmup,
            warmup_prefix=True,
            t_in_epochs=False,
        )

    def restore(self, saved: dict[str, Any]) -> None:
        same = saved.get("table", self.fingerprint) == self.fingerprint
        if not same or plain(saved["forecaster"]) != plain(described(self.forecaster)):
            raise UserError(
                f"{self.options.data} is not the data that {self.folder / 'last.pth'} was trained on: its columns, "
                "rows or values differ. Give the run its old file, or start another --experiment."
            )
        called = str(self.folder / "last.pth")
        if self.start is not None or self.model.linear_path is not None:
            losses = getattr(self.start_losses, "shape", None)
            whole = self.start is not None and self.start.keys() >= START and losses == (len(self.windows["val"]),)
            if not whole or not all(row.keys() >= {"gain", "gain_error"} for row in self.history):
                raise UserError(f"{called} cannot be resumed: its start is damaged.")
        restore_weights(self.model, saved["state_dict"], called)
        restore_optimizer(self.optimizer, saved["optimizer"], called)

    @property
    def best(self) -> dict[str, Any] | None:
        """The row of the lowest validation loss. Where the linear path is a start, that is epoch 0, which stays the
        best until an epoch's loss is lower by more than a standard error."""
        rows = [row for row in self.history if not self.start or row["gain"] > row["gain_error"]]
        return min(rows, key=lambda row: row["val_loss"], default=self.start)

    @property
    def is_finished(self) -> bool:
        rows = [self.start, *self.history] if self.start else self.history
        waited = len(self.history) - min(rows, key=lambda row: row["val_loss"])["epoch"] if rows else 0
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
        parameters = sum(p.numel() for p in self.model.parameters())
        say(
            f"TSM2: {parameters:,} parameters, {len(self.table.columns)} variates, {o.lookback} steps -> "
            f"{o.horizon}; {split.train} / {split.val} / {split.test} rows; windows: {counts}; {self.folder}"
        )
        self.baselines = baseline_scores(self.ridge, self.windows["val"], self.forecaster.season)
        for name, row in self.baselines.items():
            say(f"{name:<15} validation MSE {row['mse']:.4f}  MAE {row['mae']:.4f}")
        if self.history:
            say(f"Going on after epoch {len(self.history)} of {o.epochs}.")
        with own_folder(self.folder, self.last):
            remove_leftovers(self.folder / "best")
            if self.model.linear_path is not None and self.start is None:
                self.start = {"epoch": 0, **self.validate()}
                self.start_losses = self.val_losses
                self.save_best(self.start)
            if o.cuda_graph and self.device.type == "cuda" and not self.is_finished:
                self.capture()
            while not self.is_finished:
                epoch = len(self.history)
                row = self.train_epoch(epoch)
                row.update(self.validate())
                if self.start:
                    row["gain"], row["gain_error"] = gain(self.start_losses, self.val_losses, o.horizon)
                self.require_finite(epoch, row["train_loss"], row["val_loss"])
                self.history.append(row)
                self.write()
                say(
                    f"epoch {row['epoch']:>3}/{o.epochs} · loss {row['train_loss']:.4f} · validation "
                    f"MSE {row['val_mse']:.4f}  MAE {row['val_mae']:.4f} · {row['seconds']:.1f} s"
                )
            with explain_disk_errors(MAKE_ROOM):
                self.write_metrics()
            best, ridge = self.best, self.baselines["ridge"]["mse"]
            say(f"Best: epoch {best['epoch']}, validation MSE {best['val_mse']:.4f} (ridge {ridge:.4f}); {self.folder}")
            levels = self.model.config.quantiles
            if "val_coverage" in best and len(levels) > 1:
                say(
                    f"The band of {levels[-1] - levels[0]:.0%} covers {best['val_coverage']:.1%} of the validation "
                    "values; the forecaster corrects its quantiles by that (conformal correction)."
                )

    def train_epoch(self, epoch: int) -> dict[str, Any]:
        seed_everything(self.options.seed, epoch + 1)
        self.model.train()
        windows, start = self.windows["train"], time.perf_counter()
        order = torch.randperm(len(windows)).to(self.device)
        total, seen = torch.zeros((), dtype=torch.float64, device=self.device), 0
        batches = order.split(self.batch_size)[: self.steps]
        for step, index in enumerate(progress_bar(batches, f"epoch {epoch + 1}", Processes(self.device))):
            self.scheduler.step_update(epoch * self.steps + step + 1)
            total += self.update(*windows[index]) * len(index)
            seen += len(index)
        lr = self.optimizer.param_groups[0]["lr"]
        train_loss = total.item() / seen  # waits for the device, so that the time is the epoch's
        return {"epoch": epoch + 1, "lr": lr, "train_loss": train_loss, "seconds": time.perf_counter() - start}

    def update(self, x: Tensor, y: Tensor, future: Tensor | None) -> Tensor:
        """One update of the weights; the batch's loss before it."""
        o = self.options
        loss = self.loss(x, y, future)
        loss.backward()
        if o.sam:  # Foret et al., ICLR 2021: the gradient is taken where the loss nearby is highest
            with torch.no_grad():
                norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
                climb = [None if p.grad is None else p.grad * (o.sam / (norm + 1e-12)) for p in self.parameters]
                for parameter, step in zip(self.parameters, climb):
                    if step is not None:
                        parameter.add_(step)
            self.optimizer.zero_grad()
            self.loss(x, y, future).backward()
            with torch.no_grad():
                for parameter, step in zip(self.parameters, climb):
                    if step is not None:
                        parameter.sub_(step)
        if o.clip_grad:
            nn.utils.clip_grad_norm_(self.parameters, o.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def loss(self, x: Tensor, y: Tensor, future: Tensor | None) -> Tensor:
        """The loss that was asked for, with quantiles the pinball loss, on standardised values."""
        if self.graphed is not None and len(x) == self.batch_size:
            forecast = self.graphed(x) if future is None else self.graphed(x, future)
        else:
            with torch.autocast("cuda", torch.bfloat16) if self.amp else nullcontext():
                forecast = self.model(x, future=future)
        levels = self.model.config.quantiles
        return pinball(forecast.float(), y, levels) if levels else LOSSES[self.options.loss](forecast.float(), y)

    def capture(self) -> None:
        """From here on, batches run as CUDA graphs; the last of an epoch, if it is smaller, goes without."""
        x, _, future = self.windows["train"][: self.batch_size]
        inputs = tuple(t.contiguous() for t in (x, future) if t is not None)
        self.graphed = record(Positional(self.model).train(), inputs, torch.bfloat16 if self.amp else None)

    def validate(self) -> dict[str, Any]:
        """Errors on the validation windows. The same pass leaves the loss of every window in `val_losses` and, with
        quantiles, what the conformal correction is made of in `conformity`."""
        self.model.eval()
        windows, levels, losses = self.windows["val"], self.model.config.quantiles, []
        if levels:
            self.conformity = Conformity(self.model.config, len(windows), len(self.table.columns))

        def observe(x: Tensor, forecast: Tensor, y: Tensor) -> None:
            losses.append(window_losses(forecast, y, levels))
            if levels:
                self.conformity.add(x, forecast, y)

        scores = score(model_forecast(self.model, self.amp), windows, levels=levels, observe=observe)
        self.val_losses = torch.cat(losses)
        row = {"val_loss": scores["mse"], "val_mse": scores["mse"], "val_mae": scores["mae"]}
        if levels:
            row |= {"val_loss": scores["crps"], "val_crps": scores["crps"], "val_coverage": scores["coverage"]}
        return row

    def require_finite(self, epoch: int, *losses: float) -> None:
        if all(map(math.isfinite, losses)):
            return
        kept = f"Epoch {epoch} is kept in {self.folder}." if epoch or self.start else "Nothing was saved yet."
        raise UserError(f"The loss became NaN or infinite in epoch {epoch + 1}. {kept} Start again with a lower --lr.")

    def save_best(self, row: dict[str, Any]) -> None:
        """Save the epoch that was validated last."""
        self.forecaster.metrics = {**row, "seed": self.options.seed}
        if self.conformity is not None:
            self.forecaster.conformal = self.conformity.correction().to(self.device)
        with explain_disk_errors(MAKE_ROOM):
            self.forecaster.save_pretrained(self.folder / "best")

    def write(self) -> None:
        """Write the run's files. If it is cut off anywhere here, nothing is lost."""
        checkpoint = {
            "options": self.options.to_dict(),
            "forecaster": described(self.forecaster),
            "table": self.fingerprint,
            "start": self.start,
            "start_losses": self.start_losses,
            "history": self.history,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        # best/ first: a run cut off in between repeats the epoch, and writes it again
        if self.best is self.history[-1]:
            self.save_best(self.history[-1])
        with explain_disk_errors(MAKE_ROOM):
            save_checkpoint(checkpoint, self.folder / "last.pth")
            self.write_metrics()

    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json."""
        split = self.forecaster.split
        return {
            "best": self.best,
            "baselines": {name: {"val_mse": row["mse"], "val_mae": row["mae"]} for name, row in self.baselines.items()},
            "ridge_penalty": self.ridge.penalty,
            "start": self.start,
            "history": self.history,
            "seed": self.options.seed,
            "options": self.options.to_dict(),
            "parameters": sum(p.numel() for p in self.model.parameters()),
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
    return digest.hexdigest()


def described(forecaster: Forecaster) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    return {name: value for name, value in forecaster.to_dict().items() if name != "metrics"}


def versions() -> dict[str, str]:
    names = {name: version(name) for name in ("torch", "timm", "numpy", "pandas")}
    return {"vim2": vim2.__version__, **names, "python": platform.python_version()}
