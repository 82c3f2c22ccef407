"""The updates of a committee's TSM2, for a run's training and for fitting them again to more rows.

The TSM2 see the same batches, each with weights and dropout of its own; their moving averages forecast. Every epoch
begins with random states that depend on (seed, epoch) alone.
"""

import math
import time
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..command.graphs import record
from ..command.processes import Processes
from ..command.progress import progress_bar
from ..command.runs import restore_optimizer, restore_weights, seed_everything
from .committee import Networks
from .data import Windows, where_known
from .options import TrainingOptions
from .scores import pinball

__all__ = ["Trainer", "mask_frequencies", "spectral_loss"]

SPECTRAL = 0.35  # the spectrum's share of its loss


def spectral_loss(forecast: Tensor, y: Tensor) -> Tensor:
    """Mean absolute error, and the mean magnitude of the error's spectrum over the horizon, whose phases tell where it
    is: steps of a window depend on one another, frequencies hardly (Wang et al., FreDF, ICLR 2025).

    Args:
        forecast, y: (..., H, M).
    """
    error = forecast - y
    spectrum = torch.fft.rfft(error, dim=-2, norm="ortho").abs()
    return (1 - SPECTRAL) * error.abs().mean() + SPECTRAL * spectrum.mean()


def mask_frequencies(x: Tensor, y: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Windows of which half, drawn at random, have lost some of their frequencies, history and future alike: what
    remains belongs together as it did before (Chen et al., FrAug, 2023).

    Args:
        x: (n, L, M).
        y: (n, H, M).
        rate: The share of a variate's frequencies that is lost; never its mean, which is none.
    """
    steps = torch.cat((x, y), dim=1)
    spectrum = torch.fft.rfft(steps, dim=1)
    kept = torch.rand(spectrum.shape, device=x.device) >= rate
    kept[:, 0] = True
    masked = torch.fft.irfft(spectrum * kept, n=steps.shape[1], dim=1)
    chosen = torch.rand(len(x), 1, 1, device=x.device) < 0.5
    return torch.where(chosen, masked, steps).split((x.shape[1], y.shape[1]), dim=1)


LOSS = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.huber_loss, "spectral": spectral_loss}


class Trainer:
    """Updates of all TSM2 of a committee.

    Args:
        networks: To train, on the device of the windows.
        windows: To train on.
        options: Of training, nothing left open. The learning rate falls over `epochs` of `epoch_steps` updates.
        amp: Under autocast to bfloat16.

    Attributes:
        averages: The networks' moving averages, which forecast.
    """

    def __init__(self, networks: Networks, windows: Windows, options: TrainingOptions, amp: bool = False):
        self.networks, self.windows, self.options, self.amp = networks, windows, options, amp
        o = options
        self.ema = ModelEmaV3(networks, decay=o.ema, use_warmup=True, warmup_power=1.0, exclude_buffers=True)
        parameters = list(networks.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": o.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1]},
        ]
        fused = windows.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=o.lr, weight_decay=0.0, fused=fused)
        self.batch_size = min(o.batch_size, len(windows))
        warmup = min(round(o.warmup_epochs * o.epoch_steps), o.epoch_steps * o.epochs - 1)
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=o.epoch_steps * o.epochs - warmup,
            warmup_t=warmup,
            warmup_prefix=True,
            t_in_epochs=False,
            cycle_decay=0.5,  # of further cycles, of which there are none: timm warns of 1 where one update is left
        )
        self.graphed: nn.Module | None = None

    @property
    def averages(self) -> Networks:
        return self.ema.module

    def epoch(self, epoch: int, called: str = "") -> dict[str, Any]:
        """One epoch, counted from 0, and its row of the history; `called` names its bar."""
        o, windows = self.options, self.windows
        seed_everything(o.seed, epoch + 1)
        self.networks.train()
        start = time.perf_counter()
        passes = math.ceil(o.epoch_steps * self.batch_size / len(windows))
        order = torch.cat([torch.randperm(len(windows)) for _ in range(passes)]).to(windows.device)
        total = torch.zeros((), dtype=torch.float64, device=windows.device)
        batches = order.split(self.batch_size)[: o.epoch_steps]
        bar = progress_bar(batches, called or f"epoch {epoch + 1}", Processes(windows.device))
        for step, index in enumerate(bar):
            updates = epoch * o.epoch_steps + step + 1
            self.scheduler.step_update(updates)
            total += self.update(*windows[index])
            self.ema.update(self.networks, updates)
        lr = self.optimizer.param_groups[0]["lr"]
        train_loss = total.item() / len(batches)  # waits for the device, so that the time is the epoch's
        return {"epoch": epoch + 1, "lr": lr, "train_loss": train_loss, "seconds": time.perf_counter() - start}

    def update(self, x: Tensor, y: Tensor, future: Tensor | None) -> Tensor:
        """One update of all TSM2, each as if it were alone; the mean of their losses before it."""
        if self.options.frequency_mask:
            missing = y.isnan() if self.windows.has_gaps else None
            # what is missing goes on as the history ends, so that windows have a spectrum, and stays missing
            filled = y if missing is None else y.where(~missing, x[:, -1:])
            x, y = mask_frequencies(x, filled, self.options.frequency_mask)
            y = y if missing is None else y.where(~missing, torch.nan)
        loss = self.loss(x, y, future)
        (loss * len(self.networks)).backward()
        if self.options.clip_grad:
            for network in self.networks:
                nn.utils.clip_grad_norm_(network.parameters(), self.options.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def loss(self, x: Tensor, y: Tensor, future: Tensor | None) -> Tensor:
        """The loss that was asked for, with quantiles the pinball loss, on standardised values that are known; the
        TSM2's mean."""
        given = (x,) if future is None else (x, future)
        if self.graphed is not None:
            forecast = self.graphed(*(t.contiguous() for t in given))
        else:
            with torch.autocast("cuda", torch.bfloat16) if self.amp else nullcontext():
                forecast = self.networks(*given)
        levels = self.networks[0].config.quantiles
        y, forecast, share = y.expand(len(self.networks), *y.shape), forecast.float(), 1.0
        if self.windows.has_gaps:
            forecast, y, known = where_known(forecast, y)
            share = known.float().mean().clamp_min(1 / known.numel())
        return (pinball(forecast, y, levels) if levels else LOSS[self.options.loss](forecast, y)) / share

    def capture(self) -> None:
        """From here on, batches run as CUDA graphs."""
        x, _, future = self.windows[: self.batch_size]
        inputs = tuple(t.contiguous() for t in (x, future) if t is not None)
        self.graphed = record(self.networks.train(), inputs, torch.bfloat16 if self.amp else None)

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on."""
        return {
            "state_dict": self.networks.state_dict(),
            "ema": self.averages.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, saved: dict[str, Any], called: str) -> None:
        """Go on from a `state` of a file that messages call `called`.

        Raises:
            UserError: It is of other networks, or damaged.
        """
        restore_weights(self.networks, saved["state_dict"], called)
        restore_weights(self.averages, saved["ema"], called)
        restore_optimizer(self.optimizer, saved["optimizer"], called)
