"""The classes that a model sees in images."""

import glob
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data import create_transform, get_img_extensions
from timm.utils import natural_key

from ..checkpoints import write_atomically
from ..command.errors import UserError
from ..command.figures import figures_if_possible
from ..command.options import resolve
from ..command.processes import start_processes
from ..command.progress import progress_bar, say
from ..command.runs import explain_disk_errors
from .data import UNREADABLE
from .models import autocast, compile_model, input_config, load_checkpoint_model
from .options import PredictOptions
from .plots import plot_predictions
from .validation import label_names

__all__ = ["predict"]


def predict(argv: list[str] | None = None, /, **options) -> list[dict[str, Any]]:
    """Classify images, as `tools/classify.py predict` does.

    Where an image lies in a folder with the name of a class, that is taken for its true class and shown beside.

    Args:
        argv: Command line; or else
        options: the same options by name: `predict(images=["cat.jpg"], checkpoint="best.pth")`.

    Returns:
        What predictions.json holds: for each image its `file` and `top`, a list of `label`, `index` and `probability`
        (0 to 1), best first; and its `true_label` where known.

    Raises:
        UserError: Anything that the user can put right. Then nothing is written.
    """
    o, _ = resolve(PredictOptions, argv, options)
    processes = start_processes(o.device, "tools/classify.py predict")
    if processes.world_size > 1:
        raise UserError("predict runs in one process: start it with python, not with torchrun.")
    files = find_images(o.images)
    model, facts = load_checkpoint_model(o.checkpoint, o.model, o.model_kwargs, o.pretrained, use_ema=not o.no_ema)
    config = input_config(model, o, o.img_size, facts.get("data_config"))
    names = label_names(facts, o.class_map, model.num_classes)
    model.to(processes.device).eval()
    compiled = compile_model(model, o.torchcompile)
    mode = "L" if config["input_size"][0] == 1 else "RGB"
    transform = create_transform(**config, is_training=False)
    context = autocast(processes.device, o.amp, o.amp_dtype)

    predictions: list[dict[str, Any]] = []
    pictures: list[Image.Image] = []
    shown = {round(i) for i in torch.linspace(0, len(files) - 1, min(o.max_pictures, len(files))).tolist()}
    starts = range(0, len(files), o.batch_size)
    for start in progress_bar(starts, "predict", processes):
        batch = [open_image(file, mode) for file in files[start : start + o.batch_size]]
        pictures += [image for i, image in enumerate(batch, start) if i in shown]
        inputs = torch.stack([transform(image) for image in batch]).to(processes.device)
        with torch.inference_mode(), context():
            logits = compiled(inputs)
        top = logits.float().softmax(-1).topk(min(o.topk, logits.shape[1]))
        for file, probabilities, indices in zip(files[start:], top.values.tolist(), top.indices.tolist()):
            ranked = [dict(label=names[i], index=i, probability=p) for i, p in zip(indices, probabilities)]
            prediction = {"file": str(file), "top": ranked}
            if file.parent.name in names:
                prediction["true_label"] = file.parent.name
            predictions.append(prediction)
    for prediction in predictions:
        ranked = ", ".join(f"{t['label']} {100 * t['probability']:.1f} %" for t in prediction["top"])
        say(f"{prediction['file']}: {ranked}")
    write(predictions, pictures, sorted(shown), Path(o.output))
    return predictions


def find_images(given: Sequence[str]) -> list[Path]:
    """The files that images, folders (with all folders in them) and globs stand for.

    Raises:
        UserError: One that stands for none.
    """
    extensions = get_img_extensions(as_set=True)
    files = []
    for item in given:
        matches = [item] if os.path.exists(item) else glob.glob(item, recursive=True)
        if not matches:
            raise UserError(f"There is no {item}: give an image, a folder, or a glob in quotation marks.")
        found = [p for match in matches for p in ([Path(match)] if os.path.isfile(match) else Path(match).rglob("*"))]
        found = [p for p in found if p.is_file() and (p.suffix.lower() in extensions or str(p) == item)]
        if not found:
            raise UserError(f"There are no images in {item} ({', '.join(sorted(extensions))}).")
        files += sorted(found, key=lambda p: natural_key(str(p)))
    return list(dict.fromkeys(files))


def open_image(file: Path, mode: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            # photographs carry their rotation aside; training data seldom do, and timm ignores it there
            return ImageOps.exif_transpose(image).convert(mode)
    except UNREADABLE as error:
        raise UserError(f"{file} cannot be read as an image ({error}): leave it out or replace it.") from None


def write(predictions: list[dict[str, Any]], pictures: list[Image.Image], shown: list[int], folder: Path) -> None:
    """Write predictions.json, and predictions.png of those shown."""
    with explain_disk_errors(), figures_if_possible("predictions.png"):
        write_atomically(folder / "predictions.json", json.dumps(predictions, indent=1, ensure_ascii=False) + "\n")
        if pictures:
            plot_predictions(pictures, [predictions[i] for i in shown], folder / "predictions.png")
            say(f"{folder / 'predictions.png'} shows {len(pictures)} of {len(predictions)}")
