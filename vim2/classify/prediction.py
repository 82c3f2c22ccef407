"""The classes that a model sees in images."""

import glob
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from timm.utils import natural_key

from ..command.errors import UserError
from ..command.figures import figures_if_possible
from ..command.images import SUFFIXES, ImageFolder, UnreadableImage, describe_left_out, first_names, read_pixels
from ..command.options import resolve
from ..command.outputs import explain_disk_errors, make_folder
from ..command.processes import start_processes
from ..command.progress import progress_bar, say
from ..files import write_atomically
from .models import autocast, check_reads, compile_model, input_config, load_checkpoint_model
from .options import PredictOptions
from .plots import plot_predictions
from .validation import label_names, numbers_by_name

__all__ = ["predict"]


def predict(argv: list[str] | None = None, /, **options) -> list[dict[str, Any]]:
    """Classify images, as `vim2 predict` does.

    Where an image lies in a folder with the name of a class, that is taken for its true class and shown beside. Images
    that cannot be read are named and left out.

    Args:
        argv: Command line; or else
        options: the same options by name: `predict(images=["cat.jpg"], checkpoint="best.pth")`.

    Returns:
        What predictions.json holds: for each image its `file` and `top`, a list of `label`, `index` and `probability`
        (0 to 1), best first; and its `true_label` where known.

    Raises:
        UserError: Anything that the user can put right, such as that not one image can be read. Then nothing is
            written.
    """
    o, _ = resolve(PredictOptions, argv, options)
    processes = start_processes(o.device, "vim2 predict")
    if processes.world_size > 1:
        raise UserError("predict runs in one process: start it without torchrun.")
    files = find_images(o.images)
    model, facts = load_checkpoint_model(
        o.checkpoint, o.model, o.model_kwargs, o.pretrained, use_ema=not o.no_ema, imports=o.imports
    )
    config = input_config(model, o, o.img_size, facts.get("data_config"))
    names = label_names(facts, o.class_map, model.num_classes)
    # folders may be named as the classes are called here, or as the training data called them
    folders = numbers_by_name(facts.get("class_names") or []) | numbers_by_name(names)
    model.to(processes.device).eval()
    compiled = compile_model(model, o.torchcompile)
    mode = "L" if config["input_size"][0] == 1 else "RGB"
    transform = create_transform(**config, is_training=False)
    context = autocast(processes.device, o.amp, o.amp_dtype)
    check_reads(model, config["input_size"], context, classes=model.num_classes)
    make_folder(Path(o.output))

    predictions: list[dict[str, Any]] = []
    pictures: list[tuple[Image.Image, dict[str, Any]]] = []
    unreadable: list[UnreadableImage] = []
    shown = {round(i) for i in torch.linspace(0, len(files) - 1, min(o.max_pictures, len(files))).tolist()}
    starts = range(0, len(files), o.batch_size)
    for start in progress_bar(starts, "predict", processes):
        batch: dict[int, Image.Image] = {}
        for i, file in enumerate(files[start : start + o.batch_size], start):
            try:
                batch[i] = read_pixels(file, mode)
            except UnreadableImage as error:
                unreadable.append(error)
        if not batch:
            continue
        inputs = torch.stack([transform(image) for image in batch.values()]).to(processes.device)
        with torch.inference_mode(), context():
            logits = compiled(inputs)
        top = logits.float().softmax(-1).topk(min(o.topk, logits.shape[1]))
        for i, probabilities, indices in zip(batch, top.values.tolist(), top.indices.tolist()):
            file = files[i]
            ranked = [dict(label=names[k], index=k, probability=p) for k, p in zip(indices, probabilities)]
            prediction = {"file": str(file), "top": ranked}
            if file.parent.name in folders:
                prediction["true_label"] = names[folders[file.parent.name]]
            predictions.append(prediction)
            if i in shown:
                pictures.append((batch[i], prediction))
    if not predictions:
        raise unreadable[0]
    for prediction in predictions:
        ranked = ", ".join(f"{t['label']} {100 * t['probability']:.1f} %" for t in prediction["top"])
        say(f"{prediction['file']}: {ranked}")
    for error in unreadable:
        say(f"Skipped: {error}")
    write(predictions, len(files), pictures, Path(o.output))
    return predictions


def find_images(given: Sequence[str]) -> list[Path]:
    """The files that images, folders (with all folders in them) and globs stand for.

    Raises:
        UserError: One that stands for none.
    """
    files: list[Path] = []
    left_out: dict[str, dict[str, None]] = {}
    for item in given:
        matches = [Path(item)] if os.path.exists(item) else match(item)
        if not matches:
            raise UserError(f"There is no {item}: give an image, a folder, or a glob in quotation marks.")
        found = [p for p in matches if p.is_file() and (p.suffix.lower() in SUFFIXES or p == Path(item))]
        for path in (p for p in matches if p.is_dir()):
            folder = ImageFolder(path)
            found += [path / name for name in folder.images]
            for why, names in folder.left_out.items():
                left_out.setdefault(why, {}).update((folder.name(name), None) for name in names)
        if not found:
            raise UserError(f"There are no images in {item} ({', '.join(SUFFIXES)}).")
        files += sorted(found, key=lambda p: natural_key(str(p)))
    if left_out:
        say(describe_left_out(first_names(given), {why: list(names) for why, names in left_out.items()}))
    return list(dict.fromkeys(files))


def match(pattern: str) -> list[Path]:
    """What a glob stands for. Unlike glob's, its `**` enters no links to folders, which may lead in circles, and it
    takes a folder such as `dog [1]` by its name, where there is one."""
    parts = Path(pattern).parts
    plain = 0
    while plain < len(parts) and (not glob.has_magic(parts[plain]) or Path(*parts[: plain + 1]).exists()):
        plain += 1
    if plain == len(parts):
        return []
    start = Path(*parts[:plain])
    # pathlib knows two stars as a whole name only
    found = start.glob("/".join(part if part == "**" else part.replace("**", "*") for part in parts[plain:]))
    hidden = any(part.startswith(".") for part in parts[plain:])
    return [path for path in found if hidden or not any(p.startswith(".") for p in path.relative_to(start).parts)]


def write(
    predictions: list[dict[str, Any]], files: int, pictures: list[tuple[Image.Image, dict[str, Any]]], folder: Path
) -> None:
    """Write predictions.json, and predictions.png of the pictures, each with its prediction."""
    with explain_disk_errors(), figures_if_possible("predictions.png"):
        write_atomically(folder / "predictions.json", json.dumps(predictions, indent=1, ensure_ascii=False) + "\n")
        all_of_them = f"all {files}" if len(predictions) == files else f"{len(predictions)} of {files}"
        say(f"{folder / 'predictions.json'} has {all_of_them}")
        if pictures:
            images, theirs = zip(*pictures)
            plot_predictions(images, theirs, folder / "predictions.png")
            say(f"{folder / 'predictions.png'} shows {len(pictures)} of {len(predictions)}")
