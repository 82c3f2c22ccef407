"""What the arena's processes do, each a function from a task (common/scheduler.py) to its result."""

import argparse
import gc
import os
import shutil
import statistics
from pathlib import Path

import torch

from vim2.benchmark.measuring import GIB, machine
from vim2.benchmark.models import count_flops, count_parameters
from vim2.classify import train, validate
from vim2.classify.options import ValidateOptions
from vim2.command.errors import DivergenceError
from vim2.command.own_models import import_models

from .models import Entry, adapt, create, dynamic, parse_entry, takes

__all__ = ["run_folder", "scale_run", "time_entry", "train_entry"]

HISTORY = ("epoch", "train_loss", "top1", "top5", "seconds")
OTHER_MEANING = {"img_size", "pretrained"}  # options of training that mean something else in validation


def run_folder(output: str | os.PathLike, task_key: dict) -> Path:
    """The folder of a run, by the key of its task."""
    kind = "search" if task_key["kind"] == "search" else f"seed{task_key['seed']}"
    return Path(output) / "runs" / task_key["label"] / f"epochs{task_key['epochs']}-lr{task_key['lr']:g}-{kind}"


def train_entry(task: dict) -> dict:
    """Train to the end, from where an earlier run was cut off.

    The task has `options` of `vim2.classify.train`, `entry`, `halve`, `num_classes`, the `output` of the arena, and how
    many runs are `sharing` the device.

    Returns:
        Accuracies after the last epoch, the history, and what the run cost; or why it `failed`, where the loss became
        infinite.
    """
    length = {k: task["key"][k] for k in ("epochs", "lr", "seed")}
    return {**train_in(run_folder(task["output"], task["key"]), task, **length), "sharing": task["sharing"]}


def time_entry(task: dict) -> dict:
    """As `train_entry`, for two epochs that are thrown away, the first of which compiles."""
    folder = Path(task["output"]) / "runs" / task["key"]["label"] / "time"
    result = train_in(folder, task, epochs=2, lr=task["lr"], seed=0)
    shutil.rmtree(folder)
    return {k: result[k] for k in ("images_per_second", "gib", "hardware", "versions", "date")}


def train_in(folder: Path, task: dict, epochs: int, lr: float, seed: int) -> dict:
    options, size = dict(task["options"]), task["options"]["img_size"]
    import_models(options.get("imports", ()))
    entry = adapt(parse_entry(task["entry"]), size, task["halve"])
    if not takes(entry, drop_path_rate=0.1):
        options["drop_path"] = None
    on_gpu = start_measuring(options["device"])
    run = dict(epochs=epochs, lr=lr, seed=seed, output=str(folder.parent), experiment=folder.name, resume="auto")
    try:
        history = train(**options, **run, model=entry.model, model_kwargs=entry.kwargs)["history"]
    except DivergenceError as error:
        return {**about(task, entry), "failed": str(error)}
    speeds = [row["images_per_second"] for row in history]
    return {
        **about(task, entry),
        **{k: history[-1][k] for k in ("top1", "top5", "val_loss", "train_loss")},
        "images_per_second": statistics.median(speeds[1:] or speeds),  # the first epoch compiles
        "train_seconds": sum(row["seconds"] for row in history),
        "gib": torch.cuda.max_memory_allocated() / GIB if on_gpu else None,
        "history": [{k: row.get(k) for k in HISTORY} for row in history],
    }


def about(task: dict, entry: Entry) -> dict:
    """A model's size and what it is measured on."""
    model, size = create(entry, num_classes=task["num_classes"]), task["options"]["img_size"]
    device = task["options"]["device"]
    where = argparse.Namespace(
        device=device, device_type=torch.device(device).type, amp="", torchcompile=False, channels_last=False, modes=()
    )
    facts = machine(where)
    return {
        "params_m": count_parameters(model) / 1e6,
        "gflops": count_flops(model, size) / 1e9,
        **{k: facts[k] for k in ("hardware", "versions", "date")},
    }


def start_measuring(device: str) -> bool:
    """Forget what an earlier task left in this process's memory; whether the device is a GPU."""
    gc.collect()
    if torch.device(device).type != "cuda":
        return False
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return True


def scale_run(task: dict) -> dict:
    """Validate the last checkpoint of the task's `run` at its size.

    Returns:
        `top1`, `top5` and `gflops` at that size.
    """
    import_models(task["options"].get("imports", ()))
    entry, size = adapt(parse_entry(task["entry"]), task["options"]["img_size"], task["halve"]), task["key"]["img_size"]
    entry = dynamic(entry)
    folder = run_folder(task["output"], task["run"])
    start_measuring(task["options"]["device"])
    shared = task["options"].keys() & ValidateOptions.__dataclass_fields__.keys() - OTHER_MEANING
    (row,) = validate(
        **{k: task["options"][k] for k in shared},
        split=task["options"]["val_split"],
        checkpoint=str(folder / "last.pth"),
        model=entry.model,
        model_kwargs=entry.kwargs,
        img_size=size,
        output=str(folder / f"validation-{size}"),
    )
    gflops = count_flops(create(entry, num_classes=task["num_classes"]), size) / 1e9
    return {**{k: row[k] for k in ("top1", "top5")}, "gflops": gflops}
