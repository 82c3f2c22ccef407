"""Training and fine-tuning.

A run lives in one folder: last.pth (everything that is needed to go on), best.pth (weights to use), metrics.csv,
metrics.json and curves.png. Every epoch begins with random states that depend on (seed, epoch, process) alone and ends
with last.pth, so that a run which was cut off goes on as if it had not been. The metrics are written from last.pth's.
"""

import csv
import io
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import model_parameters
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, NativeScaler, dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..checkpoints import save_checkpoint
from ..command.errors import DivergenceError, UserError, did_you_mean, in_short
from ..command.figures import figures_if_possible
from ..command.graphs import record
from ..command.options import resolve, resume_options
from ..command.outputs import MAKE_ROOM, explain_disk_errors, make_folder
from ..command.places import is_place, short_name
from ..command.processes import Processes, start_processes
from ..command.progress import has_bar, progress_bar, say
from ..command.runs import (
    find_last,
    identity,
    own_folder,
    read_last,
    restore_optimizer,
    restore_weights,
    seed_everything,
)
from ..files import write_atomically
from . import data, memory
from .augmentation import check_augmentation
from .data import Images, count_classes, open_train_and_val, say_left_out
from .evaluation import evaluate
from .facts import fine_tuned, no_terms_told, read_described, read_facts, terms_of, weights_file, weights_name
from .fingerprints import fingerprint
from .models import (
    autocast,
    check_backend,
    check_reads,
    check_scores,
    compile_model,
    create_model,
    freeze,
    input_config,
    load,
    train_mode,
)
from .options import MAY_CHANGE, TrainOptions, apply_recipe
from .plots import plot_curves
from .policies import read_policy
from .sources import ModelSource, find_model

__all__ = ["train"]

# What a last.pth holds at least, beside moving averages, the loss's scale and, since they are kept, its images'
# fingerprints.
LAST = {
    "arch": str,
    "args": dict,
    "class_names": list | None,
    "history": list,
    "num_classes": int,
    "optimizer": dict,
    "state_dict": dict,
    "updates": int,
    "world_size": int,
}
COLUMNS = {"train_loss", "lr", "unreadable"}
QUIET = 10.0  # seconds of an epoch without a line, where no bar shows how it goes on


def train(argv: list[str] | None = None, /, **options) -> dict[str, Any]:
    """Train a model, as `vim2 train` does.

    Args:
        argv: Command line; or else
        options: the same options by name, with underscores: `train(data_dir="flowers", model="vim2_nano", epochs=20)`.

    Returns:
        What metrics.json holds, and the run's `folder`.

    Raises:
        UserError: Anything that the user can put right. What was saved before is kept.
    """
    given, explicit = resolve(TrainOptions, argv, options)
    processes = start_processes(given.device, "vim2 train")
    memory.preload()
    run = Run(*recall(given, explicit, processes))
    run.fit()
    processes.finish()
    return {**run.metrics(), "folder": str(run.folder)}


def recall(
    options: TrainOptions, explicit: set[str], processes: Processes
) -> tuple[TrainOptions, Processes, dict[str, Any] | None, Path | None]:
    """The arguments of `Run`: the options to train with, the processes and, for a run that goes on, its checkpoint."""
    if options.resume in (None, "auto"):
        path = find_last(options.folder, options.resume == "auto", processes)
    else:
        path = Path(options.resume)
        path = path / "last.pth" if path.is_dir() else path
    if path is None:
        arch = find_model(options.model, options.imports).arch if options.recipe else ""
        return apply_recipe(options, explicit, processes.world_size, arch), processes, None, None
    saved = read_last(path, LAST, COLUMNS, "To start from its weights: --initial-checkpoint.")
    if saved["world_size"] != processes.world_size:
        say(
            f"{path} was trained by {saved['world_size']} processes, not {processes.world_size}: expect other losses.",
            processes,
        )
    otherwise = "start a new one with --initial-checkpoint and another --experiment"
    resumed = resume_options(options, explicit, saved["args"], path, MAY_CHANGE, otherwise)
    if resumed.folder.resolve() != path.parent.resolve():
        find_last(resumed.folder, False, processes)  # it may not be another run's
    # nothing is downloaded or imported because a file says so, and no epoch of a run is undone
    own = dict(dataset_download=options.dataset_download, imports=options.imports)
    return replace(resumed, epochs=max(resumed.epochs, len(saved["history"])), **own), processes, saved, path


class Run:
    """One training run.

    Args:
        options: Resolved.
        processes: The processes that train.
        saved: Checkpoint to go on from.
        path: Its file, for messages.

    Raises:
        UserError: Data, model or options that do not fit.
    """

    def __init__(
        self,
        options: TrainOptions,
        processes: Processes,
        saved: dict[str, Any] | None = None,
        path: Path | None = None,
    ):
        self.options = o = options
        self.processes = processes
        self.folder = options.folder
        self.last = identity(self.folder / "last.pth")
        self.history: list[dict[str, Any]] = list(saved["history"]) if saved else []
        self.updates = saved["updates"] if saved else 0
        if o.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.backends.cudnn.benchmark = False
            torch.use_deterministic_algorithms(True, warn_only=True)
        if o.cuda_graph:
            self.check_graphs()

        self.open_data(saved)
        seed_everything(o.seed, 0)
        self.create_model(saved, path)
        self.choose_batch_size()
        self.optimizer = create_optimizer(o, self.model, self.lr)
        check_augmentations(o, self.train_images)
        self.create_loaders()
        self.create_scheduler()
        if saved:
            self.restore(saved, str(path))
        self.keep_gradients = False  # between updates, for graphs to add to
        self.trained = compile_model(self.model, o.torchcompile)
        self.evaluated = self.trained
        if processes.world_size > 1:
            ids = [processes.device.index] if processes.device.type == "cuda" else None
            self.trained = DistributedDataParallel(self.trained, device_ids=ids)

    def check_graphs(self) -> None:
        """Refuse --cuda-graph where it cannot work."""
        if self.processes.world_size > 1:
            raise UserError("--cuda-graph works in one process only: leave it out, or start one process.")
        if self.processes.device.type != "cuda":
            say("--cuda-graph needs a GPU, and does nothing here.", self.processes)

    def open_data(self, saved: dict[str, Any] | None) -> None:
        o = self.options
        options = (o.dataset, o.data_dir, o.train_split, o.val_split, o.holdout, o.class_map)
        mode = "RGB" if o.in_chans == 3 else "L"
        self.train_images, self.val_images, self.class_names, self.held_out = open_train_and_val(
            *options, mode=mode, download=o.dataset_download
        )
        say_left_out(self.processes, self.train_images, self.val_images)
        self.num_classes = classes_to_train(o, self.train_images, self.class_names)
        if saved and (saved["num_classes"], saved["class_names"]) != (self.num_classes, self.class_names):
            raise UserError(
                f"The run was started on {saved['num_classes']} classes, and these data have others "
                f"({self.num_classes}): give it its old data, or fine-tune on these with --initial-checkpoint and "
                "another --experiment."
            )
        self.fingerprints = {"train": fingerprint(self.train_images), "val": fingerprint(self.val_images)}
        if saved and saved.get("images", self.fingerprints) != self.fingerprints:
            raise UserError(
                "The images are not those that the run was started on, whose names, classes or sizes were others: give "
                "it its old data, or fine-tune on these with --initial-checkpoint and another --experiment."
            )

    def create_model(self, saved: dict[str, Any] | None, path: Path | None) -> None:
        o = self.options
        # a run that goes on needs no folder or repository that it has begun from, and goes by no other
        facts = read_facts(saved, path) if saved else {}
        given = ModelSource(facts["arch"], facts["arch"], facts.get("model_kwargs", {})) if saved else o.model
        source = find_model(given, o.imports)
        told = {**source.model_kwargs, **o.model_kwargs}
        in_chans = {} if o.in_chans == 3 and "in_chans" not in told else {"in_chans": o.in_chans}
        self.model = create_model(
            source,
            o.model_kwargs,
            imports=o.imports,
            pretrained=o.pretrained and not saved,
            num_classes=self.num_classes,
            drop_rate=o.drop,
            drop_path_rate=o.drop_path,
            **in_chans,
        )
        self.facts = source.facts(o.model_kwargs) | {"num_classes": self.num_classes, "in_chans": o.in_chans}
        if saved:
            self.facts["terms"] = facts.get("terms", {})
        elif o.initial_checkpoint:
            load(self.model, o.initial_checkpoint, new_head=True)
            self.facts["terms"] = started_from(o.initial_checkpoint)
        else:
            self.facts["terms"] = started_from(self.model, source.name) if o.pretrained else {}
        self.data_config = input_config(self.model, o, o.img_size, facts.get("data_config"), in_chans=o.in_chans)
        self.frozen = prepare_model(o, self.model)
        if self.frozen and not (o.pretrained or o.initial_checkpoint or saved):
            say(
                f"--freeze {o.freeze} keeps random weights as they are: start from trained ones, with --pretrained or "
                "--initial-checkpoint.",
                self.processes,
            )
        self.model.to(self.processes.device)
        self.autocast = autocast(self.processes.device, o.amp, o.amp_dtype)
        check_reads(self.model, self.data_config["input_size"], self.autocast, classes=self.num_classes)
        self.ema = None
        if o.model_ema:
            self.ema = ModelEmaV3(self.model, decay=o.model_ema_decay, use_warmup=o.model_ema_warmup)

    @property
    def mixing(self) -> bool:
        o = self.options
        return o.mixup > 0 or o.cutmix > 0 or o.cutmix_minmax is not None

    def choose_batch_size(self) -> None:
        """Also the learning rate, which may depend on it."""
        o, world_size = self.options, self.processes.world_size
        batch_size = min(o.batch_size, len(self.train_images) // world_size)
        if self.mixing and batch_size % 2:
            batch_size -= 1  # images are mixed in pairs
        if batch_size < 1:
            raise UserError(f"{len(self.train_images)} images are too few to train on: add images, or leave Mixup out.")
        if batch_size != o.batch_size:
            say(
                f"Using batches of {batch_size} of {o.batch_size}, for {len(self.train_images)} images.",
                self.processes,
            )
        self.batch_size = batch_size
        scale = batch_size * world_size * o.grad_accum_steps / o.lr_base_size
        self.lr = o.lr or o.lr_base * (scale if o.lr_base_scale == "linear" else math.sqrt(scale))

    def create_loaders(self) -> None:
        o, config = self.options, self.data_config
        source = memory if held_in_memory(o, self.train_images) else data
        if source is memory and self.processes.is_first:
            make_folder(self.folder)  # all images are decoded now, which may take minutes
        self.loader = source.train_loader(
            self.train_images,
            config,
            self.batch_size,
            o.workers,
            self.processes,
            no_aug=o.no_aug,
            scale=tuple(o.scale),
            ratio=tuple(o.ratio),
            hflip=o.hflip,
            vflip=o.vflip,
            color_jitter=o.color_jitter,
            auto_augment=o.aa,
            interpolation=config["interpolation"] if o.no_aug else o.train_interpolation,
            re_prob=o.reprob,
            re_mode=o.remode,
            re_count=o.recount,
        )
        val_batch = o.validation_batch_size or o.batch_size
        self.val_loader = source.eval_loader(self.val_images, config, val_batch, o.workers, self.processes)
        self.mixup = None
        if self.mixing:
            self.mixup = Mixup(
                mixup_alpha=o.mixup,
                cutmix_alpha=o.cutmix,
                cutmix_minmax=o.cutmix_minmax,
                prob=o.mixup_prob,
                switch_prob=o.mixup_switch_prob,
                mode=o.mixup_mode,
                label_smoothing=o.smoothing,
                num_classes=self.num_classes,
            )
        self.criterion = create_loss(o, self.mixing).to(self.processes.device)

    def create_scheduler(self) -> None:
        o = self.options
        self.updates_per_epoch = math.ceil(len(self.loader) / o.grad_accum_steps)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched=o.sched,
            num_epochs=o.epochs,
            warmup_epochs=min(o.warmup_epochs, o.epochs),
            warmup_lr=self.lr / 1000 if o.warmup_lr is None else o.warmup_lr,
            min_lr=self.lr / 100 if o.min_lr is None else o.min_lr,
            decay_epochs=o.decay_epochs,
            decay_rate=o.decay_rate,
            step_on_epochs=False,
            updates_per_epoch=self.updates_per_epoch,
        )
        self.scaler = NativeScaler(self.processes.device.type) if o.amp and o.amp_dtype == "float16" else None

    def restore(self, saved: dict[str, Any], called: str) -> None:
        restore_weights(self.model, saved["state_dict"], called)
        if self.ema:
            restore_weights(self.ema.module, saved.get("state_dict_ema"), called)
        restore_optimizer(self.optimizer, saved["optimizer"], called)
        if self.scaler:
            try:
                self.scaler.load_state_dict(saved["scaler"])
            except (LookupError, RuntimeError, TypeError) as error:
                raise UserError(f"{called} has no scale for float16: {error}.") from None

    @property
    def measure(self) -> str:
        """The column that decides which epoch is best."""
        return "ema_top1" if self.ema else "top1"

    @property
    def best(self) -> dict[str, Any] | None:
        validated = [row for row in self.history if row.get(self.measure) is not None]
        return max(validated, key=lambda row: (row[self.measure], row["epoch"]), default=None)

    def fit(self) -> None:
        """Train up to the last epoch.

        Raises:
            DivergenceError: The loss became NaN or infinite. The last good checkpoint is kept.
            UserError: A file could not be written, and the last good checkpoint is kept; another run is in the folder.
        """
        o, first = self.options, len(self.history)
        self.describe()
        with own_folder(self.folder, self.last, self.processes):
            if first:
                going_on = f"Going on after epoch {first} of {o.epochs}."
                if first >= o.epochs:
                    going_on = f"Nothing is left to train: the run has had {first} epochs. More --epochs go on with it."
                say(going_on, self.processes)
                with explain_disk_errors(MAKE_ROOM):
                    self.write_metrics()
            if o.cuda_graph and self.processes.device.type == "cuda" and first < o.epochs:
                self.record()
            for epoch in range(first, o.epochs):
                row = self.train_epoch(epoch)
                if (epoch + 1) % o.val_interval == 0 or epoch + 1 == o.epochs:
                    row.update(self.validate())
                self.require_finite(epoch, row["train_loss"], row.get("val_loss", 0.0), weights=True)
                row["unreadable"] = self.count_unreadable()
                self.history.append(row)
                self.write()
                say(describe_epoch(row, o.epochs), self.processes)
            if self.best:
                say(
                    f"Best: epoch {self.best['epoch']}, {self.best[self.measure]:.2f} % top-1; {self.folder}",
                    self.processes,
                )

    def describe(self) -> None:
        """Say what is trained, on what, and where it is written."""
        o = self.options
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        frozen = f", {trained:,} of them trained" if self.frozen else ""
        size = " x ".join(map(str, self.data_config["input_size"][1:]))
        say(
            f"{o.model}: {parameters:.2f} M parameters{frozen}, {self.num_classes} classes, {size} pixels",
            self.processes,
        )
        images = f"{len(self.train_images):,} images to train on, {len(self.val_images):,} to validate on"
        kept = f" (a share of {o.holdout:g} set aside)" if self.held_out else ""
        say(f"{images}{kept}; learning rate {self.lr:.3g}; {self.folder}", self.processes)
        for advice in self.short_run_advice():
            say(advice, self.processes)
        n = torch.cuda.device_count()
        if not self.history and self.processes.device.type == "cuda" and self.processes.world_size == 1 and n > 1:
            say(f"Using one of {n} GPUs; for all: torchrun --no-python --nproc-per-node={n} vim2 train ...")

    def short_run_advice(self) -> Iterator[str]:
        """What is set for runs longer than this one, and would spoil it."""
        o = self.options
        if o.warmup_epochs >= o.epochs:
            yield f"Warm-up takes the whole run, {o.warmup_epochs:g} epochs: lower --warmup-epochs."
        updates = self.updates_per_epoch * o.epochs
        if self.ema and not o.model_ema_warmup and (kept := o.model_ema_decay**updates) > 0.1:
            yield (
                f"After {updates} updates, {100 * kept:.0f} % of the moving average are still the first weights: lower "
                "--model-ema-decay, or add --model-ema-warmup."
            )

    def count_unreadable(self) -> int:
        """How many images proved unreadable so far; those not named before are named, up to 20."""
        count = 0
        for images in (self.train_images, self.val_images):
            number, names = images.report_unreadable(self.processes)
            count += number
            for name in names[:20]:
                say(f"Skipped, cannot be read: {name}", self.processes)
            if len(names) > 20:
                say(f"Skipped, cannot be read: {len(names) - 20} more", self.processes)
        return count

    def record(self) -> None:
        """From here on, training runs the model's passes as CUDA graphs."""
        o = self.options
        train_mode(self.model, self.frozen)
        images = torch.rand(self.batch_size, *self.data_config["input_size"], device=self.processes.device)
        # wrapped, so that validation has the model without its graphs
        self.trained = record(nn.Sequential(self.model), (images,), getattr(torch, o.amp_dtype) if o.amp else None)
        if o.grad_accum_steps > 1:
            self.keep_gradients = True
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    def train_epoch(self, epoch: int) -> dict[str, Any]:
        """Train for one epoch. Returns its row of the history, without what validation adds."""
        self.begin_epoch(epoch)
        steps, accumulated = len(self.loader), self.options.grad_accum_steps
        watch = EpochWatch(self, epoch)
        batches = progress_bar(self.loader, f"epoch {epoch + 1}", self.processes)
        for step, (images, target) in enumerate(batches):
            is_update = (step + 1) % accumulated == 0 or step + 1 == steps
            in_update = min(accumulated, steps - step // accumulated * accumulated)  # the last has fewer steps
            loss = self.train_step(images, target, is_update, in_update)
            watch.add(loss)
        train_loss, seconds = self.mean_loss(watch.total, steps), watch.seconds()
        return {
            "epoch": epoch + 1,
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            "train_loss": train_loss,
            "seconds": seconds,
            "images_per_second": self.images_per_second(steps, seconds),
        }

    def begin_epoch(self, epoch: int) -> None:
        """Set everything that an epoch begins with: seeds, order of the images, Mixup, modes, learning rate."""
        o = self.options
        seed_everything(o.seed, epoch + 1, self.processes.rank)
        if self.processes.world_size > 1:
            self.loader.sampler.set_epoch(epoch)
        if self.mixup:
            self.mixup.mixup_enabled = not o.mixup_off_epoch or epoch < o.mixup_off_epoch
        train_mode(self.model, self.frozen)
        if self.scheduler:
            self.scheduler.step_update(self.updates)

    def train_step(self, images: Tensor, target: Tensor, is_update: bool, in_update: int) -> Tensor:
        """Both passes for a batch and, with the last of the `in_update` batches of an update, the update. Returns the
        loss."""
        if self.mixup:
            images, target = self.mixup(images, target)
        wait = self.processes.world_size > 1 and not is_update
        with self.trained.no_sync() if wait else nullcontext():
            with self.autocast():
                loss = self.criterion(self.scores(images), target)
            self.backward(loss / in_update, is_update)
        if is_update:
            self.updates += 1
            self.optimizer.zero_grad(set_to_none=not self.keep_gradients)
            if self.ema:
                self.ema.update(self.model, step=self.updates)
            if self.scheduler:
                self.scheduler.step_update(self.updates)
        return loss.detach()

    def scores(self, images: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, classes), in training.

        Raises:
            UserError: The model, which may be a user's own, cannot be trained so.
        """
        try:
            scores = self.trained(images)
        except RuntimeError as error:
            if "find_unused_parameters" not in str(error):  # of DistributedDataParallel, at its second step
                raise
            raise UserError(
                f"{self.options.model} has parameters that its scores do not depend on, which several processes cannot "
                "train: leave these out of it, or train in one process."
            ) from None
        check_scores(scores, (len(images), self.num_classes), "The model, in training,")
        return scores

    def images_per_second(self, steps: int, seconds: float) -> float:
        return steps * self.batch_size * self.processes.world_size / seconds

    def backward(self, loss: Tensor, is_update: bool) -> None:
        o = self.options
        parameters = model_parameters(self.model, exclude_head=o.clip_mode == "agc")  # which leaves it alone
        if self.scaler:
            self.scaler(loss, self.optimizer, o.clip_grad, o.clip_mode, parameters, need_update=is_update)
            return
        loss.backward()
        if is_update:
            if o.clip_grad is not None:
                dispatch_clip_grad(parameters, o.clip_grad, mode=o.clip_mode)
            self.optimizer.step()

    def mean_loss(self, total: Tensor, steps: int) -> float:
        return (self.processes.sum(total) / (steps * self.processes.world_size)).item()

    def validate(self) -> dict[str, Any]:
        options = (self.val_loader, self.processes, self.autocast)
        self.model.eval()
        scores = evaluate(self.evaluated, *options)
        row = {"val_loss": scores["loss"], "top1": scores["top1"], "top5": scores["top5"]}
        if self.ema:
            scores = evaluate(self.ema.module, *options, description="validate EMA")
            row.update(ema_val_loss=scores["loss"], ema_top1=scores["top1"], ema_top5=scores["top5"])
        if not scores["images"]:
            raise UserError("Not one of the images to validate on can be read: check the data.")
        return row

    def require_finite(self, epoch: int, *losses: float, weights: bool = False) -> None:
        finite = all(map(math.isfinite, losses))
        if finite and weights:
            finite = bool(torch.stack([p.isfinite().all() for p in self.model.parameters()]).all())
        if finite:
            return
        kept = f"The last good checkpoint, of epoch {epoch}, is kept: {self.folder / 'last.pth'}."
        raise DivergenceError(
            f"The loss became NaN or infinite in epoch {epoch + 1}. {kept if epoch else 'Nothing was saved yet.'} "
            "Start again with a lower --lr, with --clip-grad 1, or if it was in float16 with --amp-dtype bfloat16"
            + (", from that checkpoint by --initial-checkpoint." if epoch else ".")
        )

    def write(self) -> None:
        """Write the run's files; the first process does. If it is cut off anywhere here, nothing is lost."""
        if not self.processes.is_first:
            return
        weights = {
            **plain_containers(self.facts),
            "class_names": self.class_names,
            "data_config": plain_containers(self.data_config),
            "held_out": self.held_out,
            "args": plain_containers(self.options.to_dict()),
            "epoch": len(self.history),
            "metrics": self.history[-1],
            "state_dict": self.model.state_dict(),
        }
        if self.ema:
            weights["state_dict_ema"] = self.ema.module.state_dict()
        state = {
            "updates": self.updates,
            "history": self.history,
            "world_size": self.processes.world_size,
            "images": self.fingerprints,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }
        with explain_disk_errors(MAKE_ROOM):
            # best.pth first: a run cut off in between repeats the epoch, and writes it again
            if self.best is self.history[-1]:
                save_checkpoint(weights, self.folder / "best.pth")
            save_checkpoint({**weights, **state}, self.folder / "last.pth")
            self.write_metrics()

    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json."""
        return {"model": self.options.model, "best": self.best, "history": self.history, "args": self.options.to_dict()}

    def write_metrics(self) -> None:
        if not self.processes.is_first:
            return
        columns = dict.fromkeys(name for row in self.history for name in row)
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.history)
        write_atomically(self.folder / "metrics.csv", text.getvalue())
        write_atomically(self.folder / "metrics.json", json.dumps(self.metrics(), indent=1) + "\n")
        with figures_if_possible("curves.png", silent=len(self.history) > 1):  # it is said once
            plot_curves(self.history, self.folder / "curves.png")


class EpochWatch:
    """Adds up the losses of an epoch's steps and looks at them now and then: one that is not finite ends the run, and
    where no bar shows how the epoch goes on, a line says so.

    Args:
        run: The run that trains.
        epoch: The epoch's number, from 0.

    Attributes:
        total: Sum of the steps' losses, float64, on the run's device.
    """

    def __init__(self, run: Run, epoch: int):
        self.run, self.epoch = run, epoch
        self.total = torch.zeros((), dtype=torch.float64, device=run.processes.device)
        self.speaks = not has_bar(run.processes)
        self.steps = self.steps_said = 0
        self.start = self.said = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def add(self, loss: Tensor) -> None:
        """Add the loss of the next step, and look at the sum if it is time to: a GPU has to be waited for then."""
        self.total += loss
        self.steps += 1
        # several processes have to look at the same step, and their clocks differ
        by_clock = self.speaks and self.run.processes.world_size == 1
        is_quiet = by_clock and time.perf_counter() - self.said > QUIET
        if is_quiet or self.steps % self.run.options.log_interval == 0:
            self.look()

    def look(self) -> None:
        run, so_far, now = self.run, self.run.mean_loss(self.total, self.steps), time.perf_counter()
        run.require_finite(self.epoch, so_far)
        if self.speaks and now - self.said > QUIET:
            speed = run.images_per_second(self.steps - self.steps_said, now - self.said)
            where = f"epoch {self.epoch + 1:>3}/{run.options.epochs}, step {self.steps}/{len(run.loader)}"
            say(f"{where} · loss {so_far:.4f} · {speed:.0f} images/s", run.processes)
            self.said, self.steps_said = now, self.steps


def started_from(weights: nn.Module | str, called: str = "") -> dict[str, Any]:
    """The terms, see `terms_of`, of what is trained from weights: those that a model, called so, was made with, or a
    file's."""
    if isinstance(weights, nn.Module):
        cfg = weights.pretrained_cfg
        return fine_tuned(terms_of(cfg), short_name(called) if is_place(called) else weights_name(cfg))
    file = weights_file(weights)
    name = (file if file == Path(weights) else Path(weights).resolve()).name
    try:
        terms = read_described(weights)[1].get("terms")
    except UserError:  # weights that could be loaded, with something beside them that is of no use here
        terms = None
    if terms is None:
        return no_terms_told(name)
    return fine_tuned(terms, name) if terms else {}


def classes_to_train(options: TrainOptions, images: Images, names: list[str] | None) -> int:
    """How many classes a model is trained for, on images of classes of these names.

    Raises:
        UserError: The data do not tell, and no option does; or they have more than the option says.
    """
    found = len(names) if names else count_classes(images)
    if found is None and options.num_classes is None:
        raise UserError(f"{options.dataset} does not tell its number of classes: add --num-classes.")
    if found is not None and (options.num_classes or found) < found:
        raise UserError(f"The data have {found} classes, more than --num-classes {options.num_classes}: leave it out.")
    return options.num_classes or found


def held_in_memory(options: TrainOptions, images: Images) -> bool:
    """Whether images are decoded once, before training."""
    return options.in_memory or images.is_packed


def check_augmentations(options: TrainOptions, images: Images) -> None:
    """Refuse augmentation that would fail on the images to train on, before any is decoded.

    Raises:
        UserError: As `check_augmentation` and `read_policy`.
    """
    if options.no_aug:
        return
    in_memory = held_in_memory(options, images)
    if in_memory:
        check_augmentation(options.train_interpolation)
    if options.aa:
        read_policy(options.aa, in_memory, options.train_interpolation)


def prepare_model(options: TrainOptions, model: nn.Module) -> list[nn.Module]:
    """Make a model, on any device, ready to be trained.

    Returns:
        What of it is frozen.

    Raises:
        UserError: Options that do not go with the model or with one another.
    """
    o = options
    if o.cuda_graph:
        for name, given in (("--torchcompile", o.torchcompile), ("--grad-checkpointing", o.grad_checkpointing)):
            if given:
                raise UserError(f"--cuda-graph does not work with {name}: leave one of them out.")
    check_backend(o.torchcompile)
    frozen = freeze(model, o.freeze)
    if o.grad_checkpointing:
        try:
            model.set_grad_checkpointing()
        except (AssertionError, AttributeError):  # timm's models without it, and models without its method
            raise UserError(f"{o.model} has no gradient checkpointing: leave --grad-checkpointing out.") from None
    return frozen


def create_optimizer(options: TrainOptions, model: nn.Module, lr: float) -> Optimizer:
    """timm's optimiser for a model, which may be on the meta device, tried on a weight of its own.

    Raises:
        UserError: There is no such optimiser, or it cannot be used with this learning rate and its other options, or
            not here.
    """
    o, device = options, next(model.parameters()).device
    if o.opt.lower().removeprefix("lookahead_") not in list_optimizers():  # which timm lets go around any of them
        raise UserError(f"There is no optimiser {o.opt}{did_you_mean(o.opt, list_optimizers())}")
    optional = {"eps": o.opt_eps, "betas": o.opt_betas and tuple(o.opt_betas)}
    if device.type == "cuda" and o.opt.lower() in ("adam", "adamw"):
        optional["fused"] = True  # one kernel for many weights
    given = {k: v for k, v in optional.items() if v is not None}
    given |= dict(opt=o.opt, lr=lr, weight_decay=o.weight_decay, momentum=o.momentum)
    try:
        optimizer = create_optimizer_v2(model, layer_decay=o.layer_decay, **given)
        if getattr(optimizer, "is_second_order", False):
            raise UserError(
                f"The optimiser {o.opt} needs gradients of gradients, which there are not here: use another."
            )
        if device.type != "meta" or type(optimizer).__module__.startswith(("torch.", "timm.")):  # and not a GPU's only
            # some look at their options only in a step
            weight = nn.Parameter(torch.zeros(2, 2, device="cpu" if device.type == "meta" else device))
            weight.grad = torch.zeros_like(weight)
            create_optimizer_v2([weight], **given).step()
    except (UserError, torch.OutOfMemoryError):
        raise
    except (AssertionError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        called = f"--lr {lr:g}"
        called += "" if o.opt_eps is None else f" --opt-eps {o.opt_eps:g}"
        called += f" --opt-betas {' '.join(map(str, o.opt_betas))}" if o.opt_betas else ""
        raise UserError(f"The optimiser {o.opt} cannot be used with {called}: {in_short(error)}") from None
    return optimizer


def create_loss(options: TrainOptions, mixing: bool) -> nn.Module:
    """The training loss; Mixup smooths labels itself."""
    smoothing = options.smoothing
    if options.bce_loss:
        return BinaryCrossEntropy(smoothing=0.0 if mixing else smoothing, target_threshold=options.bce_target_thresh)
    if mixing:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()


def plain_containers(value: Any) -> Any:
    """What a weights-only reader takes: built-in numbers, text and containers."""
    if isinstance(value, dict):
        return {str(k): plain_containers(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain_containers(v) for v in value)
    if isinstance(value, float):
        return float(value)  # NumPy's, too, are floats
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def describe_epoch(row: dict[str, Any], epochs: int) -> str:
    """A line for an epoch."""
    parts = [f"epoch {row['epoch']:>3}/{epochs}", f"loss {row['train_loss']:.4f}"]
    if "val_loss" in row:
        parts += [f"validation {row['val_loss']:.4f}", f"top-1 {row['top1']:.2f} %", f"top-5 {row['top5']:.2f} %"]
    if "ema_top1" in row:
        parts.append(f"EMA top-1 {row['ema_top1']:.2f} %")
    parts.append(f"{row['images_per_second']:.0f} images/s")
    if row["unreadable"]:
        parts.append(f"{row['unreadable']} unreadable images skipped")
    return " · ".join(parts)
