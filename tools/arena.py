#!/usr/bin/env python
"""Trains models by one recipe and compares them: accuracy, parameters, FLOPs, speed, memory, with tables and pictures.

    arena.py run OUTPUT --data-dir DIR --models vim2_nano none=vim2_nano:channel_mixer=none resnet18
    arena.py time OUTPUT                       each model alone on its device, where several had shared one
    arena.py scale OUTPUT --sizes 64 96 128    the trained models at other image sizes
    arena.py table OUTPUT                      tables and pictures of what there is, or of several arenas (--of)

A model is NAME, or LABEL=NAME:key=value,key=value with arguments of its constructor; NAME is a timm model,
local-dir:FOLDER or hf-hub:USER/NAME. Each is first trained with seed 0 at every rate of --lrs, with a part of the
training images set aside to choose by, and then at the best with all --seeds. Figures are those of the last epoch on
the validation images, which nothing is chosen by.

Every run is a folder as of classify.py train, and every finished one a line of OUTPUT/arena.jsonl: a command that was
cut off, or stopped after --minutes, goes on where it was. docs/training.md explains more.
"""

from common.command import run_tool
from common.scheduler import STOPPED, find_result, read_results, run_tasks, visible_gpus

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from benchmarks.arena.models import Entry, adapt, anywhere, create, parse_entry
from benchmarks.arena.report import (
    best_rate,
    collect,
    fault,
    plot_all,
    plot_scaling,
    report,
    scaling_report,
    scaling_rows,
    unfinished_runs,
)
from benchmarks.arena.tasks import run_folder, scale_run, time_entry, train_entry
from vim2.classify.data import open_train_and_val
from vim2.classify.models import create_model, input_config, load
from vim2.classify.options import INTERPOLATIONS, MAY_CHANGE, CropShare, Pixels, TrainOptions
from vim2.classify.training import check_augmentations, classes_to_train, create_optimizer, prepare_model
from vim2.command.errors import UserError
from vim2.command.figures import figures_if_possible
from vim2.command.options import (
    REQUIRED,
    Count,
    DeviceOptions,
    NotNegative,
    Options,
    Positive,
    PositiveFloat,
    Probability,
    Rate,
    Share,
    option,
    plain,
    resolve,
)
from vim2.command.outputs import make_folder
from vim2.command.own_models import import_models, module_home
from vim2.files import write_atomically

# What the arena says to `vim2.classify.train` itself, and what says it to the arena
OWN = {"model": "--models", "model_kwargs": "--models", "lr": "--lrs", "seed": "--seeds", "recipe": "--epochs"}
OWN |= dict.fromkeys(("output", "experiment", "resume"), "OUTPUT")
PATHS = ("data_dir", "class_map", "initial_checkpoint")


@dataclass(frozen=True, kw_only=True)
class FolderOptions(Options):
    output: str = option(REQUIRED, "folder of the arena", metavar="OUTPUT", positional=True)

    @property
    def folder(self) -> Path:
        return Path(self.output)


@dataclass(frozen=True, kw_only=True)
class PlaceOptions(Options, group="places"):
    gpus: list[str] | None = option(None, "as CUDA_VISIBLE_DEVICES names them; default: all", metavar="GPU")
    minutes: NotNegative | None = option(None, "stop after these; the same command goes on later", metavar="N")


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(TrainOptions, group="the arena's recipe"):
    img_size: Pixels = option(64, "height and width", metavar="PIXELS")
    batch_size: Positive = option(256, "images a step", short="-b", metavar="N")
    epochs: Positive = option(16, "epochs, warm-up included", metavar="N")
    warmup_epochs: NotNegative = option(2.0, "epochs of linear warm-up", metavar="N")
    reprob: Probability = option(0.25, "probability of random erasing", metavar="P")
    mixup: NotNegative = option(0.8, "mixup, if above 0", metavar="ALPHA")
    cutmix: NotNegative = option(1.0, "CutMix, if above 0", metavar="ALPHA")
    mixup_prob: Probability = option(0.5, "probability of either", metavar="P")
    drop_path: Rate = option(0.1, "stochastic depth, of models that have it", metavar="RATE")
    crop_pct: CropShare = option(1.0, "size over the size to resize to, at validation", metavar="SHARE")
    mean: list[float] = option(list(IMAGENET_DEFAULT_MEAN), "mean of the pixels, of 1")
    std: list[PositiveFloat] = option(list(IMAGENET_DEFAULT_STD), "standard deviation of the pixels, of 1")
    interpolation: str = option("bicubic", "of resizing", choices=INTERPOLATIONS)
    amp: bool | None = option(None, "mixed precision; default: on GPUs", negatable=True)


@dataclass(frozen=True, kw_only=True)
class ArenaOptions(FolderOptions, RecipeOptions, PlaceOptions):
    """Train models by one recipe and compare them. Options that are not the arena's are those of classify.py train."""

    program = "arena.py run"
    models: list[str] = option(REQUIRED, "NAME, or LABEL=NAME:key=value,key=value", metavar="MODEL")
    lrs: list[PositiveFloat] = option([1e-3], "learning rates to choose from", metavar="LR")
    search_epochs: Positive | None = option(None, "length of that choice; default: --epochs", metavar="N")
    holdout: Share = option(0.05, "share of the training images to choose a rate by")
    seeds: list[Count] = option([0], "a run for each", metavar="N")
    stem_stride: str = option("half", "half is for images of 64 pixels or so", choices=("half", "keep"))
    jobs: Positive = option(1, "runs at a time on each device", metavar="N")


@dataclass(frozen=True, kw_only=True)
class TableOptions(FolderOptions):
    """Tables and pictures of what there is."""

    program = "arena.py table"
    of: list[str] | None = option(None, "arenas of one recipe to put together; default: OUTPUT", metavar="FOLDER")


@dataclass(frozen=True, kw_only=True)
class TimeOptions(FolderOptions, PlaceOptions, DeviceOptions):
    """Train each model for two epochs alone on its device, for its speed and memory."""

    program = "arena.py time"


@dataclass(frozen=True, kw_only=True)
class ScaleOptions(FolderOptions, PlaceOptions, DeviceOptions):
    """Accuracy of the finished runs' last checkpoints at other image sizes."""

    program = "arena.py scale"
    sizes: list[Pixels] = option([64, 96, 128, 192, 256], "image sizes", metavar="PIXELS")


def run(argv: list[str]) -> int:
    """Choose rates, and train."""
    args, explicit = resolve(ArenaOptions, argv)
    for name in sorted(explicit & OWN.keys() - {"output"}):
        raise UserError(f"--{name.replace('_', '-')} is not for the arena: see {OWN[name]} in arena.py run --help.")
    if args.in_chans != 3:
        raise UserError("The arena makes colour images of grey ones, for all models: leave --in-chans out.")
    gpus = places(args, args.device)
    options = {k: getattr(args, k) for k in TrainOptions.__dataclass_fields__ if k not in {*OWN, "epochs"}}
    options.update(device="cuda" if gpus else "cpu", amp=bool(gpus) if args.amp is None else args.amp)
    entries = {parse_entry(text).label: anywhere(text) for text in args.models}
    if len(entries) < len(args.models):
        raise UserError("Two of the --models have one label: give one another, LABEL=NAME:key=value,...")
    settings = check(args, options, entries)

    def plan(results: list[dict]) -> list[dict]:
        return [task for label in entries for task in tasks_of(label, args, settings, results)]

    return execute(train_entry, plan, args, gpus, args.jobs, lambda results: settle(args.folder, settings, results))


def places(args: PlaceOptions, device: str | None) -> list[str]:
    """The GPUs to use, none on a CPU."""
    device = device or ("cuda" if visible_gpus() else "cpu")
    if device not in ("cuda", "cpu"):
        raise UserError(f"--device must be cuda or cpu, got {device}; which of several GPUs is for --gpus to say.")
    found = visible_gpus() if device == "cuda" else []
    for gpu in args.gpus or []:
        if gpu not in found:
            raise UserError(f"There is no GPU {gpu} to use on {device} (of {', '.join(found) or 'none'}).")
    if device == "cuda" and not found:
        raise UserError("PyTorch finds no CUDA GPU here: leave --device out, or use --device cpu.")
    return args.gpus or found


def check(args: ArenaOptions, options: dict[str, Any], entries: dict[str, str]) -> dict[str, Any]:
    """The settings that are asked for.

    Raises:
        UserError: Models, data or options that cannot be used, which `vim2.classify.train` would refuse.
    """
    import_models(options["imports"])
    adapted = [adapt(parse_entry(text), args.img_size, args.stem_stride == "half") for text in entries.values()]
    sources = ("dataset", "data_dir", "train_split", "val_split", "holdout", "class_map")
    train, _, names, held_out = open_train_and_val(*(options[k] for k in sources), download=options["dataset_download"])
    if held_out and len(args.lrs) > 1:
        raise UserError(
            f"{options['data_dir']} has no validation images of its own, and those that are set aside cannot both "
            "choose among --lrs and say what the choice is worth: give data with splits, or one rate."
        )
    check_augmentations(args, train)
    classes = classes_to_train(args, train, names)
    for entry in adapted:
        check_entry(entry, args, classes)
    return {
        "options": absolute(plain(options)),
        "stem_stride": args.stem_stride,
        "num_classes": classes,
        "images": len(train),
        "entries": entries,
    }


def check_entry(entry: Entry, args: ArenaOptions, classes: int) -> None:
    """Raises UserError where the options that all models share do not go with an adapted one of so many classes."""
    model = create(entry, num_classes=classes, drop_rate=args.drop)
    options = replace(args, model=entry.label)
    prepare_model(options, model)
    for lr in args.lrs:
        create_optimizer(options, model, lr)
    input_config(model, args, args.img_size, in_chans=3)
    if args.initial_checkpoint:
        load(model.to_empty(device="cpu"), args.initial_checkpoint, new_head=True)
    elif args.pretrained:  # which also fetches them, once
        create_model(entry.model, entry.kwargs, imports=args.imports, pretrained=True, num_classes=classes)


def absolute(options: dict[str, Any]) -> dict[str, Any]:
    """The options with absolute paths, which mean the same in every working directory."""
    imports = [os.path.abspath(name) if name.endswith(".py") else name for name in options.get("imports", ())]
    return {**{k: os.path.abspath(v) if k in PATHS and v else v for k, v in options.items()}, "imports": imports}


def settle(folder: Path, settings: dict[str, Any], results: list[dict]) -> None:
    """Write the settings to OUTPUT/settings.json, with the models that its runs are of besides.

    Raises:
        UserError: The folder holds runs of another recipe.
    """
    path = folder / "settings.json"
    if path.is_file() and (results or any(folder.glob("runs/*/*/last.pth"))):
        saved = read_settings(folder)
        require_same(folder, saved, settings, "choose another OUTPUT, or the same settings")
        settings["entries"] = {**saved["entries"], **settings["entries"]}
        settings["options"]["imports"] = joined(saved["options"].get("imports", ()), settings["options"]["imports"])
    write_atomically(path, json.dumps(settings, indent=1) + "\n")


def joined(saved: Sequence[str], given: Sequence[str]) -> list[str]:
    """The imports of an arena and further ones, without files that have been moved or deleted since."""

    def module(name: str) -> str:
        return module_home(name).name if name.endswith(".py") else name

    anew = {module(name) for name in given}
    there = [name for name in saved if os.path.isfile(name) or not name.endswith(".py")]
    return [*(name for name in there if module(name) not in anew), *given]


def require_same(folder: Path, saved: dict[str, Any], settings: dict[str, Any], otherwise: str) -> None:
    """Raises UserError where a folder's settings are not these; `otherwise` says what to do then."""
    before, now = flat(saved), flat(settings)
    for name in sorted(before.keys() & now.keys() - MAY_CHANGE):
        if before[name] != now[name]:
            called = name.replace("_", "-")
            raise UserError(f"{folder} holds runs with {called} {before[name]}, not {now[name]}: {otherwise}.")


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Everything that must stay as it is in one OUTPUT, by one name each."""
    labelled = {f"model {label}": text for label, text in settings["entries"].items()}
    return {
        **absolute(settings["options"]),
        **{k: settings[k] for k in ("stem_stride", "num_classes", "images")},
        **labelled,
    }


def read_settings(folder: Path) -> dict[str, Any]:
    """What OUTPUT/settings.json holds.

    Raises:
        UserError: There is none, or one that `settle` has not written.
    """
    path = folder / "settings.json"
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"There is no arena in {folder}: arena.py run makes one.") from None
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}).") from None
    except (ValueError, RecursionError):
        settings = None
    kinds = {"options": dict, "stem_stride": str, "num_classes": int, "images": int, "entries": dict}
    whole = isinstance(settings, dict) and all(isinstance(settings.get(k), kind) for k, kind in kinds.items())
    if not whole or not settings["options"].keys() >= {"batch_size", "device", "holdout", "img_size", "val_split"}:
        raise UserError(
            f"{path} is damaged: delete it, and give arena.py run the same models and options as before, which writes "
            "it again."
        )
    return settings


def tasks_of(label: str, args: ArenaOptions, settings: dict[str, Any], results: list[dict]) -> list[dict]:
    """What a model's rates are chosen by, or once that is done, its runs at the best."""
    epochs, rates = args.epochs, args.lrs
    common = {**task_basis(label, args.folder, settings), "sharing": args.jobs}
    if len(rates) > 1:
        length = args.search_epochs or epochs
        apart = {**settings["options"], "val_split": ""}
        search = [
            {
                **common,
                "options": apart,
                "key": {"kind": "search", "label": label, "epochs": length, "lr": lr, "seed": 0},
            }
            for lr in rates
        ]
        rows = [find_result(task, results) for task in search]
        if None in rows:
            return search
        best = best_rate(rows)
        if best is None:
            return []
        rates = [best]
    return [
        {
            **common,
            "key": {"kind": "train", "label": label, "epochs": epochs, "lr": rates[0], "seed": seed},
            "priority": 1 + number,  # every model's first seed comes before any second
        }
        for number, seed in enumerate(args.seeds)
    ]


def task_basis(label: str, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What all tasks of a model have in common."""
    if label not in settings["entries"]:
        raise UserError(f"{folder / 'settings.json'} has no model {label}: name it in --models of arena.py run, too.")
    return {
        "settings": {"entry": settings["entries"][label]},
        "entry": settings["entries"][label],
        "options": settings["options"],
        "halve": settings["stem_stride"] == "half",
        "num_classes": settings["num_classes"],
        "output": str(folder),
    }


def time_all(argv: list[str]) -> int:
    """Measure each model alone on its device."""
    args, _ = resolve(TimeOptions, argv)
    settings, gpus = prepare(args)
    results = read_results(args.folder / "arena.jsonl", fault)
    rates = {row["label"]: row["lr"] for row in results if row["kind"] == "train" and "failed" not in row}
    tasks = [
        {**task_basis(label, args.folder, settings), "key": {"kind": "time", "label": label}, "lr": lr}
        for label, lr in rates.items()
    ]
    return execute(time_entry, lambda _: tasks, args, gpus)


def scale_all(argv: list[str]) -> int:
    """Measure accuracy at other sizes."""
    args, _ = resolve(ScaleOptions, argv)
    settings, gpus = prepare(args)
    results = read_results(args.folder / "arena.jsonl", fault)
    tasks = []
    for row in results:
        if row["kind"] != "train" or "failed" in row:
            continue
        if not (run_folder(args.folder, row) / "last.pth").is_file():
            raise UserError(f"There is no {run_folder(args.folder, row) / 'last.pth'}, which `scale` reads.")
        run = {k: row[k] for k in ("label", "epochs", "lr", "seed")}
        tasks += [
            {
                **task_basis(row["label"], args.folder, settings),
                "key": {"kind": "scale", **run, "img_size": size},
                "run": {"kind": "train", **run},
            }
            for size in sorted(set(args.sizes))
        ]
    return execute(scale_run, lambda _: tasks, args, gpus)


def prepare(args: TimeOptions | ScaleOptions) -> tuple[dict[str, Any], list[str]]:
    """Settings of a folder with finished runs, on this device; and the GPUs to use."""
    settings = read_settings(args.folder)
    if not any(row["kind"] == "train" for row in read_results(args.folder / "arena.jsonl", fault)):
        raise UserError(f"No run in {args.folder} is finished yet: arena.py run goes on with them.")
    for name in settings["options"].get("imports", ()):
        if name.endswith(".py") and not os.path.isfile(name):
            raise UserError(f"There is no {name} any more: repeat arena.py run with --imports and where it is now.")
    settings["options"]["device"] = args.device or settings["options"]["device"]
    return settings, places(args, settings["options"]["device"])


def execute(
    worker: Callable[[dict], dict],
    plan: Callable[[list[dict]], list[dict]],
    args: PlaceOptions,
    gpus: list[str],
    jobs: int = 1,
    begin: Callable[[list[dict]], None] = lambda results: None,
) -> int:
    """Run what `plan` makes of the results so far, so many at a time on each device, and tabulate.

    `begin` is called first, with the results, once no other command can write to the folder.
    """
    path = args.folder / "arena.jsonl"

    def first(results: list[dict]) -> list[dict]:
        begin(results)
        return plan(results)

    def then(task: dict, row: dict | None, results: list[dict]) -> list[dict]:
        if row:
            say(row, task["key"])
        return plan(results)

    where = dict(jobs=jobs * max(len(gpus), 1), minutes=math.inf if args.minutes is None else args.minutes, gpus=gpus)
    _, left = run_tasks(worker, first, path, **where, then=then, fault=fault)
    tabulate(args.folder)
    print(f"{left} runs are left: the same command goes on with them." if left else "All runs are done.", flush=True)
    return int(left > 0)


def say(row: dict, key: dict) -> None:
    """A line for a finished task."""
    what = f"{row['seconds'] / 60:.1f} minutes"
    if "failed" in row:
        what = row["failed"]
    elif "top1" in row:
        what = f"top-1 {row['top1']:.2f} %, {what}"
    print(" ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in key.values()) + f": {what}", flush=True)


def table_all(argv: list[str]) -> int:
    """Write tables and pictures of what there is."""
    args, _ = resolve(TableOptions, argv)
    tabulate(args.folder, [Path(folder) for folder in args.of or ()])
    return 0


def read_together(folders: Sequence[Path]) -> tuple[dict[str, Any], list[dict]]:
    """The settings and the results of several arenas.

    A search for a rate, or a time, is measured in each of them; all are kept, the searches with their `folder`.

    Raises:
        UserError: They are of different recipes, or hold different results of one run; or one of them does.
    """
    settings, results, runs = None, [], {}
    for folder in folders:
        found = read_settings(folder)
        if settings:
            require_same(folder, found, settings, "leave it out")
            found["entries"] |= settings["entries"]
        settings = found
        for row in read_results(folder / "arena.jsonl", fault):
            name = tuple(row.get(k) for k in ("kind", "label", "epochs", "lr", "seed", "img_size"))
            run, tagged = name, row
            if row["kind"] in ("search", "time"):
                if any(row == other for _, other in runs.values()):  # copied
                    continue
                run, tagged = (*name, folder), {**row, "folder": str(folder)}
            if run not in runs:
                runs[run] = folder, row
                results.append(tagged)
            before, row_of_it = runs[run]
            if row_of_it != row:
                name = " ".join(str(value) for value in name if value is not None)
                if before is folder:
                    raise UserError(f"{folder / 'arena.jsonl'} holds two results of {name}: delete one of the lines.")
                raise UserError(f"{before} and {folder} hold different results of {name}: leave one of them out.")
    return settings, results


def tabulate(folder: Path, sources: Sequence[Path] = ()) -> None:
    """Print and write the tables, and draw the pictures, of a folder, or of several in a further one."""
    sources = list({source.resolve(): source for source in sources or [folder]}.values())
    settings, results = read_together(sources)
    unfinished = [run for source in sources for run in unfinished_runs(source, results)]
    rows = collect(results, settings)
    scaling = scaling_rows(results, rows)
    make_folder(folder, "OUTPUT")
    text = report(rows, unfinished, results, settings)
    print(text, end="", flush=True)
    write_atomically(folder / "arena.md", text)
    content = {"settings": settings, "rows": rows, "unfinished": unfinished, "scaling": scaling}
    write_atomically(folder / "arena.json", json.dumps(content, indent=1) + "\n")
    with figures_if_possible("pictures"):
        plot_all(rows, unfinished, folder)
    if scaling:
        text = scaling_report(scaling, results, settings)
        print("\n" + text, end="", flush=True)
        write_atomically(folder / "scaling.md", text)
        with figures_if_possible("scaling.png"):
            plot_scaling(scaling, folder / "scaling.png")


COMMANDS = {"run": run, "time": time_all, "scale": scale_all, "table": table_all}


def main(argv: list[str] | None = None) -> int:
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__)
        return 0
    if command not in COMMANDS:
        raise UserError(f"unknown command {command} (of {', '.join(COMMANDS)})")
    return COMMANDS[command](rest)


if __name__ == "__main__":
    sys.exit(run_tool(main, stopped=STOPPED))
