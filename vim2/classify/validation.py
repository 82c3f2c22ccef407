"""Accuracy of a checkpoint at one or many image sizes."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo

from ..command.errors import UserError
from ..command.figures import figures_if_possible
from ..command.images import first_names
from ..command.options import resolve
from ..command.outputs import explain_disk_errors, make_folder
from ..command.processes import start_processes
from ..command.progress import say
from ..files import write_atomically
from . import data, memory
from .data import class_names, count_classes, hold_out, open_split, say_left_out
from .evaluation import evaluate
from .facts import weights_file
from .folders import SPLITS, find_split, read_class_map
from .models import autocast, check_reads, compile_model, input_config, load_checkpoint_model
from .options import ValidateOptions
from .plots import plot_input_scaling

__all__ = ["validate"]


def validate(argv: list[str] | None = None, /, **options) -> list[dict[str, Any]]:
    """Measure top-1 and top-5 accuracy, as `vim2 validate` does.

    Args:
        argv: Command line; or else
        options: the same options by name: `validate(data_dir="flowers", checkpoint="best.pth", img_size=[224, 384])`.

    Returns:
        What validation.json holds: a dictionary for each image size.

    Raises:
        UserError: Anything that the user can put right.
    """
    o, _ = resolve(ValidateOptions, argv, options)
    processes = start_processes(o.device, "vim2 validate")
    memory.preload()
    model, facts = load_checkpoint_model(
        o.checkpoint, o.model, o.model_kwargs, o.pretrained, use_ema=not o.no_ema, imports=o.imports
    )
    name = o.model or facts["arch"]
    images = open_images(o, facts, model)
    say_left_out(processes, images)
    model.to(processes.device).eval()
    compiled = compile_model(model, o.torchcompile)
    configs = [input_config(model, o, size, facts.get("data_config")) for size in o.img_size or [None]]
    context = autocast(processes.device, o.amp, o.amp_dtype)
    for config in configs:
        check_reads(model, config["input_size"], context, classes=model.num_classes)
    folder = Path(o.output or (weights_file(o.checkpoint).parent if o.checkpoint else "."))
    if processes.is_first:
        make_folder(folder)
    rows = []
    for config in configs:
        size = config["input_size"][-1]
        # as many pixels a step at every size, so that what fits into memory at the first fits at all
        first = rows[0]["img_size"] if rows else size
        batch_size = max(min(o.batch_size, int(o.batch_size * (first / size) ** 2)), 1)
        source = memory if o.in_memory or images.is_packed else data
        loader = source.eval_loader(images, config, batch_size, o.workers, processes)
        scores = evaluate(compiled, loader, processes, context, f"{size} px")
        unreadable, names = images.report_unreadable(processes)
        for unreadable_name in names:
            say(f"Skipped, cannot be read: {unreadable_name}", processes)
        if not scores["images"]:
            raise UserError("Not one of the images can be read: check the data.")
        rows.append(
            {
                "model": name,
                "checkpoint": o.checkpoint,
                "img_size": size,
                "crop_pct": config["crop_pct"],
                "top1": scores["top1"],
                "top5": scores["top5"],
                "loss": scores["loss"],
                "images": scores["images"],
                "unreadable": unreadable,
                "images_per_second": scores["images"] / scores["seconds"],
            }
        )
    if processes.is_first:
        write(rows, folder)
    processes.finish()
    return rows


def open_images(options: ValidateOptions, facts: dict[str, Any], model: torch.nn.Module):
    """The images, their classes numbered as the model numbers them."""
    names = facts.get("class_names")
    class_map = options.class_map
    is_by_name = names and class_map is None and not options.dataset  # the folders are to be the checkpoint's classes
    if is_by_name:
        class_map = numbers_by_name(names)
    elif names and class_map is not None:
        class_map = choose_classes(class_map, names, model.num_classes)
    # a user's own model need not tell its channels
    mode = "L" if (getattr(model, "in_chans", None) or facts.get("in_chans")) == 1 else "RGB"
    opened = (options.dataset, options.data_dir, options.split)
    found = class_names(open_split(*opened, mode=mode, download=options.dataset_download))
    # folders of classes that the model does not know would otherwise be left out without a word
    unknown = sorted(set(found) - set(names)) if is_by_name and found is not None else []
    if unknown:
        raise UserError(
            f"The data have classes that {options.checkpoint or facts['arch']} does not know ({first_names(unknown)}; "
            f"it knows {first_names(names)}): check --data-dir, or list those to use in a file and give it as "
            "--class-map."
        )
    if is_by_name:
        require_one_each(found or (), names)
    images = open_split(*opened, class_map=class_map, mode=mode)
    classes = len(found) if found is not None else count_classes(images)
    if class_map is None and classes is not None and classes != model.num_classes:
        raise UserError(
            f"The data have {classes} classes, the model {model.num_classes}: check --data-dir and --checkpoint, or "
            "list the model's classes in a file, in its order, and give it as --class-map."
        )
    root, args = options.data_dir, facts.get("args", {})
    unsplit = root and facts.get("held_out") and args.get("data_dir") and not find_split(root, options.split)
    if unsplit and Path(root).resolve() == Path(args["data_dir"]).resolve():
        trained_on = options.split in SPLITS[0]
        images = hold_out(images, args["holdout"])[0 if trained_on else 1]
        say(f"Validating on the {len(images)} images of {root} that training {'saw' if trained_on else 'set aside'}.")
    return images


def choose_classes(class_map: str, names: list[str], num_classes: int) -> dict[str, int]:
    """Classes of a file, numbered as the model numbers them, whose checkpoint names its own.

    Args:
        class_map: The file: some of the model's classes, in any order, or other names for all, in the model's order.
        names: The model's own.
        num_classes: The model's.

    Raises:
        UserError: It is neither.
    """
    given = read_class_map(class_map)
    if len(given) != num_classes or is_shuffled(list(given), names):
        if given.keys() <= set(names):
            require_one_each(given, names)
            numbers = numbers_by_name(names)
            return {name: numbers[name] for name in given}
        raise UserError(
            f"{class_map} names {first_names([name for name in given if name not in names])}, which the model does "
            f"not know (it knows {first_names(names)}): list some of these, or other names for all of them, in the "
            "model's order."
        )
    return given


def is_shuffled(names: list[str], known: list[str]) -> bool:
    """Whether one of the known names stands at another number than its own."""
    there = set(known)
    return any(name in there and known[i : i + 1] != [name] for i, name in enumerate(names))


def numbers_by_name(names: Sequence[str]) -> dict[str, int]:
    """The numbers of a model's classes by their names, of those that have one for themselves: ImageNet has two cranes,
    and which of them a folder of that name holds nothing tells."""
    count = Counter(names)
    return {name: i for i, name in enumerate(names) if count[name] == 1}


def require_one_each(wanted: Iterable[str], names: Sequence[str]) -> None:
    """Raises UserError where one of the wanted names, which are among a model's, stands for several of its classes."""
    numbers = numbers_by_name(names)
    if several := [name for name in wanted if name not in numbers]:
        raise UserError(
            f"The model has several classes called {several[0]}, and a folder of that name does not say which it "
            "holds: list other names for all of its classes, in its order, in a file, give it as --class-map, and name "
            "the folders by it."
        )


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    """Write and print the table, and what goes with it."""
    table = ["| image size | top-1, % | top-5, % | loss | images | images/s |", "|---|---|---|---|---|---|"]
    table += [
        f"| {r['img_size']} | {r['top1']:.2f} | {r['top5']:.2f} | {r['loss']:.4f} | {r['images']} "
        f"| {r['images_per_second']:.0f} |"
        for r in rows
    ]
    say("\n".join(table))
    with explain_disk_errors():
        write_atomically(folder / "validation.md", "\n".join(table) + "\n")
        write_atomically(folder / "validation.json", json.dumps(rows, indent=1) + "\n")
        if len(rows) > 1:
            with figures_if_possible("input_scaling.png"):
                plot_input_scaling(rows, rows[0]["model"], folder / "input_scaling.png")
    if rows[0]["unreadable"]:
        say(f"{rows[0]['unreadable']} unreadable images were left out.")


def label_names(facts: dict[str, Any], class_map: str | None, num_classes: int) -> list[str]:
    """Names of a model's classes: from a file, its checkpoint or pretrained weights, or ImageNet's if there are 1000.

    Where these also describe the classes, by lists of synonyms, the first of each stands for its class.

    Raises:
        UserError: A file that is missing or names another number of classes.
    """
    if class_map is not None:
        names = list(read_class_map(class_map))
        if len(names) != num_classes:
            raise UserError(f"{class_map} names {len(names)} classes, the model has {num_classes}.")
        known = facts.get("class_names") or []
        if is_shuffled(names, known):
            raise UserError(
                f"{class_map} gives the model's own classes another order than the checkpoint, which begins with "
                f"{first_names(known)}: keep to it, or leave --class-map out."
            )
        return names
    synonyms = {name: text.split(",") for name, text in facts.get("class_descriptions", {}).items()}
    names = [synonyms.get(name, [name])[0] for name in facts.get("class_names") or []]
    if not names and num_classes == 1000:
        names = ImageNetInfo().label_descriptions()
    return names + [str(i) for i in range(len(names), num_classes)]
